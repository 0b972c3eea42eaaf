"""KL: per-token estimators on log-probabilities, and quantities derived from log-ratios."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .core import checks
from .ops import kl as ops
from .ops.td import step_ends, sums_between
from .reference.kl import ESTIMATORS
from .segments import row_sum

__all__ = ["TdpoTerms", "implicit_rewards", "tdpo_terms", "token_kl"]


def token_kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: str = "k3",
    mask: Tensor | None = None,
    clamp: float | tuple[float, float] | None = None,
    old_logprob: Tensor | None = None,
    ratio_grad: bool = True,
    beta: float | None = None,
    rewards: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens' log-probabilities.

    With ``d = logprob - ref_logprob``:

    ==============  ====================================  ====================================================
    estimator       value                                 over samples from the policy
    ==============  ====================================  ====================================================
    ``"k1"``        ``d``                                 unbiased; expected gradient 0
    ``"abs"``       ``|d|``                               an upper bound
    ``"k2"``        ``d**2 / 2``                          biased; its gradient is KL(policy || reference)'s
    ``"k3"``        ``exp(-d) - 1 + d``                   unbiased, never negative; its gradient is that of the
                                                          other direction, KL(reference || policy)
    ``"k1_plus"``   k1                                    straight-through: the gradient of k2
    ``"k3_plus"``   k3                                    straight-through: the gradient of k2
    ``"binary_kl"`` of the token against all others       a lower bound of the exact KL (DPPO)
    ``"binary_tv"`` ``|exp(logprob) - exp(ref)|``         total variation of the same two outcomes (DPPO)
    ==============  ====================================  ====================================================

    k3 keeps full relative accuracy near 0, where ``exp(-d) - 1`` does not (Schulman, "Approximating KL divergence",
    2020; the straight-through forms are verl's ``k1+`` and ``k3+``). The gradient matters more than the value: in
    the reward, without gradient, k1 and k3 are right; in the loss, k2, the straight-through forms, or k3 with
    ``old_logprob`` and the ratio's gradient.

    These are estimates from one token of each distribution. Where the logits are at hand,
    ``token_stats(..., ref_logits=, outputs=("kl",))`` has the exact value from the same memory pass.
    ``docs/kl.md`` has the measured mean and standard deviation of each.

    Args:
        logprob: any shape, so ``[B, T]`` as well as packed ``[N]``; float32, bfloat16, float16 or float64,
            in nats.
        ref_logprob: the same shape.
        estimator: a name of the table.
        mask: the same shape; bool, integer or float 0/1. Masked tokens are exactly 0, and so is their
            gradient.
        clamp: the largest ``|d|``, or that and the largest ``|value|``; beyond them the gradient is 0. With a
            clamp value and gradient are finite for any ``d``: ``(20, 10)`` is verl's for k3. (Binary forms do not
            use the first.)
        old_logprob: log-probabilities of the policy that sampled, the same shape, constant: the estimate is
            weighted by the ratio ``exp(logprob - old_logprob)``, which makes it unbiased off-policy.
        ratio_grad: True if that ratio has a gradient. With it, k3's expected gradient is KL(policy ||
            reference)'s.
        beta: a factor of the estimate; 1 by default.
        rewards: the same shape: the result is ``rewards - beta * estimate``, in the same pass.

    Returns:
        The shape of ``logprob``; float32 (float64 where an input is). Differentiable in ``logprob``,
        ``ref_logprob`` and ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an
            unknown estimator, a clamp that is not above 0.
    """
    _check_pair(logprob, ref_logprob)
    checks.check_choice("estimator", estimator, ESTIMATORS)
    checks.check_flag("ratio_grad", ratio_grad)
    for name, value in (("old_logprob", old_logprob), ("rewards", rewards)):
        if value is not None:
            checks.check_like(name, value, logprob, "logprob")
    if beta is not None:
        checks.check_non_negative("beta", beta)
    largest = _limits(clamp)
    mask = checks.as_mask(mask, logprob.shape, logprob.device, "logprob")
    optional = [t for t in (old_logprob, rewards) if t is not None]
    logprob, ref_logprob, *optional = checks.promote(logprob, ref_logprob, *optional)
    wide = iter(optional)
    old = None if old_logprob is None else next(wide).detach()
    added = None if rewards is None else next(wide)
    scale = float(1.0 if beta is None else beta) * (1.0 if rewards is None else -1.0)
    out: Tensor = ops.token_kl(logprob, ref_logprob, mask, old, added, estimator, *largest, scale, ratio_grad)
    return out


