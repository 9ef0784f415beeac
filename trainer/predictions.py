"""Collects a rank's predictions during evaluation, gathers them on the chief, and tells every rank the metrics.

From batches of logits, labels, weights and users to one report that is bitwise the same on every rank and for every
number of ranks. Knows no formula (see ``trainer.metrics``), and not where the batches come from.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import MetricError
from trainer.metrics import ScoredRows, evaluate

FLUSH_ROWS = 1 << 20
"""Rows that evaluation keeps on the device before it moves them to the host: one wait for the device each."""

CHUNK_ROWS = 1 << 18
"""Rows of one column that each rank sends to the chief at a time: bounds the memory for rows in flight."""


class Predictions:
    """This rank's rows of an evaluation, collected batch by batch and then gathered on the chief."""

    def __init__(self, device: torch.device, *, with_users: bool = False) -> None:
        """Start with no rows.

        device: where the batches are and where the ranks' collectives run.
        with_users: whether every batch will name its rows' users; the same on all ranks.
        """
        self.device = device
        self._dtypes = {"logits": torch.float64, "labels": torch.float32, "weights": torch.float32}
        if with_users:
            self._dtypes["users"] = torch.int64
        self._on_device: list[dict[str, Tensor]] = []
        self._on_host: list[dict[str, Tensor]] = []
        self._num_rows_on_device = 0

    @torch.no_grad()
    def add(self, logits_B: Tensor, labels_B: Tensor, weights_B: Tensor, users_B: Tensor | None = None) -> None:
        """Keep a batch: logits float [B], labels and weights float32 [B], users int64 [B].

        Rows of weight 0 are padding and are dropped. Waits for the device once in ``FLUSH_ROWS`` rows only.
        """
        if (users_B is not None) != ("users" in self._dtypes):
            raise ValueError("give users with every batch if with_users is set, and with none if it is not")
        given = {"logits": logits_B, "labels": labels_B, "weights": weights_B}
        if users_B is not None:
            given["users"] = users_B
        # copies: the batch's memory may be reused or far larger than these columns
        batch = {name: torch.empty_like(column, dtype=self._dtypes[name]) for name, column in given.items()}
        for name, column in given.items():
            batch[name].copy_(column)
        self._on_device.append(batch)
        self._num_rows_on_device += logits_B.shape[0]
        if self._num_rows_on_device >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        """Move the rows that count to the host."""
        if not self._on_device:
            return
        columns = {name: torch.cat([batch[name] for batch in self._on_device]) for name in self._dtypes}
        counted = columns["weights"] != 0
        self._on_host.append({name: column[counted].cpu() for name, column in columns.items()})
        self._on_device.clear()
        self._num_rows_on_device = 0

    def _take(self, name: str) -> Tensor:
        """One column of all rows of this rank, removed from what is kept."""
        pieces = [piece.pop(name) for piece in self._on_host]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self._dtypes[name])

    def gather(self, group: dist.ProcessGroup | None = None, *, chunk_rows: int = CHUNK_ROWS) -> ScoredRows | None:
        """All ranks' rows on the chief (rank 0 of ``group``), None elsewhere; leaves this rank without rows.

        Ranks may have different numbers of rows, or none. The chief holds one copy of the rows, and of one
        column its own part and ``chunk_rows`` rows of each rank besides.
        """
        self._flush()
        num_rows = sum(len(piece["weights"]) for piece in self._on_host)
        if dist.is_initialized():
            counts = _counts(num_rows, self.device, group)
            columns = {
                name: _gather_column(self._take(name), counts, self.device, group, chunk_rows) for name in self._dtypes
            }
        else:
            columns = {name: self._take(name) for name in self._dtypes}
        self._on_host.clear()
        whole = {name: column for name, column in columns.items() if column is not None}
        return ScoredRows(**whole) if whole else None


def _counts(num_rows: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """``num_rows`` of every rank of ``group``, in the order of ranks."""
    own = torch.tensor([num_rows], device=device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


def _gather_column(
    column: Tensor, counts: list[int], device: torch.device, group: dist.ProcessGroup | None, chunk_rows: int
) -> Tensor | None:
    """The ranks' columns end to end, on the host of rank 0 of ``group``; None on the others.

    ``dist.gather`` wants equal sizes, so ranks that have run out of rows send padding, which is not copied.
    """
    is_chief = dist.get_rank(group) == 0
    gathered = torch.empty(sum(counts) if is_chief else 0, dtype=column.dtype)
    parts = gathered.split(counts) if is_chief else ()
    for start in range(0, max(counts), chunk_rows):
        chunk = torch.zeros(min(chunk_rows, max(counts) - start), dtype=column.dtype, device=device)
        own = column[start : start + len(chunk)]
        chunk[: len(own)] = own.to(device)
        chunks = [torch.empty_like(chunk) for _ in counts] if is_chief else None
        dist.gather(chunk, chunks, group=group, group_dst=0)
        for part, received in zip(parts, chunks or (), strict=True):
            target = part[start : start + len(chunk)]
            target.copy_(received[: len(target)])
    return gathered if is_chief else None


def evaluate_everywhere(
    predictions: Predictions, prefix: str, group: dist.ProcessGroup | None = None, *, partly: bool = False
) -> dict[str, float]:
    """``evaluate`` over the rows of all ranks, bitwise the same on every rank; empties ``predictions``.

    Computed on the chief and broadcast, so that ranks that stop or keep a checkpoint by a metric decide alike.

    Raises:
        MetricError: as ``evaluate``, on every rank alike.
    """
    rows = predictions.gather(group)
    outcome: list[dict[str, float] | MetricError] = [{}]
    if rows is not None:
        try:
            outcome = [evaluate(rows, prefix, partly=partly)]
        except MetricError as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, group=group, group_src=0, device=predictions.device)
    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]
