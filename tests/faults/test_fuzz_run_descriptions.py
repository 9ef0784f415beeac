"""Run descriptions that no one would write: each is refused in one line, or is one that trains."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from tests.command_line import call
from tests.faults.amount import at_most, examples
from tests.small_data import run_plain, write_click_log
from tests.test_readme import KEYS, Key
from trainer.commands import check_model
from trainer.config import RunConfig, to_plain
from trainer.description import build, load
from trainer.errors import ConfigError
from trainer.state import build_model

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "launch" / "runs").glob("*.toml"))]
MINIMAL = """
model = { kind = "fm", linear = "projection" }
tables = [{ name = "t", features = ["f*"] }]
data = { train = ["a.parquet"] }
"""
WHOLE = [tomllib.loads(text) for text in (*SHIPPED, MINIMAL)]

INTEGERS = [0, 1, -1, 2, 3, 7, 1000, 2**16, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), 10**400]


@dataclasses.dataclass(frozen=True)
class Written:
    """A value as the file has it."""

    text: str


ODD = [Written(text) for text in ("0x" + "f" * 5000, "1e400", "-nan", "0b1", "1_0", "'''a\nb'''", '"\\U0001F600"')]
"""The first has more digits than Python prints."""

NUMBERS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e30, 1e308, math.inf, -math.inf, math.nan]
WORDS = [
    *("", " ", "*", "**", "?", "[", "[!]", "[z-a]", "a/b", "..", "/", "~", "-", "%s", "{}", "\\", "'", '"', "#"),
    *("\0", "a\nb", "\x1b[31m", "ünïcödé", "\u202e", "𝔣", "x" * 500, "true", "nan", "1", "click", "f0", "d0"),
    *("deepfm", "dcnv2", "lr", "exact", "identity", "lfu", "adam", "row_wise", "data_parallel", "linear", "mean"),
]
MOMENTS = [datetime.date(2020, 2, 29), datetime.time(23, 59), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)]

scalars = st.one_of(
    st.sampled_from([*INTEGERS, *ODD]),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(MOMENTS),
    st.booleans(),
    st.integers(-10, 100),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*WORDS, "kind"]), inner, max_size=3),
    max_leaves=6,
)
KNOWN = [key.name.replace("*", "dense_optimizer").replace("[]", ".0").split(".") for key in KEYS]
"""Every key of a run description as a path."""


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of plain data, but for the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


def holder(plain: dict[str, Any], path: tuple[Any, ...] | list[str]) -> Any:
    """What holds the last key of a path; sections that are not there are made, and None where that cannot be."""
    place: Any = plain
    for key in path[:-1]:
        if isinstance(place, dict):
            place = place.setdefault(key, {})
        elif isinstance(place, list) and str(key).isdecimal() and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return place


@st.composite
def mutated(draw: st.DrawFn, whole: list[dict[str, Any]]) -> dict[str, Any]:
    """A run description with one to four changes: values of known keys and of others, deleted, doubled, renamed."""
    plain = copy.deepcopy(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["set", "set", "set", "replace", "delete", "double", "rename", "wrap"]))
        paths = list(paths_in(plain))
        path = draw(st.sampled_from(KNOWN if kind == "set" or not paths else paths))
        place, key = holder(plain, path), path[-1]
        if kind in ("set", "replace"):
            if isinstance(place, dict) or (isinstance(place, list) and isinstance(key, int)):
                place[key] = draw(junk)
        elif kind == "delete":
            del place[key]
        elif kind == "double" and isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        elif kind == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from([*WORDS, f"{key}s", str(key)[:-1]]))] = place.pop(key)
        elif kind == "wrap":
            place[key] = draw(st.sampled_from([[place[key]], {"x": place[key]}, [[[place[key]]]]]))
    return plain


def toml(value: Any) -> str:
    """Plain data as a value of TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Written):
        return value.text
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write(path: Path, plain: dict[str, Any]) -> Path:
    path.write_text("".join(f"{toml(key)} = {toml(value)}\n" for key, value in plain.items()), encoding="utf-8")
    return path


