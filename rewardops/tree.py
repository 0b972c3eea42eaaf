"""Explicit trees, specified by parent indices: values from the leaves up, and advantages of nodes.

For tree search, where the tree is known (TreeRL, SPO-tree, ReST-MCTS*, OmegaPRM, Math-Shepherd);
:mod:`rewardops.prefix_tree` derives the tree from the tokens, and uses the node formulas of this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import group_advantages
from .core import checks
from .core.precision import wide, widest
from .core.settings import may_read
from .ops import tree as ops
from .ops.group_spec import check_group_scale
from .reference.tree import FORMS, REDUCES, TreeArgs, parents_of

__all__ = ["tree_advantages", "tree_values"]

KINDS = ("local", "global", "tree_rl", "siblings")


def tree_values(
    parent: Tensor,
    leaf_rewards: Tensor,
    *,
    reduce: str = "mean",
    visits: Tensor | str | None = None,
    temperature: float | Tensor = 1.0,
    max_depth: int | None = None,
) -> Tensor:
    """Value of every node of explicit trees, from the leaves up.

    The value of a leaf (a node without children) is its reward, that of any other node a reduction of its
    children's values. ``"mean"`` is the estimate of Math-Shepherd (soft), TreeRL and SPO-tree, ``"max"`` that
    of Math-Shepherd (hard) and of best-first search, ``"min"`` the worst case, ``"softmax"`` the mean
    weighted by ``exp(value / temperature)``, between the mean and the maximum. A mean that counts every child
    once and one that counts every leaf once differ in an unbalanced tree.

    Args:
        parent: ``[M]`` integer; the parent of each node, -1 for a root. Nodes in any order, any number of
            trees.
        leaf_rewards: ``[M]``; float32, bfloat16, float16 or float64. Read at leaves only.
        reduce: ``"mean"``, ``"max"``, ``"min"``, ``"softmax"`` or ``"sum"``.
        visits: ``[M]``, integer or float, the weight of each node in its parent's mean (visit counts of a
            search), ``"leaves"`` for the number of leaves below it, None for 1. Under every reduction a node
            with 0 visits does not count, and a node none of whose children counts has value 0.
        temperature: for ``"softmax"``, above 0, in the unit of the rewards.
        max_depth: an upper bound of the edges above a leaf. Needed on a device, where each level is a launch;
            None finds it on the CPU.

    Returns:
        ``[M]``; float32 (float64 for float64 rewards). Differentiable in ``leaf_rewards``; the gradient of a
        maximum or minimum goes to the first child that attains it.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a parent that is no node, a cycle, a negative visit
            count (these where the values can be read), an option out of its range, no ``max_depth`` on a
            device.

    Example:
        >>> parent = torch.tensor([-1, 0, 0, 1, 1])  # a root, its two children, and two below the first
        >>> leaf_rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
        >>> ro.tree_values(parent, leaf_rewards).tolist()
        [0.25, 0.5, 0.0, 1.0, 0.0]
        >>> ro.tree_values(parent, leaf_rewards, reduce="max").tolist()
        [1.0, 1.0, 0.0, 1.0, 0.0]
    """
    parent, rewards, dtype = _checked(parent, leaf_rewards)
    checks.check_choice("reduce", reduce, REDUCES)
    softness = checks.check_positive("temperature", temperature)
    depth = _checked_depth(max_depth, parent)
    weight = _checked_visits(visits, parent, depth)
    args = TreeArgs(parent, rewards, weight, reduce, softness, depth)
    values: Tensor = ops.tree_values(*args)[0]
    return values.to(dtype)


def tree_advantages(
    parent: Tensor,
    leaf_rewards: Tensor,
    *,
    kind: str = "local",
    reduce: str = "mean",
    visits: Tensor | str | None = None,
    temperature: float | Tensor = 1.0,
    form: str = "paper",
    scale: str = "std",
    eps: float | Tensor = 1e-6,
    ddof: int = 1,
    max_depth: int | None = None,
) -> Tensor:
    """Advantage of every node of explicit trees over its parent, its root or its siblings.

    On the values of :func:`tree_values`: ``"local"`` is ``V(n) - V(parent)`` (SPO-tree's, arXiv 2505.23564,
    and the advantage of a step in a search), ``"global"`` is ``V(n) - V(root)``, ``"tree_rl"`` their sum over
    the square root of the leaves below n (2506.11902), ``"siblings"`` the value relative to the other
    children of the same parent, ``(V(n) - mean V) / (std V + eps)`` (TreeRPO's groups, 2506.05183). Roots
    have 0.

    Args:
        parent: ``[M]`` integer; the parent of each node, -1 for a root. Nodes in any order, any number of
            trees.
        leaf_rewards: ``[M]``; float32, bfloat16, float16 or float64. Read at leaves only.
        kind: ``"local"``, ``"global"``, ``"tree_rl"`` or ``"siblings"``.
        reduce: ``"mean"``, ``"max"``, ``"min"``, ``"softmax"`` or ``"sum"``, from the values of children to
            that of their parent.
        visits: ``[M]``, integer or float, the weight of each node in its parent's mean, ``"leaves"`` for the
            number of leaves below it, None for 1; but for ``"leaves"`` in a ``"mean"`` of ``"tree_rl"``,
            which counts every leaf once, as its paper does.
        temperature: for ``reduce="softmax"``, above 0, in the unit of the rewards.
        form: for ``"tree_rl"``: ``"paper"``, or ``"released"`` as in the authors' code, see
            :func:`rewardops.tree_rl_advantages`.
        scale: for ``"siblings"``, what divides: ``"std"``, ``"batch_std"``, ``"mean_abs"``, ``"range"`` or
            ``"none"``, as in :func:`rewardops.group_advantages`.
        eps: for ``"siblings"``, added to the scale, in the unit of the rewards; at least 0.
        ddof: for ``"siblings"``, 1 for the unbiased std, 0 for the population's.
        max_depth: an upper bound of the edges above a leaf. Needed on a device, where each level is a launch;
            None finds it on the CPU.

    Returns:
        ``[M]``; float32 (float64 for float64 rewards). Differentiable in ``leaf_rewards``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a parent that is no node, a cycle, a negative visit
            count (these where the values can be read), an unknown kind, form or scale, an option out of its
            range, no ``max_depth`` on a device.

    Example:
        >>> parent = torch.tensor([-1, 0, 0, 1, 1])  # a root, its two children, and two below the first
        >>> leaf_rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
        >>> ro.tree_advantages(parent, leaf_rewards).tolist()
        [0.0, 0.25, -0.25, 0.5, -0.5]
        >>> ro.tree_advantages(parent, leaf_rewards, kind="global").tolist()
        [0.0, 0.25, -0.25, 0.75, -0.25]
    """
    parent, rewards, dtype = _checked(parent, leaf_rewards)
    checks.check_choice("kind", kind, KINDS)
    checks.check_choice("form", form, FORMS)
    checks.check_choice("reduce", reduce, REDUCES)
    softness = checks.check_positive("temperature", temperature)
    eps = check_group_scale(scale, eps, ddof)
    depth = _checked_depth(max_depth, parent)
    if visits is None and kind == "tree_rl" and reduce == "mean":
        visits = "leaves"
    weight = _checked_visits(visits, parent, depth)
    args = TreeArgs(parent, rewards, weight, reduce, softness, depth)
    values = ops.tree_values(*args)[0][:, None]
    if kind == "local":
        out = _less(values, parents_of(parent))
    elif kind == "global":
        out = _less(values, ops.path_ends(parents_of(parent)))
    elif kind == "tree_rl":
        out = ops.tree_rl(values, parent, _leaves(parent, depth), form)[0]
    else:
        out = among_siblings(values, parent, scale, eps, ddof)
    return out[:, 0].to(dtype)


# ---- arguments ---------------------------------------------------------------------------------------------


def _checked(parent: Tensor, leaf_rewards: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Validated parents in int64, rewards in float64, and the dtype of the result."""
    checks.check_integer("parent", parent)
    if parent.dim() != 1:
        raise ValueError(f"parent: got shape {checks.show(parent.shape)}, want [M] (one per node)")
    checks.check_float("leaf_rewards", leaf_rewards)
    checks.check_shape("leaf_rewards", leaf_rewards, parent.shape, "one per node of parent")
    checks.check_device("leaf_rewards", leaf_rewards, parent.device, "parent")
    (promoted,) = checks.promote(leaf_rewards)
    parent = parent.detach().long()
    if may_read(parent) and parent.numel():
        low, high = int(parent.min()), int(parent.max())
        if low < -1 or high >= parent.shape[0]:
            bad = low if low < -1 else high
            raise ValueError(f"parent: got {bad}, want -1 (a root) or a node below {parent.shape[0]}")
        # If every parent precedes its children there is no cycle; the path of a node in a cycle ends at no root.
        if bool((parent >= torch.arange(len(parent), device=parent.device)).any()):
            end = ops.path_ends(parents_of(parent))
            if bool((parent[end] != -1).any()):
                raise ValueError(
                    f"parent: got a cycle through node {int(end[parent[end] != -1][0])}, want a tree"
                )
    return parent, wide(leaf_rewards), promoted.dtype


def _checked_visits(visits: Tensor | str | None, parent: Tensor, max_depth: int) -> Tensor | None:
    if visits is None:
        return None
    if isinstance(visits, str):
        checks.check_choice("visits", visits, ("leaves",))
        return _leaves(parent, max_depth)
    visits = checks.check_tensor("visits", visits)
    if visits.dtype not in (*checks.INTEGERS, *checks.FLOATS):
        raise TypeError(f"visits: got dtype {visits.dtype}, want integer or float")
    checks.check_shape("visits", visits, parent.shape, "one per node")
    checks.check_device("visits", visits, parent.device, "parent")
    if may_read(visits) and bool((visits < 0).any()):
        raise ValueError(f"visits: got {visits.min().item()}, want no negative count")
    return wide(visits.detach())


def _leaves(parent: Tensor, max_depth: int) -> Tensor:
    """``[M]`` float64: the number of leaves below each node."""
    ones = torch.ones(parent.shape, dtype=widest(parent.device), device=parent.device)
    out: Tensor = ops.tree_values(*TreeArgs(parent, ones, None, "sum", 1.0, max_depth))[0]
    return out


def _checked_depth(max_depth: int | None, parent: Tensor) -> int:
    if max_depth is None:
        # The number of launches: on a device, reading it would be a synchronisation.
        if parent.device.type != "cpu":
            raise ValueError("max_depth: got None, want the largest number of edges above a leaf")
        return -1
    checks.check_whole("max_depth", max_depth, 0)
    return max_depth


# ---- nodes by their parents --------------------------------------------------------------------------------


def _less(values: Tensor, ancestor: Tensor) -> Tensor:
    """``[M, C]``: a node's value less its ancestor's; 0 where that is the node itself."""
    return values - ops.at_nodes(values, ancestor)


def among_siblings(values: Tensor, parent: Tensor, scale: str, eps: float | Tensor, ddof: int) -> Tensor:
    """``[M, C]``: advantages relative to the siblings of a node; 0 at a root."""
    labels = ops.sibling_labels(parent)
    one = values.shape[1] == 1  # a view of it in both directions
    columns = [
        group_advantages(x, labels, scale=scale, eps=eps, ddof=ddof)
        for x in ([values.squeeze(1)] if one else values.unbind(1))
    ]
    if one:
        return columns[0][:, None]
    return torch.stack(columns, 1) if columns else values
