"""Prefix trees: values, advantages and weights of tokens from the prefixes that the responses of a group share.

The responses of a group are a tree of prefixes, which follows from the tokens alone. The size of its arrays does
not depend on the tokens (see ``rewardops/reference/prefix_tree.py``), so that nothing is read back to build it;
node values are broadcast to tokens in one pass. A *state* is a prefix: the state before a token is the prefix
without it, the state after it the prefix with it. :class:`rewardops.PrefixTree` is the tree itself, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import tree
from .core import checks
from .core.checks import Number
from .core.groups import GroupSize, Labels
from .core.precision import wide
from .core.scalars import filled
from .core.settings import may_read
from .ops import advantages
from .ops import prefix_tree as ops
from .ops.forest import Forest, TokenRows, checked_rewards, checked_weights
from .ops.group_spec import check_group_scale
from .ops.tree import at_nodes, sums_at_nodes, tree_rl
from .reference.advantages import AdvantagesArgs
from .reference.td import times
from .reference.tree import FORMS

__all__ = [
    "PrefixLcp",
    "PrefixValues",
    "prefix_lcp",
    "prefix_std",
    "prefix_values",
    "shared_prefix_weights",
    "sibling_advantages",
    "tempo_advantages",
    "tree_rl_advantages",
    "tvm_targets",
]

TD_SCALES = ("group", "none")


# ---- values ------------------------------------------------------------------------------------------------


class PrefixValues(NamedTuple):
    """Values of the prefix before and after each token, in the layout of the tokens.

    ``after - before`` is the token's temporal difference: 0 wherever the tree does not branch.

    Attributes:
        before: value of the prefix without the token; float32 (float64 for float64 rewards), 0 where masked;
            with a last dimension R for channels.
        after: value of the prefix with the token, the same shape and dtype.
        count: int32, without channels: the rows of the group that share the prefix up to and including the
            token.
    """

    before: Tensor
    after: Tensor
    count: Tensor  # type: ignore[assignment]


def prefix_values(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    min_count: int = 1,
    gamma: float | Tensor = 1.0,
    leave_one_out: bool = False,
    masked: str = "prefix",
) -> PrefixValues:
    """Value of every prefix: the mean reward of the group's rows that begin with it.

    With ``lcp(i, j)`` the number of leading tokens that rows i and j share, and ``w`` the weights,
    ``V(i, t) = sum_j w_j gamma^(length_j - t) rewards[j] / sum_j w_j`` over the j with ``lcp(i, j) >= t``;
    ``before`` is ``V(i, t)`` with t the number of tokens before this one, ``after`` is ``V(i, t + 1)``. V is
    P2T's of TEMPO (arXiv 2509.18314) and the token target of TVM (2407.12863); a mean over ``count`` outcomes
    in {0, 1} has variance ``V (1 - V) / count``, hence the option ``min_count``.

    A row starts at its first valid token and ends with its last one. Masked tokens in between (the output of
    a tool, say) are part of the prefix, and get no value themselves; include the end token in the mask, or a
    finished row and a truncated one are the same prefix. A row without a valid token does not count.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``, or ``[B, R]`` for several channels over one tree; float32, bfloat16, float16 or
            float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        weights: ``[B]``, non-negative, of the rows (importance weights, say); None for 1. Prefixes whose
            weights sum to 0 have value 0.
        min_count: a prefix that fewer rows share takes the value of the last prefix on the row's path that
            this many rows share (or the whole group, if it has fewer); at least 1.
        gamma: discount per token from a row's end to the prefix, from 0 to 1.
        leave_one_out: the mean of the *other* rows, as a baseline that does not depend on the row's own
            reward; ``min_count`` counts the others. A row whose group has no other has value 0.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        :class:`PrefixValues`; float32 (float64 for float64 rewards), 0 where masked; ``before`` and ``after``
        with a last dimension R for channels. Rows that share a prefix have bitwise equal values on it (with
        ``leave_one_out`` values are per row). Differentiable in ``rewards`` and ``weights``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``, a
            negative weight, an option out of its range.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> out = ro.prefix_values(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in out.after.tolist()]
        [[0.667, 0.5, 1.0], [0.667, 0.5, 0.0], [0.667, 1.0, 1.0], [0.0, 0.0, 0.0]]
        >>> out.count.tolist()
        [[3, 2, 1], [3, 2, 1], [3, 1, 1], [1, 1, 1]]
    """
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, channels = checked_rewards(rewards, rows)
    w = checked_weights(weights, rows)
    checks.check_whole("min_count", min_count, 1)
    gamma = checks.check_fraction("gamma", gamma)
    checks.check_flag("leave_one_out", leave_one_out)
    forest, least = rows.forest(), min_count + leave_one_out
    leaf = None if least == 1 else forest.supported_by(least)
    if leave_one_out:
        assert leaf is not None
        before, after = (_leave_one_out(forest, x, w, gamma, leaf, at, dtype) for at in ("before", "after"))
    else:
        found = forest.statistics(x, w, "mean", gamma)
        before, after = (
            forest.tokens(found.out, dtype, at=at, gamma=gamma, leaf=leaf) for at in ("before", "after")
        )
    if leave_one_out or w is not None:
        found = forest.statistics(x.detach(), None, "sum")
    count = forest.tokens(found.total, torch.int32)[0]
    return PrefixValues(_shaped(before, channels), _shaped(after, channels), count)


def prefix_std(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    ddof: int = 1,
    masked: str = "prefix",
) -> Tensor:
    """Standard deviation of the rewards of the rows that share each prefix, up to and including the token.

    ``sqrt(sum_j w_j (rewards[j] - V)^2 / sum_j w_j * n / (n - ddof))`` over the n rows of the prefix, V their
    mean; exactly 0 where they are equal, and where ``n <= ddof``.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``, or ``[B, R]`` for several channels over one tree; float32, bfloat16, float16 or
            float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        weights: ``[B]``, non-negative, of the rows; None for 1.
        ddof: 1 for the unbiased std, 0 for the population's.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens`` (with a last dimension R for channels); float32 (float64 for float64
        rewards), 0 where masked. Differentiable in ``rewards`` and ``weights``, with gradient 0 where it is
        0.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``, a
            negative weight, another ddof.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> std = ro.prefix_std(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in std[:2].tolist()]
        [[0.577, 0.707, 0.0], [0.577, 0.707, 0.0]]
    """
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, channels = checked_rewards(rewards, rows)
    w = checked_weights(weights, rows)
    check_group_scale("std", 0.0, ddof)
    forest = rows.forest()
    return _shaped(forest.tokens(forest.std(x, w, ddof), dtype), channels)


def tvm_targets(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    min_count: int = 1,
    gamma: float | Tensor = 1.0,
    masked: str = "prefix",
) -> Tensor:
    """Targets of a token-level value model: the value of the prefix up to and including each token.

    For outcomes in {0, 1} the empirical probability of a right answer given the prefix (TVM, arXiv
    2407.12863), for a squared or cross-entropy loss at every token. It is ``after`` of :func:`prefix_values`
    without the other outputs.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``, or ``[B, R]`` for several channels over one tree; float32, bfloat16, float16 or
            float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        weights: ``[B]``, non-negative, of the rows (importance weights, say); None for 1. Prefixes whose
            weights sum to 0 have value 0.
        min_count: a prefix that fewer rows share takes the value of the last prefix on the row's path that
            this many rows share (or the whole group, if it has fewer); at least 1.
        gamma: discount per token from a row's end to the prefix, from 0 to 1.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens`` (with a last dimension R for channels); float32 (float64 for float64
        rewards), 0 where masked. Differentiable in ``rewards`` and ``weights``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``, a
            negative weight, an option out of its range.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> targets = ro.tvm_targets(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in targets[:2].tolist()]
        [[0.667, 0.5, 1.0], [0.667, 0.5, 0.0]]
    """
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, channels = checked_rewards(rewards, rows)
    w = checked_weights(weights, rows)
    checks.check_whole("min_count", min_count, 1)
    gamma = checks.check_fraction("gamma", gamma)
    forest = rows.forest()
    leaf = None if min_count == 1 else forest.supported_by(min_count)
    return _shaped(forest.tokens(forest.means(x, w, gamma), dtype, gamma=gamma, leaf=leaf), channels)


def shared_prefix_weights(
    tokens: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "prefix",
) -> Tensor:
    """Weight ``1 / n`` per token, n the rows of the group that share the prefix up to and including it.

    lambda-GRPO (coli-saar/grpo-prm, "GRPO is secretly a process reward model") multiplies a token's loss by
    this weight, so that a step counts once however many rows run through it. The weights of a group sum to
    the number of tokens in its tree.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens``; float32, 0 where masked. Not differentiable.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [1, 1, 1]])
        >>> ro.shared_prefix_weights(tokens, group_size=3).tolist()
        [[0.5, 0.5, 1.0], [0.5, 0.5, 1.0], [1.0, 1.0, 1.0]]
    """
    forest = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked).forest()
    return forest.tokens(wide(forest.count.clamp(min=1)).reciprocal()[:, None], torch.float32)[0]


# ---- advantages --------------------------------------------------------------------------------------------


def tempo_advantages(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: str = "std",
    eps: float | Tensor = 1e-6,
    ddof: int = 1,
    td_scale: str = "group",
    masked: str = "prefix",
) -> Tensor:
    """TEMPO's token advantages: GRPO's, plus a temporal difference where the group's prefix tree branches.

    ``A[i, t] = (rewards[i] - mean + V(i, t + 1) - V(i, t)) / (std + eps)`` with the values of
    :func:`prefix_values` and the group's mean and std (arXiv 2509.18314; the paper names neither ddof nor
    eps). Off the branches it is GRPO's advantage; equal rewards give 0.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``; float32, bfloat16, float16 or float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        scale: what divides: ``"std"`` of the group, ``"batch_std"`` of all rewards, ``"mean_abs"``,
            ``"range"`` or ``"none"``, as in :func:`rewardops.group_advantages`.
        eps: added to the scale, in the unit of the rewards; at least 0.
        ddof: 1 for the unbiased std, 0 for the population's.
        td_scale: ``"group"`` divides the temporal difference by the scale as well (the paper's formula);
            ``"none"`` adds it undivided, ``(rewards[i] - mean) / (std + eps) + V(i, t + 1) - V(i, t)``.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens``; float32 (float64 for float64 rewards), 0 where masked. Differentiable in
        ``rewards``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``,
            an unknown scale, an option out of its range.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> advantages = ro.tempo_advantages(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in advantages[:2].tolist()]
        [[1.155, 0.577, 1.732], [-0.577, -1.155, -1.732]]
    """
    checks.check_rewards(rewards)
    added_to_scale = check_group_scale(scale, eps, ddof)
    checks.check_choice("td_scale", td_scale, TD_SCALES)
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, _ = checked_rewards(rewards, rows)
    forest = rows.forest()
    args = AdvantagesArgs(
        rewards=x[:, 0],
        groups=rows.labels,
        baseline_values=None,
        lengths=None,
        mask=forest.live[:, None],  # one token per row
        cu_seqlens=None,
        num_tokens=-1,
        baseline="mean",
        quantile=0.0,
        scale=scale,
        eps=added_to_scale,
        ddof=ddof,
        raw=False,
        contiguous=groups is None,
    )
    centred, inv_scale, _ = advantages.group_advantages(*args)
    value = forest.means(x)
    if td_scale == "none":
        return forest.tokens(value, dtype, at="step", row_bias=centred)[0]
    scaled = {"scaled_values": value, "row_factor": inv_scale[:, None]}
    return forest.tokens(None, dtype, at="step", row_bias=centred, **scaled)[0]


def tree_rl_advantages(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "paper",
    masked: str = "prefix",
) -> Tensor:
    """TreeRL's process rewards over the prefix tree of the group, on every token of a node.

    ``(V(n) - V(root) + V(n) - V(parent)) / sqrt(rows of n)``, V the mean reward (arXiv 2506.11902): the
    global and the local advantage of a step; tokens that all rows share have 0.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``, or ``[B, R]`` for several channels over one tree; float32, bfloat16, float16 or
            float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        form: ``"paper"``, or ``"released"`` as in the code THUDM/TreeRL (before it normalises over all steps
            of a prompt): V of rewards less the mean of the other rows', and every V divided by the square
            root of its own rows, ``2 V(n) / sqrt(rows of n) - V(parent) / sqrt(rows of parent)``.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens`` (with a last dimension R for channels); float32 (float64 for float64
        rewards), 0 where masked. Differentiable in ``rewards``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``,
            an unknown form.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> advantages = ro.tree_rl_advantages(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in advantages[:2].tolist()]
        [[0.192, -0.118, 1.0], [0.192, -0.118, -1.0]]
    """
    checks.check_choice("form", form, FORMS)
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, channels = checked_rewards(rewards, rows)
    forest = rows.forest()
    found = forest.statistics(x, None, "mean")
    value = tree_rl(found.out, forest.parent, found.total[:, 0], form)[0]
    return _shaped(forest.tokens(value, dtype), channels)


def sibling_advantages(
    tokens: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    scale: str = "std",
    eps: float | Tensor = 1e-6,
    ddof: int = 1,
    masked: str = "prefix",
) -> Tensor:
    """Advantages relative to the siblings: the children of a branch are a group, their values its rewards.

    ``(V(n) - mean V) / (std V + eps)`` over the children of n's parent, each counted once, on every token of
    n up to where it branches in turn (TreeRPO, arXiv 2506.05183, and the edge advantages of SPO-tree,
    2505.23564, do so in trees of fixed width). Tokens that all rows share have 0. A row that ends at a branch
    has no token there and is no sibling: include the end token in the mask.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``, or ``[B, R]`` for several channels over one tree; float32, bfloat16, float16 or
            float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        weights: ``[B]``, non-negative, of the rows (importance weights, say); None for 1. Prefixes whose
            weights sum to 0 have value 0.
        scale: what divides, over the siblings: ``"std"``, ``"batch_std"``, ``"mean_abs"``, ``"range"`` or
            ``"none"``, as in :func:`rewardops.group_advantages`.
        eps: added to the scale, in the unit of the rewards; at least 0.
        ddof: 1 for the unbiased std, 0 for the population's.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        The layout of ``tokens`` (with a last dimension R for channels); float32 (float64 for float64
        rewards), 0 where masked. Differentiable in ``rewards`` and ``weights``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``, a
            negative weight, an unknown scale, an option out of its range.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [5, 9, 9], [1, 1, 1]])
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> advantages = ro.sibling_advantages(tokens, rewards, group_size=4)
        >>> [[round(x, 3) for x in row] for row in advantages[:2].tolist()]
        [[0.707, -0.707, 0.707], [0.707, -0.707, -0.707]]
    """
    eps = check_group_scale(scale, eps, ddof)
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    x, dtype, channels = checked_rewards(rewards, rows)
    w = checked_weights(weights, rows)
    forest = rows.forest()
    value = tree.among_siblings(forest.means(x, w), forest.parent, scale, eps, ddof)
    return _shaped(forest.tokens(value, dtype), channels)


# ---- common prefixes ---------------------------------------------------------------------------------------


class PrefixLcp(NamedTuple):
    """Common prefixes by row: ``lcp[b, k]`` is that of row b and row ``members[b, k]`` of its group.

    Attributes:
        members: ``[B, K]`` int32: the rows of b's group in ascending order, b itself included; padded with
            -1.
        lcp: ``[B, K]`` int32: equal leading tokens; a row's length with itself; -1 where one of the two is
            empty.
    """

    members: Tensor
    lcp: Tensor


def prefix_lcp(
    tokens: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    max_group_size: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "prefix",
) -> PrefixLcp:
    """Number of leading tokens that each row shares with each row of its group.

    Computed from the rows in lexicographic order: two rows share the minimum over the neighbours between
    them, so that pairs are not compared.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable. Rows of
            other groups never match.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        max_group_size: K, the rows of the largest group; larger groups are cut. None reads it from ``groups``
            on the CPU; on a device, this or ``group_size`` is needed.
        mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``: they
            are left out.

    Returns:
        :class:`PrefixLcp`, ``[B, K]`` int32, not differentiable; with contiguous groups of K,
        ``lcp.view(-1, K, K)`` is symmetric.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, both or neither of ``groups`` and ``group_size``, a
            group size that is not known.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [1, 1, 1]])
        >>> ro.prefix_lcp(tokens, group_size=3).lcp.tolist()
        [[3, 2, 0], [2, 3, 0], [0, 0, 3]]
    """
    rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
    most = _largest_group(rows.labels, group_size, max_group_size)
    return PrefixLcp(*ops.prefix_lcp(rows.forest().rows, rows.labels, most))


# ---- arguments ---------------------------------------------------------------------------------------------


def _largest_group(labels: Tensor, group_size: GroupSize, bound: int | None) -> int:
    """The number of rows of the largest group, or the caller's upper bound."""
    if bound is not None:
        checks.check_whole("max_group_size", bound, 1)
        return bound
    if isinstance(group_size, int):
        return group_size
    if isinstance(group_size, (list, tuple)):
        return max(group_size, default=1)
    # The size of the output: on a device, reading it would be a synchronisation.
    if not may_read(labels):
        raise ValueError("max_group_size: got None, want the size of the largest group (or group_size)")
    return int(labels.unique(return_counts=True)[1].max()) if labels.numel() else 1


