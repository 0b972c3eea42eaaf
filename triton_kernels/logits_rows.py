"""Rows of logits: addresses, masks, temperature and softcap; names of outputs and saved rows.

In the files of this family, run-time values that belong together form named tuples; constexpr flags are passed
separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.logits import IGNORED as IGNORED_ID
from ..reference.logits import OUTPUTS, SAVED
from .arithmetic import inverse
from .launch import Constant

IGNORED = Constant(IGNORED_ID)
LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)
LOWEST = Constant(-3.4028234663852886e38)  # in place of -inf, where inf - inf could arise


# ---- names of outputs and of saved rows --------------------------------------------------------------------


def places(names: Sequence[str], *wanted: str) -> Iterator[tl.constexpr]:
    return (Constant(names.index(name)) for name in wanted)


# Bit of each output in a set of outputs (see `bits`).
LOGPROB, ENTROPY, LOGSUMEXP, SUM_SQ, SUM_SQ_LOGPROB, MEAN_LOGIT, IS_TOP1, REF_LOGPROB, KL, REVERSE_KL, JSD = (
    Constant(1 << place.value)
    for place in places(
        OUTPUTS, "logprob", "entropy", "logsumexp", "sum_p2", "sum_p2_logp", "mean_logit", "is_top1",
        "ref_logprob", "kl", "reverse_kl", "jsd",
    )
)  # fmt: skip
MOMENTS = Constant(SUM_SQ.value | SUM_SQ_LOGPROB.value)

# Row of each saved statistic.
SAVED_SHIFT, SAVED_TOTAL, SAVED_ENTROPY, SAVED_SUM_SQ, SAVED_SUM_SQ_LOGPROB = places(
    SAVED, "shift", "total", "entropy", "sum_p2", "sum_p2_logp"
)
SAVED_REF_SHIFT, SAVED_REF_TOTAL, SAVED_KL, SAVED_REVERSE_KL, SAVED_MIXED_KL, SAVED_REF_MIXED_KL = places(
    SAVED, "ref_shift", "ref_total", "kl", "reverse_kl", "mixed_kl", "ref_mixed_kl"
)


def bits(outputs: Sequence[str]) -> int:
    """A set of outputs as an integer: bit k for ``OUTPUTS[k]``."""
    return sum(1 << OUTPUTS.index(name) for name in outputs)


@triton.jit
def saved_at(saved, ROW: tl.constexpr, n, count):
    """Pointer to a statistic of row n in ``saved`` ``[len(SAVED), count]``."""
    return saved + count.to(tl.int64) * ROW + n


# ---- rows and columns --------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """The columns of a row that one program processes."""

    begin: Any
    full: Any  # end of the whole blocks; a part of a block follows up to `end`
    end: Any
    width: Any  # number of columns; 0 where the row ends before `begin`


@triton.jit
def columns_of(part, blocks, vocab, BLOCK: tl.constexpr):
    """Blocks [part * blocks, (part + 1) * blocks) of a row.

    The tail is separate: whole blocks need no mask, so that their loads and stores are 16 bytes wide.
    """
    begin = part * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, vocab)
    width = tl.maximum(end - begin, 0)
    return Columns(begin, begin + width // BLOCK * BLOCK, end, width)


@triton.jit
def row_offset(n, inner, stride_outer, stride_inner):
    """Offset of row n of [N, V] or of [B, T, V], 64-bit."""
    return (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner


@triton.jit
def is_masked(n, tokens, mask, HAS_MASK: tl.constexpr):
    masked = tl.load(tokens + n) == IGNORED
    if HAS_MASK:
        masked = masked | (tl.load(mask + n) == 0)
    return masked


# ---- scalars, temperature and softcap ----------------------------------------------------------------------


@triton.jit
def joined(high, low, DTYPE: tl.constexpr):
    """A scalar argument from its two float32 parts (see ``launch.pair``)."""
    return tl.full([], high, DTYPE) + tl.full([], low, DTYPE)


@triton.jit
def split(value, ACC: tl.constexpr):
    """A float64 scalar in two parts of the accumulation type."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def inverse_temperature(n, temperatures, inv_high, inv_low, HAS_TEMPERATURES: tl.constexpr):
    """1 / temperature in float64."""
    if HAS_TEMPERATURES:
        return 1.0 / tl.load(temperatures + n)
    else:
        return joined(inv_high, inv_low, tl.float64)


@triton.jit
def cap_exponential(x, cap):
    """e^2u and 1 / (1 + e^2u), u = x / cap."""
    e = tl.exp2(x * (2.0 * LOG2E / cap))
    return e, inverse(1.0 + e)


@triton.jit
def capped(x, cap, CAPPED: tl.constexpr):
    """The softcap of logits, cap * tanh(x / cap), to the absolute accuracy of numbers as large as the cap."""
    if CAPPED:
        _, share = cap_exponential(x, cap)
        x = cap - 2.0 * cap * share
    return x


@triton.jit
def inverses(x):
    """1 / x of a tile [H, T, 2, ...]: four elements share a division. Products of four are finite."""
    if len(x.shape) > 2:
        a, b = tl.split(x)
        if len(x.shape) > 3:
            c, d = tl.split(a * b)
            share = inverse(c * d)
            share = tl.join(share * d, share * c)
        else:
            share = inverse(a * b)
        return tl.join(share * b, share * a)
    else:
        return inverse(x)


@triton.jit
def capped_tile(x, cap, CAPPED: tl.constexpr):
    """The softcap of a tile, as :func:`capped`, with fewer divisions and a few ulp of the cap more of rounding.

    Where tanh is 1 to all digits, its argument is bounded.
    """
    if CAPPED:
        exponent = tl.minimum(x * (2.0 * LOG2E / cap), 31.0, propagate_nan=tl.PropagateNan.ALL)
        x = cap - 2.0 * cap * inverses(1.0 + tl.exp2(exponent))
    return x


@triton.jit
def cap_slope(x, cap):
    """1 - tanh^2(x / cap), to full relative accuracy where tanh is near 1 too."""
    e, share = cap_exponential(x, cap)
    return 4.0 * tl.minimum(e, 1e30) * share * share


@triton.jit
def scaled_distance(x, shift, inv_high, inv_low):
    """(x - shift) / temperature. The difference is clamped, so that -inf stays finite and has no mass."""
    y = x - shift
    y = tl.where(y < -1e20, -1e20, y)
    return y * inv_high + y * inv_low
