"""Batch normalization: equal to torch's on one rank, and to one rank's on several."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import models
from models.norm import BatchNorm, Reduce, synchronize

UNITS = 3


class SimulatedRanks:
    """Threads that stand for ranks, with a sum over them that is differentiable as an all-reduce is."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots: list[Tensor] = [torch.empty(0)] * size

    def total(self, rank: int, tensor: Tensor) -> Tensor:
        self.slots[rank] = tensor.detach().clone()
        self.barrier.wait()
        total = torch.stack(self.slots).sum(dim=0)
        self.barrier.wait()
        return total

    def reduce_of(self, rank: int) -> Reduce:
        class AllReduce(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor):
                return self.total(rank, tensor)

            @staticmethod
            def backward(ctx, gradient):
                return self.total(rank, gradient)

        return AllReduce.apply

    def run(self, work: Callable[[int], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The results of ``work(rank)`` for all ranks, run at the same time."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, range(self.size)))


def dice_network() -> nn.Module:
    torch.manual_seed(7)
    model = models.build(
        "dnn", num_dense=2, num_fields=3, dim=4, hidden=[6, 5], activation="dice", batch_norm=True
    ).double()
    for name, parameter in model.named_parameters():
        if "alpha" in name or "weight" in name:
            nn.init.normal_(parameter)
    return model


def train_step(model: nn.Module, dense: Tensor, embeddings: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the embeddings' gradient, of one step on a loss that is a sum over rows."""
    embeddings = embeddings.clone().requires_grad_()
    logits = model(dense, embeddings, dense.new_empty(len(dense), 0))
    nn.functional.softplus(sign * logits).sum().backward()
    return logits.detach(), embeddings.grad


@pytest.mark.parametrize("cut", [[4, 4], [5, 3], [8, 0], [0, 8], [3, 0, 5], [1, 0], [0, 1], [1, 1], [0, 0]])
def test_ranks_holding_parts_of_the_batch_equal_one_rank_holding_it_all(cut):
    rows, ranks = sum(cut), SimulatedRanks(len(cut))
    data = [
        torch.randn(rows, 2, dtype=torch.float64),
        torch.randn(rows, 3, 4, dtype=torch.float64),
        torch.randn(rows, dtype=torch.float64).sign(),
    ]
    whole, parts = dice_network(), list(zip(*[tensor.split(cut) for tensor in data], strict=True))
    replicas = [copy.deepcopy(whole) for _ in cut]
    for rank, replica in enumerate(replicas):
        synchronize(replica, ranks.reduce_of(rank))

    for _ in range(2):  # twice, so that gradients and running statistics build on each other
        logits, gradient = train_step(whole, *data)
        results = ranks.run(lambda rank: train_step(replicas[rank], *parts[rank]))
        torch.testing.assert_close(torch.cat([result[0] for result in results]), logits)
        torch.testing.assert_close(torch.cat([result[1] for result in results]), gradient)

    for name, parameter in whole.named_parameters():
        total = sum(replica.get_parameter(name).grad for replica in replicas)
        torch.testing.assert_close(total, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name, buffer in whole.named_buffers():
        for replica in replicas:
            torch.testing.assert_close(replica.get_buffer(name), buffer)


def test_without_a_sum_over_ranks_the_parts_would_differ_from_the_whole():
    x = torch.randn(8, UNITS)
    norm = BatchNorm(UNITS)
    apart = torch.cat([norm(x[:5]), norm(x[5:])])
    assert not torch.allclose(apart, norm(x), atol=1e-2)


@pytest.mark.parametrize("rows", [2, 3, 64])
def test_one_rank_equals_torch_in_outputs_gradients_and_buffers(rows):
    ours, torchs = BatchNorm(UNITS).double(), nn.BatchNorm1d(UNITS).double()
    for norm in (ours, torchs):
        nn.init.constant_(norm.weight, 1.7)
        nn.init.constant_(norm.bias, -0.3)
    for _ in range(3):
        x, towards = 5 + 2 * torch.randn(rows, UNITS).double(), torch.randn(rows, UNITS).double()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0]), torchs(inputs[1])]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output * towards).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, torchs.bias.grad)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_it_loads_the_state_of_torchs_batch_norm_by_name():
    assert list(BatchNorm(UNITS).state_dict()) == list(nn.BatchNorm1d(UNITS).state_dict())


def test_first_and_second_derivatives_are_those_of_finite_differences():
    norm = BatchNorm(UNITS).double()
    x = torch.randn(4, UNITS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_a_global_batch_of_one_row_gives_the_bias_and_moves_no_running_statistics(eps):
    norm = BatchNorm(UNITS, eps=eps)
    nn.init.constant_(norm.bias, 0.5)
    x = torch.randn(1, UNITS, requires_grad=True)
    output = norm(x)
    output.sum().backward()
    assert torch.equal(output, torch.full((1, UNITS), 0.5))
    assert torch.equal(x.grad, torch.zeros(1, UNITS))
    assert torch.equal(norm.running_mean, torch.zeros(UNITS))
    assert torch.equal(norm.running_var, torch.ones(UNITS))
    assert norm.num_batches_tracked == 0


def test_no_rows_at_all_give_no_output_zero_gradients_and_move_nothing():
    norm = BatchNorm(UNITS)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.empty(0, UNITS)).sum().backward()
    assert torch.equal(norm.weight.grad, torch.zeros(UNITS))
    assert torch.equal(norm.bias.grad, torch.zeros(UNITS))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert norm.eval()(torch.empty(0, UNITS)).shape == (0, UNITS)


def test_float32_keeps_the_variance_about_a_far_off_mean():
    x = 10_000 + torch.randn(512, UNITS)
    exact = BatchNorm(UNITS).double()(x.double())
    torch.testing.assert_close(BatchNorm(UNITS)(x), exact.float(), rtol=0, atol=2e-3)


def test_half_precision_rows_get_float32_statistics_and_stay_half_precision():
    norm = BatchNorm(UNITS)
    x = (100 + torch.randn(256, UNITS)).bfloat16()
    output = norm(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, BatchNorm(UNITS)(x.float()).bfloat16())
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean(dim=0))


def test_evaluation_uses_the_running_statistics_and_asks_no_other_rank():
    def refuse(tensor: Tensor) -> Tensor:
        raise RuntimeError("communication in evaluation")

    norm = BatchNorm(UNITS)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    norm.set_reduce(refuse)
    x = torch.randn(5, UNITS)
    torch.testing.assert_close(norm.eval()(x), (x - 2) / (4 + 1e-5) ** 0.5)
    with pytest.raises(RuntimeError, match="communication in evaluation"):
        norm.train()(x)


def test_synchronize_reaches_every_normalization_also_inside_dice():
    calls: list[torch.Size] = []

    def count(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return tensor

    model = dice_network()
    synchronize(model, count)
    model(*(torch.randn(shape).double() for shape in [(4, 2), (4, 3, 4), (4, 0)]))
    assert calls == [(7,), (6,), (7,), (6,), (6,), (5,), (6,), (5,)]
