"""Returns, the specification (see :mod:`rewardops.returns`): a loop over time for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, Markers, Offsets, RealTokens
from ..core.rows import from_rows, to_rows


class ReturnsArgs(NamedTuple):
    """Arguments of returns over the steps of a row, and of their backward passes."""

    rewards: RealTokens
    """``[B, T]``, or ``[N]`` packed; float32 or float64. Read at step ends."""
    mask: Flags | None
    """bool, the shape of ``rewards``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]`` int32 or int64, offsets of packed rows; None: padded rows."""
    steps: Markers | None
    """The shape of ``rewards``: bool flags at step ends, or int64 step ids; None: every valid token is a step."""


def step_ends(steps: Tensor | None, valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T]`` bool: the positions that carry a step's reward.

    Without steps every valid token is a step. Flags are the ends themselves. With ids, a step ends at the
    last valid token before another id; negative ids belong to no step.
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


def _rows(a: ReturnsArgs) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, T]``: rewards, valid tokens, step ends."""
    rewards, valid = to_rows(a.rewards, a.mask, a.cu_seqlens)
    return rewards, valid, step_ends(a.steps, valid, a.cu_seqlens)


def extreme_returns(a: ReturnsArgs, largest: bool) -> Tensor:
    r, valid, ends = _rows(a)
    returns = torch.zeros_like(r)
    best, begun = r.new_zeros(r.shape[0]), ends.new_zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        better = r[:, t] >= best if largest else r[:, t] <= best
        # A NaN stays the extreme of all earlier tokens.
        take = ends[:, t] & (~begun | better | r[:, t].isnan())
        best, begun = torch.where(take, r[:, t], best), begun | ends[:, t]
        returns[:, t] = torch.where(valid[:, t], best, 0)
    return from_rows(returns, a.rewards.shape, a.cu_seqlens)


def extreme_returns_backward(grad: Tensor, returns: Tensor, a: ReturnsArgs, largest: bool) -> Tensor:
    """Gradient of the rewards.

    At a step end that attains the extreme it is the sum of upstream gradients since the previous such end; ties go
    to the earliest.
    """
    r, _, ends = _rows(a)
    extreme, up = (to_rows(x, a.mask, a.cu_seqlens)[0] for x in (returns, grad))
    takes = ends & ((r == extreme) | (r.isnan() & extreme.isnan()))
    out = torch.zeros_like(r)
    pending = r.new_zeros(r.shape[0], dtype=torch.float64)
    for t in range(r.shape[1]):
        pending = pending + up[:, t]
        out[:, t] = torch.where(takes[:, t], pending.to(r.dtype), 0)
        pending = torch.where(takes[:, t], 0, pending)
    return from_rows(out, a.rewards.shape, a.cu_seqlens)


# ---- the soft minimum of the steps still to come -----------------------------------------------------------


def softmin_returns(a: ReturnsArgs, temperature: float, mean: bool) -> tuple[Tensor, Tensor]:
    """The returns, and the logarithms of the sums in their formula (float64)."""
    r, valid, ends = _rows(a)
    returns, log_sums = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.float64)
    log_sum = log_sums.new_full(r.shape[:1], -torch.inf)
    count = torch.zeros_like(log_sum)
    for t in reversed(range(r.shape[1])):
        here = torch.logaddexp(log_sum, -r[:, t].double() / temperature)
        log_sum = torch.where(ends[:, t], here, log_sum)
        count = count + ends[:, t]
        ahead = valid[:, t] & (count > 0)
        log_sums[:, t] = torch.where(ahead, log_sum, 0)
        shared = count.clamp(min=1).log() if mean else 0
        returns[:, t] = torch.where(ahead, -temperature * (log_sum - shared), 0).to(r.dtype)
    shape, cu_seqlens = a.rewards.shape, a.cu_seqlens
    return from_rows(returns, shape, cu_seqlens), from_rows(log_sums, shape, cu_seqlens)


def softmin_returns_backward(grad: Tensor, log_sums: Tensor, a: ReturnsArgs, temperature: float) -> Tensor:
    """``grad r[j] = sum over tokens t up to step j of grad[t] exp(-r[j] / T - log_sum[t])``."""
    r, _, ends = _rows(a)
    logs, up = (to_rows(x, a.mask, a.cu_seqlens)[0] for x in (log_sums, grad))
    out = torch.zeros_like(r)
    pending = r.new_zeros(r.shape[0], dtype=torch.float64)
    total, before = pending, pending
    for t in range(r.shape[1]):
        pending = pending + up[:, t]
        here = logs[:, t]
        # Relative to this step's sum, which is at most the previous step's.
        fall = torch.where(here == before, 0, here - before).exp()
        summed = torch.where((fall == 0) | (total == 0), 0, fall * total) + pending
        weight = (-r[:, t].double() / temperature - here).exp()
        value = torch.where(here.isinf(), 0, summed * weight)
        end = ends[:, t]
        out[:, t] = torch.where(end, value, 0).to(r.dtype)
        total, before = torch.where(end, summed, total), torch.where(end, here, before)
        pending = torch.where(end, 0, pending)
    return from_rows(out, a.rewards.shape, a.cu_seqlens)


# ---- PURE's transform --------------------------------------------------------------------------------------


def _softmin_weights(a: ReturnsArgs, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, T]``: rewards at step ends, their weights, step ends."""
    r, _, ends = _rows(a)
    r = torch.where(ends, r, 0)
    if r.shape[1] == 0:
        return r, r, ends
    low = torch.where(ends, r, torch.inf).amin(1, keepdim=True)
    weight = torch.where(ends, ((low - r) / temperature).exp(), 0)
    return r, torch.where(ends, weight / weight.sum(1, keepdim=True), 0), ends


def softmin_rewards(a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    r, weight, _ = _softmin_weights(a, temperature)
    return from_rows(weight * r, a.rewards.shape, a.cu_seqlens)


def softmin_rewards_backward(
    grad: Tensor, a: ReturnsArgs, temperature: float, through_weights: bool
) -> Tensor:
    r, weight, ends = _softmin_weights(a, temperature)
    up = torch.where(ends, to_rows(grad, None, a.cu_seqlens)[0], 0)
    out = weight * up
    if through_weights:
        out = out - weight * (up * r - (weight * up * r).sum(1, keepdim=True)) / temperature
    return from_rows(torch.where(ends, out, 0), a.rewards.shape, a.cu_seqlens)
