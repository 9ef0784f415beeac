"""What the models of sequences share: which field is the target of which history, and both as the model reads them.

Shapes: B rows, N dense features, F fields, D dim, S sequences, L rows of the batch's longest, G pairs of target and
history, W = G * D columns of a pair side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models import options
from models.model import CTRModel, Field, Sequences


class SequenceModel(CTRModel):
    """A model that reads what a user did before, its history, in the light of the target, the item to be scored.

    Its forward has one argument more, the ``Sequences``.

    ``target`` and ``history`` name features in pairs: ``["item", "category"]`` and ``["item_history",
    "category_history"]``. Both of a pair are of one table. ``history`` is by default every sequence that is not among
    ``negatives``; the target of a history is by default the only pooled feature of its table.

    Raises:
        ValueError: the names do not pair up, or a sequence has no use.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Field],
        sequences: Sequence[Field],
        dim: int,
        target: Sequence[str],
        history: Sequence[str],
        negatives: Sequence[str] = (),
    ) -> None:
        super().__init__()
        known = list(dict.fromkeys(field.feature for field in sequences))
        if not known:
            raise ValueError("the model needs a history: name features of lists in tables[].sequences")
        options.names("target", target, dict.fromkeys(field.feature for field in fields))
        options.names("history", history, known)
        options.names("negatives", negatives, known)
        history = list(history) or [name for name in known if name not in negatives]
        _check_use(history, negatives, known)
        target = list(target) or [_only_target(name, fields, sequences) for name in history]
        if len(target) != len(history):
            raise ValueError(f"model option target={target!r} must have one feature for each of history={history!r}")
        pairs = list(zip(history, target, strict=True))
        self.target_places = [place for pair in pairs for place in _targets(*pair, fields, sequences)]
        self.history_places = _places(history, sequences)
        self.negative_places = _places(negatives, sequences)
        if negatives and _tables(self.negative_places, sequences) != _tables(self.history_places, sequences):
            raise ValueError(
                f"model option negatives={list(negatives)!r} must have one sequence for each of history={history!r}, "
                "of the same table"
            )
        self.equally_long = (*history, *negatives)
        self.width = len(self.history_places) * dim

    def target_of(self, embeddings_BFD: Tensor) -> Tensor:
        """The targets' embeddings side by side, shape [B, W]."""
        return torch.cat([embeddings_BFD[:, place] for place in self.target_places], dim=1)

    def history_of(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The histories' rows side by side, shape [B, L, W], and whether there is one, bool [B, L]."""
        rows_BLW = side_by_side(sequences, self.history_places)
        lengths_B = sequences.lengths_BS[:, self.history_places[0]]
        return rows_BLW, torch.arange(rows_BLW.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(1)


def side_by_side(sequences: Sequences, places: Sequence[int]) -> Tensor:
    """The rows of some sequences, shape [B, L, len(places) * D]."""
    return torch.cat([sequences.rows_BSLD[:, place] for place in places], dim=2)


def masked_softmax(scores_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Softmax over what ``mask_BL`` has, shape [B, L]: zero elsewhere, and zero in rows where it has nothing."""
    lowest = torch.finfo(scores_BL.dtype).min
    return scores_BL.masked_fill(~mask_BL, lowest).softmax(dim=1) * mask_BL


def _check_use(history: Sequence[str], negatives: Sequence[str], known: Sequence[str]) -> None:
    for name in known:
        if (name in history) + (name in negatives) != 1:
            raise ValueError(
                f"sequence {name!r} must be in one of the model options history={list(history)!r} and "
                f"negatives={list(negatives)!r}, or else be taken out of tables[].sequences"
            )


def _only_target(history: str, fields: Sequence[Field], sequences: Sequence[Field]) -> str:
    tables = [field.table for field in sequences if field.feature == history]
    found = list(dict.fromkeys(field.feature for field in fields if field.table in tables))
    if len(found) != 1:
        names = ", ".join(repr(name) for name in found) or "none"
        raise ValueError(
            f"the model option target must say what {history!r} is the history of; beside it in its table: {names}"
        )
    return found[0]


def _targets(history: str, target: str, fields: Sequence[Field], sequences: Sequence[Field]) -> list[int]:
    """Places of a history's target, for each table that has both."""
    places = []
    for table in (field.table for field in sequences if field.feature == history):
        if Field(table, target) not in fields:
            of_table = [field.feature for field in fields if field.table == table]
            raise ValueError(
                options.unknown(
                    f"target of {history!r}, which must be a pooled feature of table {table!r}:", target, of_table
                )
            )
        places.append([*fields].index(Field(table, target)))
    return places


def _tables(places: Sequence[int], sequences: Sequence[Field]) -> list[str]:
    return [sequences[place].table for place in places]


def _places(names: Sequence[str], sequences: Sequence[Field]) -> list[int]:
    return [place for name in names for place, field in enumerate(sequences) if field.feature == name]