def implicit_rewards(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    beta: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """DPO's and PRIME's implicit token rewards, ``beta * (logprob - ref_logprob)``.

    (2305.18290, 2502.01456; dense and clamped as in RTO, 2404.18922.)

    Args:
        logprob, ref_logprob: ``[B, T]``, or ``[N]`` with ``cu_seqlens``.
        steps: step ids (integer, non-decreasing along a row, negative for none) or flags at step ends (bool),
            the same shape: the sum of a step's rewards is at its last valid token, 0 elsewhere.
        clamp: the largest ``|logprob - ref_logprob|`` of a token.

    Returns:
        The layout of ``logprob``, 0 where masked. Differentiable in both.
    """
    _check_pair(logprob, ref_logprob)
    checks.check_positive("beta", beta)
    rows = checks.token_layout("logprob", logprob, mask, cu_seqlens)
    markers = checks.step_markers(steps, logprob, rows, "logprob")
    rewards = token_kl(logprob, ref_logprob, estimator="k1", mask=rows.mask, clamp=clamp, beta=beta)
    if markers is None:
        return rewards
    ends = step_ends(markers, rows)
    counted = rewards if markers.dtype is torch.bool else torch.where(markers >= 0, rewards, 0)
    return sums_between(counted, ends, rows)


class TdpoTerms(NamedTuple):
    """Per row, ``[B]``: the sum of log-ratios, and TDPO's sequential KL(reference || policy)."""

    log_ratio: Tensor
    sequential_kl: Tensor


def tdpo_terms(
    logprob: Tensor,
    ref_logprob: Tensor,
    reverse_kl: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TdpoTerms:
    """Per-response terms of TDPO's loss (2404.11999).

    With the terms of the chosen ``w`` and the rejected ``l`` response, TDPO2 is ``-log sigmoid(beta *
    (w.log_ratio - l.log_ratio) - alpha * beta * (l.sequential_kl - w.sequential_kl.detach()))``.

    Args:
        logprob, ref_logprob: per token, ``[B, T]``, or ``[N]`` with ``cu_seqlens``.
        reverse_kl: exact KL(reference || policy) at every token, ``reverse_kl`` of :func:`rewardops.token_stats`.
    """
    _check_pair(logprob, ref_logprob)
    checks.check_like("reverse_kl", reverse_kl, logprob, "logprob")
    checks.token_layout("logprob", logprob, mask, cu_seqlens)
    ratio = token_kl(logprob, ref_logprob, estimator="k1", mask=mask)
    return TdpoTerms(
        row_sum(ratio, mask=mask, cu_seqlens=cu_seqlens),
        row_sum(reverse_kl, mask=mask, cu_seqlens=cu_seqlens),
    )


# ---- arguments ---------------------------------------------------------------------------------------------


def _check_pair(logprob: Tensor, ref_logprob: Tensor) -> None:
    checks.check_float("logprob", logprob)
    checks.check_like("ref_logprob", ref_logprob, logprob, "logprob")


def _limits(clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if clamp is None:
        return float("inf"), float("inf")
    limits = tuple(clamp) if isinstance(clamp, (tuple, list)) else (clamp, float("inf"))
    numbers = [c for c in limits if isinstance(c, (int, float)) and not isinstance(c, bool) and c > 0]
    if len(limits) != 2 or len(numbers) != 2:
        raise ValueError(
            f"clamp: got {clamp!r}, want a number above 0, or two: of the difference and of the value"
        )
    return float(limits[0]), float(limits[1])
