"""What ``train`` and ``evaluate`` do once their arguments are parsed: refusals first, then what they leave behind."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import call, digests
from tests.small_data import SPARSE, run_plain, run_toml, write_click_log
from trainer.commands import check_model, evaluate
from trainer.config import RunConfig
from trainer.description import build, load
from trainer.errors import ConfigError, DataError

EMBEDDING = {"name": "embedding", "features": list(SPARSE), "dim": 4}
LINEAR = {"name": "fc", "features": list(SPARSE), "role": "linear", "dim": 1}
ROOT = Path(__file__).parent.parent


def described(model: dict[str, Any], *tables: dict[str, Any]) -> RunConfig:
    """A run of a model on tables; its files need not be there."""
    plain = run_plain(Path("nowhere"))
    return build(RunConfig, plain | {"model": model, "tables": list(tables)})


@pytest.mark.parametrize(
    ("model", "tables", "message"),
    [
        ({"kind": "deepfn", "hidden": [4]}, [EMBEDDING, LINEAR], "model: .*'deepfn'.*deepfm"),
        ({"kind": "deepfm", "hiden": [4]}, [EMBEDDING, LINEAR], "model: .*hiden.*hidden"),
        ({"kind": "deepfm", "hidden": [4]}, [LINEAR], "model.kind 'deepfm' needs a table of role 'embedding'"),
        ({"kind": "deepfm", "hidden": [4]}, [EMBEDDING], r"'deepfm' needs a table of role 'linear' \(dim = 1\)"),
        ({"kind": "dnn", "hidden": [4]}, [EMBEDDING, LINEAR], "table 'fc' has role 'linear', which .* 'dnn' does not"),
        ({"kind": "lr"}, [EMBEDDING, LINEAR], "table 'embedding' has role 'embedding', which .* 'lr' does not read"),
        ({"kind": "fm", "linear": "projection"}, [EMBEDDING, LINEAR], "table 'fc' has role 'linear'"),
    ],
)
def test_a_model_that_does_not_fit_its_tables_is_refused(
    model: dict[str, Any], tables: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(described(model, *tables))


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "runs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_runs_are_accepted(path: Path) -> None:
    config = load(path, [])
    check_model(config)
    assert config.output == f"runs/{path.stem}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log and a run on it of 20 steps."""
    directory = tmp_path_factory.mktemp("finished")
    write_click_log(directory)
    outcome = call("train", run_toml(directory))
    assert outcome.code == 0, outcome.errors
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_leaves_its_description_with_every_pattern_and_default_filled_in(finished: Path) -> None:
    saved = read(finished / "run" / "run.json")
    assert saved["data"]["dense"] == ["d0", "d1"]
    assert [table["features"] for table in saved["tables"]] == [list(SPARSE)] * 2
    given = tomllib.loads((finished / "run.toml").read_text(encoding="utf-8"))
    again = build(RunConfig, saved)
    assert again.tables == build(RunConfig, given).tables
    assert again.data.transforms[0].kind == "none"
    assert again.data.transforms[1].kind == "log1p"


def test_a_run_leaves_its_plan_and_its_result(finished: Path) -> None:
    plan = read(finished / "run" / "plan.json")
    assert [row["table"] for row in plan] == ["embedding.embedding.weight", "linear.fc.weight"]
    assert 0 < read(finished / "run" / "result.json")["test_auc"] < 1


def test_the_plan_and_the_result_are_shown_on_the_terminal(finished: Path, tmp_path: Path) -> None:
    outcome = call("train", finished / "run.toml", f"--set=output={tmp_path}/run")
    result = read(tmp_path / "run" / "result.json")
    lines = [line.split() for line in outcome.errors.splitlines()]
    assert ["AUC", f"{result['test_auc']:.5f}"] in lines
    assert any(line[:3] == ["embedding.embedding.weight", "1,000", "15"] for line in lines)
    assert "1 rank on " in outcome.errors
    assert outcome.output == ""


def test_a_finished_run_that_is_started_again_changes_nothing_and_says_its_result(finished: Path) -> None:
    before = digests(finished / "run"), (finished / "run" / "metrics.jsonl").read_bytes()
    again = call("train", finished / "run.toml")
    assert again.code == 0
    assert "resumed at epoch 2 step 0" in again.errors
    assert f"{read(finished / 'run' / 'result.json')['test_auc']:.5f}" in again.errors
    assert (digests(finished / "run"), (finished / "run" / "metrics.jsonl").read_bytes()) == before


def test_fresh_starts_anew_and_leaves_what_is_not_the_runs(finished: Path, tmp_path: Path) -> None:
    arguments = ("train", finished / "run.toml", f"--set=output={tmp_path}/run")
    assert call(*arguments, "--set=seed=3").code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    call(*arguments, "--fresh").complains_of("--fresh would delete the run in .*; add --yes to confirm")
    anew = call(*arguments, "--fresh", "--yes")
    assert anew.code == 0
    assert "resumed" not in anew.errors
    assert digests(tmp_path / "run") == digests(finished / "run")
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"


# Evaluate


def test_evaluate_takes_the_test_files_unless_it_is_told_others(finished: Path) -> None:
    def auc(*words: str | Path) -> float:
        outcome = call("evaluate", finished / "run", "--json", *words)
        assert outcome.code == 0, outcome.errors
        return float(json.loads(outcome.output)["evaluation_auc"])

    last = json.loads((finished / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert auc() == auc("--data", f"{finished}/test/*.parquet")
    assert auc("--data", f"{finished}/validation/*.parquet") == last["validation_auc"]
    both = call("evaluate", finished / "run", "--data", f"{finished}/v*/*", "--data", f"{finished}/test/*", "--json")
    assert json.loads(both.output)["evaluation_rows"] == 320


def test_evaluate_without_json_is_a_table(finished: Path) -> None:
    lines = evaluate(finished / "run", None, as_json=False).splitlines()
    assert lines[0].split()[0] == "evaluation"
    assert ["rows", "160"] in [line.split() for line in lines]


def test_evaluate_of_a_run_without_files_to_score_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    words = [f"--set=output={tmp_path}/run", "--set=data.validation=[]", "--set=data.test=[]", "--set=max_steps=5"]
    assert call("train", finished / "run.toml", *words).code == 0
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(DataError, match="the run has no test or validation files; name some with --data"):
        evaluate(tmp_path / "run", None, as_json=True)
