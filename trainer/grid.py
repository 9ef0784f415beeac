"""What a sweep tries: settings made of ``--over`` values, each with a name and a checked run description.

Knows nothing of processes and results.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, to_plain
from trainer.description import key_parts, load
from trainer.errors import ConfigError

_LONGEST_NAME = 120
"""Characters of a setting's name; a file system takes 255 bytes, and a seed and endings follow."""

_RESERVED = {"output": "--output DIR", "seed": "--seeds N"}
"""Keys that the sweep itself sets, and the option that says to what."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is tried, with one seed or several."""

    name: str
    """Says what is set; of letters that every file system takes, and the same whenever the same is set."""

    overrides: tuple[str, ...]
    """``key=value``, besides those that all settings have."""


Axis = tuple[Setting, ...]
"""What one dimension of a grid may be."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep."""

    setting: Setting
    seed: int
    description: dict[str, Any]
    """The whole run description as plain data but for ``output``: what decides the result."""

    @property
    def name(self) -> str:
        """Names the run's folder."""
        return f"{self.setting.name},seed={self.seed}"


def axes_of(overs: Sequence[str]) -> list[Axis]:
    """The axis of each ``KEY=VALUE,VALUE,...``; a comma in brackets or quotes is part of a value.

    Raises:
        ConfigError: no values, an empty or repeated one, or a key that is not to be swept or comes twice.

    >>> [[setting.name for setting in axis] for axis in axes_of(["model.hidden=[64,32],[8]", "tables[*].ids=exact"])]
    [['model.hidden=64-32', 'model.hidden=8'], ['ids=exact']]
    """
    keys = [over.partition("=")[0].strip() for over in overs]
    for key, over in zip(keys, overs, strict=True):
        if "=" not in over or not key:
            raise ConfigError(
                f"--over {over!r} is not KEY=VALUE,VALUE; write it like --over dense_optimizer.lr=1e-3,3e-3"
            )
        if key in _RESERVED:
            raise ConfigError(f"--over {key}: the sweep itself sets {key}; say {_RESERVED[key]}")
        if keys.count(key) > 1:
            raise ConfigError(f"--over {key} is given {keys.count(key)} times; give all its values to one")
    for first, second in itertools.combinations(keys, 2):
        if overlap(first, second):
            raise ConfigError(f"--over {first} and --over {second} set some of the same; leave one out")
    return [
        _axis(key, over.partition("=")[2], short) for key, over, short in zip(keys, overs, _short(keys), strict=True)
    ]


def _axis(key: str, text: str, short: str) -> Axis:
    values = split_values(text)
    for value in values:
        if not value:
            raise ConfigError(f"--over {key}={text} has an empty value; write values with one comma between two")
        if values.count(value) > 1:
            raise ConfigError(f"--over {key} has the value {value} {values.count(value)} times; give it once")
    return tuple(Setting(_clean(f"{short}={value}"), (f"{key}={value}",)) for value in values)


