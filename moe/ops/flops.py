"""FLOP formulas of the operators for torch's `FlopCounterMode`.

The module of that mode imports Triton, which takes a third of a second. The formulas are therefore registered when
other code imports that module, or immediately if it is already imported.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register_formula(op: Any, formula: Callable[..., int]) -> None:
    """Count a call of any overload of `op` as `formula(*args)` FLOPs."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], op, formula)
    else:
        _formulas[op] = formula


def _register(counter: ModuleType, op: Any, formula: Callable[..., int]) -> None:
    @counter.register_flop_formula(op, get_raw=True)
    def _(*args: Any, out_val: Any = None) -> int:
        return formula(*args)


class _Loader(Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        while _formulas:
            _register(module, *_formulas.popitem())


class _Finder(MetaPathFinder):
    """Import hook that registers the formulas after the counter's module is executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=_Loader(spec.loader))


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
