"""An exported model behind HTTP: rows of features as JSON in, probabilities out.

A copy of this file lies in every export, which ``python OUT/serve.py`` serves with numpy and torch alone. Imports
neither at the top, so that ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.artifact import Artifact
    from trainer.scorer import Rows, Scorer

_IDLE_SECONDS = 60.0
"""How long a connection may be silent."""

_ENDING_SECONDS = 30.0
"""How long requests have that are being answered when the server is told to stop."""

_DONE, _MISTAKE = 0, 1


def add_options(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """The options of a server; ``path``: what it serves without one."""
    what = "an export" if path is None else "the export; default: the one that this file lies in"
    parser.add_argument(
        "path", type=Path, metavar="EXPORT", nargs=None if path is None else "?", default=path, help=what
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves that to it")
    parser.add_argument("--wait-ms", type=float, default=1.0, help="longest wait for other requests on their way")
    parser.add_argument("--max-rows", type=int, default=4096, help="most rows of a request (default %(default)s)")
    parser.add_argument("--max-history", type=int, default=1000, help="most ids of a sequence (default %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=8 << 20, help="longest request (default %(default)s)")
    parser.add_argument("--updates", type=Path, help="folder of what POST /update may name; without it, nothing")
    parser.add_argument("--watch", type=Path, help="folder to look into for updates, which are taken in their order")
    parser.add_argument("--watch-seconds", type=float, default=5.0, help="how often (default %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare every byte with its checksum before serving")


class HTTPError(Exception):
    """A request that is not answered, with its status and one line that says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """Answers requests together: a thread scores what has come while it scored the last."""

    def __init__(
        self, artifact: Artifact, *, wait_seconds: float, most_rows: int, most_ids: int, updates: Path | None
    ) -> None:
        """Of a model; ``most_rows``: scored together; ``most_ids``: of a sequence."""
        from trainer.scorer import Scorer

        self.scorer: Scorer = Scorer(artifact)
        self.counts = {"requests": 0, "rows": 0, "batches": 0, "updates": 0}
        self.ending = threading.Event()
        self._updates = updates
        self._refused: Callable[[], int] = lambda: 0
        self._wait_seconds, self._most_rows, self._most_ids = wait_seconds, most_rows, most_ids
        self._waiting: queue.SimpleQueue[tuple[Rows, Future[tuple[str, dict[str, list[float]]]]]] = queue.SimpleQueue()
        self._at_work = 0
        self._lock, self._updating = threading.Lock(), threading.Lock()
        threading.Thread(target=self._score_for_ever, name="score", daemon=True).start()

    def answering(self, change: int) -> None:
        """One request more, or less, is being answered."""
        with self._lock:
            self._at_work += change

    @property
    def at_work(self) -> int:
        """Requests that are being answered."""
        return self._at_work

    def predict(self, request: Any) -> dict[str, Any]:
        """Probabilities of the rows of a request, by one version of the model.

        Raises:
            ServingError: a row is wrong.
        """
        if not isinstance(request, dict):
            request = {}
        scorer = self.scorer
        rows = scorer.read(request.get("rows"))
        limits = {"rows": (rows.num_rows, self._most_rows)}
        limits["ids in a sequence"] = (int(scorer.longest_of(rows).max()), self._most_ids)
        for what, (number, most) in limits.items():
            if number > most:
                raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{number} {what}, expected at most {most}")
        answer: Future[tuple[str, dict[str, list[float]]]] = Future()
        self._waiting.put((rows, answer))
        version, probabilities = answer.result()
        return {"version": version, "probabilities": probabilities}

    def health(self) -> dict[str, Any]:
        """What is served, and how much was."""
        counts = dict(self.counts)  # before the model: an update is served before it is counted
        model = self.scorer.artifact
        return {
            "status": "ending" if self.ending.is_set() else "serving",
            "version": model.version,
            "step": model.manifest["step"],
            "outputs": self.scorer.outputs,
            "features": self.scorer.features,
            "at_work": self.at_work,
            **counts,
            "refused": self._refused(),
        }

    def update(self, request: Any) -> dict[str, Any]:
        """Serve a whole export, or what follows from this model and changes, from the next batch on.

        Raises:
            ServingError: it is damaged, does not follow, or reads other features.
        """
        from trainer.artifact import ServingError

        name = request.get("path") if isinstance(request, dict) else None
        if self._updates is None:
            raise HTTPError(HTTPStatus.FORBIDDEN, "this server takes no updates; start it with --updates FOLDER")
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise ServingError(f'"path" is {name!r}, expected the name of what lies in {self._updates}')
        new = self.take(self._updates / name)
        return {"version": new.version, "step": new.manifest["step"]}

    def take(self, path: Path) -> Artifact:
        """Serve a whole export, or what follows from this model and changes; which is returned.

        Raises:
            ServingError: it is damaged, does not follow, or reads other features.
        """
        from trainer.artifact import ServingError, changed_by, load, read_manifest
        from trainer.scorer import Scorer

        with self._updating:
            whole = read_manifest(path)["kind"] == "export"
            new = Scorer(load(path, verify=True) if whole else changed_by(self.scorer.artifact, path))
            if not new.answers_as(self.scorer):
                raise ServingError(f"{path} has other features, transforms or outputs than the model that is served")
            self.scorer = new
            self.counts["updates"] += 1
        return new.artifact

    def watch(self, folder: Path, seconds: float) -> None:
        """Take what appears in a folder, from a thread of its own; each is a line of the log."""
        from trainer.watch import Watcher

        watcher = Watcher(folder, lambda: self.scorer.artifact.version, self.take, _log)
        self._refused = lambda: watcher.refused
        threading.Thread(target=watcher.watch, args=(seconds, self.ending), name="watch", daemon=True).start()

    def _score_for_ever(self) -> None:
        from trainer.scorer import joined

        while True:
            batch = self._next_batch()
            try:
                scorer = self.scorer
                scored = scorer.score(joined([rows for rows, _ in batch]))
                first = 0
                for rows, answer in batch:
                    part = slice(first, first + rows.num_rows)
                    first = part.stop
                    answer.set_result(
                        (scorer.artifact.version, {name: found[part].tolist() for name, found in scored.items()})
                    )
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, and the thread go on
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
            self.counts["requests"] += len(batch)
            self.counts["batches"] += 1
            self.counts["rows"] += sum(rows.num_rows for rows, _ in batch)

    def _next_batch(self) -> list[tuple[Rows, Future[tuple[str, dict[str, list[float]]]]]]:
        """Requests to score together: waits for others only while some are being read."""
        batch = [self._waiting.get()]
        num_rows, until = batch[0][0].num_rows, time.perf_counter() + self._wait_seconds
        while num_rows < self._most_rows:
            left = until - time.perf_counter()
            try:
                others = self._at_work > len(batch) and left > 0
                batch.append(self._waiting.get(timeout=left) if others else self._waiting.get_nowait())
            except queue.Empty:
                break
            num_rows += batch[-1][0].num_rows
        return batch


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, and writes an answer in one piece."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "shardrec", ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def do_GET(self) -> None:
        """``/health``."""
        self._answer({"/health": lambda body: self.server.service.health()}, others=("/predict", "/update"))

    def do_POST(self) -> None:
        """``/predict`` and ``/update``."""
        service = self.server.service
        self._answer({"/predict": service.predict, "/update": service.update}, others=("/health",))

    def _answer(self, actions: Mapping[str, Any], others: Sequence[str]) -> None:
        from trainer.artifact import ServingError

        service = self.server.service
        came_too_late = service.ending.is_set()
        service.answering(+1)
        try:
            try:
                body = self._body() if self.command == "POST" else None
                if came_too_late:
                    raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is ending")
                if self.path not in actions:
                    method = {"GET": "POST", "POST": "GET"}[self.command]
                    found = self.path in others
                    status = HTTPStatus.METHOD_NOT_ALLOWED if found else HTTPStatus.NOT_FOUND
                    line = f"{self.path} takes {method}" if found else "there are /predict, /update and /health"
                    raise HTTPError(status, line)
                self._write(HTTPStatus.OK, actions[self.path](body))
            except HTTPError as error:
                self._write(error.status, {"error": str(error)})
            except ServingError as error:
                status = HTTPStatus.CONFLICT if self.path == "/update" else HTTPStatus.BAD_REQUEST
                self._write(status, {"error": str(error)})
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                self.log_error("%s: %s", type(error).__name__, error)
                self.close_connection = True
                self._write(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the model could not answer; see its log"})
        finally:
            service.answering(-1)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        self.close_connection = True  # what is not read would be taken for the next request
        if not length.isdecimal():
            raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        if int(length) > self.server.most_bytes:
            message = f"the request has {length} bytes, expected at most {self.server.most_bytes}"
            raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        content = self.rfile.read(int(length))
        self.close_connection = (
            self.headers.get("Connection", "").lower() == "close" or self.server.service.ending.is_set()
        )
        try:
            return json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"the request is no JSON: {error}") from error

    def _write(self, status: HTTPStatus, answer: Mapping[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Not each of thousands in a second."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, most_bytes: int) -> None:
        super().__init__(address, _Handler)
        self.service, self.most_bytes = service, most_bytes

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server's."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then answer what is being asked; an exit code.

    Raises:
        ServingError: the export is damaged.
    """
    import torch

    from trainer.artifact import ServingError, load

    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    artifact = load(arguments.path, verify=arguments.verify)
    seconds = time.perf_counter() - started
    service = Service(
        artifact,
        wait_seconds=arguments.wait_ms / 1000,
        most_rows=arguments.max_rows,
        most_ids=arguments.max_history,
        updates=arguments.updates,
    )
    try:
        server = _Server((arguments.host, arguments.port), service, arguments.max_bytes)
    except (OSError, OverflowError) as error:
        raise ServingError(f"cannot listen on {arguments.host}:{arguments.port}: {error}; choose others") from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.ending.set())
    threading.Thread(target=server.serve_forever, name="listen", daemon=True).start()
    host, port = server.server_address[:2]
    what = f"step {artifact.manifest['step']}, version {artifact.version[:12]}, loaded in {seconds:.2f} s"
    _log(f"serving {arguments.path} on http://{host!s}:{port}: {what}")
    if arguments.watch is not None:
        service.watch(arguments.watch, arguments.watch_seconds)
    service.ending.wait()
    server.shutdown()
    deadline = time.monotonic() + _ENDING_SECONDS
    while service.at_work and time.monotonic() < deadline:
        time.sleep(0.01)
    _log(f"ended after {service.counts['requests']:,} requests")
    return _DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the export that this file lies in, or another."""
    parser = argparse.ArgumentParser(description="Serves an exported model over HTTP.")
    add_options(parser, Path(__file__).resolve().parent)
    arguments = parser.parse_args(argv)
    from trainer.artifact import ServingError

    try:
        return run(arguments)
    except ServingError as error:
        sys.stderr.write(f"error: {error}\n")
        return _MISTAKE


if __name__ == "__main__":
    sys.exit(main())
