"""A data set scored into one Parquet file: a row for each of its rows, in their order, on any number of ranks.

Every rank writes the rows that it scores to a file of its own, a row group at a time; the chief appends the others' to
its own, which then gets its name. Knows no run and no checkpoint.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trainer.columns import plain_type
from trainer.config import DataConfig
from trainer.data import spans_of
from trainer.dataset import Dataset, RowGroupReader
from trainer.errors import DataError, MetricError, OutputError
from trainer.evaluation import score_rows, shared_by
from trainer.location import locate, sync_directory
from trainer.order import EpochOrder, Piece, Spans
from trainer.schema import Columns, names_matching
from trainer.splits import open_part
from trainer.state import TrainState
from trainer.task import Prediction
from trainer.world import World

PROBABILITY = "probability"
"""The column of predictions; of several labels ``probability_LABEL`` of each."""

_ROW_GROUP_ROWS = 1 << 16


def check_output(out: Path, dataset: Dataset, *, overwrite: bool) -> None:
    """Refuse to write where something is that should stay.

    Raises:
        OutputError: ``out`` is a folder or a file to score, or it exists and ``overwrite`` is false.
    """
    if out.is_dir():
        raise OutputError(f"{out} is a folder; name a file, such as {out / 'predictions.parquet'}")
    here = [path for path in (locate(file.path) for file in dataset.files) if isinstance(path, Path)]
    if out.exists() and any(os.path.samefile(out, path) for path in here):
        raise OutputError(f"{out} is one of the files to score; name another file")
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out} exists; name another file or pass --overwrite")


def prediction_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The columns of predictions of a model of these labels.

    >>> prediction_names(["click"]), prediction_names(["click", "buy"])
    (('probability',), ('probability_click', 'probability_buy'))
    """
    return tuple(f"{PROBABILITY}_{label}" for label in labels) if len(labels) > 1 else (PROBABILITY,)


def kept_schema(patterns: Sequence[str], dataset: Dataset, predicted: Sequence[str] = (PROBABILITY,)) -> pa.Schema:
    """The input's columns that the output has too beside those ``predicted``; dictionaries, large types made plain.

    Raises:
        DataError: a pattern matches no column, or not all files have it with one type, or it is that of predictions.
    """
    names = names_matching(patterns, dataset, "--keep")
    twice = next((name for name in predicted if name in names), None)
    if twice is not None:
        raise DataError(
            f"--keep: column {twice!r} would be there twice, as that is what predictions are called; "
            "use patterns that leave it out"
        )
    schema = dataset.files[0].schema
    return pa.schema([(name, plain_type(schema.field(name).type)) for name in names])


