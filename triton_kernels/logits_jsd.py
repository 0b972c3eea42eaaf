"""The Jensen-Shannon divergence of two models: a second pass over the logits, with both normalisers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair, add_to, expm1_negative, fused, log1p, sum_pairs
from .launch import Constant
from .logits_lanes import bounded, sum_of_lane
from .logits_rows import (
    LN2,
    LOG2E,
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
    split,
)
from .logits_tiles import Models, load_columns, load_tile, widened

# Positions in a pair of divergences: the policy's, and the reference's.
POLICY, REFERENCE, SIDES = Constant(0), Constant(1), Constant(2)


@triton.jit
def log_mixture(logp, logq, beta):
    """The larger of log p and log q, and log(beta q + (1 - beta) p) relative to it."""
    high = tl.where(logp >= logq, logp, logq)
    low = tl.where(logp >= logq, logq, logp)
    weight = tl.where(logp >= logq, beta, 1.0 - beta)
    return high, log1p(weight * expm1_negative(low - high))


class Normaliser(NamedTuple):
    """The logarithm of a model's normaliser to base 2, in two parts."""

    high: Any
    rest: Any


@triton.jit
def normaliser(shift, total, scale):
    """The normaliser of a row, from its largest logit and its total, float64."""
    return Normaliser(*split(shift * scale.to(tl.float64) + tl.log2(total), scale.dtype))


@triton.jit
def log2_probability(z, by, scale):
    """The logarithm to base 2, bounded."""
    return bounded(fused(z, scale, -by.high) - by.rest)


@triton.jit
def mixture_terms(z, x, policy, ref, scale, beta):
    """A column's terms of KL(p || m) and of KL(q || m)."""
    log2p = log2_probability(z, policy, scale)
    log2q = log2_probability(x, ref, scale)
    logp = log2p * LN2
    logq = log2q * LN2
    high, log_m = log_mixture(logp, logq, beta)
    return tl.exp2(log2p) * (logp - high - log_m), tl.exp2(log2q) * (logq - high - log_m)


@triton.jit(
    do_not_specialize=[
        "count", "inner", "stride_outer", "stride_inner", "ref_inner", "ref_stride_outer", "ref_stride_inner",
        "vocab", "blocks", "parts",
    ]
)  # fmt: skip
def token_stats_mixture_kernel(
    logits, ref_logits, tokens, mask, temperatures, saved, partial,
    count, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner,
    vocab, blocks, parts, inv_high, inv_low, cap_high, cap_low, beta_high, beta_low,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, CAPPED: tl.constexpr, ALIGN: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Program (n, k): KL of both sides to their mixture, over blocks [k * blocks, (k + 1) * blocks) of row n.

    ``partial`` is ``[N, parts, 2]``: KL(p || m), then KL(q || m). Blocks are tiles as in the first pass.
    """
    ACC: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0)
    part = tl.program_id(1)
    mixed = tl.zeros([], tl.float64)
    ref_mixed = tl.zeros([], tl.float64)
    if not is_masked(n, tokens, mask, HAS_MASK):
        inv = inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES)
        scale = (inv * LOG2E).to(ACC)
        beta = joined(beta_high, beta_low, ACC)
        policy = normaliser(
            tl.load(saved_at(saved, SAVED_SHIFT, n, count)),
            tl.load(saved_at(saved, SAVED_TOTAL, n, count)),
            scale,
        )
        ref = normaliser(
            tl.load(saved_at(saved, SAVED_REF_SHIFT, n, count)),
            tl.load(saved_at(saved, SAVED_REF_TOTAL, n, count)),
            scale,
        )
        models = Models(
            logits + row_offset(n, inner, stride_outer, stride_inner),
            ref_logits + row_offset(n, ref_inner, ref_stride_outer, ref_stride_inner),
            joined(cap_high, cap_low, ACC),
        )
        span = columns_of(part, blocks, vocab, H * T * E)
        zero = tl.zeros([T], ACC)
        of_policy = Pair(zero, zero)
        of_ref = Pair(zero, zero)
        for start in range(span.begin, span.full, H * T * E):
            z = widened(load_tile(models.row, start, True, H, T, E, ALIGN), ACC)
            x = widened(load_tile(models.ref_row, start, True, H, T, E, ALIGN), ACC)
            z = capped(z, models.cap, CAPPED)
            x = capped(x, models.cap, CAPPED)
            term, ref_term = mixture_terms(z, x, policy, ref, scale, beta)
            of_policy = add_to(of_policy, 1.0, sum_of_lane(term))
            of_ref = add_to(of_ref, 1.0, sum_of_lane(ref_term))
        for start in range(span.full, span.end, T):
            column = (start + tl.arange(0, T))[None, :]
            inside = column < span.end
            z, x = load_columns(models, column, inside, ACC, True, CAPPED)
            term, ref_term = mixture_terms(z, x, policy, ref, scale, beta)
            of_policy = add_to(of_policy, 1.0, tl.sum(tl.where(inside, term, 0.0), 0))
            of_ref = add_to(of_ref, 1.0, tl.sum(tl.where(inside, ref_term, 0.0), 0))
        mixed = sum_pairs(of_policy)
        ref_mixed = sum_pairs(of_ref)
    at = partial + (n.to(tl.int64) * parts + part) * SIDES
    tl.store(at + POLICY, mixed)
    tl.store(at + REFERENCE, ref_mixed)
