"""Token statistics on the GPU: one read of the logits forward, one read and one write backward.

A row of V logits of e bytes moves V * e bytes forward and 2 * V * e backward, and as much again for a reference's;
what is written per row, and the records of a row that is split over programs, are nothing beside that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.logits import OUTPUTS, RECORD, accumulator, saved_rows, with_gradient
from .arithmetic import expm1_negative, log1p
from .launch import INTERPRETED, cdiv, multiprocessors, pair, splits

WARPS = 8
MOST_SPLITS = 64

FIELDS = tl.constexpr(len(RECORD))
IGNORED = tl.constexpr(-100)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)  # in place of -inf, where inf - inf could arise

# Bits of what is wanted or given, in the order of OUTPUTS.
LOGPROB, ENTROPY, LOGSUMEXP, SUM_SQ, SQUARE_LOGS, MEAN, TOP1, REF_LOGPROB, KL, REVERSE, JSD = (
    tl.constexpr(1 << k) for k in range(11)
)
MOMENTS = tl.constexpr(SUM_SQ.value | SQUARE_LOGS.value)


def _block(logits: Tensor, crowded: bool) -> int:
    """Elements of a row that a program takes at once: 32 bytes a thread, two loads of the widest kind in flight.

    Half of that where two rows are read together, which also makes two, or where the softcap takes registers.
    """
    return 1024 if INTERPRETED else (16 if crowded else 32) * 32 * WARPS // logits.element_size()


# ---- rows and logits ---------------------------------------------------------------------------------------


@triton.jit
def row_offset(n, inner, stride_outer, stride_inner):
    """Where row n of [N, V] or of [B, T, V] starts: 64-bit, and a multiple of 16 where the strides are."""
    return (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner


@triton.jit
def is_masked(n, tokens, mask, HAS_MASK: tl.constexpr):
    masked = tl.load(tokens + n) == IGNORED
    if HAS_MASK:
        masked = masked | (tl.load(mask + n) == 0)
    return masked


@triton.jit
def inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES: tl.constexpr):
    """1 / temperature in float64."""
    if HAS_TEMPERATURES:
        return 1.0 / tl.load(temperatures + n)
    else:
        return tl.full([], inv_high, tl.float64) + tl.full([], inv_low, tl.float64)


@triton.jit
def split(value, ACC: tl.constexpr):
    """A float64 scalar in two parts of the accumulation type."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def tanh(x):
    """By e^2x, and near 0, where that cancels, by a rational function (Cephes)."""
    a = tl.abs(x)
    z = a * a
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    t = tl.where(a < 0.625, a + a * z * (p / q), 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0))
    return tl.where(x < 0, -t, t)


@triton.jit
def capped(x, cap, CAPPED: tl.constexpr):
    if CAPPED:
        x = cap * tanh(x / cap)
    return x


