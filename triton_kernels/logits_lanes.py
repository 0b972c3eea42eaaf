"""Running sums of a row of logits by lanes: each thread sums its own columns, and they are merged once a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair, add_to, fused, sum_pairs
from .launch import Constant
from .logits_rows import ENTROPY, KL, MEAN_LOGIT, MOMENTS, REVERSE_KL, SUM_SQ_LOGPROB, capped, capped_tile

PRODUCTS = Constant(ENTROPY.value | SUM_SQ_LOGPROB.value | KL.value)  # outputs with products of t
FARTHEST = Constant(1e38)  # exponents and bases of lanes lie within it, or the row is summed again
LEAST_EXPONENT = Constant(-2000.0)
SPREAD = Constant(65536.0)  # a lane has fewer columns: sums of finite float32 logits over it are finite

# ---- running sums of lanes -----------------------------------------------------------------------------------
#
# Every lane sums its own columns, so that the loop over a row has neither barriers nor shuffles. Exponents are
# of two, relative to a whole number that only grows: sums are rescaled without rounding.


class Lanes(NamedTuple):
    """Running sums ``[T]`` of each lane's columns: exponents t = s z - base and r = s x - ref_base of two.

    Here z are the logits, x the reference's, and s = log2 e / temperature.
    """

    top: Any  # the largest z, before the softcap
    base: Any  # the largest s z, rounded down
    total: Any  # sum 2^t, as the other sums a pair
    weighted: Any  # sum 2^t t
    squares: Any  # sum 4^t
    squares_weighted: Any  # sum 4^t t
    distance: Any  # sum (z - origin) / SPREAD
    ref_top: Any
    ref_base: Any
    ref_total: Any  # sum 2^r
    kl: Any  # sum 2^t (t - r)
    reverse: Any  # sum 2^r (r - t)


@triton.jit
def no_lanes(T: tl.constexpr, ACC: tl.constexpr):
    """The sums over no columns."""
    lowest = tl.full([T], float("-inf"), ACC)
    base = tl.full([T], -FARTHEST, ACC)
    zero = tl.zeros([T], ACC)
    none = Pair(zero, zero)
    return Lanes(lowest, base, none, none, none, none, none, lowest, base, none, none, none)


@triton.jit
def sum_of_lane(x):
    """Sum of each lane's elements of a tile [H, T, 2, ..., 2]."""
    for _ in tl.static_range(len(x.shape) - 2):
        x = tl.sum(x, len(x.shape) - 1)
    return tl.sum(x, 0)


@triton.jit
def max_of_lane(x):
    for _ in tl.static_range(len(x.shape) - 2):
        x = tl.max(x, len(x.shape) - 1)
    return tl.max(x, 0)


@triton.jit
def to_elements(x, tile):
    """Values of lanes, in the shape of a tile's elements."""
    x = x[None, :]
    for _ in tl.static_range(len(tile.shape) - 2):
        x = tl.expand_dims(x, len(x.shape))
    return x


@triton.jit
def raised(top, base, logits, scale, cap, CAPPED: tl.constexpr):
    """A lane's largest stored logit and its base with further logits, and the exponent that rescales its sums."""
    top = tl.maximum(top, max_of_lane(logits))
    new = tl.maximum(base, tl.floor(capped(top, cap, CAPPED) * scale))
    return top, new, base - new


