"""Reductions over rows and steps on the GPU: a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, pointer
from .rows import Rows, as_bytes, dense, load_valid, row_bounds, stride

BLOCK = 256 if INTERPRETED else 1024


@triton.jit(do_not_specialize=["values_stride", "mask_stride", "width", "total"])
def row_sums_kernel(
    values, mask, cu, sums, values_stride, mask_stride, width, total,
    COUNT: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the valid tokens of row b, summed or counted. Each lane holds its own sum, in float64."""
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
            COUNT=count, PACKED=rows.packed, HAS_MASK=mask is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return sums


def _rows(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    return shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    sums = values.new_empty(_rows(values.shape, cu_seqlens))
    return _run(dense(values), as_bytes(mask), cu_seqlens, sums, False)


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    counts = mask.new_empty(_rows(mask.shape, cu_seqlens), dtype=torch.float64)
    dense_mask = as_bytes(mask)
    assert dense_mask is not None
    return _run(dense_mask, dense_mask, cu_seqlens, counts, True)
