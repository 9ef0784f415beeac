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
from trainer.state import TrainState
from trainer.table_diagnostics import PREFIX, TABLE_COLUMNS, TableDiagnostics

_COLUMNS = ("gradient_norm", "weight_norm", "update_ratio")


def parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters of each part of a model: of its modules, of lists of modules each member, of its own by name.

    A member that has lists of its own, such as a level of experts, is taken apart as the model is.

    >>> parts = parts_of(nn.ModuleDict({"mlp": nn.Linear(3, 2), "experts": nn.ModuleList([nn.Linear(2, 1)] * 1)}))
    >>> {name: len(weights) for name, weights in parts.items()}
    {'mlp': 2, 'experts.0': 2}
    """
    parts: dict[str, list[Tensor]] = {}
    for name, child in model.named_children():
        members = child.named_children() if _is_list(child) else [("", child)]
        for number, member in members:
            part = f"{name}.{number}" if number else name
            if number and any(map(_is_list, (member, *member.children()))):
                parts |= {f"{part}.{inner}": weights for inner, weights in parts_of(member).items()}
            else:
                parts[part] = list(member.parameters())
    parts |= {name: [weight] for name, weight in model.named_parameters(recurse=False)}
    return {name: weights for name, weights in parts.items() if weights}


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


class Diagnostics:
    """Watches one interaction model, and its tables if they are given, segment by segment."""

    def __init__(self, model: nn.Module, tables: TableDiagnostics | None = None) -> None:
        self._model, self._parts, self._tables = model, parts_of(model), tables
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
        if self._tables is not None:
            self._tables.start()
        self._outputs, self._inputs = {}, ()
        for name, part in self._parts.items():
            if name not in self._before:
                self._before[name] = [torch.empty_like(weight, requires_grad=False) for weight in part]
            torch._foreach_copy_(self._before[name], [weight.detach() for weight in part])

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """What the segment that ends here was like; once, after its last step, with nothing in flight. Collective.

        Per part ``gradient_norm``, of the last step's gradient over the global batch, clipped if it was; 0 where there
        is none; ``weight_norm``; ``update_ratio``, the norm of the segment's change over that of the weights before it
        (left out where that is 0). Per ReLU ``dead_units``: the share of units that are 0 on all rows of the last
        global batch; units of other activations are not lost so: the learned slope of PReLU and the curves of Dice,
        GELU and SiLU let a gradient through where ReLU has none. Per term of the logit ``share``: of the mean absolute
        values of all terms on these rows. For those of tables see ``TableDiagnostics``.
        """
        found = self._norms()
        found |= {f"{PREFIX}/dead_units/{name}": share for name, share in self._dead_units()}
        found |= {f"{PREFIX}/share/{name}": share for name, share in self._shares()}
        return found | (self._tables.values() if self._tables is not None else {})

    def _norms(self) -> dict[str, float]:
        """What is asked of each part; what was kept of the weights before the segment is used up."""
        norms: list[Tensor] = []
        for name, part in self._parts.items():
            before = self._before[name]
            gradients = [weight.new_zeros(()) if weight.grad is None else weight.grad for weight in part]
            norms += [_norm(gradients), _norm(part), _norm(before)]
            torch._foreach_sub_(before, part)
            norms.append(_norm(before))
        numbers = iter(torch.stack(norms).tolist())  # at once, as each time a GPU would be waited for
        found: dict[str, float] = {}
        for name, gradient, weight, before_it, change in zip(self._parts, *[numbers] * 4, strict=True):
            found[f"{PREFIX}/gradient_norm/{name}"], found[f"{PREFIX}/weight_norm/{name}"] = gradient, weight
            if before_it:
                found[f"{PREFIX}/update_ratio/{name}"] = change / before_it
        return found

    def _shares(self) -> Iterator[tuple[str, float]]:
        """With the weights at the end of the segment and as in scoring, without dropout; none of a single term."""
        if not isinstance(self._model, CTRModel) or not self._inputs:
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
        if module.training and len(inputs) == 3:  # else there are sequences, which no model makes a sum of
            self._inputs = tuple(tensor.detach() for tensor in inputs)

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training:
                self._outputs[name] = output.detach()

        return hook


def watch(state: TrainState) -> Diagnostics:
    """What watches the model and the tables of a run."""
    return Diagnostics(state.interaction, TableDiagnostics(state))


def without_gradient(values: Mapping[str, float]) -> list[str]:
    """What got no gradient in the segment's last step: a line for each part, and for each table."""
    found = []
    for kind, start in (("part", f"{PREFIX}/gradient_norm/"), ("table", f"{PREFIX}/table_gradient_norm/")):
        for name in (key.removeprefix(start) for key, norm in values.items() if key.startswith(start) and norm == 0):
            why = ", which read none of its rows" if values.get(f"{PREFIX}/table_rows_read/{name}") == 0 else ""
            found.append(f"{kind} {name} got no gradient in the last step of this segment{why}")
    return found


def table_of(values: Mapping[str, float]) -> str:
    """The numbers of a segment as text: parts, tables, a line for each layer with dead units, one of the terms."""
    found: dict[str, dict[str, dict[str, float]]] = {"part": {}, "table": {}}
    dead, shares = [], []
    for key, value in values.items():
        if key.startswith(f"{PREFIX}/"):
            _, column, name = key.split("/", 2)
            if column == "dead_units":
                dead += [f"{name}: {value:.1%} of its units are dead"] if value else []
            elif column == "share":
                shares.append(f"{name} {value:.1%}")
            else:
                found["table" if column in TABLE_COLUMNS else "part"].setdefault(name, {})[column] = value
    tables = [_rows(kind, rows) for kind, rows in found.items() if rows]
    of_logit = [f"of the logit: {', '.join(shares)}"] if shares else []
    return "\n".join([*tables[:1], *dead, *of_logit, *tables[1:]])


def _rows(kind: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = _COLUMNS if kind == "part" else TABLE_COLUMNS
    lines = [[name, *(_written(column, row.get(column)) for column in columns)] for name, row in rows.items()]
    headers = [kind, *(column.removeprefix("table_").replace("_", " ") for column in columns)]
    aligned = ["left", *["right"] * len(columns)]
    return str(tabulate(lines, headers=headers, disable_numparse=True, colalign=aligned))


def _written(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if column == "table_rows_read" else f"{value:.3g}"


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, a float64, added up as such."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
