"""Token statistics, forward: running sums over the blocks of a row or of a part of it, and its record."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits_records import FIELDS, Outputs, Record, finish, store_masked, store_record, stored
from .logits_rows import (
    ENTROPY,
    KL,
    LN2,
    LOG2E,
    LOWEST,
    MEAN_LOGIT,
    MOMENTS,
    REVERSE_KL,
    SUM_SQ_LOGPROB,
    capped,
    columns_of,
    inverse_temperature,
    is_masked,
    joined,
    row_offset,
)

# ---- running sums ------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Running sums of a row's logits z and of the reference's x, relative to the largest so far.

    Definitions: y = z - shift, u = x - ref_shift and s = 1 / temperature. All sums are float64; the shifts are not.
    """

    shift: Any  # the largest z
    total: Any  # sum e^sy
    weighted: Any  # sum e^sy sy, in powers of two: sy log2 e
    squares: Any  # sum e^2sy
    squares_weighted: Any  # sum e^2sy sy, in powers of two
    distance: Any  # sum z - origin
    ref_shift: Any  # the largest x
    ref_total: Any  # sum e^su
    kl: Any  # sum e^sy (y - u)
    reverse: Any  # sum e^su (u - y)


@triton.jit
def no_sums(ACC: tl.constexpr):
    """The sums over no columns."""
    lowest = tl.full([], float("-inf"), ACC)
    zero = tl.zeros([], tl.float64)
    return Sums(lowest, zero, zero, zero, zero, zero, lowest, zero, zero, zero)


@triton.jit
def rescaling(old, new, scale):
    """Factor that rescales sums from the old maximum to the new one, and the difference of the two; float64."""
    gap = tl.where(old == new, 0.0, old - new).to(tl.float64)
    return tl.exp2(gap * scale.to(tl.float64)), tl.where(gap == float("-inf"), 0.0, gap)


@triton.jit
def unless_infinite(old, new):
    """The new value of a divergence; an infinite one stays infinite."""
    return tl.where(old == float("inf"), old, new)


@triton.jit
def exponent_of(y, scale):
    """Exponent of two of a term, bounded, so that 0 times it is 0."""
    exponent = y * scale
    return tl.where(exponent < -2000.0, -2000.0, exponent)


@triton.jit
def sum_terms(terms, x, top, shift):
    """The sum of the terms of logits x, whose largest is ``top``.

    The terms of the row's largest logit are exactly 1. They are summed apart from the rest, to keep the digits
    of the tail: in a peaked row the entropy depends on the tail alone.
    """
    apart = tl.zeros([], tl.float64)
    if (top == shift) & (top > float("-inf")):
        largest = x == shift
        apart += tl.sum(largest.to(tl.float32), 0).to(tl.float64)
        terms = tl.where(largest, 0.0, terms)
    return apart + tl.sum(terms, 0).to(tl.float64)


@triton.jit
def accumulate(
    z, x, inside, origin, sums, scale, WANT: tl.constexpr, HAS_REF: tl.constexpr, TAIL: tl.constexpr
):
    """Add a block of logits z, and of the reference's x, to the sums."""
    shift, total, weighted, squares, squares_weighted, distance, ref_shift, ref_total, kl, reverse = sums
    top = tl.max(z, 0)
    if top > shift:
        factor, gap = rescaling(shift, top, scale)
        weighted = factor * (weighted + total * gap * scale.to(tl.float64))
        squares_weighted = factor * factor * (squares_weighted + squares * gap * scale.to(tl.float64))
        squares *= factor * factor
        if HAS_REF:
            kl = unless_infinite(kl, factor * (kl + total * gap))
            reverse -= ref_total * gap
        total *= factor
        shift = top
    # While all logits are -inf, there is no finite shift, and every term is 2^-inf.
    base = tl.where(shift == float("-inf"), 0.0, shift)
    if HAS_REF:
        ref_top = tl.max(x, 0)
        if ref_top > ref_shift:
            factor, gap = rescaling(ref_shift, ref_top, scale)
            reverse = unless_infinite(reverse, factor * (reverse + ref_total * gap))
            kl -= total * gap
            ref_total *= factor
            ref_shift = ref_top
        ref_base = tl.where(ref_shift == float("-inf"), 0.0, ref_shift)
        y = tl.where(z < LOWEST, LOWEST, z) - base
        u = tl.where(x < LOWEST, LOWEST, x) - ref_base
        exponent = exponent_of(y, scale)
        term = tl.exp2(exponent)
        ref_term = tl.exp2(exponent_of(u, scale))
        ref_total += sum_terms(ref_term, x, ref_top, ref_shift)
        if KL & WANT:
            broken = (x == float("-inf")) & (z > float("-inf"))
            # Sums in float64: next to the largest logit's term the others would lose their last places.
            kl += tl.sum(tl.where(broken, float("inf"), term * (y - u)).to(tl.float64), 0)
        if REVERSE_KL & WANT:
            broken = (z == float("-inf")) & (x > float("-inf"))
            reverse += tl.sum(tl.where(broken, float("inf"), ref_term * (u - y)).to(tl.float64), 0)
    else:
        y = z - base
        exponent = exponent_of(y, scale)
        term = tl.exp2(exponent)
    if ENTROPY & WANT:
        weighted += tl.sum(term * exponent, 0).to(tl.float64)
    if MOMENTS & WANT:
        squares += tl.sum(term * term, 0).to(tl.float64)
    if SUM_SQ_LOGPROB & WANT:
        squares_weighted += tl.sum(term * term * exponent, 0).to(tl.float64)
    if MEAN_LOGIT & WANT:
        from_origin = (z - origin).to(tl.float64)
        if TAIL:
            from_origin = tl.where(inside, from_origin, 0.0)
        distance += tl.sum(from_origin, 0)
    total += sum_terms(term, z, top, shift)
    return Sums(
        shift, total, weighted, squares, squares_weighted, distance, ref_shift, ref_total, kl, reverse
    )


