"""Replace functions of a framework in every module that imported them by name, and restore them."""

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
    """Replace functions in every loaded module of a package; later imports get the replacements too.

    Args:
        functions: name -> (the package's function, its replacement).

    Returns:
        A function that restores the originals, also in modules loaded since.
    """
    for name, (theirs, ours) in functions.items():
        _swap(package, name, theirs, ours)

    def undo() -> None:
        for name, (theirs, ours) in functions.items():
            _swap(package, name, ours, theirs)

    return undo
