"""Rows/s, start-up and memory of ``python -m trainer train``, on ranks and threads of all kinds, as a user starts it.

Trains the workload that trainers are compared on, or any run description (``--run RUN.toml``), in turns: all cases,
then all again, so that other work on the machine meets them alike. A ratio is the median over turns of two cases of the
same turn. throughput_turn.py says what the numbers are.

``--against RECORD`` compares what was just measured with an earlier record of the same hardware and workload, and exits
with 1 if anything is slower by more than the noise of both: the ranges from p10 to p90 do not overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.peers import FULL, QUICK
from benchmarks.record import RESULTS, ROOT, percentiles, provenance, write
from benchmarks.throughput_turn import Case, bound_mib, take
from benchmarks.workload import Workload, describe, to_toml
from benchmarks.workload import write as write_files
from trainer.config import to_plain
from trainer.description import load
from trainer.errors import UserError

IDS = ("exact", "identity", "hashed")
DESCRIBED = "described"
EPOCHS = 2
START_SECONDS, HELP_SECONDS = 12.0, 0.5
"""The most that issue 4 allows from the command to the end of the first step, and for ``--help``."""

NUMBERS = ("rows_per_second", "start_seconds", "peak_mib")
FEWEST_TURNS = 3
"""With fewer, p10 and p90 say nothing of the noise."""

Turn = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """What is trained: the workload with its files, or the run description at a path."""

    workload: Workload
    files: tuple[Path, ...] = ()
    run: Path | None = None
    overrides: tuple[str, ...] = ()
    """As ``--set`` of the trainer takes them."""

    def described(self, case: Case, folder: Path) -> Path:
        """The run description of a case."""
        if self.run is not None:
            return self.run
        path = folder / "run.toml"
        plain = describe(self.workload, self.files, folder, ids=case.ids, batch=case.batch, epochs=EPOCHS)
        path.write_text(to_toml(plain), encoding="utf-8")
        return path

    def plain(self) -> dict[str, Any]:
        """What records that are compared must have in common: all but batch and output."""
        if self.run is None:
            found = {**asdict(self.workload), "epochs": EPOCHS, "set": list(self.overrides)}
        else:
            found = to_plain(load(self.run, self.overrides))
            del found["output"], found["data"]["global_batch_size"]
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain


def measure(source: Source, cases: Sequence[Case], turns: int) -> dict[str, Any]:
    """All numbers of a record."""
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    help_seconds: list[float] = []
    for turn in range(turns):
        help_seconds.append(_time_help())
        for case in cases:
            with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
                seen = take(case, source.described(case, Path(folder)), source.overrides, Path(folder))
            found[case].append(seen)
            said = f"{seen['rows_per_second']:,.0f} rows/s, {seen['start_seconds']:.1f} s, {seen['peak_mib']:,.0f} MiB"
            sys.stderr.write(f"turn {turn + 1}/{turns} {case.name}: {said}\n")
    return {
        "workload": source.plain(),
        "help_seconds": percentiles(help_seconds),
        "turns": turns,
        "ratios": ratios(found),
        "cases": [_summary(case, found[case]) for case in cases],
    }


def _time_help() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "trainer", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _summary(case: Case, turns: Sequence[Turn]) -> dict[str, Any]:
    needed: Mapping[str, float] = turns[-1]["needed_mib"]
    return {
        **asdict(case),
        **{number: percentiles([turn[number] for turn in turns]) for number in NUMBERS},
        "needed_mib": {kind: round(size, 2) for kind, size in needed.items()},
        "bound_mib": round(bound_mib(needed, case.ranks), 1),
        "seen": [{number: turn[number] for number in NUMBERS} for turn in turns],
    }


def ratios(found: Mapping[Case, Sequence[Turn]]) -> list[dict[str, Any]]:
    """Rows/s of each layout to the first one, and of each batch to the first one, all else being equal."""
    whats: tuple[Callable[[Case], str], ...] = (lambda case: case.shape, lambda case: f"batch {case.batch:,}")
    firsts: dict[tuple[object, ...], Case] = {}
    compared: list[tuple[int, str, Case, Case]] = []
    for case in found:
        for order, (what, same) in enumerate(zip(whats, (case.batch, case.shape), strict=True)):
            first = firsts.setdefault((order, case.ids, same), case)
            if first is not case:
                compared.append((order, f"{what(case)} to {what(first)}", case, first))
    return [
        {
            **{"what": what, "ids": case.ids, "at": f"batch {case.batch:,}" if order == 0 else case.shape},
            "ratio": round(_neighbours(found[case], found[first]), 3),
        }
        for order, what, case, first in sorted(compared, key=lambda each: each[0])
    ]


def _neighbours(ours: Sequence[Turn], theirs: Sequence[Turn]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(one["rows_per_second"] / other["rows_per_second"] for one, other in pairs)


def tables_of(record: Mapping[str, Any]) -> str:
    """What a reader wants of the record, ratios first."""
    found = record["throughput"]
    return "\n\n".join(part for part in (_ratios(found), _cases(found), _words(found)) if part)


def _ratios(found: Mapping[str, Any]) -> str:
    rows = [[each["what"], each["ids"], each["at"], f"{each['ratio']:.2f}"] for each in found["ratios"]]
    headers = ["rows/s", "ids", "at", "ratio"]
    align = ("left", "left", "left", "right")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align) if rows else ""


def _cases(found: Mapping[str, Any]) -> str:
    headers = ["ids", "batch", "ranks x threads", "rows/s p50", "p10", "p90", "start-up s", "peak / bound", "peak MiB"]
    rows = [
        [
            each["ids"],
            f"{each['batch']:,}",
            _case_of(each).shape,
            *(f"{each['rows_per_second'][key]:,.0f}" for key in ("p50", "p10", "p90")),
            f"{each['start_seconds']['p50']:.1f}",
            f"{each['peak_mib']['p50'] / each['bound_mib']:.2f}",
            f"{each['peak_mib']['p50']:,.0f}",
        ]
        for each in found["cases"]
    ]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _words(found: Mapping[str, Any]) -> str:
    seconds = found["help_seconds"]
    return (
        f"Medians; turns: {found['turns']}. Start-up may take {START_SECONDS:.0f} s, and `python -m trainer --help` "
        f"{HELP_SECONDS} s: it took {seconds['p50']:.2f} s ({seconds['p10']:.2f} to {seconds['p90']:.2f})."
    )


def _case_of(each: Mapping[str, Any]) -> Case:
    return Case(**{name: each[name] for name in Case.__slots__})


@dataclass(frozen=True, slots=True)
class Change:
    """One number of one case, now and before."""

    case: str
    what: str
    now: Mapping[str, float]
    before: Mapping[str, float]
    higher_is_better: bool
    is_noise_known: bool

    @property
    def slower_percent(self) -> float:
        """How much more time it takes now; below zero if it takes less.

        >>> Change("a", "rows/s", {"p50": 80.0}, {"p50": 100.0}, True, True).slower_percent
        25.0
        """
        times = (
            (self.before["p50"], self.now["p50"]) if self.higher_is_better else (self.now["p50"], self.before["p50"])
        )
        return 100 * (times[0] / times[1] - 1)

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` outside of the noise of both records; else why neither."""
        if not self.is_noise_known:
            return f"fewer than {FEWEST_TURNS} turns"
        if self.now["p10"] <= self.before["p90"] and self.before["p10"] <= self.now["p90"]:
            return "within noise"
        return "slower" if self.slower_percent > 0 else "faster"


