"""The workload's DeepFM as other libraries build it, and as plain PyTorch does; data in memory, one step at a time.

Each is given what favours it: a table per field instead of a shared one (gradients are as large as the tables), batches
in its own form before the clock starts, no L2, no clipping, no metrics. They differ from the workload where their
library leaves no choice: torch-rechub takes the first-order term from the embeddings by one linear layer, and has batch
normalization in its MLP.

FuxiCTR's wheel has the layers of its DeepFM, but not the ten lines that join them; those are as in its model zoo. Its
layers import what it prepares data with (polars, ray, h5py), which is not used here: where those are not installed,
empty modules stand in for them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workload import LABEL, Workload

DISTRIBUTIONS = {"rechub": "torch-rechub", "deepctr": "deepctr-torch", "fuxictr": "fuxictr"}
"""Name of the installed package, by the first word of a candidate's name."""

OPTIMIZERS = {"adam": (torch.optim.Adam, 1e-3), "adagrad": (torch.optim.Adagrad, 0.02)}
_MODULES_OF_PREPARATION = ("polars", "h5py", "ray", "ray.data", "ray.data.datasource.filename_provider")


@dataclass(frozen=True, slots=True)
class Bare:
    """A model with its optimizer, stepped by hand."""

    model: nn.Module
    prepare: Callable[[Tensor, Tensor], Any]
    """int64 [batch, fields] places within the fields' ranges and float32 [batch] labels to the model's own batch."""

    step: Callable[[Any], Tensor]
    """Forward, backward and update; the loss."""


def version(library: str) -> str:
    """Version of an installed peer, empty if it is not there."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS[library])
    except importlib.metadata.PackageNotFoundError:
        return ""


def _stepper(optimizers: list[torch.optim.Optimizer], loss_of: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def step(batch: Any) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss

    return step


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    kind, lr = OPTIMIZERS[name]
    return kind(model.parameters(), lr=lr)


def plain(workload: Workload, optimizer: str = "adagrad") -> Bare:
    """Plain PyTorch: one table of rows that hold embedding and first-order weight, sparse gradients and updates."""
    width = workload.dim + 1
    table = nn.Embedding(workload.table_rows, width, sparse=True)
    nn.init.uniform_(table.weight, -0.01, 0.01)
    sizes = (workload.fields * workload.dim, *workload.hidden)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    kind, lr = OPTIMIZERS[optimizer]
    begins = torch.arange(workload.fields) * workload.span

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        rows_BFP = table(batch[0])
        embeddings_BFD, first_BF = rows_BFP[..., :-1], rows_BFP[..., -1]
        squares_BD = embeddings_BFD.sum(1).square() - embeddings_BFD.square().sum(1)
        logits_B = mlp(embeddings_BFD.flatten(1)).squeeze(1) + 0.5 * squares_BD.sum(1) + first_BF.sum(1)
        return functional.binary_cross_entropy_with_logits(logits_B, batch[1])

    optimizers = [kind(table.parameters(), lr=lr), _optimizer(mlp, "adam")]
    model = nn.ModuleDict({"table": table, "mlp": mlp})
    return Bare(model, lambda ids, labels: (ids + begins, labels), _stepper(optimizers, loss_of))


def _by_name(workload: Workload, ids: Tensor) -> dict[str, Tensor]:
    return {name: ids[:, field].contiguous() for field, name in enumerate(workload.names)}


def rechub_model(workload: Workload) -> nn.Module:
    """torch-rechub's DeepFM."""
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking import DeepFM

    features = [SparseFeature(name, vocab_size=workload.span, embed_dim=workload.dim) for name in workload.names]
    return DeepFM(features, features, {"dims": list(workload.hidden), "dropout": 0.0, "activation": "relu"})


