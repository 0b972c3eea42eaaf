"""Scans along rows on the GPU: affine maps in float64, a block of tokens at a time with a carry.

For a scan against time, blocks are read in decreasing time, so that every reverse scan is a forward one.
A few long rows are cut into chunks: a pass for the aggregates of the chunks, one program a row for the carries, a
pass to write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import BITS, INTERPRETED, Constant, cdiv, multiprocessors
from .rows import Rows, row_bounds

CHUNK = 256 if INTERPRETED else 16384

# Stages of a scan.
WHOLE = Constant(0)  # a row at once
AGGREGATES = Constant(1)  # only the aggregate of every chunk
RESUMED = Constant(2)  # every chunk, from the carry of the chunks before it

# Fields of a chunk's record in `state`: its map. After the pass for the carries, SHIFT is the chunk's start value.
SHIFT = Constant(0)
SLOPE = Constant(1)
FIELDS = Constant(2)


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
def row_part(cu, b, c, width, total, STAGE: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Row b with its chunk c as part; in stage WHOLE with all of its tokens."""
    offset, length = row_bounds(cu, b, width, total, PACKED)
    begin = length * 0
    end = length
    if STAGE != WHOLE:
        begin = tl.minimum(length, c.to(tl.int64) * CHUNK)
        end = tl.minimum(length, begin + CHUNK)
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
def times(factor, value):
    """The product, but 0 where the factor is 0, whatever the value."""
    return factor * tl.where(factor == 0.0, 0.0, value)


@triton.jit
def compose(a, x, b, y):
    """Associative combine: the map ``v -> x + a v``, then ``v -> y + b v``."""
    return a * b, y + times(b, x)


@triton.jit
def scan_start(record, STAGE: tl.constexpr):
    """The map before the first token of a part: a value to resume from, or the identity at 0."""
    shift = tl.zeros([], tl.float64)
    if STAGE == RESUMED:
        shift = tl.load(record + SHIFT)
    return Map(tl.full([], 1.0, tl.float64), shift)


@triton.jit
def scan_block(slope, shift, carry, STAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The scanned values of a block of maps after ``carry``, and the carry for the next block.

    The slope of a carry is computed in stage AGGREGATES only.
    """
    slope, shift = tl.associative_scan((slope, shift), 0, compose)
    values = shift + times(slope, carry.shift)
    product = carry.slope
    if STAGE == AGGREGATES:
        product *= last_of(slope, BLOCK)
    return values, Map(product, last_of(values, BLOCK))


@triton.jit
def store_map(record, aggregate):
    tl.store(record + SHIFT, aggregate.shift)
    tl.store(record + SLOPE, aggregate.slope)


@triton.jit(do_not_specialize=["chunks"])
def linear_carries_kernel(state, chunks, REVERSE: tl.constexpr):
    """Program b: replaces the aggregates of the chunks of row b by the carries that they start with."""
    records = state + tl.program_id(0).to(tl.int64) * chunks * FIELDS
    carry = tl.zeros([], tl.float64)
    for k in range(0, chunks):
        c = k
        if REVERSE:
            c = chunks - 1 - k
        record = records + FIELDS * c
        shift = tl.load(record + SHIFT)
        slope = tl.load(record + SLOPE)
        tl.store(record + SHIFT, carry)
        carry = shift + times(slope, carry)


# ---- launch ------------------------------------------------------------------------------------------------


def chunks_of(rows: Rows, like: Tensor) -> int:
    """The number of chunks of a row in a scan: several where rows alone do not fill the device."""
    if rows.batch >= multiprocessors(like) or rows.width < 2 * CHUNK:
        return 1
    return cdiv(rows.width, CHUNK)


def new_state(batch: int, chunks: int, like: Tensor) -> Tensor:
    """Memory for one record per chunk of every row."""
    return torch.empty((batch, chunks, FIELDS.value), dtype=torch.float64, device=like.device)


def scan_in_stages(launch: Callable[[int], None], state: Tensor, reverse: bool) -> None:
    """Launch a linear scan over rows: whole rows in one stage, or chunks in three."""
    batch, chunks, _ = state.shape
    if chunks == 1:
        launch(WHOLE.value)
        return
    launch(AGGREGATES.value)
    linear_carries_kernel[(batch,)](state, chunks, REVERSE=reverse, num_warps=1, **BITS)
    launch(RESUMED.value)
