"""The dense part of an exported model, from a file of ``torch.export.save``: JSON and bytes, run node by node.

A copy of this file lies in every export: it imports torch alone. ``torch.export.load`` reads the same file, but imports
1,200 modules for it (two compilers and computer algebra: 2.6 s of processor time), unpickles what the file tells it to,
and evaluates sizes as Python. Here nothing is unpickled or evaluated, and no operator is run but those listed.
"""

from __future__ import annotations

import json
import operator
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SCHEMA = 8
"""The major version of ``torch._export.serde.schema`` that this reads."""

_TYPES = {
    **{4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64},
    **{12: torch.bool, 13: torch.bfloat16},
}
_STRIDED = 7
_WORDS = {"constant", "none", "tanh"}
"""What ``pad`` and ``gelu`` may be told."""

_PLAIN = {"as_int", "as_ints", "as_bool", "as_bools"}
_NAMED = {"as_tensor", "as_sym_int", "as_sym_bool", "as_optional_tensor"}
_LISTS = {"as_tensors": "as_tensor", "as_sym_ints": "as_sym_int", "as_optional_tensors": "as_optional_tensor"}

_SIZES = re.compile(r"_operator\.(add|sub|mul|floordiv|mod|eq|ge|le|gt|lt)")
_ATEN = re.compile(
    r"torch\.ops\.aten\.(add|addcmul|arange|bitwise_not|bmm|cat|chunk|clamp|clone|div|embedding|expand|flatten|"
    "floor_divide|gelu|index|index_copy|index_select|layer_norm|leaky_relu|lerp|lift_fresh_copy|linear|logsumexp|lt|"
    "masked_fill|matmul|mul|neg|new_zeros|nonzero|ones_like|pad|prelu|relu|reshape|rsqrt|rsub|"
    "scaled_dot_product_attention|select|sigmoid|silu|slice|softmax|split_with_sizes|square|squeeze|stack|sub|sum|"
    r"sym_size|t|tanh|to|transpose|triu_indices|unbind|unflatten|unsqueeze|view|view_as)\.(\w+)"
)
"""What our models are made of; none reads or writes a file, or memory that it is not given."""


class GraphError(ValueError):
    """A file is no graph, or has more in it than arithmetic on tensors: says what."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A value that was given, or that an earlier node gave."""

    name: str


@dataclass(frozen=True, slots=True)
class _Node:
    """A call, and what its results are called; values that no later node reads are let go after it."""

    call: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[str]
    is_one: bool
    """Whether the call returns its only result, not a list."""

    last: tuple[str, ...] = ()


class Graph:
    """A function of tensors."""

    def __init__(self, described: Mapping[str, Any], known: Mapping[str, Tensor]) -> None:
        """``described``: as the file has it; ``known``: inputs that are in the file."""
        names = [_name(part) for part in described["inputs"]]
        self._known = dict(known)
        self._given = [name for name in names if name not in known]
        self._results = [_argument(part) for part in described["outputs"]]
        nodes = [_node(part) for part in described["nodes"] if part["outputs"]]  # one without results asserts
        self._nodes = _letting_go(nodes, {*self._known, *_names_in(self._results)})

    def __call__(self, *given: Tensor) -> Tensor:
        """The only result."""
        (result,) = self.run(given)
        return result

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """All results."""
        values: dict[str, Any] = {**self._known, **dict(zip(self._given, given, strict=True))}
        for node in self._nodes:
            found = node.call(
                *(_value(part, values) for part in node.args),
                **{name: _value(part, values) for name, part in node.kwargs.items()},
            )
            if node.is_one:
                values[node.results[0]] = found
            else:
                values.update(zip(node.results, found, strict=True))
            for name in node.last:
                del values[name]
        return [_value(part, values) for part in self._results]


