"""Entropy weighting, the specification (see :func:`rewardops.gtpo_rewards`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.groups import same_group
from ..core.rows import from_rows, to_rows


class _Shares(NamedTuple):
    valid: Tensor  # [B, T]
    positive: Tensor  # [B]
    same: Tensor  # [B, B]: rows of one group and one class, in the dtype of the rewards
    weight: Tensor  # [B, T]: H for right rows, 1 / H for wrong ones; 0 where not valid
    count: Tensor  # type: ignore[assignment]  # [B, T]: rows of the class still running at the position
    total: Tensor  # [B, T]: the sum of their weights
    floored: Tensor  # [B, T]


def _shares(
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    threshold: float,
    floor: float,
) -> _Shares:
    h, valid = to_rows(entropy, mask, cu_seqlens)
    floored = h <= floor
    h = h.clamp(min=floor)
    positive = rewards > threshold
    same = (same_group(groups) & (positive[:, None] == positive[None, :])).to(rewards.dtype)
    weight = torch.where(valid, torch.where(positive[:, None], h, 1 / h), 0)
    return _Shares(
        valid, positive, same, weight, same @ valid.to(rewards.dtype), same @ weight, floored & valid
    )


def gtpo_rewards(
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha1: float,
    alpha2: float,
    threshold: float,
    floor: float,
) -> Tensor:
    s = _shares(rewards, entropy, groups, mask, cu_seqlens, threshold, floor)
    share = s.count * s.weight / s.total
    shaped = torch.where(
        s.positive[:, None], alpha1 * rewards[:, None] + alpha2 * share, -alpha1 - alpha2 * share
    )
    return from_rows(torch.where(s.valid, shaped, 0), entropy.shape, cu_seqlens)


def gtpo_rewards_backward(
    grad: Tensor,
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha1: float,
    alpha2: float,
    threshold: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """The gradients in ``rewards`` and in ``entropy``."""
    s = _shares(rewards, entropy, groups, mask, cu_seqlens, threshold, floor)
    up, _ = to_rows(grad, mask, cu_seqlens)
    grad_rewards = torch.where(s.positive, alpha1 * up.sum(1), 0)

    through = s.same @ (up * s.weight)
    grad_weight = alpha2 * s.count / s.total * (up - through / s.total)
    # d weight / d H: 1 for right rows; for wrong ones -1 / H^2, against the minus sign of their share.
    slope = torch.where(s.positive[:, None], torch.ones_like(s.weight), s.weight.square())
    grad_entropy = torch.where(s.valid & ~s.floored, grad_weight * slope, 0)
    return grad_rewards, from_rows(grad_entropy, entropy.shape, cu_seqlens)