def rechub(workload: Workload, optimizer: str) -> Bare:
    """torch-rechub's DeepFM, stepped by hand."""
    model = rechub_model(workload)

    def loss_of(batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return functional.binary_cross_entropy(model(batch[0]), batch[1])

    step = _stepper([_optimizer(model, optimizer)], loss_of)
    return Bare(model, lambda ids, labels: (_by_name(workload, ids), labels), step)


def rechub_trainer(workload: Workload) -> Callable[[Any], float]:
    """One epoch of torch-rechub's own trainer with Adam; takes a loader, gives the mean loss."""
    from torch_rechub.trainers import CTRTrainer

    return CTRTrainer(rechub_model(workload), optimizer_params={"lr": OPTIMIZERS["adam"][1]}).train_one_epoch


def rechub_loader(workload: Workload, ids: NDArray[np.int64], labels: NDArray[np.float32], batch: int) -> Any:
    """torch-rechub's own loader of data in memory, as its ``DataGenerator`` makes it; shuffled."""
    from torch_rechub.utils.data import DataGenerator

    columns = {name: np.ascontiguousarray(ids[:, field]) for field, name in enumerate(workload.names)}
    few = {name: column[:1] for name, column in columns.items()}
    loaders = DataGenerator(columns, labels).generate_dataloader(few, labels[:1], few, labels[:1], batch_size=batch)
    return loaders[0]


def rechub_parquet(workload: Workload, files: list[Path], batch: int, batches: int) -> Iterator[Any]:
    """torch-rechub's streaming reader of Parquet files, not shuffled, made into what its trainer takes.

    The files have the row numbers of one shared table, so each field's first one is taken off.
    """
    from torch.utils.data import DataLoader
    from torch_rechub.data.dataset import ParquetIterableDataset

    dataset = ParquetIterableDataset(files, columns=[*workload.names, LABEL], batch_size=batch)
    for columns in islice(DataLoader(dataset, batch_size=None), batches):
        label = columns.pop(LABEL)
        yield {name: columns[name] - field * workload.span for field, name in enumerate(workload.names)}, label


def deepctr(workload: Workload, optimizer: str) -> Bare:
    """DeepCTR-Torch's DeepFM; takes its ids as float32, as its ``fit`` gives them."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM

    deep, linear = (
        [SparseFeat(name, rows // workload.fields, embedding_dim=workload.dim) for name in workload.names]
        for rows in (workload.table_rows, workload.linear_rows)
    )
    model = DeepFM(linear, deep, dnn_hidden_units=workload.hidden, l2_reg_linear=0, l2_reg_embedding=0)
    model.train()

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.binary_cross_entropy(model(batch[0]).squeeze(1), batch[1])

    step = _stepper([_optimizer(model, optimizer)], loss_of)
    return Bare(model, lambda ids, labels: (ids.float(), labels), step)


def fuxictr(workload: Workload, optimizer: str) -> Bare:
    """FuxiCTR's DeepFM."""
    with _stand_ins(_MODULES_OF_PREPARATION):
        from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, LogisticRegression, MLP_Block
        from fuxictr.pytorch.models import BaseModel

    features, linear = (_fuxictr_features(workload, rows) for rows in (workload.table_rows, workload.linear_rows))

    class DeepFM(BaseModel):
        def __init__(self) -> None:
            super().__init__(features, verbose=0, model_root=tempfile.gettempdir(), metrics=[])
            self.embedding_layer = FeatureEmbedding(features, workload.dim)
            self.fm = FactorizationMachine(features)
            self.fm.lr_layer = LogisticRegression(linear)
            self.mlp = MLP_Block(workload.fields * workload.dim, hidden_units=list(workload.hidden), output_dim=1)
            self.compile(*_NAMES_OF_FUXICTR[optimizer])

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            ids = self.get_inputs(inputs)
            embeddings = self.embedding_layer(ids)
            logits = self.fm(ids, embeddings) + self.mlp(embeddings.flatten(start_dim=1))
            return {"y_pred": self.output_activation(logits)}

    model = DeepFM()
    model.reset_parameters()

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return model.compute_loss(model(batch), model.get_labels(batch))

    step = _stepper([model.optimizer], loss_of)
    return Bare(model, lambda ids, labels: {**_by_name(workload, ids), LABEL: labels}, step)


_NAMES_OF_FUXICTR = {
    "adam": ("adam", "binary_crossentropy", OPTIMIZERS["adam"][1]),
    "adagrad": ("Adagrad", "binary_crossentropy", OPTIMIZERS["adagrad"][1]),
}


def _fuxictr_features(workload: Workload, rows: int) -> Any:
    from fuxictr.features import FeatureMap

    found = FeatureMap("workload", tempfile.gettempdir())
    spec = {"type": "categorical", "source": "", "vocab_size": rows // workload.fields}
    found.features = OrderedDict((name, dict(spec)) for name in workload.names)
    found.labels, found.num_fields = [LABEL], workload.fields
    found.set_column_index()
    return found


class _Empty(ModuleType):
    """A module in which every name is a class of its own that does nothing."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 (what makes it a package; nothing adds to it)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules in the place of those that are not installed, for as long as others are imported."""
    roots = {name.partition(".")[0] for name in names} - set(sys.modules)
    absent = {root for root in roots if importlib.util.find_spec(root) is None}
    added = {name: _Empty(name) for name in names if name.partition(".")[0] in absent}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


BARE = {"plain": plain, "rechub": rechub, "deepctr": deepctr, "fuxictr": fuxictr}
"""Makers of models that are stepped by hand, by the first word of a candidate's name."""
