"""Runs a function in several processes, as a launcher would, and fails rather than hangs.

It sets the environment of each rank and joins no process group: the function does that if it needs one. Ranks are
forks of a server that has imported torch and torchrec, which costs 6 s, and done nothing with them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tests.ports import free_port


class RankFailed(AssertionError):
    """A rank raised, died or did not return in time; the message has its traceback or its exit code."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function(*args)`` returns in each of ``world_size`` new processes, in the order of ranks.

    Each process has this one's environment with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT in it, and one thread for torch. ``function`` must be at module level; it, its arguments and its
    result must be picklable. When a rank fails, or ``timeout`` seconds have passed, all ranks are killed and
    ``RankFailed`` is raised; a rank that hangs first prints where it hangs to standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    call = pickle.dumps((function, args))
    port = free_port()
    processes: list[BaseProcess] = []
    readers: list[Connection] = []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, port)
            process = context.Process(target=_rank_main, args=(environment, sys.path, call, writer, timeout))
            process.daemon = True
            process.start()
            writer.close()  # the child's copy is then the only one, so that its death reads as end of file
            processes.append(process)
            readers.append(reader)
        return _collect(processes, readers, timeout)
    finally:
        _end(processes)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank_main(environment: dict[str, str], path: list[str], call: bytes, writer: Connection, timeout: float) -> None:
    """Run the pickled call and send (True, result) or (False, traceback)."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    faulthandler.dump_traceback_later(max(1.0, timeout - 3))
    try:
        torch.set_num_threads(1)
        function, args = pickle.loads(call)
        message = pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001 - whatever it was, SystemExit too, the parent must hear of it
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)
    writer.close()
    faulthandler.cancel_dump_traceback_later()


def _collect(processes: list[BaseProcess], readers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(readers)) if rank not in results]
            raise RankFailed(f"ranks {late} of {len(readers)} did not return in {timeout:g} s; all were killed")
        for reader in ready:
            rank = next(rank for rank, own in enumerate(readers) if own is reader)
            results[rank] = _receive(rank, processes[rank], readers[rank])
    return [results[rank] for rank in range(len(readers))]


def _receive(rank: int, process: BaseProcess, reader: Connection) -> Any:
    try:
        succeeded, result = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(10)
        raise RankFailed(f"rank {rank} died without a word, exit code {process.exitcode}") from None
    if not succeeded:
        raise RankFailed(f"rank {rank} failed:\n{result}")
    return result


def _end(processes: list[BaseProcess]) -> None:
    """Give ranks that have returned a moment to exit, then kill those that are left."""
    failed = sys.exc_info()[0] is not None
    for process in processes:
        process.join(0 if failed else 10)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
