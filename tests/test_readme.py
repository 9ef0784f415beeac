"""The README against the project: every key, command, name, path and test that it mentions is there."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from torchx.specs import materialize_appdef

from launch import components
from trainer.cli import parser
from trainer.config import RunConfig
from trainer.description import apply_override, build, load
from trainer.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 600

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINER = "-m trainer "
COMPONENT = re.compile(r"(?:launch/components\.py:|shardrec\.)(\w+) (.*)")

# What commands make and what stands for a file of the reader's own.
MADE = ("data/", "runs/", "../shared/", "checkpoints/", "tensorboard/", "stacks/", "trainer/0")
OF_THE_READER = {"clicks.toml", "RUN.toml", "frappe.toml"}
OF_A_RUN = {"run.json", "plan.json", "result.json", "metrics.jsonl", "manifest.json"}


class Key(NamedTuple):
    """One key of the run description."""

    name: str
    default: Any
    """As plain TOML data; None for none, ``dataclasses.MISSING`` where the key must be given."""

    choices: tuple[str, ...]
    """The words that are allowed, where only some are."""


def keys_of(section: type[Any], prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in dots; ``[]`` is one of a list and ``*`` any place that has a schedule."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        hint, name = hints[item.name], prefix + item.name
        inner = next((part for part in parts_of(hint) if dataclasses.is_dataclass(part)), None)
        if inner is None:
            yield Key(name, default_of(item), choices_of(hint))
        elif item.name == "schedule":
            yield from keys_of(typing.cast("type[Any]", inner), "*.schedule.")
        else:
            many = "[]." if typing.get_origin(hint) is tuple else "."
            yield from keys_of(typing.cast("type[Any]", inner), name + many)


def parts_of(hint: Any) -> list[Any]:
    """A type and, where it is a union or a tuple, the types in it."""
    inner = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple) else ()
    return [hint, *(part for each in inner for part in parts_of(each))]


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A field's default as TOML has it."""
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return list(value) if isinstance(value, tuple) else value


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words of the literal in a type."""
    literals = [part for part in parts_of(hint) if typing.get_origin(part) is Literal]
    return tuple(word for literal in literals for word in typing.get_args(literal))


def blocks(*languages: str) -> Iterator[str]:
    """The code blocks in some languages."""
    yield from (text for language, text in BLOCK.findall(README) if language in languages)


def commands() -> Iterator[str]:
    """The lines of the README that a reader may type, without the prompt."""
    yield from (line for text in blocks("sh") for line in text.splitlines() if line[:1] not in ("", "#"))
    yield from (line[2:] for text in blocks("console") for line in text.splitlines() if line.startswith("$ "))
    yield from (word for word in code_in(README) if " " in word)


def table(first_header: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column has this header."""
    lines = README.split(f"| {first_header} |", 1)[1].splitlines()[2:]
    rows = lines[: next(place for place, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def code_in(text: str) -> list[str]:
    """The words in backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def documented_keys() -> dict[str, list[str]]:
    """Key to its default and meaning, as the table of keys has them."""
    pairs = [(name, row[1:]) for row in table("key | default") for name in code_in(row[0])]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


KEYS = list(keys_of(RunConfig))


def test_the_table_of_keys_has_every_key_and_no_other() -> None:
    assert set(documented_keys()) == {key.name for key in KEYS}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_key_is_documented_with_its_default_and_all_its_choices(key: Key) -> None:
    default, meaning = documented_keys()[key.name]
    assert default == "needed" if key.default is dataclasses.MISSING else value_of(default) == key.default
    words = {*code_in(meaning), default.strip('`"')}
    assert not set(key.choices) - words


def value_of(cell: str) -> Any:
    """The TOML value in a cell, None in an empty one."""
    return tomllib.loads(f"value = {cell.strip('`')}")["value"] if cell.startswith("`") else None


def test_every_model_is_documented_with_all_its_options() -> None:
    from models import MODELS, options_of

    rows = table("model")
    assert {name.strip("`"): set(code_in(options)) for name, _, options in rows} == {
        name: set(options_of(name)) for name in MODELS
    }


@pytest.mark.parametrize("text", [*blocks("toml")])
def test_run_descriptions_are_right(text: str) -> None:
    run = build(RunConfig, tomllib.loads(text))
    assert run.output in README


def description_named(name: str) -> dict[str, Any]:
    """The run description behind a name in a command: a shipped one, else the README's own."""
    path = ROOT / name
    return tomllib.loads(path.read_text(encoding="utf-8") if path.is_file() else next(blocks("toml")))


def trainer_commands() -> list[str]:
    """What the trainer is given by the README's commands, through whatever launcher."""
    found = []
    for line in commands():
        if TRAINER in line:
            found.append(line.split(TRAINER, 1)[1])
        if component := COMPONENT.search(line):
            app = materialize_appdef(getattr(components, component[1]), shlex.split(component[2]))
            found.append(app.roles[0].args[1].split(TRAINER, 1)[1])
    return found


@pytest.mark.parametrize("command", trainer_commands())
def test_every_command_is_one_that_the_trainer_parses(command: str) -> None:
    arguments = parser().parse_args(shlex.split(command, comments=True))
    if arguments.command == "train":
        data = description_named(str(arguments.config))
        for override in arguments.overrides:
            apply_override(data, override)
        build(RunConfig, data)


def test_overrides_in_the_text_fit_a_shipped_run() -> None:
    overrides = [word.removeprefix("--set ").strip("'") for word in code_in(README) if word.startswith("--set ")]
    overrides = [word for word in overrides if word != "key=value"]
    assert overrides
    load(ROOT / "launch" / "runs" / "deepfm.toml", overrides)


def test_every_command_of_the_trainer_is_shown() -> None:
    known = re.findall(r"^    (\S+)", parser().format_help(), re.MULTILINE)
    assert {shlex.split(command)[0] for command in trainer_commands()} == set(known)


def test_every_target_of_make_is_one() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"install", "train", "test"} <= used <= targets


def test_what_is_installed_by_hand_are_extras_and_the_pinned_torchrec() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", README):
        assert extra in project["optional-dependencies"]
    assert re.findall(r"--no-deps (torchrec==\S+)", README) == [
        requirement for requirement in project["optional-dependencies"]["cuda"] if requirement.startswith("torchrec")
    ]


def named_tests() -> list[str]:
    """The tests that the README says prove something."""
    return [word for word in code_in(README) if "::" in word]


@pytest.mark.parametrize("name", named_tests())
def test_every_test_that_is_named_exists(name: str) -> None:
    path, function = name.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_guarantee_has_a_test() -> None:
    rows = table("guarantee")
    assert [code_in(row[1]) for row in rows] == [[name] for name in named_tests()]


def paths_named() -> list[str]:
    """Words of the README that are paths of the project: with a folder, or with the ending of a file."""
    words = set(re.split(r"[\s`'\"(),;:=]+", README))
    rooms = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    own = {word for word in words if re.fullmatch(r"[\w./-]+", word) and not word.startswith(MADE)}
    named = {word for word in own if word.startswith(rooms) or re.search(r"\.(py|toml|json|jsonl|md)$", word)}
    return sorted(named - OF_THE_READER - OF_A_RUN)


@pytest.mark.parametrize("name", paths_named())
def test_every_path_exists(name: str) -> None:
    assert any((folder / name).exists() for folder in (ROOT, ROOT / "trainer"))


def test_keys_of_metrics_are_those_that_the_code_writes() -> None:
    files = [ROOT / "trainer" / f"{name}.py" for name in ("loop", "metrics", "evaluation", "report", "occupancy")]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    named = {word for row in table("key in `metrics.jsonl`") for word in code_in(row[0])}
    words = {re.sub(r"^\*_(possible_)?|_\*$|/.*", "", word) for word in named}
    assert not {word for word in words if not re.search(rf"[\"_}}]{word}[\"/]", code)}
    written = re.findall(r'numbers\["(\w+)"\]|report\[f"\{prefix\}_(\w+)"\]|values\["(\w+)"\]', code)
    assert {next(filter(None, each)) for each in written} <= words


def test_the_first_mistake_that_is_quoted_says_what_is_written() -> None:
    quoted = re.findall(r"^error: (.*)$", README, re.MULTILINE)
    data = tomllib.loads(next(blocks("toml")))
    apply_override(data, "data.epoch=3")
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, data)
    assert quoted[0] == str(caught.value)


def test_it_is_short_and_names_no_host() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert not re.search("https?://", README)
