from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import tables, throughput, throughput_turn
from benchmarks.throughput import Change, Source, cases_of, compare, parse_layout, parser, ratios, refuse_other
from benchmarks.throughput_turn import Case, bound_mib, command_of, count, last_epoch_rows_per_second, needed_mib
from benchmarks.workload import Workload
from trainer.errors import ConfigError
from trainer.manifest import Manifest
from trainer.rows import Cursor

MIB = 1 << 20
ONE, TWO = Case("exact", 4096, 1, 2), Case("exact", 4096, 2, 1)
NAMES = {"commit": "1a2b3c4", "dirty": False, "date": "2026-09-01", "device": "a processor", "cores": 2}
MACHINE = {**NAMES, "memory_gib": 16.0, "load_average": [0.5, 0.5, 0.5], "quick": False}
PATH = Path("old.json")


def spread(*values: float) -> dict[str, float]:
    """Percentiles 10, 50 and 90."""
    return dict(zip(("p10", "p50", "p90"), values, strict=True))


def a_case(case: Case, rates: dict[str, float], start_seconds: dict[str, float]) -> dict[str, Any]:
    """What ``measure`` writes of a case."""
    names = {"ids": case.ids, "batch": case.batch, "ranks": case.ranks, "threads": case.threads, "torchx": case.torchx}
    memory = {"peak_mib": spread(700.0, 800.0, 900.0), "bound_mib": 1000.0}
    return {**names, "rows_per_second": rates, "start_seconds": start_seconds, **memory}


def found(*cases: dict[str, Any], turns: int = 3) -> dict[str, Any]:
    """What ``measure`` writes."""
    times = {"help_seconds": spread(0.2, 0.21, 0.25), "turns": turns}
    best = {"what": "2x1 to 1x2", "ids": "exact", "at": "batch 4,096", "ratio": 1.25}
    return {"workload": {"seed": 1, "dim": 15}, **times, "ratios": [best], "cases": list(cases)}


def saved(**changes: Any) -> Manifest:
    """The manifest of a small run with an Adagrad table of 1000 x 4 and a row-wise one of 500 x 8."""
    config = {
        "data": {"train": [], "dense": ["d"], "labels": ["click"], "global_batch_size": 100},
        "tables": [
            {"name": "a", "role": "embedding", "optimizer": {"kind": "adagrad"}},
            {"name": "b", "role": "embedding", "optimizer": {"kind": "rowwise_adagrad"}},
        ],
        "dense_optimizer": {"kind": "adam", "momentum": 0.0},
    } | changes.pop("config", {})
    sizes = {"a": {"rows": 1000, "dim": 4, "moments": ["sum"]}, "b": {"rows": 500, "dim": 8, "moments": ["sum"]}}
    manifest = {
        **{"step": 1, "cursor": Cursor(0, 1), "world_size": 1, "data": {"columns": {"sparse": ["f0", "f1"]}}},
        "tables": {f"embedding.{name}.weight": size for name, size in sizes.items()},
        **{"spaces": {}, "dense": {"mlp": [10, 7], "bias": [10]}, "plan": [], "blocks": (), "evaluations": ()},
        **{"versions": {}, "files": {}},
    }
    return Manifest(config=config, **manifest | changes)


def test_rows_per_second_are_those_of_the_last_epoch_alone_however_many_segments_it_has() -> None:
    first = {"train_rows": 60.0, "segment_seconds": 100.0}
    segments = [{"train_rows": 40.0, "segment_seconds": 1.0}, {"train_rows": 60.0, "segment_seconds": 3.0}]
    scored_only = {"epoch": 2.0}
    assert last_epoch_rows_per_second([first, *segments, scored_only], 100) == 25.0
    assert last_epoch_rows_per_second([first, {"train_rows": 100.0, "segment_seconds": 5.0}], 100) == 20.0
    assert last_epoch_rows_per_second([first], 100) == 0.6, "fewer rows than an epoch has"
    with pytest.raises(SystemExit, match="trained on no rows"):
        last_epoch_rows_per_second([scored_only], 100)


