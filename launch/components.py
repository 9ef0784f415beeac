"""The shape of a training job as a TorchX component: hosts, ranks, environment and restarts.

It knows nothing of tables, data or models: its contract with the trainer is the command line. TorchX executes this
file and reads the signature and docstring of `train` for its own command line, which is why the types are
spelled with ``typing.Optional`` and friends: TorchX 0.7 understands no other spelling.
"""

import os
from typing import Dict, List, Optional

from torchx import specs
from torchx.components.dist import ddp, parse_nnodes

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


def train(
    *script_args: str,
    config: str,
    j: str = "1x1",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: str = "",
    name: str = "shardrec/",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    tee: int = 0,
) -> specs.AppDef:
    """Train a ranking model from a run description, as torchx run ... --config RUN.toml -j 1x2 -- --set=key=value

    Args:
        script_args: what follows "--" goes to the trainer as it is; write --set=key=value, as TorchX takes a word such as --set once only
        config: run description (TOML), as a path that every host can read
        j: {hosts}x{ranks per host}, or {fewest hosts}:{most hosts}x{ranks per host}
        h: named resource of a host, instead of cpu, gpu and memMB
        cpu: cores of a host, shared by its ranks; 0 takes as many as this machine has
        gpu: GPUs of a host, at least one per rank, or 0
        memMB: memory of a host in MB; 0 leaves it to the scheduler
        image: container image, for schedulers that run one
        name: {experiment}/{run} under which the scheduler lists the job
        env: environment of the ranks as NAME=value,NAME=value; wins over what is set here
        mounts: mounts of a container, such as type=bind,src=/host,dst=/job
        max_restarts: times that torchrun restarts the ranks on their hosts; a restart resumes from the newest checkpoint
        max_retries: times that the scheduler starts the job anew; this resumes too
        rdzv_port: port of the first host on which several hosts meet
        tee: 0 shows the ranks' output as it is, progress bar included; 3 keeps it by rank and marks each line with its rank
    """  # noqa: E501  (TorchX takes an argument's help from one line)
    resource = specs.resource(h=h) if h else specs.Resource(cpu=cpu or _cores(), gpu=gpu, memMB=memMB)
    _, _, ranks, _ = parse_nnodes(j)
    app = ddp(
        "train",
        config,
        *script_args,
        m="trainer",
        image=image,
        name=name,
        j=j,
        env=_environment(env or {}, threads=max(1, int(resource.cpu) // ranks), max_restarts=max_restarts),
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        tee=tee,
    )
    # ddp() turns a memory of 0 into 1 GiB, which a scheduler that enforces it would kill the job for.
    app.roles[0].resource = resource
    return app


def _environment(given: Dict[str, str], threads: int, max_restarts: int) -> Dict[str, str]:
    """The environment of a rank: what was ``given``, then what this shell already sets, then what measured best."""
    tuned = {**_SETTINGS, "OMP_NUM_THREADS": str(threads)}
    return {
        **{name: os.environ.get(name, value) for name, value in tuned.items()},
        # torch 2.13 shares the rendezvous store between attempts, and a restarted rank then waits for a dead one.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PET_MAX_RESTARTS": str(max_restarts),
        **given,
    }


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
