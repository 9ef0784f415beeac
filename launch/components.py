"""The shape of a job as TorchX components: hosts, ranks, resources, environment and restarts.

They know nothing of tables, data or models: their contract with the trainer is the command line. TorchX reads the
signature and docstring of a component for its own command line, which is why the types are spelled with
``typing.Optional`` and friends: TorchX 0.7 understands no other spelling.
"""

import os
import shlex
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from torchx import specs
from torchx.components.dist import parse_nnodes

# glibc gives large tensors back to the kernel after every step, and the page faults that follow cost more than the
# arithmetic: on two cores these settings took a step of batch 16384 from 74,000 to 112,000 rows/s. OpenMP's threads
# keep their cores busy between operators, where others could read and map the next batch.
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_WAIT_POLICY": "PASSIVE",
}

_SHAPE = """
        script_args: what follows "--" goes to the trainer as it is; in one word, as TorchX takes a word such as --set once only
        j: {hosts}x{ranks per host}, or {fewest hosts}:{most hosts}x{ranks per host}
        h: named resource of a host, such as shardrec.cpu or shardrec.gpu8, instead of cpu, gpu and memMB
        cpu: cores of a host, shared by its ranks; 0 takes as many as this machine has
        gpu: GPUs of a host, at least one per rank, or 0
        memMB: memory of a host in MB; 0 leaves it to the scheduler (AWS Batch needs a number)
        image: container image with shardrec in it, for schedulers that run one
        name: what the scheduler lists the job as
        env: environment of the ranks as NAME=value,NAME=value; wins over what is set here
        mounts: mounts of a container, such as type=bind,src=/host,dst=/job
        max_restarts: times that torchrun restarts the ranks on their hosts; training then resumes from the newest checkpoint
        max_retries: times that the scheduler starts the job anew; this resumes too
        rdzv_port: port of the first host on which several hosts meet
        rdzv_conf: how they meet, as NAME=seconds,NAME=seconds; last_call_timeout is how long the fewest wait for more (30)
        tee: 0 shows the ranks' output as it is, progress bar included; 3 keeps it by rank and marks each line with its rank
"""  # noqa: E501  (TorchX takes an argument's help from one line)