def _shaped(planes: Tensor, channels: bool) -> Tensor:
    """``[C, *tokens]`` in the caller's layout: channels last, or no channel dimension."""
    return planes.movedim(0, -1) if channels else planes[0]


# ---- leave one out -----------------------------------------------------------------------------------------


def _leave_one_out(
    forest: Forest,
    x: Tensor,
    weights: Tensor | None,
    gamma: Number,
    leaf: Tensor,
    at: str,
    dtype: torch.dtype,
) -> Tensor:
    """``[C, *tokens]``: the means of the other rows; 0 where there is none."""
    x, weights = wide(x), None if weights is None else wide(weights)
    sums = forest.sums(x, weights, gamma)
    # The rewards of rows without a token may be anything, NaN included.
    x = torch.where(forest.live[:, None], x, 0)
    if weights is None:
        others = (forest.count - 1)[:, None]
        share = torch.where(others > 0, 1 / wide(others.clamp(min=1)), 0)
        minus = -share.expand(sums.shape)
        return forest.tokens(
            sums * share, dtype, at=at, scaled_values=minus, row_factor=x, gamma=gamma, leaf=leaf
        )
    weights = torch.where(forest.live, weights, 0)[:, None]
    summed, remaining = _others(forest, [(x * weights, gamma), (weights, 1.0)], leaf, at)
    return torch.where(remaining > 0, summed / torch.where(remaining > 0, remaining, 1), 0).to(dtype)


