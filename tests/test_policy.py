"""The rules that hold for every file: which way imports go, how long things may be, what they may be called."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("trainer", "models", "launch", "benchmarks", "tests")

# A module imports only modules to its left.
ORDER = (
    "errors",
    "environment",
    "remote",
    "location",
    "peers",
    "rendezvous",
    "world",
    "lock",
    "ending",
    "recipe",
    "guard",
    "boundary",
    "config",
    "description",
    "machines",
    "device",
    "rows",
    "columns",
    "dataset",
    "schema",
    "order",
    "crosses",
    "kernels",
    "bag_kernels",
    "lookup_kernels",
    "threads",
    "idmap",
    "admission",
    "data",
    "prefetch",
    "batch",
    "pooling",
    "sequences",
    "lengths",
    "spaces",
    "exchange",
    "vocabulary",
    "mapping",
    "tables",
    "losses",
    "task",
    "optim",
    "allocation",
    "lookup",
    "sharder",
    "sharding",
    "planning",
    "plan_text",
    "state",
    "host_copies",
    "growth",
    "occupancy",
    "metrics",
    "predictions",
    "scores",
    "by_label",
    "feed",
    "evaluation",
    "manifest",
    "plain",
    "sealing",
    "storage",
    "contents",
    "checkpoint",
    "saving",
    "digest",
    "report",
    "table_diagnostics",
    "diagnostics",
    "records",
    "charts",
    "page",
    "run",
    "continuing",
    "loop",
    "inspection",
    "interchange",
    "graph",
    "artifact",
    "scorer",
    "watch",
    "serve",
    "saved_model",
    "export",
    "plots",
    "click_model",
    "splits",
    "sample_data",
    "prepare",
    "prepare_columns",
    "prepare_blocks",
    "prepare_sources",
    "prepare_splits",
    "prepare_vocabulary",
    "prepare_statistics",
    "census",
    "behaviors",
    "prepare_pieces",
    "prepare_passes",
    "prepare_tables",
    "frappe",
    "proposal",
    "predict",
    "doctor",
    "commands",
    "serving_commands",
    "grid",
    "trials",
    "comparison",
    "sweep",
    "notebook",
    "data_commands",
    "viewing",
    "view_cli",
    "cli",
    "__main__",
)

# What a room may import besides the standard library.
MAY_IMPORT = {"models": {"models", "torch"}, "launch": {"launch", "torchx"}}
NEVER_IMPORTED_BY_TRAINER = {"launch", "benchmarks", "tests"}

# `python -m trainer --help` imports these, and has half a second.
LIGHT = (
    *("errors", "remote", "location", "config", "description", "doctor", "data_commands", "serve", "cli"),
    "__main__",
)
HEAVY = {
    "torch",
    "torchrec",
    "torchx",
    "fbgemm_gpu",
    "pyarrow",
    "sklearn",
    "scipy",
    "tensorboard",
    "matplotlib",
    "fsspec",
}

FORBIDDEN_NAMES = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
MACHINE_PATHS = tuple(f"/{name}/" for name in ("work", "root", "home"))
UNFINISHED = tuple(first + second for first, second in (("TO", "DO"), ("FIX", "ME"), ("XX", "X")))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Modules that are tested in the file of the module that they belong to.
TESTED_IN = {
    "__main__": "test_cli.py",
    "errors": "test_cli.py",
    "data_commands": "test_prepare_tables.py",
    "prepare_blocks": "test_prepare_sources.py",
    "prepare_columns": "test_prepare_sources.py",
    "prepare_vocabulary": "test_prepare_tables.py",
    "machines": "test_planning.py",
    "plan_text": "test_planning.py",
    "charts": "test_page.py",
    "records": "test_page.py",
    "scores": "test_page.py",
    "serving_commands": "test_serve.py",
    "table_diagnostics": "test_diagnostics.py",
    "view_cli": "test_viewing.py",
}


def modules(*rooms: str) -> list[Path]:
    """The Python files of some rooms, relative to the root."""
    return sorted(path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a tree imports; ``from a import b`` gives a.b.

    Without ``lazy`` only those that run when the module is loaded: not inside functions, not for type checkers.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it goes"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not is_deferred(node):
            yield from imports_of(node, lazy=lazy)


def is_deferred(node: ast.AST) -> bool:
    """Whether what is below a node does not run when its module is loaded."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def within(room: str, names: Iterator[str]) -> set[str]:
    """The modules of ``room`` among dotted names: trainer.batch.Batch is batch."""
    return {name.split(".")[1] for name in names if name.startswith(f"{room}.")}


