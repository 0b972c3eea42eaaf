"""Records of token statistics: their fields, the merge of a row's parts, and the statistics of a whole row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.logits import OUTPUTS, RECORD
from .launch import Constant
from .logits_rows import (
    ENTROPY,
    IS_TOP1,
    KL,
    LOGPROB,
    LOGSUMEXP,
    MEAN_LOGIT,
    MOMENTS,
    REF_LOGPROB,
    REVERSE_KL,
    SAVED_ENTROPY,
    SAVED_KL,
    SAVED_REF_SHIFT,
    SAVED_REF_TOTAL,
    SAVED_REVERSE_KL,
    SAVED_SHIFT,
    SAVED_SUM_SQ,
    SAVED_SUM_SQ_LOGPROB,
    SAVED_TOTAL,
    SUM_SQ,
    SUM_SQ_LOGPROB,
    inverse_temperature,
    is_masked,
    places,
    saved_at,
)

# Position of each field in a record.
FIELDS = Constant(len(RECORD))
AT_SHIFT, AT_TOTAL, AT_WEIGHTED, AT_SQUARES, AT_SQUARES_WEIGHTED, AT_DISTANCE, AT_COLUMNS = places(
    RECORD, "shift", "total", "weighted", "squares", "squares_weighted", "distance", "columns"
)
AT_TOKEN, AT_FOUND, AT_REF_SHIFT, AT_REF_TOTAL, AT_REF_TOKEN, AT_KL, AT_REVERSE = places(
    RECORD, "token", "found", "ref_shift", "ref_total", "ref_token", "kl", "reverse"
)


class Outputs(NamedTuple):
    """Pointers to the statistics ``[N]`` of the forward pass; a pointer that no output needs is not used."""

    logprob: Any
    entropy: Any
    logsumexp: Any
    sum_p2: Any
    sum_p2_logp: Any
    mean_logit: Any
    is_top1: Any  # pointer to bytes
    ref_logprob: Any
    kl: Any
    reverse_kl: Any


class Record(NamedTuple):
    """Sums over columns of a row, in scaled logits and nats, float64; fields as in ``reference.logits.RECORD``.

    Definitions: y = z - shift and u = x - ref_shift, with z the scaled logits and x the reference's.
    """

    shift: Any  # the largest scaled logit
    total: Any  # sum e^y
    weighted: Any  # sum e^y y
    squares: Any  # sum e^2y
    distance: Any  # sum y
    columns: Any  # number of columns
    token: Any  # scaled logit of the token; 0 where it is not among the columns
    found: Any  # 1 where the token is among the columns, 0 elsewhere
    ref_shift: Any  # the largest scaled logit of the reference
    ref_total: Any  # sum e^u
    ref_token: Any  # scaled logit of the token in the reference
    kl: Any  # sum e^y (y - u)
    reverse: Any  # sum e^u (u - y)
    squares_weighted: Any  # sum e^2y y


# Kernels address outputs and fields by position.
assert Outputs._fields == tuple(name for name in OUTPUTS if name != "jsd")
assert Record._fields == RECORD


# ---- stored records ----------------------------------------------------------------------------------------


@triton.jit
def nan_unless(NEEDED: tl.constexpr, value):
    if NEEDED:
        return value
    else:
        return tl.full([], float("nan"), tl.float64)


@triton.jit
def stored(r, WANT: tl.constexpr, HAS_REF: tl.constexpr):
    """The stored form of a record: NaN for sums that no output needs, 0 for sums of a missing reference."""
    ref_shift = r.ref_shift
    kl = r.kl
    reverse = r.reverse
    if HAS_REF:
        kl = nan_unless(KL & WANT, kl)
        reverse = nan_unless(REVERSE_KL & WANT, reverse)
    else:
        ref_shift = tl.zeros([], tl.float64)
    return Record(
        r.shift, r.total, nan_unless(ENTROPY & WANT, r.weighted), nan_unless(MOMENTS & WANT, r.squares),
        nan_unless(MEAN_LOGIT & WANT, r.distance), r.columns, r.token, r.found, ref_shift, r.ref_total,
        r.ref_token, kl, reverse, nan_unless(SUM_SQ_LOGPROB & WANT, r.squares_weighted),
    )  # fmt: skip


@triton.jit
def store_record(at, r):
    """Write a record to the pointer ``at``."""
    for field in tl.static_range(FIELDS):
        tl.store(at + field, r[field])


# ---- the statistics of a row -------------------------------------------------------------------------------


@triton.jit
def store_masked(n, out, record, WANT: tl.constexpr, TO_RECORD: tl.constexpr):
    """Write zeros for a masked row. Its saved statistics are zeros already."""
    if TO_RECORD:
        field = tl.arange(0, 16)
        tl.store(record + n.to(tl.int64) * FIELDS + field, 0.0, mask=field < FIELDS)
    else:
        for k in tl.static_range(len(out)):
            if WANT & (1 << k):
                tl.store(out[k] + n, 0)


@triton.jit
def finish(n, count, out, saved, shift, ref_shift, r, WANT: tl.constexpr, HAS_REF: tl.constexpr):
    """Write a row's statistics from its record, and from its shifts in unscaled logits."""
    ACC: tl.constexpr = out.logprob.dtype.element_ty
    nan = float("nan")
    empty = r.shift == float("-inf")  # no column has any mass
    log_sum = tl.where(empty, nan, tl.log(r.total))
    token = tl.where(r.found > 0, r.token, nan)
    entropy = log_sum - r.weighted / r.total
    sum_p2 = tl.where(empty, nan, r.squares / (r.total * r.total))
    tl.store(saved_at(saved, SAVED_SHIFT, n, count), shift)
    tl.store(saved_at(saved, SAVED_TOTAL, n, count), tl.where(empty, nan, r.total))
    if LOGPROB & WANT:
        tl.store(out.logprob + n, (token - r.shift - log_sum).to(ACC))
    if ENTROPY & WANT:
        tl.store(out.entropy + n, entropy.to(ACC))
        tl.store(saved_at(saved, SAVED_ENTROPY, n, count), entropy)
    if LOGSUMEXP & WANT:
        tl.store(out.logsumexp + n, (tl.where(empty, 0.0, r.shift) + log_sum).to(ACC))
    if SUM_SQ & WANT:
        tl.store(out.sum_p2 + n, sum_p2.to(ACC))
    if MOMENTS & WANT:
        tl.store(saved_at(saved, SAVED_SUM_SQ, n, count), sum_p2)
    if SUM_SQ_LOGPROB & WANT:
        value = r.squares_weighted / (r.total * r.total) - log_sum * sum_p2
        tl.store(out.sum_p2_logp + n, value.to(ACC))
        tl.store(saved_at(saved, SAVED_SUM_SQ_LOGPROB, n, count), value)
    if MEAN_LOGIT & WANT:
        mean = tl.where(empty, float("-inf"), r.shift + r.distance / r.columns)
        tl.store(out.mean_logit + n, mean.to(ACC))
    if IS_TOP1 & WANT:
        top1 = (token == r.shift) & (empty == 0) & (r.total == r.total)
        tl.store(out.is_top1 + n, top1.to(tl.uint8))
    if HAS_REF:
        ref_empty = r.ref_shift == float("-inf")
        ref_log_sum = tl.where(ref_empty, nan, tl.log(r.ref_total))
        tl.store(saved_at(saved, SAVED_REF_SHIFT, n, count), ref_shift)
        tl.store(saved_at(saved, SAVED_REF_TOTAL, n, count), tl.where(ref_empty, nan, r.ref_total))
        if REF_LOGPROB & WANT:
            ref_token = tl.where(r.found > 0, r.ref_token, nan)
            tl.store(out.ref_logprob + n, (ref_token - r.ref_shift - ref_log_sum).to(ACC))
        if KL & WANT:
            value = r.kl / r.total + (ref_log_sum - log_sum)
            tl.store(out.kl + n, value.to(ACC))
            tl.store(saved_at(saved, SAVED_KL, n, count), value)
        if REVERSE_KL & WANT:
            value = r.reverse / r.ref_total - (ref_log_sum - log_sum)
            tl.store(out.reverse_kl + n, value.to(ACC))
            tl.store(saved_at(saved, SAVED_REVERSE_KL, n, count), value)