def _others(
    forest: Forest, parts: Sequence[tuple[Tensor, Number]], leaf: Tensor, at: str
) -> Iterator[Tensor]:
    """``[C, *tokens]`` of each part: sums of the other rows' terms ``[B, C]``, discounted by the part's gamma.

    The row's own term is taken from the sum of all, unless it is the larger part of it: then what remains would be
    rounding errors of the sum.
    """
    sums = [forest.sums(terms, gamma=gamma) for terms, gamma in parts]
    sizes = [forest.sums(terms.detach().abs(), gamma=gamma) for terms, gamma in parts]
    rest = _off_the_heavy_path(forest, parts, sums, sizes).split([s.shape[1] for s in sums], 1)
    for (terms, gamma), total, size, without in zip(parts, sums, sizes, rest, strict=True):
        options = {"at": at, "gamma": gamma, "leaf": leaf}
        own = {"scaled_values": -torch.ones_like(total), **options}
        less_own = forest.tokens(total, total.dtype, row_factor=terms, **own)
        left = forest.tokens(size, size.dtype, row_factor=2 * terms.detach().abs(), **own)
        yield torch.where(left < 0, forest.tokens(without, total.dtype, **options), less_own)


def _off_the_heavy_path(
    forest: Forest, parts: Sequence[tuple[Tensor, Number]], sums: Sequence[Tensor], sizes: Sequence[Tensor]
) -> Tensor:
    """``[2 B, C]``: each node's discounted sum without the row whose term is its larger part; else anything.

    Below such a node, that row's path goes through children that are the larger part of theirs: its sum is that of
    the other children, and what its heavy child has without the row. Rows are children of their leaves. Every
    channel of every part has a copy of the trees: one walk serves all.
    """
    terms = torch.cat([terms for terms, _ in parts], 1)
    (nodes, channels), total = (sums[0].shape[0], terms.shape[1]), sums[0].shape[0] + terms.shape[0]
    node = torch.arange(total, device=terms.device)
    channel = torch.arange(channels, device=terms.device)
    above = torch.cat([forest.parent, forest.leaf])
    inside = (above >= 0)[:, None]
    above = torch.where(inside[:, 0], above, node)
    depth = torch.cat([forest.depth, forest.depth[forest.leaf.clamp(min=0)]])
    distance = (depth - depth[above]).clamp(min=0)[:, None]

    def each(of_nodes: Tensor, of_rows: Tensor) -> Tensor:
        return torch.cat([of_nodes, of_rows]).reshape(-1, 1)

    def copies(index: Tensor) -> Tensor:
        return (index[:, None] * channels + channel).reshape(-1)

    discounts = [filled(s, gamma) ** distance for s, (_, gamma) in zip(sums, parts, strict=True)]
    discounts = [d.expand(total, s.shape[1]) for d, s in zip(discounts, sums, strict=True)]
    discount = torch.where(inside, torch.cat(discounts, 1), 0).reshape(-1, 1)
    above, node, inside = copies(above), copies(node), inside.expand(total, channels).reshape(-1)
    whole = torch.cat(list(sizes), 1)
    size = times(discount, each(whole, terms.detach().abs()))
    heavy = inside & (2 * size > at_nodes(each(whole, torch.zeros_like(terms)), above))[:, 0]
    light = torch.where(heavy[:, None], 0, times(discount, each(torch.cat(list(sums), 1), terms)))
    rest = sums_at_nodes(light, above, total * channels)
    # Every node's heavy child, itself if there is none (the last place takes the others), and the discount to it.
    to = torch.cat([node, node[:1]]).scatter(0, torch.where(heavy, above, total * channels), node)[:-1]
    factor = torch.where((to == node)[:, None], 0, discount[to])
    # Enough steps for any path; a compiled graph serves trees of any size.
    for _ in range(32 if torch.compiler.is_compiling() else total.bit_length()):
        rest = rest + times(factor, at_nodes(rest, to))
        factor, to = factor * factor[to], to[to]
    return rest.reshape(total, channels)[:nodes]