@triton.jit
def cap_slope(x, cap):
    """1 - tanh^2 (x / cap) to its own last places, where tanh has come near 1 too."""
    e = tl.exp(-2.0 * tl.abs(x / cap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def distance(x, shift, inv_high, inv_low):
    """(x - shift) / temperature. The difference is clamped: -inf becomes a distance that is as good."""
    y = x - shift
    y = tl.where(y < -1e20, -1e20, y)
    return y * inv_high + y * inv_low


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit
def factor_between(old, new, scale):
    """Of sums relative to ``old``, to make them relative to ``new``; and the distance. Both float64."""
    gap = tl.where(old == new, 0.0, old - new).to(tl.float64)
    return tl.exp2(gap * scale.to(tl.float64)), tl.where(gap == float("-inf"), 0.0, gap)


@triton.jit
def kept_infinite(before, after):
    return tl.where(before == float("inf"), before, after)


@triton.jit
def exponent_of(y, scale):
    """In powers of two, bounded, so that 0 times it is 0."""
    t = y * scale
    return tl.where(t < -2000.0, -2000.0, t)


@triton.jit
def sum_terms(e, x, top, shift):
    """The sum of e. The terms of the largest logit are exactly 1: summed apart from the rest they do not swallow
    the digits of a peaked row's tail, which are all that its entropy is made of."""
    apart = tl.zeros([], tl.float64)
    if (top == shift) & (top > float("-inf")):
        largest = x == shift
        apart += tl.sum(largest.to(tl.float32), 0).to(tl.float64)
        e = tl.where(largest, 0.0, e)
    return apart + tl.sum(e, 0).to(tl.float64)


@triton.jit
def accumulate(
    z, x, inside, origin, shift, total, weighted, squares, square_logs, distance, ref_shift, ref_total, kl,
    reverse, scale,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take a block into the running maxima and sums; the sums are float64 scalars, relative to the maxima."""
    top = tl.max(z, 0)
    if top > shift:
        f, gap = factor_between(shift, top, scale)
        weighted = f * (weighted + total * gap * scale.to(tl.float64))
        square_logs = f * f * (square_logs + squares * gap * scale.to(tl.float64))
        squares *= f * f
        if HAS_REF:
            kl = kept_infinite(kl, f * (kl + total * gap))
            reverse -= ref_total * gap
        total *= f
        shift = top
    # While all logits have been -inf there is nothing to shift by, and every term is 2^-inf.
    base = tl.where(shift == float("-inf"), 0.0, shift)
    if HAS_REF:
        ref_top = tl.max(x, 0)
        if ref_top > ref_shift:
            f, gap = factor_between(ref_shift, ref_top, scale)
            reverse = kept_infinite(reverse, f * (reverse + ref_total * gap))
            kl -= total * gap
            ref_total *= f
            ref_shift = ref_top
        ref_base = tl.where(ref_shift == float("-inf"), 0.0, ref_shift)
        y = tl.where(z < LOWEST, LOWEST, z) - base
        u = tl.where(x < LOWEST, LOWEST, x) - ref_base
        t = exponent_of(y, scale)
        e = tl.exp2(t)
        ref_e = tl.exp2(exponent_of(u, scale))
        ref_total += sum_terms(ref_e, x, ref_top, ref_shift)
        if KL & WANT:
            broken = (x == float("-inf")) & (z > float("-inf"))
            # In float64: beside the largest logit's term the others would lose their last places.
            kl += tl.sum(tl.where(broken, float("inf"), e * (y - u)).to(tl.float64), 0)
        if REVERSE & WANT:
            broken = (z == float("-inf")) & (x > float("-inf"))
            reverse += tl.sum(tl.where(broken, float("inf"), ref_e * (u - y)).to(tl.float64), 0)
    else:
        y = z - base
        t = exponent_of(y, scale)
        e = tl.exp2(t)
    if ENTROPY & WANT:
        weighted += tl.sum(e * t, 0).to(tl.float64)
    if MOMENTS & WANT:
        squares += tl.sum(e * e, 0).to(tl.float64)
    if SQUARE_LOGS & WANT:
        square_logs += tl.sum(e * e * t, 0).to(tl.float64)
    if MEAN & WANT:
        d = (z - origin).to(tl.float64)
        if TAIL:
            d = tl.where(inside, d, 0.0)
        distance += tl.sum(d, 0)
    total += sum_terms(e, z, top, shift)
    return shift, total, weighted, squares, square_logs, distance, ref_shift, ref_total, kl, reverse


@triton.jit
def store_record(
    at, shift, total, weighted, squares, square_logs, distance, columns, token, found, ref_shift, ref_total,
    ref_token, kl,
    reverse,
):  # fmt: skip
    tl.store(at, shift)
    tl.store(at + 1, total)
    tl.store(at + 2, weighted)
    tl.store(at + 3, squares)
    tl.store(at + 4, distance)
    tl.store(at + 5, columns)
    tl.store(at + 6, token)
    tl.store(at + 7, found)
    tl.store(at + 8, ref_shift)
    tl.store(at + 9, ref_total)
    tl.store(at + 10, ref_token)
    tl.store(at + 11, kl)
    tl.store(at + 12, reverse)
    tl.store(at + 13, square_logs)


@triton.jit
def store_masked(
    n,
    count,
    o_logprob,
    o_entropy,
    o_logsumexp,
    o_sum_sq,
    o_square_logs,
    o_mean,
    o_ref_logprob,
    o_kl,
    o_reverse,
    tops,
    saved,
    record,
    WANT: tl.constexpr,
    HAS_REF: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Zeros. What is saved of a masked row is zero from the start."""
    if RECORD:
        field = tl.arange(0, 16)
        tl.store(record + n.to(tl.int64) * FIELDS + field, 0.0, mask=field < FIELDS)
    else:
        if LOGPROB & WANT:
            tl.store(o_logprob + n, 0.0)
        if ENTROPY & WANT:
            tl.store(o_entropy + n, 0.0)
        if LOGSUMEXP & WANT:
            tl.store(o_logsumexp + n, 0.0)
        if SUM_SQ & WANT:
            tl.store(o_sum_sq + n, 0.0)
        if SQUARE_LOGS & WANT:
            tl.store(o_square_logs + n, 0.0)
        if MEAN & WANT:
            tl.store(o_mean + n, 0.0)
        if REF_LOGPROB & WANT:
            tl.store(o_ref_logprob + n, 0.0)
        if KL & WANT:
            tl.store(o_kl + n, 0.0)
        if REVERSE & WANT:
            tl.store(o_reverse + n, 0.0)
        if TOP1 & WANT:
            tl.store(tops + n, 0)


@triton.jit
def finish(
    n, count, o_logprob, o_entropy, o_logsumexp, o_sum_sq, o_square_logs, o_mean, o_ref_logprob, o_kl,
    o_reverse, tops,
    saved, stored_shift, ref_stored_shift,
    shift, total, weighted, squares, square_logs, distance, columns, token, found, ref_shift, ref_total,
    ref_token, kl,
    reverse,
    WANT: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Write a row's statistics from its record, and from its shifts as the logits have them."""
    ACC: tl.constexpr = o_logprob.dtype.element_ty
    count = count.to(tl.int64)
    nan = float("nan")
    empty = shift == float("-inf")  # no column has any mass
    log_sum = tl.where(empty, nan, tl.log(total))
    token = tl.where(found > 0, token, nan)
    entropy = log_sum - weighted / total
    sum_sq = tl.where(empty, nan, squares / (total * total))
    tl.store(saved + n, stored_shift)
    tl.store(saved + count + n, tl.where(empty, nan, total))
    if LOGPROB & WANT:
        tl.store(o_logprob + n, (token - shift - log_sum).to(ACC))
    if ENTROPY & WANT:
        tl.store(o_entropy + n, entropy.to(ACC))
        tl.store(saved + 2 * count + n, entropy)
    if LOGSUMEXP & WANT:
        tl.store(o_logsumexp + n, (tl.where(empty, 0.0, shift) + log_sum).to(ACC))
    if SUM_SQ & WANT:
        tl.store(o_sum_sq + n, sum_sq.to(ACC))
    if MOMENTS & WANT:
        tl.store(saved + 3 * count + n, sum_sq)
    if SQUARE_LOGS & WANT:
        value = square_logs / (total * total) - log_sum * sum_sq
        tl.store(o_square_logs + n, value.to(ACC))
        tl.store(saved + 4 * count + n, value)
    if MEAN & WANT:
        mean = tl.where(empty, float("-inf"), shift + distance / columns)
        tl.store(o_mean + n, mean.to(ACC))
    if TOP1 & WANT:
        tl.store(tops + n, ((token == shift) & (empty == 0) & (total == total)).to(tl.uint8))
    if HAS_REF:
        ref_empty = ref_shift == float("-inf")
        ref_log_sum = tl.where(ref_empty, nan, tl.log(ref_total))
        tl.store(saved + 5 * count + n, ref_stored_shift)
        tl.store(saved + 6 * count + n, tl.where(ref_empty, nan, ref_total))
        if REF_LOGPROB & WANT:
            ref_token = tl.where(found > 0, ref_token, nan)
            tl.store(o_ref_logprob + n, (ref_token - ref_shift - ref_log_sum).to(ACC))
        if KL & WANT:
            value = kl / total + (ref_log_sum - log_sum)
            tl.store(o_kl + n, value.to(ACC))
            tl.store(saved + 7 * count + n, value)
        if REVERSE & WANT:
            value = reverse / ref_total - (ref_log_sum - log_sum)
            tl.store(o_reverse + n, value.to(ACC))
            tl.store(saved + 8 * count + n, value)


@triton.jit(do_not_specialize=["count", "inner", "ref_inner", "first", "vocab", "blocks", "parts"])
def token_stats_kernel(
    logits, tokens, ref_logits, mask, temperatures, o_logprob, o_entropy, o_logsumexp, o_sum_sq,
    o_square_logs, o_mean,
    o_ref_logprob, o_kl, o_reverse, tops, saved, record,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    first, vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    CAPPED: tl.constexpr, RECORD: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n, to a record or to the statistics."""
    ACC: tl.constexpr = o_logprob.dtype.element_ty
    n = tl.program_id(0)
    part = tl.program_id(1)
    if is_masked(n, tokens, mask, HAS_MASK):
        if not SPLIT:
            store_masked(
                n,
                count,
                o_logprob,
                o_entropy,
                o_logsumexp,
                o_sum_sq,
                o_square_logs,
                o_mean,
                o_ref_logprob,
                o_kl,
                o_reverse,
                tops,
                saved,
                record,
                WANT,
                HAS_REF,
                RECORD,
            )
    else:
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        scale = (inv * LOG2E).to(ACC)
        cap = tl.full([], cap_high, ACC) + tl.full([], cap_low, ACC)
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        ref_row = ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner)
        columns = tl.arange(0, BLOCK)
        begin = part * blocks * BLOCK
        end = tl.minimum(begin + blocks * BLOCK, vocab)
        width = tl.maximum(end - begin, 0)
        # The tail is peeled: without a mask the loads of the main loop are 16 bytes wide.
        full = begin + width // BLOCK * BLOCK
        shift = tl.full([], float("-inf"), ACC)
        ref_shift = tl.full([], float("-inf"), ACC)
        total = tl.zeros([], tl.float64)
        weighted = tl.zeros([], tl.float64)
        squares = tl.zeros([], tl.float64)
        square_logs = tl.zeros([], tl.float64)
        distance = tl.zeros([], tl.float64)
        ref_total = tl.zeros([], tl.float64)
        kl = tl.zeros([], tl.float64)
        reverse = tl.zeros([], tl.float64)
        # The mean is taken relative to the first logit (to 0 where that is not finite).
        origin = tl.zeros([], ACC)
        if MEAN & WANT:  # noqa: SIM102 (known when compiled; the width is not)
            if width > 0:
                origin = capped(tl.load(row + begin).to(ACC), cap, CAPPED)
                origin = tl.where(tl.abs(origin) < -LOWEST, origin, 0.0)
        for start in range(begin, full, BLOCK):
            z = capped(tl.load(row + start + columns).to(ACC), cap, CAPPED)
            x = z
            if HAS_REF:
                x = capped(tl.load(ref_row + start + columns).to(ACC), cap, CAPPED)
            shift, total, weighted, squares, square_logs, distance, ref_shift, ref_total, kl, reverse = accumulate(
                z, x, columns, origin, shift, total, weighted, squares, square_logs, distance, ref_shift,
                ref_total, kl, reverse,
                scale, WANT, HAS_REF, False,
            )  # fmt: skip
        if full < end:
            inside = full + columns < end
            z = capped(tl.load(row + full + columns, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            z = tl.where(inside, z, float("-inf"))
            x = z
            if HAS_REF:
                x = capped(tl.load(ref_row + full + columns, mask=inside, other=0.0).to(ACC), cap, CAPPED)
                x = tl.where(inside, x, float("-inf"))
            shift, total, weighted, squares, square_logs, distance, ref_shift, ref_total, kl, reverse = accumulate(
                z, x, inside, origin, shift, total, weighted, squares, square_logs, distance, ref_shift,
                ref_total, kl, reverse,
                scale, WANT, HAS_REF, True,
            )  # fmt: skip

        # To the units of a record: scaled logits, nats.
        shift64 = shift.to(tl.float64)
        # Relative to the maximum; what is -inf stays so.
        moved = tl.where(shift64 == float("-inf"), 0.0, (origin.to(tl.float64) - shift64) * width)
        distance = (distance + moved) * inv
        weighted *= LN2
        square_logs *= LN2
        shift64 *= inv
        ref_shift64 = ref_shift.to(tl.float64) * inv
        kl *= inv
        reverse *= inv
        column = tl.load(tokens + n) - first
        found = (column >= begin) & (column < end)
        column = tl.where(found, column, begin)
        token = tl.zeros([], tl.float64)
        ref_token = tl.zeros([], tl.float64)
        if found:
            token = capped(tl.load(row + column).to(ACC), cap, CAPPED).to(tl.float64) * inv
            if HAS_REF:
                ref_token = capped(tl.load(ref_row + column).to(ACC), cap, CAPPED).to(tl.float64) * inv
        if SPLIT or RECORD:
            if not ENTROPY & WANT:
                weighted = tl.full([], float("nan"), tl.float64)
            if not MOMENTS & WANT:
                squares = tl.full([], float("nan"), tl.float64)
            if not SQUARE_LOGS & WANT:
                square_logs = tl.full([], float("nan"), tl.float64)
            if not MEAN & WANT:
                distance = tl.full([], float("nan"), tl.float64)
            if HAS_REF:
                if not KL & WANT:
                    kl = tl.full([], float("nan"), tl.float64)
                if not REVERSE & WANT:
                    reverse = tl.full([], float("nan"), tl.float64)
            else:
                ref_shift64 = tl.zeros([], tl.float64)
            store_record(
                record + (n.to(tl.int64) * parts + part) * FIELDS, shift64, total, weighted, squares,
                square_logs, distance,
                width.to(tl.float64), token, found.to(tl.float64), ref_shift64, ref_total,
                ref_token, kl, reverse,
            )  # fmt: skip
        else:
            finish(
                n, count, o_logprob, o_entropy, o_logsumexp, o_sum_sq, o_square_logs, o_mean, o_ref_logprob,
                o_kl, o_reverse, tops, saved, shift.to(tl.float64), ref_shift.to(tl.float64),
                shift64, total, weighted, squares, square_logs, distance, width.to(tl.float64), token,
                found.to(tl.float64), ref_shift64, ref_total, ref_token, kl, reverse,
                WANT, HAS_REF,
            )  # fmt: skip


@triton.jit
def moved_to(old, new):
    """Distance of a part's shift to the row's, and the factor of its sums; none where it has no mass."""
    gap = tl.where(old == float("-inf"), 0.0, old - tl.where(new == float("-inf"), 0.0, new))
    return gap, tl.where(old == float("-inf"), 0.0, tl.exp(gap))


@triton.jit
def sum_moved(factor, value):
    """Parts without mass have nothing to say; what is infinite stays so."""
    value = tl.where((factor == 0.0) & (tl.abs(value) < float("inf")), 0.0, value)
    return tl.sum(tl.where(value == float("inf"), value, factor * value), 0)


@triton.jit(do_not_specialize=["count", "parts"])
def token_stats_combine(
    tokens, mask, temperatures, partial, o_logprob, o_entropy, o_logsumexp, o_sum_sq, o_square_logs, o_mean,
    o_ref_logprob,
    o_kl, o_reverse, tops, saved, record, count, parts, inv_high, inv_low,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    RECORD: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program n: the records of the parts of row n, to one record or to the statistics."""
    n = tl.program_id(0)
    if is_masked(n, tokens, mask, HAS_MASK):
        store_masked(
            n,
            count,
            o_logprob,
            o_entropy,
            o_logsumexp,
            o_sum_sq,
            o_square_logs,
            o_mean,
            o_ref_logprob,
            o_kl,
            o_reverse,
            tops,
            saved,
            record,
            WANT,
            HAS_REF,
            RECORD,
        )
    else:
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        part = tl.arange(0, MOST)
        there = part < parts
        at = partial + (n.to(tl.int64) * parts + part) * FIELDS
        shifts = tl.load(at, mask=there, other=float("-inf"))
        totals = tl.load(at + 1, mask=there, other=0.0)
        ref_shifts = tl.load(at + 8, mask=there, other=float("-inf"))
        ref_totals = tl.load(at + 9, mask=there, other=0.0)
        shift = tl.max(shifts, 0)
        ref_shift = tl.max(ref_shifts, 0)
        gap, factor = moved_to(shifts, shift)
        ref_gap, ref_factor = moved_to(ref_shifts, ref_shift)
        widths = tl.load(at + 5, mask=there, other=0.0)
        total = tl.sum(factor * totals, 0)
        ref_total = tl.sum(ref_factor * ref_totals, 0)
        weighted = sum_moved(factor, tl.load(at + 2, mask=there, other=0.0) + gap * totals)
        squares = tl.load(at + 3, mask=there, other=0.0)
        square_logs = sum_moved(factor * factor, tl.load(at + 13, mask=there, other=0.0) + gap * squares)
        squares = sum_moved(factor * factor, squares)
        distance = tl.sum(tl.load(at + 4, mask=there, other=0.0) + gap * widths, 0)
        token = tl.sum(tl.load(at + 6, mask=there, other=0.0), 0)
        found = tl.sum(tl.load(at + 7, mask=there, other=0.0), 0)
        ref_token = tl.sum(tl.load(at + 10, mask=there, other=0.0), 0)
        apart = gap - ref_gap
        kl = sum_moved(factor, tl.load(at + 11, mask=there, other=0.0) + apart * totals)
        reverse = sum_moved(ref_factor, tl.load(at + 12, mask=there, other=0.0) - apart * ref_totals)
        width = tl.sum(widths, 0)
        if RECORD:
            store_record(
                record + n.to(tl.int64) * FIELDS, shift, total, weighted, squares, square_logs, distance,
                width, token, found,
                ref_shift, ref_total, ref_token, kl, reverse,
            )  # fmt: skip
        else:
            finish(
                n, count, o_logprob, o_entropy, o_logsumexp, o_sum_sq, o_square_logs, o_mean, o_ref_logprob, o_kl,
                o_reverse, tops, saved, shift / inv, ref_shift / inv,
                shift, total, weighted, squares, square_logs, distance, width, token, found,
                ref_shift, ref_total, ref_token, kl, reverse, WANT, HAS_REF,
            )  # fmt: skip


# ---- the Jensen-Shannon divergence: a second pass, with both normalisers -----------------------------------


@triton.jit
def log_mixture_above(logp, logq, beta):
    """log(beta q + (1 - beta) p) relative to the larger of log p and log q, and that."""
    high = tl.where(logp >= logq, logp, logq)
    low = tl.where(logp >= logq, logq, logp)
    weight = tl.where(logp >= logq, beta, 1.0 - beta)
    return log1p(weight * expm1_negative(low - high)), high


@triton.jit
def mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, high, low, beta):
    """A column's part in KL(p || m) and in KL(q || m)."""
    logp = distance(z, shift, high, low) - log_sum
    logq = distance(x, ref_shift, high, low) - ref_log_sum
    log_m, above = log_mixture_above(logp, logq, beta)
    return tl.exp(logp) * (logp - above - log_m), tl.exp(logq) * (logq - above - log_m)


@triton.jit(do_not_specialize=["count", "inner", "ref_inner", "vocab", "blocks", "parts"])
def token_stats_mixture_kernel(
    logits, tokens, ref_logits, mask, temperatures, saved, partial,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low, beta_high, beta_low,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): KL of both sides to their mixture, over blocks [k * blocks, (k + 1) * blocks) of row n."""
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0)
    part = tl.program_id(1)
    mixed = tl.zeros([], tl.float64)
    ref_mixed = tl.zeros([], tl.float64)
    if not is_masked(n, tokens, mask, HAS_MASK):
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        high, low = split(inv, ACC)
        cap = tl.full([], cap_high, ACC) + tl.full([], cap_low, ACC)
        beta = tl.full([], beta_high, ACC) + tl.full([], beta_low, ACC)
        rows = count.to(tl.int64)
        shift = tl.load(saved + n).to(ACC)
        log_sum = tl.log(tl.load(saved + rows + n)).to(ACC)
        ref_shift = tl.load(saved + 5 * rows + n).to(ACC)
        ref_log_sum = tl.log(tl.load(saved + 6 * rows + n)).to(ACC)
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        ref_row = ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner)
        begin = part * blocks * BLOCK
        end = tl.minimum(begin + blocks * BLOCK, vocab)
        full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
        columns = tl.arange(0, BLOCK)
        for start in range(begin, full, BLOCK):
            z = capped(tl.load(row + start + columns).to(ACC), cap, CAPPED)
            x = capped(tl.load(ref_row + start + columns).to(ACC), cap, CAPPED)
            term, ref_term = mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, high, low, beta)
            mixed += tl.sum(term, 0).to(tl.float64)
            ref_mixed += tl.sum(ref_term, 0).to(tl.float64)
        if full < end:
            column = full + columns
            inside = column < end
            z = capped(tl.load(row + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            x = capped(tl.load(ref_row + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            term, ref_term = mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, high, low, beta)
            mixed += tl.sum(tl.where(inside, term, 0.0), 0).to(tl.float64)
            ref_mixed += tl.sum(tl.where(inside, ref_term, 0.0), 0).to(tl.float64)
    at = partial + (n.to(tl.int64) * parts + part) * 2
    tl.store(at, mixed)
    tl.store(at + 1, ref_mixed)


# ---- backward ----------------------------------------------------------------------------------------------


@triton.jit
def upstream(grad, n, GIVEN: tl.constexpr):
    if GIVEN:
        return tl.load(grad + n).to(tl.float64)
    else:
        return tl.zeros([], tl.float64)


@triton.jit
def finite_part(grad, value):
    """An infinite divergence does not change with the logits: it has no gradient."""
    return tl.where(tl.abs(value) == float("inf"), 0.0, grad)


@triton.jit
def side_gradient(
    column, token, d, other, e, other_e, excess,
    on_e, on_distance, on_gap, mean_gap, on_mixed, on_square, on_square_distance,
    on_other, on_one, on_token, LOG: tl.constexpr, SQUARE: tl.constexpr, SQUARE_LOG: tl.constexpr,
    PAIRED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The gradient of one side's scaled logits, from distances to the largest and their exponentials."""
    inner = on_e
    if LOG:
        inner += on_distance * d
    if SQUARE_LOG:
        on_square += on_square_distance * d
    if SQUARE:
        inner += on_square * e
    if PAIRED:
        inner += on_gap * (d - other - mean_gap)
    if MIXED:
        inner += on_mixed * excess
    g = e * inner + on_one
    if PAIRED:
        g += on_other * other_e
    return g + tl.where(column == token, on_token, 0.0)


@triton.jit
def unscaled(g, x, inv, cap, CAPPED: tl.constexpr):
    """From scaled logits to the stored ones: 1 / temperature, and the slope of the softcap."""
    g = g * inv
    if CAPPED:
        g = g * cap_slope(x, cap)
    return g


@triton.jit(
    do_not_specialize=["count", "inner", "ref_inner", "first", "vocab", "width", "blocks", "out_inner"]
)
def token_stats_backward_kernel(
    g_logprob, g_entropy, g_logsumexp, g_sum_sq, g_square_logs, g_mean, g_ref_logprob, g_kl, g_reverse, g_jsd,
    grad_record, record, saved, logits, tokens, ref_logits, mask, temperatures, out, ref_out,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    out_inner, out_stride_outer, out_stride_inner, ref_out_stride,
    first, vocab, width, blocks, inv_high, inv_low, cap_high, cap_low, beta_high, beta_low,
    GIVEN: tl.constexpr, TO_LOGITS: tl.constexpr, TO_REF: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, CAPPED: tl.constexpr, RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n."""
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    # Of a record anything may have a gradient.
    LOG: tl.constexpr = RECORD or (ENTROPY & GIVEN) != 0
    SQUARE: tl.constexpr = RECORD or (MOMENTS & GIVEN) != 0
    SQUARE_LOG: tl.constexpr = RECORD or (SQUARE_LOGS & GIVEN) != 0
    MIXED: tl.constexpr = (not RECORD) and (JSD & GIVEN) != 0
    PAIRED: tl.constexpr = HAS_REF and (RECORD or TO_REF or ((KL | REVERSE | JSD) & GIVEN) != 0)
    n = tl.program_id(0)
    part = tl.program_id(1)
    begin = part * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, vocab)
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK)
    target = out + row_offset(n, out_inner, out_stride_outer, out_stride_inner)
    ref_target = ref_out + n.to(tl.int64) * ref_out_stride
    masked = is_masked(n, tokens, mask, HAS_MASK)
    # Zeros for a masked row, and beyond the vocabulary.
    last = part == tl.num_programs(1) - 1
    zero_from = tl.where(masked, begin, tl.where(last, vocab, end))
    zero_to = tl.where(last, width, end)
    for start in range(zero_from, zero_to, BLOCK):
        column = start + columns
        if TO_LOGITS:
            tl.store(target + column, tl.zeros([BLOCK], out.dtype.element_ty), mask=column < zero_to)
        if TO_REF:
            tl.store(ref_target + column, tl.zeros([BLOCK], ref_out.dtype.element_ty), mask=column < zero_to)
    if not masked:
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        ref_row = ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner)
        inv64 = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        inv, inv_rest = split(inv64, ACC)
        cap = tl.full([], cap_high, ACC) + tl.full([], cap_low, ACC)
        beta = tl.full([], beta_high, tl.float64) + tl.full([], beta_low, tl.float64)
        token = tl.load(tokens + n) - first
        found = (token >= 0) & (token < vocab)
        zero = tl.zeros([], tl.float64)
        on_mixed = zero
        ref_on_mixed = zero
        mean_gap = zero
        ref_mean_gap = zero
        ref_shift = tl.zeros([], ACC)
        total = tl.full([], 1.0, tl.float64)
        ref_total = tl.full([], 1.0, tl.float64)
        if RECORD:
            at = grad_record + n.to(tl.int64) * FIELDS
            own = record + n.to(tl.int64) * FIELDS
            # Rounds to the very logit it was. Where all are -inf any shift gives them no mass.
            shift = tl.load(own)
            shift = tl.where(shift == float("-inf"), 0.0, shift / inv64).to(ACC)
            on_log = tl.load(at + 2)
            on_p = tl.load(at + 1) + on_log
            on_square_log = 2.0 * tl.load(at + 13)
            on_square = 2.0 * tl.load(at + 3) + 0.5 * on_square_log
            on_one = tl.load(at + 4)
            on_token = tl.where(found, tl.load(at + 6), 0.0)
            on_gap = zero
            ref_on_gap = zero
            ref_on_p = zero
            ref_on_token = zero
            if HAS_REF:
                ref_shift = tl.load(own + 8)
                ref_shift = tl.where(ref_shift == float("-inf"), 0.0, ref_shift / inv64).to(ACC)
                on_gap = tl.load(at + 11)
                ref_on_gap = tl.load(at + 12)
                on_p += on_gap
                ref_on_p = tl.load(at + 9) + ref_on_gap
                ref_on_token = tl.where(found, tl.load(at + 10), 0.0)
        else:
            rows = count.to(tl.int64)
            shift = tl.load(saved + n).to(ACC)
            total = tl.load(saved + rows + n)
            # Where the token's log-probability is NaN, so is its gradient.
            on_token = upstream(g_logprob, n, LOGPROB & GIVEN)
            if LOGPROB & GIVEN:
                on_token = tl.where(found, on_token, float("nan"))
            entropy = upstream(g_entropy, n, ENTROPY & GIVEN)
            sum_sq = upstream(g_sum_sq, n, SUM_SQ & GIVEN)
            on_log = -entropy
            moment = upstream(g_square_logs, n, SQUARE_LOGS & GIVEN)
            on_square = 2.0 * sum_sq + moment
            on_square_log = 2.0 * moment
            on_p = upstream(g_logsumexp, n, LOGSUMEXP & GIVEN) - on_token
            if ENTROPY & GIVEN:
                on_p -= entropy * tl.load(saved + 2 * rows + n)
            if MOMENTS & GIVEN:
                on_p -= on_square * tl.load(saved + 3 * rows + n)
            if SQUARE_LOGS & GIVEN:
                on_p -= on_square_log * tl.load(saved + 4 * rows + n)
            on_one = upstream(g_mean, n, MEAN & GIVEN) / vocab
            ref_on_token = upstream(g_ref_logprob, n, REF_LOGPROB & GIVEN)
            if REF_LOGPROB & GIVEN:
                ref_on_token = tl.where(found, ref_on_token, float("nan"))
            on_gap = upstream(g_kl, n, KL & GIVEN)
            ref_on_gap = upstream(g_reverse, n, REVERSE & GIVEN)
            ref_on_p = -ref_on_token
            if HAS_REF:
                ref_shift = tl.load(saved + 5 * rows + n).to(ACC)
                ref_total = tl.load(saved + 6 * rows + n)
            if KL & GIVEN:
                value = tl.load(saved + 7 * rows + n)
                on_gap = finite_part(on_gap, value)
                mean_gap = finite_part(value, value)
                ref_on_p += on_gap
            if REVERSE & GIVEN:
                value = tl.load(saved + 8 * rows + n)
                ref_on_gap = finite_part(ref_on_gap, value)
                ref_mean_gap = finite_part(value, value)
                on_p += ref_on_gap
            if MIXED:
                jsd = upstream(g_jsd, n, JSD & GIVEN)
                on_mixed = (1.0 - beta) * jsd
                ref_on_mixed = beta * jsd
                on_p -= on_mixed * tl.load(saved + 9 * rows + n)
                ref_on_p -= ref_on_mixed * tl.load(saved + 10 * rows + n)
        token = tl.where(found, token, -1)
        # The normalisers are folded into the coefficients in float64, and with them the constants of
        # log p = distance - log total: near the largest logit, where the mass is, distances are small and carry
        # no rounding of theirs.
        log_total = tl.log(total)
        ref_log_total = tl.log(ref_total)
        if LOG:
            on_p -= on_log * log_total
        if SQUARE_LOG:
            on_square -= on_square_log * log_total
        if PAIRED:
            # log p - log q = d - r + log (ref_total / total); less its mean it is small where the mass is.
            mean_gap, rounding = split(mean_gap - (ref_log_total - log_total), ACC)
            on_p -= on_gap * rounding.to(tl.float64)
            ref_mean_gap, rounding = split(ref_mean_gap - (log_total - ref_log_total), ACC)
            ref_on_p -= ref_on_gap * rounding.to(tl.float64)
        on_e, on_distance = (on_p / total).to(ACC), (on_log / total).to(ACC)
        on_square, on_one, on_token = (on_square / (total * total)).to(ACC), on_one.to(ACC), on_token.to(ACC)
        on_square_distance = (on_square_log / (total * total)).to(ACC)
        on_other, ref_on_other = (-ref_on_gap / ref_total).to(ACC), (-on_gap / total).to(ACC)
        on_gap, on_mixed = (on_gap / total).to(ACC), (on_mixed / total).to(ACC)
        ref_on_gap, ref_on_mixed = (ref_on_gap / ref_total).to(ACC), (ref_on_mixed / ref_total).to(ACC)
        ref_on_e, ref_on_token = (ref_on_p / ref_total).to(ACC), ref_on_token.to(ACC)
        for start in range(begin, end, BLOCK):
            column = start + columns
            # A mask on the last block alone: without one the loads and stores are 16 bytes wide.
            if start < full:
                z = tl.load(row + column).to(ACC)
                x = z
                if PAIRED:
                    x = tl.load(ref_row + column).to(ACC)
            else:
                z = tl.load(row + column, mask=column < end, other=0.0).to(ACC)
                x = z
                if PAIRED:
                    x = tl.load(ref_row + column, mask=column < end, other=0.0).to(ACC)
            d = distance(capped(z, cap, CAPPED), shift, inv, inv_rest)
            e = tl.exp(d)
            r = d
            f = e
            excess = e
            ref_excess = e
            if PAIRED:
                r = distance(capped(x, cap, CAPPED), ref_shift, inv, inv_rest)
                f = tl.exp(r)
            if MIXED:
                logp = d - log_total.to(ACC)
                logq = r - ref_log_total.to(ACC)
                log_m, above = log_mixture_above(logp, logq, beta.to(ACC))
                excess = logp - above - log_m
                ref_excess = logq - above - log_m
            if TO_LOGITS:
                g = side_gradient(
                    column, token, d, r, e, f, excess, on_e, on_distance, on_gap, mean_gap,
                    on_mixed, on_square, on_square_distance, on_other,
                    on_one, on_token, LOG, SQUARE, SQUARE_LOG, PAIRED, MIXED,
                )  # fmt: skip
                g = unscaled(g, z, inv, cap, CAPPED).to(out.dtype.element_ty)
                if start < full:
                    tl.store(target + column, g)
                else:
                    tl.store(target + column, g, mask=column < end)
            if TO_REF:
                h = side_gradient(
                    column, token, r, d, f, e, ref_excess, ref_on_e, on_distance,
                    ref_on_gap, ref_mean_gap, ref_on_mixed,
                    on_square, on_square_distance, ref_on_other, 0.0, ref_on_token,
                    False, False, False, PAIRED, MIXED,
                )  # fmt: skip
                h = unscaled(h, x, inv, cap, CAPPED).to(ref_out.dtype.element_ty)
                if start < full:
                    tl.store(ref_target + column, h)
                else:
                    tl.store(ref_target + column, h, mask=column < end)


# ---- launch ------------------------------------------------------------------------------------------------


def _unit_stride(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.stride(-1) == 1 else logits.contiguous()


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """The rows of the leading dimensions: inner rows, outer stride, inner stride."""
    if logits.dim() == 2:
        return max(logits.shape[0], 1), 0, logits.stride(0)
    return max(logits.shape[1], 1), logits.stride(0), logits.stride(1)


class _Problem:
    """What the launches have in common."""

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        ref_logits: Tensor | None,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        vocab: int,
    ) -> None:
        unit = _unit_stride(logits)
        assert unit is not None
        self.logits = unit
        ref = _unit_stride(ref_logits)
        self.ref = self.logits if ref is None else ref
        self.tokens = tokens.contiguous()
        self.mask = self.tokens if mask is None else mask.contiguous().view(torch.uint8)
        self.temperatures = self.tokens if temperatures is None else temperatures.contiguous()
        self.count = tokens.numel()
        self.strides = (*_strides(self.logits), *_strides(self.ref))
        self.scalars = (*pair(1.0 / temperature), *pair(softcap or 1.0))
        self.flags = {"HAS_MASK": mask is not None, "HAS_TEMPERATURES": temperatures is not None}
        self.capped = {"CAPPED": softcap > 0}
        self.block = _block(self.logits, ref is not None or softcap > 0)
        self.blocks = cdiv(vocab, self.block)

    def parts(self, per_multiprocessor: int) -> tuple[int, int]:
        """Blocks of a part, and parts of a row: several where rows alone do not fill the device."""
        wanted = min(MOST_SPLITS, splits(self.logits, self.count, self.blocks, per_multiprocessor))
        each = max(cdiv(self.blocks, wanted), 1)
        return each, max(cdiv(self.blocks, each), 1)


def _bits(outputs: Sequence[str]) -> int:
    return sum(1 << OUTPUTS.index(name) for name in outputs)


def _forward(
    problem: _Problem,
    first: int,
    vocab: int,
    outputs: Sequence[str],
    made: dict[str, Tensor],
    saved: Tensor,
    record: Tensor | None,
    has_ref: bool,
) -> None:
    p = problem
    nothing = p.logits.new_empty(1, dtype=accumulator(p.logits))  # its dtype is that of the accumulation
    out = [made.get(name, nothing) for name in OUTPUTS if name not in ("is_top1", "jsd")]
    out.append(made.get("is_top1", nothing))
    # A row a program; where rows are fewer than two to a multiprocessor, several programs a row.
    each, parts = p.parts(2) if p.count < 2 * multiprocessors(p.logits) else (max(p.blocks, 1), 1)
    partial = saved if record is None else record
    if parts > 1:
        partial = p.logits.new_empty((p.count, parts, len(RECORD)), dtype=torch.float64)
    flags = {"WANT": _bits(outputs), "HAS_REF": has_ref, **p.flags, "RECORD": record is not None}
    token_stats_kernel[(p.count, parts)](
        p.logits, p.tokens, p.ref, p.mask, p.temperatures, *out, saved, partial,
        p.count, *p.strides, first, vocab, each, parts, *p.scalars,
        **flags, **p.capped, SPLIT=parts > 1, BLOCK=p.block, num_warps=WARPS,
    )  # fmt: skip
    if parts > 1:
        token_stats_combine[(p.count,)](
            p.tokens, p.mask, p.temperatures, partial, *out, saved, saved if record is None else record,
            p.count, parts, *p.scalars[:2], **flags, MOST=MOST_SPLITS, num_warps=1,
        )  # fmt: skip


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    inplace: bool,
) -> list[Tensor]:
    acc = accumulator(logits)
    shape = tokens.shape
    # Zeros: not every row of it is filled.
    saved = logits.new_zeros((saved_rows(ref_logits is not None), *shape), dtype=torch.float64)
    made = {
        name: logits.new_empty(shape, dtype=torch.uint8 if name == "is_top1" else acc)
        for name in outputs
        if name != "jsd"
    }
    p = _Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab)
    if p.count:
        _forward(p, 0, vocab, outputs, made, saved, None, ref_logits is not None)
    if "is_top1" in outputs:
        made["is_top1"] = made["is_top1"].view(torch.bool)
    if "jsd" in outputs:
        made["jsd"] = _mixture(p, saved, vocab, beta)
    return [saved, *(made[name] for name in outputs)]


def _mixture(p: _Problem, saved: Tensor, vocab: int, beta: float) -> Tensor:
    """The divergence; what the backward pass needs of it is saved."""
    each, parts = p.parts(2)
    partial = saved.new_empty((p.count, parts, 2), dtype=torch.float64)
    if p.count:
        token_stats_mixture_kernel[(p.count, parts)](
            p.logits, p.tokens, p.ref, p.mask, p.temperatures, saved, partial, p.count, *p.strides,
            vocab, each, parts, *p.scalars, *pair(beta), **p.flags, **p.capped, BLOCK=p.block, num_warps=WARPS,
        )  # fmt: skip
    mixed, ref_mixed = partial.sum(1).view(*saved.shape[1:], 2).unbind(-1)
    saved[9], saved[10] = mixed, ref_mixed
    return (beta * ref_mixed + (1 - beta) * mixed).to(accumulator(p.logits))


def token_stats_partial(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    outputs: Sequence[str],
) -> Tensor:
    record = logits.new_empty((*tokens.shape, len(RECORD)), dtype=torch.float64)
    p = _Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab)
    if p.count:
        _forward(p, first, vocab, outputs, {}, record, record, ref_logits is not None)
    return record


def _backward(
    p: _Problem,
    grads: dict[str, Tensor],
    saved: Tensor,
    grad_record: Tensor | None,
    record: Tensor | None,
    out: Tensor | None,
    ref_out: Tensor | None,
    first: int,
    vocab: int,
    beta: float,
    has_ref: bool,
) -> None:
    if not p.count:
        return
    each, parts = p.parts(4)
    target, ref_target = (p.logits if t is None else t for t in (out, ref_out))
    differentiable = [name for name in OUTPUTS if name != "is_top1"]
    token_stats_backward_kernel[(p.count, parts)](
        *(grads.get(name, saved) for name in differentiable),
        saved if grad_record is None else grad_record, saved if record is None else record, saved,
        p.logits, p.tokens, p.ref, p.mask, p.temperatures, target, ref_target,
        p.count, *p.strides, *_strides(target), p.logits.shape[-1],
        first, vocab, p.logits.shape[-1], each, *p.scalars, *pair(beta),
        GIVEN=_bits(list(grads)), TO_LOGITS=out is not None, TO_REF=ref_out is not None, HAS_REF=has_ref,
        **p.flags, **p.capped, RECORD=record is not None, BLOCK=p.block, num_warps=WARPS,
    )  # fmt: skip


def token_stats_backward(
    grads: Sequence[Tensor | None],
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    to_logits: bool,
    to_ref: bool,
) -> tuple[Tensor, Tensor]:
    out = logits.new_empty(logits.shape if to_logits else 0)
    like = logits if ref_logits is None else ref_logits
    ref_out = like.new_empty(like.shape if to_ref else 0)
    token_stats_backward_to(
        grads, logits, tokens, ref_logits, mask, temperatures, saved, temperature, softcap, vocab, beta, outputs,
        out if to_logits else None, ref_out if to_ref else None,
    )  # fmt: skip
    return out, ref_out


def token_stats_backward_(
    grads: Sequence[Tensor | None],
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    to_logits: bool,
    to_ref: bool,
) -> Tensor:
    """The gradient of the logits written over them; returns that of the reference."""
    p = _Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab)
    given = {name: g.contiguous() for name, g in zip(outputs, grads, strict=True) if g is not None}
    ref_out = p.ref.new_empty(p.ref.shape if to_ref else 0)
    _backward(
        p, given, saved.contiguous(), None, None, p.logits, ref_out if to_ref else None, 0, vocab, beta,
        ref_logits is not None,
    )  # fmt: skip
    if p.logits is not logits:
        logits.copy_(p.logits)  # columns that were no unit stride apart
    return ref_out


def token_stats_partial_backward(
    grad_record: Tensor,
    record: Tensor,
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    to_logits: bool,
    to_ref: bool,
) -> tuple[Tensor, Tensor]:
    out = logits.new_empty(logits.shape if to_logits else 0)
    like = logits if ref_logits is None else ref_logits
    ref_out = like.new_empty(like.shape if to_ref else 0)
    token_stats_partial_backward_to(
        grad_record, record, logits, tokens, ref_logits, mask, temperatures, temperature, softcap, first, vocab,
        out if to_logits else None, ref_out if to_ref else None,
    )  # fmt: skip
    return out, ref_out


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)


# ---- for blocks of logits that a product has just made: gradients written where the caller wants them ------------


def token_stats_backward_to(
    grads: Sequence[Tensor | None],
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """As :func:`token_stats_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    p = _Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab)
    given = {name: g.contiguous() for name, g in zip(outputs, grads, strict=True) if g is not None}
    has_ref = ref_logits is not None
    _backward(p, given, saved.contiguous(), None, None, out, ref_out, 0, vocab, beta, has_ref)


def token_stats_partial_backward_to(
    grad_record: Tensor,
    record: Tensor,
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """As :func:`token_stats_partial_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    p = _Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab)
    nothing = logits.new_empty(1, dtype=torch.float64)
    pair_of = grad_record.contiguous(), record.contiguous()
    has_ref = ref_logits is not None
    _backward(p, {}, nothing, *pair_of, out, ref_out, first, vocab, 0.5, has_ref)
