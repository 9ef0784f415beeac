"""What serving costs: how long an export takes to load, and how long its server takes to answer.

Trains DeepFM for two steps on made data, exports it, loads it in processes of their own, and asks its server over
loopback, from threads of this process that each keep a connection. Client and server share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tabulate import tabulate

from benchmarks import process
from benchmarks.record import RESULTS, ROOT, percentiles, provenance, write

STORED = ("float32", "float16", "int8")
_LOAD = """
import json, sys, time
from pathlib import Path
from trainer.artifact import load
from trainer.scorer import Scorer
begun = time.perf_counter()
Scorer(load(Path(sys.argv[1]), verify=sys.argv[2] == "verified"))
Path(sys.argv[3]).write_text(json.dumps(time.perf_counter() - begun))
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    table_rows: int
    """Rows of the table of embeddings, 15 wide, and of the 1-wide one."""

    loads: int
    """How often each export is loaded."""

    cases: tuple[tuple[int, int], ...]
    """Clients, and rows of a request."""

    requests: int
    """Of each client."""


FULL = Sizes(table_rows=4_000_000, loads=5, cases=((1, 1), (8, 1), (1, 100), (8, 100)), requests=300)
QUICK = Sizes(table_rows=2_000, loads=1, cases=((2, 3),), requests=5)


def trained(folder: Path, rows: int) -> Path:
    """The output of a run of two steps with large tables."""
    data, output = folder / "data", folder / "run"
    process.run("sample-data", ["-m", "trainer", "sample-data", data, "--rows", 20_000, "--seed", 1], os.environ)
    settings = {
        **{f"data.{split}": [f"{data}/{split}/*.parquet"] for split in ("train", "validation", "test")},
        **{f"tables[{number}].rows": rows for number in (0, 1)},
        **{"output": str(output), "max_steps": 2, "report.tensorboard": False},
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    process.run("train", ["-m", "trainer", "train", ROOT / "launch" / "runs" / "deepfm.toml", *words], os.environ)
    return output


def measure_load(path: Path, times: int) -> dict[str, Any]:
    """Seconds to load an export, memory mapped, and with every checksum compared."""
    size = sum(file.stat().st_size for file in path.iterdir()) / (1 << 30)
    found: dict[str, Any] = {"gib": float(f"{size:.4g}")}
    for how in ("mapped", "verified"):
        seconds = []
        for _ in range(times):
            answer = path.parent / "seconds.json"
            process.run("load", ["-c", _LOAD, path, how, answer], os.environ)
            seconds.append(json.loads(answer.read_text(encoding="utf-8")))
        found[f"{how}_seconds"] = percentiles(seconds)
        found[f"{how}_seconds_per_gib"] = float(f"{np.median(seconds) / size:.4g}")
    return found


def requests_of(data: Path, path: Path, rows: int) -> list[bytes]:
    """Requests of so many rows each, from the test data."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    names = {name for table in manifest["tables"] for name in table["features"]}
    names |= {rule["name"] for rule in manifest["dense"]}
    table = pq.read_table(next((data / "test").glob("*.parquet")), columns=sorted(names)).to_pylist()
    return [json.dumps({"rows": table[at : at + rows]}).encode() for at in range(0, len(table) - rows, rows)]


def measure_answers(port: int, clients: int, requests: Sequence[bytes], number: int) -> dict[str, Any]:
    """Milliseconds from a request to its answer, and rows per second over all clients."""

    def ask(client: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        milliseconds = []
        for at in range(number):
            begun = time.perf_counter()
            connection.request("POST", "/predict", requests[(client * number + at) % len(requests)])
            response = connection.getresponse()
            answer = response.read()
            milliseconds.append(1000 * (time.perf_counter() - begun))
            if response.status != 200:
                raise SystemExit(f"the server answered {response.status}: {answer[:200]!r}")
        connection.close()
        return milliseconds

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))  # warm
        begun = time.perf_counter()
        found = np.concatenate(list(threads.map(ask, range(clients))))
        seconds = time.perf_counter() - begun
    rows = len(json.loads(requests[0])["rows"])
    return {
        "clients": clients,
        "rows": rows,
        "requests": len(found),
        "ms": {f"p{q}": float(f"{np.percentile(found, q):.4g}") for q in (50, 90, 99)},
        "rows_per_second": float(f"{len(found) * rows / seconds:.4g}"),
    }


def measure_server(path: Path, data: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """All cases, asked of one server."""
    command = [sys.executable, str(path / "serve.py"), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stderr.readline() if server.stderr is not None else ""
            port = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if port is None:
                raise SystemExit(f"the server did not start: {line}")
            return [
                measure_answers(int(port[1]), clients, requests_of(data, path, rows), sizes.requests)
                for clients, rows in sizes.cases
            ]
        finally:
            server.send_signal(signal.SIGTERM)


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Loads and answers."""
    output = trained(folder, sizes.table_rows)
    loads = {}
    for stored in STORED:
        path = folder / stored
        process.run("export", ["-m", "trainer", "export", output, path, "--rows", stored], os.environ)
        loads[stored] = measure_load(path, sizes.loads)
    return {**asdict(sizes), "load": loads, "answers": measure_server(folder / STORED[0], folder / "data", sizes)}


def tables_of(record: dict[str, Any]) -> str:
    """The record as tables."""
    loads = [
        [stored, f"{found['gib']:.3f}"]
        + [
            cell
            for how in ("mapped", "verified")
            for cell in (f"{found[f'{how}_seconds']['p50']:.2f}", f"{found[f'{how}_seconds_per_gib']:.2f}")
        ]
        for stored, found in record["load"].items()
    ]
    headers = ["rows stored as", "GiB", "load s", "s per GiB", "with checksums s", "s per GiB"]
    answers = [
        [
            *(found["clients"], found["rows"]),
            *(f"{found['ms'][q]:.2f}" for q in ("p50", "p90", "p99")),
            f"{found['rows_per_second']:,.0f}",
        ]
        for found in record["answers"]
    ]
    of_answers = ["clients", "rows a request", "p50 ms", "p90 ms", "p99 ms", "rows/s"]
    return "\n\n".join(
        tabulate(rows, names, tablefmt="github", disable_numparse=True, colalign=["right"] * len(names))
        for rows, names in ((loads, headers), (answers, of_answers))
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    arguments = parser.parse_args(argv)
    command = ["python", "-m", "benchmarks.serving", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=arguments.allow_dirty) | {"quick": arguments.quick}
    with tempfile.TemporaryDirectory() as folder:
        record |= measure(Path(folder), QUICK if arguments.quick else FULL)
    write(arguments.output, record)
    sys.stdout.write(tables_of(record) + "\n")


if __name__ == "__main__":
    main()
