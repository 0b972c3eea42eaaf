"""Functions of a framework replaced wherever one of its modules has imported them by name, and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def _swap(package: str, name: str, old: Function, new: Function) -> None:
    for path, module in list(sys.modules.items()):
        loaded = isinstance(module, ModuleType) and path.partition(".")[0] == package
        if loaded and vars(module).get(name) is old:
            setattr(module, name, new)


def replace(package: str, functions: Mapping[str, tuple[Function, Function]]) -> Callable[[], None]:
    """Replace functions in every loaded module of a package, and so in those that will import them.

    Args:
        functions: by name, the package's function and the one that takes its place.

    Returns:
        A function that puts them back, in modules loaded since then too.
    """
    for name, (theirs, ours) in functions.items():
        _swap(package, name, theirs, ours)

    def undo() -> None:
        for name, (theirs, ours) in functions.items():
            _swap(package, name, ours, theirs)

    return undo