def test_memory_needed_is_that_of_tables_moments_dense_parameters_on_all_ranks_and_four_batches() -> None:
    needed = needed_mib(saved(), ranks=2, ids_per_row=3.5)
    assert needed["tables"] * MIB == pytest.approx(4 * (1000 * 4 + 500 * 8))
    assert needed["moments"] * MIB == pytest.approx(4 * (1000 * 4 + 500)), "a row-wise moment is one number per row"
    assert needed["dense"] * MIB == pytest.approx(4 * 80 * 3 * 2)
    assert needed["batches"] * MIB == pytest.approx(4 * 100 * (8 * (3.5 + 2) + 4 * 2))
    assert bound_mib(needed, 2) == pytest.approx(1.3 * sum(needed.values()) + 1200)


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        ({"kind": "adamw", "momentum": 0.0}, 3),
        ({"kind": "adagrad", "momentum": 0.0}, 2),
        ({"kind": "sgd", "momentum": 0.9}, 2),
        ({"kind": "sgd", "momentum": 0.0}, 1),
    ],
)
def test_each_dense_optimizer_needs_its_moments(optimizer: dict[str, Any], copies: int) -> None:
    needed = needed_mib(saved(config=saved().config | {"dense_optimizer": optimizer}), 1, 1.0)
    assert needed["dense"] * MIB == pytest.approx(4 * 80 * copies)


def test_rows_and_ids_are_counted_in_sparse_columns_only_lists_by_their_length(tmp_path: Path) -> None:
    columns = {"f0": [1, 2, 3], "f1": [[1], [2, 3], [4, 5, 6]], "d": [0.0, 1.0, 2.0], "click": [0.0, 1.0, 0.0]}
    for name in ("0", "1"):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=2)
    config = saved().config | {"data": {"train": [str(tmp_path / "*.parquet")]}}
    assert count(saved(config=config)) == (6, 2 * (3 + 6))


def test_ratios_are_to_the_first_layout_and_the_first_batch_and_medians_over_neighbours() -> None:
    large, large_two = Case("exact", 16384, 1, 2), Case("exact", 16384, 2, 1)
    other = Case("hashed", 4096, 2, 1)
    rates = {ONE: (100, 50, 10), TWO: (50, 100, 20), large: (200, 50, 30), large_two: (50, 50, 30), other: (1, 1, 1)}
    turns = {case: [{"rows_per_second": rate} for rate in several] for case, several in rates.items()}
    compared = [(each["what"], each["at"], each["ratio"]) for each in ratios(turns)]
    assert compared == [
        ("2x1 to 1x2", "batch 4,096", 2.0),
        ("2x1 to 1x2", "batch 16,384", 1.0),
        ("batch 16,384 to batch 4,096", "1x2", 2.0),
        ("batch 16,384 to batch 4,096", "2x1", 1.0),
    ]


@pytest.mark.parametrize(
    ("now", "before", "percent", "verdict"),
    [
        (spread(70, 80, 89), spread(90, 100, 110), 25.0, "slower"),
        (spread(70, 80, 90), spread(90, 100, 110), 25.0, "within noise"),
        (spread(111, 125, 130), spread(90, 100, 110), -20.0, "faster"),
        (spread(90, 100, 110), spread(90, 100, 110), 0.0, "within noise"),
    ],
)
def test_slower_is_said_only_where_the_ranges_of_both_records_do_not_overlap(
    now: dict[str, float], before: dict[str, float], percent: float, verdict: str
) -> None:
    rate = Change("a", "rows/s", now, before, higher_is_better=True, is_noise_known=True)
    assert rate.slower_percent == pytest.approx(percent)
    assert rate.verdict == verdict
    time = Change("a", "start-up", before, now, higher_is_better=False, is_noise_known=True)
    assert time.slower_percent == pytest.approx(percent), "a time that rises is as much slower as a rate that falls"
    assert time.verdict == verdict


