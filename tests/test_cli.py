"""Tests of the command line: what it accepts, how it ends, one line for a mistake, and how little it loads."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer
from trainer import cli, errors
from trainer.errors import ConfigError, DataError, UserError

COMMANDS = (
    "train",
    "sweep",
    "evaluate",
    "predict",
    "inspect",
    "import",
    "export-state-dict",
    "export",
    "serve",
    "sample-data",
    "prepare",
    "init",
    "plan",
    "report",
    "doctor",
)
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "numpy", "pyarrow", "tensorboard")

RUN = """
tables = [{ name = "t", features = ["f*"] }]
model = { kind = "fm", linear = "projection" }
[data]
train = ["a.parquet"]
"""


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return int(caught.value.code or 0)


def parsed(*argv: str) -> dict[str, Any]:
    arguments = vars(cli.parser().parse_args(argv))
    assert callable(arguments.pop("handler"))
    return arguments


def write_run(folder: Path) -> str:
    path = folder / "run.toml"
    path.write_text(RUN, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def stub_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts functions in the place of a module that a command imports when it runs; what they were called with."""

    def put(name: str, **answers: Any) -> list[Any]:
        calls: list[Any] = []

        def answering(answer: Any) -> Callable[..., Any]:
            def answered(*arguments: Any, **options: Any) -> Any:
                calls.append((*arguments, options))
                if isinstance(answer, BaseException):
                    raise answer
                return answer

            return answered

        module = types.ModuleType(f"trainer.{name}")
        for function, answer in answers.items():
            setattr(module, function, answering(answer))
        monkeypatch.setitem(sys.modules, f"trainer.{name}", module)
        monkeypatch.setattr(trainer, name, module, raising=False)
        return calls

    return put


# ---------------------------------------------------------------- what it loads


def test_help_of_every_command_needs_neither_torch_nor_any_heavy_library() -> None:
    code = f"""
import sys, contextlib, io
from trainer import cli
for argv in (["--help"], *([command, "--help"] for command in {COMMANDS!r})):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main(argv)
    assert out.getvalue().startswith("usage: python -m trainer"), argv
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_mistake_in_a_run_description_is_found_without_them_too(tmp_path: Path) -> None:
    code = f"""
import sys, contextlib
from trainer import cli
for words in (["train"], ["sweep", "--optimizers"], ["sweep", "--over", "segment_steps=1,2"]):
    with contextlib.suppress(SystemExit):
        cli.main([*words, {write_run(tmp_path)!r}, "--set", "data.epoch=2"])
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == "error: unknown key data.epoch; did you mean data.epochs?\n" * 3


def test_python_m_trainer_is_the_same_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout == cli.parser().format_help()
    assert re.findall(r"^    ([a-z-]+)", done.stdout, re.MULTILINE) == list(COMMANDS)


# ---------------------------------------------------------------- what it accepts


def test_train_takes_a_description_and_overrides_in_order() -> None:
    assert parsed("train", "run.toml") == {
        "command": "train",
        "config": Path("run.toml"),
        "overrides": [],
        "fresh": False,
        "yes": False,
        "continue_from": None,
    }
    given = parsed("train", "--set", "a=1", "run.toml", "--set=b=2", "--fresh", "--yes", "--set", "c=[1, 2]")
    assert given["overrides"] == ["a=1", "b=2", "c=[1, 2]"]
    assert (given["fresh"], given["yes"]) == (True, True)
    assert parsed("train", "--set", "a=1", "run.toml", "--diagnostics")["overrides"] == [
        "a=1",
        "report.diagnostics=true",
    ]
    assert parsed("train", "run.toml")["overrides"] == []


def test_the_other_commands_take_what_their_users_scripts_say() -> None:
    assert parsed("evaluate", "run", "--data", "a", "--data", "b", "--json") == {
        "command": "evaluate",
        "path": Path("run"),
        "data": ["a", "b"],
        "json": True,
    }
    assert parsed("evaluate", "run")["data"] is None
    assert parsed("predict", "run", "o.parquet", "--data", "a", "--data", "b", "--keep", "id", "--batch-size", "9") == {
        "command": "predict",
        "path": Path("run"),
        "out": Path("o.parquet"),
        "data": ["a", "b"],
        "keep": ["id"],
        "batch_size": 9,
        "overwrite": False,
    }
    forms = {
        option: parsed("inspect", "run", *option)["form"] for option in [(), ("--json",), ("--digest",), ("--verify",)]
    }
    assert forms == {(): "text", ("--json",): "json", ("--digest",): "digest", ("--verify",): "verify"}
    assert parsed("import", "m.pt", "--config", "run.toml", "--set", "a=1", "--partial") == {
        "command": "import",
        "path": Path("m.pt"),
        "config": Path("run.toml"),
        "overrides": ["a=1"],
        "partial": True,
    }
    assert parsed("export-state-dict", "run", "out.pt") == {
        "command": "export-state-dict",
        "path": Path("run"),
        "out": Path("out.pt"),
    }
    assert parsed("sample-data", "d", "--rows", "7", "--seed", "3") == {
        "command": "sample-data",
        "directory": Path("d"),
        "rows": 7,
        "seed": 3,
        "overwrite": False,
    }


