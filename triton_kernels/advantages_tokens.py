"""Tokens of group advantages: rows that have one, sums of their gradients, and a row's value written to them."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import Pair, add_to, sum_pairs
from .groups import LOOK, RowTokens, have_token, place_rows
from .launch import INTERPRETED, Constant
from .logits_rows import to_boundary
from .rows import load_valid, row_bounds

BLOCK = 64 if INTERPRETED else 2048
ROWS_AT_ONCE = 4  # rows whose first valid tokens one program seeks
AT_ONCE = Constant(ROWS_AT_ONCE)
# What is found of tokens.
NOTHING, LIVES, SUMS = range(3)
OF_LIVES, OF_SUMS = Constant(LIVES), Constant(SUMS)


@triton.jit
def add_tokens(lanes, some, line, flags, at, inside, HAS_MASK: tl.constexpr, WHOLE: tl.constexpr):
    """Add a block of gradients to the lanes, and note which lanes had a valid token."""
    if WHOLE:
        x = tl.load(line + at)
        if HAS_MASK:
            inside = tl.load(flags + at) != 0
    else:
        x = tl.load(line + at, mask=inside, other=0.0)
        inside = load_valid(flags, at, inside, HAS_MASK)
    return add_to(lanes, 1.0, tl.where(inside, x, 0.0)), some | inside.to(tl.int32)


@triton.jit
def sum_row(
    row, part, parts, grads, grad_stride, tokens,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the valid tokens of a part of a row, summed, float64; and whether there are any.

    Lanes have compensated sums in the dtype of the gradients. Blocks begin at a multiple of 16 bytes.
    """
    KIND: tl.constexpr = grads.dtype.element_ty
    base, size = row_bounds(tokens.cu, row, tokens.width, tokens.total, PACKED)
    length = size.to(tl.int32)
    line = grads + base + row.to(tl.int64) * grad_stride
    flags = tokens.mask + base + row.to(tl.int64) * tokens.mask_stride
    lane = tl.arange(0, BLOCK)
    lanes = Pair(tl.zeros([BLOCK], KIND), tl.zeros([BLOCK], KIND))
    some = tl.zeros([BLOCK], tl.int32)
    head = 0
    if ALIGNED:
        line = tl.multiple_of(line, 16)
        flags = tl.multiple_of(flags, 16)
    else:
        head = tl.minimum(to_boundary(line), length)
        if part == 0:
            lanes, some = add_tokens(lanes, some, line, flags, lane, lane < head, HAS_MASK, False)
        line = tl.multiple_of(line + head, 16)
        flags += head
    end = length - head
    full = end // BLOCK * BLOCK
    for start in range(part * BLOCK, full, parts * BLOCK):
        lanes, some = add_tokens(lanes, some, line, flags, start + lane, lane >= 0, HAS_MASK, True)
    if (full < end) & (part == full // BLOCK % parts):
        lanes, some = add_tokens(lanes, some, line, flags, full + lane, full + lane < end, HAS_MASK, False)
    total = sum_pairs(lanes)
    if tl.abs(total) < float("inf"):
        pass
    else:
        # What is infinite or NaN, or beyond the range of float32 on the way, is summed plainly.
        wide = tl.zeros([BLOCK], tl.float64)
        for start in range(part * BLOCK - head, end, parts * BLOCK):
            at = start + lane
            inside = (at < end) & ((at >= 0) | (part == 0))
            valid = load_valid(flags, at, inside, HAS_MASK)
            wide += tl.load(line + at, mask=valid, other=0.0).to(tl.float64)
        total = tl.sum(wide, 0)
    return total, tl.max(some, 0)


@triton.jit(
    do_not_specialize=["batch", "ranked", "mask_stride", "grad_stride", "width", "total", "parts"]
)
def prepare_kernel(
    labels, order, sorted_labels, grads, mask, cu, live, sums,
    batch, ranked, mask_stride, grad_stride, width, total, parts,
    KIND: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``ranked`` programs sort rows by label; the others look at the tokens of rows, or sum gradients."""
    p = tl.program_id(0)
    part = tl.program_id(1)
    if p < ranked:
        if part == 0:
            place_rows(p, labels, order, sorted_labels, batch)
    else:
        tokens = RowTokens(mask, cu, mask_stride, width, total)
        if KIND == OF_LIVES:
            rows = (p - ranked) * AT_ONCE + tl.arange(0, AT_ONCE)
            exists = rows < batch
            found = have_token(rows, exists, tokens, LOOK, PACKED, HAS_MASK, ALIGNED)
            tl.store(live + rows, found.to(tl.uint8), mask=exists)
        if KIND == OF_SUMS:
            row = p - ranked
            at = part.to(tl.int64) * batch + row
            summed, some = sum_row(
                row, part, parts, grads, grad_stride, tokens, PACKED, HAS_MASK, ALIGNED, BLOCK
            )
            tl.store(sums + at, summed)
            tl.store(live + at, some.to(tl.uint8))


@triton.jit
def write_tokens(value, line, flags, at, inside, HAS_MASK: tl.constexpr, WHOLE: tl.constexpr):
    """The value at valid tokens, 0 at others."""
    if WHOLE:
        if HAS_MASK:
            value = tl.where(tl.load(flags + at) != 0, value, 0.0)
        tl.store(line + at, value)
    else:
        tl.store(line + at, tl.where(load_valid(flags, at, inside, HAS_MASK), value, 0.0), mask=inside)


@triton.jit
def write_gap(out, begin, end, part, parts, BLOCK: tl.constexpr):
    """Zeros at tokens before the first row, or behind the last one."""
    for start in range(begin + part * BLOCK, end, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < end)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "out_stride", "parts"])
def spread_kernel(
    values, baselines, mask, cu, out, inv_scales, numerators,
    batch, mask_stride, width, total, out_stride, parts,
    ALONE: tl.constexpr, HAS_VALUES: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): of the tokens of row b the blocks k, k + parts, ..., which begin at a multiple of 16 bytes.

    ALONE: values are rewards that no group changes, and the row's other outputs are written, too.
    """
    b = tl.program_id(0)
    part = tl.program_id(1)
    value = tl.load(values + b)
    if ALONE:
        if HAS_VALUES:
            difference = value.to(tl.float64) - tl.load(baselines + b).to(tl.float64)
            value = difference.to(values.dtype.element_ty)
        if part == 0:
            row = b + tl.zeros([1], tl.int32)
            tokens = RowTokens(mask, cu, mask_stride, width, total)
            live = have_token(row, row < batch, tokens, LOOK, PACKED, HAS_MASK, ALIGNED)
            tl.store(inv_scales + row, live.to(inv_scales.dtype.element_ty))
            tl.store(numerators + row, tl.where(live, value, 0.0))
        value += 0.0  # no negative zeros
    base, size = row_bounds(cu, b, width, total, PACKED)
    if PACKED:
        if b == 0:
            write_gap(out, base * 0, base, part, parts, BLOCK)
        if b == batch - 1:
            write_gap(out, base + size, total.to(tl.int64), part, parts, BLOCK)
    length = size.to(tl.int32)
    line = out + base + b.to(tl.int64) * out_stride
    flags = mask + base + b.to(tl.int64) * mask_stride
    lane = tl.arange(0, BLOCK)
    head = 0
    if ALIGNED:
        line = tl.multiple_of(line, 16)
        flags = tl.multiple_of(flags, 16)
    else:
        head = tl.minimum(to_boundary(line), length)
        if part == 0:
            write_tokens(value, line, flags, lane, lane < head, HAS_MASK, False)
        line = tl.multiple_of(line + head, 16)
        flags += head
    end = length - head
    full = end // BLOCK * BLOCK
    for start in range(part * BLOCK, full, parts * BLOCK):
        write_tokens(value, line, flags, start + lane, lane >= 0, HAS_MASK, True)
    if (full < end) & (part == full // BLOCK % parts):
        write_tokens(value, line, flags, full + lane, full + lane < end, HAS_MASK, False)
