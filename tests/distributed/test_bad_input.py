"""Bad input on two ranks: what one rank alone meets ends both in the same way, and neither waits for the other."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import spoil
from tests.command_line import Outcome, call, digests
from tests.distributed.ranks import run_ranks
from tests.ports import free_port
from tests.resources import largest_file
from tests.small_data import run_toml, write_click_log

ROOT = Path(__file__).parent.parent.parent
IN_ORDER = ("--set", "data.shuffle=false")
"""Then the first row of training is rank 0's alone, and the last is rank 1's, in the last step of an epoch."""


@dataclass(frozen=True)
class Case:
    """One command that both ranks run."""

    words: tuple[str, ...]
    """``RANK`` in them becomes the rank's number."""

    message: str
    """Found in the complaint; empty for a command that succeeds."""

    folders: tuple[str, ...] = ()
    """Where each rank runs it, if that matters."""

    largest_file: dict[int, int] = field(default_factory=dict)
    """Bytes beyond which no file of a rank may grow: its disk is full."""

    flipped: str = ""
    """A file of which a bit is flipped before the ranks meet."""


def _train(directory: Path, *words: str) -> tuple[str, ...]:
    return ("train", str(directory / "run.toml"), "--set", f"output={directory}/run", *words)


def _log(directory: Path, spoiler: Callable[[Path], object] = lambda directory: None) -> Path:
    """A spoilt click log and a description of a run on it."""
    write_click_log(directory)
    run_toml(directory)
    spoiler(directory)
    return directory


def _set(name: str, row: int, value: object) -> Callable[[Path], None]:
    return lambda directory: spoil.set_value(directory / "train" / spoil.LAST, name, row, value)


def _nan(directory: Path) -> None:
    spoil.set_value(directory / "train" / "part-000.parquet", "d0", 0, math.nan)


def _one_class(directory: Path) -> None:
    path = directory / "validation" / "part-000.parquet"
    spoil.set_column(path, "click", pa.array([1] * pq.read_metadata(path).num_rows, pa.int8()))


def _two_views(directory: Path) -> tuple[str, str]:
    """Two folders with a file of the same name and different content, and no file ``only`` in the second."""
    for number in range(2):
        write_click_log(directory / str(number), seed=number)
    shutil.copytree(directory / "0" / "train", directory / "0" / "only")
    return str(directory / "0"), str(directory / "1")


def _in_the_way(directory: Path) -> None:
    (directory / "run" / "metrics.jsonl").mkdir(parents=True)


def _cases(root: Path) -> dict[str, Case]:
    whole = _log(root / "whole")
    views = _two_views(root / "views")
    identity = [f"tables[{n}].{key}" for n in range(2) for key in ("ids=identity", "rows=300", "features=['user_id']")]
    on_users = [word for key in identity for word in ("--set", key)]

    def case(name: str, spoiler: Callable[[Path], object], message: str, *words: str) -> Case:
        return Case(_train(_log(root / name, spoiler), *words), message)

    def full(name: str, largest_file: dict[int, int], message: str) -> Case:
        return Case(_train(_log(root / name)), message, largest_file=largest_file)

    return {
        "page of rank 1": case(
            "page",
            lambda d: spoil.damage_page(d / "train" / spoil.LAST, 3, "f1"),
            "row group 3 cannot be read",
            *IN_ORDER,
        ),
        "NaN of rank 0": case("nan", _nan, "part-000.parquet row 0: column 'd0' is nan", *IN_ORDER),
        "label of rank 1": case("label", _set("click", -1, 7), "row 319: label column 'click' is 7", *IN_ORDER),
        "id of rank 1": case(
            "id", _set("user_id", -1, 300), "feature 'user_id': id 300 is not a row", *IN_ORDER, *on_users
        ),
        "one class": case("one-class", _one_class, "need both classes, got 160 clicks in 160 rows"),
        "streams": case(
            "streams",
            lambda d: None,
            "streams = 3 cannot be shared equally by 2 ranks; use a multiple, such as 4",
            "--set",
            "data.streams=3",
            "--set",
            "data.global_batch_size=63",
        ),
        "memory": case("memory", lambda d: None, "each of 2 ranks offers", "--set", "sharding.memory_gib=0.00001"),
        "model": case("model", lambda d: None, r"hidden\[0\]=0 must be", "--set", "model.hidden=[0]"),
        "full disk of rank 1": full("full-1", {1: 50_000}, "cannot write checkpoint .*step-00000005: "),
        "full disk of rank 0": full("full-0", {0: 50_000}, "cannot write checkpoint .*step-00000005: "),
        "full disk of rank 0 at once": full("full", {0: 100}, "output .* cannot be written"),
        "folder in the way of rank 0": case("way", _in_the_way, "metrics.jsonl cannot be written: Is a directory"),
        "other files": Case(
            _train(whole, "--set", "data.train=['train/*.parquet']"), "data.train: ranks 0 and 1 see different", views
        ),
        "no files for rank 1": Case(
            _train(whole, "--set", "data.train=['only/*.parquet']"),
            r"only/\*.parquet matches no file \(seen from",
            views,
        ),
        "other settings": Case(
            _train(whole, "--set", "seed=RANK"),
            "seed is not the same on ranks 0 and 1; give every rank the same command",
        ),
        "nonsense": Case(("evaluate", str(root / "nonsense")), "is neither a whole checkpoint nor the output of a run"),
        "finished": Case(_train(whole), ""),
        **_predictions(root, whole),
        "another run": Case(_train(whole, "--set", "seed=9"), "seed is 1 in checkpoint .* and 9 in the run"),
        "damaged": Case(_train(whole), "", flipped=f"{whole}/run/checkpoints/step-00000020/shards/__1_0.distcp"),
    }