def test_the_commands_about_data_take_what_their_users_scripts_say() -> None:
    assert parsed("prepare", "criteo", "a.gz", "b", "out") == {
        "command": "prepare",
        "kind": "criteo",
        "inputs": [Path("a.gz"), Path("b")],
        "output": Path("out"),
        "overwrite": False,
        "column": [],
        "delimiter": ",",
        "separator": "|",
        "strings": "hash",
        "vocabulary": None,
        "split": None,
        "fractions": (0.8, 0.1, 0.1),
        "seed": 0,
        "validation": [],
        "test": [],
        "bad_rows": "error",
        "threads": 0,
    }
    assert parsed("init", "data/a", "--label", "y") == {
        "command": "init",
        "data": ["data/a"],
        "output": Path("run.toml"),
        "label": "y",
        "overwrite": False,
    }
    assert parsed("doctor") == {"command": "doctor"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("trian",), "invalid choice: 'trian'"),
        (("train",), "the following arguments are required: RUN.toml"),
        (("train", "run.toml", "--epochs", "2"), "unrecognized arguments: --epochs 2"),
        (("predict", "run", "out"), "the following arguments are required: --data"),
        (("import", "model.pt"), "the following arguments are required: --config"),
        (("inspect", "run", "--json", "--digest"), "argument --digest: not allowed with argument --json"),
        (("sample-data", "d", "--rows", "many"), "argument --rows: invalid int value: 'many'"),
        (("prepare", "movielens", "a", "b"), "invalid choice: 'movielens'"),
        (("prepare", "criteo", "a"), "the following arguments are required"),
    ],
)
def test_arguments_that_it_does_not_know_are_refused_with_usage(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("usage: ")
    assert shown.out == ""


def test_the_command_line_of_train_does_not_grow_a_flag_per_key() -> None:
    choices = next(a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {option for action in choices["train"]._actions for option in action.option_strings}
    assert options == {"-h", "--help", "--set", "--diagnostics", "--fresh", "--yes", "--continue-from"}


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 75)])
def test_a_stopped_run_asks_to_be_restarted(
    tmp_path: Path, stub_module: Callable[..., list[Any]], finished: bool, code: int
) -> None:
    calls = stub_module("commands", train=finished)
    assert exit_code("train", write_run(tmp_path), "--set", "seed=9", "--fresh", "--yes") == code
    ((config, options),) = calls
    assert config.seed == 9
    assert options == {"fresh": True, "confirmed": True, "continue_from": None}


def test_results_go_to_standard_output_with_one_newline_at_the_end(
    stub_module: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_module("commands", evaluate='{"a": 1}')
    assert exit_code("evaluate", "run", "--json") == 0
    assert capsys.readouterr() == ('{"a": 1}\n', "")
    calls = stub_module("inspection", inspect="name digest\nother digest\n")
    assert exit_code("inspect", "run", "--digest") == 0
    assert capsys.readouterr() == ("name digest\nother digest\n", "")
    assert calls == [(Path("run"), "digest", {})]


def test_a_rank_with_nothing_to_say_says_nothing(
    stub_module: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_module("commands", evaluate="")
    assert exit_code("evaluate", "run") == 0
    assert capsys.readouterr() == ("", "")


def test_the_doctors_findings_are_the_exit_code(stub_module: Callable[..., list[Any]]) -> None:
    for code in (0, 1):
        stub_module("doctor", run=code)
        assert exit_code("doctor") == code


@pytest.mark.parametrize("error", UserError.__subclasses__())
def test_a_users_mistake_of_any_kind_is_one_line_and_code_one(
    error: type[UserError], stub_module: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_module("commands", evaluate=error("what is\n  wrong;\tdo this"))
    assert exit_code("evaluate", "run") == 1
    assert capsys.readouterr() == ("", "error: what is wrong; do this\n")


def test_every_error_of_the_package_is_a_users_mistake() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) > 5
    assert all(issubclass(kind, UserError) for kind in kinds)


def test_a_bug_is_not_made_a_users_mistake(stub_module: Callable[..., list[Any]]) -> None:
    stub_module("commands", evaluate=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["evaluate", "run"])


def test_an_interrupted_command_says_how_to_go_on(
    stub_module: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_module("commands", evaluate=KeyboardInterrupt())
    assert exit_code("evaluate", "run") == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_job_says_a_mistake_once_and_every_rank_tells_the_launcher(
    tmp_path: Path,
    stub_module: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    lines: int,
) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    stub_module("commands", evaluate=DataError("no rows"))
    assert exit_code("evaluate", "run") == 1
    assert capsys.readouterr().err.count("error: no rows\n") == lines
    assert json.loads(told.read_text(encoding="utf-8"))["message"] == "error: no rows"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.epochs=0", "error: data.epochs is 0, expected 1 or more\n"),
        ("tables[3].rows=1", "error: --set: tables[3] does not exist; tables has entries 0 to 0\n"),
        ("seed", "error: --set 'seed' is not key=value; write it like --set data.epochs=2\n"),
    ],
)
def test_a_wrong_run_description_ends_before_anything_is_started(
    tmp_path: Path,
    stub_module: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    calls = stub_module("commands", train=ConfigError("never called"))
    assert exit_code("train", write_run(tmp_path), "--set", override) == 1
    assert capsys.readouterr() == ("", message)
    assert calls == []
