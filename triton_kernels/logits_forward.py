"""Token statistics, forward: sums over the tiles of a row or of a part of it, and its record."""

from __future__ import annotations

import triton
import triton.language as tl

from .logits_lanes import accumulate, is_doubtful, merged, no_lanes, no_sums
from .logits_records import FIELDS, Outputs, Record, finish, store_masked, store_record, stored
from .logits_rows import (
    LN2,
    LOG2E,
    LOWEST,
    MEAN_LOGIT,
    capped,
    columns_of,
    inverse_temperature,
    is_masked,
    joined,
    row_offset,
)
from .logits_terms import terms_of_lanes, terms_of_row, with_terms
from .logits_tiles import Models, load_columns, load_tile, widened


@triton.jit
def nan_of_infinite(shift, total):
    """A row's largest logit and its total, float64: NaN, as in the specification, where a logit is NaN or inf."""
    total = tl.where(shift == float("inf"), float("nan"), total)
    return tl.where(total == total, shift.to(tl.float64), float("nan")), total


@triton.jit
def record_of(sums, top, ref_top, origin, width, token, ref_token, found, inv):
    """The record of sums over ``width`` columns: scaled logits, nats."""
    shift, total = nan_of_infinite(top, sums.total)
    ref_shift, ref_total = nan_of_infinite(ref_top, sums.ref_total)
    # The origin moves to the maximum; a distance of -inf stays -inf.
    moved = tl.where(shift == float("-inf"), 0.0, (origin.to(tl.float64) - shift) * width)
    return Record(
        shift * inv, total, sums.weighted * LN2, sums.squares, (sums.distance + moved) * inv,
        width.to(tl.float64), token, found.to(tl.float64), ref_shift * inv, ref_total, ref_token,
        sums.kl * LN2, sums.reverse * LN2, sums.squares_weighted * LN2,
    )  # fmt: skip


# ---- kernel ------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "count", "inner", "stride_outer", "stride_inner", "ref_inner", "ref_stride_outer", "ref_stride_inner",
        "first", "vocab", "blocks", "parts",
    ]
)  # fmt: skip
def token_stats_kernel(
    logits, ref_logits, tokens, mask, temperatures,
    logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, is_top1, ref_logprob, kl, reverse_kl,
    saved, record,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    first, vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    CAPPED: tl.constexpr, TO_RECORD: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n, to a record or to the statistics.

    A block is a tile [H, T, E]: runs of E consecutive columns, H of them for each of T lanes. Rows of both models
    begin at multiples of ALIGN bytes.
    """
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
        models = Models(
            logits + row_offset(n, inner, stride_outer, stride_inner),
            ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner),
            joined(cap_high, cap_low, ACC),
        )
        span = columns_of(part, blocks, vocab, H * T * E)
        # The mean is taken relative to the first logit (to 0 where that is not finite).
        origin = tl.zeros([], ACC)
        if MEAN_LOGIT & WANT:  # noqa: SIM102 (known when compiled; the width is not)
            if span.width > 0:
                origin = capped(tl.load(models.row + span.begin).to(ACC), models.cap, CAPPED)
                origin = tl.where(tl.abs(origin) < -LOWEST, origin, 0.0)
        lanes = no_lanes(T, ACC)
        lane = tl.arange(0, T)
        # A tile is loaded while the one before it is summed.
        loaded = load_tile(models.row, span.begin, span.begin < span.full, H, T, E, ALIGN)
        ref_loaded = loaded
        if HAS_REF:
            ref_loaded = load_tile(models.ref_row, span.begin, span.begin < span.full, H, T, E, ALIGN)
        for start in range(span.begin + H * T * E, span.full + H * T * E, H * T * E):
            z = widened(loaded, ACC)
            x = z
            if HAS_REF:
                x = widened(ref_loaded, ACC)
            loaded = load_tile(models.row, start, start < span.full, H, T, E, ALIGN)
            if HAS_REF:
                ref_loaded = load_tile(models.ref_row, start, start < span.full, H, T, E, ALIGN)
            lanes = accumulate(
                z, x, z, origin, lanes, scale, models.cap, WANT, HAS_REF, CAPPED, False
            )  # fmt: skip
        for start in range(span.full, span.end, T):
            column = (start + lane)[None, :]
            inside = column < span.end
            z, x = load_columns(models, column, inside, ACC, HAS_REF, False)
            lanes = accumulate(
                z, x, inside, origin, lanes, scale, models.cap, WANT, HAS_REF, CAPPED, True
            )  # fmt: skip

        top = tl.max(lanes.top, 0)
        ref_top = tl.max(lanes.ref_top, 0)
        holder = tl.max(tl.where(lanes.top == top, lane, 0), 0)
        ref_holder = holder
        if HAS_REF:
            ref_holder = tl.max(tl.where(lanes.ref_top == ref_top, lane, 0), 0)
        keep = (lane != holder) & (lane != ref_holder)
        top = capped(top, models.cap, CAPPED)
        ref_top = capped(ref_top, models.cap, CAPPED)
        sums = merged(lanes, keep, top, ref_top, scale, WANT, HAS_REF)
        place = tl.arange(0, T // E)[:, None] * E + tl.arange(0, E)[None, :]
        if is_doubtful(sums, top, ref_top, scale, HAS_REF):
            every = terms_of_row(
                span, models, place, origin, top, ref_top, scale, WANT, HAS_REF, CAPPED, T
            )  # fmt: skip
            sums = with_terms(no_sums(), every, scale, WANT, HAS_REF)
        else:
            further = terms_of_lanes(
                holder, ref_holder, span, models, place, origin, top, ref_top, scale,
                WANT, HAS_REF, CAPPED, T, E,
            )  # fmt: skip
            sums = with_terms(sums, further, scale, WANT, HAS_REF)

        column = tl.load(tokens + n) - first
        found = (column >= span.begin) & (column < span.end)
        column = tl.where(found, column, span.begin)
        token = tl.zeros([], tl.float64)
        ref_token = tl.zeros([], tl.float64)
        if found:
            token = capped(tl.load(models.row + column).to(ACC), models.cap, CAPPED).to(tl.float64) * inv
            if HAS_REF:
                ref_token = capped(tl.load(models.ref_row + column).to(ACC), models.cap, CAPPED)
                ref_token = ref_token.to(tl.float64) * inv
        r = record_of(sums, top, ref_top, origin, span.width, token, ref_token, found, inv)
        if SPLIT or TO_RECORD:
            at = record + (n.to(tl.int64) * parts + part) * FIELDS
            store_record(at, stored(r, WANT, HAS_REF))
        else:
            finish(
                n, count, out, saved, top.to(tl.float64), ref_top.to(tl.float64), r, WANT, HAS_REF
            )  # fmt: skip