def read(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig | None:
    """The run description, or None where it is refused in one line that can be read."""
    try:
        with at_most(30):
            config = load(path, overrides)
            check_model(config)
            with torch.device("meta"):
                build_model(config, num_dense=2)
    except ConfigError as error:
        line = " ".join(str(error).split())
        assert 10 < len(line) < 6000, line
        line.encode()
        return None
    return config


def check(config: RunConfig) -> None:
    """It goes through JSON, as into a checkpoint, and has no number that means nothing."""
    plain = to_plain(config)
    assert build(RunConfig, json.loads(json.dumps(plain))) == config
    for path in paths_in(plain):
        value = holder(plain, path)[path[-1]]
        assert not isinstance(value, float) or math.isfinite(value) or path[-1] in ("low", "high"), path
        assert not isinstance(value, int) or abs(value) <= 1 << 63, path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write run descriptions to."""
    return tmp_path_factory.mktemp("descriptions") / "run.toml"


@examples(400, 20_000)
@given(mutated(WHOLE))
def test_a_mutated_description_is_refused_in_one_line_or_right(place: Path, plain: dict[str, Any]) -> None:
    write(place, plain)
    config = read(place)
    if config is not None:
        check(config)


edits = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["put", "drop", "double"]), st.binary(max_size=4)),
    min_size=1,
    max_size=5,
)


@examples(300, 30_000)
@given(st.sampled_from([*SHIPPED, MINIMAL]), edits)
def test_a_file_of_changed_bytes_is_refused_in_one_line_or_right(
    place: Path, text: str, changes: list[tuple[int, str, bytes]]
) -> None:
    content = bytearray(text.encode())
    for number, kind, more in changes:
        at = number % max(1, len(content))
        if kind == "put":
            content[at : at + len(more)] = more
        elif kind == "drop":
            del content[at : at + 1 + number % 50]
        else:
            content[at:at] = content[at : at + 1 + number % 200]
    place.write_bytes(content)
    config = read(place)
    if config is not None:
        check(config)


OVERRIDES = [".".join(path) for path in KNOWN]


@examples(300, 20_000)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(OVERRIDES) | st.text("abz.[]0²٣-", max_size=12) | st.just("model" + ".x" * 300),
            scalars.map(lambda value: value if isinstance(value, str) else toml(value)) | junk.map(toml),
        ).map("=".join),
        max_size=3,
    )
)
def test_any_override_is_refused_in_one_line_or_right(place: Path, overrides: list[str]) -> None:
    place.write_text(MINIMAL, encoding="utf-8")
    config = read(place, tuple(overrides))
    if config is not None:
        check(config)


@pytest.mark.parametrize(
    "text",
    [
        "seed = 1\nseed = 2\n",
        "a" + ".a" * 5000 + " = 1\n",
        MINIMAL + "rename" + ".a" * 5000 + " = 1\n",
        MINIMAL.replace("linear =", "linear" + ".a" * 3000 + " ="),
        "seed = " + "[" * 5000,
        "seed = " + "9" * 5000 + "\n",
        "seed = 0x" + "f" * 5000 + "\n",
        "seed = [0x" + "f" * 5000 + "]\n",
        "seed = 2020-13-45T99:99:99\n",
        'output = "\\ud800"\n',
        "\ufeff" + MINIMAL,
        "\0" * 100,
    ],
    ids=range(12),
)
def test_a_file_made_to_break_the_reader_is_one_line(place: Path, text: str) -> None:
    place.write_text(text, encoding="utf-8")
    assert read(place) is None


# What is accepted, trained


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A click log."""
    directory = tmp_path_factory.mktemp("log")
    write_click_log(directory, rows=64, row_group_size=20)
    return directory


def small(directory: Path, **table: Any) -> dict[str, Any]:
    """A run of a few steps on it."""
    plain = run_plain(directory, max_steps=3, data={"global_batch_size": 16, "streams": 2}, checkpoint={"keep": 2})
    for each in plain["tables"]:
        each |= table
    return plain


FEW = [-1, 0, 1, 2, 3, 5, 64, 100, 2**16, 2**20, 2**24, 2**63 - 1]
MODELS = {
    "kind": ["lr", "fm", "dnn", "deepfm", "dcn", "dcnv2", "wide_deep", "deepfn"],
    "hidden": [[], [1], [4, 2], [2**20, 2**20], [0], ["4"], 4],
    "linear": ["table", "projection", "none", 1],
    "activation": ["relu", "prelu", "dice", "gelu", "silu", "sin"],
    "dropout": [0, 0.5, 0.999, 1, -0.1],
    "batch_norm": [True, False, 1],
    "cross_layers": [1, 3, 0, 10**6],
    "rank": [1, 2, 10**6],
    "structure": ["parallel", "stacked", ""],
}


def values_for(key: Key) -> st.SearchStrategy[Any]:
    """Values of the right kind, most of them allowed, for one key of a run description."""
    if key.choices:
        words = st.sampled_from(key.choices)
        return words if isinstance(key.default, str) else st.lists(words, max_size=3)
    if isinstance(key.default, bool):
        return st.booleans()
    if isinstance(key.default, int):
        return st.sampled_from(FEW)
    if isinstance(key.default, float) or key.name.split(".")[-1] in ("mean", "std", "low", "high", "null"):
        return st.sampled_from(NUMBERS) | st.floats(0, 1)
    return st.sampled_from(
        ["", "click", "f0", "user_id", "m0", "d0", "d1", ["f0"], ["f*"], ["d*"], [0.5, 0.25], [0.0, 1.0]]
    )


FIXED = ("output", "train", "validation", "test", "sketch_width", "memory_gib")
TUNED = [key for key in KEYS if key.name.split(".")[-1] not in FIXED]


@examples(30, 600)
@given(st.data())
def test_a_mutated_run_trains_or_is_refused_in_one_line(log: Path, data: st.DataObject) -> None:
    plain = data.draw(st.sampled_from([small(log), small(log, ids="exact", rows=50)]))
    plain["output"], plain["sharding"] = str(log / "run"), {"memory_gib": 0.05}
    for key in data.draw(st.lists(st.sampled_from(TUNED), min_size=1, max_size=4)):
        value = data.draw(values_for(key), label=key.name)
        for table in (
            "01" if key.name.startswith("tables[].optimizer") else data.draw(st.sampled_from(["0", "1", "01"]))
        ):
            path = key.name.replace("*", "dense_optimizer").replace("[]", f".{table}").split(".")
            place = holder(plain, path)
            if isinstance(place, dict):
                place[path[-1]] = value
    options = data.draw(st.lists(st.sampled_from(sorted(MODELS)), max_size=2, unique=True))
    if isinstance(plain["model"], dict):
        plain["model"] |= {name: data.draw(st.sampled_from(MODELS[name]), label=name) for name in options}
    shutil.rmtree(log / "run", ignore_errors=True)
    with at_most(30):
        outcome = call("train", write(log / "run.toml", plain))
    event("trained" if outcome.code == 0 else "refused: " + outcome.errors.splitlines()[-1][:40])
    if outcome.code:
        assert len(outcome.complaint) > 20
