"""Tokens of group advantages: rows that have one, sums of their gradients, and a row's value written to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import Pair, add_pairs, sum_pairs
from .groups import LOOK, RowTokens, by_label, have_token, place_rows
from .launch import BITS, INTERPRETED, Constant, cdiv, pointer, splits
from .rows import Rows, load_valid, row_bounds, stride, to_boundary

BLOCK = 64 if INTERPRETED else 1024
ROWS_AT_ONCE = 4  # rows whose first valid tokens one program seeks
AT_ONCE = Constant(ROWS_AT_ONCE)
# What is found of tokens.
NOTHING, LIVES, SUMS = range(3)
OF_LIVES, OF_SUMS = Constant(LIVES), Constant(SUMS)


class Line(NamedTuple):
    """A row's numbers and flags of its valid tokens, from a multiple of 16 bytes on."""

    numbers: Any  # pointer
    flags: Any  # pointer
    head: Any  # tokens before
    whole: Any  # tokens that are whole vectors of 16 bytes
    end: Any


@triton.jit
def line_of(numbers, flags, length, ALIGNED: tl.constexpr):
    """The row at these pointers; ALIGNED: it begins at a multiple of 16 bytes, and ends at one."""
    VECTOR: tl.constexpr = 128 // numbers.dtype.element_ty.primitive_bitwidth
    if ALIGNED:
        return Line(numbers, flags, 0, length // VECTOR * VECTOR, length)
    else:
        head = tl.minimum(to_boundary(numbers), length)
        end = length - head
        return Line(tl.multiple_of(numbers + head, 16), flags + head, head, end // VECTOR * VECTOR, end)


@triton.jit
def edges(line, lane):
    """The tokens before and behind the whole vectors, fewer than four each, in the first lanes."""
    at = tl.where(lane < 4, lane - line.head, line.whole + lane - 4)
    return at, (lane < 8) & (at < line.end) & ((lane < line.head) | (lane >= 4))


@triton.jit
def add_tokens(lanes, some, line, at, inside, HAS_MASK: tl.constexpr):
    """Add a block of gradients to the lanes, and note which lanes had a valid token."""
    x = tl.load(line.numbers + at, mask=inside, other=0.0)
    valid = load_valid(line.flags, at, inside, HAS_MASK)
    total, rest = add_pairs(lanes.sum, lanes.rest, tl.where(valid, x, 0.0), 0.0)
    return Pair(total, rest), some | valid.to(tl.int32)


@triton.jit
def sum_row(
    row, part, parts, grads, grad_stride, tokens,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the valid tokens of a part of a row, summed, float64; and whether there are any.

    Lanes have sums in two parts, in the dtype of the gradients.
    """
    KIND: tl.constexpr = grads.dtype.element_ty
    base, size = row_bounds(tokens.cu, row, tokens.width, tokens.total, PACKED)
    flags = tokens.mask + base + row.to(tl.int64) * tokens.mask_stride
    numbers = grads + base + row.to(tl.int64) * grad_stride
    if ALIGNED:
        numbers = tl.multiple_of(numbers, 16)
        flags = tl.multiple_of(flags, 4)
    line = line_of(numbers, flags, size.to(tl.int32), ALIGNED)
    lane = tl.arange(0, BLOCK)
    lanes = Pair(tl.zeros([BLOCK], KIND), tl.zeros([BLOCK], KIND))
    some = tl.zeros([BLOCK], tl.int32)
    if not ALIGNED:  # noqa: SIM102 (known when compiled; the part is not)
        if part == 0:
            at, inside = edges(line, lane)
            lanes, some = add_tokens(lanes, some, line, at, inside, HAS_MASK)
    for start in range(part * BLOCK, line.whole, parts * BLOCK):
        at = start + lane
        lanes, some = add_tokens(lanes, some, line, at, at < line.whole, HAS_MASK)
    total = sum_pairs(lanes)
    if not tl.abs(total) < float("inf"):
        # What is infinite or NaN, or beyond the range of float32 on the way, is summed plainly.
        wide = tl.zeros([BLOCK], tl.float64)
        for start in range(part * BLOCK - line.head, line.end, parts * BLOCK):
            at = start + lane
            valid = load_valid(line.flags, at, at < line.end, HAS_MASK)
            wide += tl.load(line.numbers + at, mask=valid, other=0.0).to(tl.float64)
        total = tl.sum(wide, 0)
    return total, tl.max(some, 0)


@triton.jit(do_not_specialize=["batch", "ranked", "mask_stride", "grad_stride", "width", "total", "parts"])
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
            found = have_token(rows, exists, tokens, LOOK, PACKED, HAS_MASK)
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
def write_tokens(value, line, at, inside, HAS_MASK: tl.constexpr):
    """The value at valid tokens, 0 at others."""
    valid = load_valid(line.flags, at, inside, HAS_MASK)
    tl.store(line.numbers + at, tl.where(valid, value, 0.0), mask=inside)


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
    if ALONE and HAS_VALUES:
        difference = value.to(tl.float64) - tl.load(baselines + b).to(tl.float64)
        value = difference.to(values.dtype.element_ty)
    value += 0.0  # no negative zeros
    base, size = row_bounds(cu, b, width, total, PACKED)
    if PACKED:
        if b == 0:
            write_gap(out, base * 0, base, part, parts, BLOCK)
        if b == batch - 1:
            write_gap(out, base + size, total.to(tl.int64), part, parts, BLOCK)
    flags = mask + base + b.to(tl.int64) * mask_stride
    numbers = out + base + b.to(tl.int64) * out_stride
    if ALIGNED:
        numbers = tl.multiple_of(numbers, 16)
        flags = tl.multiple_of(flags, 4)
    line = line_of(numbers, flags, size.to(tl.int32), ALIGNED)
    lane = tl.arange(0, BLOCK)
    if not ALIGNED:  # noqa: SIM102 (known when compiled; the part is not)
        if part == 0:
            at, inside = edges(line, tl.arange(0, 8))
            write_tokens(value, line, at, inside, HAS_MASK)
    for start in range(part * BLOCK, line.whole, parts * BLOCK):
        at = start + lane
        write_tokens(value, line, at, at < line.whole, HAS_MASK)
    if ALONE:  # noqa: SIM102 (known when compiled; the part is not)
        if part == 0:
            row = b + tl.zeros([1], tl.int32)
            tokens = RowTokens(mask, cu, mask_stride, width, total)
            live = have_token(row, row < batch, tokens, LOOK, PACKED, HAS_MASK)
            tl.store(inv_scales + row, live.to(inv_scales.dtype.element_ty))
            tl.store(numerators + row, tl.where(live, value, 0.0))


# ---- launch ------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What the programs of groups read: sorted rows, rows with a token, sums of the gradients of tokens."""

    labels: Tensor
    order: Tensor | None  # None: rows are sorted
    live: Tensor | None  # None: all rows are members
    sums: Tensor | None
    parts: int


def whole_lines(rows: Rows, numbers: Tensor | None, mask: Tensor | None) -> bool:
    """Whether rows of numbers begin and end at multiples of 16 bytes, and rows of the mask at multiples of 4."""
    if rows.packed or numbers is None:
        return False
    size = numbers.element_size()
    places = numbers.data_ptr() | stride(numbers) * size | rows.width * size
    return places % 16 == 0 and (mask is None or (mask.data_ptr() | stride(mask)) % 4 == 0)


def prepare_rows(
    groups: Tensor,
    rewards: Tensor,
    rows: Rows,
    grad: Tensor | None,
    mask: Tensor | None,
    *,
    sort: bool,
    kind: int,
) -> Prepared:
    """Sort the rows, and find of their tokens what ``kind`` says: one launch, after a sort of many rows."""
    labels, order, ranked, batch = groups.contiguous(), None, 0, rows.batch
    sorted_labels = labels
    if sort:
        order, sorted_labels, ranked = by_label(labels)
    parts, programs, live, sums = 1, 0, None, None
    if kind == SUMS:
        programs = batch
        parts = splits(rewards, batch, max(1, cdiv(rows.width, BLOCK)))
        live, sums = (rewards.new_empty((parts, batch), dtype=d) for d in (torch.uint8, torch.float64))
    elif kind == LIVES:
        programs = cdiv(batch, ROWS_AT_ONCE)
        live = rewards.new_empty((1, batch), dtype=torch.uint8)
    if ranked or programs:
        prepare_kernel[(ranked + programs, parts)](
            labels, pointer(order, labels), sorted_labels, pointer(grad, rewards), pointer(mask, labels), rows.cu,
            pointer(live, labels), pointer(sums, rewards), batch, ranked, stride(mask), stride(grad), rows.width,
            rows.total, parts,
            KIND=kind, PACKED=rows.packed, HAS_MASK=mask is not None,
            ALIGNED=whole_lines(rows, grad, mask), BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return Prepared(sorted_labels, order, live, sums, parts)
