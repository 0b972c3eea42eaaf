"""Scans along rows on the GPU: affine maps, a tile of tokens at a time.

A thread scans its own tokens, and the maps of the threads are scanned once a tile, in float64. Within a thread
float32 tokens are scanned in two parts, to twice the digits of float32, which is right where all are finite. A row
that ends in an infinity or a NaN is scanned again in float64: what is finite does not overflow there, and a factor
of 0 cuts.

For a scan against time, tiles and threads are taken in decreasing time: every reverse scan is a forward one.
A few long rows are cut into chunks: a pass for the aggregates of the chunks, and a pass to write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import Pair, fused
from .launch import INTERPRETED, Constant, cdiv, multiprocessors
from .rows import Rows, row_bounds
from .tiles import TILE, from_before

CHUNK = 8 * TILE if not INTERPRETED else 4 * TILE  # tokens of a chunk, at least
MAX_CHUNKS = 64

# Stages of a scan.
WHOLE = Constant(0)  # a row at once
AGGREGATES = Constant(1)  # only the aggregates of every chunk, in rows of several
RESUMED = Constant(2)  # every chunk, from the aggregates of the chunks before it

# Fields of a chunk's record in `state`: its map.
SHIFT = Constant(0)
SLOPE = Constant(1)
FIELDS = Constant(2)

LARGEST_SLOPE = Constant(
    1e300
)  # finite, so that nothing times it is nothing; what it multiplies else is infinite


class Row(NamedTuple):
    """A row of tokens, and the part of it that a program scans."""

    number: Any  # number of the row, int64
    offset: Any  # offset of its first token for packed rows, else 0
    length: Any  # number of tokens
    begin: Any  # first token of the part
    end: Any  # one past the last token of the part


class Map(NamedTuple):
    """The map ``v -> shift + slope v`` of adjacent tokens, in float64."""

    slope: Any
    shift: Any


@triton.jit
def row_part(cu, b, c, width, total, chunk, STAGE: tl.constexpr, PACKED: tl.constexpr):
    """Row b with its chunk c as part, of ``chunk`` tokens; in stage WHOLE with all of its tokens."""
    offset, length = row_bounds(cu, b, width, total, PACKED)
    begin = length * 0
    end = length
    if STAGE != WHOLE:
        begin = tl.minimum(length, c.to(tl.int64) * chunk)
        end = tl.minimum(length, begin + chunk)
        if STAGE == AGGREGATES:  # of a row that is no longer than a chunk nobody asks for them
            end = tl.where(length <= chunk, begin, end)
    return Row(b.to(tl.int64), offset, length, begin, end)


@triton.jit
def at_row(tokens, row, stride):
    """Pointer to the row's first token; ``stride`` is that between padded rows, 0 for packed ones."""
    return tokens + row.offset + row.number * stride


@triton.jit
def record_of(state, row, c, chunks):
    """Pointer to the record of the row's chunk c."""
    return state + (row.number * chunks + c) * FIELDS


