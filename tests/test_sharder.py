"""Which kernels a table may have on which device, what ranks send each other, and caches that hold newer rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType
from torchrec.distributed.types import CommOp

from tests.command_line import call
from tests.small_data import run_plain, run_toml
from trainer.config import RunConfig, ShardingConfig
from trainer.description import build
from trainer.errors import ConfigError
from trainer.lookup import kernels_in
from trainer.run import open_inputs, start
from trainer.sharder import empty_cache, kernels_for, sharder_for
from trainer.world import World, join_world

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("kernels", "device", "expected"),
    [
        ((), CPU, ["fused"]),
        (("fused_uvm",), CPU, ["fused"]),  # to score on a CPU what was trained on a GPU
        ((), GPU, ["fused", "fused_uvm_caching"]),
        (("fused_uvm",), GPU, ["fused_uvm"]),
        (("fused_uvm", "fused"), GPU, ["fused_uvm", "fused"]),
    ],
)
def test_the_planner_may_choose_from_the_kernels_of_the_run_or_else_of_the_device(
    kernels: Any, device: torch.device, expected: list[str]
) -> None:
    config = ShardingConfig(kernels=kernels)
    assert kernels_for("row_wise", config, device) == expected
    assert kernels_for("data_parallel", config, device) == ["dense"]
    sharder = sharder_for(config, World(0, 0, 2, 2, device))
    assert set(expected) <= set(sharder.compute_kernels("row_wise", device.type))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sharding.kernels=['fused', 'fused']", r"sharding.kernels is \['fused', 'fused'\], expected each kernel once"),
        ("sharding.kernels=['fused_uvm_cache']", r"sharding.kernels\[0\] is .* did you mean fused_uvm_caching\?"),
        ("sharding.kernels=['dense']", r"sharding.kernels\[0\] is 'dense'"),
        (
            "sharding.quantized_communication='fp8'",
            "quantized_communication is 'fp8'; expected one of bf16, fp16, none",
        ),
        ("precision.dense='float16'", r"precision.dense is 'float16'; did you mean bfloat16\?"),
    ],
)
def test_what_there_is_not_is_refused(click_log: Path, override: str, message: str) -> None:
    call("train", run_toml(click_log), "--set", override).complains_of(message)


def test_kernels_named_twice_are_a_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"kernels is \['fused_uvm', 'fused_uvm'\], expected each kernel once"):
        ShardingConfig(kernels=("fused_uvm", "fused_uvm"))


def world_of(size: int) -> World:
    return World(0, 0, size, size, CPU)


@pytest.mark.parametrize("number", ["fp16", "bf16"])
def test_rows_and_gradients_are_sent_as_the_run_says_by_every_sharding_type(number: str) -> None:
    codecs = sharder_for(ShardingConfig(quantized_communication=number), world_of(2)).qcomm_codecs_registry  # type: ignore[arg-type]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[CommType(number).value]
    for operation in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER):
        pair = codecs[operation.name]
        assert {pair.forward.quantized_dtype, pair.backward.quantized_dtype} == {dtype}


@pytest.mark.parametrize(("number", "bits"), [("fp16", 11), ("bf16", 8)])
def test_gradients_keep_their_bits_however_small_a_mean_over_many_rows_makes_them(number: Any, bits: int) -> None:
    codecs = sharder_for(ShardingConfig(quantized_communication=number), world_of(2)).qcomm_codecs_registry
    gradient = torch.tensor([1e-7, 3e-5, -0.7, 63.0])
    for pair in codecs.values():
        arrived = pair.backward.decode(pair.backward.encode(gradient))
        torch.testing.assert_close(arrived, gradient, rtol=2.0**-bits, atol=0)


def test_what_is_sent_as_it_is_or_not_at_all_is_not_rounded() -> None:
    assert sharder_for(ShardingConfig(), world_of(2)).qcomm_codecs_registry is None
    assert sharder_for(ShardingConfig(quantized_communication="fp16"), world_of(1)).qcomm_codecs_registry is None


class Cache:
    """Stands for a kernel with a cache in device memory: what it is asked for, in order."""

    lxu_cache_weights = torch.zeros(4)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flush(self) -> None:
        self.calls.append("write back")

    def reset_cache_states(self) -> None:
        self.calls.append("forget")


def test_cached_rows_are_written_back_before_they_are_forgotten() -> None:
    cache = Cache()
    empty_cache(cache)
    assert cache.calls == ["write back", "forget"]


def test_whoever_asks_for_the_tables_gets_them_with_all_caches_empty(
    click_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a checkpoint has rows older than the cache, and a new id's first values are not what is looked up."""
    plain, cache = run_plain(click_log, output=str(click_log / "cached"), max_steps=1), Cache()
    with join_world(standalone=True) as world:
        monkeypatch.setattr("trainer.state.kernels_in", lambda collection: [*kernels_in(collection), cache])
        state = start(open_inputs(build(RunConfig, plain), world), world).state
        monkeypatch.undo()
        for _ in range(2):
            cache.calls.clear()
            assert state.shards()
            assert cache.calls == ["write back", "forget"]
        own = [kernel for collection in state.collections.values() for kernel in kernels_in(collection)]
        assert own
        assert not set(map(id, own)) & set(map(id, state._caching))
