"""Trains click-through-rate and ranking models on sharded embedding tables that grow.

From Python: ``from trainer import load_run, train, evaluate, predict``; see ``trainer.notebook``. They are loaded when
they are asked for, as ``python -m trainer --help`` must not wait for torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.notebook import evaluate, load_run, predict, train

__all__ = ["evaluate", "load_run", "predict", "train"]


class _Package(ModuleType):
    """This package: importing its module ``trainer.predict`` must not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from trainer import notebook

        return getattr(notebook, name)


sys.modules[__name__].__class__ = _Package
