"""The TorchX components: that TorchX accepts them, and that torchrun and the trainer parse every command they emit."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser
from torchx import specs
from torchx.cli.main import main as torchx
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs.file_linter import get_fn_docstring

from launch import components
from launch.components import benchmark, evaluate, predict, train
from trainer import cli
from trainer.description import load

ROOT = Path(__file__).parent.parent
FILE = str(ROOT / "launch" / "components.py")
SHIPPED = str(ROOT / "launch" / "runs" / "deepfm.toml")
NEEDED: dict[str, dict[str, Any]] = {
    "train": {"config": "run.toml"},
    "evaluate": {"path": "runs/a"},
    "predict": {"path": "runs/a", "out": "p.parquet", "data": ["d/*.parquet"]},
    "benchmark": {"config": "run.toml"},
}
"""Each component, and the arguments that it needs."""

TUNED = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
)

each_component = pytest.mark.parametrize("name", NEEDED)


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that sets none of what the components would set."""
    for name in TUNED:
        monkeypatch.delenv(name, raising=False)


def emitted(component: str, /, **given: Any) -> specs.AppDef:
    """The job of a component."""
    app: specs.AppDef = getattr(components, component)(**{**NEEDED[component], **given})
    return app


def only_role(app: specs.AppDef) -> specs.Role:
    """The one role of a job."""
    assert len(app.roles) == 1
    return app.roles[0]


def torchrun(app: specs.AppDef) -> argparse.Namespace:
    """What torchrun understands of the command that a host runs."""
    flag, line = only_role(app).args
    assert (only_role(app).entrypoint, flag) == ("bash", "-c")
    program, *words = shlex.split(line)
    assert program == "torchrun"
    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "trainer")
    return parsed


def trainer(app: specs.AppDef) -> argparse.Namespace:
    """What the trainer understands of it."""
    return cli.parser().parse_args(torchrun(app).training_script_args)


class TestTorchXAccepts(ComponentTestCase):
    def test_torchx_finds_no_fault_with_the_components(self) -> None:
        for name in NEEDED:
            self.validate(components, name)


@each_component
def test_the_help_has_a_line_for_every_argument(name: str) -> None:
    component = getattr(components, name)
    sentence, lines = get_fn_docstring(component)
    assert "TIP" not in sentence
    assert list(lines) == list(inspect.signature(component).parameters)
    assert not [argument for argument, line in lines.items() if not line.strip() or line.strip() == "(required)"]


def test_all_components_have_the_same_arguments_for_the_shape_of_a_job() -> None:
    shapes = [
        {
            argument: (kind.annotation, kind.default)
            for argument, kind in inspect.signature(getattr(components, name)).parameters.items()
            if f" {argument}: " in components._SHAPE and argument != "name"
        }
        for name in NEEDED
    ]
    assert len(shapes[0]) == 14
    assert all(shape == shapes[0] for shape in shapes)


# ---------------------------------------------------------------- what the trainer is told


def test_training_and_its_overrides_are_parsed() -> None:
    told = trainer(train("--set=data.global_batch_size=1024", "--set", "seed=7", config="run.toml", j="1x2"))
    assert (told.command, str(told.config)) == ("train", "run.toml")
    assert told.overrides == ["data.global_batch_size=1024", "seed=7"]
    assert trainer(train("--diagnostics", config="run.toml")).overrides == ["report.diagnostics=true"]


def test_scoring_is_parsed_with_and_without_data() -> None:
    told = trainer(evaluate("--json", path="runs/a", data=["a/*.parquet", "b c.parquet"]))
    assert (told.command, str(told.path), told.json) == ("evaluate", "runs/a", True)
    assert told.data == ["a/*.parquet", "b c.parquet"]
    assert trainer(evaluate(path="runs/a")).data is None


