"""Benchmarks of many runs: from runs that have ended to tables, and on from where they were stopped."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import multitask, runs, sequences


def test_a_stopped_benchmark_goes_on_and_is_written_down_after_each_run() -> None:
    done, seen, asked = {("a", 1): {"auc": 0.5}}, [], []
    both = threading.Barrier(2, timeout=30)

    def one(run: tuple[str, int]) -> dict[str, Any]:
        both.wait()  # two at a time, or this breaks
        asked.append(run)
        return {"auc": float(run[1])}

    wanted = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 3)]
    runs.go_on(wanted, done, one, jobs=2, put=seen.append)
    assert sorted(asked) == [("a", 2), ("a", 3), ("b", 1), ("b", 2)]
    assert [len(found) for found in seen] == [2, 3, 4, 5]
    assert seen[-1] == {run: {"auc": float(run[1]) if run != ("a", 1) else 0.5} for run in wanted}
    assert done == {("a", 1): {"auc": 0.5}}


def test_a_run_that_fails_ends_it_with_the_command_and_where_its_words_are(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"ended with 3; see {tmp_path}/made/log$"):
        runs.call([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"], tmp_path / "made")
    assert (tmp_path / "made" / "log").read_text() == "no luck\n"


def test_a_run_that_fails_does_not_keep_the_others_from_being_recorded() -> None:
    def one(run: tuple[str, int]) -> dict[str, Any]:
        if run[1] == 1:
            raise SystemExit(f"{run[0]} ended with 3")
        return {"auc": 0.5}

    seen: list[dict[Any, Any]] = []
    with pytest.raises(SystemExit, match=r"^a ended with 3$"):
        runs.go_on([("a", 1), ("a", 2), ("a", 3)], {}, one, jobs=1, put=seen.append)
    assert seen[-1] == {("a", 2): {"auc": 0.5}, ("a", 3): {"auc": 0.5}}


class Trained:
    """In the place of the trainer: a run that ends at once with metrics of its seed."""

    def __init__(self) -> None:
        self.descriptions: list[str] = []

    def __call__(self, description: Path, seed: int, output: Path) -> Path:
        self.descriptions.append(description.stem)
        (output / "run").mkdir(parents=True)
        labels = multitask.RUNS.get(description.stem.removeprefix("census_"), ("",))
        result = {
            f"test_{name}{f'/{label}' if len(labels) > 1 else ''}": 0.5 + seed / 100
            for name in ("auc", "gauc", "logloss_nats")
            for label in labels
        }
        (output / "run" / "result.json").write_text(json.dumps(result))
        lines = [{"step": 1}, {"validation_auc": 0.8}, {"validation_auc": 0.83}, {"validation_auc": 0.81}]
        (output / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return output / "run"


@pytest.mark.parametrize(
    ("benchmark", "data", "names"),
    [
        (sequences, "beauty", ["beauty_din", "beauty_mean"]),
        (multitask, "census", ["census_mmoe", "census_single_income", "census_single_married"]),
    ],
)
def test_seeds_are_added_to_the_record_and_none_is_run_twice(
    benchmark: Any, data: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, records = Trained(), []
    monkeypatch.setattr(runs, "train", trained)
    (tmp_path / "data" / data).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for seeds in (1, 3, 2):
        benchmark.main(["--seeds", str(seeds), "--jobs", "1", "--output", "found.json", "--allow-dirty"])
        records.append(json.loads(Path("found.json").read_text(encoding="utf-8")))
    assert sorted(trained.descriptions) == sorted(names * 3)
    (key,) = {"sequences", "multitask"} & records[-1].keys()
    assert records[2] == records[1], "all was there"
    for entry in records[1][key]:
        assert [run["seed"] for run in entry["runs"]] == [1, 2, 3]
        assert all(run["commit"] == records[1]["commit"] for run in entry["runs"])
    assert records[0][key][0]["runs"] == records[1][key][0]["runs"][:1]
    assert f"python -m benchmarks.{key} --seeds 3" in " ".join(records[1]["command"])


def test_attention_is_compared_with_the_mean_over_the_seeds_of_runs_that_ended(tmp_path: Path) -> None:
    entries = []
    for model, aucs in (("din", (0.8, 0.82)), ("mean", (0.79, 0.79))):
        found = [sequences.found_in(Trained()(Path(model), seed, tmp_path / f"{model}{seed}")) for seed in (1, 2)]
        assert (found[0]["validation_auc"], found[0]["epochs"]) == (0.83, 3)
        entries.append(sequences.summary(model, [run | {"auc": auc} for run, auc in zip(found, aucs, strict=True)]))
    lines = sequences.table_of({"sequences": entries}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["din", "2", "0.81000", "0.01000", "0.8000 0.8200"]
    assert cells[1][:5] == ["mean", "2", "0.79000", "0.00000", "0.7900 0.7900"]


def test_all_benchmarks_of_runs_have_the_same_options() -> None:
    parser = argparse.ArgumentParser()
    runs.add_options(parser, "census")
    given = parser.parse_args(["--jobs", "3"])
    assert (given.jobs, given.folder, given.output.name) == (3, Path("runs/census"), "census.json")
