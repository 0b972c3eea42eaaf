"""Reductions over rows and steps on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.rows import batch_of
from ..reference.segments import KEEPING, REDUCTIONS, SegmentsArgs
from .memory import NONE, RowShape, address, allocate, as_bytes, function, rows_dense, strided, threads

__all__ = ["row_counts", "row_sums", "segment_reduce", "segment_reduce_backward", "steps_to_tokens"]


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


def _call(
    a: SegmentsArgs,
    like: Tensor,
    values: Tensor | None,
    out: Tensor | None,
    kept: Tensor | None,
    to_tokens: tuple[Any, ...],
) -> None:
    rows, mask, steps = RowShape(a.values.shape, a.cu_seqlens), as_bytes(a.mask), a.steps
    by_flags = steps is not None and steps.dtype is torch.bool
    if steps is not None:
        steps = as_bytes(steps) if by_flags else rows_dense(steps)
    function("segment_reduce", like)(
        rows.tuple, strided(mask), (strided(steps), NONE) if by_flags else (NONE, strided(steps)), strided(values),
        a.num_steps, REDUCTIONS.index(a.op), address(out), address(kept), to_tokens, threads(),
    )  # fmt: skip


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    values = rows_dense(a.values)
    out = values.new_empty((batch_of(values.shape, a.cu_seqlens), a.num_steps))
    kept = torch.empty_like(out if a.op in KEEPING else out[:, :0], dtype=torch.float64)
    _call(a, values, values, out, kept if a.op in KEEPING else None, ())
    return out, kept


def segment_reduce_backward(grad: Tensor, out: Tensor, kept: Tensor, a: SegmentsArgs) -> Tensor:
    values = rows_dense(a.values) if a.op == "prod" else None
    grad, out, kept = grad.contiguous(), out.contiguous(), kept.contiguous()
    on_tokens = allocate(grad, a.values.shape, a.cu_seqlens)
    if on_tokens.numel():
        _call(a, grad, values, out, kept, (address(grad), strided(on_tokens), NONE))
    return on_tokens


def steps_to_tokens(
    step_values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, at_ends: bool
) -> tuple[Tensor, Tensor]:
    up = step_values.contiguous()
    on_tokens = allocate(up, steps.shape, cu_seqlens)
    ends = allocate(up, steps.shape if at_ends else (0,), cu_seqlens, torch.uint8)
    if on_tokens.numel():
        a = SegmentsArgs(on_tokens, steps, mask, cu_seqlens, up.shape[1], "sum")
        _call(a, up, None, None, None, (address(up), strided(on_tokens), strided(ends) if at_ends else NONE))
    return on_tokens, ends.view(torch.bool)