@triton.jit
def nan_of_infinite(shift, total):
    """A row's largest logit and its total, float64: NaN, as in the specification, where a logit is NaN or inf."""
    total = tl.where(shift == float("inf"), float("nan"), total)
    return tl.where(total == total, shift.to(tl.float64), float("nan")), total


@triton.jit
def record_of(sums, origin, width, token, ref_token, found, inv):
    """The record of sums over ``width`` columns: scaled logits, nats."""
    shift, total = nan_of_infinite(sums.shift, sums.total)
    ref_shift, ref_total = nan_of_infinite(sums.ref_shift, sums.ref_total)
    # The origin moves to the maximum; a distance of -inf stays -inf.
    moved = tl.where(shift == float("-inf"), 0.0, (origin.to(tl.float64) - shift) * width)
    return Record(
        shift * inv, total, sums.weighted * LN2, sums.squares, (sums.distance + moved) * inv,
        width.to(tl.float64), token, found.to(tl.float64), ref_shift * inv, ref_total, ref_token,
        sums.kl * inv, sums.reverse * inv, sums.squares_weighted * LN2,
    )  # fmt: skip


# ---- kernel ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "inner", "ref_inner", "first", "vocab", "blocks", "parts"])
def token_stats_kernel(
    logits, ref_logits, tokens, mask, temperatures,
    logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, is_top1, ref_logprob, kl, reverse_kl,
    saved, record,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    first, vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    CAPPED: tl.constexpr, TO_RECORD: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n, to a record or to the statistics."""
    ACC: tl.constexpr = logprob.dtype.element_ty
    out = Outputs(
        logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, is_top1, ref_logprob, kl, reverse_kl
    )
    n = tl.program_id(0)
    part = tl.program_id(1)
    if is_masked(n, tokens, mask, HAS_MASK):
        if not SPLIT:
            store_masked(n, out, record, WANT, TO_RECORD)
    else:
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        scale = (inv * LOG2E).to(ACC)
        cap = joined(cap_high, cap_low, ACC)
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        ref_row = ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner)
        lanes = tl.arange(0, BLOCK)
        begin, full, end, width = columns_of(part, blocks, vocab, BLOCK)
        # The mean is taken relative to the first logit (to 0 where that is not finite).
        origin = tl.zeros([], ACC)
        if MEAN_LOGIT & WANT:  # noqa: SIM102 (known when compiled; the width is not)
            if width > 0:
                origin = capped(tl.load(row + begin).to(ACC), cap, CAPPED)
                origin = tl.where(tl.abs(origin) < -LOWEST, origin, 0.0)
        sums = no_sums(ACC)
        for start in range(begin, full, BLOCK):
            z = capped(tl.load(row + start + lanes).to(ACC), cap, CAPPED)
            x = z
            if HAS_REF:
                x = capped(tl.load(ref_row + start + lanes).to(ACC), cap, CAPPED)
            sums = accumulate(z, x, lanes, origin, sums, scale, WANT, HAS_REF, False)
        if full < end:
            inside = full + lanes < end
            z = capped(tl.load(row + full + lanes, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            z = tl.where(inside, z, float("-inf"))
            x = z
            if HAS_REF:
                x = capped(tl.load(ref_row + full + lanes, mask=inside, other=0.0).to(ACC), cap, CAPPED)
                x = tl.where(inside, x, float("-inf"))
            sums = accumulate(z, x, inside, origin, sums, scale, WANT, HAS_REF, True)

        column = tl.load(tokens + n) - first
        found = (column >= begin) & (column < end)
        column = tl.where(found, column, begin)
        token = tl.zeros([], tl.float64)
        ref_token = tl.zeros([], tl.float64)
        if found:
            token = capped(tl.load(row + column).to(ACC), cap, CAPPED).to(tl.float64) * inv
            if HAS_REF:
                ref_token = capped(tl.load(ref_row + column).to(ACC), cap, CAPPED).to(tl.float64) * inv
        r = record_of(sums, origin, width, token, ref_token, found, inv)
        if SPLIT or TO_RECORD:
            at = record + (n.to(tl.int64) * parts + part) * FIELDS
            store_record(at, stored(r, WANT, HAS_REF))
        else:
            shift, ref_shift = sums.shift.to(tl.float64), sums.ref_shift.to(tl.float64)
            finish(n, count, out, saved, shift, ref_shift, r, WANT, HAS_REF)