def test_predicting_is_parsed() -> None:
    told = trainer(predict(path="runs/a", out="p.parquet", data=["a/*.parquet", "b.parquet"]))
    assert (told.command, str(told.path), str(told.out)) == ("predict", "runs/a", "p.parquet")
    assert told.data == ["a/*.parquet", "b.parquet"]


def test_a_benchmark_is_a_short_run_of_its_own_that_scores_nothing() -> None:
    told = trainer(benchmark("--set=seed=3", config=SHIPPED, steps=40, segment_steps=10))
    run = load(told.config, told.overrides)
    assert told.command == "train"
    assert (run.max_steps, run.segment_steps, run.checkpoint.every_steps, run.seed) == (40, 10, 0, 3)
    assert run.data.validation == run.data.test == ()
    assert run.output == f"runs/benchmark/{specs.macros.app_id}", "the scheduler puts the job in place of it"


def test_words_with_spaces_quotes_and_dollars_reach_the_trainer_unchanged() -> None:
    awkward = "--set=data.train=[\"a b.parquet\", 'c$HOME.parquet']"
    told = trainer(train(awkward, config="my runs/run.toml"))
    assert (str(told.config), told.overrides) == ("my runs/run.toml", [awkward.removeprefix("--set=")])


# ---------------------------------------------------------------- what torchrun is told


@each_component
@pytest.mark.parametrize(
    ("j", "fewest", "most", "nnodes", "ranks"),
    [("1x2", 1, 1, "1", "2"), ("4x8", 4, 4, "4", "8"), ("2:4x8", 2, 4, "2:4", "8"), ("3", 1, 1, "1", "3")],
)
def test_j_gives_hosts_and_ranks_per_host(name: str, j: str, fewest: int, most: int, nnodes: str, ranks: str) -> None:
    app = emitted(name, j=j)
    assert (only_role(app).min_replicas, only_role(app).num_replicas) == (fewest, most)
    assert (torchrun(app).nnodes, torchrun(app).nproc_per_node) == (nnodes, ranks)


def test_a_j_that_is_not_hosts_x_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="Invalid format for -j"):
        train(config="run.toml", j="two")


@each_component
def test_one_host_meets_nobody_outside_of_it(name: str) -> None:
    told = torchrun(emitted(name, j="1x4"))
    assert (told.rdzv_backend, told.rdzv_endpoint, told.local_addr) == ("shardrec", "localhost:0", "localhost")


@each_component
def test_several_hosts_meet_at_the_first_one_and_say_how_long_they_wait(name: str) -> None:
    conf = {"last_call_timeout": "5", "keep_alive_interval": "1"}
    told = torchrun(emitted(name, j="1:2x2", rdzv_port=1234, rdzv_conf=conf))
    assert told.rdzv_endpoint == f"$${{{specs.macros.rank0_env}:=localhost}}:1234"
    assert (told.rdzv_conf, told.local_addr) == ("last_call_timeout=5,keep_alive_interval=1", None)
    assert told.rdzv_id == specs.macros.app_id
    assert only_role(emitted(name, rdzv_port=1234)).port_map == {"c10d": 1234}


@each_component
def test_restarts_go_to_torchrun_and_retries_to_the_scheduler(name: str) -> None:
    app = emitted(name, max_restarts=3, max_retries=2, tee=3)
    assert (torchrun(app).max_restarts, torchrun(app).tee, only_role(app).max_retries) == (3, "3", 2)


# ---------------------------------------------------------------- resources and environment


@each_component
def test_resources_image_mounts_and_name_are_as_given(name: str) -> None:
    app = emitted(name, cpu=96, gpu=8, memMB=1000000, image="i:1", mounts=["type=bind", "src=/a", "dst=/b"], name="n")
    role = only_role(app)
    assert role.resource == specs.Resource(cpu=96, gpu=8, memMB=1000000)
    assert (app.name, role.image, role.mounts) == ("n", "i:1", [specs.BindMount("/a", "/b")])
    assert emitted(name).name == name


