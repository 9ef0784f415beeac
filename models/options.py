"""Checks of model options, which come from a run description: one line, with the value and what is right."""

import difflib
import math
from collections.abc import Iterable, Sequence


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a ``name`` that is not in ``known``: the nearest right one, then all of them.

    >>> unknown("model kind", "deepmf", ["lr", "fm", "deepfm"])
    "unknown model kind 'deepmf'; did you mean 'deepfm'? There are: lr, fm, deepfm"
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}There are: {', '.join(names) or 'none'}"


def one_of(option: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    names = list(known)
    if value not in names:
        raise ValueError(unknown(f"value for model option {option}:", value, names))


def whole(option: str, value: object, *, least: int, most: int = 1 << 20) -> None:
    """Raise ValueError unless ``value`` is an int (not a bool) from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"model option {option}={value!r} must be a whole number of at least {least}, at most {most}")


def fraction(option: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number with ``0 <= value < 1``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"model option {option}={value!r} must be a number from 0 up to, but not including, 1")


def switch(option: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"model option {option}={value!r} must be true or false")


def widths(option: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a list or tuple of layer widths, each a whole number of at least 1."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"model option {option}={value!r} must be a list of layer widths, such as [64, 32]")
    for place, width in enumerate(value):
        whole(f"{option}[{place}]", width, least=1)


def names(option: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is a list or tuple of different names that are all ``known``."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len({str(name) for name in value}) != len(value):
        raise ValueError(f"model option {option}={value!r} must be a list of names, each once")
    right = list(known)
    for place, name in enumerate(value):
        one_of(f"{option}[{place}]", name, right)


def positive(option: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"model option {option}={value!r} must be a number above 0")