def _predictions(root: Path, run: Path) -> dict[str, Case]:
    """After the run has ended."""

    def case(name: str, message: str, *words: str, data: Path = run / "test", largest_file: int = 1 << 30) -> Case:
        command = ("predict", str(run / "run"), str(root / name), f"--data={data}/*.parquet", *words)
        return Case(command, message, largest_file={1: largest_file})

    path = _log(root / "kept") / "test" / "part-000.parquet"
    spoil.change(path, lambda table: table.append_column("key", table["f0"]))
    spoil.damage_page(path, 1, "key")
    return {
        "predicted": case("predicted", ""),
        "kept page of rank 1": case("out", "row group 1 cannot be read", "--keep=key", data=path.parent),
        "no folder": case("no/out", "out cannot be written: No such file or directory"),
        "predictions of rank 1 on a full disk": case("out", "out cannot be written: File too large", largest_file=100),
    }


def _call_all(ports: list[int], cases: list[Case]) -> list[Outcome]:
    """What this rank makes of each case; a port each, so that no rank meets the store of the case before."""
    rank, outcomes = int(os.environ["RANK"]), []
    for port, case in zip(ports, cases, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if case.flipped and rank == 0:
            spoil.flip(Path(case.flipped), 3000)
        with contextlib.ExitStack() as stack:
            if case.folders:
                stack.enter_context(contextlib.chdir(case.folders[rank]))
            if rank in case.largest_file:
                stack.enter_context(largest_file(case.largest_file[rank]))
            outcomes.append(call(*(word.replace("RANK", str(rank)) for word in case.words)))
    return outcomes


def _on_two_ranks(cases: dict[str, Case]) -> dict[str, tuple[Outcome, Outcome]]:
    first, second = run_ranks(_call_all, 2, [free_port() for _ in cases], list(cases.values()), timeout=200)
    return dict(zip(cases, zip(first, second, strict=True), strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the click logs and runs of all cases are."""
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def cases(root: Path) -> dict[str, Case]:
    return _cases(root)


@pytest.fixture(scope="module")
def outcomes(cases: dict[str, Case]) -> dict[str, tuple[Outcome, Outcome]]:
    return _on_two_ranks(cases)


def test_every_rank_ends_alike_and_one_of_them_says_why(
    cases: dict[str, Case], outcomes: dict[str, tuple[Outcome, Outcome]]
) -> None:
    for name, (chief, other) in outcomes.items():
        if cases[name].message:
            chief.complains_of(cases[name].message)
        else:
            assert (name, chief.code) == (name, 0), chief.errors
        assert (name, other.code) == (name, chief.code)
        assert (name, other.errors) == (name, ""), "only one rank speaks"


def test_a_checkpoint_that_one_rank_finds_damaged_is_named_and_the_one_before_it_used(
    outcomes: dict[str, tuple[Outcome, Outcome]], root: Path
) -> None:
    errors = outcomes["damaged"][0].errors
    assert errors.count("going on with an older one") == 1
    assert re.search("WARNING: checkpoint .*step-00000020 is damaged: shards/__1_0.distcp has checksum", errors)
    assert "2 ranks on cpu; resumed at epoch 1 step 5" in errors
    assert digests(root / "whole" / "run")


@pytest.mark.parametrize("name", ["page", "label", "id", "one-class"])
def test_the_checkpoints_before_the_bad_row_or_scoring_are_whole(
    outcomes: dict[str, tuple[Outcome, Outcome]], root: Path, name: str
) -> None:
    checkpoints = sorted((root / name / "run" / "checkpoints").iterdir())
    names = ["step-00000005", "step-00000010"]  # all was trained that could not be scored
    assert [path.name for path in checkpoints] == (names if name == "one-class" else names[:1])
    assert all(digests(path) for path in checkpoints)


@pytest.mark.parametrize("name", ["full-0", "full-1"])
def test_what_a_full_disk_cut_short_is_not_left_there(
    outcomes: dict[str, tuple[Outcome, Outcome]], root: Path, name: str
) -> None:
    assert not list((root / name / "run" / "checkpoints").iterdir())


def test_predictions_that_one_rank_cannot_write_leave_nothing(
    outcomes: dict[str, tuple[Outcome, Outcome]], root: Path
) -> None:
    assert (root / "predicted").is_file()
    assert not [*root.glob("out*"), *root.glob(".*")]


# Through torchrun: the command of the README, with a limit of time in which it must be over

WITH_SMALL_DISK = """
import os, resource, runpy
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under torchrun; a hang is a failure."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        f"--master-port={free_port()}",
    ]
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def check_ended(ended: subprocess.CompletedProcess[str], message: str) -> None:
    """It failed with one line of ours; torchrun adds a report and a traceback of its own."""
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr
    assert message in lines[0]
    assert f"{os.sep}trainer{os.sep}" not in ended.stderr, "a traceback through the trainer"


def test_under_torchrun_a_damaged_page_of_one_rank_ends_both(tmp_path: Path) -> None:
    _log(tmp_path, lambda d: spoil.damage_page(d / "train" / spoil.LAST, 3, "f1"))
    check_ended(torchrun("-m", "trainer", *_train(tmp_path, *IN_ORDER)), "row group 3 cannot be read")
    assert digests(tmp_path / "run")


def test_under_torchrun_a_full_disk_of_one_rank_ends_both(tmp_path: Path) -> None:
    script = tmp_path / "with_small_disk.py"
    script.write_text(WITH_SMALL_DISK, encoding="utf-8")
    check_ended(torchrun(str(script), *_train(_log(tmp_path / "log"))), "cannot write checkpoint")
