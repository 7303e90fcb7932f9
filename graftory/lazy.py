"""Names of a package that are imported when they are first used, so that nobody waits for what is not asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__`. No name may be that of a submodule: importing that would put it in its place.

    Args:
        package: The package's own name.
        homes: The module in which each name is defined.
    """

    def find(name: str) -> object:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
