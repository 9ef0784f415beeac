"""A model of the reference names in torch alone, events that it can score, and runs to import it into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from tests.command_line import Outcome, call
from tests.small_data import run_toml

FIELDS = ["f0", "f1", "f2", "f3", "f4"]
ROWS, DIM, EVENTS = 1000, 15, 640
BEGIN = 1_700_000_000
EMBEDDING, LINEAR = "embedding.embedding.weight", "linear.fc.weight"

State = dict[str, Tensor]


class Plain(nn.Module):
    """DeepFM in torch alone, under the reference names."""

    def __init__(self, rows: int = ROWS, linear_rows: int = ROWS, dim: int = DIM) -> None:
        super().__init__()
        self.linear = nn.Module()
        self.linear.bias = nn.Parameter(torch.randn(1))
        self.linear.fc = nn.Embedding(linear_rows, 1)
        self.mlp = nn.Module()
        self.mlp.mlp = nn.Sequential(
            nn.Linear(len(FIELDS) * dim, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )
        self.embedding = nn.Module()
        self.embedding.embedding = nn.Embedding(rows, dim)

    def forward(self, ids_BF: Tensor) -> Tensor:
        """Logits [B]."""
        v_BFD = self.embedding.embedding(ids_BF)
        pairs_B = 0.5 * (v_BFD.sum(1).square() - v_BFD.square().sum(1)).sum(1)
        first_B = self.linear.bias + self.linear.fc(ids_BF).flatten(1).sum(1)
        return first_B + pairs_B + self.mlp.mlp(v_BFD.flatten(1)).squeeze(1)


def plain_model(**sizes: int) -> Plain:
    torch.manual_seed(5)
    model = Plain(**sizes)
    for table in (model.embedding.embedding, model.linear.fc):
        nn.init.normal_(table.weight, std=0.2)
    return model


def write_events(folder: Path, highest: int = ROWS) -> None:
    """A click log of identity ids with a clock."""
    for seed, split in enumerate(("train", "validation", "test")):
        generator = np.random.default_rng(seed)
        columns: dict[str, Any] = {name: generator.integers(0, highest, EVENTS) for name in FIELDS}
        columns["f0"][-1] = highest - 1
        columns |= {"click": generator.integers(0, 2, EVENTS), "time": BEGIN + np.arange(EVENTS)}
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / split / "part.parquet", row_group_size=200)


def description(events: Path, folder: Path, *, model: dict[str, Any] | None = None, **table: Any) -> Path:
    """A run description of the events, written to and putting its output in ``folder``."""
    shared = {"features": FIELDS, "ids": "identity", "rows": ROWS, "optimizer": {"kind": "adagrad", "lr": 0.1}, **table}
    data = {split: [f"{events}/{split}/*.parquet"] for split in ("train", "validation", "test")}
    return run_toml(
        folder,
        output=str(folder / "run"),
        data={**data, "dense": [], "transforms": [], "user": "", "timestamp": "time", "epochs": 1},
        tables=[
            {"name": "embedding", "dim": DIM, **shared},
            {"name": "fc", "role": "linear", "dim": 1, **shared},
        ],
        model=model or {"kind": "deepfm", "hidden": [64, 32]},
    )


def imported(state: State, config: Path, *options: str) -> Outcome:
    """The import of a state dict into the run of a description."""
    path = config.parent / "model.pt"
    torch.save(state, path)
    return call("import", path, "--config", config, *options)


def done(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.errors
    return outcome.output


def exported(folder: Path) -> State:
    """The state dict of the run in a folder, as torch alone reads it."""
    done(call("export-state-dict", folder / "run", folder / "out.pt"))
    found: State = torch.load(folder / "out.pt", weights_only=True)
    return found
