"""What serving costs: how long an export takes to load, and how long its server takes to answer.

Trains DeepFM for two steps on made data and exports it. Copies of the export with larger tables are loaded in processes
of their own, from disk and from the page cache. The export's server is asked over loopback, from threads of this
process that each keep a connection: client and server share the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
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
from trainer.artifact import MANIFEST, checksum_of

STORED = ("float32", "float16", "int8")
_LOAD = """
import json, os, sys, time
from pathlib import Path
begun = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import torch
from artifact import load
from scorer import Scorer
imported = time.perf_counter()
scorer = Scorer(load(Path(sys.argv[1]), verify=sys.argv[2] == "verified"))
loaded = time.perf_counter()
rows = scorer.read(json.loads(Path(sys.argv[3]).read_text())["rows"])
asked = time.perf_counter()
scorer.score(rows)
found = [imported - begun, loaded - imported, time.perf_counter() - asked]
Path(sys.argv[4]).write_text(json.dumps(found))
"""
_PARTS = ("import", "load", "first_answer")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rows: int
    """Of the tables that are trained, 15 wide and 1 wide, and served."""

    loaded: tuple[tuple[str, int], ...]
    """How rows are stored, and how many there are, of each copy that is loaded."""

    loads: int
    """How often each is; with checksums once."""

    cases: tuple[tuple[int, int], ...]
    """Clients, and rows of a request."""

    requests: int
    """Of each client."""


MILLION = 1_000_000
FULL = Sizes(
    rows=MILLION,
    loaded=(
        *(("float32", rows) for rows in (4 * MILLION, 16 * MILLION, 64 * MILLION)),
        *((stored, 16 * MILLION) for stored in STORED[1:]),
    ),
    loads=3,
    cases=((1, 1), (8, 1), (1, 64), (8, 64)),
    requests=500,
)
QUICK = Sizes(
    rows=2_000,
    loaded=(("float32", 4_000), ("float32", 9_000), ("int8", 9_000)),
    loads=1,
    cases=((2, 3),),
    requests=5,
)


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


def enlarged(path: Path, out: Path, rows: int) -> Path:
    """A copy of an export of hashed ids whose tables have so many rows: those that it has, over and over."""
    shutil.copytree(path, out)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for space in manifest["spaces"].values():
        space |= {"num_ids": rows, "buckets": rows}
    for file in (name for table in manifest["tables"] for name in (table["file"], table["scales"]) if name):
        old = np.load(path / file)
        new = np.lib.format.open_memmap(out / file, "w+", old.dtype, (rows + 1, old.shape[1]))
        for at in range(0, len(new), len(old)):
            new[at : at + len(old)] = old[: len(new) - at]
        new.flush()
    manifest["files"] = {name: _sealed(out / name) for name in manifest["files"]}
    manifest.pop("checksum")
    (out / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum_of(manifest)}), encoding="utf-8")
    return out


def _sealed(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def forget(path: Path) -> None:
    """Let the system's page cache go of the files in a folder."""
    for file in path.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(path: Path) -> None:
    """Read the files in a folder, so that they are in the page cache."""
    for file in path.iterdir():
        with file.open("rb", buffering=0) as content:
            while content.read(1 << 24):
                pass


def measure_load(path: Path, times: int, request: bytes) -> dict[str, Any]:
    """Seconds to load an export: its files on disk, or in the page cache, or there and with every checksum compared.

    And to answer the first request, which brings the rows that it reads into memory.
    """
    size = sum(file.stat().st_size for file in path.iterdir()) / (1 << 30)
    found: dict[str, Any] = {"gib": float(f"{size:.4g}")}
    asked, answer = path.parent / "request.json", path.parent / "seconds.json"
    asked.write_bytes(request)
    for how in ("cold", "warm", "verified"):
        seconds: list[list[float]] = []
        for _ in range(1 if how == "verified" else times):
            if how == "cold":
                forget(path)
            elif not seconds:
                remember(path)
            process.run("load", ["-c", _LOAD, path, how, asked, answer], os.environ)
            seconds.append(json.loads(answer.read_text(encoding="utf-8")))
        parts = zip(_PARTS, np.transpose(seconds), strict=True)
        found[how] = {f"{part}_seconds": percentiles(each) for part, each in parts}
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
    output, data = trained(folder, sizes.rows), folder / "data"
    for stored in STORED:
        process.run("export", ["-m", "trainer", "export", output, folder / stored, "--rows", stored], os.environ)
    request = requests_of(data, folder / STORED[0], 64)[0]
    loads = []
    for stored, rows in sizes.loaded:
        path = enlarged(folder / stored, folder / "enlarged", rows)
        loads.append({"stored": stored, "rows": rows} | measure_load(path, sizes.loads, request))
        shutil.rmtree(path)
    found = {"loads": loads, "answers": measure_server(folder / STORED[0], data, sizes)}
    return {**asdict(sizes), **found, "load_average_at_the_end": [round(load, 2) for load in os.getloadavg()]}


def seconds_per_gib(loads: Sequence[dict[str, Any]], how: str) -> float:
    """The slope of a line through the times to load; of float32 rows."""
    chosen = [load for load in loads if load["stored"] == STORED[0]]
    times = [load[how]["load_seconds"]["p50"] for load in chosen]
    return float(np.polyfit([load["gib"] for load in chosen], times, 1)[0])


def tables_of(record: dict[str, Any]) -> str:
    """The record as tables."""
    ways = ("cold", "warm", "verified")
    loads = [
        [load["stored"], f"{load['rows']:,}", f"{load['gib']:.2f}"]
        + [f"{load[how]['load_seconds']['p50']:.3f}" for how in ways]
        + [f"{1000 * load[how]['first_answer_seconds']['p50']:.0f}" for how in ways[:2]]
        for load in record["loads"]
    ]
    slopes = ", ".join(f"{how} {seconds_per_gib(record['loads'], how):.3f}" for how in ways)
    imports = np.median([load["warm"]["import_seconds"]["p50"] for load in record["loads"]])
    text = (
        f"Seconds a GiB of float32 rows, by a line through the sizes: {slopes}. Importing torch and the export's code "
        f"takes {imports:.1f} s before that. {record['requests']} requests of each client."
    )
    headers = ["stored as", "rows", "GiB", "load s, cold", "warm", "with checksums", "first answer ms, cold", "warm"]
    answers = [
        [
            *(found["clients"], found["rows"]),
            *(f"{found['ms'][q]:.2f}" for q in ("p50", "p90", "p99")),
            f"{found['rows_per_second']:,.0f}",
        ]
        for found in record["answers"]
    ]
    of_answers = ["clients", "rows a request", "p50 ms", "p90 ms", "p99 ms", "rows/s"]
    tables = [
        tabulate(rows, names, tablefmt="github", disable_numparse=True, colalign=["right"] * len(names))
        for rows, names in ((loads, headers), (answers, of_answers))
    ]
    return f"{tables[0]}\n\n{text}\n\n{tables[1]}"


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
