"""What a run left in its output, read for people: metrics, plan, result, description; whatever state it is in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer import manifest as manifests
from trainer.errors import CheckpointError, OutputError
from trainer.location import Location, is_folder, names_in
from trainer.report import METRICS


@dataclass(frozen=True, slots=True)
class Record:
    """One run's output."""

    path: Location
    lines: list[dict[str, float]]
    """metrics.jsonl, in the order of steps; numbers only."""

    plan: list[dict[str, Any]]
    result: dict[str, float]
    config: dict[str, Any]
    manifest: dict[str, Any]
    """``step``, ``world_size``, ``versions``, ``data`` and ``spaces`` of the newest good checkpoint; may be empty."""

    notes: list[str] = field(default_factory=list)
    """What is not there or cannot be read, in words."""

    @property
    def name(self) -> str:
        """What a chart calls it."""
        return self.path.name or str(self.path)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key, where it was recorded."""
        found = [(line["step"], line[key]) for line in self.lines if key in line]
        return [step for step, _ in found], [value for _, value in found]

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin with ``prefix``, in the order of first appearance."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix)))


def read(path: Location) -> Record:
    """The run's output in ``path``.

    Raises:
        OutputError: it is not a folder, cannot be read, or has nothing of a run.
    """
    try:
        if not is_folder(path):
            raise OutputError(f"{path} is not a folder; name the output of a run")
        names = set(names_in(path))
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; name the output of a run") from error
    if not names & {METRICS, "run.json", "plan.json", "result.json"}:
        raise OutputError(f"{path} has no {METRICS} and no run.json, so it is not the output of a run; name one")
    notes: list[str] = []
    lines = _lines(path, notes)
    plain = {name: _json(path, f"{name}.json", kind, notes) for name, kind in _KINDS.items()}
    if "result.json" not in names:
        notes.append("result.json is not there: the run has not ended, was stopped, or has no test data")
    return Record(path, lines, plain["plan"], _numbers(plain["result"]), plain["run"], _manifest(path, notes), notes)


_KINDS: Mapping[str, type[Any]] = {"plan": list, "result": dict, "run": dict}


def _text(path: Location, name: str) -> str | None:
    file = path / name
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror}") from error


def _json(path: Location, name: str, kind: type[Any], notes: list[str]) -> Any:
    text = _text(path, name)
    if text is None:
        if name != "result.json":
            notes.append(f"{name} is not there")
        return kind()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    whole = isinstance(found, kind) and (kind is dict or all(isinstance(row, dict) for row in found))
    if not whole:
        notes.append(f"{name} is damaged and is left out")
    return found if whole else kind()


def _lines(path: Location, notes: list[str]) -> list[dict[str, float]]:
    text = _text(path, METRICS)
    if text is None:
        notes.append(f"{METRICS} is not there: the run has not come to the end of its first segment")
        return []
    found = list(_steps(text))
    damaged = sum(line is None for line in found)
    if damaged:
        notes.append(f"{damaged} of {len(found)} lines of {METRICS} cannot be read and are left out")
    lines = sorted((line for line in found if line is not None), key=lambda line: line["step"])
    if not lines:
        notes.append(f"{METRICS} has no line yet: the run has not come to the end of its first segment")
    return lines


def _steps(text: str) -> Iterator[dict[str, float] | None]:
    """The objects of a metrics.jsonl; None for a line that is none, as the last one of a killed run may be."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            yield None
            continue
        numbers = _numbers(values)
        yield numbers if math.isfinite(numbers.get("step", math.nan)) else None


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {key: float(v) for key, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _manifest(path: Location, notes: list[str]) -> dict[str, Any]:
    folder, manifest = path / "checkpoints", None
    try:
        names = sorted(names_in(folder), reverse=True) if is_folder(folder) else []
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {error.strerror}") from error
    for name in names:
        try:
            manifest = manifests.read(folder / name)
            break
        except CheckpointError:  # being written, or damaged; `inspect --verify` says which
            continue
    if manifest is None:
        notes.append("there is no checkpoint yet, so versions and training files are not known")
        return {}
    return {
        "step": manifest.step,
        "world_size": manifest.world_size,
        "versions": manifest.versions,
        "data": manifest.data,
        "spaces": manifest.spaces,
    }