@pytest.mark.parametrize(
    ("cpu", "j", "threads"), [(16, "1x4", "4"), (16, "2x4", "4"), (2, "1x4", "1"), (7, "1x2", "3")]
)
def test_ranks_share_the_cores_of_their_host(cpu: int, j: str, threads: str) -> None:
    env = only_role(train(config="run.toml", j=j, cpu=cpu)).env
    assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(("h", "gpus"), [("cpu", 0), ("gpu1", 1), ("gpu2", 2), ("gpu4", 4), ("gpu8", 8)])
def test_a_named_host_brings_its_cores_gpus_and_memory(h: str, gpus: int) -> None:
    role = only_role(train(config="run.toml", j="1x2", h=f"shardrec.{h}"))
    assert role.resource == specs.resource(h=f"shardrec.{h}")
    assert (role.resource.gpu, role.resource.cpu >= 8, role.resource.memMB >= 32_000) == (gpus, True, True)
    assert role.env["OMP_NUM_THREADS"] == str(int(role.resource.cpu) // 2)


def test_without_cpu_this_machines_cores_are_asked_for_and_memory_is_left_to_the_scheduler() -> None:
    resource = only_role(train(config="run.toml")).resource
    assert resource == specs.Resource(cpu=components._cores(), gpu=0, memMB=0)


@each_component
def test_a_restarted_rank_gets_a_fresh_rendezvous_store(name: str) -> None:
    assert only_role(emitted(name)).env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_the_environment_given_wins_over_the_shell_and_the_shell_over_what_measured_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = only_role(train(config="run.toml")).env
    assert all(name in best for name in TUNED)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    given = {"OMP_NUM_THREADS": "6", "MINE": "x"}
    env = only_role(train(config="run.toml", env=given)).env
    assert (env["MALLOC_TOP_PAD_"], env["OMP_NUM_THREADS"], env["MINE"]) == ("1", "6", "x")
    assert given == {"OMP_NUM_THREADS": "6", "MINE": "x"}


def test_no_value_of_the_environment_has_a_comma_at_which_slurm_would_cut_it() -> None:
    assert not [value for value in only_role(train(config="run.toml")).env.values() if "," in value]


# ---------------------------------------------------------------- as TorchX finds and starts them


def test_several_overrides_pass_through_torchxs_own_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set=seed=7", "--set=max_steps=3"]
    torchx(["run", "--dryrun", "-s", "local_cwd", f"{FILE}:train", "--config", "r.toml", "-j", "1x2", "--", *overrides])
    said = re.sub(r"[\s']+", " ", capsys.readouterr().out)
    assert "train r.toml --set=seed=7 --set=max_steps=3" in said


def test_the_shipped_runs_and_the_makefile_name_the_same_component() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "launch/components.py:train" in makefile
    assert (ROOT / "launch" / "runs" / "deepfm.toml").is_file()
    assert "launch/runs/deepfm.toml" in makefile


def test_dry_run_for_local_ranks_keeps_the_environment(tmp_path: Path) -> None:
    with get_runner() as runner:
        plan = runner.dryrun_component(
            "shardrec.train", ["--config", "run.toml", "-j", "1x2"], "local_cwd", cfg={"log_dir": str(tmp_path)}
        )
    (replica,) = plan.request.role_params["trainer"]
    assert replica.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert replica.env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_the_package_offers_its_components_beside_those_of_torchx() -> None:
    offered = {entry.name: entry.value for entry in entry_points(group="torchx.components")}
    assert offered == {"shardrec": "launch.components", "_0": "torchx.components"}


def test_torchx_lists_the_components_and_nothing_else_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    torchx(["builtins"])
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert {name for name in listed if name.startswith("shardrec.")} == {f"shardrec.{name}" for name in NEEDED}
    assert "dist.ddp" in listed


def test_torchx_can_tell_the_options_of_all_its_schedulers(capsys: pytest.CaptureFixture[str]) -> None:
    torchx(["runopts"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("local_cwd", "slurm", "kubernetes", "aws_batch"))