@triton.jit
def last_of(x, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


@triton.jit
def latest(a, a_valid, b, b_valid):
    """Associative combine: the latest valid value of two adjacent segments."""
    return tl.where(b_valid != 0, b, a), a_valid | b_valid


@triton.jit
def lesser(a, b):
    """The smaller of two numbers; a NaN stays."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def either(a, b):
    return a | b


# ---- arithmetic in float64, or in float32 in two parts -------------------------------------------------------


@triton.jit
def paired(x, ACC: tl.constexpr):
    """A float64 number as a pair in the precision of a thread's scan; in float64 its rest is 0 throughout."""
    high = x.to(ACC)
    return Pair(high, (x - high.to(tl.float64)).to(ACC))


@triton.jit
def widened(pair):
    if pair.sum.dtype == tl.float64:
        return pair.sum
    else:
        return pair.sum.to(tl.float64) + pair.rest.to(tl.float64)


@triton.jit
def rounded(pair, x):
    """The pair plus x."""
    if pair.sum.dtype == tl.float64:
        return pair.sum + x
    else:
        total = plus(pair, x)
        return total.sum + total.rest


@triton.jit
def where_pair(flag, a, b):
    return Pair(tl.where(flag, a.sum, b.sum), tl.where(flag, a.rest, b.rest))


@triton.jit
def times(factor, value):
    """The product, but 0 where the factor is 0, whatever the value."""
    return factor * tl.where(factor == 0.0, 0.0, value)


@triton.jit
def plus(pair, x):
    """The pair plus a number (Knuth)."""
    if pair.sum.dtype == tl.float64:
        return Pair(pair.sum + x, pair.rest)
    else:
        total = pair.sum + x
        other = total - pair.sum
        return Pair(total, ((pair.sum - (total - other)) + (x - other)) + pair.rest)


@triton.jit
def product(a, b):
    """The product of two pairs. A product that the compiler could fuse with a sum would not be rounded."""
    if a.sum.dtype == tl.float64:
        return Pair(times(a.sum, b.sum), a.rest)
    else:
        high = fused(a.sum, b.sum, 0.0)
        return Pair(high, fused(a.sum, b.sum, -high) + (a.sum * b.rest + a.rest * b.sum))


@triton.jit
def scaled(factor, x):
    """The product of a pair and a number, by which it is cut where it is 0."""
    if factor.sum.dtype == tl.float64:
        return Pair(times(factor.sum, x), factor.rest)
    else:
        high = fused(factor.sum, x, 0.0)
        return Pair(high, fused(factor.sum, x, -high) + factor.rest * x)


@triton.jit
def weighted(x, weight):
    """The product of a pair and a number, which cuts the pair where it is 0."""
    if x.sum.dtype == tl.float64:
        return Pair(times(weight, x.sum), x.rest)
    else:
        return scaled(x, weight)


@triton.jit
def advanced(y, slope, shift):
    """The pair ``shift + slope y``."""
    term = product(slope, y)
    total = plus(shift, term.sum)
    return Pair(total.sum, total.rest + term.rest)


# ---- maps of threads -----------------------------------------------------------------------------------------


@triton.jit
def compose(a, x, b, y):
    """Associative combine: the map ``v -> x + a v``, then ``v -> y + b v``."""
    return a * b, y + b * x


@triton.jit
def compose_any(a, x, b, y):
    """The same of any numbers: a slope of 0 cuts, and slopes do not overflow."""
    slope = a * b
    return tl.where(slope > LARGEST_SLOPE, LARGEST_SLOPE, slope), y + times(b, x)


@triton.jit
def scan_threads(own, carry, tile, ACC: tl.constexpr):
    """The map before every thread, from those of threads and the one ``carry``, and the carry for the next tile.

    A carry is that of the first thread; its slope is computed where it is used.
    """
    if tl.float64 == ACC:
        slope, shift = compose_any(carry.slope, carry.shift, own.slope, own.shift)
    else:
        slope, shift = compose(carry.slope, carry.shift, own.slope, own.shift)
    slope = tl.where(tile.first, slope, own.slope)
    shift = tl.where(tile.first, shift, own.shift)
    if tl.float64 == ACC:
        slope, shift = tl.associative_scan((slope, shift), 0, compose_any)
    else:
        slope, shift = tl.associative_scan((slope, shift), 0, compose)
    shift = from_before(shift, tile)
    return tl.where(tile.first, carry.shift, shift), Map(from_before(slope, tile), shift)


@triton.jit
def handed_on(value, some, carried, tile):
    """The latest value before every thread, of those that have some; and the first thread's in the next tile.

    ``carried`` is that before the first thread.
    """
    value = tl.where(tile.first & (some == 0), carried, value)
    value, some = tl.associative_scan((value, tl.where(tile.first, 1, some)), 0, latest)
    value = from_before(value, tile)
    return tl.where(tile.first, carried, value), value


@triton.jit
def not_finite(part):
    """Whether the map of a part is not finite, which then its values may be."""
    return (tl.abs(part.shift) < float("inf")) & (tl.abs(part.slope) < float("inf")) == 0


@triton.jit
def store_map(record, aggregate):
    tl.store(record + SHIFT, aggregate.shift)
    tl.store(record + SLOPE, aggregate.slope)


@triton.jit
def scan_start(
    state, row, c, chunks, chunk, STAGE: tl.constexpr, MAX_CHUNKS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The value that a part starts with: that of the chunks before it in the direction of the scan."""
    start = tl.zeros([], tl.float64)
    if STAGE == RESUMED:
        lane = tl.arange(0, MAX_CHUNKS)
        own = tl.cdiv(row.length, chunk)
        if REVERSE:
            other = own - 1 - lane
            before = other > c
        else:
            other = lane + own * 0
            before = other < tl.minimum(own, c)
        record = record_of(state, row, other, chunks)
        slope = tl.load(record + SLOPE, mask=before, other=1.0)
        shift = tl.load(record + SHIFT, mask=before, other=0.0)
        _, shift = tl.associative_scan((slope, shift), 0, compose_any)
        start = last_of(shift, MAX_CHUNKS)
    return start


# ---- launch ------------------------------------------------------------------------------------------------


def chunk_of(rows: Rows, like: Tensor) -> int:
    """Tokens of a chunk: at least the width where rows alone fill the device."""
    if rows.batch >= multiprocessors(like):
        return rows.width
    return max(CHUNK, cdiv(cdiv(rows.width, MAX_CHUNKS), TILE) * TILE)


def new_state(batch: int, chunks: int, like: Tensor, fields: int = FIELDS.value) -> Tensor:
    """Memory for one record per chunk of every row, if they have several."""
    return torch.empty((batch if chunks > 1 else 0, chunks, fields), dtype=torch.float64, device=like.device)


def scan_in_stages(launch: Callable[[int], None], chunks: int) -> None:
    """Launch a linear scan over rows: whole rows in one stage, or chunks in two."""
    for stage in (WHOLE,) if chunks == 1 else (AGGREGATES, RESUMED):
        launch(stage.value)