# ---- records of a row's parts ------------------------------------------------------------------------------


@triton.jit
def part_rescaling(part, whole):
    """The part's shift minus the row's, and the factor of the part's sums; both 0 for a part without mass."""
    gap = tl.where(part == float("-inf"), 0.0, part - tl.where(whole == float("-inf"), 0.0, whole))
    return gap, tl.where(part == float("-inf"), 0.0, tl.exp(gap))


@triton.jit
def sum_rescaled(factor, value):
    """Sum over the parts. Finite values of parts without mass are dropped; infinite values stay infinite."""
    value = tl.where((factor == 0.0) & (tl.abs(value) < float("inf")), 0.0, value)
    return tl.sum(tl.where(value == float("inf"), value, factor * value), 0)


@triton.jit(do_not_specialize=["count", "parts"])
def token_stats_combine(
    tokens, mask, temperatures, partial,
    logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, is_top1, ref_logprob, kl, reverse_kl,
    saved, record, count, parts, inv_high, inv_low,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    TO_RECORD: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Program n: the records of the parts of row n, to one record or to the statistics."""
    out = Outputs(
        logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, is_top1, ref_logprob, kl, reverse_kl
    )
    n = tl.program_id(0)
    if is_masked(n, tokens, mask, HAS_MASK):
        store_masked(n, out, record, WANT, TO_RECORD)
    else:
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        part = tl.arange(0, MAX_PARTS)
        inside = part < parts
        at = partial + (n.to(tl.int64) * parts + part) * FIELDS
        shifts = tl.load(at + AT_SHIFT, mask=inside, other=float("-inf"))
        totals = tl.load(at + AT_TOTAL, mask=inside, other=0.0)
        ref_shifts = tl.load(at + AT_REF_SHIFT, mask=inside, other=float("-inf"))
        ref_totals = tl.load(at + AT_REF_TOTAL, mask=inside, other=0.0)
        shift = tl.max(shifts, 0)
        ref_shift = tl.max(ref_shifts, 0)
        gap, factor = part_rescaling(shifts, shift)
        ref_gap, ref_factor = part_rescaling(ref_shifts, ref_shift)
        widths = tl.load(at + AT_COLUMNS, mask=inside, other=0.0)
        total = tl.sum(factor * totals, 0)
        ref_total = tl.sum(ref_factor * ref_totals, 0)
        weighted = sum_rescaled(factor, tl.load(at + AT_WEIGHTED, mask=inside, other=0.0) + gap * totals)
        squares = tl.load(at + AT_SQUARES, mask=inside, other=0.0)
        squares_weighted = tl.load(at + AT_SQUARES_WEIGHTED, mask=inside, other=0.0)
        squares_weighted = sum_rescaled(factor * factor, squares_weighted + gap * squares)
        squares = sum_rescaled(factor * factor, squares)
        distance = tl.sum(tl.load(at + AT_DISTANCE, mask=inside, other=0.0) + gap * widths, 0)
        token = tl.sum(tl.load(at + AT_TOKEN, mask=inside, other=0.0), 0)
        found = tl.sum(tl.load(at + AT_FOUND, mask=inside, other=0.0), 0)
        ref_token = tl.sum(tl.load(at + AT_REF_TOKEN, mask=inside, other=0.0), 0)
        # A NaN among the parts, which a maximum may pass over, is in the total.
        shift = tl.where(total == total, shift, float("nan"))
        ref_shift = tl.where(ref_total == ref_total, ref_shift, float("nan"))
        gap_change = gap - ref_gap
        forward = sum_rescaled(factor, tl.load(at + AT_KL, mask=inside, other=0.0) + gap_change * totals)
        reverse = tl.load(at + AT_REVERSE, mask=inside, other=0.0) - gap_change * ref_totals
        reverse = sum_rescaled(ref_factor, reverse)
        r = Record(
            shift, total, weighted, squares, distance, tl.sum(widths, 0), token, found,
            ref_shift, ref_total, ref_token, forward, reverse, squares_weighted,
        )  # fmt: skip
        if TO_RECORD:
            store_record(record + n.to(tl.int64) * FIELDS, r)
        else:
            finish(n, count, out, saved, shift / inv, ref_shift / inv, r, WANT, HAS_REF)
