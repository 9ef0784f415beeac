"""What plain PyTorch makes of a Frappe run description: the same model and recipe without any of the trainer.

Tables as ``nn.Embedding``, torch.optim.Adam, L2 over whole tables as a term of the loss, batches by
``torch.randperm``, AUC and log loss by scikit-learn. Knows of the trainer its run descriptions and nothing more.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import models


class Plain(nn.Module):
    """Tables and interaction model; C columns of ids."""

    def __init__(self, run: dict[str, Any]) -> None:
        super().__init__()
        options = dict(run["model"])
        self.tables, self.columns = nn.ModuleDict(), columns_of(run)
        self.features: dict[str, dict[str, list[str]]] = {"embedding": {}, "linear": {}}  # by role, then by table
        for table in run["tables"]:
            embedding = nn.Embedding(table["rows"], table["dim"])
            nn.init.normal_(embedding.weight, std=table["init"]["scale"])
            self.tables[table["name"]] = embedding
            self.features[table.get("role", "embedding")][table["name"]] = table["features"]
        fields, linear = (
            [models.Field(name, feature) for name, features in of_role.items() for feature in features]
            for of_role in self.features.values()
        )
        self.model = models.build(
            options.pop("kind"),
            num_dense=0,
            num_fields=len(fields),
            dim=max(table["dim"] for table in run["tables"]),
            fields=fields,
            linear_fields=linear,
            **options,
        )

    def forward(self, ids_BC: Tensor) -> Tensor:
        """Logits, [B]."""
        embeddings_BFD, linear_BFD = (self._look_up(role, ids_BC) for role in self.features)
        logits_B: Tensor = self.model(torch.empty(len(ids_BC), 0), embeddings_BFD, linear_BFD.flatten(1))
        return logits_B

    def _look_up(self, role: str, ids_BC: Tensor) -> Tensor:
        """All tables of a role, [B, F, D]."""
        places = {
            name: [self.columns.index(feature) for feature in features]
            for name, features in self.features[role].items()
        }
        found = [self.tables[name](ids_BC[:, columns]) for name, columns in places.items()]
        return torch.cat(found, dim=1) if found else torch.empty(len(ids_BC), 0, 0)


def columns_of(run: dict[str, Any]) -> list[str]:
    """All features, each once."""
    return list(dict.fromkeys(feature for table in run["tables"] for feature in table["features"]))


def read(run: dict[str, Any], split: str) -> tuple[Tensor, Tensor]:
    """Ids [rows, F] and labels [rows]."""
    (pattern,) = run["data"][split]
    table = pq.read_table(sorted(Path().glob(pattern)))
    ids = torch.stack([torch.from_numpy(table[name].to_numpy()).long() for name in columns_of(run)], dim=1)
    return ids, torch.from_numpy(table[run["data"]["labels"][0]].to_numpy()).float()


def train(path: Path, seed: int) -> dict[str, float]:
    """Train by the run description at ``path``; the test metrics of the best epoch by validation AUC."""
    run = tomllib.loads(path.read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    return fit(run, Plain(run), lambda _, num_rows: torch.randperm(num_rows).split(run["data"]["global_batch_size"]))


def fit(run: dict[str, Any], model: Plain, order: Callable[[int, int], Iterable[Tensor]]) -> dict[str, float]:
    """Train a model; ``order(epoch, num_rows)`` are the rows of each of the epoch's steps, [b]."""
    splits = {split: read(run, split) for split in ("train", "validation", "test")}
    lr, l2 = run["dense_optimizer"]["lr"], {t["optimizer"]["weight_decay"] for t in run["tables"]}.pop()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    num_rows, max_grad_norm = len(splits["train"][1]), run["dense_optimizer"]["max_grad_norm"]
    best, without, epochs, kept = -1.0, 0, 0, model.state_dict()
    while without < run["evaluation"]["patience"] and epochs < run["data"]["epochs"]:
        _epoch(model, optimizer, splits["train"], order(epochs, num_rows), l2, max_grad_norm)
        epochs += 1
        auc = score(model, *splits["validation"])["auc"]
        if auc > best + 1e-6:
            best, without = auc, 0
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            continue
        without += 1
        for group in optimizer.param_groups:
            group["lr"] *= run["evaluation"]["reduce_rates"]
    model.load_state_dict(kept)
    return score(model, *splits["test"]) | {"validation_auc": best, "epochs": epochs}


def _epoch(
    model: Plain,
    optimizer: torch.optim.Optimizer,
    rows: tuple[Tensor, Tensor],
    order: Iterable[Tensor],
    l2: float,
    max_grad_norm: float,
) -> None:
    ids, labels = rows
    model.train()
    for batch in order:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(ids[batch]), labels[batch])
        squares = torch.stack([weight.square().sum() for weight in model.tables.parameters()]).sum()
        (loss + 0.5 * l2 * squares).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()


@torch.no_grad()
def score(model: Plain, ids: Tensor, labels: Tensor) -> dict[str, float]:
    """AUC and log loss in nats."""
    model.eval()
    logits = torch.cat([model(batch) for batch in ids.split(1 << 14)]).double()
    return {
        "auc": float(roc_auc_score(labels.numpy(), logits.numpy())),
        "logloss_nats": float(log_loss(labels.numpy(), logits.sigmoid().numpy())),
    }
