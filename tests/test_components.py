"""The TorchX component: that TorchX accepts it, and that the trainer parses every command it emits."""

from __future__ import annotations

import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torchx import specs
from torchx.cli.main import main as torchx
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner

from launch import components
from trainer import cli

ROOT = Path(__file__).parent.parent
FILE = str(ROOT / "launch" / "components.py")
TUNED = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
)


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that sets none of what the component would set."""
    for name in TUNED:
        monkeypatch.delenv(name, raising=False)


def only_role(app: specs.AppDef) -> specs.Role:
    """The one role of a job."""
    assert len(app.roles) == 1
    return app.roles[0]


def command(app: specs.AppDef) -> list[str]:
    """The words of the command that a host runs."""
    flag, line = only_role(app).args
    assert (only_role(app).entrypoint, flag) == ("bash", "-c")
    return shlex.split(line)


def trainer_words(app: specs.AppDef) -> list[str]:
    """What the trainer is given, from the words after ``-m trainer``."""
    words = command(app)
    place = words.index("-m")
    assert words[place + 1] == "trainer"
    return words[place + 2 :]


class TestTorchXAccepts(ComponentTestCase):
    def test_torchx_finds_no_fault_with_the_component(self) -> None:
        self.validate(components, "train")


def test_the_command_it_emits_is_one_the_trainer_parses() -> None:
    app = components.train("--set=data.global_batch_size=1024", "--set", "seed=7", config="run.toml", j="1x2")
    args = cli.parser().parse_args(trainer_words(app))
    assert str(args.config) == "run.toml"
    assert args.overrides == ["data.global_batch_size=1024", "seed=7"]


def test_words_with_spaces_quotes_and_dollars_reach_the_trainer_unchanged() -> None:
    awkward = "--set=data.train=[\"a b.parquet\", 'c$HOME.parquet']"
    app = components.train(awkward, config="my runs/run.toml")
    assert trainer_words(app) == ["train", "my runs/run.toml", awkward]


@pytest.mark.parametrize(
    ("j", "hosts", "nnodes", "ranks"), [("1x2", 1, "1", "2"), ("4x8", 4, "4", "8"), ("2:4x8", 4, "2:4", "8")]
)
def test_j_gives_hosts_and_ranks_per_host(j: str, hosts: int, nnodes: str, ranks: str) -> None:
    app = components.train(config="run.toml", j=j)
    words = command(app)
    assert only_role(app).num_replicas == hosts
    assert words[words.index("--nnodes") + 1] == nnodes
    assert words[words.index("--nproc_per_node") + 1] == ranks


def test_a_j_that_is_not_hosts_x_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="Invalid format for -j"):
        components.train(config="run.toml", j="two")


@pytest.mark.parametrize(
    ("cpu", "j", "threads"), [(16, "1x4", "4"), (16, "2x4", "4"), (2, "1x4", "1"), (7, "1x2", "3")]
)
def test_ranks_share_the_cores_of_their_host(cpu: int, j: str, threads: str) -> None:
    env = only_role(components.train(config="run.toml", j=j, cpu=cpu)).env
    assert env["OMP_NUM_THREADS"] == threads


def test_a_named_host_brings_its_cores() -> None:
    role = only_role(components.train(config="run.toml", j="1x2", h="aws_p3.8xlarge"))
    assert role.resource == specs.resource(h="aws_p3.8xlarge")
    assert role.env["OMP_NUM_THREADS"] == str(int(role.resource.cpu) // 2)


def test_without_cpu_this_machines_cores_are_asked_for_and_memory_is_left_to_the_scheduler() -> None:
    resource = only_role(components.train(config="run.toml")).resource
    assert resource == specs.Resource(cpu=components._cores(), gpu=0, memMB=0)


def test_resources_are_asked_for_as_given() -> None:
    resource = only_role(components.train(config="run.toml", cpu=96, gpu=8, memMB=1000000)).resource
    assert resource == specs.Resource(cpu=96, gpu=8, memMB=1000000)


def test_a_restarted_rank_gets_a_fresh_rendezvous_store() -> None:
    assert only_role(components.train(config="run.toml")).env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_restarts_go_to_torchrun_and_retries_to_the_scheduler() -> None:
    role = only_role(components.train(config="run.toml", max_restarts=3, max_retries=2))
    assert role.env["PET_MAX_RESTARTS"] == "3"
    assert role.max_retries == 2


def test_the_environment_given_wins_over_the_shell_and_the_shell_over_what_measured_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = only_role(components.train(config="run.toml")).env
    assert all(name in best for name in TUNED)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    given = {"OMP_NUM_THREADS": "6", "PET_MAX_RESTARTS": "9", "MINE": "x"}
    env = only_role(components.train(config="run.toml", env=given)).env
    assert (env["MALLOC_TOP_PAD_"], env["OMP_NUM_THREADS"], env["PET_MAX_RESTARTS"], env["MINE"]) == (
        "1",
        "6",
        "9",
        "x",
    )
    assert given == {"OMP_NUM_THREADS": "6", "PET_MAX_RESTARTS": "9", "MINE": "x"}


def test_no_value_of_the_environment_has_a_comma_at_which_slurm_would_cut_it() -> None:
    assert not [value for value in only_role(components.train(config="run.toml")).env.values() if "," in value]


def test_several_overrides_pass_through_torchxs_own_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set=seed=7", "--set=max_steps=3"]
    torchx(["run", "--dryrun", "-s", "local_cwd", f"{FILE}:train", "--config", "r.toml", "-j", "1x2", "--", *overrides])
    assert "train r.toml --set=seed=7 --set=max_steps=3" in " ".join(capsys.readouterr().out.split())


def test_the_shipped_runs_and_the_makefile_name_the_same_component() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "launch/components.py:train" in makefile
    assert (ROOT / "launch" / "runs" / "deepfm.toml").is_file()
    assert "launch/runs/deepfm.toml" in makefile


def test_dry_run_for_local_ranks_keeps_the_environment(tmp_path: Path) -> None:
    with get_runner() as runner:
        plan = runner.dryrun_component(
            f"{FILE}:train", ["--config", "run.toml", "-j", "1x2"], "local_cwd", cfg={"log_dir": str(tmp_path)}
        )
    (replica,) = plan.request.role_params["trainer"]
    assert replica.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert replica.env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_the_package_offers_its_component_beside_those_of_torchx() -> None:
    offered = {entry.name: entry.value for entry in entry_points(group="torchx.components")}
    assert offered == {"shardrec": "launch.components", "_0": "torchx.components"}
