"""Values of given trees on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.native import compiled_module
from ..reference import tree as spec
from ..reference.tree import at_nodes, at_nodes_backward
from ..tree import REDUCES
from .memory import address, dense

__all__ = ["at_nodes", "at_nodes_backward", "path_ends", "tree_values", "tree_values_backward"]


def _module() -> Any:
    return compiled_module()


def path_ends(step: Tensor) -> Tensor:
    kept = step.contiguous()
    out = torch.empty_like(kept)
    # Where a path never ends, what the specification has there is some node of the cycle.
    return out if _module().path_ends(len(out), address(kept), address(out)) else spec.path_ends(step)


def tree_values(
    parent: Tensor,
    rewards: Tensor,
    visits: Tensor | None,
    reduce: str,
    temperature: float,
    max_depth: int,
) -> tuple[Tensor, Tensor]:
    kept = [dense(t) for t in (parent, rewards, visits)]
    values, slope = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    outs = (address(values), address(slope))
    _module().tree_values(parent.shape[0], *map(address, kept), REDUCES.index(reduce), temperature, *outs)
    return values, slope


def tree_values_backward(grad: Tensor, parent: Tensor, slope: Tensor) -> Tensor:
    kept = [dense(t) for t in (parent, slope, grad)]
    out = slope.new_empty(slope.shape)
    _module().tree_values_backward(parent.shape[0], *map(address, kept), address(out))
    return out
