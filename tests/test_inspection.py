"""``inspect``: the public names and shapes of the reference models to the letter, and every form of its output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import call
from tests.small_data import run_toml, write_click_log
from trainer.checkpoint import path_of
from trainer.inspection import inspect
from trainer.sample_data import write_sample_data

ROOT = Path(__file__).parent.parent


def hidden_layer(number: int, inputs: int, units: int) -> str:
    """Parameters of one hidden layer with a Dice activation."""
    return f"""mlp.mlp.{number}.weight           torch.Size([{units}, {inputs}])
mlp.mlp.{number}.bias             torch.Size([{units}])
mlp.mlp.{number + 1}.alpha            torch.Size([{units}])
mlp.mlp.{number + 1}.bn.weight        torch.Size([{units}])
mlp.mlp.{number + 1}.bn.bias          torch.Size([{units}])
mlp.mlp.{number + 1}.bn.running_mean  torch.Size([{units}])
mlp.mlp.{number + 1}.bn.running_var   torch.Size([{units}])
mlp.mlp.{number + 1}.bn.num_batches_tracked torch.Size([])"""


DEEPFM = """
linear.bias                torch.Size([1])
linear.fc.weight           torch.Size([2000000, 1])
mlp.mlp.0.weight           torch.Size([64, 705])
mlp.mlp.0.bias             torch.Size([64])
mlp.mlp.2.weight           torch.Size([32, 64])
mlp.mlp.2.bias             torch.Size([32])
mlp.mlp.4.weight           torch.Size([1, 32])
mlp.mlp.4.bias             torch.Size([1])
embedding.embedding.weight torch.Size([1000000, 15])
"""
DNN_DICE = f"""
{hidden_layer(0, 705, 128)}
{hidden_layer(2, 128, 64)}
{hidden_layer(4, 64, 32)}
mlp.mlp.6.weight           torch.Size([1, 32])
mlp.mlp.6.bias             torch.Size([1])
embedding.embedding.weight torch.Size([1000000, 15])
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data of few rows and all 47 fields."""
    directory = tmp_path_factory.mktemp("sample")
    write_sample_data(directory, 1000, 1)
    return directory


@pytest.mark.parametrize(("name", "expected"), [("deepfm", DEEPFM), ("dnn_dice", DNN_DICE)])
def test_the_reference_models_have_exactly_the_names_and_shapes_of_the_design(
    sample: Path, tmp_path: Path, name: str, expected: str
) -> None:
    files = [f"--set=data.{split}=['{sample}/{split}/*.parquet']" for split in ("train", "validation")]
    words = [*files, "--set=data.test=[]", f"--set=output={tmp_path}/run", "--set=max_steps=1"]
    outcome = call("train", ROOT / "launch" / "runs" / f"{name}.toml", *words, "--set=data.global_batch_size=256")
    assert outcome.code == 0, outcome.errors
    text = inspect(tmp_path / "run", "text")
    printed = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if "torch.Size" in line]
    assert printed == [tuple(line.split(maxsplit=1)) for line in expected.strip().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of 20 steps with two optimizers, three tables and more ids than one table has rows."""
    directory = tmp_path_factory.mktemp("finished")
    write_click_log(directory)
    tables: list[dict[str, Any]] = [
        {"name": "a", "features": ["f0", "f1"], "dim": 7, "rows": 50, "optimizer": {"kind": "rowwise_adagrad"}},
        {"name": "b", "features": ["f2", "f3", "f4", "m0"], "dim": 7, "rows": 300, "optimizer": {"kind": "sgd"}},
        {"name": "fc", "role": "linear", "features": ["f2", "f3", "f4", "m0"], "dim": 1, "rows": 300},
    ]
    outcome = call("train", run_toml(directory, tables=tables, model={"kind": "wide_deep", "hidden": [4]}))
    assert outcome.code == 0, outcome.errors
    return directory / "run"


def test_the_json_form_is_one_object_with_all_that_the_checkpoint_says_of_itself(finished: Path) -> None:
    found = json.loads(inspect(finished, "json"))
    assert (found["step"], found["cursor"], found["world_size"]) == (20, {"epoch": 2, "step": 0}, 1)
    assert found["path"] == str(path_of(finished / "checkpoints", 20))
    assert found["parameters"]["embedding.a.weight"] == [50, 7]
    assert {key: (table["rows_in_use"], table["moments"]) for key, table in found["tables"].items()} == {
        "embedding.a.weight": (50, ["sum"]),
        "embedding.b.weight": (300, []),
        "linear.fc.weight": (300, ["sum"]),
    }
    assert [step for step, _ in found["evaluations"]] == [10, 20]
    assert found["config"] == json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert found["plan"] == json.loads((finished / "plan.json").read_text(encoding="utf-8"))


def test_the_text_form_says_the_same_as_the_json_form(finished: Path) -> None:
    text, found = inspect(finished, "text"), json.loads(inspect(finished, "json"))
    shapes = re.findall(r"^(\S+) +torch\.Size\(\[(.*)\]\)$", text, re.MULTILINE)
    assert {name: [int(size) for size in sizes.split(", ") if size] for name, sizes in shapes} == found["parameters"]
    assert "step 20, next: epoch 2 step 0, written by 1 ranks" in text
    for step, value in found["evaluations"]:
        assert f"step {step}: validation {value:.6f}" in text
    assert f"torch {found['versions']['torch']}" in text


def test_the_digest_form_is_a_name_and_a_digest_a_line_and_nothing_else(finished: Path) -> None:
    text = inspect(finished, "digest")
    names = [re.fullmatch(r"(\S+) ([0-9a-f]{32})", line) for line in text.splitlines()]
    assert all(names)
    found = [match[1] for match in names if match]
    assert len(set(found)) == len(found)
    parameters = json.loads(inspect(finished, "json"))["parameters"]
    assert set(parameters) <= set(found)
    assert {"embedding.a.weight", "linear.fc.weight"} <= {
        name.rsplit("/", 1)[0] for name in set(found) - set(parameters)
    }


def test_the_verify_form_counts_every_file_and_byte(finished: Path) -> None:
    path = path_of(finished / "checkpoints", 20)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    expected = f"{path}: {len(sizes)} files, {sum(sizes):,} bytes, every checksum is right"
    assert inspect(finished, "verify") == inspect(path, "verify") == expected
