"""Where ranks and hosts meet: stores that listen on the address they were told, on no other, and notice a cut link.

torch's TCPStore listens on every address of the host, whatever name it is given, and may wait for ever for a host that
has gone. This file knows no ranks: the world opens the ranks' store here, and torchrun (``--rdzv_backend shardrec``)
that of the hosts.
"""

from __future__ import annotations

import datetime
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

_PORT = 29500
"""Where hosts meet if the endpoint has no port."""

_SECONDS = 60
"""Longest operation of torchrun on its store, as in its own rendezvous, and longest silence of any connection."""

_BACKLOG = 4096
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def listen(host: str, port: int) -> socket.socket | None:
    """A socket that listens on the address of ``host`` alone; None if that is no address of this machine or is taken.

    Port 0 takes a free one.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return None
    for family, *_, address in addresses:
        try:
            return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError:
            continue
    return None


def open_store(host: str, port: int, timeout: datetime.timedelta, *, serves: bool | None) -> TCPStore:
    """The store at ``host``. ``serves``: this process has it; None if the address is this machine's and not taken."""
    from torch.distributed import TCPStore

    silence = min(_SECONDS, timeout.total_seconds())
    server = None if serves is False else listen(host, port)
    if server is None:
        # Served all the same: the address leads here through a translation, and torch's way, on all of them, is left.
        store = TCPStore(host, port, is_master=bool(serves), wait_for_workers=False, timeout=timeout)
    else:
        _end_after(silence, server)
        port, listens = server.getsockname()[1], server.detach()
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listens)
    for connection in _connections_to(port):
        _end_after(silence, connection)
    return store


def _end_after(silence: float, connection: socket.socket) -> None:
    """End a connection, or those that a socket accepts, when nothing came from the other host for ``silence`` seconds.

    TCPStore's own timeout is none where the link is cut: it then asks the server to cancel, and waits for the answer.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(silence / 3)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(silence / 6)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence * 1000))


def _connections_to(port: int) -> Iterator[socket.socket]:
    """This process's connections to a port, which TCPStore keeps to itself."""
    folder = "/proc/self/fd"
    for number in map(int, os.listdir(folder) if os.path.isdir(folder) else ()):
        with suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    if connection.family in _INTERNET and connection.getpeername()[1] == port:
                        yield connection


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The entry point of torchrun's group ``torchrun.handlers``."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """A rendezvous of hosts as torchrun's ``c10d``, but for where it listens and what it says of a host that is gone.

    Several hosts that are told ``localhost`` meet at this host's own name: that is what AWS Batch and Volcano tell the
    first host only.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=_PORT)
    if host == "localhost" and parameters.max_nodes > 1:
        host = socket.gethostname()
    seconds = parameters.get_as_int("read_timeout") or _SECONDS

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except (RendezvousConnectionError, DistError) as error:
            raise RendezvousConnectionError(
                f"{host}:{port}, where the hosts of this job meet, is gone or has not answered for {seconds} s; start "
                "the job again when the host and the link to it are up: it resumes from the newest checkpoint"
            ) from error

    class Backend(C10dRendezvousBackend):
        """torch's own, whose errors name the host."""

        @property
        def name(self) -> str:
            """What torchrun asked for; it refuses a handler that goes by another name."""
            return parameters.backend

        def get_state(self) -> tuple[bytes, Any] | None:
            """As in torch."""
            with told():
                return super().get_state()

        def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
            """As in torch."""
            with told():
                return super().set_state(state, token)

    with told():
        store = open_store(host, port, datetime.timedelta(seconds=seconds), serves=None)
        backend = Backend(store, parameters.run_id)
    return create_handler(store, backend, parameters)
