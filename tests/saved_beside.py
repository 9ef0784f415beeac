"""Runs whose checkpoints are written beside training, with what the tests need to see and to disturb of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.small_data import run_plain
from trainer import checkpoint, loop, saving, sealing, storage
from trainer.checkpoint import path_of, steps_in
from trainer.config import RunConfig
from trainer.description import build
from trainer.digest import digests
from trainer.errors import UserError
from trainer.location import Location, locate
from trainer.manifest import read
from trainer.run import open_inputs, start
from trainer.world import World

STEPS = (5, 10, 15, 20)
"""Of the checkpoints of a run; the last is never written beside training."""

TABLES = [
    {"name": "a", "features": ["f0", "f1"], "dim": 7, "ids": "exact", "rows": 40, "optimizer": {"kind": "adagrad"}},
    {"name": "b", "features": ["f2"], "dim": 7, "ids": "exact", "rows": 30, "max_rows": 70, "evict": "lru"},
    {"name": "c", "features": ["f3", "m0"], "dim": 7, "rows": 300, "admit_after": 1},
    {"name": "d", "features": ["f4"], "dim": 7, "rows": 99, "sharding": ["data_parallel"]},
]
"""Ids that grow, ids that are evicted, and tables that all ranks have."""


def described(folder: Path, output: str, mode: str, **overrides: Any) -> dict[str, Any]:
    """A run of 20 steps with a checkpoint after each 5, all of them kept."""
    checkpoint = {"mode": mode, "keep": 9, **overrides.pop("checkpoint", {})}
    model = {"kind": "dnn", "hidden": [8], "activation": "dice", "dropout": 0.2}
    plain = run_plain(folder, output=str(folder / output), checkpoint=checkpoint, **overrides)
    return plain | {"tables": TABLES, "model": model, "max_steps": 20}


def train(plain: dict[str, Any], world: World) -> str:
    """Train to the end; the mistake of the user that ended it, or nothing."""
    try:
        loop.train(start(open_inputs(build(RunConfig, plain), world), world))
    except UserError as error:
        return str(error)
    return ""


def saved(plain: dict[str, Any]) -> dict[int, dict[str, str]]:
    """Digests of every checkpoint of a run by its step."""
    directory = locate(plain["output"]) / "checkpoints"
    return {
        step: dict(digests(path_of(directory, step), read(path_of(directory, step)))) for step in steps_in(directory)
    }


def cut(plain: dict[str, Any], step: int) -> None:
    """Leave of a run what it had when the checkpoint of ``step`` had just been written."""
    for later in (path for path in (Path(plain["output"]) / "checkpoints").iterdir() if int(path.name[5:]) > step):
        shutil.rmtree(later)


@contextlib.contextmanager
def before_write(action: Callable[[Any, int], None]) -> Iterator[None]:
    """Call ``action(output, step)`` before the tensors of each checkpoint are written, on the thread that does it."""

    def write(path: Location, *args: Any) -> Any:
        action(path.parent.parent, int(path.name[5:]))
        return storage.write_tensors(path, *args)

    with mock.patch.object(checkpoint, "write_tensors", write):
        yield


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what happens on another thread."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def until_trained(output: Location, step: int) -> None:
    """Wait until training has told of the segment that ends with ``step``: it goes on beside the caller."""
    metrics = output / "metrics.jsonl"
    until(lambda: f'"step": {step},' in metrics.read_text(encoding="utf-8"), f"step {step} was not reached meanwhile")


def slowly(output: Location, step: int) -> None:
    """Write each checkpoint, but one that training waits for, only when the segment after it has been trained."""
    if threading.current_thread() is not threading.main_thread():
        until_trained(output, step + 5)


@contextlib.contextmanager
def full_disk(at_step: int) -> Iterator[None]:
    """The disk of this rank is full when the checkpoint of a step is written."""
    is_full, put = False, sealing._SealedFile._put

    def fill(output: Path, step: int) -> None:
        nonlocal is_full
        is_full = step == at_step

    def put_or_fail(file: Any, left: memoryview) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, left)

    with before_write(fill), mock.patch.object(sealing._SealedFile, "_put", put_or_fail):
        yield


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    saving.log.addHandler(handler)
    try:
        yield lines
    finally:
        saving.log.removeHandler(handler)