def _shaped(component: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """Add the help of the arguments that all components share."""
    component.__doc__ = f"{(component.__doc__ or '').rstrip()}{_SHAPE}"
    return component


@_shaped
def train(
    *script_args: str,
    config: str,
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: str = "",
    name: str = "train",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_conf: Optional[Dict[str, str]] = None,
    tee: int = 0,
) -> specs.AppDef:
    """Train from a run description, as torchx run shardrec.train --config RUN.toml -j 1x2 -- --set=key=value

    Args:
        config: run description (TOML), as a path that every host can read
    """
    return _job(["train", config, *script_args], locals())


@_shaped
def evaluate(
    *script_args: str,
    path: str,
    data: Optional[List[str]] = None,
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: str = "",
    name: str = "evaluate",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_conf: Optional[Dict[str, str]] = None,
    tee: int = 0,
) -> specs.AppDef:
    """Score a checkpoint: metrics over every row, as torchx run shardrec.evaluate --path runs/deepfm -- --json

    Args:
        path: a checkpoint, or a run's output (its newest good one)
        data: glob patterns of Parquet files, separated by commas; without, the run's test files, else its validation files
    """  # noqa: E501
    return _job(["evaluate", path, *_data(data), *script_args], locals())


@_shaped
def predict(
    *script_args: str,
    path: str,
    out: str,
    data: List[str],
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: str = "",
    name: str = "predict",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_conf: Optional[Dict[str, str]] = None,
    tee: int = 0,
) -> specs.AppDef:
    """Write the probability of every row, as torchx run shardrec.predict --path runs/deepfm --out p.parquet --data 'data/*.parquet'

    Args:
        path: a checkpoint, or a run's output (its newest good one)
        out: the Parquet file to write, on a file system that all hosts share
        data: glob patterns of Parquet files, separated by commas
    """  # noqa: E501
    return _job(["predict", path, out, *_data(data), *script_args], locals())


@_shaped
def benchmark(
    *script_args: str,
    config: str,
    steps: int = 300,
    segment_steps: int = 50,
    output: str = "runs/benchmark",
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: str = "",
    name: str = "benchmark",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_conf: Optional[Dict[str, str]] = None,
    tee: int = 0,
) -> specs.AppDef:
    """Print the rows/s of a run on these hosts: trains it for some steps without scoring; saves it once, at the end

    Args:
        config: run description (TOML), as a path that every host can read
        steps: steps to train, at most those of the run; the first segment includes warm-up
        segment_steps: steps that a printed number is of
        output: the job makes a folder of its own in this one
    """
    overrides = {
        "output": f"{output}/{specs.macros.app_id}",
        "max_steps": steps,
        "segment_steps": segment_steps,
        "checkpoint.every_steps": 0,
        "data.validation": [],
        "data.test": [],
        "evaluation.patience": 0,
        "report.tensorboard": "false",
    }
    words = [f"--set={key}={value}" for key, value in overrides.items()]
    return _job(["train", config, *words, *script_args], locals())


def _data(patterns: Optional[List[str]]) -> List[str]:
    return [f"--data={pattern}" for pattern in patterns or ()]


def _job(words: Sequence[str], given: Mapping[str, Any]) -> specs.AppDef:
    """The trainer with ``words`` on hosts of the shape that a component was ``given`` as its arguments."""
    h, cpu, j = given["h"], given["cpu"] or _cores(), given["j"]
    resource = specs.resource(h=h) if h else specs.Resource(cpu=cpu, gpu=given["gpu"], memMB=given["memMB"])
    fewest, most, ranks, _ = parse_nnodes(j)
    role = specs.Role(
        name="trainer",
        image=given["image"],
        min_replicas=fewest,
        num_replicas=most,
        entrypoint="bash",  # for the name of the first host, which the scheduler puts into the environment
        args=["-c", " ".join([*_torchrun(given), "-m", "trainer", *map(shlex.quote, words)])],
        env=_environment(given["env"] or {}, threads=max(1, int(resource.cpu) // ranks)),
        mounts=specs.parse_mounts(given["mounts"] or []),
        max_retries=given["max_retries"],
        port_map={"c10d": given["rdzv_port"]},
        resource=resource,
    )
    return specs.AppDef(name=given["name"], roles=[role])


def _torchrun(given: Mapping[str, Any]) -> List[str]:
    """The words that start the ranks of a host, in the spelling of bash."""
    _, most, ranks, hosts = parse_nnodes(given["j"])
    # AWS Batch and Volcano tell the first host no name of its own; $$ is TorchX's spelling of $.
    meeting = f"$${{{specs.macros.rank0_env}:=localhost}}:{given['rdzv_port']}" if most > 1 else "localhost:0"
    conf = ",".join(f"{name}={seconds}" for name, seconds in (given["rdzv_conf"] or {}).items())
    return [
        *("torchrun", "--rdzv_backend", "shardrec", "--rdzv_endpoint", meeting, "--rdzv_id", specs.macros.app_id),
        *(("--rdzv_conf", shlex.quote(conf)) if conf else ()),
        *(("--local_addr", "localhost") if most == 1 else ()),
        *("--nnodes", hosts, "--nproc_per_node", str(ranks), "--max_restarts", str(given["max_restarts"])),
        *("--tee", str(given["tee"]), "--role", "''"),
    ]


def _environment(given: Dict[str, str], threads: int) -> Dict[str, str]:
    """The environment of a rank: what was ``given``, then what this shell already sets, then what measured best."""
    tuned = {**_SETTINGS, "OMP_NUM_THREADS": str(threads)}
    return {
        **{name: os.environ.get(name, value) for name, value in tuned.items()},
        # torch 2.13 shares the rendezvous store between attempts, and a restarted rank then waits for a dead one.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **given,
    }


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