def read_graph(path: Path) -> Graph:
    """The graph in a file of ``torch.export.save``.

    Raises:
        GraphError: it is none, damaged, or has more in it than arithmetic on tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _graph_in(archive)
    except GraphError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise GraphError(f"is no graph of torch.export, or damaged: {error}") from error


def _graph_in(archive: zipfile.ZipFile) -> Graph:
    root = archive.namelist()[0].partition("/")[0]
    model = json.loads(archive.read(f"{root}/models/model.json"))
    version = model["schema_version"]["major"]
    if version != _SCHEMA or archive.read(f"{root}/byteorder").decode() != sys.byteorder:
        raise GraphError(f"has schema {version} of torch.export, or another byte order; expected {_SCHEMA}")
    tensors = _tensors(archive, f"{root}/data/weights", "model_weights_config.json")
    tensors |= _tensors(archive, f"{root}/data/constants", "model_constants_config.json")
    signature = model["graph_module"]["signature"]
    known = {}
    for part in signature["input_specs"]:
        ((kind, spec),) = part.items()
        if kind != "user_input":
            known[spec["arg"]["name"]] = tensors[spec[f"{kind}_name"]]
    if any([*part] != ["user_output"] for part in signature["output_specs"]):
        raise GraphError("changes what it is given; expected results only")
    return Graph(model["graph_module"]["graph"], known)


def _tensors(archive: zipfile.ZipFile, folder: str, config: str) -> dict[str, Tensor]:
    """The tensors of one folder of the archive, by name."""
    found = {}
    for name, entry in json.loads(archive.read(f"{folder}/{config}"))["config"].items():
        if entry["use_pickle"]:
            raise GraphError(f"has {name!r} as a pickle, which holds more than arithmetic on tensors")
        described = entry["tensor_meta"]
        content = bytearray(archive.read(f"{folder}/{entry['path_name']}"))
        dtype = _TYPES[described["dtype"]]
        # in memory of torch's own, aligned as the model's was: products of matrices round differently elsewhere
        flat = torch.frombuffer(content, dtype=dtype).clone() if content else torch.empty(0, dtype=dtype)
        sizes, strides = ([int(part["as_int"]) for part in described[key]] for key in ("sizes", "strides"))
        found[name] = flat.as_strided(sizes, strides, int(described["storage_offset"]["as_int"]))
    return found


def _node(part: Mapping[str, Any]) -> _Node:
    outputs = part["outputs"]
    is_list = len(outputs) == 1 and "as_tensors" in outputs[0]
    results = [each["name"] for each in outputs[0]["as_tensors"]] if is_list else [_name(each) for each in outputs]
    args = [_argument(each["arg"]) for each in part["inputs"] if each["kind"] == 1]
    kwargs = {each["name"]: _argument(each["arg"]) for each in part["inputs"] if each["kind"] != 1}
    call = _operator(part["target"])
    return _Node(call, args, kwargs, results, is_one=len(outputs) == 1 and not is_list and call is not _scan)


def _operator(target: str) -> Callable[..., Any]:
    if found := _ATEN.fullmatch(target):
        overloads = getattr(torch.ops.aten, found[1])
        if found[2] in overloads.overloads():
            return getattr(overloads, found[2])
    if found := _SIZES.fullmatch(target):
        return getattr(operator, found[1])
    if target == "torch.ops.higher_order.scan":
        return _scan
    raise GraphError(f"has the operator {target}, which is not among those of our models")


def _scan(step: Graph, carried: list[Tensor], given: list[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """What is carried in the end, then what each step gave besides, stacked; steps go along the first dimension."""
    number, kept = len(carried), []
    for parts in zip(*(each.unbind(0) for each in given), strict=True):
        found = step.run([*carried, *parts, *more])
        carried = found[:number]
        kept.append(found[number:])
    return [*carried, *(torch.stack(column) for column in zip(*kept, strict=True))]


def _argument(part: Mapping[str, Any]) -> Any:
    """What an operator is given: plain, or the name of it."""
    ((kind, value),) = part.items()
    if kind in _PLAIN:
        return value
    if kind in _NAMED:
        return _Name(value["name"]) if "name" in value else _inner(value)
    if kind in _LISTS:
        return [_argument({_LISTS[kind]: each}) for each in value]
    if kind == "as_string" and value in _WORDS:
        return value
    if kind == "as_float":
        return float(value)  # infinity is a string there
    if kind == "as_none":
        return None
    if kind == "as_scalar_type":
        return _TYPES[value]
    if kind == "as_device" and value["type"] == "cpu":
        return torch.device("cpu")
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    if kind == "as_graph":
        return Graph(value["graph"], {})
    raise GraphError(f"has {kind} {str(value)[:40]!r}, which holds more than arithmetic on tensors")


def _inner(value: Mapping[str, Any]) -> Any:
    """Of what may be a name or a value."""
    ((kind, inner),) = value.items()
    if kind == "as_name":
        return _Name(inner)
    return _argument({kind: inner})


def _name(part: Mapping[str, Any]) -> str:
    found = _argument(part)
    if not isinstance(found, _Name):
        raise GraphError(f"has {str(part)[:40]} where something gets its name")
    return found.name


def _value(part: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(part, _Name):
        return values[part.name]
    return [_value(each, values) for each in part] if isinstance(part, list) else part


def _names_in(part: Any) -> set[str]:
    if isinstance(part, _Name):
        return {part.name}
    return set().union(*(_names_in(each) for each in part)) if isinstance(part, list) else set()


def _letting_go(nodes: Sequence[_Node], kept: set[str]) -> list[_Node]:
    """The same nodes, each with the names that neither a later one nor ``kept`` has."""
    found, needed = [], set(kept)
    for node in reversed(nodes):
        names = {*node.results, *_names_in([*node.args, *node.kwargs.values()])}
        found.append(replace(node, last=tuple(sorted(names - needed))))
        needed |= names
    return found[::-1]
