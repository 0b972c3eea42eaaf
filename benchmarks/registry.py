"""The registry of cases: filled by the modules of ``benchmarks/cases``, read through ``benchmarks.cases``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .case import AXES, Case, Sizes
from .data import Data


@dataclass(frozen=True)
class _Entry:
    family: str
    op: str
    build: Callable[..., Case]
    variant: str
    axes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_entries: dict[str, _Entry] = {}


def register(
    *variants: str,
    op: str | None = None,
    axes: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a function of :class:`benchmarks.data.Data` as a case of its name, and one more per variant.

    ``gae`` with the variants ``"backward"`` and ``"long"`` is ``gae``, ``gae_backward`` and ``gae_long``.
    """

    def keep(build: Callable[..., Case]) -> Callable[..., Case]:
        name, family = build.__name__, build.__module__.rpartition(".")[2]
        for variant in ("", *variants):
            full = "_".join(part for part in (name, variant) if part)
            assert full not in _entries, full
            _entries[full] = _Entry(family, op or name, build, variant, axes, dtypes)
        return build

    return keep


def names(family: str | None = None) -> tuple[str, ...]:
    """All cases, or those of a family."""
    return tuple(n for n, entry in _entries.items() if family in (None, entry.family))


def families() -> tuple[str, ...]:
    """The families with cases."""
    return tuple(dict.fromkeys(entry.family for entry in _entries.values()))


def op(name: str) -> str:
    """The public name of the op of a case."""
    return _entries[name].op


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes with which a case is timed."""
    return _entries[name].dtypes


def axes(name: str, *, quick: bool = False) -> dict[str, tuple[Any, ...]]:
    """The swept fields of :class:`Sizes` (or ``"dtype"``) of a case, with their values."""
    chosen = {axis: AXES[axis] for axis in _entries[name].axes}
    return {axis: values.quick if quick else values.long for axis, values in chosen.items()}


def make(name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """A case with its data; ``dtype`` is the dtype of its large float inputs."""
    entry = _entries[name]
    return entry.build(Data(name, entry.op, entry.variant, sizes, device, dtype))
