"""Graphs of torch.export, read without it: the same as by torch.export.load, or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.graph import GraphError, read_graph


class Everything(nn.Module):
    """Constants, buffers, shared and empty weights, views of others' memory, results in lists, infinity, a loop."""

    whole: Tensor
    part: Tensor
    not_saved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.nothing = nn.Linear(3, 3), nn.Linear(0, 1, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        whole = torch.randn(4, 6)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole.t()[::2, 1:])
        self.register_buffer("not_saved", torch.randn(3), persistent=False)

    def forward(self, x_B3: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        one, two, three = self.second(self.first(x_B3)).chunk(3, dim=1)
        found_B3 = torch.cat([three, one, two], dim=1) @ self.part[:, [2, 0, 1]] + self.not_saved
        found_B3 = found_B3.masked_fill(found_B3 < 0, float("-inf")) + self.nothing(x_B3[:, :0])
        sum_3, sums_B3 = scan(lambda a, b: (a + b, (a + b) * self.whole[0, 0]), x_B3.new_zeros(3), x_B3, dim=0)
        return found_B3 + sum_3 + sums_B3 * x_B3.shape[0]


def written(path: Path, model: nn.Module) -> Path:
    rows = torch.export.Dim("rows", min=1)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (torch.randn(4, 3),), dynamic_shapes=({0: rows},), strict=False)
    torch.export.save(exported, str(path))
    return path


def test_a_graph_gives_what_torch_gives_that_loads_the_same_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = written(tmp_path / "graph.pt2", Everything())
    graph, expected = read_graph(path), torch.export.load(str(path)).module()
    for rows in (1, 2, 99):
        x_B3 = torch.randn(rows, 3)
        torch.testing.assert_close(graph(x_B3), expected(x_B3), rtol=0, atol=0)
    assert 0 < graph(x_B3).isfinite().sum() < x_B3.numel()


class Counting(nn.Module):
    """Changes a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x_B3: Tensor) -> Tensor:
        self.count += 1
        return x_B3 + self.count


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda path: written(path, Counting()),
            "has the operator torch.ops.aten.add_.Tensor, which is not among",
        ),
        (lambda path: path.write_bytes(b""), "is no graph of torch.export, or damaged: File is not a zip file"),
        (lambda path: path.unlink(), "is no graph of torch.export, or damaged: .*No such file"),
    ],
)
def test_what_is_no_graph_is_one_line(tmp_path: Path, edit: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "graph.pt2"
    path.write_bytes(b"PK")
    edit(path)
    with pytest.raises(GraphError, match=message) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)
