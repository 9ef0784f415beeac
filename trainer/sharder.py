"""TorchRec's sharder as this project needs it: types and kernels to choose from, and what rows are sent as.

Knows nothing of plans.
"""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.types import ShardingType

from trainer.config import ShardingConfig
from trainer.world import World

_ON_CUDA = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)

_GRADIENT_SCALE = 2.0**10
"""What gradients are multiplied by on their way as fp16, which loses what is below 6e-5 bit by bit, as those of a mean
over many rows are; undone where they arrive. Up to 63 they stay below what fp16 can hold."""

DEVICE_SHARE = {
    EmbeddingComputeKernel.FUSED_UVM.value: 0.0,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value: UVM_CACHING_RATIO,
}
"""Part of a table that lies in the device's own memory, by kernel; all of it under the kernels not named."""


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with every sharding type on every device.

    TorchRec leaves the row-wise types out on CPU, although its gloo path runs them (tested here on 2 ranks).
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Every type that the planner may meet in a constraint."""
        return [kind.value for kind in ShardingType]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Every kernel that the planner may meet in a constraint."""
        return [EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value, *DEVICE_SHARE]


def sharder_for(config: ShardingConfig, world: World) -> Sharder:
    """The sharder of a run: how its tables look up and what their rows and gradients are sent as."""
    # Ids are checked where they are mapped, so the kernels need not check them again.
    return Sharder(
        fused_params={"bounds_check_mode": BoundsCheckMode.NONE}, qcomm_codecs_registry=_codecs(config, world)
    )


def _codecs(config: ShardingConfig, world: World) -> dict[str, Any] | None:
    """What rows are sent as, and their gradients; None to send them as they are. One rank sends nothing."""
    if config.quantized_communication == "none" or world.size == 1:
        return None
    number = CommType(config.quantized_communication)
    # Told that the device is a CPU, TorchRec would take fp16 for bf16, for want of it in gloo; this gloo has it.
    codecs = get_qcomm_codecs_registry(QCommsConfig(number, number), device=torch.device("cuda"))
    if number == CommType.FP16:
        for pair in codecs.values():
            pair.backward = ScaledCodec(SparseType.FP16, is_fwd=False)
    return codecs


class ScaledCodec(QuantizedCommCodec):
    """FBGEMM's codec of numbers multiplied by ``_GRADIENT_SCALE``.

    Its own ``loss_scale`` is divided by before the fp16 it has received is made float32, which loses what it saved.
    """

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """What is sent."""
        return super().encode(input_tensor * _GRADIENT_SCALE, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """What was sent, to rounding; float32."""
        return super().decode(input_tensor, ctx) / _GRADIENT_SCALE


def kernels_for(sharding_type: str, config: ShardingConfig, device: torch.device) -> list[str]:
    """Kernels for one sharding type: ``dense`` for data-parallel tables, whose optimizer is torch's; else FBGEMM's."""
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return [EmbeddingComputeKernel.DENSE.value]
    if device.type == "cpu":
        return [EmbeddingComputeKernel.FUSED.value]
    return list(config.kernels or _ON_CUDA)


def empty_cache(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Have the memory of the tables hold what the kernel knows of them, and the kernel nothing else.

    Rows that lie in its cache are written back; what is then written to the tables is what it will read.
    """
    kernel.flush()
    kernel.reset_cache_states()
