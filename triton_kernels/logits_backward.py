"""The gradient of token statistics, or of records, in the logits of both models: one read and one write.

A column's gradient is a function of its logits and of the row's coefficients (see `logits_coefficients.Side`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits_coefficients import (
    Gradients,
    folded,
    sides_of_outputs,
    sides_of_record,
    softmax_of_record,
    softmax_of_saved,
)
from .logits_jsd import logs_of_ratios
from .logits_records import AT_REF_SHIFT, AT_SHIFT, FIELDS
from .logits_rows import (
    ENTROPY,
    JSD,
    KL,
    LOG2E,
    MOMENTS,
    REVERSE_KL,
    SAVED_REF_SHIFT,
    SAVED_REF_TOTAL,
    SAVED_SHIFT,
    SAVED_TOTAL,
    SUM_SQ_LOGPROB,
    cap_slope,
    capped,
    columns_of,
    inverse_temperature,
    is_masked,
    joined,
    row_offset,
    scaled_distance,
    split,
)
from .rows import to_boundary

# ---- the gradient of a block of columns --------------------------------------------------------------------


class Terms(NamedTuple):
    """Terms of the gradient in a block of one model's columns."""

    distance: Any
    exponential: Any  # e^distance
    excess: Any  # log p - log m, m the mixture


@triton.jit
def side_gradient(
    column, token, terms, other, on,
    LOG: tl.constexpr, SQUARE: tl.constexpr, SQUARE_LOG: tl.constexpr, MEET: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The gradient of one model's scaled logits; the formula is that of `Coefficients`."""
    factor = on.on_e
    on_square = on.on_square
    if LOG:
        factor += on.on_distance * terms.distance
    if SQUARE_LOG:
        on_square += on.on_square_distance * terms.distance
    if SQUARE:
        factor += on_square * terms.exponential
    if MEET:
        factor += on.on_gap * (terms.distance - other.distance - on.mean_gap)
    if MIXED:
        factor += on.on_mixed * terms.excess
    grad = terms.exponential * factor + on.on_one
    if MEET:
        grad += on.on_other * other.exponential
    return grad + tl.where(column == token, on.on_token, 0.0)


@triton.jit
def unscaled(grad, x, inv, cap, CAPPED: tl.constexpr):
    """The gradient of the stored logits x: that of the scaled ones, times 1 / temperature and the cap's slope."""
    grad = grad * inv
    if CAPPED:
        grad = grad * cap_slope(x, cap)
    return grad


# ---- a block of columns ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Pointers to the row of each tensor."""

    logits: Any
    ref: Any
    out: Any
    ref_out: Any


class Scalars(NamedTuple):
    """What a row's columns have in common, but for the coefficients of the two models."""

    token: Any  # its column; one beyond the last if it is not among these
    inv: Any  # 1 / temperature, in two parts
    inv_rest: Any
    cap: Any
    beta: Any


@triton.jit
def write_zeros(row, begin, end, BLOCK: tl.constexpr):
    """Zeros in columns [begin, end), begin a multiple of the block; whole blocks are stored 16 bytes at a time."""
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], row.dtype.element_ty)
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        tl.store(row + start + lanes, zeros)
    if full < end:
        tl.store(row + full + lanes, zeros, mask=full + lanes < end)


@triton.jit
def write_zeros_at(column, inside, rows, TO_LOGITS: tl.constexpr, TO_REF: tl.constexpr):
    """Zeros in a few columns that no whole block has."""
    if TO_LOGITS:
        tl.store(rows.out + column, tl.zeros(column.shape, rows.out.dtype.element_ty), mask=inside)
    if TO_REF:
        tl.store(rows.ref_out + column, tl.zeros(column.shape, rows.ref_out.dtype.element_ty), mask=inside)