@triton.jit
def bounded(exponent):
    """An exponent of two, bounded, so that 0 times it is 0; NaN stays NaN."""
    return tl.maximum(exponent, LEAST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def moved(pair, of, step):
    """A sum of terms times exponents, after these have grown by ``step``; ``of`` is the sum of the terms."""
    return Pair(fused(of.sum, step, pair.sum), pair.rest)


@triton.jit
def accumulate(
    logits, ref_logits, inside, origin, lanes, scale, cap,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, CAPPED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add a tile [H, T, E] of stored logits, and of the reference's, to the sums; -inf where it is not inside."""
    z = capped_tile(logits, cap, CAPPED)
    if TAIL and CAPPED:
        z = tl.where(inside, z, float("-inf"))
    total, weighted, squares, squares_weighted = (
        lanes.total, lanes.weighted, lanes.squares, lanes.squares_weighted
    )  # fmt: skip
    distance, ref_total, kl, reverse = lanes.distance, lanes.ref_total, lanes.kl, lanes.reverse
    top, base, step = raised(lanes.top, lanes.base, logits, scale, cap, CAPPED)
    factor = tl.exp2(step)
    unbounded = fused(z, scale, -to_elements(base, z))
    t = unbounded
    if PRODUCTS & WANT:
        t = bounded(t)
    term = tl.exp2(t)
    ref_top, ref_base = lanes.ref_top, lanes.ref_base
    if HAS_REF:
        x = capped_tile(ref_logits, cap, CAPPED)
        if TAIL and CAPPED:
            x = tl.where(inside, x, float("-inf"))
        ref_top, ref_base, ref_step = raised(ref_top, ref_base, ref_logits, scale, cap, CAPPED)
        ref_factor = tl.exp2(ref_step)
        r = fused(x, scale, -to_elements(ref_base, x))
        ref_term = tl.exp2(r)
        gap = step - ref_step
        if KL & WANT:
            between = term * (t - r)
            if TAIL:
                between = tl.where(inside, between, 0.0)
            kl = add_to(moved(kl, total, gap), factor, sum_of_lane(between))
        if REVERSE_KL & WANT:
            between = ref_term * (r - unbounded)
            if TAIL:
                between = tl.where(inside, between, 0.0)
            reverse = add_to(moved(reverse, ref_total, -gap), ref_factor, sum_of_lane(between))
        ref_total = add_to(ref_total, ref_factor, sum_of_lane(ref_term))
    if ENTROPY & WANT:
        weighted = add_to(moved(weighted, total, step), factor, sum_of_lane(term * t))
    if SUM_SQ_LOGPROB & WANT:
        squares_weighted = add_to(
            moved(squares_weighted, squares, step), factor * factor, sum_of_lane(term * term * t)
        )
    if MOMENTS & WANT:
        squares = add_to(squares, factor * factor, sum_of_lane(term * term))
    if MEAN_LOGIT & WANT:
        from_origin = fused(z, tl.full([], 1 / SPREAD, z.dtype), -origin / SPREAD)
        if TAIL:
            from_origin = tl.where(inside, from_origin, 0.0)
        distance = add_to(distance, 1.0, sum_of_lane(from_origin))
    total = add_to(total, factor, sum_of_lane(term))
    return Lanes(
        top, base, total, weighted, squares, squares_weighted, distance,
        ref_top, ref_base, ref_total, kl, reverse,
    )  # fmt: skip


# ---- sums of a row -----------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums over columns, float64: exponents y = s (z - top) and u = s (x - ref_top) of two."""

    total: Any  # sum 2^y
    weighted: Any  # sum 2^y y
    squares: Any  # sum 4^y
    squares_weighted: Any  # sum 4^y y
    distance: Any  # sum z - origin
    ref_total: Any  # sum 2^u
    kl: Any  # sum 2^y (y - u)
    reverse: Any  # sum 2^u (u - y)


@triton.jit
def no_sums():
    zero = tl.zeros([], tl.float64)
    return Sums(zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def of_lanes(pair, factor):
    """The sum of lanes that are multiplied by powers of two."""
    return sum_pairs(Pair(pair.sum * factor, pair.rest * factor))


@triton.jit
def from_base(top, base, scale):
    """The exponent of a row's largest logit relative to the row's base, and two to minus that; float64."""
    over = tl.where(top == float("-inf"), 0.0, top.to(tl.float64) * scale - base)
    return over, tl.exp2(-over)


@triton.jit
def merged(lanes, keep, top, ref_top, scale, WANT: tl.constexpr, HAS_REF: tl.constexpr):
    """The sums over the columns of the lanes that ``keep`` flags."""
    weighted, squares, squares_weighted, distance, ref_total, kl, reverse = no_sums()[1:]
    base = tl.max(lanes.base, 0)
    step = lanes.base - base
    factor = tl.where(keep, tl.exp2(step), 0.0)
    over, down = from_base(top, base, scale)
    total = of_lanes(lanes.total, factor)
    if ENTROPY & WANT:
        weighted = of_lanes(moved(lanes.weighted, lanes.total, step), factor)
        weighted = (weighted - over * total) * down
    if MOMENTS & WANT:
        squares = of_lanes(lanes.squares, factor * factor)
    if SUM_SQ_LOGPROB & WANT:
        squares_weighted = of_lanes(moved(lanes.squares_weighted, lanes.squares, step), factor * factor)
        squares_weighted = (squares_weighted - over * squares) * (down * down)
    if MEAN_LOGIT & WANT:
        distance = of_lanes(lanes.distance, tl.where(keep, SPREAD, 0.0).to(factor.dtype))
    if HAS_REF:
        ref_base = tl.max(lanes.ref_base, 0)
        ref_step = lanes.ref_base - ref_base
        ref_factor = tl.where(keep, tl.exp2(ref_step), 0.0)
        ref_over, ref_down = from_base(ref_top, ref_base, scale)
        ref_total = of_lanes(lanes.ref_total, ref_factor)
        if KL & WANT:
            kl = of_lanes(moved(lanes.kl, lanes.total, step - ref_step), factor)
            kl = (kl - (over - ref_over) * total) * down
        if REVERSE_KL & WANT:
            reverse = of_lanes(moved(lanes.reverse, lanes.ref_total, ref_step - step), ref_factor)
            reverse = (reverse - (ref_over - over) * ref_total) * ref_down
        ref_total *= ref_down
    return Sums(
        total * down, weighted, squares * (down * down), squares_weighted, distance, ref_total, kl, reverse
    )


@triton.jit
def is_doubtful(sums, top, ref_top, scale, HAS_REF: tl.constexpr):
    """Whether a sum is not finite, or a row's exponents are beyond those of lanes."""
    total, weighted, squares, squares_weighted, distance, ref_total, kl, reverse = sums
    every = total + weighted + squares + squares_weighted + distance + ref_total + kl + reverse
    near = tl.abs(top * scale) < FARTHEST
    if HAS_REF:
        near &= tl.abs(ref_top * scale) < FARTHEST
    return (every - every != 0.0) | (near == 0)
