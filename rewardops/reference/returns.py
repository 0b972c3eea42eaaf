"""Returns, the specification (see :mod:`rewardops.returns`): a loop over time for each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import from_rows, to_rows


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


def extreme_returns(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None, largest: bool
) -> Tensor:
    r, valid = to_rows(rewards, mask, cu_seqlens)
    ends = step_ends(steps, valid, cu_seqlens)
    returns = torch.zeros_like(r)
    best, begun = r.new_zeros(r.shape[0]), ends.new_zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        better = r[:, t] >= best if largest else r[:, t] <= best
        # A NaN, once met, stays.
        take = ends[:, t] & (~begun | better | r[:, t].isnan())
        best, begun = torch.where(take, r[:, t], best), begun | ends[:, t]
        returns[:, t] = torch.where(valid[:, t], best, 0)
    return from_rows(returns, rewards.shape, cu_seqlens)


def extreme_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    largest: bool,
) -> Tensor:
    """A step end whose reward is the return there takes what came since the last such: the earliest of equals."""
    r, valid = to_rows(rewards, mask, cu_seqlens)
    found, up = (to_rows(x, mask, cu_seqlens)[0] for x in (returns, grad))
    takes = step_ends(steps, valid, cu_seqlens) & ((r == found) | (r.isnan() & found.isnan()))
    out = torch.zeros_like(r)
    pending = r.new_zeros(r.shape[0], dtype=torch.float64)
    for t in range(r.shape[1]):
        pending = pending + up[:, t]
        out[:, t] = torch.where(takes[:, t], pending.to(r.dtype), 0)
        pending = torch.where(takes[:, t], 0, pending)
    return from_rows(out, rewards.shape, cu_seqlens)


# ---- the soft minimum of the steps still to come -----------------------------------------------------------


def softmin_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The returns, and the log of the sum they are made of (float64)."""
    r, valid = to_rows(rewards, mask, cu_seqlens)
    ends = step_ends(steps, valid, cu_seqlens)
    returns, log_sums = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.float64)
    log_sum = log_sums.new_full(r.shape[:1], -torch.inf)
    count = torch.zeros_like(log_sum)
    for t in reversed(range(r.shape[1])):
        here = torch.logaddexp(log_sum, -r[:, t].double() / temperature)
        log_sum = torch.where(ends[:, t], here, log_sum)
        count = count + ends[:, t]
        kept = valid[:, t] & (count > 0)
        log_sums[:, t] = torch.where(kept, log_sum, 0)
        shared = count.clamp(min=1).log() if mean else 0
        returns[:, t] = torch.where(kept, -temperature * (log_sum - shared), 0).to(r.dtype)
    return from_rows(returns, rewards.shape, cu_seqlens), from_rows(log_sums, rewards.shape, cu_seqlens)


def softmin_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    log_sums: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
) -> Tensor:
    """``grad r[j] = sum over tokens t up to step j of grad[t] exp(-r[j] / T - log_sum[t])``."""
    r, valid = to_rows(rewards, mask, cu_seqlens)
    ends = step_ends(steps, valid, cu_seqlens)
    logs, up = (to_rows(x, mask, cu_seqlens)[0] for x in (log_sums, grad))
    out = torch.zeros_like(r)
    pending = r.new_zeros(r.shape[0], dtype=torch.float64)
    total, before = pending, pending
    for t in range(r.shape[1]):
        pending = pending + up[:, t]
        here = logs[:, t]
        # Relative to this step's sum, which is no larger than the one before.
        fall = torch.where(here == before, 0, here - before).exp()
        summed = torch.where((fall > 0) & (total != 0), fall * total, 0) + pending
        weight = (-r[:, t].double() / temperature - here).exp()
        value = torch.where(here.isinf(), 0, summed * weight)
        end = ends[:, t]
        out[:, t] = torch.where(end, value, 0).to(r.dtype)
        total, before = torch.where(end, summed, total), torch.where(end, here, before)
        pending = torch.where(end, 0, pending)
    return from_rows(out, rewards.shape, cu_seqlens)


# ---- PURE's transform --------------------------------------------------------------------------------------


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


# ---- discounted sums and temporal differences --------------------------------------------------------------


def times(factor: Tensor, value: Tensor) -> Tensor:
    """0 where the factor is, whatever the value."""
    return torch.where(factor == 0, 0, factor * torch.where(factor == 0, 0, value))


