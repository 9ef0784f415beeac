"""The server as a client sees it, over loopback: started as a user would, by the code in the export alone."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import call
from tests.served import STEPS, exported, predicted, rows_of, served
from trainer.artifact import load
from trainer.scorer import Rows, Scorer
from trainer.serve import Service

ALONE = """
import runpy, sys
sys.path = [path for path in sys.path if path]
sys.modules["trainer"] = sys.modules["pyarrow"] = sys.modules["torchrec"] = None  # none of these may be imported
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A server process and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+): step", self.said)
        assert found, self.said + process.stderr.read()
        self.port = int(found[1])

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """The status and the answer of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        try:
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@contextmanager
def serving(path: Path, *words: str | Path) -> Iterator[Server]:
    """A server of an export; it ends well on SIGTERM."""
    command = [sys.executable, "-c", ALONE, path / "serve.py", "--port=0", "--threads=1", *words]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            yield Server(process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert re.search(r"ended after [\d,]+ requests", process.stderr.read())
        finally:
            process.kill()


def test_a_server_answers_as_predict_does_takes_updates_and_refuses_in_one_line(
    served_run: Path, tmp_path: Path
) -> None:
    rows, updates = rows_of(served_run), tmp_path / "updates"
    updates.mkdir()
    first = exported(served_run, tmp_path / "first", step=STEPS[0])
    second = exported(served_run, updates / "second", "--since", first, step=STEPS[1])
    exported(served_run, updates / "third", "--since", first)
    whole = exported(served_run, updates / "whole", "--rows", "float32")
    with serving(first, "--updates", updates, "--max-rows=200", "--max-bytes=60000") as server:
        status, answer = server.ask("/predict", {"rows": rows})
        assert status == 200
        np.testing.assert_allclose(answer["probabilities"]["click"], served(first, rows), rtol=0, atol=1e-6)
        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(lambda row: server.ask("/predict", {"rows": [row]}), rows))
        found = [answer["probabilities"]["click"][0] for _, answer in answers]
        np.testing.assert_allclose(found, served(first, rows), rtol=0, atol=1e-6)

        status, health = server.ask("/health")
        assert status == 200
        assert health["status"] == "serving"
        assert health["step"] == STEPS[0]
        assert (health["requests"], health["rows"]) == (151, 300)
        assert health["batches"] < 151
        _refuses(server, rows)

        (updates / "damaged").mkdir()
        for file in second.iterdir():
            content = file.read_bytes()
            (updates / "damaged" / file.name).write_bytes(content[:-1] if file.name == "rows-0.npy" else content)
        for name, complaint in (("damaged", "rows-0.npy is damaged"), ("none", "cannot be read"), ("../first", "path")):
            status, answer = server.ask("/update", {"path": name})
            assert status == 409
            assert complaint in answer["error"]
        assert server.ask("/update", {"path": "second"})[0] == 200
        assert server.ask("/update", {"path": "third"})[0] == 409
        _, answer = server.ask("/predict", {"rows": rows})
        again = load(exported(served_run, tmp_path / "again", step=STEPS[1]))
        assert answer["version"] == again.version
        np.testing.assert_array_equal(
            np.float32(answer["probabilities"]["click"]), served(tmp_path / "again", rows).astype(np.float32)
        )
        assert server.ask("/update", {"path": whole.name})[0] == 200
        _, answer = server.ask("/predict", {"rows": rows})
        expected = predicted(served_run, tmp_path / "p")
        np.testing.assert_allclose(answer["probabilities"]["click"], expected, rtol=0, atol=1e-6)


def _refuses(server: Server, rows: list[dict[str, Any]]) -> None:
    """Every bad request has its status and one line, and the server goes on."""
    cases: list[tuple[str, Any, int, str]] = [
        ("/predict", b"{", 400, "the request is no JSON"),
        ("/predict", b'{"rows": [{"d1": NaN}]}', 400, "NaN is no number of JSON"),
        ("/predict", b"[" * 50_000, 400, "the request is no JSON"),
        ("/predict", b"[]", 400, '"rows" is no list of at least one object'),
        ("/predict", {"rows": [{"f9": 1, "d1": 1}]}, 400, "'f9' is no feature of this model; it has d0"),
        ("/predict", {"rows": [{"d1": 1}] * 201}, 413, "201 rows, expected at most 200"),
        ("/predict", b" " * 60_001, 413, "60001 bytes, expected at most 60000"),
        ("/predict", None, 405, "/predict takes POST"),
        ("/health", {}, 405, "/health takes GET"),
        ("/nothing", None, 404, "there are /predict, /update and /health"),
    ]
    for path, body, expected, message in cases:
        status, answer = server.ask(path, body)
        assert (status, message in answer["error"]) == (expected, True), (path, str(body)[:50], answer)
        assert "\n" not in answer["error"]
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 411 " in silent.recv(200)
    assert server.ask("/predict", {"rows": rows[:1]})[0] == 200


def test_a_watched_update_is_served_and_what_is_being_asked_at_sigterm_is_answered(
    served_run: Path, tmp_path: Path
) -> None:
    rows = rows_of(served_run)[:10]
    first = exported(served_run, tmp_path / "out", step=STEPS[0])
    with serving(first, "--watch", tmp_path / "updates", "--watch-seconds=0.05") as server:
        exported(served_run, tmp_path / "updates" / "second", "--since", first, step=STEPS[1])
        while not (health := server.ask("/health")[1])["updates"]:
            pass
        assert (health["step"], health["refused"]) == (STEPS[1], 0)
        body = json.dumps({"rows": rows}).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as slow:
            slow.sendall(head + body[:10])
            while server.ask("/health")[1]["at_work"] < 2:
                pass
            beside = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            assert _status(beside) == 200
            server.process.send_signal(signal.SIGTERM)
            while _status(beside) != 503:
                pass
            slow.sendall(body[10:])
            answer = b""
            while part := slow.recv(1 << 16):
                answer += part
        assert b"Connection: close" in answer
        assert b" 200 OK" in answer
        assert b'"probabilities"' in answer


def _status(connection: http.client.HTTPConnection) -> int:
    """How the server answers on a connection that stays open: 503 once it has heard of its end."""
    connection.request("GET", "/health")
    response = connection.getresponse()
    response.read()
    return response.status


def test_an_error_of_the_model_reaches_who_asked_and_the_next_request_is_answered(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(exported(served_run, tmp_path / "out"))
    service = Service(model, wait_seconds=0.0, most_rows=100, most_ids=9, updates=None)

    def fail(scorer: Scorer, rows: Rows) -> None:
        raise RuntimeError("out of memory")

    request = {"rows": rows_of(served_run)[:1]}
    monkeypatch.setattr(Scorer, "score", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        service.predict(request)
    monkeypatch.undo()
    assert len(service.predict(request)["probabilities"]["click"]) == 1


def test_the_trainer_serves_an_export_too_and_what_it_cannot_serve_is_one_line(
    served_run: Path, tmp_path: Path
) -> None:
    call("serve", tmp_path, "--port", "0").complains_of("manifest.json cannot be read: No such file or directory")
    path = exported(served_run, tmp_path / "out")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        call("serve", path, "--port", str(port)).complains_of(f"cannot listen on 127.0.0.1:{port}: .*; choose others")
