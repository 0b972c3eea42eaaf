"""Bonuses that are capped, and weights by the range of the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import fused
from .launch import unpair
from .scans import lesser, paired
from .scopes_weights import LN2
from .tiles import load_flags, load_tokens, tile_of


@triton.jit
def capped_bonus(x, y, alpha, inverse_kappa, BACKWARD: tl.constexpr, up):
    """``x + min(alpha y, abs(x) / kappa)``, or its gradient; NaN where y is not finite. Factors are pairs."""
    bonus = fused(y, alpha.sum, y * alpha.rest)
    most = fused(tl.abs(x), inverse_kappa.sum, tl.abs(x) * inverse_kappa.rest)
    known = tl.abs(y) < float("inf")
    if BACKWARD:
        sign = tl.where(x > 0.0, inverse_kappa.sum, tl.where(x < 0.0, -inverse_kappa.sum, 0.0))
        share = tl.where(bonus < most, 0.0, tl.where(bonus == most, 0.5, 1.0))
        return tl.where(known, fused(up, share * sign, up), float("nan"))
    else:
        return tl.where(known, x + tl.minimum(bonus, most, propagate_nan=tl.PropagateNan.ALL), float("nan"))


@triton.jit
def store_range(
    record, plane, part, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PER: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The smallest value, and the opposite of the largest; NaN if one is."""
    least = tl.full([T], float("inf"), DTYPE)
    opposite = least
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        for k in tl.static_range(PER):
            least = lesser(least, tl.where(valid[k], x[k], float("inf")))
            opposite = lesser(opposite, tl.where(valid[k], -x[k], float("inf")))
    tl.store(record, tl.reduce(least, 0, lesser).to(tl.float64))
    tl.store(record + plane, tl.reduce(opposite, 0, lesser).to(tl.float64))


@triton.jit
def steering(records, count, low, high, EXPONENTIAL: tl.constexpr, TILE: tl.constexpr):
    """The smallest value of the batch, and the slope and the base of weights; of powers of 2 the slope."""
    lanes = tl.full([TILE], float("inf"), tl.float64)
    opposite = lanes
    for begin in range(0, count, TILE):
        at = begin + tl.arange(0, TILE)
        lanes = lesser(lanes, tl.load(records + at, mask=at < count, other=float("inf")))
        opposite = lesser(opposite, tl.load(records + count + at, mask=at < count, other=float("inf")))
    least = tl.reduce(lanes, 0, lesser)
    top = -tl.reduce(opposite, 0, lesser)
    if EXPONENTIAL:
        slope = tl.log(low) / (LN2 * tl.where(top < 0.02, 0.02, top))
        base = least
    else:
        span = top - least
        equal = span == 0.0
        slope = tl.where(equal, 0.0, (high - low) / tl.where(equal, 1.0, span))
        base = tl.where(equal, (low + high) / 2.0, high)
    return least, slope, base


@triton.jit
def steered(x, least, slope, base, low, EXPONENTIAL: tl.constexpr):
    """The weight of a value; slope and base are pairs."""
    if EXPONENTIAL:
        power = x * slope.sum
        lost = fused(x, slope.sum, -power) + x * slope.rest
        y = tl.exp2(power)
        y = tl.where(power < -2000.0, 0.0, fused(y, lost * LN2, y))
        return tl.where(y > 1.0, 1.0, tl.where(y < low, tl.where(low < 1.0, low, 1.0), y))
    else:
        above = x - least
        return base.sum - fused(above, slope.sum, fused(above, slope.rest, -base.rest))


@triton.jit
def factor_of(high, low, KIND: tl.constexpr):
    return paired(unpair(high, low, tl.float64), KIND)
