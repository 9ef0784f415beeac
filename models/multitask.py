"""Models of several labels: what they share, and how each label chooses from it.

Shapes: B rows, N dense features, F fields, D dim, I = F * D + N inputs, H units of an expert, E experts, T tasks.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from models import options
from models.blocks import MLP, MLPOptions, deep_input, initialize
from models.model import CTRModel


def _with_hidden(mlp: MLPOptions, hidden: Sequence[int]) -> MLPOptions:
    """The same options for a perceptron of other widths."""
    return {**mlp, "hidden": hidden}


def _towers(num_tasks: int, width: int, hidden: Sequence[int], mlp: MLPOptions) -> nn.ModuleList:
    """A perceptron with one logit for each task: ``hidden``, and the other options as in ``mlp``."""
    options.widths("tower", hidden)
    return nn.ModuleList(MLP(width, logit=True, **_with_hidden(mlp, hidden)) for _ in range(num_tasks))


class Experts(nn.ModuleList):
    """Perceptrons of the same inputs and sizes, each of its own weights, that end in their last hidden layer."""

    def __init__(self, count: int, width: int, mlp: MLPOptions) -> None:
        super().__init__(MLP(width, logit=False, **mlp) for _ in range(count))
        self.out_features = mlp["hidden"][-1] if mlp["hidden"] else width

    def forward(self, x_BI: Tensor) -> list[Tensor]:
        """Return what each gives, shape [B, H]."""
        return [expert(x_BI) for expert in self]


def logits_of(logits: Sequence[Tensor]) -> Tensor:
    """Logits of each task as [B, T], or [B] of a single one."""
    return torch.stack([*logits], dim=1) if len(logits) > 1 else logits[0]


class Gate(nn.Module):
    """``sum_e softmax(W g(x))_e f_e`` over experts f_e (Ma et al. 2018, MMoE, equations 6 and 7).

    g is a perceptron of the widths ``hidden``, the identity where there are none, as in the paper.
    """

    def __init__(self, width: int, count: int, hidden: Sequence[int], mlp: MLPOptions) -> None:
        super().__init__()
        options.widths("gate", hidden)
        self.hidden = MLP(width, logit=False, **_with_hidden(mlp, hidden))
        self.choice = nn.Linear(self.hidden.out_features, count, bias=False)
        initialize(self.choice, mlp.get("init", "torch"))

    def forward(self, x_BI: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return the mixture, shape [B, H]; ``outputs``: of the experts, [B, H] each."""
        shares_BE = torch.softmax(self.choice(self.hidden(x_BI)), dim=1)
        outputs_BEH = torch.stack([*outputs], dim=1)
        return (shares_BE.unsqueeze(2) * outputs_BEH).sum(dim=1)


class SharedBottom(CTRModel):
    """``tower_t(MLP([v_1, ..., v_F, dense]))`` for each task t (Caruana 1997, "Multitask Learning").

    hidden and the other options of ``MLPOptions``: of the perceptron that all tasks share; all but ``hidden`` of towers
        too.
    tower: widths of each task's own hidden layers; none: one linear layer.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        tasks: Sequence[str] = ("click",),
        tower: Sequence[int] = (),
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.bottom = MLP(num_fields * dim + num_dense, logit=False, **mlp)
        self.towers = _towers(len(tasks), self.bottom.out_features, tower, mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B, T], or [B] of a single task; ``linear_BF`` is not used."""
        shared_BH = self.bottom(deep_input(dense_BN, embeddings_BFD, self.num_dense))
        return logits_of([tower(shared_BH) for tower in self.towers])


class MMoE(CTRModel):
    """``tower_t(sum_e softmax(W_t x)_e f_e(x))`` for each task t, with x all inputs (Ma et al. 2018, equations 5 to 7).

    experts: E, the perceptrons f_e that all tasks share. hidden and the other options of ``MLPOptions``: of each.
    gate: widths of hidden layers between x and the softmax; none in the paper. tower: see ``SharedBottom``.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        tasks: Sequence[str] = ("click",),
        experts: int = 8,
        gate: Sequence[int] = (),
        tower: Sequence[int] = (),
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        options.whole("experts", experts, least=1, most=1000)
        width = num_fields * dim + num_dense
        self.num_dense = num_dense
        self.experts = Experts(experts, width, mlp)
        self.gates = nn.ModuleList(Gate(width, experts, gate, mlp) for _ in tasks)
        self.towers = _towers(len(tasks), self.experts.out_features, tower, mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B, T], or [B] of a single task; ``linear_BF`` is not used."""
        x_BI = deep_input(dense_BN, embeddings_BFD, self.num_dense)
        outputs = self.experts(x_BI)
        return logits_of([tower(gate(x_BI, outputs)) for tower, gate in zip(self.towers, self.gates, strict=True)])


