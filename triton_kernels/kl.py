"""Per-token KL on the GPU: elementwise; two reads and a write forward, three reads and a write backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.kl import ESTIMATORS, FAR, TokenKlArgs
from .arithmetic import log1p
from .launch import BITS, Constant, cdiv, pair, pointer, unpair

BLOCK = 1024

# Indices of estimators in the table of the specification.
K1 = Constant(ESTIMATORS.index("k1"))
ABS = Constant(ESTIMATORS.index("abs"))
K2 = Constant(ESTIMATORS.index("k2"))
K3 = Constant(ESTIMATORS.index("k3"))
K1_PLUS = Constant(ESTIMATORS.index("k1_plus"))
K3_PLUS = Constant(ESTIMATORS.index("k3_plus"))
BINARY_KL = Constant(ESTIMATORS.index("binary_kl"))
BINARY_TV = Constant(ESTIMATORS.index("binary_tv"))
BELOW = Constant(FAR)  # of d: there exp(-d) - 1 + d is exp(-d) in every digit
INF = Constant(float("inf"))


class Limits(NamedTuple):
    """Limits of the clamps; infinite without a clamp."""

    difference: Any  # clamp of the differences of log-probabilities
    value: Any  # clamp of the estimate
    ratio: Any  # cap of the ratio


class Estimate(NamedTuple):
    """The estimate at a token, and its derivatives."""

    value: Any
    by_logprob: Any
    by_ref: Any


class Ratio(NamedTuple):
    """The weight of the estimate at a token."""

    log: Any  # its logarithm within the clamp, before the cap
    value: Any
    capped: Any
    free: Any  # neither unknown nor clamped nor capped, so it may have a gradient


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
        return tl.where(near, small, tl.where(x == INF, x, large - x))
    return tl.where(near, s + small, large)


@triton.jit
def difference(a, b):
    """a - b; 0 where they are equal, infinities included."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def sign(x):
    """The sign of x; a NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.where(x == x, 0.0, x))).to(x.dtype)


@triton.jit
def clamp(x, limit):
    """Clamp x to [-limit, limit]; a NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def times(factor, x):
    """factor x; 0 where the factor is 0 and x infinite."""
    return tl.where((factor == 0) & (tl.abs(x) == INF), 0.0, factor * x)


@triton.jit
def binary_kl(logprob, ref, gap, TERMS: tl.constexpr):
    """KL of the token against all others, with its derivatives, from the gap of the token's probabilities."""
    # sum p (e^-x - 1 + x) over both outcomes, each at least 0: nothing cancels. Of an outcome of probability 0
    # under the policy the reference's probability is left.
    d = difference(logprob, ref)
    excluded = d == INF  # by the reference alone
    a = tl.exp(logprob)
    b = tl.exp(ref)
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
    y = tl.where(ref_rest > 0, y, INF)
    value = tl.where((a > 0) & (d >= BELOW), a * expm1_minus(-d, True, TERMS), b)
    value += tl.where(rest > 0, rest * expm1_minus(-y, True, TERMS), tl.where(ref_rest > 0, ref_rest, 0.0))
    by_logprob = tl.where((rest > 0) & (a > 0), a * (d - y), 0.0)
    by_ref = tl.where(rest > 0, rest, 0.0) * b / safe_rest - a
    by_ref = tl.where(ref_rest > 0, by_ref, tl.where(rest > 0, INF, 0.0))
    return Estimate(tl.where(excluded, d, value), tl.where(excluded, d, by_logprob), by_ref)


@triton.jit
def estimate_kl(logprob, ref, limits, ESTIMATOR: tl.constexpr, TERMS: tl.constexpr):
    """The estimate without the ratio: limits where a probability is 0, NaN where a log-probability is NaN."""
    whole = difference(logprob, ref)
    if ESTIMATOR == BINARY_TV or ESTIMATOR == BINARY_KL:
        a = tl.exp(logprob)
        b = tl.exp(ref)
        gap = tl.where(tl.abs(whole) < 1, b * expm1_minus(whole, False, TERMS), a - b)
        if ESTIMATOR == BINARY_TV:
            plain = Estimate(tl.abs(gap), sign(gap) * a, -sign(gap) * b)
        else:
            plain = binary_kl(logprob, ref, gap, TERMS)
        outside = tl.abs(plain.value) > limits.value
        number = whole == whole
        value = tl.where(number, plain.value, whole)
        by_logprob = tl.where(number, tl.where(outside, 0.0, plain.by_logprob), whole)
        by_ref = tl.where(number, tl.where(outside, 0.0, plain.by_ref), whole)
    else:
        d = clamp(whole, limits.difference)
        if ESTIMATOR == K1 or ESTIMATOR == K1_PLUS:
            value = d
            slope = tl.where(d == d, 1.0, d)
        elif ESTIMATOR == ABS:
            value = tl.abs(d)
            slope = sign(d)
        elif ESTIMATOR == K2:
            value = d * d * 0.5
            slope = d
        else:
            value = expm1_minus(-d, True, TERMS)
            slope = -expm1_minus(-d, False, TERMS)
        if ESTIMATOR == K1_PLUS or ESTIMATOR == K3_PLUS:
            slope = d  # straight-through estimator: the gradient of k2
        outside = (tl.abs(whole) > limits.difference) | (tl.abs(value) > limits.value)
        by_logprob = tl.where(outside, 0.0, slope)
        by_ref = -by_logprob
    return Estimate(clamp(value, limits.value), by_logprob, by_ref)


