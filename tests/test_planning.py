"""Plans for machines that are not here: compared with brute force, and with the memory of states that are built."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.small_data import run_plain, run_toml, write_toml
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import ConfigError, ShardingError
from trainer.machines import KNOWN, Machine, machine_of, read_machines
from trainer.plan_text import render
from trainer.planning import PARTS, Cluster, place, plan
from trainer.sharding import quiet_libraries
from trainer.state import build_state
from trainer.tables import lay_out, state_bytes, with_stripes
from trainer.world import join_world

GIB = 1 << 30
MACHINES = read_machines(KNOWN)
OWN: dict[str, Any] = {
    "device": "cuda",
    "ranks": 2,
    "hbm_gib": 10,
    "host_gib": 20,
    "hbm_gb_per_second": 1000,
    "host_gb_per_second": 100,
    "host_link_gb_per_second": 10,
    "intra_host_gb_per_second": 100,
    "inter_host_gb_per_second": 10,
}


def described(**tables: dict[str, Any]) -> RunConfig:
    """A run with one table for each argument, of its own ids, that may grow unless it says otherwise."""
    plain = run_plain(Path("nowhere"))
    plain["data"] |= {"global_batch_size": 4096, "streams": 256}
    plain["tables"] = [
        {
            "name": name,
            "features": [f"f{number}"],
            "dim": 16,
            "ids": "exact",
            "rows": 100_000,
            "optimizer": {"kind": "adagrad"},
            **table,
        }
        for number, (name, table) in enumerate(tables.items())
    ]
    return build(RunConfig, plain)


def of(name: str, nodes: int = 1, ranks: int = 2, memory_gib: float = 0.0) -> Cluster:
    """Hosts of a known machine."""
    return Cluster(MACHINES[name], nodes, ranks, memory_gib)


def built_bytes(plain: dict[str, Any]) -> int:
    """Bytes of the tables and moments that this rank holds in a state that is built."""
    quiet_libraries()
    with join_world(standalone=False) as world:
        state = build_state(build(RunConfig, plain), 2, world)
        tensors = [t for shard in state.shards() for t in (shard.weight, *shard.moments.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("size", [1, 2])
def test_the_planned_bytes_of_a_rank_are_those_of_the_state_that_it_builds(tmp_path: Path, size: int) -> None:
    kinds = {"a": "table_wise", "b": "row_wise"}
    config = described(
        a={"rows": 7001, "sharding": ["table_wise"]},
        b={"rows": 5003, "sharding": ["row_wise"], "optimizer": {"kind": "rowwise_adagrad"}},
    )
    plain = run_plain(tmp_path)
    plain["tables"] = [
        {
            "name": table.name,
            "features": list(table.features),
            "dim": table.dim,
            "ids": table.ids,
            "rows": table.rows,
            "sharding": [kinds[table.name]],
            "optimizer": {"kind": table.optimizer.kind},
        }
        for table in config.tables
    ]
    found = plan(build(RunConfig, plain), of("cpu", 1, size))
    planned = [rank["host_bytes"] for rank in found["ranks_in_detail"]]
    assert planned == run_ranks(built_bytes, size, plain)
    assert [rank["hbm_bytes"] for rank in found["ranks_in_detail"]] == [0] * size
    assert sum(planned) >= 4 * (7001 * 16 * 2 + 5003 * 17)


def test_a_plan_for_128_gpus_holds_every_byte_once_and_adds_up() -> None:
    config = described(a={"rows": 80_000_000, "max_rows": 90_000_000}, b={"rows": 1_000, "ids": "hashed"})
    found = plan(config, of("h100", 16, 8))
    assert found["fits"]
    assert found["ranks"] == len(found["ranks_in_detail"]) == 128
    physical = lay_out(config.tables, 128, pack=True)
    needed = sum(map(state_bytes, physical))
    held = sum(rank["hbm_bytes"] + rank["host_bytes"] for rank in found["ranks_in_detail"])
    assert held == pytest.approx(needed, abs=128)
    assert sum(table["bytes"] for table in found["tables"]) == pytest.approx(needed, abs=2)
    for rank in found["ranks_in_detail"]:
        assert rank["total_ms"] == pytest.approx(sum(rank[f"{part}_ms"] for part in PARTS))
        assert rank["hbm_bytes"] <= found["hbm_bytes_offered"] == int(79.1 * GIB * 0.85)
    worst = found["bottleneck"]
    assert worst["total_ms"] == max(rank["total_ms"] for rank in found["ranks_in_detail"])
    own = found["ranks_in_detail"][worst["rank"]]
    assert worst["part_ms"] == max(own[f"{part}_ms"] for part in PARTS) == own[f"{worst['part']}_ms"]
    assert found["notes"] == []
    assert [entry["tables"] for entry in found["growth"]] == [["embedding.a.weight"]]
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found))
    text = render(found)
    for part in ("16 x 8 ranks on NVIDIA H100", "bottleneck: rank", "\nfits\n", "embedding.a.weight: fits at"):
        assert part in text
    assert len(text.splitlines()) < 40


def test_growth_ends_where_the_planner_finds_no_place_and_not_before() -> None:
    config = described(a={"max_rows": 1 << 39}, b={"rows": 50_000}, c={"ids": "hashed"})
    cluster = of("cpu", memory_gib=0.1)
    growth = plan(config, cluster)["growth"]
    assert [entry["tables"] for entry in growth] == [
        ["embedding.a.weight"],
        ["embedding.b.weight"],
        ["embedding.a.weight", "embedding.b.weight"],
    ]
    physical = lay_out(config.tables, 2, pack=True)

    def fits(rows: dict[str, int]) -> bool:
        try:
            place(with_stripes(physical, {name: 1 + each // 2 for name, each in rows.items()}), config, cluster)
        except ShardingError:
            return False
        return True

    for entry in growth:
        assert fits(dict(zip(entry["tables"], entry["fits_rows"], strict=True)))
        assert not fits(dict(zip(entry["tables"], entry["fails_rows"], strict=True)))
        close = zip(entry["fits_rows"], entry["fails_rows"], strict=True)
        assert all(good < bad <= good * 1.011 for good, bad in close)
    assert growth[2]["fits_rows"][0] < growth[0]["fits_rows"][0]
    assert growth[2]["grows_live_to_rows"] is None
    live = growth[0]["grows_live_to_rows"]
    assert config.tables[0].rows < live < growth[0]["fits_rows"][0]


def test_a_table_that_may_not_grow_far_fits_at_its_most_rows() -> None:
    found = plan(described(a={"max_rows": 300_000}), of("cpu"))
    (entry,) = found["growth"]
    assert (entry["fits_rows"], entry["fails_rows"], entry["grows_live_to_rows"]) == ([300_000], None, 300_000)
    assert "fits at 300,000 rows, the most that it may have" in render(found)
    assert "no table may grow" in render(plan(described(a={"ids": "hashed"}), of("cpu")))


def test_tables_that_do_not_fit_are_told_with_bytes_and_torchrec_says_nothing_besides(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    quiet_libraries()
    with caplog.at_level(logging.INFO):
        found = plan(described(a={"rows": 10_000_000_000}), of("a100_40"))
    assert not caplog.records
    assert not found["fits"]
    assert "the tables need 1192.093 GiB with moments and each of 2 ranks offers 33.566 GiB" in found["reason"]
    assert "does not fit: the tables need" in render(found)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("optimizer", "host_kernels", "message"),
    [
        (
            {"kind": "adam"},
            True,
            r"^table 'a': optimizer.kind 'adam' does not exist in FBGEMM's CPU kernels; use 'adagrad'",
        ),
        (
            {"kind": "sgd", "weight_decay": 0.1},
            True,
            r"^table 'a': optimizer.weight_decay is 0.1, but FBGEMM's sgd kernel",
        ),
        (
            {"kind": "rowwise_adagrad", "weight_decay": 0.1},
            False,
            r"by another formula; use sharding.host_kernels = true$",
        ),
    ],
)
def test_what_training_on_a_cpu_refuses_its_plan_refuses_alike(
    optimizer: dict[str, Any], host_kernels: bool, message: str
) -> None:
    config = described(a={"optimizer": optimizer})
    config = dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, host_kernels=host_kernels))
    with pytest.raises(ConfigError, match=message):
        plan(config, of("cpu"))
    if optimizer["kind"] != "sgd":
        assert plan(config, of("h100"))["fits"]
    if optimizer["kind"] != "rowwise_adagrad":
        assert plan(described(a={"optimizer": optimizer, "sharding": ["data_parallel"]}), of("cpu"))["fits"]


def test_streams_that_the_ranks_cannot_share_are_a_note_and_too_few_rows_an_error() -> None:
    config = described(a={})
    assert plan(config, of("cpu", 3))["notes"] == [
        "data.streams is 256, which 6 ranks cannot share equally; set it to 258"
    ]
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch_size=2, streams=1))
    with pytest.raises(ConfigError, match=r"global_batch_size is 2, and there are 4 ranks; each needs a row"):
        plan(few, of("cpu", 2))


def test_every_known_machine_says_where_its_numbers_are_from() -> None:
    assert set(MACHINES) == {"a100_40", "a100_80", "h100", "h200", "b200", "cpu"}
    assert all(machine.source and machine.about for machine in MACHINES.values())
    text = KNOWN.read_text(encoding="utf-8")
    listed = {int(number) for number in re.findall(r"^# \[(\d+)\] ", text, re.M)}
    known = re.split(r"^\[\w+\]$", text, flags=re.M)[1:]
    cited = [{int(number) for number in re.findall(r"\[(\d+)\]", section.split("\nsource")[0])} for section in known]
    assert listed == set.union(*cited) == set(range(1, len(listed) + 1))
    for machine, section, numbers in zip(MACHINES.values(), known, cited, strict=True):
        assert {int(number) for number in re.findall(r"\[(\d+)\]", machine.source)} == numbers
        for line in section.splitlines():
            if re.match(r"\w+_(gib|gb_per_second) = (?!0\.0)", line):
                assert re.search(r"# .*(\[\d+\]|assumed|\w+\.py|torchrec)", line), line


def test_own_machines_have_the_same_keys_and_one_need_not_be_named(tmp_path: Path) -> None:
    path = write_toml(tmp_path / "own.toml", {"mine": OWN})
    assert machine_of(None, path) == ("mine", build(Machine, dict(OWN)))
    assert machine_of("mine", path)[1].with_hbm(5).hbm_gib == 5
    assert machine_of("h100")[1] == MACHINES["h100"]


@pytest.mark.parametrize(
    ("plain", "name", "message"),
    [
        ({"mine": OWN | {"hbm_gb": 1}}, None, r"own.toml: unknown key mine.hbm_gb; did you mean mine.hbm_gib\?"),
        ({"mine": OWN | {"hbm_gib": 0}}, None, r"own.toml: mine.hbm_gib is 0, expected above 0"),
        ({"mine": OWN | {"ranks": 0}}, None, r"own.toml: mine.ranks is 0, expected 1 or more"),
        ({"mine": OWN | {"device": "cpu"}}, None, r"mine.hbm_gib is 10, but device is 'cpu', which has none"),
        ({"mine": {"device": "tpu"}}, None, r"own.toml: missing key mine.ranks"),
        ({"mine": OWN, "yours": OWN}, None, r"--device is missing; expected one of mine, yours"),
        ({"mine": OWN, "yours": OWN}, "your", r"--device is 'your', .* did you mean yours\?"),
        (OWN, None, r"own.toml: device lies outside of a section; put each machine's keys below its name"),
        ({}, None, r"own.toml: has no sections"),
    ],
)
def test_a_wrong_machine_is_one_line(tmp_path: Path, plain: dict[str, Any], name: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine_of(name, write_toml(tmp_path / "own.toml", plain))


def test_a_cluster_has_ranks_and_a_cpu_no_hbm() -> None:
    with pytest.raises(ConfigError, match=r"--nodes is 0, expected 1 or more"):
        of("cpu", 0)
    with pytest.raises(ConfigError, match=r"is 8000 ranks, expected at most 4096"):
        of("h100", 1000, 8)
    with pytest.raises(ConfigError, match=r"--hbm-gib is given, but the device is a CPU"):
        MACHINES["cpu"].with_hbm(4)
    with pytest.raises(ConfigError, match=r"--hbm-gib is -1, expected above 0"):
        MACHINES["h100"].with_hbm(-1)


def test_no_data_are_opened_for_features_named_one_by_one(tmp_path: Path) -> None:
    assert run_toml(tmp_path).is_file()
    assert plan(described(a={}), of("cpu"))["fits"]
