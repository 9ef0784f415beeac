"""Hosts on this machine: network namespaces on a bridge, each with its own name, addresses and processes to start."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_PREFIX = f"sr{os.getpid() % 100_000}"
"""Names of interfaces have at most 15 letters."""

_BRIDGE = f"{_PREFIX}br"

# Not `ip netns exec`, which mounts /sys anew. The host's name is known from its own /etc/hosts alone: no look-up waits.
_ENTER = 'hostname "$0"; for f in hosts nsswitch.conf; do mount --bind "$1/$f" "/etc/$f"; done; shift; exec "$@"'


@dataclass(frozen=True)
class Host:
    """One host."""

    name: str
    address: str
    space: str
    port: str
    """The bridge's end of its cable."""

    etc: Path

    def words(self, *command: str) -> list[str]:
        """A command of this host's, as words to run here."""
        inside = [
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _ENTER,
            self.name,
            str(self.etc),
        ]
        return ["nsenter", f"--net=/run/netns/{self.space}", *inside, *command]

    def start(self, line: str, environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a line of bash whose output goes to a log."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.words("bash", "-c", line),
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def listens_on(self) -> set[str]:
        """The addresses that this host's processes listen on."""
        said = subprocess.run(self.words("ss", "-Hltn"), check=True, capture_output=True, text=True).stdout
        return {line.split()[3].rpartition(":")[0] for line in said.splitlines()}

    def plug(self, *, in_: bool) -> None:
        """Put the cable in, or pull it out."""
        _ip(f"link set {self.port} {'up' if in_ else 'down'}")

    def kill(self) -> None:
        """Kill all of this host's processes."""
        for pid in subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def network(number: int) -> Iterator[list[Host]]:
    """Some hosts for the block, named h1, h2 and so on, that reach each other and nothing else."""
    missing = [program for program in ("ip", "ss", "nsenter", "unshare") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(
            f"needs root and {', '.join(missing) or 'nothing else'}; on Debian: apt-get install iproute2 util-linux"
        )
    with tempfile.TemporaryDirectory(prefix="shardrec-hosts-") as folder:
        names = [f"h{place}" for place in range(1, number + 1)]
        addresses = [f"10.77.0.{place}" for place in range(1, number + 1)]
        lines = ["127.0.0.1 localhost", *(f"{one} {name}" for one, name in zip(addresses, names, strict=True))]
        (Path(folder) / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (Path(folder) / "nsswitch.conf").write_text("hosts: files\n", encoding="utf-8")
        made = [
            Host(name, address, f"{_PREFIX}{name}", f"{_PREFIX}v{name}", Path(folder))
            for name, address in zip(names, addresses, strict=True)
        ]
        try:
            _ip(f"link add {_BRIDGE} type bridge")
            _ip(f"link set {_BRIDGE} up")
            for host in made:
                _ip(f"netns add {host.space}")
                _ip(f"link add {host.port} type veth peer name eth0 netns {host.space}")
                _ip(f"link set {host.port} master {_BRIDGE} up")
                _ip(f"-n {host.space} addr add {host.address}/24 dev eth0")
                for device in ("lo", "eth0"):
                    _ip(f"-n {host.space} link set {device} up")
            yield made
        finally:
            for host in made:
                host.kill()
                _ip(f"netns del {host.space}", check=False)
            _ip(f"link del {_BRIDGE}", check=False)


def _ip(line: str, *, check: bool = True) -> None:
    subprocess.run(["ip", *shlex.split(line)], check=check, capture_output=not check)
