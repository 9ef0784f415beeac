from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from benchmarks import (
    checkpoints,
    exact_ids,
    growth,
    limits,
    multitask,
    peer_models,
    peers,
    record,
    stall,
    tables,
    workload,
)
from trainer.commands import check_model
from trainer.description import load
from trainer.tables import lay_out

NUMBERS = {"p10": 90.0, "p50": 100.0, "p90": 110.0}


def a_record() -> dict[str, Any]:
    """What growth.py writes, in small."""
    variant = {
        "all": {"rows_per_second": NUMBERS, "slower_percent": 1.0, "fastest_slower_percent": 0.5},
        "epoch_1": {"rows_per_second": NUMBERS, "slower_percent": 2.0},
        "epoch_2": {"rows_per_second": NUMBERS, "slower_percent": 0.0},
        "cpu_us_per_row": NUMBERS,
        "more_cpu_percent": 3.0,
    }
    pause = {"sharding": "row_wise", "ranks": 2, "rows_before": 1000, "copied_mib": 7.5, "growth_to_copy": 1.25}
    return {
        **{"commit": "1a2b3c4", "dirty": True, "date": "2026-09-01", "device": "a processor", "cores": 2},
        **{"memory_gib": 16.0, "load_average": [0.5, 0.5, 0.5], "quick": False},
        "pause": [{**pause, "growth_ms": NUMBERS, "copy_ms": {**NUMBERS, "p50": 80.0}, "restart_ms": NUMBERS}],
        "exact": {
            **{"rows_per_epoch": 10, "epochs": 2, "fields": 47, "distinct_ids": 9, "repeats": 3},
            "variants": {"identity": variant, "exact": variant},
            "mapping_ms_per_batch": {"exact": {"epoch_1": 2.0, "epoch_2": 1.0}},
        },
    }


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git working tree with one commit, taken for that of the benchmarks."""
    git(tmp_path, "init")
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return tmp_path


def test_a_tree_that_differs_from_its_commit_is_refused_unless_allowed_and_then_recorded(tree: Path) -> None:
    assert record.provenance(["a"], allow_dirty=False)["dirty"] is False
    (tree / "file").write_text("2", encoding="utf-8")
    with pytest.raises(SystemExit, match="commit first or say --allow-dirty"):
        record.provenance(["a"], allow_dirty=False)
    found = record.provenance(["python", "-m", "a"], allow_dirty=True)
    assert found["dirty"] is True
    assert found["command"] == ["python", "-m", "a"]
    assert {"commit", "date", "device", "cores", "memory_gib", "torch", "torchrec"} <= set(found)


def test_the_tables_of_the_readme_are_those_of_the_records() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert text == tables.with_tables(text, record.RESULTS)


def test_a_table_has_the_numbers_of_its_record_and_says_that_the_tree_was_dirty(tmp_path: Path) -> None:
    (tmp_path / "growth.json").write_text(json.dumps(a_record()), encoding="utf-8")
    text = tables.rendered(tmp_path)
    assert "commit 1a2b3c4, with changes not committed" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["row_wise", "2", "1,000 -> 2,000", "7.5", "100", "80", "1.25", "100"] in cells
    assert ["exact", "100", "1.0", "2.0", "0.0", "0.5", "100", "3.0"] in cells


def test_dense_ids_keep_which_ids_are_equal_and_how_many_each_row_has(tmp_path: Path) -> None:
    num_ids = exact_ids.write_dense_data(tmp_path, 400)
    seen: set[int] = set()
    forward: dict[int, int] = {}
    for file in sorted((tmp_path / "raw" / "train").glob("*.parquet")):
        raw, dense = pq.read_table(file), pq.read_table(tmp_path / "dense" / file.name)
        for name in raw.column_names:
            before, after = raw.column(name).to_pylist(), dense.column(name).to_pylist()
            if not name.startswith("f"):
                assert before == after
                continue
            for old, new in zip(before, after, strict=True):
                pairs = zip(old or [], new or [], strict=True) if isinstance(old, list) else [(old, new)]
                for was, now in pairs:
                    assert (was is None) == (now is None)
                    if was is not None:
                        assert forward.setdefault(was, now) == now
                        seen.add(now)
    assert seen == set(range(num_ids))
    assert len(forward) == num_ids


def test_the_pause_on_one_and_two_ranks_is_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "KINDS", ("row_wise",))
    output = tmp_path / "growth.json"
    growth.main(["--quick", "--only", "pause", "map", "--allow-dirty", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["quick"] is True
    assert [each["ranks"] for each in found["pause"]] == [1, 2]
    moved = growth.QUICK.table_rows * 16 * 4 * 2 / (1 << 20)
    assert all(moved <= each["copied_mib"] + 0.1 <= 1.05 * moved + 0.1 for each in found["pause"])
    assert np.isfinite([each["growth_to_copy"] for each in found["pause"]]).all()
    assert found["map"][0]["num_ids"] == growth.QUICK.map_ids[0]


def test_checkpoints_on_one_and_two_ranks_are_measured_against_plain_files(tmp_path: Path) -> None:
    output = tmp_path / "checkpoints.json"
    words = ["--quick", "--allow-dirty", "--folder", str(tmp_path), "--output", str(output)]
    for kind, ranks in (("identity", 1), ("exact", 2)):
        checkpoints.main([*words, "--only", kind, "--ranks", str(ranks)])
        (each,) = json.loads(output.read_text(encoding="utf-8"))["checkpoints"]
        assert (each["kind"], each["ranks"]) == (kind, ranks)
        assert each["tables_and_moments_mib"] == pytest.approx(each["rows"] * 128 / (1 << 20), rel=0.01)
        ids_mib = each["rows"] * 9 / (1 << 20) if each["kind"] == "exact" else 0
        assert each["files_mib"] == pytest.approx(each["tables_and_moments_mib"] + ids_mib, rel=0.02)
        assert all(each[what]["ratio"] > 0 for what in ("save", "load_warm", "load_cold"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.json"]
    (line, *_) = [line for line in tables.rendered(tmp_path).splitlines() if "cold cache" in line]
    assert line.split("|")[1].strip() == "exact"


def test_exact_ids_are_measured_beside_identity_ids(tmp_path: Path) -> None:
    found = exact_ids.measure(tmp_path, 9_000, 1)
    assert set(found["variants"]) == set(exact_ids.VARIANTS)
    assert found["variants"]["identity"]["all"]["slower_percent"] == 0
    assert all(each["epoch_2"]["rows_per_second"]["p50"] > 0 for each in found["variants"].values())


SMALL = workload.Workload(data_rows=1000, row_group_rows=100, table_rows=4700, linear_rows=9400)


def test_the_workload_is_a_pure_function_made_once_and_read_back_as_places_within_each_field(tmp_path: Path) -> None:
    files = workload.write(tmp_path / "one", SMALL)
    again = workload.write(tmp_path / "two", SMALL)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    made = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in workload.write(tmp_path / "one", SMALL)] == made
    assert workload.write(tmp_path / "one", workload.Workload(data_rows=1000, seed=2)) != files

    table = pq.read_table(files[0].parent)
    assert table.num_rows == SMALL.data_rows
    places, labels = workload.read_places(files, SMALL, 700)
    assert places.shape == (700, SMALL.fields)
    assert set(labels) == {0.0, 1.0}
    for field, name in enumerate(SMALL.names):
        ids = table.column(name).to_numpy()
        assert ids.min() >= field * SMALL.span
        assert ids.max() < (field + 1) * SMALL.span
        np.testing.assert_array_equal(ids[:700], places[:, field] + field * SMALL.span)


def test_ids_of_a_field_are_as_skewed_as_zipfs_law_says_and_often_used_ones_are_no_neighbours() -> None:
    places = workload.places(SMALL, 0, 20_000)[:, 3]
    counts = np.bincount(places, minlength=SMALL.span)
    edges = np.arange(1.0, SMALL.span + 2) ** (1 - SMALL.exponent)
    expected = -np.diff(edges) / (edges[0] - edges[-1])
    np.testing.assert_allclose(np.sort(counts)[::-1][:10] / 20_000, expected[:10], rtol=0.1)
    assert np.abs(np.diff(np.argsort(counts)[-8:])).max() > 8


def test_the_floor_is_the_rows_that_all_cores_could_do_in_the_time_of_all_parts(tmp_path: Path) -> None:
    files = workload.write(tmp_path, SMALL)
    threads = torch.get_num_threads()
    parts = {part.name: part for part in limits.measure(SMALL, 64, files)}
    assert list(parts) == ["read", "map", "gather", "products", "stream", "scatter"]
    assert all(part.milliseconds > 0 and part.mebibytes > 0 for part in parts.values())
    assert parts["products"].gigaflops == pytest.approx(3 * 2 * 64 * 47 * 16 * 64 / 1e9)
    assert torch.get_num_threads() == threads
    rate = limits.floor_rows_per_second(SMALL, 64, files)
    assert np.isfinite(rate)
    slower = [replace(part, milliseconds=4 * part.milliseconds) for part in parts.values()]
    assert limits._floor(slower, 64) == pytest.approx(limits._floor([*parts.values()], 64) / 4)


@pytest.mark.parametrize("ids", ["exact", "hashed", "identity"])
def test_the_run_description_is_one_that_the_trainer_takes_and_only_exact_tables_are_of_one_size(
    ids: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    plain = workload.describe(SMALL, [tmp_path / "0.parquet"], tmp_path / "run", ids=ids, batch=256, epochs=2)
    path.write_text(workload.to_toml(plain), encoding="utf-8")
    config = load(path, [])
    assert config.data.global_batch_size == 256
    assert len(lay_out(config.tables, 1, pack=True)) == (1 if ids == "exact" else 2)


def mlp_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the weights of all linear layers that are not the first-order term."""
    linear = [each.weight for each in model.modules() if isinstance(each, nn.Linear)]
    return [tuple(weight.shape) for weight in linear if tuple(weight.shape) != (1, 705)]


