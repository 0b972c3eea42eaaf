"""Reductions over rows and steps, the specification (see :mod:`rewardops.segments`)."""

from __future__ import annotations

from torch import Tensor

from .layout import to_rows


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(mask, mask, cu_seqlens)[0].sum(1).double()


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(values, mask, cu_seqlens)[0].double().sum(1).to(values.dtype)
