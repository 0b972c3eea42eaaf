"""Values of explicit trees on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.native import compiled_module
from ..reference import tree as spec
from ..reference.tree import (
    REDUCES,
    TreeArgs,
    at_nodes,
    at_nodes_backward,
    sibling_labels,
    tree_rl,
    tree_rl_backward,
)
from .memory import address, dense

__all__ = [
    "at_nodes", "at_nodes_backward", "path_ends", "sibling_labels", "tree_rl", "tree_rl_backward", "tree_values",
    "tree_values_backward",
]  # fmt: skip


def _module() -> Any:
    return compiled_module()


def path_ends(step: Tensor) -> Tensor:
    step = step.contiguous()
    out = torch.empty_like(step)
    # For a path that never ends, the specification returns a node of its cycle.
    return out if _module().path_ends(len(out), address(step), address(out)) else spec.path_ends(step)


def tree_values(a: TreeArgs) -> tuple[Tensor, Tensor]:
    inputs = [dense(t) for t in (a.parent, a.rewards, a.visits)]  # alive until the call returns
    values, slope = a.rewards.new_empty(a.rewards.shape), a.rewards.new_empty(a.rewards.shape)
    _module().tree_values(
        a.parent.shape[0], *map(address, inputs), REDUCES.index(a.reduce), a.temperature, address(values),
        address(slope),
    )  # fmt: skip
    return values, slope


def tree_values_backward(grad: Tensor, parent: Tensor, slope: Tensor) -> Tensor:
    inputs = [dense(t) for t in (parent, slope, grad)]
    out = slope.new_empty(slope.shape)
    _module().tree_values_backward(parent.shape[0], *map(address, inputs), address(out))
    return out
