"""Group-relative advantages, the specification (see :func:`rewardops.group_advantages`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import from_rows, same_group, to_rows


class _Groups(NamedTuple):
    same: Tensor  # [B, B]: of one group, both rows live
    live: Tensor  # [B]
    count: Tensor  # type: ignore[assignment]  # [B], in the dtype of the rewards
    centred: Tensor  # reward - mean of the group; exactly 0 where the group's rewards are equal
    numerator: Tensor  # reward - baseline
    gain: Tensor  # d numerator / d centred; 0 for the baseline "none"
    inv_scale: Tensor  # 1 / (std + eps); 0 where the group's rewards are equal; 1 for the scale "none"
    std: Tensor


def _live(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if mask is None and cu_seqlens is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    if mask is None:
        assert cu_seqlens is not None
        return cu_seqlens[1:] > cu_seqlens[:-1]
    return to_rows(mask, mask, cu_seqlens)[1].any(1)


def _statistics(
    rewards: Tensor, groups: Tensor, live: Tensor, baseline: str, scale: str, eps: float, ddof: int
) -> _Groups:
    same = same_group(groups, live)
    zero = torch.zeros_like(rewards)
    r = torch.where(live, rewards, zero)
    count = same.sum(1).to(r.dtype)
    # Centred on the group's smallest reward first: rewards near 1000 keep their differences, and equal
    # rewards, which have a std of rounding size, come out as exactly 0.
    low = torch.where(same, r[None, :], torch.inf).amin(1) if r.numel() else zero
    differs = (same & (r[None, :] != low[:, None])).any(1)
    above = torch.where(same, r[None, :] - low[:, None], 0)
    mean_above = above.sum(1) / count.clamp(min=1)
    centred = torch.where(live & differs, r - low - mean_above, 0)
    square = torch.where(same, above - mean_above[:, None], 0).square().sum(1)
    std = torch.where(differs, square / (count - ddof).clamp(min=1), 0).sqrt()

    if baseline == "none":
        numerator, gain = r, zero
    else:
        gain = torch.ones_like(r)
        if baseline == "leave_one_out":
            gain = torch.where(count > 1, count / (count - 1).clamp(min=1), 0)
        numerator = gain * centred
    inv_scale = torch.ones_like(r)
    if scale == "std":
        inv_scale = torch.where(differs, 1 / (std + eps), 0)
    return _Groups(same, live, count, centred, numerator, gain, torch.where(live, inv_scale, 0), std)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor]:
    live = _live(rewards, mask, cu_seqlens)
    g = _statistics(rewards, groups, live, baseline, scale, eps, ddof)
    # A degenerate group has inv_scale 0, and an infinite reward in it must still not make a NaN.
    advantages = torch.where(g.inv_scale == 0, 0, g.numerator * g.inv_scale)
    if mask is None and cu_seqlens is None:
        return advantages, g.inv_scale
    tokens = mask if mask is not None else torch.ones(num_tokens, dtype=torch.bool, device=rewards.device)
    _, valid = to_rows(tokens, mask, cu_seqlens)
    rows = torch.where(valid, advantages[:, None], 0)
    return from_rows(rows, tokens.shape, cu_seqlens), g.inv_scale


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> Tensor:
    live = _live(rewards, mask, cu_seqlens)
    g = _statistics(rewards, groups, live, baseline, scale, eps, ddof)
    if grad is None:
        up = torch.zeros_like(rewards)
    elif mask is None and cu_seqlens is None:
        up = grad
    else:
        up = to_rows(grad, mask, cu_seqlens)[0].sum(1)
    up = torch.where(g.inv_scale == 0, 0, up)

    same = g.same.to(rewards.dtype)
    out = g.inv_scale * up
    if baseline != "none":
        out = g.gain * (out - g.inv_scale * (same @ up) / g.count.clamp(min=1))
    if scale == "std":
        # Through the std: d std / d r_j = centred_j / ((n - ddof) std).
        through = up * g.numerator
        if grad_inv_scale is not None:
            through = through + grad_inv_scale
        d_std = torch.where(g.std > 0, g.centred / ((g.count - ddof).clamp(min=1) * g.std), 0)
        out = out - d_std * g.inv_scale.square() * (same @ torch.where(g.inv_scale == 0, 0, through))
    return torch.where(live, out, 0)
