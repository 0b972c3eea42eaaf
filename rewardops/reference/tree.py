"""Values of explicit trees, the specification (see :mod:`rewardops.tree`)."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

REDUCES = ("mean", "max", "min", "softmax", "sum")
FORMS = ("paper", "released")


class TreeArgs(NamedTuple):
    """Arguments of ``tree_values``."""

    parent: Annotated[Tensor, "int64", "M"]
    """``[M]`` int64; the parent of each node; any other number for a root."""
    rewards: Annotated[Tensor, "float64", "M"]
    """``[M]`` float64, read at leaves."""
    visits: Annotated[Tensor, "float64", "M"] | None
    """``[M]`` float64, the weight of each node in its parent's reduction, 0 to leave the node out; None for 1."""
    reduce: str
    """One of ``REDUCES``."""
    temperature: float
    """For the reduction ``"softmax"``."""
    max_depth: int
    """An upper bound of the edges above a leaf, for backends that launch once per level; -1: unknown."""


def at_nodes(values: Tensor, index: Tensor) -> Tensor:
    return values[index]


def at_nodes_backward(grad: Tensor, index: Tensor, size: int) -> Tensor:
    # Terms with equal indices are sorted on a device, not added atomically.
    return grad.new_zeros(size, grad.shape[1]).index_put_((index,), grad, accumulate=True)


def path_ends(step: Tensor) -> Tensor:
    """The end of the path along ``step`` from each node: the first node that is its own step."""
    for _ in range(step.shape[0].bit_length()):
        step = step[step]
    return step


def depths(parent: Tensor) -> Tensor:
    """The number of edges above each node; by pointer jumping, so that nothing is read back."""
    node = torch.arange(parent.shape[0], device=parent.device)
    is_root = (parent < 0) | (parent >= parent.shape[0])
    step = torch.where(is_root, node, parent)
    depth = (~is_root).long()
    for _ in range(parent.shape[0].bit_length()):
        depth = depth + depth[step]
        step = step[step]
    return depth


def parents_of(parent: Tensor) -> Tensor:
    """Each node's parent; a root is its own."""
    inside = (parent >= 0) & (parent < parent.shape[0])
    return torch.where(inside, parent, torch.arange(parent.shape[0], device=parent.device))


def sibling_labels(parent: Tensor) -> Tensor:
    """The same number for the children of a node; each root has its own, below 0."""
    up = parents_of(parent)
    return torch.where(up == torch.arange(parent.shape[0], device=parent.device), -1 - up, up)


def _gains(parent: Tensor, leaves: Tensor, root: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``[M, 1]``: what multiplies a value less its root's; and whether the root is taken from it at all."""
    gain = 1 / leaves.clamp(min=1).sqrt()[:, None]
    number = leaves[root][:, None]
    relative = torch.ones_like(number, dtype=torch.bool) if form == "paper" else number > 1
    if form == "released":
        # reward - mean of the others = (reward - mean of all) * n / (n - 1), for a leaf.
        gain = torch.where(relative, number / (number - 1).clamp(min=1), 1) * gain
    return gain, relative


def tree_rl(values: Tensor, parent: Tensor, leaves: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """TreeRL's ``[M, C]`` from means over the leaves below a node (see ``tree_rl_advantages``); and the roots."""
    up = parents_of(parent)
    root = path_ends(up)
    gain, relative = _gains(parent, leaves, root, form)
    if form == "paper":
        return ((values - values[up]) + (values - values[root])) * gain, root
    value = torch.where(relative, values - values[root], values) * gain
    return value + (value - value[up]), root


def tree_rl_backward(grad: Tensor, parent: Tensor, leaves: Tensor, root: Tensor, form: str) -> Tensor:
    up, node = parents_of(parent), torch.arange(parent.shape[0], device=parent.device)
    inner = (up != node)[:, None]
    gain, relative = _gains(parent, leaves, root, form)

    def at(index: Tensor, terms: Tensor) -> Tensor:
        return torch.zeros_like(grad).index_put_((index,), terms, accumulate=True)

    if form == "paper":
        sent = torch.where(inner, grad * gain, 0)
        return 2 * sent - at(up, sent) - at(root, sent)
    sent = torch.where(inner, grad, 0)
    on_value = (grad + sent - at(up, sent)) * gain
    return on_value - at(root, torch.where(relative, on_value, 0))


def tree_values(a: TreeArgs) -> tuple[Tensor, Tensor]:
    """Values, and the slope of each node: the derivative of its parent's value in its own."""
    parent, reduce = a.parent, a.reduce
    depth = depths(parent)
    inner = torch.zeros_like(parent, dtype=torch.bool)
    inner[parent[depth > 0]] = True
    values = torch.where(inner, 0, a.rewards)
    slope = torch.zeros_like(values)
    weight = torch.ones_like(values) if a.visits is None else a.visits
    node = torch.arange(parent.shape[0], device=parent.device)

    def total(terms: Tensor, up: Tensor) -> Tensor:
        return torch.zeros_like(values).index_put_((up,), terms, accumulate=True)

    for level in range(int(depth.max()) if depth.numel() else 0, 0, -1):
        child = node[(depth == level) & (weight != 0)]
        up, v, w = parent[child], values[child], weight[child]
        if reduce == "sum":
            values = values + total(v, up)
            slope[child] = 1.0
        elif reduce == "mean":
            weighed = total(w, up)
            values = values + total(w * v, up) / torch.where(weighed == 0, 1, weighed)
            slope[child] = w / weighed[up]
        else:
            sign = -1.0 if reduce == "min" else 1.0
            best = torch.full_like(values, -torch.inf).scatter_reduce(0, up, sign * v, "amax")
            if reduce == "softmax":
                e = ((v - best[up]) / a.temperature).exp()
                share = e / total(e, up)[up]
                values = values + total(share * v, up)
                slope[child] = share * (1 + (v - values[up]) / a.temperature)
            else:
                first = torch.where(sign * v == best[up], child, len(parent))
                chosen = torch.full_like(parent, len(parent)).scatter_reduce(0, up, first, "amin")
                slope[child] = (chosen[up] == child).to(values.dtype)
                values = values + total(torch.where(chosen[up] == child, v, 0), up)
    return values, slope


def tree_values_backward(grad: Tensor, parent: Tensor, slope: Tensor) -> Tensor:
    """``g[n] = grad[n] + slope[n] g[parent]``, at leaves only; the maps along a path compose in pairs."""
    node = torch.arange(parent.shape[0], device=parent.device)
    is_root = (parent < 0) | (parent >= parent.shape[0])
    step = torch.where(is_root, node, parent)
    factor = torch.where(is_root, 0, slope)
    total = grad.clone()
    for _ in range(parent.shape[0].bit_length()):
        total = total + factor * total[step]
        factor = factor * factor[step]
        step = step[step]
    leaf = torch.ones_like(parent, dtype=torch.bool)
    leaf[step.new_zeros(0) if not len(parent) else parent[~is_root]] = False
    return torch.where(leaf, total, 0)
