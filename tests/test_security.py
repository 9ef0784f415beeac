"""Files from strangers: none of their code is run, none leads out of its folder; and what we write holds no secrets."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from tests.command_line import call, digests
from tests.small_data import run_toml
from trainer import checkpoint
from trainer import manifest as manifests
from trainer.storage import INDEX, SHARDS, Reader

ROOT = Path(__file__).parent.parent
STEP = "step-00000020"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.made),)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What is there only if code of a file was run; a test of the trap comes first."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "trap")))
    assert (tmp_path / "trap").is_dir()
    return tmp_path / "made"


@pytest.fixture
def stolen(finished: Path, tmp_path: Path) -> Path:
    """A run whose newest checkpoint a test may change; its other ones are gone."""
    shutil.copytree(finished, tmp_path / "copy")
    run_toml(tmp_path / "copy")
    for path in (tmp_path / "copy" / "run" / "checkpoints").iterdir():
        if path.name != STEP:
            shutil.rmtree(path)
    return tmp_path / "copy"


def newest(stolen: Path) -> Path:
    return stolen / "run" / "checkpoints" / STEP


def reseal(path: Path, edit: Callable[[dict[str, Any]], None] = lambda plain: None) -> None:
    """Make the manifest right again after a change, checksums included, as whoever changes a checkpoint can."""
    manifest = path / manifests.NAME
    plain = json.loads(manifest.read_text(encoding="utf-8"))
    del plain["checksum"]
    plain["files"] = {name: manifests.checksum(path / name) for name in plain["files"]}
    edit(plain)
    plain["checksum"] = xxh3_128_hexdigest(json.dumps(plain).encode())
    manifest.write_text(json.dumps(plain), encoding="utf-8")


def edit_index(path: Path, key: str, **changes: Any) -> None:
    index = json.loads((path / SHARDS / INDEX).read_bytes())
    index[key] |= changes
    (path / SHARDS / INDEX).write_text(json.dumps(index), encoding="utf-8")


# Code


def test_a_pickle_in_the_place_of_the_index_or_beside_it_is_not_run(stolen: Path, made: Path) -> None:
    path = newest(stolen)
    before = digests(path)
    (path / SHARDS / ".metadata").write_bytes(pickle.dumps(Evil(made)))  # where DCP unpickles one
    assert digests(path) == before
    (path / SHARDS / INDEX).write_bytes(pickle.dumps(Evil(made)))
    reseal(path)
    call("inspect", "--digest", path).complains_of(f"{STEP} is damaged: its index.json is none of ours")
    call("train", stolen / "run.toml", "--set", "max_steps=25", "--set", "data.epochs=3").complains_of("none of ours")
    assert not made.exists()


def test_a_pickle_around_a_tensor_is_not_run(stolen: Path, made: Path) -> None:
    """The file is one of torch.save, which holds a pickle that says what the tensor is."""
    path, key = newest(stolen), "dense/mlp.mlp.0.bias"
    before, value = digests(path), Reader(path).read_array(key)
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(made)))
        archive.writestr("archive/data/0", value.tobytes())
    shard = path / SHARDS / "__0_0.distcp"
    edit_index(path, key, offset=shard.stat().st_size, length=len(evil.getvalue()))
    with shard.open("ab") as file:
        file.write(evil.getvalue())
    reseal(path)
    assert digests(path) == before, "the values are read, and nothing else"
    assert call("evaluate", path).code == 0
    assert not made.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_in_a_state_dict_is_not_run(stolen: Path, made: Path, legacy: bool) -> None:
    file = stolen / "model.pt"
    torch.save({"linear.bias": Evil(made)}, file, _use_new_zipfile_serialization=not legacy)
    argv = ("import", file, "--config", stolen / "run.toml", "--set", f"output={stolen}/imported")
    call(*argv).complains_of("is no plain state dict, or damaged: it holds more than tensors")
    file.write_bytes(pickle.dumps(Evil(made)))
    call(*argv).complains_of("is no (plain state dict|file of torch.save), or damaged")
    assert not made.exists()


def test_a_run_description_is_not_run(stolen: Path, made: Path) -> None:
    (stolen / "evil.toml").write_bytes(pickle.dumps(Evil(made)))
    call("train", stolen / "evil.toml").complains_of(r"evil.toml")
    code = f"__import__('os').mkdir('{made}')"
    for key in ("model.kind", "model.activation", "dense_optimizer.kind", "tables[0].init.kind"):
        assert call("train", stolen / "run.toml", "--set", f"{key}={code}").code == 1
    assert not made.exists()


UNPICKLING = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "eval", "exec", "compile", "dcp.load")


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").glob("*.py")), ids=lambda path: path.stem)
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    def calls() -> Iterator[ast.Call]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        yield from (n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in UNPICKLING)

    assert all("weights_only=True" in ast.unparse(found) for found in calls())


# Paths


def test_a_manifest_that_leads_out_of_its_checkpoint_is_damaged(stolen: Path) -> None:
    path, seal = newest(stolen), manifests.checksum(stolen / "run.toml")
    for name in ("../../../run.toml", str(stolen / "run.toml"), f"{SHARDS}/../../{STEP}/manifest.json"):
        reseal(path, lambda plain, name=name: plain["files"].update({name: seal}))  # type: ignore[misc]
        call("inspect", "--verify", path).complains_of("manifest.json is damaged: ValueError: .* is not within")
        call("evaluate", stolen / "run").complains_of("has no whole checkpoint")
        reseal(path, lambda plain, name=name: plain["files"].pop(name))  # type: ignore[misc]


def test_a_link_in_a_checkpoint_is_not_followed(stolen: Path) -> None:
    shard = newest(stolen) / SHARDS / "__0_0.distcp"
    shutil.move(shard, stolen / "elsewhere")
    shard.symlink_to(stolen / "elsewhere")
    call("inspect", "--verify", newest(stolen)).complains_of("__0_0.distcp' is not within")


@pytest.mark.parametrize("file", ["../manifest.json", "../../../../run.toml", "/dev/zero", ""])
def test_an_index_that_leads_out_of_its_checkpoint_is_damaged(stolen: Path, file: str) -> None:
    edit_index(newest(stolen), "dense/mlp.mlp.0.bias", file=file)
    reseal(newest(stolen))
    call("evaluate", newest(stolen)).complains_of("is damaged: dense/mlp.mlp.0.bias is not where it was written")


@pytest.mark.parametrize(
    "change", [{"shape": [1 << 50]}, {"shape": [-8]}, {"dtype": "dtype"}, {"offset": -1}, {"o": 1}]
)
def test_an_index_of_impossible_tensors_is_damaged(stolen: Path, change: dict[str, Any]) -> None:
    edit_index(newest(stolen), "dense/mlp.mlp.0.bias", **change)
    reseal(newest(stolen))
    call("evaluate", newest(stolen)).complains_of("is damaged: ")


def test_a_checkpoint_that_is_a_link_is_let_go_and_what_it_leads_to_stays(stolen: Path) -> None:
    elsewhere = stolen / "elsewhere"
    shutil.move(newest(stolen), elsewhere)
    newest(stolen).symlink_to(elsewhere)
    before = digests(elsewhere)
    checkpoint.discard(newest(stolen))
    assert not newest(stolen).is_symlink()
    assert digests(elsewhere) == before


# Secrets


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("output=s3://key:hush@bucket/run", "output"),
        ("data.train=['s3://key:hush@bucket/*.parquet']", "data.train"),
        ("data.test=['https://host/a.parquet?X-Amz-Signature=hush']", "data.test"),
        ("data.validation=s3://key:hush@bucket/a.parquet", "data.validation is .*expected a list"),
    ],
)
def test_a_password_in_a_url_is_refused_and_neither_shown_nor_written(click_log: Path, override: str, key: str) -> None:
    before = set(click_log.rglob("*"))
    outcome = call("train", click_log / "run.toml", "--set", override)
    outcome.complains_of(key)
    assert "hush" not in outcome.output + outcome.errors
    assert set(click_log.rglob("*")) == before


def test_what_the_environment_says_is_written_nowhere(
    click_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_API_KEY", "FSSPEC_S3_SECRET", "PASSWORD"):
        monkeypatch.setenv(name, "hush-hush")
    outcome = call("train", click_log / "run.toml", "--set", f"output={tmp_path}", "--set", "report.tensorboard=true")
    assert outcome.code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "plan.json", "manifest.json", "metrics.jsonl", "index.json"} <= {path.name for path in files}
    assert not any(b"hush-hush" in path.read_bytes() for path in files)
    assert "hush-hush" not in outcome.output + outcome.errors
