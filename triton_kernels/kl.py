"""Per-token KL on the GPU: elementwise; two reads and a write forward, three reads and a write backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.kl import ESTIMATORS, TokenKlArgs
from .arithmetic import log1p
from .launch import BITS, cdiv, pair, pointer, unpair

BLOCK = 1024

# Indices of estimators in the table of the specification.
K1 = tl.constexpr(ESTIMATORS.index("k1"))
ABS = tl.constexpr(ESTIMATORS.index("abs"))
K2 = tl.constexpr(ESTIMATORS.index("k2"))
K1_PLUS = tl.constexpr(ESTIMATORS.index("k1_plus"))
K3_PLUS = tl.constexpr(ESTIMATORS.index("k3_plus"))
BINARY_KL = tl.constexpr(ESTIMATORS.index("binary_kl"))
BINARY_TV = tl.constexpr(ESTIMATORS.index("binary_tv"))


class Limits(NamedTuple):
    """Limits of the clamps; infinite without a clamp."""

    difference: Any  # clamp of the difference of log-probabilities
    value: Any  # clamp of the estimate


class Estimate(NamedTuple):
    """The estimate at a token, and its derivatives."""

    value: Any
    by_logprob: Any
    by_ref: Any


@triton.jit
def exp_remainder(x, TERMS: tl.constexpr):
    """(e^x - 1 - x) / x^2 on |x| < 1, by its Taylor series."""
    y = x * 0 + 1.0
    for i in tl.static_range(TERMS):
        y = 1.0 + y * x * (1.0 / (TERMS + 2 - i))
    return y * 0.5


@triton.jit
def expm1_minus(x, LINEAR: tl.constexpr, TERMS: tl.constexpr):
    """e^x - 1 - x (LINEAR) or e^x - 1, to full relative accuracy."""
    near = (x < 1) & (x > -1)
    s = tl.where(near, x, 0.0)
    small = s * s * exp_remainder(s, TERMS)
    large = tl.exp(x) - 1
    if LINEAR:
        return tl.where(near, small, large - x)
    return tl.where(near, s + small, large)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def clamp(x, limit):
    """Clamp x to [-limit, limit]; a NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def estimate_kl(logprob, ref, limits, ESTIMATOR: tl.constexpr, TERMS: tl.constexpr):
    difference = logprob - ref
    if ESTIMATOR == BINARY_TV or ESTIMATOR == BINARY_KL:
        a = tl.exp(logprob)
        b = tl.exp(ref)
        gap = tl.where(tl.abs(difference) < 1, b * expm1_minus(difference, False, TERMS), a - b)
        if ESTIMATOR == BINARY_TV:
            value = tl.abs(gap)
            by_logprob = sign(gap) * a
            by_ref = -sign(gap) * b
        else:
            # sum p (e^-x - 1 + x) over both outcomes, each at least 0: nothing cancels.
            rest = -expm1_minus(logprob, False, TERMS)
            ref_rest = -expm1_minus(ref, False, TERMS)
            safe_rest = tl.where(ref_rest > 0, ref_rest, 1.0)
            change = -gap / safe_rest
            small = tl.abs(change) < 0.5
            y = tl.where(
                small,
                log1p(tl.where(small, change, 0.0)),
                tl.log(tl.where(rest > 0, rest, 1.0)) - tl.log(safe_rest),
            )
            y = tl.where(ref_rest > 0, y, float("inf"))
            value = tl.where(a > 0, a * expm1_minus(-difference, True, TERMS), b)
            value += tl.where(rest > 0, rest * expm1_minus(-y, True, TERMS), ref_rest)
            by_logprob = tl.where((rest > 0) & (a > 0), a * (difference - y), 0.0)
            by_ref = tl.where(rest > 0, tl.where(ref_rest > 0, rest * b / safe_rest, float("inf")) - a, 0.0)
        inside = tl.abs(value) <= limits.value
        by_logprob = tl.where(inside, by_logprob, 0.0)
        by_ref = tl.where(inside, by_ref, 0.0)
    else:
        d = clamp(difference, limits.difference)
        if ESTIMATOR == K1 or ESTIMATOR == K1_PLUS:
            value = d
            slope = d * 0 + 1.0
        elif ESTIMATOR == ABS:
            value = tl.abs(d)
            slope = sign(d)
        elif ESTIMATOR == K2:
            value = d * d * 0.5
            slope = d
        else:
            value = expm1_minus(-d, True, TERMS)
            slope = -expm1_minus(-d, False, TERMS)
        not_clamped = tl.abs(difference) <= limits.difference
        inside = not_clamped & (tl.abs(value) <= limits.value)
        slope = tl.where(inside, slope, 0.0)
        if ESTIMATOR == K1_PLUS or ESTIMATOR == K3_PLUS:
            slope = difference  # straight-through estimator: the gradient of k2
        by_logprob = slope
        by_ref = -slope
    return Estimate(clamp(value, limits.value), by_logprob, by_ref)


