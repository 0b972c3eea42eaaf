"""Prefix trees: values and advantages from what the responses of a group share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import advantages, layout
from .dispatch import define


class PrefixValues(NamedTuple):
    """Values of the prefix before and after each token, in the layout of the tokens.

    ``after - before`` is the token's temporal difference: 0 wherever the tree does not branch.
    """

    before: Tensor
    after: Tensor
    count: Tensor  # type: ignore[assignment]
    """int32: the rows of the group that share the prefix up to and including the token."""


def _fake(tokens, rewards, *_):  # type: ignore[no-untyped-def]
    return (
        rewards.new_empty(tokens.shape),
        rewards.new_empty(tokens.shape),
        rewards.new_empty(tokens.shape, dtype=torch.int32),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, max_group_size = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors)
    ctx.max_group_size = max_group_size


def _gradient(ctx, grad_before, grad_after, _grad_count):  # type: ignore[no-untyped-def]
    out = _backward(grad_before, grad_after, *ctx.saved_tensors, ctx.max_group_size)
    return None, out, None, None, None, None


_backward = define(
    "prefix_tree",
    "prefix_values_backward(Tensor? grad_before, Tensor? grad_after, Tensor tokens, Tensor rewards,"
    " Tensor groups, Tensor? mask, Tensor? cu_seqlens, SymInt max_group_size) -> Tensor",
    fake=lambda grad_before, grad_after, tokens, rewards, *_: rewards.new_empty(rewards.shape),
)

_forward = define(
    "prefix_tree",
    "prefix_values(Tensor tokens, Tensor rewards, Tensor groups, Tensor? mask, Tensor? cu_seqlens,"
    " SymInt max_group_size) -> (Tensor before, Tensor after, Tensor count)",
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def prefix_values(
    tokens: Tensor,
    rewards: Tensor,
    groups: layout.Labels = None,
    *,
    group_size: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PrefixValues:
    """Value of every prefix: the mean reward of the group's rows that begin with it.

    With ``lcp(i, j)`` the number of leading tokens that rows i and j share,
    ``V(i, t) = mean of rewards[j] over the j with lcp(i, j) >= t``; ``before`` is ``V(i, t)`` with t the
    number of tokens before this one, ``after`` is ``V(i, t + 1)``. No tree is built: the values follow from
    the common prefixes of all pairs of a group. V is P2T's of TEMPO (arXiv 2509.18314) and the token target
    of TVM (2407.12863); a mean over ``count`` outcomes in {0, 1} has variance ``V (1 - V) / count``.

    A row starts at its first valid token and ends with its last one. What is masked in between (the output
    of a tool, say) is part of the prefix, and gets no value itself; include the end token in the mask, or a
    finished row and a truncated one are the same prefix. A row without a valid token does not count.

    Args:
        tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
        rewards: ``[B]``; float32, bfloat16, float16 or float64.
        groups: ``[B]``, integer labels in any order; rows of other groups never match.
        group_size: instead of ``groups``: contiguous groups of this many rows. On a GPU it also bounds the
            workspace, ``[B, group_size]`` instead of ``[B, B]`` int32.
        mask: the shape of ``tokens``; bool, integer or float 0/1.
        cu_seqlens: ``[B + 1]`` for packed rows.

    Returns:
        :class:`PrefixValues`; float32 (float64 for float64 rewards), 0 where masked. Rows that share a
        prefix have bitwise equal values on it. Differentiable in ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
    """
    advantages.check_rewards(rewards)
    layout.check_integer("tokens", tokens)
    rows = layout.token_layout("tokens", tokens, mask, cu_seqlens)
    layout.check_shape("rewards", rewards, (rows.batch,), "one per row of tokens")
    layout.check_device("rewards", rewards, tokens.device, "tokens")
    groups = layout.group_ids(groups, group_size, rows.batch, tokens.device, "tokens")
    (rewards,) = layout.promote(rewards)
    bound = rows.batch if group_size is None else group_size
    return PrefixValues(*_forward(tokens, rewards, groups, rows.mask, rows.cu_seqlens, bound))


def tempo_advantages(
    tokens: Tensor,
    rewards: Tensor,
    groups: layout.Labels = None,
    *,
    group_size: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """TEMPO's token advantages: GRPO's, plus a temporal difference where the group's prefix tree branches.

    ``A[i, t] = (rewards[i] - mean + V(i, t + 1) - V(i, t)) / (std + eps)`` with the values of
    :func:`prefix_values` and the group's mean and std (arXiv 2509.18314; the paper names neither ddof nor
    eps). Off the branches it is GRPO's advantage; equal rewards give 0.

    Args:
        tokens, rewards, groups, group_size, mask, cu_seqlens: as in :func:`prefix_values`.
        scale, eps, ddof: as in :func:`rewardops.group_advantages`.

    Returns:
        The layout of ``tokens``; float32 (float64 for float64 rewards), 0 where masked. Differentiable in
        ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an
            unknown scale.
    """
    advantages.check_scale(scale, eps, ddof)
    values = prefix_values(tokens, rewards, groups, group_size=group_size, mask=mask, cu_seqlens=cu_seqlens)
    rows = layout.token_layout("tokens", tokens, mask, cu_seqlens)
    ids = layout.group_ids(groups, group_size, rows.batch, tokens.device, "tokens")
    (rewards,) = layout.promote(rewards)
    row_mask = rows.mask
    if row_mask is None and rows.cu_seqlens is None:
        row_mask = torch.ones_like(tokens, dtype=torch.bool)
    centred, inv_scale, _ = advantages.forward(
        rewards,
        ids,
        None,
        None,
        row_mask,
        rows.cu_seqlens,
        -1 if rows.cu_seqlens is None else tokens.shape[0],
        "mean",
        0.0,
        scale,
        float(eps),
        ddof,
        False,
    )
    return centred + (values.after - values.before) * rows.expand(inv_scale)
