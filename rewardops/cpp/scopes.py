"""Tokens relative to a scope, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import batch_of
from ..reference.scopes import STATISTICS, StandardizedArgs, scope_count
from .memory import RowShape, address, allocate, as_bytes, dense, function, rows_dense, strided, threads

# In the order of the C++ enum.
STANDARDIZE, STANDARDIZE_BACKWARD = range(2)


def _launch(op: int, grad: Tensor | None, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    rows = RowShape(a.values.shape, a.cu_seqlens)
    values, mask = rows_dense(a.values), as_bytes(a.mask)
    weights, grad = (None if t is None else rows_dense(t) for t in (a.weights, grad))
    groups, outcomes = dense(a.groups), dense(a.outcomes)
    out = allocate(values, values.shape, a.cu_seqlens)
    function("scopes", values)(
        op, rows.tuple, strided(mask), (*map(strided, (values, weights, grad)),),
        (statistics.shape[0], address(groups), address(outcomes), a.threshold),
        (a.eps, a.ddof, a.of_variance, a.rounded, a.shifted), address(statistics), strided(out), threads(),
    )  # fmt: skip
    return out


def standardized(a: StandardizedArgs) -> tuple[Tensor, Tensor]:
    scopes = scope_count(a.groups, batch_of(a.values.shape, a.cu_seqlens))
    statistics = a.values.new_zeros((scopes, STATISTICS), dtype=torch.float64)
    return _launch(STANDARDIZE, None, statistics, a), statistics


def standardized_backward(grad: Tensor, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    return _launch(STANDARDIZE_BACKWARD, grad, statistics.contiguous(), a)
