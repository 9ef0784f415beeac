"""Prepares Frappe app usage as the BARS benchmark publishes it: a text for each split; ids are row numbers already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import DataError
from trainer.prepare import PrepareReport, files_of
from trainer.prepare_tables import Request, prepare_table

FILES = {"train": "train", "validation": "valid", "test": "test"}
"""How the file of each split begins its name."""


def prepare(inputs: Sequence[Path], output: Path, *, overwrite: bool = False) -> PrepareReport:
    """Convert the three files, or those of their folder, to ``output``.

    Raises:
        DataError: a file is missing, damaged or another one, a line is malformed (named by file, line and column), or
            ``output`` has other data already and not ``overwrite``, or cannot be written.
    """
    found = files_of(inputs)
    train, validation, test = (_only_file(found, split, start) for split, start in FILES.items())
    request = Request(
        kind="frappe", inputs=(train,), validation=(validation,), test=(test,), output=output, overwrite=overwrite
    )
    return prepare_table(request).report


def _only_file(found: Sequence[Path], split: str, start: str) -> Path:
    matches = [file for file in found if file.name.startswith(start)]
    if len(matches) != 1:
        names = ", ".join(str(file) for file in matches) or "none"
        raise DataError(f"{split} needs exactly one file named {start}*, found {names}; name the files or their folder")
    return matches[0]