@triton.jit(do_not_specialize=["count"])
def token_kl_kernel(
    grad, logprob, ref_logprob, mask, old_logprob, rewards, out, out_ref, count,
    d_high, d_low, value_high, value_low, scale_high, scale_low,
    ESTIMATOR: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REWARDS: tl.constexpr,
    RATIO_GRAD: tl.constexpr, BACKWARD: tl.constexpr, TO_LOGPROB: tl.constexpr, TO_REF: tl.constexpr,
    TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n: the tokens [n BLOCK, (n + 1) BLOCK)."""
    ACC: tl.constexpr = logprob.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    if HAS_MASK:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    limits = Limits(unpair(d_high, d_low, ACC), unpair(value_high, value_low, ACC))
    scale = unpair(scale_high, scale_low, ACC)
    lp = tl.load(logprob + at, mask=valid, other=-1.0)
    ref = tl.load(ref_logprob + at, mask=valid, other=-1.0)
    value, by_logprob, by_ref = estimate_kl(lp, ref, limits, ESTIMATOR, TERMS)
    if HAS_OLD:
        ratio = tl.exp(lp - tl.load(old_logprob + at, mask=valid, other=-1.0))
        if RATIO_GRAD:
            by_logprob += value
        value *= ratio
        by_logprob *= ratio
        by_ref *= ratio
    if BACKWARD:
        up = tl.load(grad + at, mask=valid, other=0.0) * scale
        if TO_LOGPROB:
            tl.store(out + at, tl.where(valid, up * by_logprob, 0.0), mask=at < count)
        if TO_REF:
            tl.store(out_ref + at, tl.where(valid, up * by_ref, 0.0), mask=at < count)
    else:
        value *= scale
        if HAS_REWARDS:
            value += tl.load(rewards + at, mask=valid, other=0.0)
        tl.store(out + at, tl.where(valid, value, 0.0), mask=at < count)


# ---- launch ------------------------------------------------------------------------------------------------


def _launch(grad: Tensor | None, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    logprob, ref_logprob = a.logprob.contiguous(), a.ref_logprob.contiguous()
    grad, old, rewards = (None if t is None else t.contiguous() for t in (grad, a.old_logprob, a.rewards))
    out, out_ref = (logprob.new_empty(logprob.shape if want else 0) for want in (to_logprob, to_ref))
    count = logprob.numel()
    if count:
        token_kl_kernel[(cdiv(count, BLOCK),)](
            pointer(grad, logprob), logprob, ref_logprob,
            logprob if a.mask is None else a.mask.contiguous().view(torch.uint8),
            pointer(old, logprob), pointer(rewards, logprob), out, out_ref, count,
            *pair(a.largest_d), *pair(a.largest_value), *pair(a.scale),
            ESTIMATOR=ESTIMATORS.index(a.estimator), HAS_MASK=a.mask is not None, HAS_OLD=old is not None,
            HAS_REWARDS=rewards is not None, RATIO_GRAD=a.ratio_grad, BACKWARD=grad is not None,
            TO_LOGPROB=to_logprob, TO_REF=to_ref, TERMS=18 if logprob.dtype is torch.float64 else 9, BLOCK=BLOCK,
            **BITS,
        )  # fmt: skip
    return out, out_ref


def token_kl(a: TokenKlArgs) -> Tensor:
    return _launch(None, a, True, False)[0]


def token_kl_backward(grad: Tensor, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    return _launch(grad, a, to_logprob, to_ref)