@pytest.mark.parametrize("library", [key for key in peer_models.BARE if key == "plain" or peer_models.version(key)])
def test_a_peer_has_the_workloads_tables_and_mlp_and_its_step_learns(library: str) -> None:
    torch.manual_seed(1)
    bare = peer_models.BARE[library](SMALL, "adagrad")
    tables = [each.weight for each in bare.model.modules() if isinstance(each, nn.Embedding)]
    width = SMALL.dim + 1 if library == "plain" else SMALL.dim
    assert sum(table.shape[0] for table in tables if table.shape[1] == width) == SMALL.table_rows
    first_order = {"deepctr": SMALL.linear_rows, "fuxictr": SMALL.linear_rows}
    assert sum(table.shape[0] for table in tables if table.shape[1] == 1) == first_order.get(library, 0)
    assert mlp_shapes(bare.model) == [(64, 705), (32, 64), (1, 32)]
    ids = torch.from_numpy(workload.places(SMALL, 0, 256))
    batch = bare.prepare(ids, (ids[:, 0] % 2).float())
    before = bare.step(batch).item()
    for _ in range(20):
        after = bare.step(batch).item()
    assert after < before - 0.1


def test_plain_pytorch_computes_deepfm() -> None:
    bare = peer_models.plain(SMALL)
    ids = torch.from_numpy(workload.places(SMALL, 0, 8))
    rows, labels = bare.prepare(ids, torch.zeros(8))
    table = bare.model["table"].weight.detach().clone().double()
    mlp = [parameter.detach().clone().double() for parameter in bare.model["mlp"].parameters()]
    total = 0.0
    for line in rows.tolist():
        vectors, first = table[line, :15], table[line, 15].sum()
        pairs = sum(vectors[i] @ vectors[j] for i in range(47) for j in range(i))
        hidden = vectors.flatten()
        for weight, bias in ((mlp[0], mlp[1]), (mlp[2], mlp[3])):
            hidden = (weight @ hidden + bias).relu()
        total += torch.nn.functional.softplus(first + pairs + (mlp[4] @ hidden + mlp[5])[0]).item()
    assert bare.step((rows, labels)).item() == pytest.approx(total / 8, rel=1e-5)


