"""A new run that goes on from another's checkpoint: its rows, moments, vocabularies and model, on new data.

The new run counts its own steps from 0. Optimizers, schedules of learning rates and the clock of ``expire_unit =
"steps"`` count those before as well; scorings, early stopping and ``evaluation.reduce_rates`` begin anew.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from trainer import checkpoint
from trainer import manifest as manifests
from trainer.config import RunConfig, TransformConfig
from trainer.description import build
from trainer.errors import CheckpointError
from trainer.location import Location, locate
from trainer.manifest import Manifest
from trainer.run import Inputs, differences, load_state
from trainer.schema import rule_of
from trainer.state import TrainState
from trainer.world import World

_MUST_MATCH = ("model", "dense_optimizer.kind", "data.labels", "data.dense", "data.transforms")
_TABLES_MUST_MATCH = ("name", "role", "features", "dim", "ids", "pooling")


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run begins that goes on from another."""

    path: Location | None
    """Of the other run's checkpoint; None where the run has begun and nobody said which it was."""

    numbers: Manifest
    """The checkpoint that knows the numbers of transforms: the other's, or the run's own newest."""

    def state(self, inputs: Inputs, world: World, epoch_steps: int) -> TrainState:
        """The other run's state, as that which the new one begins with. Collective.

        Raises:
            CheckpointError: what does not fit the run description, or no checkpoint is whole.
        """
        with world.together():
            if self.path is None:
                raise CheckpointError(
                    f"output {inputs.config.output} has no whole checkpoint left of a run that went on from another; "
                    "name that one's checkpoint again with --continue-from"
                )
        path, manifest = checkpoint.find(self.path, world)
        with world.together():
            for name, before, now in differences(manifest, inputs.config, _MUST_MATCH, _TABLES_MUST_MATCH):
                raise CheckpointError(
                    f"--continue-from: {name} is {before!r} in {path} and {now!r} in the run; "
                    "change it back: only data, rates, batches and the like may differ"
                )
        state = load_state(path, manifest, inputs.config, len(inputs.columns.dense), world, epoch_steps)
        state.earlier_steps = manifest.earlier_steps + manifest.step
        return state


def beginning_of(path: Location | None, config: RunConfig, world: World, *, fresh: bool) -> Beginning | None:
    """Where the run begins that is to go on from ``path``, a checkpoint or the newest good one of a run. Collective.

    None for a run that goes on from no other. What is in the output does not count where all is to be ``fresh``.

    Raises:
        CheckpointError: there is none, or the output has a run that does not go on from another.
    """
    with world.together():
        begun = None if fresh else _begun(config)
    if path is None:
        return Beginning(None, begun) if begun is not None and begun.earlier_steps else None
    if begun is None:
        found, manifest = checkpoint.find(path, world, verified=False)
        with world.together():
            if str(found).startswith(f"{locate(config.output)}/"):
                raise CheckpointError(f"--continue-from: {found} is in output {config.output}; name another output")
        return Beginning(found, manifest)
    if not begun.earlier_steps:
        raise CheckpointError(
            f"output {config.output} has a run already that goes on from no other; name another output for the new data"
        )
    return Beginning(path, begun)


def _begun(config: RunConfig) -> Manifest | None:
    """The manifest of the newest checkpoint of the run's output that has one."""
    directory = locate(config.output) / "checkpoints"
    for step in reversed(checkpoint.steps_in(directory)):
        try:
            return manifests.read(checkpoint.path_of(directory, step))
        except CheckpointError:  # damaged: resuming will name it
            continue
    return None


def with_known_numbers(config: RunConfig, beginning: Beginning | None) -> RunConfig:
    """The run description with the numbers of ``standardize`` that the model was trained with.

    They were measured on the first run's data; numbers of the new data would change what the model sees. Leaves them
    to be measured where the run goes on from no other.
    """
    if beginning is None:
        return config
    saved = build(RunConfig, beginning.numbers.config).data
    known = tuple(rule for rule in saved.transforms if _is_measured(rule_of(rule.columns[0], config.data), rule))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, transforms=known + config.data.transforms))


def _is_measured(own: TransformConfig, saved: TransformConfig) -> bool:
    """Whether the run leaves to be measured what the checkpoint knows."""
    return own.kind == saved.kind == "standardize" and own.mean is None and own.null == saved.null
