"""Reductions over rows and steps on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import NONE, Shape, address, as_bytes, function, rows_dense, strided, threads


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = Shape(mask.shape, cu_seqlens)
    out = torch.empty(rows.batch, dtype=torch.float64)
    function("row_sums", out)(rows.tuple, strided(as_bytes(mask)), NONE, address(out), threads())
    return out


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    rows = Shape(values.shape, cu_seqlens)
    values, mask = rows_dense(values), as_bytes(mask)
    out = values.new_empty(rows.batch)
    function("row_sums", values)(rows.tuple, strided(mask), strided(values), address(out), threads())
    return out
