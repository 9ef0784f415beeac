"""Run description + schemas to inputs: which columns are read, in which order, and what happens to the dense ones.

Patterns end here: what comes out names every column.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.columns import (
    check_number_type,
    check_sparse_type,
    check_time_type,
    check_user_type,
    numbers_of,
    plain_type,
)
from trainer.config import DataConfig, TableConfig, TransformConfig
from trainer.dataset import DataFile, Dataset, RowGroupReader
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a run reads, each list in the order of its place in a batch."""

    sparse: tuple[str, ...]
    """Features of all tables, in order of first appearance."""

    dense: tuple[str, ...]
    label: str
    """The first one; empty for none: rows that are only predicted, and whose label is 0."""

    user: str = ""
    """Empty for none."""

    probability: str = ""
    """Empty for none."""

    timestamp: str = ""
    """Empty for none."""

    other_labels: tuple[str, ...] = ()
    """Those after the first."""

    weight: str = ""
    """Empty for none."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of the model's tasks."""
        return (self.label, *self.other_labels) if self.label else ()

    @property
    def names(self) -> tuple[str, ...]:
        """All columns to read, each once."""
        every = (*self.sparse, *self.dense, *self.labels, self.user, self.probability, self.timestamp, self.weight)
        return tuple(dict.fromkeys(name for name in every if name))

    def inputs(self) -> Columns:
        """Those that a prediction needs."""
        return Columns(self.sparse, self.dense, label="")


def resolve_columns(data: DataConfig, tables: Sequence[TableConfig], dataset: Dataset, *others: Dataset) -> Columns:
    """The columns that the run description means, by the schema of the first file of ``dataset``.

    Raises:
        DataError: a name or pattern matches no column, a label is an input too, a column's type is of no use, or a
            file of ``dataset`` or ``others`` lacks a column or has it with another type.
    """
    file = dataset.files[0]
    known = file.schema.names
    features = [_expand(table.features, known, f"table {table.name!r}: features") for table in tables]
    columns = Columns(
        sparse=tuple(dict.fromkeys(name for names in features for name in names)),
        dense=_expand(data.dense, known, "data.dense"),
        label=_named(data.labels[0], known, "data.labels", file),
        other_labels=tuple(_named(name, known, "data.labels", file) for name in data.labels[1:]),
        weight=_named(data.weight, known, "data.weight", file),
        user=_named(data.user, known, "data.user", file),
        probability=_named(data.probability, known, "data.probability", file),
        timestamp=_named(data.timestamp, known, "data.timestamp", file),
    )
    _refuse_leaks(columns)
    _check_types(columns, file)
    check_files(columns.names, dataset, *others)
    for rule in data.transforms:
        _expand(rule.columns, columns.dense, "data.transforms: columns")
    return columns


def features_of(table: TableConfig, columns: Columns) -> tuple[str, ...]:
    """The sparse columns that share ``table``, in the order of its patterns, each pattern's sorted by name."""
    return _expand(table.features, columns.sparse, f"table {table.name!r}: features")


def sequences_of(table: TableConfig, features: Sequence[str]) -> tuple[str, ...]:
    """Those of a table's ``features`` that are not pooled, in the order of its patterns."""
    return _expand(table.sequences, features, f"table {table.name!r}: sequences")


def check_columns(columns: Columns, dataset: Dataset) -> None:
    """Raise DataError unless all files of ``dataset`` have the needed columns, with types that are of use."""
    file = dataset.files[0]
    for name in columns.names:
        _named(name, file.schema.names, dataset.what, file)
    _check_types(columns, file)
    check_files(columns.names, dataset)


def names_matching(patterns: Sequence[str], dataset: Dataset, where: str) -> tuple[str, ...]:
    """The columns that ``patterns`` mean, each once, in the order of the patterns, each pattern's sorted by name.

    Raises:
        DataError: a pattern matches no column, or not all files have the column with one type; ``where`` begins it.
    """
    names = _expand(patterns, dataset.files[0].schema.names, where)
    check_files(names, dataset)
    return names


def check_files(names: Sequence[str], *datasets: Dataset) -> None:
    """Raise DataError unless all files of all data sets have the named columns, with the types of the first file."""
    files = [file for dataset in datasets for file in dataset.files]
    for file in files:
        for name in names:
            _check_column(name, file, files[0])


def rule_of(name: str, data: DataConfig) -> TransformConfig:
    """The transform of dense column ``name``: the first rule that matches it, else none and no nulls."""
    for rule in data.transforms:
        if any(_is_match(name, pattern) for pattern in rule.columns):
            return dataclasses.replace(rule, columns=(name,))
    return TransformConfig(columns=(name,))


