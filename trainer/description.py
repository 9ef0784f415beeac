"""TOML and ``--set`` overrides to a RunConfig; refuses unknown, missing and mistyped keys, naming the nearest."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from trainer.config import RunConfig
from trainer.errors import ConfigError

T = TypeVar("T")


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run description in the TOML file ``path`` after ``key=value`` overrides.

    Raises:
        ConfigError: the file cannot be read or a key, type or combination is wrong; one line that names the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}; name an existing TOML file") from error
    except (ValueError, RecursionError) as error:  # Python's own ValueError for an integer of thousands of digits
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    for override in overrides:
        apply_override(data, override)
    _refuse_beyond_reason(data)
    return build(RunConfig, data)


_DEEPEST = 8  # lists and sections in each other; the deepest key lies in four


def _refuse_beyond_reason(value: Any, *path: Any) -> None:
    """Refuse what no key takes and what would break those who handle it, anywhere in plain data."""
    where = ".".join(map(str, path))
    if len(path) > _DEEPEST:
        raise ConfigError(f"{where} lies in {_DEEPEST} lists and sections, which is deeper than any key")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where} is an integer of {value.bit_length()} bits, expected at most 64 with its sign")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} is {_shown(value)}, expected a text without the character NUL")
    if isinstance(value, datetime.date | datetime.time):
        raise ConfigError(f"{where} is {value}, and no key takes a date or a time; put quotes around a text")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _refuse_beyond_reason(item, *path, key)


def nearest(name: str, known: Sequence[str]) -> str:
    """The tail of an error message: the likeliest right name, or all of them.

    >>> nearest("admitafter", ["admit_after", "rows"])
    'did you mean admit_after?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in plain data, in place; keys are dotted, lists take ``[i]`` or ``.i``, ``[*]`` for all.

    >>> data = {"tables": [{"rows": 10}, {"rows": 10}]}
    >>> apply_override(data, "tables[0].rows=20"); data
    {'tables': [{'rows': 20}, {'rows': 10}]}
    >>> apply_override(data, "tables[*].rows=30"); data
    {'tables': [{'rows': 30}, {'rows': 30}]}
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} is not key=value; write it like --set data.epochs=2")
    if "[*]" in key:
        before, _, after = key.strip().partition("[*]")
        for number in range(_length(data, before)):
            apply_override(data, f"{before}[{number}]{after}={text}")
        return
    parts = key_parts(key.strip())
    place: Any = data
    for depth, part in enumerate(parts[:-1]):
        place = _step_into(place, part, ".".join(parts[:depth]))
    if isinstance(place, list):
        place[_index(place, parts[-1], ".".join(parts[:-1]))] = _value(text)
    elif isinstance(place, dict):
        place[parts[-1]] = _value(text)
    else:
        raise ConfigError(f"--set {key}: {'.'.join(parts[:-1])} is a plain value and has no keys of its own")


def _length(data: dict[str, Any], key: str) -> int:
    """Entries of the list at a dotted key."""
    place: Any = data
    parts = key_parts(key)
    for depth, part in enumerate(parts):
        place = _step_into(place, part, ".".join(parts[:depth]))
    if not isinstance(place, list) or not place:
        raise ConfigError(
            f"--set {key}[*]: {key} has no entries; [*] stands for all of a list, such as tables[*].rows=9"
        )
    return len(place)


def key_parts(key: str) -> list[str]:
    """The steps that a key takes.

    >>> key_parts("tables[0].rows"), key_parts("tables.0.rows"), key_parts("tables[*].rows")
    (['tables', '0', 'rows'], ['tables', '0', 'rows'], ['tables', '*', 'rows'])
    """
    return re.sub(r"\[(\d+|\*)\]", r".\1", key).split(".")


def _step_into(place: Any, part: str, where: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, where)]
    if isinstance(place, dict):
        return place.setdefault(part, {})
    raise ConfigError(f"--set: {where} is a plain value and has no key {part}")


_MOST_DIGITS = 9  # of an index into a list


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdecimal() or len(part) > _MOST_DIGITS or int(part) >= len(items):
        raise ConfigError(f"--set: {where}[{part}] does not exist; {where} has entries 0 to {len(items) - 1}")
    return int(part)


def _value(text: str) -> Any:
    """A TOML value, or the bare text where it is not one (``--set output=runs/b`` needs no quotes)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def build(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Dataclass ``cls`` from plain data, rejecting unknown, missing and mistyped keys.

    ``where`` is the dotted place of ``data`` in the run description and begins every message.
    """
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in hints:
            raise ConfigError(f"unknown key {prefix}{key}; {nearest(prefix + key, [prefix + name for name in hints])}")
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in data:
            raise ConfigError(f"missing key {prefix}{item.name}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), _typed(dict, value, "a table", where), where)
    if origin in (Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        many = [a for a in kinds if get_origin(a) is tuple and isinstance(value, list)]
        return _convert((many or kinds)[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {_shown(value)}; {nearest(str(value), [str(a) for a in arguments])}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        items = _typed(dict, value, "a table", where)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    return _convert_scalar(hint, value, where)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _typed(list, value, "a list", where)
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise ConfigError(f"{where} has {len(items)} entries, expected {len(arguments)}")
    return tuple(_convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, items, strict=True)))


_MOST_SHOWN = 200
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _convert_scalar(hint: type[Any], value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and math.isnan(value):  # it means nothing anywhere, and slips through ranges
        raise ConfigError(f"{where} is {value!r}, expected {_WORDS[hint]}")
    return _typed(hint, value, _WORDS[hint], where)


def _typed(kind: type[T], value: Any, word: str, where: str) -> T:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where} is {_shown(value)}, expected {word}")
    return value


def _shown(value: Any) -> str:
    """A value for a message, cut where it is too long to be read.

    >>> _shown("ab"), len(_shown("ab" * 1000))
    ("'ab'", 203)
    """
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
