"""What each part of the interaction model did in a segment: gradients, weights, changes and units that never fire.

Only looks: nothing here is part of a step, so that training with and without is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

from models import CTRModel

PREFIX = "diagnostics"
_COLUMNS = ("gradient_norm", "weight_norm", "update_ratio")


def parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters of each part of a model: of its modules, of lists of modules each member, of its own by name.

    >>> parts = parts_of(nn.ModuleDict({"mlp": nn.Linear(3, 2), "experts": nn.ModuleList([nn.Linear(2, 1)] * 1)}))
    >>> {name: len(weights) for name, weights in parts.items()}
    {'mlp': 2, 'experts.0': 2}
    """
    parts: dict[str, list[Tensor]] = {}
    for name, child in model.named_children():
        members = child.named_children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else [("", child)]
        for number, member in members:
            parts[f"{name}.{number}" if number else name] = list(member.parameters())
    parts |= {name: [weight] for name, weight in model.named_parameters(recurse=False)}
    return {name: weights for name, weights in parts.items() if weights}


class Diagnostics:
    """Watches one interaction model, segment by segment."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parts = model, parts_of(model)
        self._inputs: tuple[Tensor, ...] = ()
        """What the model was given in the last step."""
        model.register_forward_pre_hook(self._keep_inputs)
        self._before: dict[str, list[Tensor]] = {}
        self._outputs: dict[str, Tensor] = {}
        """What the ReLUs gave in the last step, by name."""
        self._activations = {name: module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
        for name, module in self._activations.items():
            module.register_forward_hook(self._remember(name))

    def start(self) -> None:
        """Begin a segment."""
        self._outputs, self._inputs = {}, ()
        self._before = {name: [weight.detach().clone() for weight in part] for name, part in self._parts.items()}

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What the segment that ends here was like; after its last step, with nothing in flight. Collective.

        Per part ``gradient_norm``, of the last step's gradient over the global batch, clipped if it was; 0 where there
        is none; ``weight_norm``; ``update_ratio``, the norm of the segment's change over that of the weights before it
        (left out where that is 0). Per ReLU ``dead_units``: the share of units that are 0 on all rows of the last
        global batch. Per term of the logit ``share``: of the mean absolute values of all terms on these rows.
        """
        found: dict[str, float] = {}
        for name, part in self._parts.items():
            before = self._before[name]
            changes = [weight - old for weight, old in zip(part, before, strict=True)]
            found[f"{PREFIX}/gradient_norm/{name}"] = _norm([w.grad for w in part if w.grad is not None])
            found[f"{PREFIX}/weight_norm/{name}"] = _norm(part)
            if norm := _norm(before):
                found[f"{PREFIX}/update_ratio/{name}"] = _norm(changes) / norm
        found |= {f"{PREFIX}/dead_units/{name}": share for name, share in self._dead_units()}
        return found | {f"{PREFIX}/share/{name}": share for name, share in self._shares()}

    def _shares(self) -> Iterator[tuple[str, float]]:
        """With the weights at the end of the segment and as in scoring, without dropout; none of a single term."""
        if not isinstance(self._model, CTRModel) or len(self._inputs) != 3:  # sequences, which no sum is made of
            return
        self._model.eval()
        terms = self._model.terms(*self._inputs)
        self._model.train()
        if len(terms) == 1:
            return
        sums_T = torch.stack([term.double().abs().sum() for term in terms.values()])
        if dist.is_initialized():
            dist.all_reduce(sums_T)
        total = float(sums_T.sum())
        for name, value in zip(terms, sums_T.tolist(), strict=True):
            yield name, value / total if total else 0.0

    def _dead_units(self) -> Iterator[tuple[str, float]]:
        """Every rank has the same names: all run the same model, also on no rows."""
        for name, out in self._outputs.items():
            alive_H = (out.flatten(0, -2) > 0).sum(dim=0)
            if dist.is_initialized():
                dist.all_reduce(alive_H)
            yield name, float((alive_H == 0).double().mean())

    def _keep_inputs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self._inputs = tuple(tensor.detach() for tensor in inputs)

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training:
                self._outputs[name] = output.detach()

        return hook


def without_gradient(values: Mapping[str, float]) -> list[str]:
    """The parts that got no gradient in the segment's last step."""
    start = f"{PREFIX}/gradient_norm/"
    return [name.removeprefix(start) for name, norm in values.items() if name.startswith(start) and norm == 0]


def table_of(values: Mapping[str, float]) -> str:
    """The numbers of a segment as text: a row for each part, a line for each layer with dead units, one of terms."""
    found: dict[str, dict[str, float]] = {}
    dead, shares = [], []
    for key, value in values.items():
        if key.startswith(f"{PREFIX}/"):
            _, column, name = key.split("/", 2)
            if column == "dead_units":
                dead += [f"{name}: {value:.1%} of its units are dead"] if value else []
            elif column == "share":
                shares.append(f"{name} {value:.1%}")
            else:
                found.setdefault(name, {})[column] = value
    rows = [[name, *(_written(row.get(column)) for column in _COLUMNS)] for name, row in found.items()]
    headers = ["part", *(column.replace("_", " ") for column in _COLUMNS)]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
    return "\n".join([str(table), *dead, *([f"of the logit: {', '.join(shares)}"] if shares else [])])


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them together, added up in float64."""
    return float(sum(float(tensor.detach().double().square().sum()) for tensor in tensors)) ** 0.5
