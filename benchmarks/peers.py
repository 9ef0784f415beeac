"""Rows/s beside other trainers, on the same files in the same run, each candidate in turn and in a process of its own.

    rechub-trainer, rechub-parquet   torch-rechub's own trainer with its own loader: of data in memory, of Parquet files
    LIBRARY-adam, LIBRARY-adagrad    the bare step (data in memory) of torch-rechub, DeepCTR-Torch and FuxiCTR
    plain-adagrad                    the bare step of plain PyTorch, sparse Adagrad on one packed table
    shardrec-IDS-RANKSxTHREADS       ``python -m trainer train``, from Parquet files to updated tables, shuffled
    limits                           the floor that limits.py measures

For shardrec the first epoch warms up (all ids are new in it) and the last one is timed, as the run itself reports it.
All have two threads in all, and the settings of glibc's allocator with which the trainer starts itself
(trainer/environment.py), unless ``--default-allocator`` leaves the peers as their users have them. A ratio is the
median over turns, of times taken one after the other, so that other work on the machine meets both sides alike.

Not measured: evaluation, checkpoints, a cold page cache, time to start.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import peer_models, process
from benchmarks.record import RESULTS, ROOT, percentiles, provenance, write
from benchmarks.workload import Workload, describe, to_json, to_toml
from benchmarks.workload import write as write_files
from trainer.environment import ALLOCATOR

OURS = ("shardrec-exact-1x2", "shardrec-exact-2x1")
FIXED = ("shardrec-hashed-1x2", "shardrec-hashed-2x1", "shardrec-identity-1x2")
BARE = tuple(f"{library}-{kind}" for library in peer_models.DISTRIBUTIONS for kind in peer_models.OPTIMIZERS)
CANDIDATES = ("limits", "rechub-trainer", "rechub-parquet", *BARE, "plain-adagrad", *OURS, *FIXED)
THREADS = 2

Rates = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Requirement:
    """A ratio that issue 4 asks for: the fastest of ``ours`` to the fastest of ``theirs``."""

    what: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    must: float
    aim: float | None = None


REQUIREMENTS = (
    Requirement("torch-rechub's trainer and loader", OURS, ("rechub-trainer",), 5.0, 8.0),
    Requirement("fastest bare step of a peer", OURS, BARE, 3.0, 4.5),
    Requirement("plain PyTorch's bare step", OURS, ("plain-adagrad",), 1.7, 2.5),
    Requirement("floor of limits.py", OURS, ("limits",), 0.5, 0.8),
    Requirement("hashed tables of 1 M and 2 M rows to exact", FIXED[:2], OURS, 0.6),
    Requirement("two ranks to one, exact", OURS[1:], OURS[:1], 1.0),
    Requirement("exact to identity, one rank", OURS[:1], FIXED[2:], 0.9),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    workload: Workload
    batches: tuple[int, ...]
    """Rows of the batches that are measured."""

    warm_rows: int
    rows: int
    """Rows that a candidate other than shardrec is timed on."""

    turns: int


FULL = Sizes(Workload(), (4096, 16384), warm_rows=4 * 16384, rows=10 * 16384, turns=3)
QUICK = Sizes(
    Workload(data_rows=4096, row_group_rows=512, table_rows=4700, linear_rows=9400),
    (256,),
    warm_rows=512,
    rows=1024,
    turns=1,
)


def absent(candidate: str) -> str:
    """Why a candidate cannot be measured here; empty if it can."""
    library = candidate.partition("-")[0]
    if library in peer_models.DISTRIBUTIONS and not peer_models.version(library):
        return f"{peer_models.DISTRIBUTIONS[library]} is not installed"
    if library == "limits" and importlib.util.find_spec("benchmarks.limits") is None:
        return "benchmarks.limits does not exist"
    return ""


def measure(sizes: Sizes, files: Sequence[Path], candidates: Sequence[str], *, allocator: bool) -> list[dict[str, Any]]:
    """For each batch, the rates of each candidate and what they say about the requirements."""
    return [_measure_batch(sizes, files, candidates, batch, allocator=allocator) for batch in sizes.batches]


def _measure_batch(
    sizes: Sizes, files: Sequence[Path], candidates: Sequence[str], batch: int, *, allocator: bool
) -> dict[str, Any]:
    present = [candidate for candidate in candidates if not absent(candidate)]
    found: dict[str, list[dict[str, Any]]] = {candidate: [] for candidate in present}
    for turn in range(sizes.turns):
        for candidate in present:
            found[candidate].append(_take_turn(sizes, files, candidate, batch, allocator=allocator))
            rate = found[candidate][-1]["rows_per_second"]
            sys.stderr.write(f"batch {batch} turn {turn + 1}/{sizes.turns} {candidate}: {rate:,.0f} rows/s\n")
    rates = {candidate: [each["rows_per_second"] for each in found[candidate]] for candidate in present}
    return {
        "batch": batch,
        "rows_per_second": {candidate: percentiles(rates[candidate]) for candidate in present},
        "turns": found,
        "not_measured": {candidate: absent(candidate) for candidate in candidates if absent(candidate)},
        "requirements": judge(rates),
    }


def _take_turn(sizes: Sizes, files: Sequence[Path], candidate: str, batch: int, *, allocator: bool) -> dict[str, Any]:
    """One process, or one job; what it found."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        if candidate.startswith("shardrec"):
            return _train(Path(folder), sizes, files, candidate, batch, allocator=allocator)
        output = Path(folder) / "turn.json"
        words = ["--candidate", candidate, "--workload", to_json(sizes.workload), "--files", *files]
        words += ["--warm-batches", max(1, sizes.warm_rows // batch), "--batches", max(1, sizes.rows // batch)]
        command = ["-m", "benchmarks.peers_turn", *words, "--batch", batch, "--output", output]
        process.run(candidate, command, environment(THREADS, allocator=allocator))
        return json.loads(output.read_text(encoding="utf-8"))


def _train(
    folder: Path, sizes: Sizes, files: Sequence[Path], candidate: str, batch: int, *, allocator: bool
) -> dict[str, Any]:
    """Train two epochs; rows/s of both, the last one first."""
    _, ids, shape = candidate.split("-")
    ranks, threads = (int(number) for number in shape.split("x"))
    description = folder / "run.toml"
    plain = describe(sizes.workload, files, folder / "run", ids=ids, batch=batch, epochs=2)
    description.write_text(to_toml(plain), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m"] if ranks > 1 else []
    command = ["-m", *launcher, "trainer", "train", description]
    process.run(candidate, command, environment(threads, allocator=allocator))
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line) for line in lines)
    return {
        "rows_per_second": last["rows_per_second"],
        "first_epoch_rows_per_second": first["rows_per_second"],
        "loss": last["train_logloss_nats"],
    }


def environment(threads: int, *, allocator: bool) -> dict[str, str]:
    """The environment of every candidate, but for its threads."""
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    chosen = {"OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return kept | chosen | (ALLOCATOR if allocator else {})


def judge(rates: Rates) -> list[dict[str, Any]]:
    """Each requirement whose sides were both measured, with the ratio reached."""
    found = []
    for wanted in REQUIREMENTS:
        ours, theirs = _fastest(wanted.ours, rates), _fastest(wanted.theirs, rates)
        if ours and theirs:
            pairs = zip(rates[ours], rates[theirs], strict=True)
            ratio = round(statistics.median(mine / other for mine, other in pairs), 3)
            found.append(
                {"what": wanted.what, "ours": ours, "theirs": theirs, "ratio": ratio}
                | {"must": wanted.must, "aim": wanted.aim}
            )
    return found


def _fastest(candidates: Sequence[str], rates: Rates) -> str:
    """The one with the highest median; empty if none was measured."""
    measured = [candidate for candidate in candidates if rates.get(candidate)]
    return max(measured, key=lambda candidate: statistics.median(rates[candidate]), default="")


def tables_of(record: Mapping[str, Any]) -> str:
    """What a reader wants of the record, ratios first."""
    return "\n\n".join(f"Batch {found['batch']:,}:\n\n{_ratios(found)}\n\n{_rates(found)}" for found in record["peers"])


def _ratios(found: Mapping[str, Any]) -> str:
    headers = ["rows/s against", "ratio", "must", "aim", "reached", "ours", "theirs"]
    rows = [
        [
            each["what"],
            f"{each['ratio']:.2f}",
            each["must"],
            each["aim"] or "",
            _verdict(each),
            each["ours"],
            each["theirs"],
        ]
        for each in found["requirements"]
    ]
    align = ("left", "right", "right", "right", "left", "left", "left")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align if rows else None)


def _verdict(each: Mapping[str, Any]) -> str:
    if each["ratio"] < each["must"]:
        return "no"
    return "aim" if each["aim"] and each["ratio"] >= each["aim"] else "must"


def _rates(found: Mapping[str, Any]) -> str:
    headers = ["candidate", "rows/s p50", "p10", "p90", "turns"]
    rows = [
        [name, *(f"{rates[key]:,.0f}" for key in ("p50", "p10", "p90")), str(len(found["turns"][name]))]
        for name, rates in found["rows_per_second"].items()
    ]
    rows += [[name, why, "", "", ""] for name, why in found["not_measured"].items()]
    align = ("left", *["right"] * 4)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align if rows else None)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=CANDIDATES, metavar="CANDIDATE")
    parser.add_argument("--turns", type=int, help="how often each candidate is measured")
    parser.add_argument("--batch", type=int, nargs="+", help="rows of a batch")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave glibc as it is for the peers; the trainer always sets its own",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "benchmarks", help="gets the Parquet files")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    given = parser.parse_args(argv)
    sizes = QUICK if given.quick else FULL
    sizes = replace(sizes, turns=given.turns or sizes.turns, batches=tuple(given.batch or sizes.batches))
    command = ["python", "-m", "benchmarks.peers", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    record["peer_versions"] = {name: peer_models.version(key) for key, name in peer_models.DISTRIBUTIONS.items()}
    record["allocator"] = {} if given.default_allocator else ALLOCATOR
    files = write_files(given.data, sizes.workload)
    record["peers"] = measure(sizes, files, given.only, allocator=not given.default_allocator)
    write(given.output, record)
    sys.stdout.write(tables_of(record) + "\n")


if __name__ == "__main__":
    main()
