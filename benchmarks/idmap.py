"""How fast is the map from ids to slots, beside other ways to have one? One core; prints a table and writes a record.

Times are of the thread's own processor time, so that other work on the machine distorts them little. Maps are built by
calls of BATCH new ids, several times over; a call's time is the median over the repeats, for it does the same work in
each, and the pause is what the slowest call takes longer than the median one. It is to be compared with copying the
bytes of the map once.

Not measured: ids that arrive in sorted or skewed order (skewed ones are faster: caches), more than one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.record import RESULTS, percentiles, provenance, write
from trainer.idmap import IdMap, deduplicate

Ids = NDArray[np.int64]
BATCH = 8192  # new ids in a call
LOOK_UPS = 1 << 17  # known ids in a call
NUM_LOOK_UPS = 32


class Candidate(Protocol):
    """A way to have a map: ``assign`` gives new ids the next slots, ``find`` returns slots of known ids."""

    def assign(self, ids: Ids) -> object: ...

    def find(self, ids: Ids) -> NDArray[np.integer]: ...


class Ours:
    """trainer.idmap: open addressing, compiled by numba."""

    def __init__(self) -> None:
        self._map = IdMap()
        self.assign, self.find = self._map.assign, self._map.find


class PythonDict:
    """A dict, filled and asked in list comprehensions."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}

    def assign(self, ids: Ids) -> object:
        slots = self._slots
        return [slots.setdefault(id_, len(slots)) for id_ in ids.tolist()]

    def find(self, ids: Ids) -> NDArray[np.integer]:
        return np.array([self._slots.get(id_, -1) for id_ in ids.tolist()])


class SortedNumpy:
    """Sorted ids with their slots beside them: binary search to find, a merge to add."""

    def __init__(self) -> None:
        self._ids, self._slots = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)

    def assign(self, ids: Ids) -> object:
        places = np.searchsorted(self._ids, ids)
        known = self._ids[np.minimum(places, len(self._ids) - 1)] == ids if len(self._ids) else np.zeros(len(ids), bool)
        new = np.unique(ids[~known])
        at = np.searchsorted(self._ids, new)
        self._slots = np.insert(self._slots, at, np.arange(len(self._ids), len(self._ids) + len(new)))
        self._ids = np.insert(self._ids, at, new)
        return None

    def find(self, ids: Ids) -> NDArray[np.integer]:
        return self._slots[np.searchsorted(self._ids, ids)]


class Pandas:
    """pandas' hash table (khash) through its internal class, which can add no batch at an offset: only one by one."""

    def __init__(self) -> None:
        from pandas._libs import hashtable

        self._table = hashtable.Int64HashTable()

    def assign(self, ids: Ids) -> object:
        for id_ in ids[self._table.lookup(ids) < 0].tolist():
            self._table.set_item(id_, len(self._table))
        return None

    def find(self, ids: Ids) -> NDArray[np.integer]:
        return self._table.lookup(ids)


class Hirola:
    """hirola, a hash table in C for numpy; resized by doubling, which moves all at once."""

    def __init__(self) -> None:
        import hirola

        self._table = hirola.HashTable(1024, np.int64)

    def assign(self, ids: Ids) -> object:
        if self._table.length + len(ids) > 0.7 * self._table.max:
            self._table = self._table.resize(2 * self._table.max + len(ids))
        return self._table.add(ids)

    def find(self, ids: Ids) -> NDArray[np.integer]:
        return self._table.get(ids)


class Arrow:
    """pyarrow.compute.index_in, which hashes all known ids again in each call."""

    def __init__(self) -> None:
        import pyarrow

        self._pyarrow = pyarrow
        self._ids = np.zeros(0, dtype=np.int64)

    def assign(self, ids: Ids) -> object:
        new = ids[self.find(ids) < 0]
        self._ids = np.concatenate([self._ids, deduplicate(new).ids])
        return None

    def find(self, ids: Ids) -> NDArray[np.integer]:
        import pyarrow.compute as compute

        slots = compute.index_in(self._pyarrow.array(ids), value_set=self._pyarrow.array(self._ids))
        return slots.fill_null(-1).to_numpy(zero_copy_only=False)


