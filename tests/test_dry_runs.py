"""What TorchX would hand to Slurm, Kubernetes and AWS Batch for a component, field by field; no cluster is asked."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace
from typing import Any

import botocore.session
import botocore.validate
import pytest
from kubernetes.client import ApiClient
from torchx import specs
from torchx.runner import get_runner

GIVEN = {
    **{"--config": "run.toml", "-j": "1:2x4", "--name": "clicks", "--image": "registry/shardrec:1"},
    **{"--cpu": "12", "--gpu": "4", "--memMB": "64000", "--max_restarts": "1", "--max_retries": "3"},
    **{"--env": "MINE=x", "--mounts": "type=bind,src=/data,dst=/in,readonly", "--rdzv_conf": "last_call_timeout=5"},
}
ENVIRONMENT = {
    **{"MINE": "x", "OMP_NUM_THREADS": "3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    **{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_TOP_PAD_": "67108864"},
}
"""Some of what every rank must have."""


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that sets none of what the components would set, and no Slurm to ask."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")


def request(scheduler: str, changed: dict[str, str] | None = None, **cfg: str) -> Any:
    """What ``torchx run -s scheduler shardrec.train`` would submit."""
    words = [word for pair in {**GIVEN, **(changed or {})}.items() for word in pair]
    with get_runner() as runner:
        return runner.dryrun_component("shardrec.train", [*words, "--", "--set=seed=7"], scheduler, cfg=cfg).request


def check_command(line: str, first_host: str, job: str) -> None:
    """Fail unless the shell line of a host starts four ranks that meet at the host of a variable of the shell."""
    words = shlex.split(line)
    expected = {
        **{"--rdzv_endpoint": f"${{{first_host}:=localhost}}:29500", "--rdzv_id": job, "--nnodes": "1:2"},
        **{"--nproc_per_node": "4", "--max_restarts": "1", "--rdzv_conf": "last_call_timeout=5"},
    }
    assert {flag: words[words.index(flag) + 1] for flag in expected} == expected
    assert words[words.index("-m") :] == ["-m", "trainer", "train", "run.toml", "--set=seed=7"]


# ---------------------------------------------------------------- Slurm


def test_slurm_gets_a_part_for_each_host_and_requeues_as_often_as_there_are_retries() -> None:
    found = request("slurm", partition="lab", time="600")
    script = found.materialize()
    assert (found.max_retries, found.cmd) == (3, ["sbatch", "--parsable"])
    parts = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    asked = "--requeue --partition=lab --time=600 --ntasks-per-node=1 --cpus-per-task=12 --mem=64000 --gpus-per-task=4"
    assert parts == [f"--job-name=trainer-0 {asked}", "hetjob", f"--job-name=trainer-1 {asked}"]
    assert "export TORCHX_MAX_RETRIES=3" in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_slurm_starts_every_host_with_the_command_and_the_environment() -> None:
    script = request("slurm").materialize()
    (started,) = re.findall(r"^srun .*?(?=^exitcode)", script, re.MULTILINE | re.DOTALL)
    # The shell that runs the script sees the job's number where TorchX leaves "$SLURM_JOB_ID".
    hosts = " ".join(shlex.split(started.replace("\\\n", ""))).replace("$SLURM_JOB_ID", "17").split(" : ")
    assert len(hosts) == 2
    for number, host in enumerate(hosts):
        options, _, line = host.removeprefix("srun ").strip().partition(" bash -c ")
        exported = re.split(",", re.findall(r"--export=ALL,(\S+)", options)[0])
        assert ENVIRONMENT.items() <= dict(pair.split("=", 1) for pair in exported).items()
        assert f"--output=slurm-17-trainer-{number}.out --error=slurm-17-trainer-{number}.err" in options
        check_command(line, "SLURM_JOB_NODELIST_HET_GROUP_0", "17")


def test_slurm_is_not_asked_for_memory_or_gpus_that_were_not_given() -> None:
    script = request("slurm", {"--memMB": "0", "--gpu": "0"}).materialize()
    assert not re.findall(r"--mem=|--gpus", script)


# ---------------------------------------------------------------- Kubernetes (Volcano)


def volcano_job() -> dict[str, Any]:
    """The job as it goes over the wire, once Volcano's queue and retries are known to warn."""
    with pytest.warns(UserWarning, match="does NOT support retries correctly"):
        found = request("kubernetes", queue="clicks", namespace="ads")
    job: dict[str, Any] = ApiClient().sanitize_for_serialization(found.resource)
    return job


