"""State dicts of plain PyTorch as files: read without running any code of theirs, and written whole or not at all."""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import OutputError, StateDictError
from trainer.location import replacing

TORN = "inline_container.cc"
"""Where torch's zip writer fails after its stream did; the stream's own OSError is lost in it."""

UNREADABLE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What torch.load raises of files that are cut, flipped or of another kind."""


def read_plain(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save(model.state_dict(), path)`` wrote, on the host; runs no code of the file.

    Raises:
        StateDictError: the file cannot be read or holds anything else.
    """
    cure = "write it with torch.save(model.state_dict(), path)"
    try:
        _refuse_changed(path)
        with warnings.catch_warnings(action="ignore"):  # about what a damaged file seems to be
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StateDictError(f"{path} cannot be read: {error.strerror or error}; name another file") from error
    except pickle.UnpicklingError as error:
        raise StateDictError(
            f"{path} is no plain state dict, or damaged: it holds more than tensors; {cure}"
        ) from error
    except UNREADABLE as error:
        raise StateDictError(f"{path} is no file of torch.save, or damaged; {cure}") from error
    if not isinstance(found, dict):
        raise StateDictError(f"{path} holds a {type(found).__name__}, expected a state dict; {cure}")
    for name, value in found.items():
        if not isinstance(name, str):
            raise StateDictError(f"{path} is no state dict: a tensor's name is {name!r}, expected a string; {cure}")
        if not isinstance(value, Tensor):
            raise StateDictError(f"{path}: {name!r} is of type {type(value).__name__}, expected a tensor; {cure}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise StateDictError(f"{path}: {name!r} is sparse, quantized or without values; {cure}")
    return {name: value.detach() for name, value in found.items()}


def _refuse_changed(path: Path) -> None:
    """Compare the checksums in a file of torch.save, which torch.load does not; the old format has none.

    Raises:
        StateDictError: a record is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip()
    if changed is not None:
        raise StateDictError(f"{path} is damaged: the checksum of {changed!r} in it is wrong; copy or write it again")


def write_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace ``path`` by a file of ``tensors`` that torch.load reads; whole, or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(tensors), file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORN not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it could not be written whole, as on a full disk"
        raise OutputError(f"{path} cannot be written: {reason}; free some space or name another file") from error
