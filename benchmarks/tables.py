"""The tables of README.md, made from the records in results/; ``python -m benchmarks.tables`` puts them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import (
    accuracy,
    idmap,
    limits,
    multitask,
    peers,
    planning,
    reading,
    scaling,
    sequences,
    serving,
    stall,
    throughput,
)
from benchmarks.record import RESULTS, ROOT

README = ROOT / "benchmarks" / "README.md"
_BEGIN, _END = "<!-- made by python -m benchmarks.tables -->\n", "<!-- end -->\n"


def growth(record: dict[str, Any]) -> str:
    """The record of growth.py."""
    parts: dict[str, Callable[[Any], str]] = {"pause": _pause, "map": _map, "exact": _exact}
    found = [parts[part](record[part]) for part in parts if part in record]
    return "\n\n".join([_origin(record), *found])


def identity_map(record: dict[str, Any]) -> str:
    """The record of idmap.py."""
    return f"{_origin(record)}\n\n{idmap.table_of(record['maps'])}"


def checkpoints(record: dict[str, Any]) -> str:
    """The record of checkpoints.py."""
    headers = ["ids", "ranks", "what", "MiB", "GB/s", "plain GB/s", "ratio", "peak / tables", "more MiB"]
    whats = {"save": "save", "load_cold": "load, cold cache", "load_warm": "load, warm cache"}
    rows = [
        [
            found["kind"],
            found["ranks"],
            what,
            f"{found['files_mib']:,.0f}",
            f"{found[key]['gb_per_second']['p50']:.2f}",
            f"{found[key]['plain_gb_per_second']['p50']:.2f}",
            f"{found[key]['ratio']:.2f}",
            f"{found[key[:4] + '_peak']:.2f}",
            f"{found[key[:4] + '_more_mib']:.0f}",
        ]
        for found in record["checkpoints"]
        for key, what in whats.items()
    ]
    return f"{_origin(record)}\n\n{_table(headers, rows)}"


def larger(record: dict[str, Any]) -> str:
    """The record of scaling.py and its picture, which lies beside it."""
    picture = f"![Rows/s as one thing at a time grows](results/{record['picture']})"
    return f"{_origin(record)}\n\n{picture}\n\n{scaling.tables_of(record)}"


def below_origin(tables_of: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """What makes of a record where it is from, and below that what ``tables_of``, the program's own, makes of it."""
    return lambda record: f"{_origin(record)}\n\n{tables_of(record)}"


def rendered(results: Path) -> str:
    """All records that there are, each under its file's name."""
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy": below_origin(accuracy.table_of),
        "checkpoints": checkpoints,
        "growth": growth,
        "idmap": identity_map,
        "limits": below_origin(limits.table_of),
        "multitask": below_origin(multitask.table_of),
        "peers": below_origin(peers.tables_of),
        "planning": below_origin(planning.tables_of),
        "reading": below_origin(reading.tables_of),
        "scaling": larger,
        "sequences": below_origin(sequences.table_of),
        "serving": below_origin(serving.tables_of),
        "stall": below_origin(stall.table_of),
        "throughput": below_origin(throughput.tables_of),
    }
    # A record is named after its program, and what it is of where one run did not measure everything.
    records = [(path.stem.partition("_")[0], path) for path in sorted(results.glob("*.json"))]
    known = [(program, path) for program, path in records if program in makers]
    texts = [f"### {path.stem}\n\n{makers[program](json.loads(path.read_text('utf-8')))}\n" for program, path in known]
    return "\n".join(texts)


def with_tables(text: str, results: Path) -> str:
    """The README with the tables of ``results`` in their place."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{rendered(results)}\n{_END}{rest.split(_END)[1]}"


def _origin(record: dict[str, Any]) -> str:
    dirty = ", with changes not committed" if record["dirty"] else ""
    cores = f", {record['cores']} cores, {record['memory_gib']} GiB" if "cores" in record else ""
    load = f", load average {record['load_average'][0]:.1f} at the start" if "load_average" in record else ""
    quick = " Small sizes: this measures nothing." if record.get("quick") else ""
    return f"{record['date']}, commit {record['commit']}{dirty}, {record['device']}{cores}{load}.{quick}"


def _pause(records: Sequence[dict[str, Any]]) -> str:
    headers = ["sharding", "ranks", "rows", "copied MiB", "growth ms", "memcpy ms", "growth / memcpy", "restart ms"]
    rows = [
        [
            record["sharding"],
            record["ranks"],
            f"{record['rows_before']:,} -> {2 * record['rows_before']:,}",
            f"{record['copied_mib']:.1f}",
            f"{record['growth_ms']['p50']:.0f}",
            f"{record['copy_ms']['p50']:.0f}",
            f"{record['growth_to_copy']:.2f}",
            f"{record['restart_ms']['p50']:.0f}",
        ]
        for record in records
    ]
    return _table(headers, rows)


def _map(records: Sequence[dict[str, Any]]) -> str:
    return idmap.table_of(list(records))


def _exact(record: dict[str, Any]) -> str:
    headers = ["ids", "rows/s", "slower %", "first epoch", "second epoch", "fastest run", "CPU us/row", "more CPU %"]
    rows = [
        [
            variant,
            f"{found['all']['rows_per_second']['p50']:,.0f}",
            *(f"{found[part]['slower_percent']:.1f}" for part in ("all", "epoch_1", "epoch_2")),
            f"{found['all']['fastest_slower_percent']:.1f}",
            f"{found['cpu_us_per_row']['p50']:.0f}",
            f"{found['more_cpu_percent']:.1f}",
        ]
        for variant, found in record["variants"].items()
    ]
    mapping = "; ".join(
        f"{kind}: {found['epoch_1']:.2f} ms per batch while ids are new, {found['epoch_2']:.2f} ms after"
        for kind, found in record["mapping_ms_per_batch"].items()
    )
    what = (
        f"{record['rows_per_epoch']:,} rows with {record['fields']} fields and {record['distinct_ids']:,} ids, "
        f"{record['epochs']} epochs, {record['repeats']} runs of each."
    )
    return f"{_table(headers, rows)}\n\n{what} The mapping thread and new rows by themselves: {mapping}."


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def main() -> None:
    """Put the tables of all records into README.md."""
    README.write_text(with_tables(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
