"""Tests of the command ``sweep``: a real one, what it says, how it goes on, and mistakes that end it before any run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.command_line import Outcome as Said
from tests.command_line import call, digests
from tests.small_data import run_plain, write_click_log, write_toml
from trainer import sweep as sweep_module
from trainer.errors import RunFailedError
from trainer.grid import Setting, Trial
from trainer.trials import Outcome, StoppedError

KINDS = "tables[*].optimizer.kind"
EMBEDDING = '{name="embedding",features=["f*"],dim=8,rows=100}'
LINEAR = '{name="fc",role="linear",features=["f*"],dim=1,rows=100}'


@pytest.mark.timeout(600)
def test_a_sweep_trains_every_setting_names_the_best_and_what_failed_and_goes_on(click_log: Path) -> None:
    output, run = click_log / "sweep", click_log / "run.toml"
    words = ("sweep", run, "--output", output, "--jobs", "2", "--set", "data.epochs=1")
    said = call(*words, "--over", f"{KINDS}=adagrad,sgd,adam")
    assert said.code == 0, said.errors
    record = json.loads((output / "sweep.json").read_text(encoding="utf-8"))
    scored = {name: best_of(output / f"optimizer.kind={name},seed=1") for name in ("adagrad", "sgd")}
    assert [row["setting"] for row in record["settings"]] == [
        *(f"optimizer.kind={name}" for name in sorted(scored, key=lambda name: -scored[name])),
        "optimizer.kind=adam",
    ]
    assert [row["validation_auc"] for row in record["settings"][:2]] == sorted(scored.values(), reverse=True)
    (failure,) = record["settings"][2]["failed"].values()
    assert "does not exist in FBGEMM's CPU kernels" in failure
    assert f"failed: optimizer.kind=adam,seed=1: {failure}" in said.output
    assert f"best by validation_auc; test metrics took no part in that: {record['best']}\n" in said.output
    assert record["best"] == record["settings"][0]["setting"]
    assert imread(output / "sweep.png").std() > 0

    assert record["command"] in said.output
    _, _, _, *train = shlex.split(record["command"])
    assert call(*train).code == 0
    assert digests(f"{output}-best") == digests(output / f"{record['best']},seed=1"), "the command trains that very run"

    for folder in output.glob("optimizer*"):
        shutil.rmtree(folder)
    again = call(*words, "--over", f"{KINDS}=sgd,adagrad")
    assert again.code == 0
    assert again.errors.count(", trained before") == 2
    assert not [*output.glob("optimizer*")], "nothing was trained, and results do not need the runs' folders"
    assert record["settings"][:2] == json.loads((output / "sweep.json").read_text(encoding="utf-8"))["settings"]


def best_of(output: Path) -> float:
    """The best validation AUC that a run recorded."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("validation_auc", 0.0) for line in lines)


class Scores:
    """In the place of the processes: a run reaches the sum of the scores of what is set in it."""

    scores: dict[str, float]
    trained: list[Trial]

    def __init__(self, *arguments: object, **options: object) -> None:
        self.is_stopped = False

    def __call__(self, trial: Trial) -> Outcome:
        if self.is_stopped:
            raise StoppedError
        self.trained.append(trial)
        if "error" in self.scores:
            raise RunFailedError("no luck")
        return Outcome(((5, sum(self.scores.get(o, 0.0) for o in trial.setting.overrides)),), {}, 5, 1.0)

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> type[Scores]:
    """Has no run be trained."""

    class Own(Scores):
        scores: dict[str, float] = {}  # noqa: RUF012 (one for each test)
        trained: list[Trial] = []  # noqa: RUF012

    monkeypatch.setattr(sweep_module, "Processes", Own)
    return Own


def sweep(directory: Path, *words: str) -> Said:
    write_click_log(directory, rows=64)
    run = write_toml(directory / "run.toml", run_plain(directory))
    return call("sweep", run, "--output", directory / "sweep", *words)


def test_optimizers_are_tried_for_the_tables_then_for_the_model_beside_the_best_of_these(
    tmp_path: Path, scores: type[Scores]
) -> None:
    best = ["tables[*].optimizer.kind=sgd", "tables[*].optimizer.lr=10"]
    dense = ["dense_optimizer.kind=adagrad", "dense_optimizer.lr=0.03"]
    scores.scores = {**dict.fromkeys(best, 0.1), **dict.fromkeys(dense, 0.2)}
    said = sweep(tmp_path, "--optimizers", "--seeds", "2", "--set", "dense_optimizer.lr=3e-3")
    assert said.code == 0, said.errors
    settings = list(dict.fromkeys(trial.setting for trial in scores.trained))
    first = [setting for setting in settings if not any("dense" in override for override in setting.overrides)]
    second = settings[len(first) :]
    assert [setting for setting in first if not setting.overrides] == [Setting("tables=own", ())]
    assert all(list(setting.overrides[:2]) == best for setting in second)
    names = [setting.name.rpartition("=")[2] for setting in second]
    assert names == ["adam-3e-4", "adam-1e-3", "adamw-1e-3", "adamw-3e-3", "adagrad-0.01", "adagrad-0.03"], (
        "adam at 3e-3 is the run that the tables' optimizers were tried with"
    )
    assert f": {','.join(['tables=sgd-10', 'dense=adagrad-0.03'])}\n" in said.output
    command = shlex.split(said.output.splitlines()[-2])
    assert [word for word in command if word in (*best, *dense)] == [*best, *dense]
    assert len(scores.trained) == 2 * len(settings) == len({trial.name for trial in scores.trained})


