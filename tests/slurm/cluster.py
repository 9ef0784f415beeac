"""A Slurm of two nodes on this machine, for one test run: root, Debian's packages, loopback only, one folder.

No systemd and no cgroups. The nodes are named by loopback addresses: TorchX hands the name of the first one to torchrun
as the host to meet at. Accounting (slurmdbd on a MariaDB) is there because TorchX asks ``sacct`` about its jobs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.slurm.processes import Programs, wait_until, with_patience, with_variable

NODES = ("127.0.0.1", "127.0.0.2")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server-core", "mariadb-client-core")
_PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "slurmdbd",
    "mariadbd",
    "mariadb-install-db",
    "my_print_defaults",
)
_SECONDS_TO_START = 30
_SECONDS_TO_MISS = 10
"""Time in which a node that is gone is found missing."""

_SLURM_CONF = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,bf_min_age_reserve=0
ReturnToService=2
SlurmdTimeout={timeout}
KillWait=5
MinJobAge=3600
MailProg=/bin/true
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge.socket
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_SLURMDBD_CONF = """
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
DbdPort={slurmdbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass={password}
"""

_USER_SQL = """
CREATE DATABASE slurm_acct_db;
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
"""


class Cluster:
    """A Slurm that runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._conf = folder / "slurm.conf"
        self._programs = Programs(folder)
        self.environ = {**os.environ, "SLURM_CONF": str(self._conf)}
        """For commands that talk to it."""

    def start(self) -> None:
        """Start all daemons; returns when both nodes are idle."""
        ports = {name: free_port() for name in ("slurmctld", "slurmdbd", "mariadb", *NODES)}
        values = {"folder": self._folder, "timeout": _SECONDS_TO_MISS, "password": secrets.token_hex(12), **ports}
        lines = [
            f"NodeName={n} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[n]} CPUs=2 RealMemory=4000"
            for n in NODES
        ]
        self._write("slurm.conf", _SLURM_CONF.format(nodes="\n".join(lines), **values))
        # Without it slurmd 22.05 does not start where there are no cgroups; nothing uses it.
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1\n")
        self._write("slurmdbd.conf", _SLURMDBD_CONF.format(**values))
        self._write("user.sql", _USER_SQL.format(**values))
        (self._folder / "state").mkdir()
        self._start_munge()
        self._start_accounting(ports)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(
            lambda: self.said("sinfo", "-hN", "-o%T").split() == ["idle"] * 2, _SECONDS_TO_START, "idle", self._folder
        )

    def start_node(self, node: str) -> None:
        """Start a node, or start it again."""
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything that it runs, as when a machine loses its power."""
        self._programs.running.pop(f"slurmd-{node}").kill()
        for pid in {*with_variable("SHARDREC_NODE", f"slurmd-{node}"), *with_variable("SLURMD_NODENAME", node)}:
            _kill(pid)

    def said(self, *words: str) -> str:
        """What a command of Slurm prints; nothing if it fails."""
        return subprocess.run(words, env=self.environ, capture_output=True, text=True, check=False, timeout=30).stdout

    def state(self, job: str) -> str:
        """The state of a job, of its first part if it has several."""
        lines = self.said("squeue", "-h", "-tall", "-o%T", "-j", job).split()
        return lines[0] if lines else "unknown"

    def stop(self) -> None:
        """Cancel all jobs, then stop all daemons and what they leave behind."""
        self.said("scancel", "--user=root")
        with_patience(lambda: not self.said("squeue", "-h"), 15)
        self._programs.stop()
        for pid in list(with_variable("SLURM_CONF", self._conf)):
            _kill(pid)

    def _start_munge(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = {"key-file": key, **{f"{name}-file": self._folder / f"munge.{name}" for name in ("pid", "log", "seed")}}
        own = [f"--socket={self._folder}/munge.socket", *(f"--{name}={path}" for name, path in files.items())]
        self._daemon("munged", "munged", "--foreground", *own)

    def _start_accounting(self, ports: dict[str, int]) -> None:
        data = f"--datadir={self._folder}/mariadb"
        auth = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        with self._programs.log("mariadb-install").open("wb") as log:
            install = ["mariadb-install-db", "--no-defaults", data, "--user=root", *auth]
            subprocess.run(install, check=True, stdout=log, stderr=subprocess.STDOUT)
        here = ["--bind-address=127.0.0.1", f"--port={ports['mariadb']}", f"--socket={self._folder}/mariadb.socket"]
        first = f"--init-file={self._folder}/user.sql"
        self._daemon("mariadbd", "mariadbd", "--no-defaults", "--user=root", data, *here, first, "--skip-name-resolve")
        wait_until(lambda: _listens(ports["mariadb"]), _SECONDS_TO_START, "MariaDB", self._folder)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        wait_until(lambda: _listens(ports["slurmdbd"]), _SECONDS_TO_START, "slurmdbd", self._folder)
        subprocess.run(["sacctmgr", "-i", "add", "cluster", "lab"], env=self.environ, check=True, capture_output=True)

    def _daemon(self, name: str, *words: str) -> None:
        self._programs.start(name, words, {**self.environ, "SHARDREC_NODE": name})

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")


@contextmanager
def slurm() -> Iterator[Cluster]:
    """A Slurm for the block; its folder is removed at the end."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(
            f"needs root and {', '.join(missing) or 'nothing else'}; on Debian: "
            f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    # Not below pytest's folders: munge refuses a socket that others cannot reach.
    with tempfile.TemporaryDirectory(prefix="shardrec-slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
