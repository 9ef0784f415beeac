"""Rows and gradients rounded on their way between two ranks: to what they should be, and alike on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.distributed.training import saved_table
from tests.small_data import SPARSE, run_plain, write_click_log

SHARDINGS = ("table_wise", "row_wise", "column_wise", "table_row_wise")
NUMBERS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = 211  # of no world size a multiple
KEY = "embedding.embedding.weight"


def described(click_log: Path, sharding: str, number: str, output: str = "", steps: int = 3) -> dict[str, Any]:
    shared = {"features": list(SPARSE), "rows": ROWS, "optimizer": {"kind": "sgd", "lr": 30.0}}
    return run_plain(
        click_log,
        output=str(click_log / (output or f"{sharding}-{number}")),
        max_steps=steps,
        tables=[
            {"name": "embedding", "dim": 15, "sharding": [sharding], **shared},
            {"name": "fc", "role": "linear", "dim": 1, "sharding": [sharding], **shared},
        ],
        sharding={"quantized_communication": number},
        report={"diagnostics": sharding == "row_wise"},
    )


def train_and_listen(plains: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each run what this rank's first lookup returned, and the embedding table at the end."""
    from trainer import loop
    from trainer.checkpoint import newest_good
    from trainer.config import RunConfig
    from trainer.description import build
    from trainer.run import open_inputs, start
    from trainer.sharding import quiet_libraries
    from trainer.world import join_world

    quiet_libraries()
    found = []
    with join_world(standalone=False) as world:
        for plain in plains:
            run, seen = start(open_inputs(build(RunConfig, plain), world), world), []
            run.state.task.head.register_forward_pre_hook(
                lambda head, inputs, seen=seen: seen.append(values(inputs[0]))
            )
            loop.train(run)
            path, manifest = newest_good(run.checkpoints, world)
            found.append((seen[0], saved_table(path, manifest, KEY)))
    return found


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("click_log")
    write_click_log(directory)
    return directory


def values(looked_up: dict[str, Any]) -> np.ndarray:
    """All rows of all collections, by name of their key, as one array."""
    parts = [collection[key].detach() for collection in looked_up.values() for key in sorted(collection.keys())]
    return torch.cat([part.reshape(-1) for part in parts]).numpy()


@pytest.fixture(scope="module")
def outcomes(click_log: Path) -> dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]]:
    """By sharding type and number, what each rank found."""
    cases = [(sharding, number) for sharding in SHARDINGS for number in NUMBERS]
    runs = [described(click_log, *case) for case in cases]
    runs += [described(click_log, "row_wise", "fp16", "parts", steps) for steps in (1, 3)]
    by_rank = run_ranks(train_and_listen, 2, runs, timeout=250)
    names = [*cases, ("row_wise", "first part"), ("row_wise", "both parts")]
    return {name: [found[place] for found in by_rank] for place, name in enumerate(names)}


def rounded(exact: np.ndarray, number: str) -> Tensor:
    return torch.from_numpy(exact).to(NUMBERS[number]).float()


@pytest.mark.parametrize("number", ["fp16", "bf16"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_arrive_rounded_once_on_both_ranks(outcomes: Any, sharding: str, number: str) -> None:
    """Rows before the first step are functions of their ids, so those that come unrounded are the exact ones."""
    for (exact, _), (arrived, _) in zip(outcomes[sharding, "none"], outcomes[sharding, number], strict=True):
        assert len(np.unique(exact)) > 500
        assert not np.array_equal(arrived, exact)
        torch.testing.assert_close(torch.from_numpy(arrived), rounded(exact, number), rtol=0, atol=0)


@pytest.mark.parametrize(("number", "bits"), [("fp16", 11), ("bf16", 8)])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_tables_are_trained_to_the_precision_of_what_is_sent(
    outcomes: Any, sharding: str, number: str, bits: int
) -> None:
    (_, exact), (_, other) = outcomes[sharding, "none"][0], outcomes[sharding, number][0]
    first = outcomes[sharding, number][1][1]
    assert np.array_equal(first, other)
    change = np.abs(exact).max()
    assert change > 0.05
    assert 0 < np.abs(other - exact).max() <= 4 * 2.0**-bits * change


def test_a_run_resumes_bitwise(outcomes: Any) -> None:
    whole, first, both = (outcomes["row_wise", name][0][1] for name in ("fp16", "first part", "both parts"))
    assert np.array_equal(both, whole)
    assert not np.array_equal(first, whole)


def test_diagnostics_take_no_rounding_for_a_change_of_the_rows(outcomes: Any, click_log: Path) -> None:
    first = {
        number: json.loads((click_log / f"row_wise-{number}" / "metrics.jsonl").read_text().splitlines()[0])
        for number in NUMBERS
    }
    assert first["none"][f"diagnostics/table_step_ratio/{KEY}"] > 0
    for number in ("fp16", "bf16"):
        assert f"diagnostics/table_step_ratio/{KEY}" not in first[number]
        for name in ("rows_read", "gradient_norm", "row_norm"):
            key = f"diagnostics/table_{name}/{KEY}"
            assert first[number][key] == pytest.approx(first["none"][key], rel=0.05)
