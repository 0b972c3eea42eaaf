"""Discounted sums and temporal differences, the specification (see :mod:`rewardops.td`): loops over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Factors, Flags, Offsets, RealRows, RealTokens
from ..core.precision import wide, widest
from ..core.rows import Layout, from_rows, to_rows


class TdArgs(NamedTuple):
    """Arguments of ``td_scan`` and its backward pass.

    Per-token tensors have the shape of ``rewards``. Gradients reach ``rewards``, ``values`` and ``bootstrap``.
    """

    rewards: RealTokens
    """``[B, T]``, or ``[N]`` packed; float32 or float64."""
    values: RealTokens | None = None
    """Per token, the dtype of ``rewards``; None for 0 (without returns), and in the backward pass."""
    bootstrap: RealRows | None = None
    """``[B]``, the value after the last token of a row; None for 0, and in the backward pass."""
    rho: RealTokens | None = None
    """Per token, the factor of its temporal difference (V-trace); None for 1."""
    trace: RealTokens | None = None
    """Per token, a factor of its carry from the next token (V-trace); None for 1."""
    gammas: Factors | None = None
    """float64, per token or ``[B, 1]``; None: ``gamma`` for all."""
    lambdas: Factors | None = None
    """float64, per token or ``[B, 1]``; None: ``lam`` for all."""
    mask: Flags | None = None
    """bool, per token; None: every token counts."""
    cu_seqlens: Offsets | None = None
    """``[B + 1]`` int32 or int64, offsets of packed rows; None: padded rows."""
    gamma: float = 1.0
    lam: float = 1.0
    decay: bool = False
    """True: masked tokens inside a row are steps of reward and value 0. False: they are skipped."""


def times(factor: Tensor, value: Tensor) -> Tensor:
    """``factor * value``; 0 where the factor is 0, even if the value is infinite or NaN."""
    return torch.where(factor == 0, 0, factor * torch.where(factor == 0, 0, value))


def _factors(per_token: Tensor | None, value: float, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T]``, from a number, ``[B, 1]`` or a value per token."""
    if per_token is None:
        return like.new_full(like.shape, value, dtype=torch.float64)
    if per_token.dim() == 2 and per_token.shape[1] == 1:
        return per_token.expand(like.shape)
    return to_rows(per_token, None, cu_seqlens)[0]