def test_the_runs_own_optimizers_may_be_the_best(tmp_path: Path, scores: type[Scores]) -> None:
    scores.scores = {f"{KINDS}={kind}": -0.1 for kind in ("sgd", "adagrad", "rowwise_adagrad")}
    scores.scores |= {f"dense_optimizer.kind={kind}": -0.1 for kind in ("adam", "adamw", "adagrad")}
    said = sweep(tmp_path, "--optimizers")
    assert ": tables=own\n" in said.output
    assert shlex.split(said.output.splitlines()[-2])[4:] == [
        str(tmp_path / "run.toml"),
        "--set",
        f"output={tmp_path}/sweep-best",
    ]
    assert len(scores.trained) == 17


def test_the_runs_own_optimizers_are_not_tried_twice(tmp_path: Path, scores: type[Scores]) -> None:
    write_click_log(tmp_path, rows=64)
    plain = run_plain(tmp_path)
    for table in plain["tables"]:
        table["optimizer"] = {"kind": "adagrad", "lr": 0.2}
    said = call("sweep", write_toml(tmp_path / "run.toml", plain), "--optimizers")
    assert said.code == 0, said.errors
    assert "tables=own" not in said.output
    assert "tables=adagrad-0.2" in said.output


def test_optimizers_that_the_kernels_lack_are_named_and_not_tried(tmp_path: Path, scores: type[Scores]) -> None:
    said = sweep(tmp_path, "--optimizers", "--set", "tables[*].optimizer.weight_decay=0.1")
    assert said.code == 0, said.errors
    kinds = {override for trial in scores.trained for override in trial.setting.overrides if "tables" in override}
    assert {kind for kind in kinds if "kind" in kind} == {f"{KINDS}=rowwise_adagrad"}
    (line,) = [line for line in said.errors.splitlines() if line.startswith("not tried")]
    assert line.startswith(
        "not tried, as these would be refused: tables=sgd-0.1, tables=sgd-1, tables=sgd-10, tables=ada"
    )
    assert line.endswith("use 'rowwise_adagrad', or sharding = ['data_parallel']")


def test_the_worst_log_loss_does_not_win(tmp_path: Path, scores: type[Scores]) -> None:
    scores.scores = {"data.epochs=1": 0.7, "data.epochs=2": 0.3, "data.epochs=3": 0.5}
    said = sweep(tmp_path, "--over", "data.epochs=1,2,3", "--set", "evaluation.metric=logloss_nats")
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))["settings"]
    assert [row["validation_logloss_nats"] for row in rows] == [0.3, 0.5, 0.7]
    assert "best by validation_logloss_nats: data.epochs=2\n" in said.output


def test_of_several_labels_what_decides_is_named_with_its_label(tmp_path: Path, scores: type[Scores]) -> None:
    plain = run_plain(tmp_path, data={"labels": ["click", "user_id"], "user": ""}, model={"tower": [4], "experts": 2})
    plain["tables"], plain["model"]["kind"] = plain["tables"][:1], "mmoe"
    write_click_log(tmp_path, rows=64)
    said = call("sweep", write_toml(tmp_path / "run.toml", plain), "--over", "data.epochs=1,2", "--jobs", "2")
    assert said.code == 0, said.errors
    assert said.output.split()[:2] == ["setting", "validation_auc/click"]
    assert "best by validation_auc/click: data.epochs=1\n" in said.output
    assert "data.epochs=1,seed=1: validation_auc/click 0.00000 at step 5" in said.errors


def test_an_option_without_effect_is_said_to_have_none(tmp_path: Path, scores: type[Scores]) -> None:
    said = sweep(tmp_path, "--over", "loss.gamma=1,2")
    assert "\nloss.gamma=1 and loss.gamma=2 gave the same numbers: loss.gamma has no effect there\n" in said.output


