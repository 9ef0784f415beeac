"""What every data set that is prepared has: input files, and a report of its splits. Reads no rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What one split of the prepared data holds."""

    rows: int
    click_rate: float | None
    """Mean of the label; None where there are no rows."""

    @classmethod
    def of(cls, statistics: Mapping[str, Any], label: str) -> "SplitReport":
        """That of a split whose statistics are known."""
        rows = statistics["rows"]
        return cls(rows, statistics["columns"][label]["rate"] if rows else None)


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was written; the content of ``prepared.json``."""

    kind: str
    inputs: tuple[str, ...]
    fractions: tuple[float, ...] | None
    """None where every split has its own file."""

    splits: dict[str, SplitReport]


def describe(report: PrepareReport) -> str:
    """The splits as a table to print."""
    lines = [[name, split.rows, split.click_rate] for name, split in report.splits.items()]
    return tabulate(lines, ["split", "rows", "click rate"], floatfmt=".4f", intfmt=",", missingval="-")


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files named, and in a folder's place those in it, sorted, but hidden ones.

    Raises:
        DataError: a path does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no file {path}; check the path")
    return found
