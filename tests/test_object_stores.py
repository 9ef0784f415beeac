"""Runs whose data and output are in an object store: as on a disk, with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import call, digests
from tests.object_store import BUCKET, moved, s3_server, upload
from tests.saved_beside import described, saved, train
from tests.small_data import write_click_log, write_toml
from trainer.dataset import open_dataset
from trainer.location import locate, names_in
from trainer.world import join_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stores")
    write_click_log(directory)
    return directory


s3 = pytest.fixture(scope="module")(s3_server)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, dict[str, str]]:
    """Digests of the run on the disk, on one rank."""
    plain = described(folder, "local", "async", checkpoint={"keep": 2})
    with join_world(standalone=True) as world:
        assert train(plain, world) == ""
    return saved(plain)


@pytest.mark.parametrize("url", ["memory://tests", f"{BUCKET}/one"])
def test_a_run_in_a_store_is_the_run_on_the_disk_and_all_commands_know_it(
    folder: Path, expected: dict[int, dict[str, str]], s3: None, url: str
) -> None:
    upload(folder, url)
    plain = moved(described(folder, "run", "async", checkpoint={"keep": 2}), folder, url)
    plain["report"] = {"tensorboard": True}
    description, run = write_toml(folder / "store.toml", plain), f"{url}/run"
    assert call("train", description, "--set", "max_steps=10").code == 0
    outcome = call("train", description)
    assert outcome.code == 0, outcome.errors
    assert "resumed at epoch 1 step 0" in outcome.errors
    found = {line.partition(" ")[0]: line.partition(" ")[2] for line in digests(run).splitlines()}
    assert found == expected[20]
    names = set(names_in(locate(run)))
    assert {
        "checkpoints",
        "metrics.jsonl",
        "plan.json",
        "run.json",
        "result.json",
        "growth.png",
        "tensorboard",
    } <= names
    lines = (locate(run) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]
    assert sorted(names_in(locate(run) / "checkpoints"))[-2:] == ["step-00000015", "step-00000020"]
    for command in ("evaluate", "inspect"):
        assert call(command, run).code == 0
        assert call(command, f"{run}/checkpoints/step-00000020").code == 0
    scored = call("evaluate", run, "--data", f"{url}/test/*.parquet", "--json")
    assert scored.output == call("evaluate", run, "--data", f"{folder}/test/*.parquet", "--json").output
    assert call("export-state-dict", run, str(folder / "out.pt")).code == 0
    call("train", description, "--fresh").complains_of(f"--fresh would delete the run in {run}; add --yes")
    assert call("train", description, "--fresh", "--yes", "--set", "max_steps=5").code == 0
    assert names_in(locate(run) / "checkpoints") == ["step-00000005"]


def test_a_damaged_or_unfinished_checkpoint_in_a_store_is_named_and_the_one_before_it_used(
    folder: Path, expected: dict[int, dict[str, str]]
) -> None:
    url = "memory://damaged"
    upload(folder, url)
    plain = moved(described(folder, "run", "sync", checkpoint={"keep": 2}), folder, url)
    description, checkpoints = write_toml(folder / "damaged.toml", plain), locate(f"{url}/run/checkpoints")
    assert call("train", description).code == 0
    (checkpoints / "step-00000020" / "manifest.json").unlink()
    shard = checkpoints / "step-00000015" / "shards" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    errors = call("inspect", "--verify", f"{url}/run").errors
    assert "step-00000020 has no manifest.json" in errors
    assert "step-00000015 is damaged: shards/__0_0.distcp has" in errors
    assert call("train", description).code == 0
    assert expected[20] == dict(line.split(" ") for line in digests(f"{url}/run").splitlines())


def test_names_and_fingerprints_do_not_tell_where_data_lie(folder: Path) -> None:
    upload(folder, "memory://moved/far")
    here, there = (open_dataset([f"{place}/train/*.parquet"], "x") for place in (folder, "memory://moved/far"))
    assert here.to_plain() == there.to_plain()
    assert there.files[0].path == "memory://moved/far/train/part-000.parquet"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=s3://absent/run"], "s3://absent/run.* cannot be (written|read|made): .*bucket"),
        (["data.train=['s3://absent/*.parquet']"], "data.train: s3://absent/.* (matches no file|cannot be read)"),
        (["data.train=['s3://bucket/nothing']"], "data.train: s3://bucket/nothing does not exist; name existing"),
        (["data.train=['floppy://a/b']"], "floppy://a/b: .*; use s3://"),
        (["output=floppy://a/b"], "floppy://a/b.*: .*; use s3://"),
    ],
)
def test_what_a_store_does_not_have_is_one_line(folder: Path, s3: None, overrides: list[str], message: str) -> None:
    description = write_toml(folder / "absent.toml", described(folder, "absent", "sync"))
    call("train", description, *(word for text in overrides for word in ("--set", text))).complains_of(message)


def test_what_is_to_be_on_this_host_is_not_looked_for_in_a_store(folder: Path) -> None:
    for argv in (("export-state-dict", "runs/a", f"{BUCKET}/out.pt"), ("sample-data", f"{BUCKET}/data")):
        call(*argv).complains_of(r"s3://bucket/.* is a URL, expected a path on this host")