class _Terms:
    """The terms of a scan as ``[B, T]`` in float64."""

    def __init__(self, a: TdArgs) -> None:
        self.rewards, self.valid = to_rows(a.rewards, a.mask, a.cu_seqlens)
        self.cu_seqlens, self.shape = a.cu_seqlens, a.rewards.shape
        self.gamma = _factors(a.gammas, a.gamma, self.rewards, a.cu_seqlens)
        self.lam = _factors(a.lambdas, a.lam, self.rewards, a.cu_seqlens)
        one = torch.ones_like(self.gamma)
        self.rho, self.trace = (
            one if x is None else torch.where(self.valid, to_rows(x, None, a.cu_seqlens)[0].double(), 1)
            for x in (a.rho, a.trace)
        )
        # A row ends at its last valid token; masked tokens before it are steps, or are skipped.
        inside = self.valid.flip(1).cumsum(1).flip(1) > 0
        self.steps = inside if a.decay else self.valid

    def tokens(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return from_rows(torch.where(self.valid, rows, 0).to(dtype), self.shape, self.cu_seqlens)


def td_scan(a: TdArgs) -> tuple[Tensor, Tensor]:
    p = _Terms(a)
    r = p.rewards.double()
    v = torch.zeros_like(r) if a.values is None else to_rows(a.values, a.mask, a.cu_seqlens)[0].double()
    out = torch.zeros_like(r)
    carry = r.new_zeros(r.shape[0])
    ahead = carry if a.bootstrap is None else a.bootstrap.double()
    for t in reversed(range(r.shape[1])):
        step = p.steps[:, t]
        delta = times(p.rho[:, t], r[:, t] + times(p.gamma[:, t], ahead) - v[:, t])
        y = delta + times(p.gamma[:, t] * p.lam[:, t] * p.trace[:, t], carry)
        carry, ahead = torch.where(step, y, carry), torch.where(step, v[:, t], ahead)
        out[:, t] = carry
    dtype = a.rewards.dtype
    returns = a.rewards.new_empty(0) if a.values is None else p.tokens(out + v, dtype)
    return p.tokens(out, dtype), returns


def td_scan_backward(
    grad: Tensor | None, grad_returns: Tensor | None, a: TdArgs, to_values: bool, to_bootstrap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``u[t] = g[t] + (gamma lam trace u)[t-]``, t- the token before; ``rho u``: gradient of the rewards."""
    p = _Terms(a)
    none = torch.zeros_like(p.gamma)
    direct, through = (
        none if g is None else to_rows(g, a.mask, a.cu_seqlens)[0].double() for g in (grad, grad_returns)
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
    dtype = a.rewards.dtype
    return (
        p.tokens(on_rewards, dtype),
        p.tokens(on_values, dtype) if to_values else a.rewards.new_empty(0),
        passed.to(dtype) if to_bootstrap else a.rewards.new_empty(0),
    )


# ---- compositions of the scan, shared by all backends ------------------------------------------------------

Scan = Callable[[TdArgs], tuple[Tensor, Tensor]]
ScanBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]
PrefixScan = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
Differences = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def of_scan(scan_backward: ScanBackward) -> tuple[PrefixScan, Differences]:
    """A backend's ``prefix_scan`` and ``differences``, from its ``td_scan_backward``."""

    def prefix_scan(
        x: Tensor, factors: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The adjoint of a discounted sum."""
        a = TdArgs(x, gammas=factors, mask=mask, cu_seqlens=cu_seqlens)
        return scan_backward(x, None, a, False, False)[0]

    def differences(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """The adjoint of a temporal difference in its values."""
        a = TdArgs(x, mask=mask, cu_seqlens=cu_seqlens, lam=0.0)
        return -scan_backward(x, None, a, True, False)[1]

    return prefix_scan, differences


prefix_scan, differences = of_scan(td_scan_backward)


def adjoint_of_prefix_scan(
    grad: Tensor, factors: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> TdArgs:
    """Arguments of the scan whose advantages are the gradient of ``prefix_scan``'s ``x``."""
    return TdArgs(grad, gammas=factors, mask=mask, cu_seqlens=cu_seqlens)


def adjoint_of_differences(grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> TdArgs:
    """Arguments of the scan whose advantages are the negative gradient of ``differences``' ``x``."""
    return TdArgs(torch.zeros_like(grad), grad, mask=mask, cu_seqlens=cu_seqlens, lam=0.0)


def step_ends(scan: Scan, markers: Tensor, rows: Layout) -> Tensor:
    """Flags of the tokens that end a step: bool, the layout of the markers.

    Flags are the ends themselves. With ids, a step ends at the last valid token before another id; negative ids
    belong to no step.
    """
    if markers.dtype is torch.bool:
        return markers if rows.mask is None else markers & rows.mask
    # The distance to the next valid token's id; beyond a row that is -1.
    ids = wide(markers)
    beyond = ids.new_full((rows.batch,), -1.0)
    a = TdArgs(torch.zeros_like(ids), ids, beyond, mask=rows.mask, cu_seqlens=rows.cu_seqlens, lam=0.0)
    return (markers >= 0) & (scan(a)[0] != 0)


def sums_between(prefix_scan: PrefixScan, x: Tensor, ends: Tensor, rows: Layout) -> Tensor:
    """At each end, the sum of the valid tokens after the previous end, up to and including it; 0 elsewhere."""
    sums = prefix_scan(x, torch.where(ends, 0.0, 1.0).to(widest(x.device)), rows.mask, rows.cu_seqlens)
    return torch.where(ends, sums, 0)