def predict(
    state: TrainState,
    dataset: Dataset,
    columns: Columns,
    data: DataConfig,
    kept: pa.Schema,
    out: Path,
    tick: Callable[[int], object] = lambda rows: None,
    predicted: Sequence[str] = (PROBABILITY,),
) -> None:
    """Write ``out``: of each row the ``kept`` columns and the ``predicted`` ones, float32. Collective.

    ``out`` appears whole, or not at all. ``tick(rows)`` is told of rows as they are done.

    Raises:
        DataError: a row cannot be read. MetricError: a logit is NaN or infinite. OutputError: ``out`` or the
            files beside it cannot be written.
    """
    world = state.world
    with _folder_beside(out, world) as folder:
        spans = spans_of(dataset, shared_by(world, dataset, data))
        parts = [folder / f"{rank}.parquet" for rank in range(world.size)]
        with _Part(parts[world.rank], dataset, kept, predicted, spans, world.rank) as own:
            waiting: list[Tensor] = []
            most = max(1, _ROW_GROUP_ROWS // spans.rows_per_stream)

            def write() -> None:
                with world.together(), _named_if_it_fails(out):
                    own.write(torch.cat(waiting))
                waiting.clear()

            def take(prediction: Prediction) -> None:
                waiting.append(prediction.logits)
                if len(waiting) == most:
                    write()
                tick(prediction.batch.global_rows)

            score_rows(state, dataset, columns, data, take)
            if waiting:
                write()
            with world.together(), _named_if_it_fails(out):
                if not world.is_chief:
                    own.close()
            with world.together(), _named_if_it_fails(out):
                if world.is_chief:
                    own.append(parts[1:])
                    own.close()
                    parts[0].replace(out)
                    sync_directory(out.parent)


@contextmanager
def _folder_beside(out: Path, world: World) -> Iterator[Path]:
    """A folder that is gone in the end, for what becomes ``out``. Collective."""
    folder = None
    with world.together(), _named_if_it_fails(out):
        if world.is_chief:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield next(path for path in world.gather(folder) if path is not None)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named_if_it_fails(out: Path) -> Iterator[None]:
    """Raise OutputError if something cannot be written."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise OutputError(
            f"{out} cannot be written: {reason}; name a file in a folder that all ranks see and that has room"
        ) from error


class _Part:
    """The file of the consecutive rows that one rank scores; a context manager."""

    def __init__(
        self, path: Path, dataset: Dataset, kept: pa.Schema, predicted: Sequence[str], spans: Spans, rank: int
    ) -> None:
        self._path, self._dataset, self._kept = path, dataset, kept
        self._next_row = spans.bounds(rank).start
        self._tables = self._read(EpochOrder(dataset.row_group_sizes, spans, seed=0, epoch=0, shuffle=False).span(rank))
        self._rest = kept.empty_table()
        self._schema = pa.schema([*kept, *(pa.field(name, pa.float32(), nullable=False) for name in predicted)])
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the file; ``close`` has been called, or what is in it is of no use."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def write(self, logits: Tensor) -> None:
        """Write the next rows as a row group; float32 [rows], or [rows, T] of T > 1 labels."""
        if not len(logits):
            return
        by_label = logits.unsqueeze(1) if logits.dim() == 1 else logits
        wrong = by_label.isfinite().logical_not().any(dim=1)
        if wrong.any():
            place = self._dataset.place_of(self._next_row + int(wrong.int().argmax()))
            raise MetricError(
                f"{place}: the logit is NaN or infinite; the dense columns may be too large: clip them or leave it out"
            )
        probabilities = by_label.double().sigmoid().float().t().contiguous().cpu().numpy()
        columns = [*self._take(len(logits)).columns, *map(pa.array, probabilities)]
        self._open().write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(logits))
        self._next_row += len(logits)

    def append(self, paths: Iterable[Path]) -> None:
        """Append the row groups of other parts."""
        for path in paths:
            with pq.ParquetFile(path) as part:
                for group in range(part.num_row_groups):
                    self._open().write_table(part.read_row_group(group))

    def close(self) -> None:
        """Put the file on disk."""
        self._open().close()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = open_part(self._path, self._schema)
        return self._writer

    def _take(self, rows: int) -> pa.Table:
        """The kept columns of the next rows."""
        while self._kept.names and self._rest.num_rows < rows:
            self._rest = pa.concat_tables([self._rest, next(self._tables)])
        taken, self._rest = self._rest.slice(0, rows), self._rest.slice(rows)
        return taken

    def _read(self, pieces: Iterable[Piece]) -> Iterator[pa.Table]:
        """The kept columns of the part's row groups, or of what it has of them."""
        with RowGroupReader(self._dataset, self._kept.names) as reader:
            for piece in pieces:
                table = reader.read(piece.row_group).slice(piece.begin, piece.end - piece.begin)
                try:
                    yield table.select(self._kept.names).cast(self._kept)
                except pa.ArrowException as error:
                    file = self._dataset.row_groups[piece.row_group].file.path
                    raise DataError(f"--keep: {file} cannot be copied: {' '.join(str(error).split())}") from error