def test_kubernetes_gets_pods_that_its_own_models_read_without_loss() -> None:
    for task in volcano_job()["spec"]["tasks"]:
        answer = SimpleNamespace(data=json.dumps(task["template"]))
        read = ApiClient().deserialize(answer, "V1PodTemplateSpec")
        assert ApiClient().sanitize_for_serialization(read) == task["template"]


def test_volcano_starts_the_fewest_hosts_and_restarts_the_job() -> None:
    job = volcano_job()
    spec, tasks = job["spec"], job["spec"]["tasks"]
    assert (job["apiVersion"], job["kind"], spec["schedulerName"]) == ("batch.volcano.sh/v1alpha1", "Job", "volcano")
    assert (spec["queue"], spec["maxRetry"]) == ("clicks", 3)
    assert [(task["name"], task["replicas"], task["minAvailable"], task["maxRetry"]) for task in tasks] == [
        ("trainer-0", 1, 1, 3),
        ("trainer-1", 1, 0, 3),
    ]
    assert {"event": "PodFailed", "action": "RestartJob"} in tasks[0]["policies"]


def test_a_pod_has_the_image_resources_environment_mounts_port_and_command() -> None:
    job = volcano_job()
    for task, first_host in zip(job["spec"]["tasks"], ("TORCHX_RANK0_HOST", "VC_TRAINER_0_HOSTS"), strict=True):
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        assert (container["image"], pod["restartPolicy"]) == ("registry/shardrec:1", "Never")
        assert container["resources"]["limits"] == {"cpu": "12000m", "memory": "64000M", "nvidia.com/gpu": "4"}
        assert ENVIRONMENT.items() <= {each["name"]: each["value"] for each in container["env"]}.items()
        assert {"name": "mount-0", "mountPath": "/in", "readOnly": True} in container["volumeMounts"]
        assert {"name": "mount-0", "hostPath": {"path": "/data"}} in pod["volumes"]
        assert {"name": "c10d", "containerPort": 29500} in container["ports"]
        assert container["command"][:2] == ["bash", "-c"]
        check_command(container["command"][2], first_host, job["metadata"]["name"])
    assert job["metadata"]["name"].startswith("clicks-")


# ---------------------------------------------------------------- AWS Batch


@pytest.fixture(scope="module")
def batch() -> Any:
    """AWS's own description of the service."""
    return botocore.session.Session().get_service_model("batch")


def test_aws_batch_gets_a_job_definition_that_its_own_model_accepts(batch: Any) -> None:
    definition = request("aws_batch", queue="q").job_def
    shape = batch.operation_model("RegisterJobDefinition").input_shape
    botocore.validate.validate_parameters(definition, shape)
    kinds = {"retryStrategy", "nodeProperties", "tags", "type", "jobDefinitionName"}
    assert set(definition) == kinds <= set(shape.members)
    assert (definition["type"], definition["retryStrategy"]["attempts"]) == ("multinode", 3)


def test_aws_batch_starts_hosts_with_the_image_resources_environment_mounts_and_command() -> None:
    found = request("aws_batch", queue="q")
    nodes = found.job_def["nodeProperties"]
    (group,) = nodes["nodeRangeProperties"]
    container = group["container"]
    assert (found.queue, nodes["numNodes"], nodes["mainNode"], group["targetNodes"]) == ("q", 2, 0, "0:1")
    assert container["image"] == "registry/shardrec:1"
    assert {each["type"]: each["value"] for each in container["resourceRequirements"]} == {
        **{"VCPU": "12", "MEMORY": "64000", "GPU": "4"}
    }
    assert ENVIRONMENT.items() <= {each["name"]: each["value"] for each in container["environment"]}.items()
    assert container["mountPoints"] == [{"containerPath": "/in", "readOnly": True, "sourceVolume": "mount_0"}]
    assert container["volumes"] == [{"name": "mount_0", "host": {"sourcePath": "/data"}}]
    assert container["command"][:2] == ["bash", "-c"]
    check_command(container["command"][2], "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS", found.name)


def test_aws_batch_takes_a_named_host_but_none_without_memory() -> None:
    host = specs.resource(h="shardrec.gpu2")
    container = request("aws_batch", {"-h": "shardrec.gpu2"}, queue="q").job_def["nodeProperties"][
        "nodeRangeProperties"
    ][0]["container"]
    assert {"type": "MEMORY", "value": str(host.memMB)} in container["resourceRequirements"]
    with pytest.raises(AssertionError, match="memMB to be set to a positive value"):
        request("aws_batch", {"--memMB": "0"}, queue="q")
