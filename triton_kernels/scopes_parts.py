"""Parts of rows, whose tokens are reduced and mapped relative to a scope."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import Constant
from .rows import load_valid, row_bounds
from .tiles import load_tokens

# What is found of the parts of rows, and done with their tokens.
STANDARD, STANDARD_BACKWARD, WEIGHTS, WEIGHTS_BACKWARD, COVARIANCE = (Constant(k) for k in range(5))
STEER, BONUS, BONUS_BACKWARD = (Constant(k) for k in range(5, 8))

FIELDS = Constant(4)  # numbers of a part's record; a plane for each
COUNT, ORIGIN, ABOVE, SQUARES = (Constant(k) for k in range(4))  # of moments, those of values less the origin
TOP, TOTAL = Constant(1), Constant(2)  # of weights, behind the count
COLUMNS = Constant(5)  # of the statistics of a scope


class Part(NamedTuple):
    """A part of a row; pointers to the row's first token."""

    numbers: Any
    other: Any  # weights, or other values
    grad: Any
    mask: Any
    begin: Any
    end: Any


@triton.jit
def part_of(
    values, other, grad, mask, cu, b, part, parts, width, total, values_stride, other_stride, grad_stride,
    mask_stride, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Part ``part`` of row b: whole tiles."""
    base, length = row_bounds(cu, b, width, total, PACKED)
    row = b.to(tl.int64)
    size = (length + (TILE * parts - 1)) // (TILE * parts) * TILE
    begin = tl.minimum(part * size, length)
    return Part(
        values + base + row * values_stride, other + base + row * other_stride, grad + base + row * grad_stride,
        mask + base + row * mask_stride, begin, tl.minimum(begin + size, length),
    )  # fmt: skip


@triton.jit
def load_factors(row, tile, HAS: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """The tokens of every thread, if there are any."""
    if HAS:
        return load_tokens(row, tile, PER, ALIGNED)
    else:
        return ()


@triton.jit
def first_valid(part, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The first valid token of a part; its end if there is none."""
    first = part.begin
    if HAS_MASK:
        first = part.end
        start = part.begin
        while (start < part.end) & (first == part.end):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(part.mask, at, at < part.end, HAS_MASK)
            first = tl.min(tl.where(valid, at, part.end), 0)
            start += BLOCK
    return first