def checked_in() -> list[Path]:
    """Files that are or would be committed, relative to the root; all that are not hidden where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        return [Path(line) for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.parts[:-1])]


@pytest.mark.parametrize("path", modules("trainer"), ids=str)
def test_a_trainer_module_imports_only_modules_above_it(path: Path) -> None:
    if path.stem == "__init__":  # what it offers is loaded when it is asked for
        eager = {name.split(".")[0] for name in imports_of(parsed(path), lazy=False)}
        assert not eager - set(sys.stdlib_module_names)
        assert within("trainer", imports_of(parsed(path))) == {"notebook"}
        return
    assert path.stem in ORDER, f"{path} is not in the order of modules; give it its place in {__file__}"
    wrong = within("trainer", imports_of(parsed(path))) - set(ORDER[: ORDER.index(path.stem)])
    assert not wrong, f"{path} imports {sorted(wrong)}, which the order of modules does not place above it"


@pytest.mark.parametrize("path", modules(*MAY_IMPORT), ids=str)
def test_models_import_torch_only_and_launch_torchx_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(parsed(path))}
    assert not roots - set(sys.stdlib_module_names) - MAY_IMPORT[path.parts[0]]


def test_modules_of_models_do_not_import_each_other_in_a_circle() -> None:
    graph = {path.stem: within("models", imports_of(parsed(path))) for path in modules("models")}
    graph.pop("__init__")
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", modules("trainer"), ids=str)
def test_the_trainer_does_not_know_its_launcher_benchmarks_or_tests(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(parsed(path))} & NEVER_IMPORTED_BY_TRAINER


@pytest.mark.parametrize("module", LIGHT)
def test_the_command_line_loads_no_heavy_library_before_it_needs_it(module: str) -> None:
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        names = list(imports_of(parsed(Path("trainer") / f"{name}.py"), lazy=False))
        heavy = {imported.split(".")[0] for imported in names} & HEAVY
        assert not heavy, f"trainer/{name}.py imports {sorted(heavy)} at module level, and {module} imports it"
        waiting |= within("trainer", iter(names)) - seen


@pytest.mark.parametrize("path", modules("trainer"), ids=str)
def test_only_world_reads_who_this_rank_is(path: Path) -> None:
    words = {node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant)}
    assert path.stem == "world" or not words & RANK_VARIABLES


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_a_file_has_at_most_400_lines_and_a_function_60(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    functions = (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f.name: n for f in functions if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long, f"{path}: lines by function {long}, at most {MAX_FUNCTION_LINES}"


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_nothing_is_called_utils_common_base_or_helpers(path: Path) -> None:
    assert not {part.removeprefix("test_") for part in path.with_suffix("").parts} & FORBIDDEN_NAMES


@pytest.mark.parametrize("path", modules("trainer", "models", "launch"), ids=str)
def test_every_module_class_and_public_function_has_a_docstring(path: Path) -> None:
    tree = parsed(path)
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bare = {
        node.name
        for parent in ast.walk(tree)
        if isinstance(parent, ast.Module | ast.ClassDef)
        for node in parent.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    }
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    assert not bare, f"{path}: {sorted(bare)} do not say what they do"


@pytest.mark.parametrize("path", [path for path in modules("trainer") if path.stem != "__init__"], ids=str)
def test_every_trainer_module_has_a_file_of_tests(path: Path) -> None:
    assert (ROOT / "tests" / TESTED_IN.get(path.stem, f"test_{path.stem}.py")).is_file()


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {str(path): place for path, text in texts() for place in MACHINE_PATHS if place in text}
    assert not found


def test_nothing_is_left_for_later() -> None:
    found = {str(path): word for path, text in texts() if path.suffix == ".py" for word in UNFINISHED if word in text}
    assert not found


def texts() -> Iterator[tuple[Path, str]]:
    """(path, text) of every file to be committed that is UTF-8."""
    for path in checked_in():
        try:
            yield path, (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not a text
            continue
