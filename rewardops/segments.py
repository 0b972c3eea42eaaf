"""Segments: reductions of tokens over their rows and steps, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import define
from .layout import Layout


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, mask, cu_seqlens = inputs
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.shape = values.shape


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    mask, cu_seqlens = ctx.saved_tensors
    up = Layout(grad.shape[0], tuple(ctx.shape), mask, cu_seqlens).expand(grad)
    return up if mask is None else torch.where(mask, up, 0), None, None


_row_sums = define(
    "segments",
    "row_sums(Tensor values, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda values, mask, cu_seqlens: values.new_empty(
        values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    ),
    setup_context=_setup,
    backward=_gradient,
)


_row_counts = define(
    "segments",
    "row_counts(Tensor mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda mask, cu_seqlens: mask.new_empty(
        mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, dtype=torch.float64
    ),
)


def row_counts(rows: Layout, device: torch.device) -> Tensor:
    """``[B]``, how many tokens of each row are valid; float64."""
    if rows.mask is not None:
        out: Tensor = _row_counts(rows.mask, rows.cu_seqlens)
        return out
    if rows.cu_seqlens is not None:
        return (rows.cu_seqlens[1:] - rows.cu_seqlens[:-1]).double()
    return torch.full((rows.batch,), rows.shape[1], dtype=torch.float64, device=device)


def row_sums(values: Tensor, rows: Layout) -> Tensor:
    """``[B]``, the sum of each row's valid tokens, in the dtype of ``values`` (float32 or float64)."""
    out: Tensor = _row_sums(values, rows.mask, rows.cu_seqlens)
    return out
