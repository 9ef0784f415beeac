"""Which ranks of a host are gone, as another one sees it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import peers
from trainer.peers import Peer, who_is_gone

OWN = Peer.of_this_process(0, 0)


@pytest.fixture
def dead() -> Iterator[Peer]:
    """A rank of this host that has ended, and of which its launcher has not taken notice."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield dataclasses.replace(OWN, rank=5, local_rank=1, pid=process.pid)


def test_a_rank_that_ended_is_named_before_and_after_its_launcher_takes_notice(dead: Peer) -> None:
    alive = dataclasses.replace(OWN, rank=2, pid=os.getppid())
    expected = f"rank 5 (pid {dead.pid}) is gone"
    assert who_is_gone(OWN, [OWN, alive, dead]) == expected
    os.waitpid(dead.pid, 0)
    assert who_is_gone(OWN, [OWN, alive, dead]) == expected


def test_its_log_is_named_where_torchelastic_keeps_one(
    dead: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    log = tmp_path / "1" / "stderr.log"
    assert who_is_gone(OWN, [dead]) == f"rank 5 (pid {dead.pid}) is gone"
    log.parent.mkdir()
    log.touch()
    assert who_is_gone(OWN, [dead]) == f"rank 5 (pid {dead.pid}, log {log}) is gone"


def test_of_other_hosts_and_launchers_nothing_is_known(dead: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_SECONDS_TO_DIE", 0.0)
    elsewhere = [dataclasses.replace(dead, host="elsewhere"), dataclasses.replace(dead, launcher=1)]
    assert who_is_gone(OWN, elsewhere) == ""