# (name, what makes one, package it needs, most ids for which it ends in reasonable time)
CANDIDATES: tuple[tuple[str, Callable[[], Candidate], str, int], ...] = (
    ("shardrec", Ours, "numba", 1 << 31),
    ("hirola", Hirola, "hirola", 20_000_000),
    ("pandas khash", Pandas, "pandas", 2_000_000),
    ("dict", PythonDict, "numpy", 2_000_000),
    ("numpy sorted", SortedNumpy, "numpy", 2_000_000),
    ("pyarrow index_in", Arrow, "pyarrow", 200_000),
)


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time that some work takes this thread."""
    started = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - started) / 1e6


def memory_of(make: Callable[[], Candidate], ids: Ids) -> int:
    """Bytes that a built map holds, as Python, numpy and khash report them."""
    tracemalloc.start()
    built = make()
    for first in range(0, len(ids), BATCH):
        built.assign(ids[first : first + BATCH])
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return num_bytes


def measure(make: Callable[[], Candidate], num_ids: int, repeats: int) -> dict[str, Any]:
    """Build, ask and weigh one map of ``num_ids`` random ids."""
    random = np.random.default_rng(1)
    ids = random.integers(-(1 << 63), (1 << 63) - 1, num_ids, dtype=np.int64)
    built = make()
    built.assign(ids[:BATCH])  # compiles and loads libraries
    built.find(ids[:BATCH])
    batches = [ids[first : first + BATCH] for first in range(0, num_ids, BATCH)]
    calls = []
    for _ in range(repeats):
        built = make()
        calls.append([milliseconds(partial(built.assign, batch)) for batch in batches])
    call_ms = np.median(np.array(calls), axis=0)
    rates = []
    for _ in range(NUM_LOOK_UPS):
        wanted = ids[random.integers(0, num_ids, LOOK_UPS)]
        rates.append(LOOK_UPS / milliseconds(partial(built.find, wanted)) * 1e3)
    del built
    num_bytes = memory_of(make, ids)
    whole = np.ones(num_bytes // 8, dtype=np.int64)
    copy_ms = np.array([milliseconds(whole.copy) for _ in range(9)])
    return {
        "num_ids": num_ids,
        "known_ids_per_second": percentiles(rates),
        "new_ids_per_second": float(f"{num_ids / call_ms.sum() * 1e3:.4g}"),
        "call_of_new_ids_ms": percentiles(call_ms),
        "slowest_call_ms": round(float(call_ms.max()), 3),
        "growth_pause_ms": round(float(call_ms.max() - np.median(call_ms)), 3),
        "copy_ms": percentiles(copy_ms),
        "bytes_per_id": round(num_bytes / num_ids, 2),
    }


def measure_deduplication(repeats: int) -> list[dict[str, Any]]:
    """Distinct ids of a batch of 4096 rows and 47 features, by us and by numpy."""
    random = np.random.default_rng(2)
    skewed, records = random.zipf(1.2, 4096 * 47).astype(np.int64), []
    ways: tuple[tuple[str, Callable[[], object]], ...] = (
        ("deduplicate", lambda: deduplicate(skewed)),
        ("numpy.unique", lambda: np.unique(skewed, return_inverse=True, return_counts=True)),
    )
    for name, work in ways:
        work()
        rates = [len(skewed) / milliseconds(work) * 1e3 for _ in range(5 * repeats)]
        records.append({"candidate": name, "ids_per_second": percentiles(rates)})
    return records


def table_of(records: list[dict[str, Any]]) -> str:
    """What a reader wants of the records."""
    headers = ["candidate", "ids", "known M/s", "new M/s", "bytes/id", "pause ms", "copy ms p50", "p90"]
    rows = [
        [
            record["candidate"],
            f"{record['num_ids']:,}",
            f"{record['known_ids_per_second']['p50'] / 1e6:.1f}",
            f"{record['new_ids_per_second'] / 1e6:.1f}",
            f"{record['bytes_per_id']:.1f}",
            f"{record['growth_pause_ms']:.2f}",
            f"{record['copy_ms']['p50']:.2f}",
            f"{record['copy_ms']['p90']:.2f}",
        ]
        for record in records
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 7))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="ids of the maps"
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often each map is built")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in CANDIDATES], help="not all candidates")
    parser.add_argument("--output", type=Path, default=RESULTS / "idmap.json")
    parser.add_argument("--allow-dirty", action="store_true", help="write although the tree differs from its commit")
    arguments = parser.parse_args(argv)
    command = ["python", "-m", "benchmarks.idmap", *(sys.argv[1:] if argv is None else argv)]
    record = provenance(command, allow_dirty=arguments.allow_dirty) | {"repeats": arguments.repeats, "batch": BATCH}
    record["maps"] = []
    for size in arguments.sizes:
        for name, make, package, most in CANDIDATES:
            wanted = arguments.only is None or name in arguments.only
            if wanted and size <= most and importlib.util.find_spec(package):
                record["maps"].append({"candidate": name, **measure(make, size, arguments.repeats)})
                sys.stderr.write(f"{name}, {size:,} ids: done\n")
    record["deduplication"] = measure_deduplication(arguments.repeats)
    sys.stdout.write(table_of(record["maps"]) + "\n")
    for way in record["deduplication"]:
        sys.stdout.write(f"{way['candidate']}: {way['ids_per_second']['p50'] / 1e6:.1f} M ids/s\n")
    write(arguments.output, record)


if __name__ == "__main__":
    main()