def test_only_cases_of_both_records_are_compared_and_too_few_turns_say_nothing() -> None:
    slow, fast = spread(1000, 1100, 1200), spread(2000, 2200, 2400)
    start = spread(9, 10, 11)
    now = found(a_case(ONE, slow, start), a_case(TWO, slow, start))
    before = found(a_case(ONE, fast, start), a_case(Case("exact", 4096, 1, 2, torchx=True), slow, start))
    changes = compare(now, before)
    verdicts = {(each.case, each.what): each.verdict for each in changes}
    rates, times = (ONE.name, "rows/s"), (ONE.name, "start-up")
    assert verdicts == {("", "--help"): "within noise", rates: "slower", times: "within noise"}
    line = next(line for line in throughput.table_of(changes).splitlines() if "rows/s" in line)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("exact 4,096 1x2", "rows/s", "+100.0", "1,000 1,100 1,200", "2,000 2,200 2,400", "slower")
    ]
    assert {each.verdict for each in compare(now, before | {"turns": 2})} == {"fewer than 3 turns"}


def test_records_of_another_machine_workload_or_program_are_refused(tmp_path: Path) -> None:
    start = spread(9, 10, 11)
    before = MACHINE | {"throughput": found(a_case(ONE, start, start))}
    workload = {"seed": 1, "dim": 15}
    refuse_other(MACHINE, workload, [ONE, TWO], before, PATH)
    with pytest.raises(SystemExit, match=r"old\.json is of other hardware: cores 2, here 4"):
        refuse_other(MACHINE | {"cores": 4}, workload, [ONE], before, PATH)
    with pytest.raises(SystemExit, match=r"old\.json is of another workload: dim, rows differ"):
        refuse_other(MACHINE, {"seed": 1, "dim": 16, "rows": 3}, [ONE], before, PATH)
    with pytest.raises(SystemExit, match=r"has none of these cases; it has exact 4,096 1x2"):
        refuse_other(MACHINE, workload, [TWO], before, PATH)
    (tmp_path / "peers.json").write_text(json.dumps(MACHINE), encoding="utf-8")
    with pytest.raises(SystemExit, match="record of another program"):
        throughput.read_record(tmp_path / "peers.json")
    with pytest.raises(SystemExit, match=r"none\.json cannot be read"):
        throughput.read_record(tmp_path / "none.json")


def test_a_run_description_is_another_workload_by_anything_but_its_batch_and_output() -> None:
    path = Path("launch/runs/deepfm.toml")

    def plain(*overrides: str) -> dict[str, Any]:
        return Source(Workload(), run=path, overrides=overrides).plain()

    assert plain("output=elsewhere", "data.global_batch_size=8192") == plain()
    assert plain("tables[0].rows=5") != plain()
    with pytest.raises(ConfigError, match="did you mean"):
        plain("data.epoch=3")


def test_cases_are_all_kinds_batches_and_layouts_asked_for_and_each_once() -> None:
    workload, described = Source(Workload()), Source(Workload(), run=Path("launch/runs/deepfm.toml"))
    words = ["--ids", "exact", "hashed", "--batch", "4096", "--ranks", "1x2", "2x1", "1x2"]
    assert [case.name for case in cases_of(parser().parse_args(words), workload)] == [
        *("exact 4,096 1x2", "exact 4,096 2x1", "hashed 4,096 1x2", "hashed 4,096 2x1")
    ]
    words = ["--ranks", "4x1", "--torchx"]
    assert [case.name for case in cases_of(parser().parse_args(words), described)] == ["described 4,096 4x1 torchx"]
    for wrong in ("2", "0x1", "2x", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="write it like 2x1"):
            parse_layout(wrong)


def test_ids_of_a_run_description_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--run", "launch/runs/deepfm.toml", "--ids", "exact"])
    assert "--set=tables[0].ids=exact" in capsys.readouterr().err


def test_ranks_are_started_as_a_user_starts_them(tmp_path: Path) -> None:
    def words(case: Case) -> str:
        return " ".join(command_of(case, Path("r.toml"), ["seed=1"], tmp_path)[1:])

    assert words(ONE) == "-m trainer train r.toml --set=seed=1"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m trainer train r.toml --set=seed=1"
    assert words(TWO) == torchrun
    torchx = words(Case("exact", 4096, 2, 1, torchx=True))
    assert torchx.endswith("launch/components.py:train --config r.toml -j 1x2 -- --set=seed=1")


