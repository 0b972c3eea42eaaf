"""The Jensen-Shannon divergence of two models: a second pass over the logits, with both normalisers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair, add_to, approximate_log2, expm1_negative, fused, log1p, sum_pairs
from .launch import Constant
from .logits_lanes import sum_of_lane
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


# ---- a pair of probabilities -------------------------------------------------------------------------------
#
# The mixture m is taken relative to the larger probability: m = larger (1 + below), where below is in [-1, 0].

NEAR = Constant(-0.36)  # exponents of two: ratios above e^-0.25, for which `excess` has a polynomial
FARTHEST_GAP = Constant(-125.0)  # 2^gap and its inverse are normal numbers


class Meeting(NamedTuple):
    """Two probabilities, of which one is larger, and their mixture."""

    policy_leads: Any  # whether the policy's is the larger
    gap: Any  # log2(smaller / larger), bounded
    weight: Any  # of the smaller one in the mixture


@triton.jit
def meeting(log2p, log2q, beta):
    leads = log2p >= log2q
    gap = tl.maximum(-tl.abs(log2p - log2q), FARTHEST_GAP)  # -inf - -inf is NaN, and bounded as well
    return Meeting(leads, gap, tl.where(leads, beta, 1.0 - beta))


@triton.jit
def excess(d):
    """d - ln(1 + d), float32, in [e^-0.25 - 1, e^0.25 - 1] (a minimax polynomial, to 2e-7 of itself)."""
    series = fused(d, tl.full([], 0.11308091, d.dtype), -0.15334049)
    series = fused(series, d, 0.16800569)
    series = fused(series, d, -0.19971612)
    series = fused(series, d, 0.24997274)
    series = fused(series, d, -0.33333535)
    return d * d * fused(series, d, 0.50000007)


@triton.jit
def logs_of_ratios(log2p, log2q, beta):
    """log(p / m) and log(q / m), to full relative accuracy near 0."""
    leads, gap, weight = meeting(log2p, log2q, beta)
    gap *= LN2
    below = weight * expm1_negative(gap)
    if gap.dtype == tl.float64:
        log_m = log1p(below)
    else:
        log_m = tl.where(below > -0.22, below - excess(below), approximate_log2(1.0 + below) * LN2)
    return tl.where(leads, -log_m, gap - log_m), tl.where(leads, gap - log_m, -log_m)


@triton.jit
def mixture_terms(log2p, log2q, beta):
    """A column's p log(p / m) + m - p, and the same of q: terms of KL(p || m) and KL(q || m).

    The sum of m - p over all columns is 0. With it, a term is of second order in p / m - 1, and so is its error.
    """
    leads, gap, weight = meeting(log2p, log2q, beta)
    other = 1.0 - weight
    larger = tl.exp2(tl.maximum(log2p, log2q, propagate_nan=tl.PropagateNan.ALL))
    ratio = tl.exp2(gap)
    if gap.dtype == tl.float64:
        change = expm1_negative(gap * LN2)
        log_m = log1p(weight * change)
        of_larger = weight * change - log_m
        of_smaller = ratio * (gap * LN2 - log_m) - other * change
    else:
        near = gap > NEAR
        below = fused(ratio, weight, -weight)  # m / larger - 1
        above = fused(-ratio, other, other)  # (m - smaller) / larger
        log2_m = approximate_log2(1.0 + below)
        of_larger = tl.where(near, excess(below), below - log2_m * LN2)
        of_smaller = tl.where(
            near, ratio * excess(above * tl.exp2(-gap)), above + ratio * LN2 * (gap - log2_m)
        )
    return larger * tl.where(leads, of_larger, of_smaller), larger * tl.where(leads, of_smaller, of_larger)


# ---- a row ---------------------------------------------------------------------------------------------------


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
    """The logarithm to base 2."""
    return fused(z, scale, -by.high) - by.rest


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
            term, ref_term = mixture_terms(
                log2_probability(z, policy, scale), log2_probability(x, ref, scale), beta
            )
            of_policy = add_to(of_policy, 1.0, sum_of_lane(term))
            of_ref = add_to(of_ref, 1.0, sum_of_lane(ref_term))
        for start in range(span.full, span.end, T):
            column = (start + tl.arange(0, T))[None, :]
            inside = column < span.end
            z, x = load_columns(models, column, inside, ACC, True, CAPPED)
            term, ref_term = mixture_terms(
                log2_probability(z, policy, scale), log2_probability(x, ref, scale), beta
            )
            of_policy = add_to(of_policy, 1.0, tl.sum(tl.where(inside, term, 0.0), 0))
            of_ref = add_to(of_ref, 1.0, tl.sum(tl.where(inside, ref_term, 0.0), 0))
        mixed = sum_pairs(of_policy)
        ref_mixed = sum_pairs(of_ref)
    at = partial + (n.to(tl.int64) * parts + part) * SIDES
    tl.store(at + POLICY, mixed)
    tl.store(at + REFERENCE, ref_mixed)
