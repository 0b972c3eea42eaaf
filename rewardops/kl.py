"""KL: per-token estimators on log-probabilities, and quantities derived from log-ratios."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .core import checks
from .core.checks import Number
from .core.settings import may_read
from .ops import kl as ops
from .ops.td import step_ends, sums_between
from .reference.kl import ESTIMATORS
from .segments import row_sum

__all__ = ["TdpoTerms", "implicit_rewards", "tdpo_terms", "token_kl"]

Clamp = float | Tensor | tuple[float | Tensor, float | Tensor]


def token_kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: str = "k3",
    mask: Tensor | None = None,
    clamp: Clamp | None = None,
    old_logprob: Tensor | None = None,
    ratio_grad: bool = True,
    ratio_cap: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    rewards: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens' log-probabilities.

    With ``d = logprob - ref_logprob``:

    ================  ====================================  ====================================================
    estimator         value                                 over samples from the policy
    ================  ====================================  ====================================================
    ``"k1"``          ``d``                                 unbiased; expected gradient 0
    ``"abs"``         ``|d|``                               an upper bound
    ``"k2"``          ``d**2 / 2``                          biased; its gradient is KL(policy || reference)'s
    ``"k3"``          ``exp(-d) - 1 + d``                   unbiased, never negative; its gradient is that of the
                                                            other direction, KL(reference || policy)
    ``"k1_plus"``     k1                                    straight-through: the gradient of k2
    ``"k3_plus"``     k3                                    straight-through: the gradient of k2
    ``"binary_kl"``   of the token against all others       a lower bound of the exact KL (DPPO)
    ``"binary_tv"``   ``|exp(logprob) - exp(ref)|``         total variation of the same two outcomes (DPPO)
    ================  ====================================  ====================================================

    k3 keeps full relative accuracy near 0, where ``exp(-d) - 1`` does not (Schulman, "Approximating KL divergence",
    2020; the straight-through forms are verl's ``k1+`` and ``k3+``). The gradient matters more than the value: in
    the reward, without gradient, k1 and k3 are right; in the loss, k2, the straight-through forms, or k3 with
    ``old_logprob`` and the ratio's gradient.

    These are estimates from one token of each distribution. Where the logits are at hand,
    ``token_stats(..., ref_logits=, outputs=("kl",))`` has the exact value from the same memory pass.
    ``docs/kl.md`` has the measured mean and standard deviation of each.

    A log-probability of ``-inf`` gives the limit of the formula, in value and gradient: k3 is ``inf`` with slope
    ``-inf`` in ``logprob`` at a token that the policy excludes, and ``inf`` with slope 1 where the reference does.
    Where both exclude it ``d`` counts as 0, as a column that is ``-inf`` in both logits is in no divergence of
    ``token_stats``. An infinite estimate or slope times a ``beta`` or an upstream gradient of 0 is 0. A NaN
    log-probability makes value and gradient NaN, with a clamp too. (binary_kl's slope in ``logprob`` counts as 0
    at a policy's probability of exactly 1, unless the reference excludes the token.)

    Args:
        logprob: any shape, so ``[B, T]`` as well as packed ``[N]``; float32, bfloat16, float16 or float64,
            in nats.
        ref_logprob: the same shape.
        estimator: a name of the table.
        mask: the same shape; bool, integer or float 0/1. Masked tokens are exactly 0, and so is their
            gradient. None for all tokens.
        clamp: the largest ``|d|``, or that and the largest ``|value|``; beyond either the gradient is 0, of the
            straight-through forms as well. Value and gradient are then finite for any ``d``, as far as ``exp``
            of the first number is: ``(20, 10)`` is verl's for k3. The binary forms have the second number only.
            The first limits ``logprob - old_logprob`` too. None for no limit.
        old_logprob: log-probabilities of the policy that sampled, the same shape, constant: the estimate is
            weighted by the ratio ``exp(logprob - old_logprob)``, which makes it unbiased off-policy. NaN means
            unknown: the ratio is 1. With a clamp the result is finite for any number here. None for no ratio.
        ratio_grad: True if that ratio has a gradient, where it is neither unknown nor beyond ``clamp`` or
            ``ratio_cap``. With it, k3's expected gradient is KL(policy || reference)'s.
        ratio_cap: the largest ratio (truncated importance sampling); a larger one is the cap, constant. None
            for no cap.
        beta: a factor of the estimate; None for 1. A number, or a float tensor in the precision of the result:
            of shape ``[]``, ``[B]`` for ``logprob`` of ``[B, T]`` (one per row), or the shape of ``logprob``
            (one per token), finite and at least 0 (checked on the CPU, elsewhere under
            :func:`rewardops.debug`). Constant: no gradient flows into it. Masked tokens do not read it.
        rewards: the same shape: the result is ``rewards - beta * estimate``, in the same pass. None for the
            estimate.

    Returns:
        The shape of ``logprob``; float32 (float64 where an input is). Differentiable in ``logprob``,
        ``ref_logprob`` and ``rewards``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown estimator, a clamp or cap that is not
            above 0, a cap without ``old_logprob``, a ``beta`` below 0 or not finite.

    Example:
        >>> logprob, ref_logprob = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
        >>> [round(x, 3) for x in ro.token_kl(logprob, ref_logprob).tolist()]  # k3: e - 2
        [0.0, 0.718]
        >>> ro.token_kl(logprob, ref_logprob, estimator="k1", beta=0.5, rewards=torch.ones(2)).tolist()
        [1.0, 1.5]
    """
    _check_pair(logprob, ref_logprob)
    checks.check_choice("estimator", estimator, ESTIMATORS)
    checks.check_flag("ratio_grad", ratio_grad)
    for name, value in (("old_logprob", old_logprob), ("rewards", rewards)):
        if value is not None:
            checks.check_like(name, value, logprob, "logprob")
    cap = _cap(ratio_cap, old_logprob)
    largest = _limits(clamp)
    mask = checks.as_mask(mask, logprob.shape, logprob.device, "logprob")
    weight = None
    factor: Number = 1.0
    if isinstance(beta, Tensor) and beta.dim():
        weight = _factors(beta, logprob, mask)
    elif beta is not None:
        factor = checks.check_non_negative("beta", beta)
    optional = [t for t in (old_logprob, rewards) if t is not None]
    logprob, ref_logprob, *optional = checks.promote(logprob, ref_logprob, *optional)
    wide = iter(optional)
    old = None if old_logprob is None else next(wide).detach()
    added = None if rewards is None else next(wide)
    if weight is not None:
        estimate = ops.token_kl(
            logprob, ref_logprob, mask, old, None, estimator, *largest, 1.0, ratio_grad, cap
        )
        return _weigh(estimate, weight, mask, added)
    scale = factor if rewards is None else -factor
    out: Tensor = ops.token_kl(
        logprob, ref_logprob, mask, old, added, estimator, *largest, scale, ratio_grad, cap
    )
    return out


