"""Reductions over rows and steps on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.segments import REDUCTIONS, SegmentsArgs, segment_broadcast
from .memory import NONE, RowShape, address, allocate, as_bytes, function, rows_dense, strided, threads

__all__ = ["row_counts", "row_sums", "segment_broadcast", "segment_reduce", "segment_reduce_backward"]


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = RowShape(mask.shape, cu_seqlens)
    out = torch.empty(rows.batch, dtype=torch.float64, device="cpu")
    function("row_sums", out)(rows.tuple, strided(as_bytes(mask)), NONE, address(out), threads())
    return out


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    rows = RowShape(values.shape, cu_seqlens)
    values, mask = rows_dense(values), as_bytes(mask)
    out = values.new_empty(rows.batch)
    function("row_sums", values)(rows.tuple, strided(mask), strided(values), address(out), threads())
    return out


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    rows = RowShape(a.values.shape, a.cu_seqlens)
    values, ids, mask = rows_dense(a.values), rows_dense(a.ids), as_bytes(a.mask)
    out = values.new_empty((rows.batch, a.num_steps))
    saved = torch.empty_like(out, dtype=torch.float64)
    function("segment_reduce", values)(
        rows.tuple, strided(mask), strided(ids), strided(values), a.num_steps, REDUCTIONS.index(a.op), address(out),
        address(saved), 0, NONE, threads(),
    )  # fmt: skip
    return out, saved


def segment_reduce_backward(grad: Tensor, out: Tensor, saved: Tensor, a: SegmentsArgs) -> Tensor:
    rows = RowShape(a.values.shape, a.cu_seqlens)
    values, ids, mask = rows_dense(a.values), rows_dense(a.ids), as_bytes(a.mask)
    grad, out, saved = grad.contiguous(), out.contiguous(), saved.contiguous()
    grad_values = allocate(values, values.shape, a.cu_seqlens)
    if grad_values.numel():
        function("segment_reduce", values)(
            rows.tuple, strided(mask), strided(ids), strided(values), grad.shape[1], REDUCTIONS.index(a.op),
            address(out), address(saved), address(grad), strided(grad_values), threads(),
        )  # fmt: skip
    return grad_values
