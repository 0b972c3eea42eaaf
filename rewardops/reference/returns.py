"""Returns, the specification (see :func:`rewardops.min_returns` and :func:`rewardops.softmin_rewards`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import from_rows, to_rows


def step_ends(steps: Tensor | None, valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T]``: the positions that carry a step's reward.

    Without steps every valid token is a step. Flags name the ends themselves. Of ids, a step ends at the
    last valid token before another id; negative ids are of no step.
    """
    if steps is None:
        return valid
    if steps.dtype is torch.bool:
        return to_rows(steps, None, cu_seqlens)[0] & valid
    ids = to_rows(steps, None, cu_seqlens)[0]
    ends = torch.zeros_like(valid)
    following = ids.new_full(ids.shape[:1], -1)
    for t in reversed(range(ids.shape[1])):
        ends[:, t] = valid[:, t] & (ids[:, t] >= 0) & (ids[:, t] != following)
        following = torch.where(valid[:, t], ids[:, t], following)
    return ends


def min_returns(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the suffix minimum and its position in the row (-1 where no step is left)."""
    r, valid = to_rows(rewards, mask, cu_seqlens)
    ends = step_ends(steps, valid, cu_seqlens)
    returns = torch.zeros_like(r)
    argmin = torch.full(r.shape, -1, dtype=torch.int32, device=r.device)
    best = r.new_zeros(r.shape[0])
    where = argmin.new_full(r.shape[:1], -1)
    for t in reversed(range(r.shape[1])):
        # <= and not <: of equal rewards the earliest is taken. A NaN, once met, stays.
        take = ends[:, t] & ((where < 0) | (r[:, t] <= best) | r[:, t].isnan())
        best = torch.where(take, r[:, t], best)
        where = torch.where(take, t, where)
        returns[:, t] = torch.where(valid[:, t], best, 0)
        argmin[:, t] = torch.where(valid[:, t], where, -1)
    return from_rows(returns, rewards.shape, cu_seqlens), from_rows(argmin, rewards.shape, cu_seqlens)


def min_returns_backward(grad: Tensor, argmin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    where, _ = to_rows(argmin, None, cu_seqlens)
    up, inside = to_rows(grad, None, cu_seqlens)
    kept = inside & (where >= 0)
    out = torch.zeros_like(up).scatter_add(
        1, torch.where(kept, where, 0).to(torch.int64), torch.where(kept, up, 0)
    )
    return from_rows(out, grad.shape, cu_seqlens)


def _softmin_weights(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r, valid = to_rows(rewards, mask, cu_seqlens)
    ends = step_ends(steps, valid, cu_seqlens)
    r = torch.where(ends, r, 0)
    if r.shape[1] == 0:
        return r, r, ends
    low = torch.where(ends, r, torch.inf).amin(1, keepdim=True)
    weight = torch.where(ends, ((low - r) / temperature).exp(), 0)
    return r, torch.where(ends, weight / weight.sum(1, keepdim=True), 0), ends


def softmin_rewards(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    r, weight, _ = _softmin_weights(rewards, mask, cu_seqlens, steps, temperature)
    return from_rows(weight * r, rewards.shape, cu_seqlens)


def softmin_rewards_backward(
    grad: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    r, weight, ends = _softmin_weights(rewards, mask, cu_seqlens, steps, temperature)
    up = torch.where(ends, to_rows(grad, None, cu_seqlens)[0], 0)
    out = weight * up
    if through_weights:
        out = out - weight * (up * r - (weight * up * r).sum(1, keepdim=True)) / temperature
    return from_rows(out, rewards.shape, cu_seqlens)
