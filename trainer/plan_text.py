"""A plan for machines that are not here, as text for a terminal; ranks that are alike are one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

_GIB = 1 << 30
_MOST_LINES = 12
_SHOWN = (
    ("hbm_bytes", "HBM GiB"),
    ("host_bytes", "host GiB"),
    ("planner_hbm_bytes", "HBM GiB with batches"),
    ("planner_host_bytes", "host GiB with batches"),
    ("forward_compute_ms", "forward ms"),
    ("forward_comms_ms", "its comms"),
    ("backward_compute_ms", "backward ms"),
    ("backward_comms_ms", "its comms"),
    ("prefetch_ms", "prefetch"),
    ("total_ms", "total ms"),
)


def render(plan: Mapping[str, Any]) -> str:
    """What ``planning.plan`` found, for people."""
    machine = plan["machine"]
    parts = [
        f"{plan['nodes']} x {plan['ranks'] // plan['nodes']} ranks on {machine['about'] or machine['device']}; for "
        f"tables, a rank has {_offers(plan)}",
        *(f"note: {note}" for note in plan["notes"]),
    ]
    if not plan["fits"]:
        return "\n".join([*parts, f"does not fit: {plan['reason']}"])
    worst = plan["bottleneck"]
    share = worst["part_ms"] / worst["total_ms"] if worst["total_ms"] else 0.0
    tables = ", ".join(worst["tables"])
    return "\n".join(
        [
            *parts,
            "",
            _tables(plan["tables"]),
            "",
            _ranks(plan["ranks_in_detail"]),
            "",
            f"bottleneck: rank {worst['rank']}, {worst['total_ms']:.4f} ms a step for its tables, of which "
            f"{worst['part'].replace('_', ' ')} {worst['part_ms']:.4f} ms ({share:.0%}), most of it for {tables}",
            "fits",
            *_growth(plan["growth"]),
        ]
    )


def _offers(plan: Mapping[str, Any]) -> str:
    hbm, host = plan["hbm_bytes_offered"], plan["host_bytes_offered"]
    return (f"{hbm / _GIB:.1f} GiB of HBM and " if hbm else "") + f"{host / _GIB:.1f} GiB of its host"


def _tables(tables: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            " + ".join(table["tables"]),
            f"{table['rows']:,}",
            table["dim"],
            table["sharding"],
            table["kernel"],
            f"{table['shards']} of {table['shard_sizes'][0][0]:,} x {table['shard_sizes'][0][1]}",
            spans(table["ranks"]),
            f"{table['bytes'] / _GIB:,.3f}",
        ]
        for table in tables
    ]
    headers = ["table", "rows", "dim", "sharding", "kernel", "shards", "ranks", "GiB"]
    return str(tabulate(lines, headers=headers, disable_numparse=True))


def spans(numbers: Sequence[int]) -> str:
    """Ranks in short.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in found)


def _ranks(ranks: Sequence[Mapping[str, float]]) -> str:
    """Lines of ranks that read alike; where these are many, those of the most time, and the rest in one."""
    shown = [(key, title) for key, title in _SHOWN if any(rank[key] for rank in ranks)]
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank in ranks:
        line = tuple(_cell(key, rank[key]) for key, _ in shown)
        groups.setdefault(line, []).append(int(rank["rank"]))
    lines = sorted(groups.items(), key=lambda item: (-float(item[0][-1]) if item[0] else 0.0, item[1]))
    rows = [[spans(members), *cells] for cells, members in lines[:_MOST_LINES]]
    text = str(tabulate(rows, headers=["ranks", *(title for _, title in shown)], disable_numparse=True))
    rest = sum(len(members) for _, members in lines[_MOST_LINES:])
    return text + (f"\n{rest} other ranks take less time; --json has them" if rest else "")


def _cell(key: str, value: float) -> str:
    return f"{value / _GIB:.3f}" if key.endswith("bytes") else f"{value:.4f}"


def _growth(growth: Sequence[Mapping[str, Any]]) -> list[str]:
    if not growth:
        return ["no table may grow"]
    found = []
    for entry in growth:
        names = ", ".join(entry["tables"])
        fits = ", ".join(f"{rows:,}" for rows in entry["fits_rows"])
        together = "all together: " if len(entry["tables"]) > 1 else ""
        line = f"{together}{names}: fits at {fits} rows"
        if entry["fails_rows"] is None:
            line += ", the most that it may have"
        else:
            line += f", no longer at {', '.join(f'{rows:,}' for rows in entry['fails_rows'])}"
        if entry["grows_live_to_rows"] is not None:
            line += f"; grows while training to {entry['grows_live_to_rows']:,} (old and new table are then both there)"
        found.append(line)
    return found
