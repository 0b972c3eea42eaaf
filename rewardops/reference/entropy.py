"""Entropy weighting, the specification (see :func:`rewardops.gtpo_rewards`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.groups import group_sums, numbered
from ..core.rows import from_rows, to_rows


class GtpoArgs(NamedTuple):
    """Arguments of ``gtpo_rewards`` and its backward pass; floats are of one dtype, float32 or float64."""

    rewards: Tensor
    """``[B]``"""
    entropy: Tensor
    """``[B, T]`` or ``[N]``, in nats."""
    groups: Tensor
    """``[B]`` int64 labels, in any order."""
    mask: Tensor | None
    """bool, the shape of ``entropy``; None: every token counts."""
    cu_seqlens: Tensor | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    alpha1: float
    """Weight of the outcome."""
    alpha2: float
    """Weight of the entropy's share."""
    threshold: float
    """Rows with a reward above it are right, the others wrong."""
    floor: float
    """Entropies below it are raised to it; above 0."""


class _Shares(NamedTuple):
    """The weights of tokens, and their sums over the rows of one group and class."""

    valid: Tensor  # [B, T]
    positive: Tensor  # [B]
    scope: Tensor  # [B]: numbers of the rows' groups and classes
    weight: Tensor  # [B, T] float64: H for right rows, 1 / H for wrong ones; 0 where not valid
    count: Tensor  # type: ignore[assignment]  # [B, T]: rows of the class still running at the position
    total: Tensor  # [B, T]: the sum of their weights
    floored: Tensor  # [B, T]: valid tokens with an entropy at or below the floor


def _shares(a: GtpoArgs) -> _Shares:
    h, valid = to_rows(a.entropy, a.mask, a.cu_seqlens)
    floored = h <= a.floor
    h = h.clamp(min=a.floor).double()
    positive = a.rewards > a.threshold
    scope = numbered(2 * numbered(a.groups) + positive)
    weight = torch.where(valid, torch.where(positive[:, None], h, 1 / h), 0)
    return _Shares(
        valid, positive, scope, weight, group_sums(valid, scope), group_sums(weight, scope), floored & valid
    )


def gtpo_rewards(a: GtpoArgs) -> Tensor:
    s = _shares(a)
    share = s.count * s.weight / s.total
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
    grad_weight = a.alpha2 * s.count / s.total * (up - through / s.total)
    # d weight / d H: 1 for right rows; for wrong ones -1 / H^2, against the minus sign of their share.
    slope = torch.where(s.positive[:, None], torch.ones_like(s.weight), s.weight.square())
    grad_entropy = torch.where(s.valid & ~s.floored, grad_weight * slope, 0)
    grad_rewards, grad_entropy = grad_rewards.to(a.rewards.dtype), grad_entropy.to(a.entropy.dtype)
    return grad_rewards, from_rows(grad_entropy, a.entropy.shape, a.cu_seqlens)