class Extraction(nn.Module):
    """One level of progressive layered extraction: what tasks and all together take from their experts and shared ones.

    ``x_t' = sum softmax(W_t x_t) [E_t(x_t); E_s(x_s)]`` for each task, and ``x_s'`` with ``W_s x_s`` over the experts
    of all tasks and the shared ones; the last level has no ``x_s'`` (Tang et al. 2020, PLE).
    """

    def __init__(
        self,
        width: int,
        num_tasks: int,
        *,
        task_experts: int,
        shared_experts: int,
        gate: Sequence[int],
        is_last: bool,
        mlp: MLPOptions,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Experts(task_experts, width, mlp) for _ in range(num_tasks))
        self.shared = Experts(shared_experts, width, mlp)
        self.gates = nn.ModuleList(Gate(width, task_experts + shared_experts, gate, mlp) for _ in range(num_tasks))
        every = num_tasks * task_experts + shared_experts
        self.shared_gate = None if is_last else Gate(width, every, gate, mlp)
        self.out_features = self.shared.out_features

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the next level's inputs, [B, H] each: of every task, and then the shared one but in the last level."""
        *of_tasks, shared_BI = inputs
        shared = self.shared(shared_BI)
        own = [group(x_BI) for group, x_BI in zip(self.experts, of_tasks, strict=True)]
        found = [gate(x_BI, [*o, *shared]) for gate, x_BI, o in zip(self.gates, of_tasks, own, strict=True)]
        if self.shared_gate is not None:
            found.append(self.shared_gate(shared_BI, [*(each for group in own for each in group), *shared]))
        return found


class PLE(CTRModel):
    """``tower_t(x_t)`` after ``levels`` of ``Extraction``, whose first takes all inputs for each x (Tang et al. 2020).

    With one level it is the paper's CGC. task_experts: perceptrons of each task alone, by level; shared_experts: of all
    together. hidden and the other options of ``MLPOptions``: of each. gate, tower: see ``MMoE``.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        tasks: Sequence[str] = ("click",),
        levels: int = 1,
        task_experts: int = 4,
        shared_experts: int = 4,
        gate: Sequence[int] = (),
        tower: Sequence[int] = (),
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        for name, count in (("levels", levels), ("task_experts", task_experts), ("shared_experts", shared_experts)):
            options.whole(name, count, least=1, most=1000)
        self.num_dense = num_dense
        width = num_fields * dim + num_dense
        self.levels = nn.ModuleList()
        for level in range(levels):
            extraction = Extraction(
                width,
                len(tasks),
                task_experts=task_experts,
                shared_experts=shared_experts,
                gate=gate,
                is_last=level == levels - 1,
                mlp=mlp,
            )
            self.levels.append(extraction)
            width = extraction.out_features
        self.towers = _towers(len(tasks), width, tower, mlp)

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits, shape [B, T], or [B] of a single task; ``linear_BF`` is not used."""
        inputs = [deep_input(dense_BN, embeddings_BFD, self.num_dense)] * (len(self.towers) + 1)
        for level in self.levels:
            inputs = level(inputs)
        return logits_of([tower(x_BH) for tower, x_BH in zip(self.towers, inputs, strict=True)])


def logit_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The logit of ``sigmoid(a) * sigmoid(b)``: ``-ln(exp(-a) + exp(-b) + exp(-a - b))``, finite where a + b is.

    Because ``1 / p - 1`` is the sum in the logarithm, where 1 would be lost beside a large term of ``1 / p``.
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)


class ESMM(CTRModel):
    """Chances of a click and of a click and a conversion, the second as the first times a rate (Ma et al. 2018, ESMM).

    ``pCTR = sigmoid(MLP_0(x)), pCTCVR = pCTR * sigmoid(MLP_1(x))``: the conversion rate is learned through the product
    alone, over all rows that were shown. Labels: click, then click and conversion. hidden, ...: of both perceptrons.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_fields: int,
        dim: int,
        tasks: Sequence[str] = ("click", "conversion"),
        **mlp: Unpack[MLPOptions],
    ) -> None:
        super().__init__()
        if len(tasks) != 2:
            raise ValueError(
                f"model kind 'esmm' needs two labels, click and then click-and-conversion, and there are {len(tasks)}: "
                f"{', '.join(tasks)}"
            )
        self.num_dense = num_dense
        self.click, self.conversion = (MLP(num_fields * dim + num_dense, logit=True, **mlp) for _ in range(2))

    def forward(self, dense_BN: Tensor, embeddings_BFD: Tensor, linear_BF: Tensor) -> Tensor:
        """Return logits of pCTR and pCTCVR, shape [B, 2]; ``linear_BF`` is not used."""
        click_B, rate_B = (
            mlp.of_fields(dense_BN, embeddings_BFD, self.num_dense) for mlp in (self.click, self.conversion)
        )
        return logits_of([click_B, logit_of_product(click_B, rate_B)])
