"""The trainer from Python: the page's own example, against what the commands say about the same checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer
from tests.command_line import call
from tests.small_data import write_click_log
from trainer import notebook
from trainer.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def test_the_example_of_the_page_gives_what_the_commands_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_click_log(tmp_path / "data", 600)
    assert call("init", "data", "--output", "run.toml").code == 0
    assert EXAMPLE is not None
    found: dict[str, object] = {}
    exec(EXAMPLE[1], found)
    run, reached, clicks = found["run"], found["reached"], found["clicks"]
    assert isinstance(run, trainer.notebook.RunConfig)
    assert isinstance(reached, dict)
    assert isinstance(clicks, pa.Table)
    assert reached == json.loads((tmp_path / run.output / "result.json").read_text())
    by_command = json.loads(call("evaluate", run.output, "--json").output)
    assert found["again"] == by_command
    assert call("predict", run.output, "out.parquet", "--data", "data/test/*.parquet", "--keep", "click").code == 0
    assert clicks.equals(pq.read_table("out.parquet"))
    assert len(EXAMPLE[1].splitlines()) <= 10
    with pytest.raises(DataError, match="matches no file"):
        notebook.evaluate(run.output, "nothing*.parquet")


def test_overrides_are_values_of_python_and_mistakes_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = ["a"]\n[[tables]]\nname = "t"\nfeatures = ["f"]\n[model]\nkind = "fm"\n')
    changed = {
        "data.epochs": 3,
        "data.user": 'a "quoted" name',
        "tables[0].features": ["g", "h"],
        "data.shuffle": False,
    }
    changed |= {"tables[0].optimizer": {"kind": "adam", "lr": 1e-4}}
    run = notebook.load_run(path, changed)
    assert (run.data.epochs, run.data.user, run.data.shuffle) == (3, 'a "quoted" name', False)
    assert run.tables[0].features == ("g", "h")
    assert (run.tables[0].optimizer.kind, run.tables[0].optimizer.lr) == ("adam", 1e-4)
    with pytest.raises(ConfigError, match=r"unknown key data\.epoch; did you mean data\.epochs"):
        notebook.load_run(path, {"data.epoch": 3})


def test_the_package_loads_nothing_heavy_until_it_is_asked_and_its_functions_are_not_hidden_by_modules() -> None:
    code = (
        "import sys, trainer\n"
        "assert not {'torch', 'pyarrow'} & set(sys.modules)\n"
        "import trainer.predict\n"
        "from trainer import predict, evaluate, load_run, train, prepare\n"
        "assert callable(predict) and predict.__module__ == 'trainer.notebook', predict\n"
        "assert prepare.__name__ == 'trainer.prepare'\n"
        "assert not hasattr(trainer, 'trane')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