def read_record(path: Path) -> dict[str, Any]:
    """A record that this program wrote.

    Raises:
        SystemExit: there is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}; name a record of throughput.py") from error
    if "throughput" not in found:
        raise SystemExit(f"{path} is a record of another program; name one of throughput.py")
    return found


def refuse_other(
    now: Mapping[str, Any], workload: Mapping[str, Any], cases: Sequence[Case], before: Mapping[str, Any], path: Path
) -> None:
    """Refuse to compare with a record of another machine, of another workload, or of other cases only.

    Raises:
        SystemExit: what differs.
    """
    for key in ("device", "cores", "memory_gib"):
        if now[key] != before[key]:
            theirs = f"{path} is of other hardware: {key} {before[key]}, here {now[key]}"
            raise SystemExit(f"{theirs}; compare records of one machine")
    theirs = before["throughput"]["workload"]
    different = sorted(key for key in {*workload, *theirs} if workload.get(key) != theirs.get(key))
    if different:
        raise SystemExit(f"{path} is of another workload: {', '.join(different)} differ; measure the same one")
    known = [_case_of(each) for each in before["throughput"]["cases"]]
    if not set(known) & set(cases):
        names = ", ".join(case.name for case in known)
        raise SystemExit(f"{path} has none of these cases; it has {names}")


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Change]:
    """All times and rates that two records have both. ``now`` and ``before`` are what ``measure`` returned."""
    known = min(now["turns"], before["turns"]) >= FEWEST_TURNS
    found = [Change("", "--help", now["help_seconds"], before["help_seconds"], False, known)]
    theirs = {_case_of(each): each for each in before["cases"]}
    for each in now["cases"]:
        case = _case_of(each)
        for key, what in (("rows_per_second", "rows/s"), ("start_seconds", "start-up")):
            if case in theirs:
                better = key == "rows_per_second"
                found.append(Change(case.name, what, each[key], theirs[case][key], better, known))
    return found


def table_of(changes: Sequence[Change]) -> str:
    """How much slower everything is."""
    headers = ["case", "what", "slower %", "now", "before", "verdict"]
    rows = [
        [each.case, each.what, f"{each.slower_percent:+.1f}", _span(each.now), _span(each.before), each.verdict]
        for each in changes
    ]
    align = ("left", "left", "right", "right", "right", "left")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _span(values: Mapping[str, float]) -> str:
    digits = 0 if values["p50"] >= 1000 else 2
    return " ".join(f"{values[key]:,.{digits}f}" for key in ("p10", "p50", "p90"))


def parse_layout(text: str) -> tuple[int, int]:
    """Ranks and threads of each.

    >>> parse_layout("2x1")
    (2, 1)
    """
    ranks, _, threads = text.partition("x")
    if not (ranks.isdecimal() and threads.isdecimal() and int(ranks) and int(threads)):
        raise argparse.ArgumentTypeError(f"{text!r} is not RANKSxTHREADS; write it like 2x1")
    return int(ranks), int(threads)


def cases_of(given: argparse.Namespace, source: Source) -> list[Case]:
    """All cases that were asked for, layouts innermost."""
    cores = len(os.sched_getaffinity(0))
    layouts = given.ranks or [(1, cores), (cores, 1)]
    if source.run is not None:
        kinds = [DESCRIBED]
        batches = given.batch or [load(source.run, source.overrides).data.global_batch_size]
    else:
        kinds = given.ids or list(IDS)
        batches = given.batch or list((QUICK if given.quick else FULL).batches)
    made = product(kinds, batches, layouts)
    return list(dict.fromkeys(Case(ids, batch, ranks, threads, given.torchx) for ids, batch, (ranks, threads) in made))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--run", type=Path, metavar="RUN.toml", help="train this instead of the workload")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as the trainer's --set")
    found.add_argument("--ids", nargs="+", choices=IDS, help="of the workload's tables (default: all)")
    found.add_argument("--batch", nargs="+", type=int, help="rows of the global batch")
    found.add_argument("--ranks", nargs="+", type=parse_layout, metavar="RANKSxTHREADS", help="such as 1x2 2x1")
    found.add_argument("--turns", type=int, help="how often each case is measured")
    found.add_argument("--torchx", action="store_true", help="start it with torchx run -s local_cwd")
    found.add_argument("--against", type=Path, metavar="RECORD", help="exit with 1 if this is slower than that record")
    found.add_argument("--quick", action="store_true", help="small sizes: shows that it works, measures nothing")
    found.add_argument("--data", type=Path, default=ROOT / "data" / "benchmarks", help="gets the Parquet files")
    found.add_argument("--output", type=Path, default=RESULTS / "throughput.json")
    found.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write, compare."""
    given = parser().parse_args(argv)
    if given.run and given.ids:
        parser().error("--ids are those of the workload; with --run, write --set=tables[0].ids=exact and the like")
    sizes = QUICK if given.quick else FULL
    source = Source(sizes.workload, run=given.run and given.run.resolve(), overrides=tuple(given.set))
    command = ["python", "-m", "benchmarks.throughput", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=given.allow_dirty) | {"quick": given.quick}
    try:
        cases, workload = cases_of(given, source), source.plain()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    before = read_record(given.against) if given.against else None
    if before:
        refuse_other(record, workload, cases, before, given.against)
    if source.run is None:
        source = replace(source, files=tuple(write_files(given.data, sizes.workload)))
    record["throughput"] = measure(source, cases, given.turns or sizes.turns)
    write(given.output, record)
    sys.stdout.write(tables_of(record) + "\n")
    if before:
        changes = compare(record["throughput"], before["throughput"])
        sys.stdout.write(f"\n{table_of(changes)}\n")
        raise SystemExit(int(any(change.verdict == "slower" for change in changes)))


if __name__ == "__main__":
    main()
