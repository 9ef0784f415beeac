"""Models of click-through rate as plain PyTorch: tensors in, logits out; no ranks, files or tables.

``build`` makes one from its kind and options; ``models.model.CTRModel`` says what goes in and comes out.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from models.autoint import AutoInt
from models.blocks import MLPOptions
from models.bst import BST
from models.dcn import DCN, DCNv2
from models.deepfm import DeepFM
from models.dien import DIEN
from models.din import DIN
from models.dlrm import DLRM
from models.dnn import DNN
from models.finalmlp import FinalMLP
from models.fm import FM
from models.fnn import FNN
from models.linear import LR
from models.model import CTRModel, Field, LinearSource, Sequences, WithLoss
from models.multitask import ESMM, PLE, MMoE, SharedBottom
from models.options import one_of, unknown
from models.pnn import PNN
from models.wide_deep import WideDeep
from models.xdeepfm import XDeepFM

__all__ = [
    "MODELS",
    "CTRModel",
    "Field",
    "LinearSource",
    "Sequences",
    "WithLoss",
    "build",
    "check_options",
    "linear_source",
    "options_of",
]

MODELS: dict[str, type[CTRModel]] = {
    "lr": LR,
    "fm": FM,
    "dnn": DNN,
    "deepfm": DeepFM,
    "dcn": DCN,
    "dcnv2": DCNv2,
    "wide_deep": WideDeep,
    "din": DIN,
    "dien": DIEN,
    "bst": BST,
    "xdeepfm": XDeepFM,
    "finalmlp": FinalMLP,
    "pnn": PNN,
    "fnn": FNN,
    "autoint": AutoInt,
    "dlrm": DLRM,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "esmm": ESMM,
}

SIZES = ("num_dense", "num_fields", "dim", "fields", "linear_fields", "sequences", "tasks")
"""Constructor arguments that the data and tables decide, not the run description's model section."""


def build(
    kind: str,
    *,
    num_dense: int,
    num_fields: int,
    dim: int,
    fields: Sequence[Field] = (),
    linear_fields: Sequence[Field] = (),
    sequences: Sequence[Field] = (),
    tasks: Sequence[str] = ("click",),
    **options: Any,
) -> CTRModel:
    """Make the model ``kind`` for N dense features and F fields embedded in D columns.

    ``fields``: what the F fields are; ``linear_fields``: those of 1-wide tables; ``sequences``: what is given row by
    row, unpooled; ``tasks``: the labels. Only models whose constructors have these arguments get them.

    Raises:
        ValueError: an unknown kind, an unknown, missing or wrong option; one line that names the nearest right one.
    """
    check_options(kind, options)
    accepted = inspect.signature(MODELS[kind]).parameters
    if len(tasks) > 1 and "tasks" not in accepted:
        raise ValueError(f"model kind {kind!r} predicts one label, and there are {len(tasks)}: {', '.join(tasks)}")
    if sequences and "sequences" not in accepted:
        names = ", ".join(repr(field.feature) for field in sequences)
        raise ValueError(f"model kind {kind!r} reads no sequences, and there are: {names}")
    known = {
        "fields": tuple(fields),
        "linear_fields": tuple(linear_fields),
        "sequences": tuple(sequences),
        "tasks": tuple(tasks),
    }
    given = {name: value for name, value in known.items() if name in accepted}
    return MODELS[kind](num_dense=num_dense, num_fields=num_fields, dim=dim, **given, **options)


def check_options(kind: str, options: Mapping[str, object]) -> None:
    """Raise ValueError if ``kind`` is unknown, does not have one of ``options``, or needs one that is missing.

    Values are checked by ``build``, as some depend on the sizes.
    """
    allowed = options_of(kind)
    for option in options:
        if option not in allowed:
            raise ValueError(unknown(f"option for model kind {kind!r}:", option, allowed))
    for option, required in allowed.items():
        if required and option not in options:
            raise ValueError(f"model kind {kind!r} needs the option {option}")


def options_of(kind: str) -> dict[str, bool]:
    """The options of model ``kind``, each with whether it must be given.

    Raises:
        ValueError: ``kind`` is unknown.

    >>> options_of("fm")
    {'linear': False}
    >>> options_of("dnn")
    {'hidden': True, 'activation': False, 'dropout': False, 'batch_norm': False, 'init': False}
    """
    if kind not in MODELS:
        raise ValueError(unknown("model kind", kind, MODELS))
    allowed: dict[str, bool] = {}
    for name, parameter in inspect.signature(MODELS[kind]).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # the options of the deep part, passed on
            allowed |= {option: option in MLPOptions.__required_keys__ for option in MLPOptions.__annotations__}
        elif name not in SIZES:
            allowed[name] = parameter.default is inspect.Parameter.empty
    return allowed


def linear_source(kind: str, options: Mapping[str, object]) -> LinearSource:
    """Where model ``kind`` with ``options`` takes first-order weights from; only ``"table"`` needs 1-wide tables.

    Raises:
        ValueError: ``kind`` or the option ``linear`` is not right.

    >>> linear_source("deepfm", {"hidden": [64, 32]}), linear_source("deepfm", {"linear": "none"})
    ('table', 'none')
    >>> linear_source("dnn", {})
    'none'
    """
    if kind not in MODELS:
        raise ValueError(unknown("model kind", kind, MODELS))
    sources = MODELS[kind].LINEAR_SOURCES
    if not sources:
        return "none"
    chosen = options.get("linear", sources[0])
    one_of("linear", chosen, sources)
    return sources[[*sources].index(chosen)]  # type: ignore[arg-type]