@pytest.mark.parametrize(
    "axes",
    [
        (
            "--set",
            f"tables=[{EMBEDDING}]",
            "--over",
            'model={kind="deepfm",hidden=[8],linear="projection"},{kind="dcn",hidden=[8]},{kind="dnn",hidden=[8]}',
        ),
        ("--zip", "--over", "model.kind=deepfm,dnn", "--over", f"tables=[{EMBEDDING},{LINEAR}],[{EMBEDDING}]"),
    ],
)
def test_kinds_of_models_are_compared_as_the_page_says(
    tmp_path: Path, scores: type[Scores], axes: tuple[str, ...]
) -> None:
    said = sweep(tmp_path, *axes)
    assert said.code == 0, said.errors
    kinds = {trial.description["model"]["kind"] for trial in scores.trained}
    assert kinds == ({"deepfm", "dnn"} if "--zip" in axes else {"deepfm", "dcn", "dnn"})


def test_where_all_failed_the_table_says_why_and_nothing_is_recommended(tmp_path: Path, scores: type[Scores]) -> None:
    scores.scores = {"error": 1}
    said = sweep(tmp_path, "--over", "data.epochs=1,2")
    said.complains_of(r"no setting finished all its runs; what they said is in .*/sweep/logs$")
    assert said.output.count("no luck") == 2
    assert "best" not in said.output


def test_a_signal_ends_it_with_the_code_to_restart_on_and_handlers_are_as_before(
    tmp_path: Path, scores: type[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def kill(self: Scores, trial: Trial) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RunFailedError("ended")

    monkeypatch.setattr(scores, "__call__", kill)
    said = sweep(tmp_path, "--over", "data.epochs=1,2")
    assert said.code == 75
    assert "\nstopped; the same command goes on\n" in said.errors
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--over", "data.epoch=1,2"), "error: unknown key data.epoch; did you mean data.epochs?"),
        (("--over", "data.epochs="), "error: --over data.epochs= has an empty value"),
        (
            ("--over", "model.dropot=0,0.5"),
            "error: model.dropot=0: model: unknown option for model kind 'deepfm': 'dropot'",
        ),
        (
            ("--over", "model.hidden=[8],[16],64"),
            "error: model.hidden=64: model: model option hidden=64 must be a list",
        ),
        (
            ("--over", "data.epochs=1,2", "--set", "model.hidden=64"),
            "error: model: model option hidden=64 must be a list",
        ),
        (
            ("--over", "data.epochs=1,2", "--ranks", "3"),
            "error: data.streams = 4 cannot be shared equally by 3 ranks; use a multiple, such as 6",
        ),
        (
            ("--over", "data.epochs=1,2", "--set", "data.validation=['no*']"),
            "error: data.validation: no* matches no file",
        ),
        (
            ("--over", "data.train=['no.parquet']"),
            "error: data.train=no.parquet: data.train: no.parquet does not exist",
        ),
        (
            ("--over", "tables[*].features=['f*'],['x*']"),
            "error: features=x: table 'embedding': features: 'x*' matches no",
        ),
        (
            ("--over", "model.kind=deepfm,dnn"),
            "error: model.kind=dnn: table 'fc' has role 'linear', which model.kind 'dnn' does not read; leave it out",
        ),
        (("--over", "data.epochs=1,1"), "error: --over data.epochs has the value 1 2 times"),
        (("--over", "data.epochs=1", "--set", "data.validation=[]"), "error: data.validation is empty"),
        (("--over", "data.epochs=1", "--seeds", "0"), "error: --seeds is 0, expected 1 or more"),
        (("--over", "data.epochs=1", "--jobs", "-1"), "error: --jobs is -1, expected 1 or more"),
        (("--over", "data.epochs=1", "--ranks", "0"), "error: --ranks is 0, expected 1 or more"),
        (("--over", "data.epochs=1,2", "--over", "seed=1", "--zip"), "error: --over seed: the sweep itself sets seed"),
        (("--optimizers", "--set", f"{KINDS}=sgd"), f"error: --set {KINDS}=sgd would have no effect"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    tmp_path: Path, scores: type[Scores], words: tuple[str, ...], message: str
) -> None:
    said = sweep(tmp_path, *words)
    said.complains_of(f"^{re.escape(message)}")
    assert scores.trained == []
    assert not (tmp_path / "sweep").exists()


def test_under_a_launcher_it_is_refused(tmp_path: Path, scores: type[Scores], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    sweep(tmp_path, "--over", "data.epochs=1,2").complains_of("sweep starts the ranks of its runs itself")


def test_a_second_sweep_into_the_same_folder_is_told_who_is_there(
    tmp_path: Path, scores: type[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.lock._WAIT_SECONDS", 0.1)
    with sweep_module.locked(tmp_path / "sweep"):
        sweep(tmp_path, "--over", "data.epochs=1,2").complains_of(rf"is in use: process {os.getpid()} on ")
    assert scores.trained == []
