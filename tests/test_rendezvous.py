"""Tests of where stores listen. All of 127.0.0.0/8 is this machine: what listens on one address must not on another."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from importlib.metadata import entry_points

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler, RendezvousParameters

from tests.ports import free_port
from trainer import rendezvous
from trainer.rendezvous import listen, open_store

SECONDS = datetime.timedelta(seconds=20)
ELSEWHERE = "192.0.2.1"
"""An address that is kept for documents: no machine has it."""


def opened(port: int, *hosts: str) -> list[bool]:
    """Whether somebody listens on the port of each host."""
    found = []
    for host in hosts:
        with contextlib.closing(socket.socket()) as probe:
            found.append(probe.connect_ex((host, port)) == 0)
    return found


def meet(endpoint: str, hosts: int = 1, **conf: int) -> RendezvousHandler:
    """What torchrun makes of ``--rdzv_backend shardrec``."""
    (entry,) = entry_points(group="torchrun.handlers")
    assert (entry.name, entry.value) == ("shardrec", "trainer.rendezvous:handler")
    create = rendezvous.handler()
    return create(RendezvousParameters("shardrec", endpoint, "job", hosts, hosts, local_addr="127.0.0.1", **conf))


def test_a_socket_listens_on_the_address_it_is_told_and_on_no_other() -> None:
    server = listen("127.0.0.2", 0)
    assert server is not None
    with server:
        assert opened(server.getsockname()[1], "127.0.0.1", "127.0.0.2", "127.0.0.3") == [False, True, False]


@pytest.mark.parametrize("host", [ELSEWHERE, "no-such-host.invalid"])
def test_an_address_that_is_not_of_this_machine_is_not_listened_on(host: str) -> None:
    assert listen(host, 0) is None


def test_of_two_that_would_serve_one_address_the_second_joins_the_first() -> None:
    port = free_port()
    first = open_store("127.0.0.2", port, SECONDS, serves=None)
    second = open_store("127.0.0.2", port, SECONDS, serves=None)
    first.set("name", "value")
    assert second.get("name") == b"value"
    assert opened(port, "127.0.0.1", "127.0.0.2") == [False, True]


def test_a_store_that_must_be_served_here_is_no_other_process_s() -> None:
    port = free_port()
    served = open_store("127.0.0.1", port, SECONDS, serves=True)
    with pytest.raises(DistNetworkError, match="address already in use"):
        open_store("127.0.0.1", port, SECONDS, serves=True)
    assert served.port == port


def test_a_store_that_another_serves_is_joined() -> None:
    port = free_port()
    served = open_store("127.0.0.1", port, SECONDS, serves=True)
    open_store("127.0.0.1", port, SECONDS, serves=False).set("name", "value")
    assert served.get("name") == b"value"


def test_hosts_meet_where_torchrun_is_told_and_the_first_one_there_listens() -> None:
    port = free_port()
    handler = meet(f"127.0.0.2:{port}")
    assert opened(port, "127.0.0.1", "127.0.0.2") == [False, True]
    assert handler.get_backend() == "shardrec", "torchrun refuses another name"
    met = handler.next_rendezvous()
    assert (met.rank, met.world_size) == (0, 1)
    assert handler.shutdown()


def test_a_host_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(rendezvous, "listen", lambda host, port: None)
    with pytest.raises(RendezvousConnectionError, match=rf"127.0.0.1:{port}, .* is gone or has not answered for 1 s"):
        meet(f"127.0.0.1:{port}", read_timeout=1)


def test_one_host_that_is_told_localhost_listens_on_it_alone() -> None:
    port = free_port()
    handler = meet(f"localhost:{port}")
    assert opened(port, "localhost", "127.0.0.2") == [True, False]
    assert handler.shutdown()


def test_several_hosts_that_are_told_localhost_meet_at_the_name_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.0.4")
    port = free_port()
    handler = meet(f"localhost:{port}", hosts=2)
    assert opened(port, "127.0.0.1", "127.0.0.4") == [False, True]
    assert handler.shutdown()


def limits_of_connections(port: int) -> list[int]:
    """For how many milliseconds each connection of this process to or from a port may be silent."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue  # another test's, whose address is no pair
            if port in (connection.getsockname()[1], connection.getpeername()[1]):
                found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


def test_both_ends_of_a_connection_end_when_the_other_host_is_silent() -> None:
    port = free_port()
    store = open_store("127.0.0.1", port, datetime.timedelta(seconds=7), serves=True)
    store.set("key", "value")
    deadline = time.monotonic() + 10
    while len(limits_of_connections(port)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert limits_of_connections(port) == [7000, 7000]
    assert store.port == port
