"""Package attributes that are imported on first use."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any


def attributes(namespace: dict[str, Any], homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        namespace: globals of the package, in which resolved attributes are stored.
        homes: attribute name -> module that defines it. Submodules need no entry.
    """
    package = namespace["__name__"]

    def find(name: str) -> Any:
        submodule = f"{package}.{name}"
        home = homes.get(name, submodule)
        if name.startswith("_") or importlib.util.find_spec(home) is None:
            from moe.errors import did_you_mean

            hint = "" if name.startswith("_") else did_you_mean(name, namespace.get("__all__", ()))
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}", name=name)
        module = importlib.import_module(home)
        value = module if home == submodule else getattr(module, name)
        namespace[name] = value
        return value

    return find
