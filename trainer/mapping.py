"""Raw batches to batches of row indices: the mapping stage, ahead of training, for all id spaces of a run.

A batch is mapped in two halves. ``ask`` learns what it needs (distinct ids to their owners) and changes nothing;
``answer`` gives the rows. Between them the caller can make room: grow tables, or evict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.batch import Batch, Fresh, bags_of
from trainer.errors import DataError
from trainer.exchange import Exchange, Received
from trainer.idmap import Deduplicator, Distinct
from trainer.lengths import Cut, last_ids
from trainer.rows import Cursor, RawBatch
from trainer.spaces import COLD_ROW, FIRST_SLOT, IdSpace
from trainer.vocabulary import COLD, Events, Request, Vocabulary

Int64s = NDArray[np.int64]


@dataclass(slots=True)
class SpaceState:
    """One id space as this rank's mapping stage knows it; its stripe changes when its tables grow."""

    space: IdSpace
    vocabulary: Vocabulary | None
    """For ``exact`` spaces: the ids that this rank owns."""

    ids_seen: int
    """For ``identity`` and ``hashed`` spaces: one past the highest logical id in use, over all ranks."""

    holders_everywhere: bool
    """Whether some table of the space has rows of this rank's stripe on other ranks: then all hear of new ids."""

    unknown: Events = field(default_factory=Events)
    cut: Cut = field(default_factory=Cut)
    """What lists had beyond the table's ``max_length``, since this was last told."""

    @property
    def name(self) -> str:
        """The space's name."""
        return self.space.name

    def slots_used(self, owner: int, rank: int) -> int:
        """One past the highest slot used of an owner; for ``exact`` spaces only this rank's is known."""
        if self.vocabulary is None:
            return self.space.slots_below(owner, self.ids_seen)
        if owner != rank:
            raise ValueError(f"rank {rank} does not know the slots of owner {owner}")
        return self.vocabulary.slots_used


@dataclass(frozen=True, slots=True)
class Question:
    """One space's part of a batch, before rows are given."""

    distinct: Distinct
    """Distinct ids, in order of first appearance, and where each id of the batch stands among them."""

    lengths: NDArray[np.int32]
    """Ids of each feature and row, at most ``max_length``: [F + S, B]."""

    received: Received | None
    merged: NDArray[np.int32] | None
    """Place of each received id among the request's distinct ones; None where they are those, from one rank."""

    request: Request | None
    needed: int
    """The stripe that the batch needs, as far as this rank knows."""

    ids_seen: int = 0
    """For ``identity`` spaces in training: one past the highest id of the batch on this rank."""

    def numbers(self) -> tuple[int, int, int, int]:
        """What ``Needs`` is made of."""
        num_new = 0 if self.request is None else len(self.request.admitted)
        return self.needed, self.ids_seen, len(self.distinct.ids), num_new


@dataclass(frozen=True, slots=True)
class Needs:
    """What a batch needs on all ranks; by space, in the order of the mapper's, but for ``seconds``."""

    stripes: list[int]
    """The stripe that it needs at least."""

    ids_seen: list[int]
    """For ``identity`` spaces: one past its highest id."""

    num_distinct: list[int]
    """The most distinct ids that a rank has."""

    num_new: list[list[int]]
    """How many ids of each owner get a slot now."""

    seconds: int
    """The latest ``data.timestamp`` of its rows."""

    label_weights: tuple[float, ...] = ()
    """For each label the weight of its rows that have it, added up in the order of the ranks; empty as in RawBatch."""


def agree(
    exchange: Exchange,
    questions: Sequence[Question] | None,
    num_spaces: int,
    now: int,
    label_weights: Sequence[float] = (),
) -> Needs | None:
    """What all ranks need together; None if one has no questions, because its batch is wrong. Collective.

    ``now``: the latest ``data.timestamp`` of this rank's rows. ``label_weights``: of its rows, as many on every rank.
    """
    bits = np.array(label_weights, dtype=np.float64).view(np.int64)
    own = np.zeros((num_spaces, 4), dtype=np.int64)
    if questions is not None:
        own[:] = [question.numbers() for question in questions]
    everyone = exchange.gather([questions is None, now, *own.flat, *bits])
    if everyone[:, 0].any():
        return None
    numbers = everyone[:, 2 : 2 + own.size].reshape(-1, *own.shape)
    weights = np.ascontiguousarray(everyone[:, 2 + own.size :]).view(np.float64)
    stripes, ids_seen, num_distinct, _ = numbers.max(axis=0).T.tolist()
    num_new, seconds = numbers[:, :, 3].T.tolist(), int(everyone[:, 1].max())
    return Needs(stripes, ids_seen, num_distinct, num_new, seconds, tuple(map(sum, weights.T.tolist())))


