"""Converts users' histories of items to rows that ask: was this the next item?

Input: a text with a line for each user, its number and then its items from first to last, and a JSON object with the
attributes of each item, of which the first is taken for its category. Amazon's reviews of 2014 are public in this form.
Output: as of ``trainer.prepare``. A user's last item is tested, the one before validates, and all before these are
trained on but for the first, which nothing comes before.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.order import mix64
from trainer.prepare import PrepareReport, SplitReport
from trainer.prepare_statistics import STATISTICS, Statistics
from trainer.splits import PREPARED_RECORD, SPLITS, SplitWriter, staged, write_record

NEGATIVES = 1
"""Rows of label 0 beside each of label 1."""

LONGEST = 50
"""Items of a history that are kept, the last ones."""

_USERS_AT_ONCE = 1024
_LEAST = 4
"""Items of a user who has rows in every split."""

_LISTS = ("item_history", "category_history", "other_items", "other_categories")
SCHEMA = pa.schema(
    [
        ("label", pa.int8()),
        *((name, pa.int64()) for name in ("user", "item", "category")),
        *((name, pa.list_(pa.int64())) for name in _LISTS),
    ]
)
"""``other_items``: beside each item of the history one that the user never had; categories are those of the items."""

KINDS = (
    {"label": "label", "user": "user"}
    | dict.fromkeys(("item", "category"), "sparse")
    | dict.fromkeys(_LISTS, "sequence")
)
"""What the columns are, for statistics."""


@dataclass(frozen=True, slots=True)
class Behaviors:
    """Who had what, in which order."""

    users: dict[int, list[int]]
    """Items of each user, from first to last."""

    categories: dict[int, int]
    """Category of each item."""


def prepare(inputs: Sequence[Path], output: Path, *, seed: int = 0, overwrite: bool = False) -> PrepareReport:
    """Convert a text of users and a JSON object of items (files, or their folder) to ``output``.

    Rows stand by user, and within a user by time; negatives follow their positive row. Which items are drawn is a
    function of the seed and the user: different ones, uniformly from those that the user has nowhere in the file.

    Raises:
        DataError: missing files, a malformed line (named by file and number), an item without attributes, or
            ``output`` has data already and not ``overwrite``, or cannot be written.
    """
    text, attributes = _input_files(inputs)
    behaviors = read(text, attributes)
    counts = {split: Statistics(KINDS) for split in SPLITS}
    with staged(output, overwrite=overwrite) as staging:
        with ExitStack() as stack:
            writers = {split: stack.enter_context(SplitWriter(staging / split, SCHEMA)) for split in SPLITS}
            for split, batch in _batches(behaviors, seed):
                writers[split].write(batch)
                counts[split].take(batch)
        statistics = {split: each.to_plain() for split, each in counts.items()}
        splits = {split: SplitReport.of(found, "label") for split, found in statistics.items()}
        report = PrepareReport("beauty", (str(text), str(attributes)), None, splits)
        write_record(staging / STATISTICS, statistics)
        write_record(staging / PREPARED_RECORD, asdict(report))
    return report


def read(text: Path, attributes: Path) -> Behaviors:
    """The content of both files, checked."""
    categories = _categories(attributes)
    users: dict[int, list[int]] = {}
    for number, line in enumerate(_bytes_of(text).splitlines(), start=1):
        try:
            user, *items = map(int, line.split())
        except ValueError as error:
            raise DataError(f"{text}:{number}: {line[:80]!r} is not a user and items, all integers; mend it") from error
        if user in users or not items:
            what = "is there twice" if user in users else "has no items"
            raise DataError(f"{text}:{number}: user {user} {what}; give each user one line with items")
        unknown = next((item for item in items if item not in categories), None)
        if unknown is not None:
            raise DataError(f"{text}:{number}: item {unknown} has no attributes in {attributes}; is it the right file?")
        if len(categories) - len(set(items)) < NEGATIVES * len(items):
            raise DataError(
                f"{text}:{number}: user {user} has so many items that too few others are left to set beside them"
            )
        users[user] = items
    if not any(len(items) >= _LEAST for items in users.values()):
        raise DataError(f"{text}: no user has {_LEAST} items, of which one each is trained on, validates and is tested")
    return Behaviors(users, categories)


def _categories(path: Path) -> dict[int, int]:
    """The first attribute of each item."""
    try:
        return {int(item): int(found[0]) for item, found in json.loads(_bytes_of(path)).items()}
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(
            f"{path}: expected a JSON object of lists of integers, each with one or more; {error}"
        ) from error


def _bytes_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}; check that the file is whole") from error


def _input_files(inputs: Sequence[Path]) -> tuple[Path, Path]:
    found = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    named = [[file for file in found if file.name.removesuffix(".gz").endswith(end)] for end in (".txt", ".json")]
    if [len(files) for files in named] != [1, 1]:
        names = ", ".join(map(str, found)) or "none"
        raise DataError(
            f"expected one file *.txt and one *.json, plain or .gz, found {names}; name them or their folder"
        )
    return named[0][0], named[1][0]


def _batches(behaviors: Behaviors, seed: int) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Rows of some users at a time, by split."""
    items = np.array(sorted(behaviors.categories), dtype=np.int64)
    waiting: dict[str, list[tuple[object, ...]]] = {split: [] for split in SPLITS}
    for number, (user, had) in enumerate(behaviors.users.items(), start=1):
        if len(had) >= _LEAST:
            for split, row in _rows_of(user, had, items, behaviors.categories, seed):
                waiting[split].append(row)
        if number % _USERS_AT_ONCE == 0 or number == len(behaviors.users):
            for split, rows in waiting.items():
                columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA)
                arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
                yield split, pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
                rows.clear()


def _rows_of(
    user: int, had: list[int], items: NDArray[np.int64], categories: dict[int, int], seed: int
) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The rows of one user, each with its split."""
    splits = ["train"] * (len(had) - 2) + ["validation", "test"]
    drawn = _draw(NEGATIVES * len(had), set(had), items, (seed, user))
    others = [drawn[place :: len(had)] for place in range(len(had))]
    for place in range(1, len(had)):
        past = slice(max(0, place - LONGEST), place)
        before, beside = had[past], [each[0] for each in others[past]]
        lists = [before, [categories[item] for item in before], beside, [categories[item] for item in beside]]
        for label, item in ((1, had[place]), *((0, item) for item in others[place])):
            yield splits[place], (label, user, item, categories[item], *lists)


def _draw(number: int, without: set[int], items: NDArray[np.int64], key: tuple[int, ...]) -> list[int]:
    """Different items, uniformly from those that are not in ``without``; a function of the key."""
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = mix64(state ^ np.uint64(word & (1 << 64) - 1))
    found: dict[int, None] = {}
    while len(found) < number:
        numbers = np.arange(2 * number).astype(np.uint64)
        chances = mix64(state + numbers) % np.uint64(len(items))
        drawn = items[chances.view(np.int64)].tolist()
        found |= {item: None for item in drawn if item not in without}
        state = mix64(state)
    return list(found)[:number]