def split_values(text: str) -> list[str]:
    """Parts between the commas that are not in brackets or quotes, without spaces around them.

    >>> split_values("1e-3, [1, 2],'a,b',{a = [1], b = 2}")
    ['1e-3', '[1, 2]', "'a,b'", '{a = [1], b = 2}']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _short(keys: Sequence[str]) -> list[str]:
    """The shortest endings, of two names where the key has them, that tell keys apart; without ``[*]``.

    >>> _short(["tables[*].optimizer.lr", "dense_optimizer.lr", "tables[0].rows", "tables[1].rows"])
    ['optimizer.lr', 'dense_optimizer.lr', 'tables[0].rows', 'tables[1].rows']
    """
    paths = [key.replace("[*]", ".*").split(".") for key in keys]

    def ending(path: list[str], length: int) -> str:
        return ".".join(part for part in path[-length:] if part != "*")

    found = []
    for path in paths:
        others = [other for other in paths if other is not path]
        length = min(2, len(path))
        while length < len(path) and ending(path, length) in [ending(other, length) for other in others]:
            length += 1
        found.append(ending(path, length))
    return found


def _clean(name: str) -> str:
    """A name of letters that need no quotes; a comma separates settings, so that it is none of them.

    >>> _clean("model.hidden=[64, 32]"), _clean("data.train=['a/*.parquet']")
    ('model.hidden=64-32', 'data.train=a-.parquet')
    """
    return re.sub(r"-*(=)-*|^-+|-+$", r"\1", re.sub(r"[^\w.+=-]+", "-", name, flags=re.ASCII))


def product(axes: Sequence[Axis]) -> list[Setting]:
    """Every combination, the last axis changing fastest."""
    return _named(itertools.product(*axes))


def zipped(axes: Sequence[Axis]) -> list[Setting]:
    """The first of all axes, the second of all, and so on.

    Raises:
        ConfigError: the axes are not of equal length.
    """
    lengths = [len(axis) for axis in axes]
    if len(set(lengths)) > 1:
        raise ConfigError(f"--zip pairs values one by one, and --over has {' and '.join(map(str, lengths))} of them")
    return _named(zip(*axes, strict=True))


def _named(combinations: Iterable[Sequence[Setting]]) -> list[Setting]:
    """One setting of each combination; a name that is too long, or that two would have, ends in a digest instead."""
    pairs = [
        (",".join(part.name for part in parts), tuple(itertools.chain.from_iterable(part.overrides for part in parts)))
        for parts in combinations
    ]
    names = [name for name, _ in pairs]
    return [
        Setting(_digested(name, overrides) if len(name) > _LONGEST_NAME or names.count(name) > 1 else name, overrides)
        for name, overrides in pairs
    ]


def _digested(name: str, overrides: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


_TABLE_RATES = {
    "sgd": ("0.1", "1", "10"),
    "adagrad": ("0.01", "0.05", "0.2"),
    "rowwise_adagrad": ("0.01", "0.05", "0.2"),
    "adam": ("3e-4", "1e-3", "3e-3"),
}
_DENSE_RATES = {"adam": ("3e-4", "1e-3", "3e-3"), "adamw": ("1e-3", "3e-3"), "adagrad": ("0.01", "0.03")}
_DENSE_ALSO = {"adamw": ("dense_optimizer.weight_decay=0.01",)}  # without, it would be adam once more


def table_optimizers(config: RunConfig, *, on_gpu: bool) -> Axis:
    """What ``--optimizers`` tries for all tables: what there is on this machine for tables of these shardings."""
    apart = [table.sharding == ("data_parallel",) for table in config.tables]
    splits = {"column_wise", "table_column_wise", "grid_shard"}
    whole = not any(table.sharding and set(table.sharding) <= splits for table in config.tables)
    has = {"adam": on_gpu or all(apart), "rowwise_adagrad": whole and not any(apart)}
    return tuple(
        Setting(f"tables={kind}-{rate}", (f"tables[*].optimizer.kind={kind}", f"tables[*].optimizer.lr={rate}"))
        for kind, rates in _TABLE_RATES.items()
        if has.get(kind, True)
        for rate in rates
    )


def dense_optimizers() -> Axis:
    """What ``--optimizers`` tries for the interaction model."""
    return tuple(
        Setting(
            f"dense={kind}-{rate}",
            (f"dense_optimizer.kind={kind}", f"dense_optimizer.lr={rate}", *_DENSE_ALSO.get(kind, ())),
        )
        for kind, rates in _DENSE_RATES.items()
        for rate in rates
    )


def settings_over(overs: Sequence[str], *, pairs: bool) -> list[Setting]:
    """The settings of ``--over`` axes: all values with all, or in ``pairs``. Without axes one that sets nothing.

    Raises:
        ConfigError: as ``axes_of`` and ``zipped``.
    """
    axes = axes_of(overs)
    return zipped(axes) if pairs and axes else product(axes)


def configs_of(path: Path, shared: Sequence[str], settings: Sequence[Setting]) -> list[RunConfig]:
    """The run description of each setting; ``shared``: the overrides that all of them have.

    Raises:
        ConfigError: one is wrong, two are the same, or they cannot be compared by validation.
    """
    swept = dict.fromkeys(key_of(override) for setting in settings for override in setting.overrides)
    for override in shared:
        _refuse_overridden(override, swept)
    configs = [load(path, [*shared, *setting.overrides]) for setting in settings]
    for number, config in enumerate(configs):
        if not config.data.validation:
            raise ConfigError("data.validation is empty, and a sweep chooses by it; name files to score")
        _refuse_other_scores(config, configs[0])
        if config in configs[:number]:
            same = settings[configs.index(config)].name
            raise ConfigError(f"{settings[number].name} is the same run as {same}; leave one of them out")
    return configs


def _refuse_overridden(override: str, swept: Iterable[str]) -> None:
    """Refuse a ``--set`` of which the settings leave nothing, or not all."""
    key = key_of(override)
    if key == "output":
        raise ConfigError(f"--set {override}: the sweep itself sets output; say --output DIR")
    for own in swept:
        if _covers(own, key):
            raise ConfigError(f"--set {override} would have no effect: the sweep itself sets {own}; leave one out")
        if overlap(own, key):
            raise ConfigError(
                f"--set {override} would be overridden in part: the sweep itself sets {own}; set only what is left"
            )


def key_of(override: str) -> str:
    """The key of ``key=value``."""
    return override.partition("=")[0].strip()


def overlap(key: str, other: str) -> bool:
    """Whether setting one key sets some of what the other sets.

    >>> overlap("model.hidden", "model"), overlap("tables[0]", "tables[*].rows"), overlap("data", "data_2")
    (True, True, False)
    >>> overlap("tables.0.rows", "tables[0].rows"), overlap("tables[0].rows", "tables[1].rows")
    (True, False)
    """
    return all(a == b or "*" in (a, b) for a, b in zip(_path(key), _path(other), strict=False))


def _covers(key: str, other: str) -> bool:
    """Whether setting ``key`` sets all of what ``other`` sets."""
    path, inner = _path(key), _path(other)
    return len(path) <= len(inner) and all(a in ("*", b) for a, b in zip(path, inner, strict=False))


def _path(key: str) -> list[str]:
    return [str(int(part)) if part.isdecimal() else part for part in key_parts(key)]


def _refuse_other_scores(config: RunConfig, first: RunConfig) -> None:
    """Refuse settings whose validation, or test data, are not scored alike."""
    labels = [each.evaluation.task or each.data.labels[0] for each in (config, first)]
    chosen = "evaluation.task" if config.evaluation.task != first.evaluation.task else "data.labels"
    users = [each.data.user if each.evaluation.metric == "gauc" else "" for each in (config, first)]
    for key, own, other, how in (
        ("evaluation.metric", config.evaluation.metric, first.evaluation.metric, "by different metrics"),
        ("data.validation", config.data.validation, first.data.validation, "on different rows"),
        ("data.test", config.data.test, first.data.test, "on different rows"),
        (chosen, *labels, "on different labels"),
        ("data.weight", config.data.weight, first.data.weight, "with different weights of the same rows"),
        ("data.missing_labels", config.data.missing_labels, first.data.missing_labels, "with and without null labels"),
        ("data.user", *users, "over different groups of rows"),
    ):
        if own != other:
            raise ConfigError(
                f"{key} is not the same in all settings, which would be scored {how} and cannot be compared; "
                "leave it alone"
            )


def trials_of(settings: Sequence[Setting], configs: Sequence[RunConfig], num_seeds: int) -> list[Trial]:
    """The runs of each setting: with the seed of its run description and those that follow it."""
    found = []
    for setting, config in zip(settings, configs, strict=True):
        plain = to_plain(config)
        del plain["output"]
        seeds = range(config.seed, config.seed + num_seeds)
        found += [Trial(setting, seed, {**plain, "seed": seed}) for seed in seeds]
    return found
