"""Entropy weighting, the specification (see :func:`rewardops.gtpo_rewards`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.groups import group_sums, numbered
from ..core.kinds import Flags, IdRows, Offsets, RealRows, RealTokens
from ..core.rows import from_rows, to_rows


class GtpoArgs(NamedTuple):
    """Arguments of ``gtpo_rewards`` and its backward pass; floats are of one dtype, float32 or float64."""

    rewards: RealRows
    """``[B]``"""
    entropy: RealTokens
    """``[B, T]`` or ``[N]``, in nats."""
    groups: IdRows
    """``[B]`` int64 labels, in any order."""
    mask: Flags | None
    """bool, the shape of ``entropy``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    alpha1: float
    """Weight of the outcome."""
    alpha2: float
    """Weight of the entropy's share."""
    threshold: float
    """Rows with a reward above it are right, the others wrong."""
    floor: float
    """Entropies of wrong rows below it are raised to it, since their inverse is the weight; above 0."""
    contiguous: bool
    """Whether the rows of each group follow one another; kernels may then find groups without a sort."""


class _Shares(NamedTuple):
    """The weights of tokens, and their sums over the rows of one group and class."""

    valid: Tensor  # [B, T]
    positive: Tensor  # [B]
    scope: Tensor  # [B]: numbers of the rows' groups and classes
    weight: Tensor  # [B, T] float64: H for right rows, 1 / H for wrong ones; NaN where not defined
    count: Tensor  # type: ignore[assignment]  # [B, T]: rows of the class still running at the position
    total: Tensor  # [B, T]: the sum of their weights; 1 where even
    even: Tensor  # [B, T]: every weight of the class is 0, so that all have the same share
    floored: Tensor  # [B, T]: valid tokens whose weight does not depend on their entropy


def _shares(a: GtpoArgs) -> _Shares:
    h, valid = to_rows(a.entropy, a.mask, a.cu_seqlens)
    h = h.double()
    positive = a.rewards > a.threshold
    right = positive[:, None]
    # An entropy of a right row is its weight: only rounding takes it below 0.
    at_least = torch.where(right, torch.zeros_like(h), a.floor)
    raised = torch.maximum(h, at_least)
    sound = h.isfinite() & ~a.rewards.isnan()[:, None]
    weight = torch.where(sound, torch.where(right, raised, 1 / raised), torch.nan)
    weight = torch.where(valid, weight, 0)
    scope = numbered(2 * numbered(a.groups) + positive)
    total = group_sums(weight, scope)
    even = total == 0
    return _Shares(
        valid,
        positive,
        scope,
        weight,
        group_sums(valid, scope),
        torch.where(even, 1, total),
        even,
        valid & sound & torch.where(right, h < 0, h <= a.floor),
    )


def gtpo_rewards(a: GtpoArgs) -> Tensor:
    s = _shares(a)
    share = torch.where(s.even, 1, s.count * s.weight / s.total)
    shaped = torch.where(
        s.positive[:, None], a.alpha1 * a.rewards[:, None] + a.alpha2 * share, -a.alpha1 - a.alpha2 * share
    )
    out = torch.where(s.valid, shaped, 0).to(a.entropy.dtype)
    return from_rows(out, a.entropy.shape, a.cu_seqlens)


def gtpo_rewards_backward(grad: Tensor, a: GtpoArgs) -> tuple[Tensor, Tensor]:
    """Gradients of ``rewards`` and ``entropy``."""
    s = _shares(a)
    up, _ = to_rows(grad.double(), a.mask, a.cu_seqlens)
    grad_rewards = torch.where(s.positive, a.alpha1 * up.sum(1), 0)
    through = group_sums(up * s.weight, s.scope)
    on_weight = torch.where(s.even, 0, a.alpha2 * s.count * (up - through / s.total) / s.total)
    # d weight / d H: 1 for right rows; for wrong ones -1 / H^2, against the minus sign of their share.
    on_entropy = torch.where(s.positive[:, None], on_weight, on_weight * s.weight * s.weight)
    grad_entropy = torch.where(s.valid & ~s.floored, on_entropy, 0)
    grad_rewards, grad_entropy = grad_rewards.to(a.rewards.dtype), grad_entropy.to(a.entropy.dtype)
    return grad_rewards, from_rows(grad_entropy, a.entropy.shape, a.cu_seqlens)