def _factors(given: Tensor | None, value: float, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T]``, from a number, ``[B, 1]`` or a value per token."""
    if given is None:
        return like.new_full(like.shape, value, dtype=torch.float64)
    if given.dim() == 2 and given.shape[1] == 1:
        return given.expand(like.shape)
    return to_rows(given, None, cu_seqlens)[0]


class _Td:
    """The terms of a scan as ``[B, T]`` in float64."""

    def __init__(self, rewards, rho, trace, gammas, lambdas, mask, cu_seqlens, gamma, lam, decay) -> None:  # type: ignore[no-untyped-def]
        self.rewards, self.valid = to_rows(rewards, mask, cu_seqlens)
        self.cu_seqlens, self.shape = cu_seqlens, rewards.shape
        self.gamma = _factors(gammas, gamma, self.rewards, cu_seqlens)
        self.lam = _factors(lambdas, lam, self.rewards, cu_seqlens)
        one = torch.ones_like(self.gamma)
        self.rho, self.trace = (
            one if x is None else torch.where(self.valid, to_rows(x, None, cu_seqlens)[0].double(), 1)
            for x in (rho, trace)
        )
        # A row ends at its last valid token; what is masked before it is a step, or is passed over.
        live = self.valid.flip(1).cumsum(1).flip(1) > 0
        self.steps = live if decay else self.valid

    def tokens(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return from_rows(torch.where(self.valid, rows, 0).to(dtype), self.shape, self.cu_seqlens)


def td_scan(
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
) -> tuple[Tensor, Tensor]:
    p = _Td(rewards, rho, trace, gammas, lambdas, mask, cu_seqlens, gamma, lam, decay)
    r = p.rewards.double()
    v = torch.zeros_like(r) if values is None else to_rows(values, mask, cu_seqlens)[0].double()
    out = torch.zeros_like(r)
    carry = r.new_zeros(r.shape[0])
    ahead = carry if bootstrap is None else bootstrap.double()
    for t in reversed(range(r.shape[1])):
        step = p.steps[:, t]
        delta = times(p.rho[:, t], r[:, t] + times(p.gamma[:, t], ahead) - v[:, t])
        y = delta + times(p.gamma[:, t] * p.lam[:, t] * p.trace[:, t], carry)
        carry, ahead = torch.where(step, y, carry), torch.where(step, v[:, t], ahead)
        out[:, t] = carry
    returns = rewards.new_empty(0) if values is None else p.tokens(out + v, rewards.dtype)
    return p.tokens(out, rewards.dtype), returns


def td_scan_backward(
    grad: Tensor | None,
    grad_returns: Tensor | None,
    rewards: Tensor,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
    has_values: bool,
    has_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``u[t] = g[t] + gamma lam trace u`` of the token before; the gradients are ``rho u`` and what V is in."""
    p = _Td(rewards, rho, trace, gammas, lambdas, mask, cu_seqlens, gamma, lam, decay)
    none = torch.zeros_like(p.gamma)
    direct, through = (
        none if g is None else to_rows(g, mask, cu_seqlens)[0].double() for g in (grad, grad_returns)
    )
    on_rewards, on_values = torch.zeros_like(none), torch.zeros_like(none)
    carry = passed = none.new_zeros(none.shape[0])
    for t in range(none.shape[1]):
        step = p.steps[:, t]
        u = direct[:, t] + through[:, t] + carry
        on_rewards[:, t] = times(p.rho[:, t], u)
        on_values[:, t] = passed - on_rewards[:, t] + through[:, t]
        factor = p.gamma[:, t] * p.lam[:, t] * p.trace[:, t]
        carry = torch.where(step, times(factor, u), carry)
        passed = torch.where(step, times(p.gamma[:, t], on_rewards[:, t]), passed)
    return (
        p.tokens(on_rewards, rewards.dtype),
        p.tokens(on_values, rewards.dtype) if has_values else rewards.new_empty(0),
        passed.to(rewards.dtype) if has_bootstrap else rewards.new_empty(0),
    )


# ---- made of the scan, whichever backend has it: every backend's -------------------------------------------


def prefix_scan(x: Tensor, factors: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The adjoint of a discounted sum."""
    given = (None, None, factors, None, mask, cu_seqlens)
    return torch.ops.rewardops.td_scan_backward(x, None, x, *given, 1.0, 1.0, False, False, False)[0]


def differences(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What a temporal difference passes back to its values."""
    given = (None, None, None, None, mask, cu_seqlens)
    return -torch.ops.rewardops.td_scan_backward(x, None, x, *given, 1.0, 0.0, False, True, False)[1]