def test_a_requirement_is_judged_by_the_fastest_of_each_side_turn_by_turn() -> None:
    rates = {
        "shardrec-exact-1x2": [10.0, 90.0, 90.0],
        "shardrec-exact-2x1": [80.0, 80.0, 80.0],
        "rechub-adam": [20.0, 20.0, 20.0],
        "fuxictr-adagrad": [30.0, 30.0, 45.0],
    }
    found = {each["what"]: each for each in peers.judge(rates)}
    assert set(found) == {"fastest bare step of a peer", "two ranks to one, exact"}
    bare = found["fastest bare step of a peer"]
    assert (bare["ours"], bare["theirs"], bare["ratio"]) == ("shardrec-exact-1x2", "fuxictr-adagrad", 2.0)
    assert found["two ranks to one, exact"]["ratio"] == pytest.approx(0.889)


def test_a_peer_that_is_not_installed_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peer_models.DISTRIBUTIONS, "rechub", "a-package-that-nobody-made")
    output = tmp_path / "peers.json"
    only = ["--only", "rechub-adam", "plain-adagrad", "shardrec-exact-1x2", "shardrec-exact-2x1"]
    words = ["--quick", *only, "--allow-dirty", "--data", str(tmp_path), "--output", str(output)]
    peers.main(words)
    (found,) = json.loads(output.read_text(encoding="utf-8"))["peers"]
    assert found["not_measured"] == {"rechub-adam": "a-package-that-nobody-made is not installed"}
    assert set(found["rows_per_second"]) == set(only[2:])
    assert all(0.3 < turn["loss"] < 1.0 for turns in found["turns"].values() for turn in turns)
    assert [each["what"] for each in found["requirements"]] == ["plain PyTorch's bare step", "two ranks to one, exact"]