def resolve_transforms(dataset: Dataset, columns: Columns, data: DataConfig) -> DataConfig:
    """``data`` with every dense column named and given a rule of its own, whose numbers are all known.

    ``standardize`` without mean and std gets those of the rows of ``dataset`` that have a value (the population's
    standard deviation; 1 where the column is constant or all null), measured in one pass in float64. The pass merges
    row groups in their order (Chan, Golub, LeVeque, "Updating formulae ... sample variances", 1979), so that it gives
    the same numbers each time; the run stores them, and whatever follows uses the stored ones.

    Raises:
        DataError: a row group cannot be read, or a value is NaN or infinite.
    """
    rules = [rule_of(name, data) for name in columns.dense]
    unknown = [rule.columns[0] for rule in rules if rule.kind == "standardize" and rule.mean is None]
    measured = _measure(dataset, unknown) if unknown else {}
    known = tuple(
        dataclasses.replace(rule, mean=measured[rule.columns[0]][0], std=measured[rule.columns[0]][1])
        if rule.columns[0] in measured
        else rule
        for rule in rules
    )
    return dataclasses.replace(data, dense=columns.dense, transforms=known)


@dataclass(slots=True)
class _Moments:
    """Count, mean and sum of squared deviations of the values seen so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Take float64 [n] values in, by the pairwise update of Chan, Golub and LeVeque (1983)."""
        if not len(values):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # seen at the end, as a deviation that is not finite
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
        total = self.count + len(values)
        shift = mean - self.mean
        self.squares += squares + shift * shift * self.count * len(values) / total
        self.mean += shift * len(values) / total
        self.count = total

    def mean_and_std(self, name: str) -> tuple[float, float]:
        """Mean and population standard deviation; 1 for one of 0, so that it may divide.

        Raises:
            DataError: the values of column ``name`` spread too far for float64.
        """
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        if not math.isfinite(deviation):
            raise DataError(f"dense column {name!r} spreads too far to be standardized; use kind = 'log1p' or 'clip'")
        return self.mean, deviation or 1.0


def _measure(dataset: Dataset, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each named column."""
    moments = {name: _Moments() for name in names}
    groups = tqdm(dataset.row_groups, desc=f"measuring {len(names)} columns", unit="row group", disable=None)
    with RowGroupReader(dataset, names) as reader:
        for number, group in enumerate(groups):
            table = reader.read(number)
            for name in names:
                values, valid = numbers_of(table.column(name), name, group.place)
                moments[name].add(values[valid])
    return {name: moment.mean_and_std(name) for name, moment in moments.items()}


def _expand(patterns: Sequence[str], known: Sequence[str], where: str) -> tuple[str, ...]:
    """Names in ``known`` that match, in the order of ``patterns``, each pattern's sorted, each name once."""
    names: dict[str, None] = {}
    for pattern in patterns:
        matching = sorted(name for name in set(known) if _is_match(name, pattern))
        if not matching:
            raise DataError(f"{where}: {pattern!r} matches no column; {_nearest(pattern, known)}")
        names.update(dict.fromkeys(matching))
    return tuple(names)


def _is_match(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _named(name: str, known: Sequence[str], where: str, file: DataFile) -> str:
    """``name`` itself, empty or a column of the file."""
    if name and name not in known:
        raise DataError(f"{where}: column {name!r} is not in {file.path}; {_nearest(name, known)}")
    return name


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:10]
    return f"nearest are {', '.join(near)}" if near else "there are no columns"


def _refuse_leaks(columns: Columns) -> None:
    for what, name in (*(("label", label) for label in columns.labels), ("probability", columns.probability)):
        for key, inputs in (("features", columns.sparse), ("data.dense", columns.dense)):
            if name and name in inputs:
                raise DataError(
                    f"{key}: {name!r} is the {what} column and cannot be an input as well; "
                    "use a pattern that leaves it out"
                )


def _check_types(columns: Columns, file: DataFile) -> None:
    def kind(name: str) -> object:
        return file.schema.field(name).type

    for name in columns.names:
        if len(file.schema.get_all_field_indices(name)) != 1:
            raise DataError(f"{file.path}: there are several columns {name!r}; rename all but one")
    for name in columns.sparse:
        check_sparse_type(name, kind(name), file.path)
    for name in columns.dense:
        check_number_type(name, kind(name), file.path, "dense")
    for name in columns.labels:
        check_number_type(name, kind(name), file.path, "label")
    if columns.weight:
        check_number_type(columns.weight, kind(columns.weight), file.path, "weight")
    if columns.user:
        check_user_type(columns.user, kind(columns.user), file.path)
    if columns.probability:
        check_number_type(columns.probability, kind(columns.probability), file.path, "probability")
    if columns.timestamp:
        check_time_type(columns.timestamp, kind(columns.timestamp), file.path)


def _check_column(name: str, file: DataFile, first: DataFile) -> None:
    if len(file.schema.get_all_field_indices(name)) != 1:
        raise DataError(
            f"column {name!r} is in {first.path} but not once in {file.path}; all files need it exactly once"
        )
    expected, found = (plain_type(each.schema.field(name).type) for each in (first, file))
    if expected != found:
        raise DataError(
            f"column {name!r} is {expected} in {first.path} and {found} in {file.path}; "
            "all files need the same type: write one of them anew"
        )
