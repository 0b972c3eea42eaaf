"""Weights of tokens with mean 1 in their scope, and products of differences from the mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.scopes import FORMS
from .arithmetic import Pair, difference, fused, sum_pairs
from .launch import Constant, unpair
from .scans import paired, plus
from .scopes_parts import COLUMNS, COUNT, TOP, TOTAL, load_factors
from .tiles import load_flags, load_tokens, tile_of

LINEAR, INVERSE, EXPONENTIAL = (Constant(k) for k in range(len(FORMS)))
LN2 = Constant(0.6931471805599453)


class Form(NamedTuple):
    """The numbers of raw weights: those of an exponential are ``2^(rate (x - top))``."""

    rate: Any
    rate_low: Any
    floor: Any
    top: Any


class Scale(NamedTuple):
    """What raw weights are multiplied by, a pair, and what is added: 1 where they have no mean."""

    inverse: Any
    low: Any
    base: Any


@triton.jit
def form_of(top, rate_high, rate_low, floor_high, floor_low, KIND: tl.constexpr):
    rate = paired(unpair(rate_high, rate_low, tl.float64), KIND)
    return Form(rate.sum, rate.rest, unpair(floor_high, floor_low, KIND), top.to(KIND))


@triton.jit
def raw_weight(x, form, FORM: tl.constexpr):
    """NaN for a value that is not finite."""
    weight = x
    if FORM == INVERSE:
        raised = tl.where(x < form.floor, form.floor, x)
        one = raised * 0.0 + 1.0
        weight = tl.div_rn(one, raised) if x.dtype == tl.float32 else one / raised
    elif FORM == EXPONENTIAL:
        below, rest = difference(x, form.top)
        power = below * form.rate
        lost = fused(below, form.rate, -power) + fused(below, form.rate_low, rest * form.rate)
        weight = tl.exp2(tl.minimum(power, 0.0))  # masked tokens may be larger
        weight = tl.where(power < -2000.0, 0.0, fused(weight, lost * LN2, weight))
    return tl.where(tl.abs(x) < float("inf"), weight, float("nan"))


@triton.jit
def part_top(
    part,
    sign,
    HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    PER: tl.constexpr,
    T: tl.constexpr,
):
    """The largest of sign * x; -inf where no token is valid."""
    top = tl.full([T], -float("inf"), DTYPE)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        for k in tl.static_range(PER):
            top = tl.maximum(top, tl.where(valid[k], sign * x[k], -float("inf")))
    return tl.max(top, 0)


@triton.jit
def store_weights(
    record, plane, part, rate_high, rate_low, floor_high, floor_low, FORM: tl.constexpr, HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The number of valid tokens, the value of the largest weight, and the sum of weights relative to it."""
    zero = tl.zeros([T], DTYPE)
    top = tl.zeros([], DTYPE)
    if FORM == EXPONENTIAL:
        sign = tl.where(unpair(rate_high, rate_low, DTYPE) < 0.0, -1.0, 1.0).to(DTYPE)
        top = part_top(part, sign, HAS_MASK, ALIGNED, DTYPE, PER, T)
        top = tl.where(top == -float("inf"), 0.0, sign * top)
    form = form_of(top, rate_high, rate_low, floor_high, floor_low, DTYPE)
    count = tl.zeros([T], tl.int32)
    total = Pair(zero, zero)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        for k in tl.static_range(PER):
            count += valid[k].to(tl.int32)
            total = plus(total, tl.where(valid[k], raw_weight(x[k], form, FORM), 0.0))
    tl.store(record + COUNT * plane, tl.sum(count, 0).to(tl.float64))
    tl.store(record + TOP * plane, top.to(tl.float64))
    tl.store(record + TOTAL * plane, sum_pairs(total))


@triton.jit
def scale_of(statistics, scope, KIND: tl.constexpr):
    s = statistics + scope * COLUMNS
    inverse = paired(tl.load(s), KIND)
    return Scale(inverse.sum, inverse.rest, tl.load(s + 1).to(KIND))


@triton.jit
def weight_gradients(
    part, form, FORM: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sum of gradients times raw weights, float64."""
    zero = tl.zeros([T], DTYPE)
    total = Pair(zero, zero)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        up = load_tokens(part.grad, tile, PER, ALIGNED)
        for k in tl.static_range(PER):
            total = plus(total, tl.where(valid[k], up[k] * raw_weight(x[k], form, FORM), 0.0))
    return sum_pairs(total)


@triton.jit
def weight_gradient(x, up, form, scale, through, FORM: tl.constexpr):
    """The gradient of a value from that of its weight."""
    weight = raw_weight(x, form, FORM)
    up = (up - through.sum) - through.rest
    y = fused(scale.inverse, up, scale.low * up)
    if FORM == INVERSE:
        y = tl.where(x <= form.floor, scale.inverse * 0.0, -weight * weight * y)
    elif FORM == EXPONENTIAL:
        # The rate of a power of e.
        y = fused(form.rate * LN2, y, form.rate_low * LN2 * y) * weight
    return y


# ---- products of differences from the mean -----------------------------------------------------------------


@triton.jit
def store_means(
    record, plane, part, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PER: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The number of valid tokens, and the sums of values and of other values."""
    zero = tl.zeros([T], DTYPE)
    count = tl.zeros([T], tl.int32)
    total = Pair(zero, zero)
    other = Pair(zero, zero)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        w = load_factors(part.other, tile, True, PER, ALIGNED)
        for k in tl.static_range(PER):
            count += valid[k].to(tl.int32)
            total = plus(total, tl.where(valid[k], x[k], 0.0))
            other = plus(other, tl.where(valid[k], w[k], 0.0))
    tl.store(record, tl.sum(count, 0).to(tl.float64))
    tl.store(record + plane, sum_pairs(total))
    tl.store(record + 2 * plane, sum_pairs(other))


@triton.jit
def from_mean(x, mean):
    """x less a mean that is a pair."""
    above, rest = difference(x, mean.sum)
    rest = tl.where(rest == rest, rest, 0.0)  # of an infinite mean nothing is lost
    return above + (rest - mean.rest)
