"""The Jensen-Shannon divergence of two models: a second pass over the logits, with both normalisers."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import expm1_negative, log1p
from .logits_rows import (
    SAVED_REF_SHIFT,
    SAVED_REF_TOTAL,
    SAVED_SHIFT,
    SAVED_TOTAL,
    capped,
    columns_of,
    inverse_temperature,
    is_masked,
    joined,
    row_offset,
    saved_at,
    scaled_distance,
    split,
)

# Positions in a pair of divergences: the policy's, and the reference's.
POLICY, REFERENCE, SIDES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def log_mixture(logp, logq, beta):
    """The larger of log p and log q, and log(beta q + (1 - beta) p) relative to it."""
    high = tl.where(logp >= logq, logp, logq)
    low = tl.where(logp >= logq, logq, logp)
    weight = tl.where(logp >= logq, beta, 1.0 - beta)
    return high, log1p(weight * expm1_negative(low - high))


@triton.jit
def mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, inv, inv_rest, beta):
    """A column's terms of KL(p || m) and of KL(q || m)."""
    logp = scaled_distance(z, shift, inv, inv_rest) - log_sum
    logq = scaled_distance(x, ref_shift, inv, inv_rest) - ref_log_sum
    high, log_m = log_mixture(logp, logq, beta)
    return tl.exp(logp) * (logp - high - log_m), tl.exp(logq) * (logq - high - log_m)


@triton.jit(do_not_specialize=["count", "inner", "ref_inner", "vocab", "blocks", "parts"])
def token_stats_mixture_kernel(
    logits, ref_logits, tokens, mask, temperatures, saved, partial,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low, beta_high, beta_low,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): KL of both sides to their mixture, over blocks [k * blocks, (k + 1) * blocks) of row n.

    ``partial`` is ``[N, parts, 2]``: KL(p || m), then KL(q || m).
    """
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0)
    part = tl.program_id(1)
    mixed = tl.zeros([], tl.float64)
    ref_mixed = tl.zeros([], tl.float64)
    if not is_masked(n, tokens, mask, HAS_MASK):
        inv, inv_rest = split(inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES), ACC)
        cap = joined(cap_high, cap_low, ACC)
        beta = joined(beta_high, beta_low, ACC)
        shift = tl.load(saved_at(saved, SAVED_SHIFT, n, count)).to(ACC)
        log_sum = tl.log(tl.load(saved_at(saved, SAVED_TOTAL, n, count))).to(ACC)
        ref_shift = tl.load(saved_at(saved, SAVED_REF_SHIFT, n, count)).to(ACC)
        ref_log_sum = tl.log(tl.load(saved_at(saved, SAVED_REF_TOTAL, n, count))).to(ACC)
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        ref_row = ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner)
        begin, full, end, _ = columns_of(part, blocks, vocab, BLOCK)
        lanes = tl.arange(0, BLOCK)
        for start in range(begin, full, BLOCK):
            z = capped(tl.load(row + start + lanes).to(ACC), cap, CAPPED)
            x = capped(tl.load(ref_row + start + lanes).to(ACC), cap, CAPPED)
            term, ref_term = mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, inv, inv_rest, beta)
            mixed += tl.sum(term, 0).to(tl.float64)
            ref_mixed += tl.sum(ref_term, 0).to(tl.float64)
        if full < end:
            column = full + lanes
            inside = column < end
            z = capped(tl.load(row + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            x = capped(tl.load(ref_row + column, mask=inside, other=0.0).to(ACC), cap, CAPPED)
            term, ref_term = mixture_terms(z, x, shift, log_sum, ref_shift, ref_log_sum, inv, inv_rest, beta)
            mixed += tl.sum(tl.where(inside, term, 0.0), 0).to(tl.float64)
            ref_mixed += tl.sum(tl.where(inside, ref_term, 0.0), 0).to(tl.float64)
    at = partial + (n.to(tl.int64) * parts + part) * SIDES
    tl.store(at + POLICY, mixed)
    tl.store(at + REFERENCE, ref_mixed)