def implicit_rewards(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    beta: float | Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    clamp: float | Tensor | None = None,
) -> Tensor:
    """DPO's and PRIME's implicit token rewards, ``beta * (logprob - ref_logprob)``.

    (2305.18290, 2502.01456; dense as in RTO, 2404.18922.) RTO clips after the factor: its ``clip(scale * (logprob -
    ref_logprob), -c, c)`` is ``beta=scale, clamp=c / scale``, with its 0.05 for both ``beta=0.05, clamp=1.0``.

    Args:
        logprob: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64, in nats.
        ref_logprob: the same shape.
        beta: a finite number above 0.
        mask: the shape of ``logprob``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        steps: step ids (integer, non-decreasing along a row, negative for none) or flags at step ends (bool),
            the same shape: the sum of a step's rewards is at its last valid token, 0 elsewhere. None for
            rewards at every token.
        clamp: the largest ``|logprob - ref_logprob|`` of a token, before ``beta``; beyond it the gradient is 0.
            The rewards are then finite for any log-probabilities that are not NaN. None for no limit.

    Returns:
        The layout of ``logprob``, float32 (float64 where an input is), 0 where masked, and where both
        log-probabilities are ``-inf``. Differentiable in both.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a number out of its range, step ids that fall along a
            row.

    Example:
        >>> logprob, ref_logprob = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-2.0, -2.0, -2.0]])
        >>> ro.implicit_rewards(logprob, ref_logprob, beta=0.5).tolist()
        [[0.5, 0.0, 0.5]]
        >>> ro.implicit_rewards(logprob, ref_logprob, beta=0.5, steps=torch.tensor([[0, 1, 1]])).tolist()
        [[0.5, 0.0, 0.5]]
    """
    _check_pair(logprob, ref_logprob)
    beta = checks.check_positive("beta", beta)
    rows = checks.token_layout("logprob", logprob, mask, cu_seqlens)
    markers = checks.step_markers(steps, logprob, rows, "logprob")
    rewards = token_kl(logprob, ref_logprob, estimator="k1", mask=rows.mask, clamp=clamp, beta=beta)
    if markers is None:
        return rewards
    ends = step_ends(markers, rows)
    counted = rewards if markers.dtype is torch.bool else torch.where(markers >= 0, rewards, 0)
    return sums_between(counted, ends, rows)


