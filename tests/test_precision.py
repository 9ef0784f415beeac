"""The interaction model in bfloat16: what it rounds, what it leaves in float32, and that a run keeps to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.command_line import call, digests
from tests.small_data import run_plain
from trainer import checkpoint, loop
from trainer.config import RunConfig
from trainer.description import build
from trainer.errors import CheckpointError
from trainer.run import check_same_run, open_inputs, start
from trainer.world import join_world

MODELS: dict[str, dict[str, Any]] = {
    "dnn": {"kind": "dnn", "hidden": [16, 8]},
    "deepfm": {"kind": "deepfm", "hidden": [16, 8], "batch_norm": True, "activation": "dice"},
    "wide_deep": {"kind": "wide_deep", "hidden": [16, 8], "activation": "prelu", "batch_norm": True},
    "dcn": {"kind": "dcn", "hidden": [16, 8], "cross_layers": 2},
    "dcnv2": {"kind": "dcnv2", "hidden": [16, 8], "cross_layers": 2, "rank": 3, "activation": "gelu"},
}


@dataclasses.dataclass
class Step:
    """The first step of a run."""

    logits: Tensor
    loss: Tensor
    labels: Tensor
    by_hand: Tensor
    """Logits of the same model on the same input, under torch's own autocast."""

    gradients: dict[str, Tensor]
    types: set[torch.dtype]
    """Of all weights, buffers and moments after the step, integers aside."""


def first_step(click_log: Path, output: Path, **overrides: Any) -> Step:
    """What the first step of a run computes."""
    plain = run_plain(click_log, output=str(output), max_steps=1, **overrides)
    seen: dict[str, Any] = {}
    with join_world(standalone=True) as world:
        run = start(open_inputs(build(RunConfig, plain), world), world)
        model, gradients = run.state.interaction, {}
        for name, parameter in model.named_parameters():
            parameter.register_hook(functools.partial(gradients.setdefault, name))
        model.register_forward_pre_hook(functools.partial(listen, seen))
        run.state.task.head.register_forward_hook(lambda head, inputs, outputs: seen.setdefault("outputs", outputs))
        loop.train(run)
        moments = [value for state in run.state.dense_moments().values() for value in state.values()]
        pieces = [tensor for piece in run.state.shards() for tensor in (piece.weight, *piece.moments.values())]
        held = [*run.state.dense().values(), *moments, *pieces]
    loss, prediction = seen["outputs"]
    labels = prediction.batch.labels[: prediction.batch.num_rows]
    types = {tensor.dtype for tensor in held if tensor.is_floating_point()}
    return Step(prediction.logits, loss.detach(), labels, seen["by hand"], gradients, types)


def listen(seen: dict[str, Any], model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before its first forward, note what a model would return under autocast to bfloat16, and leave it as it is."""
    if "by hand" not in seen:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            seen["by hand"] = copy.deepcopy(model).forward(*inputs)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_rounds_what_the_model_multiplies_and_nothing_else(click_log: Path, tmp_path: Path, name: str) -> None:
    exact = first_step(click_log, tmp_path / "exact", model=MODELS[name])
    rounded = first_step(click_log, tmp_path / "rounded", model=MODELS[name], precision={"dense": "bfloat16"})
    assert torch.equal(rounded.logits, rounded.by_hand.float())
    assert not torch.equal(rounded.logits, exact.logits)
    torch.testing.assert_close(rounded.logits, exact.logits, rtol=2**-5, atol=2**-6)
    for step in (exact, rounded):
        assert step.logits.dtype == step.loss.dtype == torch.float32
        assert step.types == {torch.float32}
        assert torch.equal(step.loss, binary_cross_entropy_with_logits(step.logits, step.labels, reduction="sum") / 64)
    ours, theirs = (
        torch.cat([step.gradients[name].flatten() for name in exact.gradients]) for step in (rounded, exact)
    )
    assert {gradient.dtype for gradient in rounded.gradients.values()} == {torch.float32}
    assert ours.isfinite().all()
    assert 0 < (ours - theirs).norm() <= 2**-4 * theirs.norm()


def test_a_run_in_bfloat16_resumes_bitwise(click_log: Path, tmp_path: Path) -> None:
    for output, epochs in (("parts", 1), ("parts", 2), ("whole", 2)):
        words = (f"--set=output={tmp_path}/{output}", f"--set=data.epochs={epochs}", "--set=precision.dense=bfloat16")
        assert call("train", click_log / "run.toml", *words).code == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


KEPT = {"precision.dense": "bfloat16", "precision.tf32": True, "sharding.quantized_communication": "fp16"}


@pytest.mark.parametrize("key", KEPT)
def test_a_run_may_not_change_its_precision_on_the_way(finished: Path, key: str) -> None:
    section, name = key.split(".")
    plain = run_plain(finished, **{section: {name: KEPT[key]}})
    with join_world(standalone=True) as world:
        path, manifest = checkpoint.find(finished / "run")
        inputs = open_inputs(build(RunConfig, plain), world)
        with pytest.raises(CheckpointError, match=rf"^{key} is .* in checkpoint .* and {KEPT[key]!r} in the run"):
            check_same_run(manifest, inputs, path)


def test_a_checkpoint_that_does_not_say_was_made_in_float32(finished: Path) -> None:
    path, manifest = checkpoint.find(finished / "run")
    config = {name: value for name, value in manifest.config.items() if name not in ("precision", "sharding")}
    older = dataclasses.replace(manifest, config=config)
    with join_world(standalone=True) as world:
        check_same_run(older, open_inputs(build(RunConfig, run_plain(finished)), world), path)