@triton.jit
def load_block(row, column, inside, ACC: tl.constexpr, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(row + column, mask=inside, other=0.0).to(ACC)
    else:
        return tl.load(row + column).to(ACC)


@triton.jit
def store_block(row, column, inside, value, TAIL: tl.constexpr):
    value = value.to(row.dtype.element_ty)
    if TAIL:
        tl.store(row + column, value, mask=inside)
    else:
        tl.store(row + column, value)


@triton.jit
def write_gradients(
    column, end, rows, by, softmax, ref_softmax, on, ref_on,
    LOG: tl.constexpr, SQUARE: tl.constexpr, SQUARE_LOG: tl.constexpr, MEET: tl.constexpr, MIXED: tl.constexpr,
    PAIRED: tl.constexpr, TO_LOGITS: tl.constexpr, TO_REF: tl.constexpr, CAPPED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of columns. Only the tail has a mask: without one, accesses are 16 bytes wide."""
    ACC: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    inside = column < end
    z = load_block(rows.logits, column, inside, ACC, TAIL)
    x = z
    if PAIRED:
        x = load_block(rows.ref, column, inside, ACC, TAIL)
    distance = scaled_distance(capped(z, by.cap, CAPPED), softmax.shift, by.inv, by.inv_rest)
    exponential = tl.exp(distance)
    ref_distance = distance
    ref_exponential = exponential
    excess = exponential
    ref_excess = exponential
    if PAIRED:
        ref_distance = scaled_distance(capped(x, by.cap, CAPPED), ref_softmax.shift, by.inv, by.inv_rest)
        ref_exponential = tl.exp(ref_distance)
    if MIXED:
        excess, ref_excess = logs_of_ratios(
            (distance - softmax.log_total.to(ACC)) * LOG2E,
            (ref_distance - ref_softmax.log_total.to(ACC)) * LOG2E,
            by.beta.to(ACC),
        )
    terms = Terms(distance, exponential, excess)
    ref_terms = Terms(ref_distance, ref_exponential, ref_excess)
    if TO_LOGITS:
        grad = side_gradient(column, by.token, terms, ref_terms, on, LOG, SQUARE, SQUARE_LOG, MEET, MIXED)
        store_block(rows.out, column, inside, unscaled(grad, z, by.inv, by.cap, CAPPED), TAIL)
    if TO_REF:
        grad = side_gradient(column, by.token, ref_terms, terms, ref_on, False, False, False, MEET, MIXED)
        store_block(rows.ref_out, column, inside, unscaled(grad, x, by.inv, by.cap, CAPPED), TAIL)


# ---- kernel ------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "count", "inner", "stride_outer", "stride_inner", "ref_inner", "ref_stride_outer", "ref_stride_inner",
        "out_inner", "out_stride_outer", "out_stride_inner", "ref_out_stride", "first", "vocab", "width", "blocks",
    ]
)  # fmt: skip
def token_stats_backward_kernel(
    logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, ref_logprob, kl, reverse_kl, jsd,
    grad_record, saved, logits, ref_logits, tokens, mask, temperatures, out, ref_out,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    out_inner, out_stride_outer, out_stride_inner, ref_out_stride,
    first, vocab, width, blocks, inv_high, inv_low, cap_high, cap_low, beta_high, beta_low,
    GRADS: tl.constexpr, TO_LOGITS: tl.constexpr, TO_REF: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, CAPPED: tl.constexpr, OF_RECORD: tl.constexpr,
    ALIGNED: tl.constexpr, PEEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n.

    Inputs are the gradients of the statistics and ``saved`` ``[len(SAVED), N]``. With ``OF_RECORD`` they are
    ``grad_record`` and, as ``saved``, the records ``[N, len(RECORD)]``.

    With ``ALIGNED`` the rows of all tensors begin at multiples of 16 bytes. With ``PEEL`` they lie alike relative
    to these: blocks begin at the first, and program (n, 0) has the columns before it, too.
    """
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    # Any field of a record may have a gradient.
    LOG: tl.constexpr = OF_RECORD or (ENTROPY & GRADS) != 0
    SQUARE: tl.constexpr = OF_RECORD or (MOMENTS & GRADS) != 0
    SQUARE_LOG: tl.constexpr = OF_RECORD or (SUM_SQ_LOGPROB & GRADS) != 0
    MIXED: tl.constexpr = (not OF_RECORD) and (JSD & GRADS) != 0
    # Without a divergence the two sides do not meet: a NaN on one does not reach the other.
    MEET: tl.constexpr = HAS_REF and (OF_RECORD or ((KL | REVERSE_KL | JSD) & GRADS) != 0)
    PAIRED: tl.constexpr = HAS_REF and (TO_REF or MEET)
    n = tl.program_id(0)
    part = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    rows = Rows(
        logits + row_offset(n, inner, stride_outer, stride_inner),
        ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner),
        out + row_offset(n, out_inner, out_stride_outer, out_stride_inner),
        ref_out + n.to(tl.int64) * ref_out_stride,
    )
    # Columns are counted from the first at a multiple of 16 bytes; those before it are negative.
    head = tl.zeros([], tl.int32)
    if PEEL:
        head = tl.minimum(to_boundary(rows.logits), vocab)
        rows = Rows(rows.logits + head, rows.ref + head, rows.out + head, rows.ref_out + head)
    if PEEL or ALIGNED:
        rows = Rows(
            tl.multiple_of(rows.logits, 16), tl.multiple_of(rows.ref, 16),
            tl.multiple_of(rows.out, 16), tl.multiple_of(rows.ref_out, 16),
        )  # fmt: skip
    begin, full, end, _ = columns_of(part, blocks, vocab - head, BLOCK)
    # Zeros beyond the vocabulary, by the last program of a row.
    stop = tl.where(part == tl.num_programs(1) - 1, width - head, end)
    if is_masked(n, tokens, mask, HAS_MASK):
        if PEEL:  # noqa: SIM102 (known when compiled; the part is not)
            if part == 0:
                write_zeros_at(lanes - head, lanes < head, rows, TO_LOGITS, TO_REF)
        if TO_LOGITS:
            write_zeros(rows.out, begin, stop, BLOCK)
        if TO_REF:
            write_zeros(rows.ref_out, begin, stop, BLOCK)
    else:
        for start in range(end, stop, BLOCK):
            write_zeros_at(start + lanes, start + lanes < stop, rows, TO_LOGITS, TO_REF)
        inv64 = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        inv, inv_rest = split(inv64, ACC)
        beta = joined(beta_high, beta_low, tl.float64)
        token = tl.load(tokens + n) - first
        found = (token >= 0) & (token < vocab)
        if OF_RECORD:
            record = saved + n.to(tl.int64) * FIELDS
            softmax = softmax_of_record(tl.load(record + AT_SHIFT), inv64, ACC)
            ref_softmax = softmax  # not read without a reference
            if HAS_REF:
                ref_softmax = softmax_of_record(tl.load(record + AT_REF_SHIFT), inv64, ACC)
            policy, ref = sides_of_record(grad_record + n.to(tl.int64) * FIELDS, found, HAS_REF)
        else:
            softmax = softmax_of_saved(saved, SAVED_SHIFT, SAVED_TOTAL, n, count, ACC)
            ref_softmax = softmax  # likewise
            if HAS_REF:
                ref_softmax = softmax_of_saved(saved, SAVED_REF_SHIFT, SAVED_REF_TOTAL, n, count, ACC)
            grads = Gradients(
                logprob, entropy, logsumexp, sum_p2, sum_p2_logp, mean_logit, ref_logprob, kl, reverse_kl, jsd
            )  # fmt: skip
            policy, ref = sides_of_outputs(grads, saved, n, count, found, vocab, beta, GRADS)
        # In the integers of the columns, of 32 bits for any vocabulary that there is.
        token = tl.where(found, token - head, width).to(begin.dtype)
        by = Scalars(token, inv, inv_rest, joined(cap_high, cap_low, ACC), beta)
        on = folded(policy, softmax, ref.on_gap, ref_softmax, LOG, SQUARE_LOG, MEET, ACC)
        ref_on = folded(ref, ref_softmax, policy.on_gap, softmax, False, False, MEET, ACC)
        for start in range(begin, full, BLOCK):
            write_gradients(
                start + lanes, end, rows, by, softmax, ref_softmax, on, ref_on,
                LOG, SQUARE, SQUARE_LOG, MEET, MIXED, PAIRED, TO_LOGITS, TO_REF, CAPPED, False,
            )  # fmt: skip
        if PEEL:  # noqa: SIM102 (likewise)
            if part == 0:
                write_gradients(
                    lanes - head, 0, rows, by, softmax, ref_softmax, on, ref_on,
                    LOG, SQUARE, SQUARE_LOG, MEET, MIXED, PAIRED, TO_LOGITS, TO_REF, CAPPED, True,
                )  # fmt: skip
        if full < end:
            write_gradients(
                full + lanes, end, rows, by, softmax, ref_softmax, on, ref_on,
                LOG, SQUARE, SQUARE_LOG, MEET, MIXED, PAIRED, TO_LOGITS, TO_REF, CAPPED, True,
            )  # fmt: skip
