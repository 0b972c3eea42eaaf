"""Standardised tokens: the moments of parts of rows, z-scores and their gradients.

Every thread sums its own tokens, sixteen at a time, and these sums in two parts. Values are taken less the first
valid one of the part, so that equal ones give exactly 0. A part that overflows or loses its digits this way, as one
whose first value is far from all others does, is summed once more in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair, difference, fused, sum_pairs
from .launch import Constant
from .scans import paired, plus
from .scopes_parts import ABOVE, COLUMNS, COUNT, ORIGIN, SQUARES, first_valid, load_factors
from .tiles import load_flags, load_tokens, tile_of

CANCELLED = Constant(64)  # squares about the origin over those about the mean, beyond which digits are lost
LEAST = Constant(2.0**-40)  # values whose squares have their digits in float32


class Moments(NamedTuple):
    """Of the values of a part less its origin, float64."""

    count: Any
    total: Any
    squares: Any
    top: Any  # the largest of the absolute values


class Standard(NamedTuple):
    """What standardises a token: two pairs in its precision."""

    centre: Any
    rest: Any
    scale: Any
    low: Any  # what the scale loses by rounding


class Through(NamedTuple):
    """What the gradient of a token gets through the mean, and through the scale per z-score: pairs."""

    mean: Any
    mean_low: Any
    slope: Any
    slope_low: Any


@triton.jit
def part_moments(
    part, origin, HAS_MASK: tl.constexpr, HAS_OTHER: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros([T], ACC)
    count = tl.zeros([T], tl.int32)
    mass = Pair(zero, zero)
    total = Pair(zero, zero)
    squares = Pair(zero, zero)
    top = zero
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        w = load_factors(part.other, tile, HAS_OTHER, PER, ALIGNED)
        weight = zero
        term = zero
        square = zero
        for k in tl.static_range(PER):
            above = tl.where(valid[k], x[k].to(ACC) - origin, 0.0)
            top = tl.maximum(top, tl.abs(above))
            weighed = above
            if HAS_OTHER:
                factor = tl.where(valid[k], w[k].to(ACC), 0.0)
                weight += factor
                weighed = factor * above
            else:
                count += valid[k].to(tl.int32)
            term += weighed
            square += weighed * above
        total = plus(total, term)
        squares = plus(squares, square)
        if HAS_OTHER:
            mass = plus(mass, weight)
    size = tl.sum(count, 0).to(tl.float64)
    if HAS_OTHER:
        size = sum_pairs(mass)
    return Moments(size, sum_pairs(total), sum_pairs(squares), tl.max(top, 0).to(tl.float64))


@triton.jit
def store_moments(
    record, plane, part, outcome, HAS_MASK: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_OUTCOMES: tl.constexpr,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    first = first_valid(part, HAS_MASK, T * 4)
    origin = tl.load(part.numbers + first, mask=first < part.end, other=0.0)
    m = part_moments(part, origin, HAS_MASK, HAS_OTHER, ALIGNED, DTYPE, PER, T)
    if origin.dtype == tl.float32:
        # The squares about the origin, over those about the mean.
        lost = m.total * m.total * CANCELLED > m.squares * m.count * (CANCELLED - 1.0)
        lost = (lost | (m.top < LEAST)) & (m.top > 0.0)
        if lost | ((m.squares < float("inf")) == 0):
            m = part_moments(part, origin.to(tl.float64), HAS_MASK, HAS_OTHER, False, tl.float64, 1, T)
    squares = m.squares
    if HAS_OUTCOMES:
        known = tl.load(outcome)  # the class of a NaN is not known
        squares = tl.where((known != known) & (m.count > 0.0), float("nan"), squares)
    tl.store(record + COUNT * plane, m.count)
    tl.store(record + ORIGIN * plane, origin.to(tl.float64))
    tl.store(record + ABOVE * plane, m.total)
    tl.store(record + SQUARES * plane, squares)


@triton.jit
def standard_of(statistics, scope, KIND: tl.constexpr):
    """What standardises the tokens of a scope."""
    s = statistics + scope * COLUMNS
    scale = paired(tl.load(s + 2), KIND)
    return Standard(tl.load(s).to(KIND), tl.load(s + 1).to(KIND), scale.sum, scale.rest)


@triton.jit
def through_of(found, scope, KIND: tl.constexpr):
    """What the gradients of a scope's tokens get through its mean and scale."""
    mean = paired(tl.load(found + scope * 2), KIND)
    slope = paired(tl.load(found + scope * 2 + 1), KIND)
    return Through(mean.sum, mean.rest, slope.sum, slope.rest)


@triton.jit
def z_score(x, s):
    """``(x - mean) * scale``, rounded once or twice."""
    above, rest = difference(x, s.centre)
    rest -= s.rest
    return fused(above, s.scale, fused(above, s.low, rest * s.scale))


@triton.jit
def gradient(up, z, s, weight, through, HAS_OTHER: tl.constexpr):
    """``scale * up + weight * (mean + slope * z)``, from pairs."""
    high = fused(through.slope, z, through.mean)
    low = fused(through.slope_low, z, through.mean_low)
    if HAS_OTHER:
        return fused(s.scale, up, fused(weight, high, fused(s.low, up, weight * low)))
    else:
        return fused(s.scale, up, high + fused(s.low, up, low))


@triton.jit
def part_gradients(
    part, standard, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PER: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The sums of gradients, and of gradients times z-scores, float64."""
    zero = tl.zeros([T], ACC)
    total = Pair(zero, zero)
    product = Pair(zero, zero)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        up = load_tokens(part.grad, tile, PER, ALIGNED)
        term = zero
        times = zero
        for k in tl.static_range(PER):
            g = up[k].to(ACC)
            term += tl.where(valid[k], g, 0.0)
            times += tl.where(valid[k], g * z_score(x[k].to(ACC), standard), 0.0)
        total = plus(total, term)
        product = plus(product, times)
    return sum_pairs(total), sum_pairs(product)
