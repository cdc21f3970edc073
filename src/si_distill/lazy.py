"""Public names that are imported when they are first used, so that `import si_distill` need not wait for torch."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

Hooks = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def lazy_names(package: str, homes: dict[str, tuple[str, ...]]) -> Hooks:
    """The module-level `__getattr__`, `__dir__` (PEP 562) and `__all__` of a package whose names live in its modules.

    Args:
        package: the package's `__name__`.
        homes: module, relative to the package → the names that it gives.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{home_of[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    names = sorted(home_of)
    return get, lambda: sorted({*vars(sys.modules[package]), *names}), names