class TdpoTerms(NamedTuple):
    """Terms of TDPO's loss, one per row.

    Attributes:
        log_ratio: ``[B]``, the sum of the row's log-ratios.
        sequential_kl: ``[B]``, TDPO's sequential KL(reference || policy).

    Example:
        >>> terms = ro.tdpo_terms(torch.zeros(2, 3), -torch.ones(2, 3), torch.ones(2, 3))
        >>> terms.log_ratio.tolist()
        [3.0, 3.0]
    """

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
        logprob: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64, in nats.
        ref_logprob: the same shape.
        reverse_kl: the same shape, exact KL(reference || policy) at every token, ``reverse_kl`` of
            :func:`rewardops.token_stats`.
        mask: the shape of ``logprob``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        :class:`TdpoTerms`, two tensors ``[B]``, float32 (float64 for float64). Differentiable in all three.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> logprob, ref_logprob = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.5]])
        >>> terms = ro.tdpo_terms(logprob, ref_logprob, torch.tensor([[0.25, 0.5]]))
        >>> terms.log_ratio.tolist(), terms.sequential_kl.tolist()
        ([1.5], [0.75])
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


def _limits(clamp: Clamp | None) -> tuple[Number, Number]:
    if clamp is None:
        return math.inf, math.inf
    want = "a number above 0, or two: of the difference and of the value"
    limits = tuple(clamp) if isinstance(clamp, (tuple, list)) else (clamp, math.inf)
    if len(limits) != 2 or any(
        isinstance(c, bool) or not isinstance(c, (int, float, Tensor)) for c in limits
    ):
        raise ValueError(f"clamp: got {clamp!r}, want {want}")
    d, value = (checks.check_number("clamp", c, want) for c in limits)
    if any(not isinstance(c, Tensor) and c <= 0 for c in (d, value)):
        raise ValueError(f"clamp: got {clamp!r}, want {want}")
    return d, value


def _cap(ratio_cap: float | Tensor | None, old_logprob: Tensor | None) -> Number:
    if ratio_cap is None:
        return math.inf
    number = checks.check_positive("ratio_cap", ratio_cap)
    if old_logprob is None:
        raise ValueError(f"ratio_cap: got {ratio_cap} without old_logprob, want None")
    return number


def _factors(beta: Tensor, logprob: Tensor, mask: Tensor | None) -> Tensor:
    """Factors of the estimates, constant, in a shape that spreads over ``logprob``; 0 where masked."""
    checks.check_float("beta", beta)
    shape = tuple(logprob.shape)
    forms = {(): "for all", shape: "one per token of logprob"}
    if len(shape) == 2:
        forms[shape[:1]] = "one per row of logprob"
    if tuple(beta.shape) not in forms:
        wanted = " or ".join(f"{checks.show(form)} ({meaning})" for form, meaning in forms.items())
        raise ValueError(f"beta: got shape {checks.show(beta.shape)}, want {wanted}")
    checks.check_device("beta", beta, logprob.device, "logprob")
    beta = beta.detach()
    if len(shape) == 2 and beta.dim() == 1:
        beta = beta[:, None]
    beta = beta if mask is None else torch.where(mask, beta, 0)
    if may_read(beta):
        bad = ~(beta.isfinite() & (beta >= 0))
        if bool(bad.any()):
            raise ValueError(
                f"beta: got {beta[bad][0].item()}, want finite values of at least 0 wherever the mask counts"
            )
    return beta


def _weigh(estimate: Tensor, factors: Tensor, mask: Tensor | None, rewards: Tensor | None) -> Tensor:
    """``factors * estimate``, or ``rewards`` less that; a factor of 0 silences an infinite estimate."""
    factors = factors.to(estimate.dtype)
    out = factors * torch.where((factors == 0) & estimate.isinf(), 0, estimate)
    if rewards is None:
        return out
    out = rewards - out
    return out if mask is None else torch.where(mask, out, 0)