HOLDS = "import os, sys; held = b'1' * (int(sys.argv[1]) << 20); del held; os.write(1, b'ready\\n'); sys.stdin.read()"
LAUNCHES = """
import os, subprocess, sys
marked = {**os.environ, "TORCHELASTIC_RUN_ID": "a"}
for command in (sys.argv[2:], sys.argv[2:]):
    subprocess.Popen([sys.executable, "-c", sys.argv[1], *command], env=marked)
subprocess.run([sys.executable, "-c", sys.argv[1], "1"])
"""


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process with three children, of which two are marked as ranks; all have taken their memory."""
    command = [sys.executable, "-c", LAUNCHES, HOLDS, "200"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin:  # all end when it is closed
            assert [process.stdout.readline() for _ in range(3)] == ["ready\n"] * 3
            yield process


def test_the_peak_is_that_of_ranks_below_the_launcher_and_stays_after_memory_was_given_back(
    launcher: subprocess.Popen[str],
) -> None:
    ranks = list(throughput_turn.ranks_below(launcher.pid))
    assert len(ranks) == 2
    assert all(200 * MIB < throughput_turn.peak_bytes(pid) < 260 * MIB for pid in ranks)
    with pytest.raises((OSError, StopIteration)):
        throughput_turn.peak_bytes(1 << 30)


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        (
            ONE,
            "import sys; print('a'); sys.exit('streams is wrong')",
            r"exact 4,096 1x2 failed with exit code 1:\na\nstr",
        ),
        (TWO, "pass", "exact 4,096 2x1: saw the memory of 0 ranks, expected 2"),
    ],
    ids=["fails", "unseen"],
)
def test_a_training_that_fails_or_is_not_seen_ends_the_benchmark(
    case: Case, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput_turn, "command_of", lambda *_: [sys.executable, "-u", "-c", code])
    with pytest.raises(SystemExit, match=said):
        throughput_turn.take(case, Path("r.toml"), [], tmp_path)


def test_the_table_of_the_readme_has_ratios_first_and_the_peak_as_part_of_its_bound(tmp_path: Path) -> None:
    record = MACHINE | {"throughput": found(a_case(TWO, spread(90_000, 100_000, 110_000), spread(7, 8, 9)))}
    (tmp_path / "throughput.json").write_text(json.dumps(record), encoding="utf-8")
    text = tables.rendered(tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    ratio = ["2x1 to 1x2", "exact", "batch 4,096", "1.25"]
    numbers = ["exact", "4,096", "2x1", "100,000", "90,000", "110,000", "8.0", "0.80", "800"]
    assert cells.index(ratio) < cells.index(numbers)
    assert "it took 0.21 s (0.20 to 0.25)" in text


def test_one_training_is_measured_and_written(tmp_path: Path) -> None:
    output = tmp_path / "throughput.json"
    words = ["--quick", "--ids", "exact", "--ranks", "1x1", "--allow-dirty", "--data", str(tmp_path)]
    throughput.main([*words, "--output", str(output)])
    record = json.loads(output.read_text(encoding="utf-8"))
    (case,) = record["throughput"]["cases"]
    assert (case["ids"], case["ranks"], case["threads"], case["batch"]) == ("exact", 1, 1, 256)
    assert record["quick"] is True
    assert all(np.isfinite(case[number]["p50"]) for number in throughput.NUMBERS)
    assert 0.5 < case["start_seconds"]["p50"] < 120, "imports alone take longer than half a second"
    assert 200 < case["peak_mib"]["p50"] < 4000
    assert case["needed_mib"]["tables"] == pytest.approx(4700 * 16 * 4 / MIB, abs=0.02)
    with pytest.raises(SystemExit, match="is of another workload: set differ"):
        throughput.main([*words, "--set", "seed=2", "--output", str(tmp_path / "b.json"), "--against", str(output)])