def test_a_candidate_that_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    words = ["--quick", "--only", "shardrec-exact-1x2", "--batch", "100", "--allow-dirty"]
    with pytest.raises(SystemExit, match=r"(?s)shardrec-exact-1x2 failed with exit code 1.*multiple of streams"):
        peers.main([*words, "--data", str(tmp_path), "--output", str(tmp_path / "peers.json")])


def test_every_candidate_gets_the_same_allocator_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert peers.environment(2, allocator=True).items() >= peers.ALLOCATOR.items()
    assert not peers.environment(1, allocator=False).keys() & peers.ALLOCATOR.keys()
    assert peers.environment(1, allocator=False)["OMP_NUM_THREADS"] == "1"


def test_a_stall_is_told_as_a_share_of_the_segment_beside_it() -> None:
    runs = [{"rows_per_second": 90.0, "stall_seconds": [0.1, 0.3], "segment_seconds": [2.0, 3.0], "mib": 7}] * 3
    found = stall._summary("async", 2, runs, [100.0, 90.0, 180.0])
    assert (found["stall_ms"]["p50"], found["segment_ms"]["p50"]) == (200.0, 2500.0)
    assert found["stall_percent_of_segment"] == {"p10": 5.0, "p50": 7.5, "p90": 10.0}
    assert found["slower_percent"]["p50"] == 10.0
    line = stall.table_of({"stall": [found]}).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("async", "2", "7", "200", "300", "2,500", "7.5", "10.0", "90", "10.0")
    ]


def test_multitask_runs_are_read_by_label_and_averaged_over_seeds() -> None:
    for name, labels in multitask.RUNS.items():
        run = load(multitask.description_of(name))
        check_model(run)
        assert run.data.labels == labels
    one = multitask.by_label({"test_auc": 0.8, "test_logloss_nats": 0.5}, ("income_50k",))
    assert one == {"income_50k": {"auc": 0.8, "logloss_nats": 0.5}}
    results = [
        {
            f"test_{metric}/{label}": base + shift
            for label in multitask.LABELS
            for metric, base in (("auc", 0.6), ("logloss_nats", 0.3))
        }
        for shift in (0.0, 0.2)
    ]
    runs = [multitask.by_label(result, multitask.LABELS) for result in results]
    *_, last = multitask.table_of({"multitask": [{"run": "mmoe", "runs": runs}]}).splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells == ["mmoe", "never_married", "2", "0.70000", "0.10000", "0.40000", "0.10000"]
