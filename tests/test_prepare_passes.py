"""A `prepare` that is killed at any instant and begun again leaves, to the byte, what one that was left alone does."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer import prepare_blocks, prepare_passes, prepare_sources, splits
from trainer.prepare_tables import Request, prepare_table

_KILLS = 5
_CALLS = ("fsync", "replace", "unlink", "rmdir")


def small_sizes() -> None:
    """Pieces, row groups and blocks of which a small input has many, and which do not fit into each other."""
    prepare_passes.PIECE_ROWS = 100  # type: ignore[misc]
    splits.ROW_GROUP_ROWS, splits.FILE_ROWS = 16, 64  # type: ignore[misc]
    prepare_blocks.BLOCK_BYTES, prepare_sources._PARQUET_ROWS = 900, 37  # type: ignore[misc]


def killed(request: Request, after: int | None, said: Path) -> None:
    """Prepare in this process, which is killed at a call to the system that many further on, and tells how many."""
    small_sizes()
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counting

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    splits.SplitWriter._write_row_group = counted(splits.SplitWriter._write_row_group)  # type: ignore[method-assign]
    lines: list[str] = []
    prepare_table(request, lines.append)
    said.write_text(f"{calls}\n" + "\n".join(lines))


def in_a_fork(request: Request, after: int | None, said: Path) -> int:
    """Do that in a fork of this process; its exit code, negative where a signal ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            killed(request, after, said)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def driver() -> Iterator[ProcessPoolExecutor]:
    """A process to be forked: this one has threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(number: int) -> list[str]:
    dice = random.Random(0)
    return [
        f"{dice.randint(0, 1)},{dice.choice('abcde')},{dice.random()},"
        f"{'|'.join(str(dice.randint(1, 9)) for _ in range(dice.randint(0, 3)))},{1_600_000_000 + row // 3}"
        for row in range(number)
    ]


def written(path: Path, text: list[str]) -> Path:
    content = ("label,site,price,history,time\n" + "".join(f"{line}\n" for line in text)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def requests(folder: Path) -> dict[str, Request]:
    """By what is special: several files that end anywhere, a vocabulary with bad rows, and row groups."""
    text = lines(430)
    files = [
        written(folder / f"{name}.csv.gz", text[begin:end]) for name, begin, end in (("a", 0, 133), ("b", 133, 300))
    ]
    bad = [*text[:150], "2,a,1,1,1", "x", *text[150:], "1,a"]
    columns = {"history": "sequence:integer"}
    batch = pa.Table.from_pylist([{"label": n % 2, "id": n % 7, "time": 10 * n} for n in range(400)])
    pq.write_table(batch, folder / "rows.parquet", row_group_size=90)
    return {
        "files in order": Request(kind="csv", inputs=tuple(files), output=Path(), columns=columns, split="order"),
        "vocabulary and bad rows": Request(
            kind="csv",
            inputs=(written(folder / "bad.csv", bad),),
            output=Path(),
            columns=columns,
            vocabulary=2,
            skip_bad=True,
        ),
        "parquet by time": Request(
            kind="parquet",
            inputs=(folder / "rows.parquet",),
            output=Path(),
            split="time",
            columns={"time": "timestamp"},
        ),
    }


def kill_everywhere(plain: Request, folder: Path) -> None:
    """In a process that has no threads, as it is to be forked."""
    said = folder / "said"
    assert in_a_fork(replace(plain, output=folder / "whole"), None, said) == 0
    calls, whole = int(said.read_text().splitlines()[0]), content(folder / "whole")
    assert not any(name.startswith(".") for name in whole)
    went_on = 0
    for number in range(_KILLS):
        request = replace(plain, output=folder / f"killed-{number}", threads=1 + number % 2)
        after = 1 + number * (calls - 1) // (_KILLS - 1)
        assert in_a_fork(request, after, said) == -signal.SIGKILL
        if (request.output / "prepared.json").exists():
            assert content(request.output).items() >= whole.items()
        assert in_a_fork(request, None, said) == 0
        assert content(request.output) == whole
        went_on += "goes on" in said.read_text()
    assert went_on >= _KILLS // 2  # the others were killed before the first piece, or after the last move


@pytest.mark.parametrize("case", ["files in order", "vocabulary and bad rows", "parquet by time"])
def test_a_run_that_is_killed_anywhere_and_goes_on_leaves_the_bytes_of_one_that_is_not(
    tmp_path: Path, driver: ProcessPoolExecutor, case: str
) -> None:
    driver.submit(kill_everywhere, requests(tmp_path)[case], tmp_path).result()