@triton.jit
def ratio_of(logprob, old, limits):
    known = old == old
    whole = tl.where(known, difference(logprob, old), 0.0)
    log = clamp(whole, limits.difference)
    ratio = tl.exp(log)
    capped = ratio > limits.ratio
    free = known & (ratio <= limits.ratio) & (tl.abs(whole) <= limits.difference)
    return Ratio(log, tl.where(capped, limits.ratio, ratio), capped, free)


@triton.jit
def weigh(ratio, x):
    """ratio x, with the limit of 0 times infinity: 0 where the policy excludes the token, else infinity."""
    product = tl.where(x == 0, x, ratio.value * x)
    return tl.where(tl.abs(x) == INF, tl.where(ratio.log == -INF, 0.0, x), product)


@triton.jit
def slope_and_value(slope, value, logprob, free, ESTIMATOR: tl.constexpr, RATIO_GRAD: tl.constexpr):
    """The slope, and the value where the ratio has a gradient. Of opposite infinities the larger one stays: the
    value, but for binary_kl against a certain token that is likelier than all others."""
    if RATIO_GRAD:
        larger = value
        if ESTIMATOR == BINARY_KL:
            larger = tl.where(logprob > -0.6931471805599453, slope, value)
        total = tl.where((slope == -INF) & (value == INF), larger, slope + value)
        return tl.where(free, total, slope)
    return slope


@triton.jit
def weighted_kl(
    logprob, ref, old, limits, ESTIMATOR: tl.constexpr, RATIO_GRAD: tl.constexpr, TERMS: tl.constexpr
):
    """The estimate times its ratio."""
    plain = estimate_kl(logprob, ref, limits, ESTIMATOR, TERMS)
    ratio = ratio_of(logprob, old, limits)
    slope = slope_and_value(plain.by_logprob, plain.value, logprob, ratio.free, ESTIMATOR, RATIO_GRAD)
    value = weigh(ratio, plain.value)
    by_logprob = weigh(ratio, slope)
    by_ref = weigh(ratio, plain.by_ref)
    if ESTIMATOR == K3 or ESTIMATOR == K3_PLUS:
        # Far below the reference k3 is exp(-d), which may overflow where the ratio vanishes: one exponential of
        # both.
        whole = difference(logprob, ref)
        d = clamp(whole, limits.difference)
        inside = whole >= -limits.difference
        within = (plain.value < limits.value) | (plain.value == INF)
        far = (d < BELOW) & within & (ratio.capped == 0)
        both = tl.exp(tl.where(ratio.free & inside, difference(ref, old), ratio.log - d))
        drift = weigh(ratio, d)
        if ESTIMATOR == K3:
            slope = tl.where(inside, -both, 0.0)
            far_slope = slope
            if RATIO_GRAD:  # of slope and value only the ratio times d is left
                far_slope = tl.where(ratio.free, tl.where(inside, drift, both), slope)
        else:
            slope = tl.where(inside, drift, 0.0)
            far_slope = slope_and_value(slope, both, logprob, ratio.free, ESTIMATOR, RATIO_GRAD)
        value = tl.where(far, both, value)
        by_logprob = tl.where(far, far_slope, by_logprob)
        by_ref = tl.where(far, -slope, by_ref)
    return Estimate(value, by_logprob, by_ref)


@triton.jit(do_not_specialize=["count"])
def token_kl_kernel(
    grad, logprob, ref_logprob, mask, old_logprob, rewards, out, out_ref, count,
    d_high, d_low, value_high, value_low, cap_high, cap_low, scale_high, scale_low,
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
    limits = Limits(
        unpair(d_high, d_low, ACC), unpair(value_high, value_low, ACC), unpair(cap_high, cap_low, ACC)
    )
    scale = tl.broadcast_to(unpair(scale_high, scale_low, ACC), [BLOCK])
    lp = tl.load(logprob + at, mask=valid, other=-1.0)
    ref = tl.load(ref_logprob + at, mask=valid, other=-1.0)
    if HAS_OLD:
        old = tl.load(old_logprob + at, mask=valid, other=-1.0)
        value, by_logprob, by_ref = weighted_kl(lp, ref, old, limits, ESTIMATOR, RATIO_GRAD, TERMS)
    else:
        value, by_logprob, by_ref = estimate_kl(lp, ref, limits, ESTIMATOR, TERMS)
    if BACKWARD:
        up = tl.load(grad + at, mask=valid, other=0.0) * scale
        if TO_LOGPROB:
            tl.store(out + at, tl.where(valid, times(up, by_logprob), 0.0), mask=at < count)
        if TO_REF:
            tl.store(out_ref + at, tl.where(valid, times(up, by_ref), 0.0), mask=at < count)
    else:
        value = times(scale, value)
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
            *pair(a.largest_d), *pair(a.largest_value), *pair(a.ratio_cap), *pair(a.scale),
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