class Tables(Protocol):
    """What the mapping must know of the tables; they may grow and be regrouped while it pauses."""

    @property
    def spaces(self) -> Mapping[str, SpaceState]:
        """By name, in an order that stays."""

    def spaces_by_collection(self) -> Mapping[str, Sequence[str]]:
        """Names of the spaces that each collection of tables reads, in the order of its tables."""

    def step_after(self, cursor: Cursor) -> int:
        """Steps of the run, and of those that it goes on from, that lie before a cursor."""

    @property
    def equally_long(self) -> Sequence[str]:
        """Sequences that must have as many ids as each other in every row."""


class Mapper:
    """Maps raw batches for training, or for scoring, which changes nothing: unknown ids read the cold row."""

    def __init__(
        self,
        tables: Tables,
        features: Sequence[str],
        place: Callable[[int], str],
        exchange: Exchange,
        *,
        learns: bool,
    ) -> None:
        """``features``: sparse columns of the raw batch. ``place(row_number)`` names a row in messages."""
        self.states = tuple(tables.spaces.values())
        self.learns = learns
        self._tables = tables
        self._features = tuple(features)
        self._place = place
        self._exchange = exchange
        self._distinct = Deduplicator()
        number_of = {feature: number for number, feature in enumerate(features)}
        spaces = [state.space for state in self.states]
        self._numbers = [[number_of[feature] for feature in (*space.pooled, *space.sequences)] for space in spaces]
        self._equally_long = [number_of[feature] for feature in tables.equally_long]

    def ask(self, raw: RawBatch) -> list[Question]:
        """What the batch needs of each space. Collective where a space is ``exact``.

        Raises:
            DataError: an id does not fit its table; the message has feature, table, id and row. Or sequences that
                belong together do not have as many ids.
        """
        self._check_lengths(raw)
        return [self._ask(state, numbers, raw) for state, numbers in zip(self.states, self._numbers, strict=True)]

    def _check_lengths(self, raw: RawBatch) -> None:
        lengths = raw.lengths[self._equally_long]
        wrong = (lengths != lengths[:1]).any(axis=0)
        if wrong.any():
            row = int(wrong.argmax())
            names = [self._features[number] for number in self._equally_long]
            found = ", ".join(f"{name!r} {length}" for name, length in zip(names, lengths[:, row], strict=True))
            raise DataError(
                f"{self._place(int(raw.row_numbers[row]))}: sequences that the model reads side by side have different "
                f"numbers of ids: {found}; give them equally many (a null is no id)"
            )

    def map(self, raw: RawBatch) -> Batch:
        """The batch of row indices, where the tables have room for it. Collective where a space is ``exact``."""
        questions = self.ask(raw)
        needs = agree(self._exchange, questions, len(self.states), raw.now, raw.label_weights)
        if needs is None:
            raise RuntimeError("another rank has no questions, and this one has")
        return self.answer(raw, questions, needs)

    def _ask(self, state: SpaceState, numbers: list[int], raw: RawBatch) -> Question:
        ids, lengths = _ids_of(raw, numbers), raw.lengths[numbers]
        if state.space.rules.max_length:
            ids, lengths = last_ids(ids, lengths, state.space.rules.max_length)
        distinct = self._distinct(ids)
        vocabulary = state.vocabulary
        if vocabulary is None:
            needed = self._stripe_for(state, distinct.ids, ids, lengths, numbers, raw)
            counts = self.learns and state.space.kind == "identity"
            ids_seen = int(distinct.ids.max(initial=-1)) + 1 if counts else 0
            return Question(distinct, lengths, None, None, None, needed, ids_seen)
        received = self._exchange.to_owners(distinct.ids, distinct.counts.astype(np.int64))
        asked, sightings, merged = self._merge(received)
        request = vocabulary.prepare(asked, sightings)
        needed = vocabulary.slots_needed(request) if self.learns else 0
        return Question(distinct, lengths, received, merged, request, needed)

    def _merge(self, received: Received) -> tuple[Int64s, Int64s, NDArray[np.int32] | None]:
        """Distinct ids that were received, their sightings on all ranks, and the place of each received one."""
        ids, counts = (np.ascontiguousarray(column) for column in received.columns.T)
        if len(received.from_ranks) == 1:
            return ids, counts, None
        merged = self._distinct(ids)
        sightings = np.bincount(merged.inverse, weights=counts, minlength=len(merged.ids))
        return merged.ids, sightings.astype(np.int64), merged.inverse

    def _stripe_for(
        self,
        state: SpaceState,
        distinct: Int64s,
        ids: Int64s,
        lengths: NDArray[np.int32],
        numbers: list[int],
        raw: RawBatch,
    ) -> int:
        """The stripe that an ``identity`` or ``hashed`` space needs for these ids."""
        if state.space.kind == "hashed" or not len(distinct):
            return state.space.stripe
        # One comparison finds both ends: a negative id is huge as an unsigned one.
        outside = distinct.view(np.uint64) >= np.uint64(_most_ids(state.space))
        if outside.any() and (self.learns or distinct.min() < 0):
            wrong = distinct[(outside if self.learns else distinct < 0).argmax()]
            place = self._explain(numbers, lengths, raw, int((ids == wrong).argmax()))
            raise DataError(
                f"{place}: id {wrong} is not a row of table {state.name!r}, which has ids = 'identity' and rows 0 to "
                f"{_most_ids(state.space) - 1}; raise the table's max_rows or use ids = 'exact'"
            )
        highest = int(distinct.max())
        return max(state.space.stripe, highest // state.space.world_size + 1 + FIRST_SLOT) if self.learns else 0

    def _explain(self, numbers: list[int], lengths: NDArray[np.int32], raw: RawBatch, index: int) -> str:
        """File, row and feature of an id of a space by its place among the space's ids."""
        counts = lengths.sum(axis=1, dtype=np.int64)
        ends = counts.cumsum()
        at = int(np.searchsorted(ends, index, side="right"))
        within = index - int(ends[at] - counts[at])
        row = int(np.searchsorted(lengths[at].cumsum(), within, side="right"))
        return f"{self._place(int(raw.row_numbers[row]))}, feature {self._features[numbers[at]]!r}"

    def note_ids_seen(self, highest: Sequence[int]) -> None:
        """``identity`` spaces: one past the highest id of the batch on any rank, in the order of the spaces."""
        for state, ids_seen in zip(self.states, highest, strict=True):
            if state.space.kind == "identity":
                state.ids_seen = max(state.ids_seen, ids_seen)

    def evict(self, questions: Sequence[Question]) -> None:
        """Free rows of this owner's tables where the batch finds too few.

        Raises:
            DataError: the batch alone needs more rows than there are.
        """
        for state, question in zip(self.states, questions, strict=True):
            if state.vocabulary is not None and question.request is not None and question.needed > state.space.stripe:
                state.vocabulary.evict(question.request, state.space.stripe)

    def answer(self, raw: RawBatch, questions: Sequence[Question], needs: Needs) -> Batch:
        """The batch of row indices. Collective where a space is ``exact``; ``needs``: what ``agree`` returned."""
        rows, bags, fresh = {}, {}, []
        now = {"steps": self._tables.step_after(raw.cursor), "seconds": needs.seconds}
        for state, numbers, question, num_new in zip(self.states, self._numbers, questions, needs.num_new, strict=True):
            if question.request is None:
                rows[state.name] = self._formula_rows(state, question.distinct)
            else:
                rows[state.name], new = self._given_rows(
                    state, question, question.request, now[state.space.rules.expire_unit], num_new
                )
                fresh += [new] if new is not None else []
            if state.space.rules.max_length:
                state.cut.add(raw.lengths[numbers], question.lengths)
            bags[state.name] = bags_of(question.lengths, question.distinct, len(state.space.sequences))
        room = dict(zip(rows, needs.num_distinct, strict=True))
        return Batch(
            dense=torch.from_numpy(raw.dense),
            sparse={
                collection: _jagged({name: rows[name] for name in names}, max(1, *(room[name] for name in names)))
                for collection, names in self._tables.spaces_by_collection().items()
            },
            bags=bags,
            fresh=tuple(fresh),
            labels=torch.from_numpy(raw.labels),
            num_rows=raw.num_rows,
            global_rows=raw.global_rows,
            cursor=raw.cursor,
            raw=raw,
            weights=None if raw.weights is None else torch.from_numpy(raw.weights),
            label_weights=needs.label_weights,
        )

    def _formula_rows(self, state: SpaceState, distinct: Distinct) -> Int64s:
        space, ids = state.space, distinct.ids
        if space.kind == "hashed":
            return space.rows_of(space.hashed(ids))
        if self.learns:
            return space.rows_of(ids)
        known = ids < state.ids_seen
        state.unknown.unknown += int(distinct.counts[~known].sum())
        return np.where(known, space.rows_of(ids), COLD_ROW)

    def _given_rows(
        self, state: SpaceState, question: Question, request: Request, now: int, num_new: Sequence[int]
    ) -> tuple[Int64s, Fresh | None]:
        """Rows of the batch's distinct ids, and the rows that need first values on this rank."""
        vocabulary, received, fresh = state.vocabulary, question.received, None
        if vocabulary is None or received is None:
            raise TypeError("an exact space was asked without its vocabulary")
        slots = request.slots
        if self.learns:
            given = vocabulary.commit(request, now)
            slots = given.slots
            fresh = self._fresh(state, slots[given.new], request.ids[given.new], num_new)
        else:
            state.unknown.unknown += int(request.counts[slots == COLD].sum())
        answers = self._exchange.to_askers(received, slots if question.merged is None else slots[question.merged])
        owners = _owners_of_answers(received)
        return np.where(answers == COLD, COLD_ROW, owners * state.space.stripe + answers), fresh

    def _fresh(self, state: SpaceState, slots: Int64s, ids: Int64s, num_new: Sequence[int]) -> Fresh:
        rank = self._exchange.rank
        columns = np.stack([rank * state.space.stripe + slots, ids], axis=1)
        if state.holders_everywhere:
            columns = self._exchange.to_all(columns, num_new)
        return Fresh(state.name, columns[:, 0].copy(), columns[:, 1].copy())


def _jagged(rows: Mapping[str, Int64s], stride: int) -> KeyedJaggedTensor:
    """Distinct rows by id space, each a bag of its own, followed by empty bags up to ``stride``.

    All ranks have the same stride, as TorchRec wants. What it would compute again each step is given to it.
    """
    sizes = [len(each) for each in rows.values()]
    lengths = np.zeros((len(rows), stride), dtype=np.int32)
    for number, size in enumerate(sizes):
        lengths[number, :size] = 1
    offsets = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = list(rows.values())
    return KeyedJaggedTensor(
        keys=list(rows),
        values=torch.from_numpy(values[0] if len(values) == 1 else np.concatenate(values)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        offsets=torch.from_numpy(offsets),
        stride=stride,
        length_per_key=sizes,
        offset_per_key=[0, *accumulate(sizes)],
    )


def _ids_of(raw: RawBatch, numbers: list[int]) -> Int64s:
    """Ids of some features of the batch, in their order; one slice where the features stand together."""
    counts = raw.lengths.sum(axis=1, dtype=np.int64)
    ends = counts.cumsum()
    first, last = numbers[0], numbers[-1]
    if numbers == list(range(first, last + 1)):
        return raw.ids[ends[first] - counts[first] : ends[last]]
    return np.concatenate([raw.ids[ends[number] - counts[number] : ends[number]] for number in numbers])


def _most_ids(space: IdSpace) -> int:
    """How many logical ids an ``identity`` space may have."""
    rules = space.rules
    return rules.max_rows or rules.rows


def _owners_of_answers(received: Received) -> Int64s:
    """The owner that answered each of this rank's distinct ids."""
    owners = np.empty(len(received.order), dtype=np.int64)
    owners[received.order] = np.repeat(np.arange(len(received.to_ranks)), received.to_ranks)
    return owners
