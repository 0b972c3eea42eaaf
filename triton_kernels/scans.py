"""Scans along rows on the GPU: affine maps in float64, a block of tokens at a time with a carry.

Where a scan runs against time, blocks are read in decreasing time, so that every reverse scan is a forward one.
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

from .launch import BITS, INTERPRETED, cdiv, multiprocessors
from .rows import Rows, row_bounds

CHUNK = 256 if INTERPRETED else 16384

# Stages of a scan.
WHOLE = tl.constexpr(0)  # the row in one piece
AGGREGATES = tl.constexpr(1)  # of every chunk, and nothing else
RESUMED = tl.constexpr(2)  # every chunk from what the chunks before it left

# Fields of a chunk's record in `state`.
SHIFT = tl.constexpr(
    0
)  # of the chunk's map; after the pass for the carries, the value that the chunk starts with
SLOPE = tl.constexpr(1)
FIELDS = tl.constexpr(2)


class Row(NamedTuple):
    """A row of tokens, and the part of it that a program scans."""

    number: Any  # among the rows, int64
    offset: Any  # of its first token where rows are packed, else 0
    length: Any  # in tokens
    begin: Any  # the part: its first token
    end: Any  # and one past its last


class Map(NamedTuple):
    """The map ``v -> shift + slope v`` of adjacent tokens, in float64."""

    slope: Any
    shift: Any


@triton.jit
def row_part(cu, b, c, width, total, STAGE: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Row b with its chunk c; in stage WHOLE with all of its tokens."""
    offset, length = row_bounds(cu, b, width, total, PACKED)
    begin = length * 0
    end = length
    if STAGE != WHOLE:
        begin = tl.minimum(length, c.to(tl.int64) * CHUNK)
        end = tl.minimum(length, begin + CHUNK)
    return Row(b.to(tl.int64), offset, length, begin, end)


@triton.jit
def at_row(tokens, row, stride):
    """Pointer to the row's first token; ``stride`` is between padded rows, 0 for packed ones."""
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
    """0 where the factor is, whatever the value."""
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
    """The scanned values of a block of maps behind ``carry``, and the carry for the next block.

    The slope of a carry is kept in stage AGGREGATES only.
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
    """Program b: from the aggregate of every chunk of a row to the carry that each starts with."""
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
    """How many chunks each row is scanned in: several where rows alone do not fill the device."""
    if rows.batch >= multiprocessors(like) or rows.width < 2 * CHUNK:
        return 1
    return cdiv(rows.width, CHUNK)


def new_state(batch: int, chunks: int, like: Tensor) -> Tensor:
    """Room for a record per chunk of every row."""
    return torch.empty((batch, chunks, FIELDS.value), dtype=torch.float64, device=like.device)


def scan_in_stages(launch: Callable[[int], None], state: Tensor, reverse: bool) -> None:
    """Launch a linear scan over rows: in one piece, or in the stages that its chunks need."""
    batch, chunks, _ = state.shape
    if chunks == 1:
        launch(WHOLE.value)
        return
    launch(AGGREGATES.value)
    linear_carries_kernel[(batch,)](state, chunks, REVERSE=reverse, num_warps=1, **BITS)
    launch(RESUMED.value)
