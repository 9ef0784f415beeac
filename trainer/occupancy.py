"""How full the tables are and what happened in them, as numbers for metrics.jsonl and lines for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.growth import Growth
from trainer.state import TrainState


@dataclass(slots=True)
class Growths:
    """The growth of tables within a segment."""

    events: list[Growth] = field(default_factory=list)

    def add(self, growth: Growth) -> None:
        """One more."""
        self.events.append(growth)

    def values(self) -> dict[str, float]:
        """Per id space that grew: times, milliseconds and bytes copied."""
        found: dict[str, float] = {}
        for event in self.events:
            for name, value in (
                ("growths", 1.0),
                ("growth_ms", event.seconds * 1e3),
                ("growth_bytes", event.copied_bytes),
            ):
                found[f"{name}/{event.space}"] = found.get(f"{name}/{event.space}", 0.0) + value
        return found


def describe_growth(growth: Growth) -> str:
    """One line about a growth."""
    moved = f"; moved by the planner: {', '.join(growth.moved)}" if growth.moved else ""
    return (
        f"grew {growth.space}: {growth.rows_before:,} -> {growth.rows_after:,} rows, "
        f"{growth.copied_bytes / (1 << 20):.1f} MiB copied in {growth.seconds * 1e3:.1f} ms{moved}"
    )


def table_values(state: TrainState) -> dict[str, float]:
    """Per id space that may grow: rows in use, capacity, load, and counts since the last report. Collective.

    Per id space of a ``max_length``: what that left out since then.
    """
    in_use, events = state.rows_in_use(), state.take_events()
    values: dict[str, float] = {}
    for name, live in state.spaces.items():
        if live.space.kind == "hashed":
            continue
        values[f"rows_in_use/{name}"] = float(in_use[name])
        values[f"capacity/{name}"] = float(live.space.capacity)
        values[f"load/{name}"] = in_use[name] / live.space.capacity
    for name, happened in events.items():
        values |= {
            f"new_ids/{name}": float(happened.new),
            f"evicted/{name}": float(happened.evicted),
            f"expired/{name}": float(happened.expired),
            f"not_admitted/{name}": float(happened.not_admitted),
        }
        vocabulary = state.spaces[name].vocabulary
        if vocabulary is not None:
            values[f"map_probes/{name}"] = vocabulary.ids.statistics().mean_probes
    for name, cut in state.take_cut().items():
        values |= {f"cut_ids/{name}": float(cut.ids), f"cut_lists/{name}": float(cut.lists)}
    return values
