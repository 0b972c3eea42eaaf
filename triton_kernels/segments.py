"""Reductions over rows and steps on the GPU: a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import batch_of
from ..reference.segments import REDUCTIONS, SegmentsArgs, segment_broadcast
from .launch import BITS, INTERPRETED, Constant, cdiv, pointer
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

__all__ = ["row_counts", "row_sums", "segment_broadcast", "segment_reduce", "segment_reduce_backward"]

BLOCK = 256 if INTERPRETED else 1024


@triton.jit(do_not_specialize=["values_stride", "mask_stride", "width", "total"])
def row_sums_kernel(
    values, mask, cu, sums, values_stride, mask_stride, width, total,
    COUNT: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: sum or count of the valid tokens of row b. Lanes have separate sums, in float64."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    lanes = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, at < length, HAS_MASK)
        if COUNT:
            lanes += valid.to(tl.float64)
        else:
            x = tl.load(values + base + b.to(tl.int64) * values_stride + at, mask=valid, other=0.0)
            lanes += x.to(tl.float64)
    tl.store(sums + b, tl.sum(lanes, 0).to(sums.dtype.element_ty))


def _run(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, sums: Tensor, count: bool) -> Tensor:
    rows = Rows.of(values.shape, cu_seqlens, values)
    if rows.batch:
        row_sums_kernel[(rows.batch,)](
            values, pointer(mask, values), rows.cu, sums, stride(values), stride(mask), rows.width, rows.total,
            COUNT=count, PACKED=rows.packed, HAS_MASK=mask is not None, BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return sums


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    sums = values.new_empty(batch_of(values.shape, cu_seqlens))
    return _run(dense(values), as_bytes(mask), cu_seqlens, sums, False)


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    counts = mask.new_empty(batch_of(mask.shape, cu_seqlens), dtype=torch.float64)
    dense_mask = as_bytes(mask)
    assert dense_mask is not None
    return _run(dense_mask, dense_mask, cu_seqlens, counts, True)


# ---- steps -------------------------------------------------------------------------------------------------

SEGMENTS = 16  # segments per program
# Indices of the reductions in the table of the specification.
SUM, MEAN, MIN, MAX, PROD, FIRST, LAST, ANY = (
    Constant(REDUCTIONS.index(op)) for op in ("sum", "mean", "min", "max", "prod", "first", "last", "any")
)


@triton.jit
def multiplied(a, b):
    return a * b


@triton.jit(do_not_specialize=["width", "total", "segments", "values_stride", "ids_stride", "mask_stride"])
def segment_reduce_kernel(
    values, ids, mask, cu, out, states, width, total, segments, values_stride, ids_stride, mask_stride,
    OP: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the segments [k * SEGMENTS, (k + 1) * SEGMENTS) of row b, in float64.

    The state of a segment is saved for the backward pass. For a mean it is the count. For a product it is that of
    the nonzero values, or 0 if several are 0. For min, max, first and last it is the selected token's position.
    """
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    segment = tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)
    count = tl.zeros([SEGMENTS], tl.float64)
    value = tl.zeros([SEGMENTS], tl.float64)
    if OP == PROD:
        value += 1.0
    zeros = tl.zeros([SEGMENTS], tl.float64)
    state = tl.full([SEGMENTS], -1.0, tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
        token_segment = tl.load(ids + base + row * ids_stride + at, mask=valid, other=-1)
        x = tl.load(values + base + row * values_stride + at, mask=valid, other=0.0).to(tl.float64)
        inside = token_segment[None, :] == segment[:, None]
        x = tl.broadcast_to(x[None, :], [SEGMENTS, BLOCK])
        in_block = tl.sum(inside.to(tl.float64), 1)
        where = tl.broadcast_to(at[None, :].to(tl.float64), [SEGMENTS, BLOCK])
        if OP == SUM or OP == MEAN:
            value += tl.sum(tl.where(inside, x, 0.0), 1)
        if OP == ANY:
            value = tl.maximum(value, tl.max((inside & (x != 0.0)).to(tl.float64), 1))
        if OP == PROD:
            value *= tl.reduce(tl.where(inside & (x != 0.0), x, 1.0), 1, multiplied)
            zeros += tl.sum((inside & (x == 0.0)).to(tl.float64), 1)
        if OP == LAST:
            state = tl.maximum(state, tl.max(tl.where(inside, where, -1.0), 1))
        if OP == FIRST:
            first = tl.min(tl.where(inside, where, float("inf")), 1)
            state = tl.where((state < 0) & (in_block > 0), first, state)
        if OP == MIN or OP == MAX:
            # The extreme of the block and its first position; a NaN is more extreme than any number.
            if OP == MAX:
                x = -x
            nan = inside & (x != x)
            any_nan = tl.max(nan.to(tl.int32), 1)
            least = tl.min(tl.where(inside & (nan == 0), x, float("inf")), 1)
            first = tl.min(tl.where(inside & (x == least[:, None]), where, float("inf")), 1)
            first = tl.where(any_nan != 0, tl.min(tl.where(nan, where, float("inf")), 1), first)
            least = tl.where(any_nan != 0, float("nan"), least)
            better = (count == 0) | ((value == value) & ((least < value) | (least != least)))
            take = (in_block > 0) & better
            value = tl.where(take, least, value)
            state = tl.where(take, first, state)
        count += in_block
    some = count > 0
    if OP == MAX:
        value = -value
    if OP == MEAN:
        value = value / tl.where(some, count, 1.0)
        state = tl.where(some, count, state)
    if OP == PROD:
        state = tl.where(some, tl.where(zeros > 1, 0.0, value), state)
        value = tl.where(zeros > 0, 0.0, value)
    if OP == FIRST or OP == LAST:
        selected = base + row * values_stride + tl.where(some, state, 0.0).to(tl.int64)
        value = tl.load(values + selected, mask=some, other=0.0).to(tl.float64)
    exists = segment < segments
    tl.store(out + row * segments + segment, tl.where(some, value, 0.0).to(out.dtype.element_ty), mask=exists)
    tl.store(states + row * segments + segment, state, mask=exists)


@triton.jit(
    do_not_specialize=[
        "width",
        "total",
        "segments",
        "values_stride",
        "ids_stride",
        "mask_stride",
        "grads_stride",
    ]
)
def segment_reduce_backward_kernel(
    up, values, ids, reduced, states, mask, cu, grads, width, total, segments, values_stride, ids_stride,
    mask_stride, grads_stride,
    OP: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the gradients of the tokens of row b, from the gradients ``up`` of its segments."""
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
        segment = tl.load(ids + base + row * ids_stride + at, mask=valid, other=-1)
        inside = (segment >= 0) & (segment < segments)
        entry = row * segments + segment
        segment_grad = tl.load(up + entry, mask=inside, other=0.0).to(tl.float64)
        state = tl.load(states + entry, mask=inside, other=1.0)
        grad = segment_grad
        if OP == MEAN:
            grad = segment_grad / state
        if OP == PROD:
            x = tl.load(values + base + row * values_stride + at, mask=inside, other=1.0).to(tl.float64)
            product = tl.load(reduced + entry, mask=inside, other=0.0)
            others = tl.where(product == 0.0, 0.0, state / tl.where(x == 0.0, 1.0, x))
            grad = segment_grad * tl.where(x == 0.0, state, others)
        if OP == ANY:
            grad = segment_grad * 0.0
        if OP == MIN or OP == MAX or OP == FIRST or OP == LAST:
            grad = tl.where(at.to(tl.float64) == state, segment_grad, 0.0)
        grad = tl.where(inside, grad, 0.0).to(grads.dtype.element_ty)
        tl.store(grads + base + row * grads_stride + at, grad, mask=at < length)


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, ids, mask = dense(a.values), dense(a.ids), as_bytes(a.mask)
    out = values.new_empty((rows.batch, a.num_steps))
    states = torch.empty_like(out, dtype=torch.float64)
    if out.numel():
        segment_reduce_kernel[(rows.batch, cdiv(a.num_steps, SEGMENTS))](
            values, ids, pointer(mask, values), rows.cu, out, states, rows.width, rows.total, a.num_steps,
            stride(values), stride(ids), stride(mask), OP=REDUCTIONS.index(a.op), PACKED=rows.packed,
            HAS_MASK=mask is not None, SEGMENTS=SEGMENTS, BLOCK=32, **BITS,
        )  # fmt: skip
    return out, states


def segment_reduce_backward(grad: Tensor, out: Tensor, kept: Tensor, a: SegmentsArgs) -> Tensor:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, ids, mask = dense(a.values), dense(a.ids), as_bytes(a.mask)
    grads = output(values, values.shape, rows.packed)
    if grads.numel() and rows.batch:
        segment_reduce_backward_kernel[(rows.batch,)](
            grad.contiguous(), values, ids, out.contiguous(), kept.contiguous(), pointer(mask, values), rows.cu,
            grads, rows.width, rows.total, grad.shape[1], stride(values), stride(ids), stride(mask), stride(grads),
            OP=REDUCTIONS.index(a.op), PACKED=rows.packed, HAS_MASK=mask is not None, BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return grads
