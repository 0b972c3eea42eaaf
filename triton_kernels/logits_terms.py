"""Sums relative to a row's largest logits, which are known: of the lanes that have these, or of a whole row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits_lanes import Sums, bounded
from .logits_rows import ENTROPY, KL, LOWEST, MEAN_LOGIT, MOMENTS, REVERSE_KL, SUM_SQ_LOGPROB
from .logits_tiles import load_columns


class Terms(NamedTuple):
    """Sums like ``Sums``, in every place of a tile, of columns whose logits are not the row's largest.

    The terms of the largest are exactly 1. They are counted apart, to keep the digits of the tail: in a peaked
    row the entropy depends on the tail alone.
    """

    ties: Any  # number of largest logits
    total: Any
    weighted: Any
    squares: Any
    squares_weighted: Any
    distance: Any
    ref_ties: Any
    ref_total: Any
    kl: Any  # of all columns; sum 2^y (y - u) / s
    reverse: Any


@triton.jit
def no_terms(like, DTYPE: tl.constexpr):
    """The sums over no columns."""
    zero = tl.zeros(like.shape, DTYPE)
    return Terms(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def distance_of(z, top, scale):
    """z - top, with neither infinite, and as a bounded exponent of two."""
    y = z - tl.where(top == float("-inf"), 0.0, top)
    y = tl.where(y < LOWEST, LOWEST, y)
    return y, bounded(y * scale)


@triton.jit
def add_terms(terms, z, x, inside, origin, top, ref_top, scale, WANT: tl.constexpr, HAS_REF: tl.constexpr):
    """Add a tile of columns; z and x are -inf where it is not inside."""
    ties, total, weighted, squares, squares_weighted, distance, ref_ties, ref_total, kl, reverse = terms
    DTYPE: tl.constexpr = total.dtype
    y, exponent = distance_of(z, top, scale)
    exponential = tl.exp2(exponent)
    largest = (z == top) & inside
    ties += largest.to(DTYPE)
    term = tl.where(largest, 0.0, exponential)
    total += term.to(DTYPE)
    if ENTROPY & WANT:
        weighted += (term * exponent).to(DTYPE)
    if MOMENTS & WANT:
        squares += (term * term).to(DTYPE)
    if SUM_SQ_LOGPROB & WANT:
        squares_weighted += (term * term * exponent).to(DTYPE)
    if MEAN_LOGIT & WANT:
        distance += tl.where(inside, (z - origin).to(DTYPE), 0.0)
    if HAS_REF:
        u, ref_exponent = distance_of(x, ref_top, scale)
        ref_exponential = tl.exp2(ref_exponent)
        largest = (x == ref_top) & inside
        ref_ties += largest.to(DTYPE)
        ref_total += tl.where(largest, 0.0, ref_exponential).to(DTYPE)
        if KL & WANT:
            broken = (x == float("-inf")) & (z > float("-inf"))
            kl += tl.where(broken, float("inf"), exponential * (y - u)).to(DTYPE)
        if REVERSE_KL & WANT:
            broken = (z == float("-inf")) & (x > float("-inf"))
            reverse += tl.where(broken, float("inf"), ref_exponential * (u - y)).to(DTYPE)
    return Terms(
        ties, total, weighted, squares, squares_weighted, distance, ref_ties, ref_total, kl, reverse
    )  # fmt: skip


@triton.jit
def of_tile(x):
    return tl.sum(x, None).to(tl.float64)


@triton.jit
def with_terms(sums, terms, scale, WANT: tl.constexpr, HAS_REF: tl.constexpr):
    """The sums, and those of a tile."""
    total, weighted, squares, squares_weighted, distance, ref_total, kl, reverse = sums
    ties = of_tile(terms.ties)
    total += ties + of_tile(terms.total)
    if ENTROPY & WANT:
        weighted += of_tile(terms.weighted)
    if MOMENTS & WANT:
        squares += ties + of_tile(terms.squares)
    if SUM_SQ_LOGPROB & WANT:
        squares_weighted += of_tile(terms.squares_weighted)
    if MEAN_LOGIT & WANT:
        distance += of_tile(terms.distance)
    if HAS_REF:
        ref_total += of_tile(terms.ref_ties) + of_tile(terms.ref_total)
        if KL & WANT:
            kl += of_tile(terms.kl) * scale
        if REVERSE_KL & WANT:
            reverse += of_tile(terms.reverse) * scale
    return Sums(total, weighted, squares, squares_weighted, distance, ref_total, kl, reverse)


# ---- of columns of a row ---------------------------------------------------------------------------------------


@triton.jit
def terms_of_row(
    span, models, place, origin, top, ref_top, scale,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, CAPPED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sums over all columns, float64: of infinite terms or logits, and of exponents that lanes cannot hold."""
    terms = no_terms(place, tl.float64)
    for start in range(span.begin, span.end, T):
        inside = start + place < span.end
        z, x = load_columns(models, start + place, inside, scale.dtype, HAS_REF, CAPPED)
        terms = add_terms(terms, z, x, inside, origin, top, ref_top, scale, WANT, HAS_REF)
    return terms


@triton.jit
def terms_of_lanes(
    first, second, span, models, place, origin, top, ref_top, scale,
    WANT: tl.constexpr, HAS_REF: tl.constexpr, CAPPED: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The sums over the columns of two lanes, or of one: those that have the row's largest logits."""
    terms = no_terms(place, scale.dtype)
    chunks = place // E * (T * E) + place % E
    for other in range(1 + (first != second).to(tl.int32)):
        lane = tl.where(other == 0, first, second)
        for start in range(span.begin + lane * E, span.full, T * T):
            inside = start + chunks < span.full
            z, x = load_columns(models, start + chunks, inside, scale.dtype, HAS_REF, CAPPED)
            terms = add_terms(terms, z, x, inside, origin, top, ref_top, scale, WANT, HAS_REF)
        column = span.full + place * T + lane
        inside = column < span.end
        z, x = load_columns(models, column, inside, scale.dtype, HAS_REF, CAPPED)
        terms = add_terms(terms, z, x, inside, origin, top, ref_top, scale, WANT, HAS_REF)
    return terms
