"""Tokens relative to a scope, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.rows import batch_of
from ..reference.scopes import FORMS, STATISTICS, BonusArgs, StandardizedArgs, WeightsArgs, scope_count
from .memory import RowShape, address, allocate, as_bytes, dense, function, rows_dense, strided, threads

# In the order of the C++ enum.
STANDARDIZE, STANDARDIZE_BACKWARD, WEIGH, WEIGH_BACKWARD, COVARY, BONUS, BONUS_BACKWARD, STEER = range(8)


def _table(values: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The statistics of the scopes, which a forward pass fills."""
    scopes = scope_count(groups, batch_of(values.shape, cu_seqlens))
    return torch.zeros((scopes, STATISTICS), dtype=torch.float64, device="cpu")


def _launch(
    op: int,
    values: Tensor,
    other: Tensor | None,
    grad: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    statistics: Tensor,
    options: tuple[Any, ...] = (),
    groups: Tensor | None = None,
    outcomes: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    rows, mask = RowShape(values.shape, cu_seqlens), as_bytes(mask)
    inputs = [None if t is None else rows_dense(t) for t in (values, other, grad)]
    groups, outcomes = dense(groups), dense(outcomes)
    out = allocate(values, values.shape, cu_seqlens)
    function("scopes", values)(
        op, rows.tuple, strided(mask), tuple(map(strided, inputs)),
        (len(statistics), address(groups), address(outcomes), threshold), options, address(statistics),
        strided(out), threads(),
    )  # fmt: skip
    return out


def _standardize(op: int, grad: Tensor | None, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    options = (a.eps, a.ddof, a.of_variance, a.rounded, a.shifted)
    return _launch(
        op,
        a.values,
        a.weights,
        grad,
        a.mask,
        a.cu_seqlens,
        statistics,
        options,
        a.groups,
        a.outcomes,
        a.threshold,
    )


def standardized(a: StandardizedArgs) -> tuple[Tensor, Tensor]:
    statistics = _table(a.values, a.groups, a.cu_seqlens)
    return _standardize(STANDARDIZE, None, statistics, a), statistics


def standardized_backward(grad: Tensor, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    return _standardize(STANDARDIZE_BACKWARD, grad, statistics.contiguous(), a)


def _weigh(op: int, grad: Tensor | None, statistics: Tensor, a: WeightsArgs) -> Tensor:
    options = (FORMS.index(a.form), a.rate, a.floor)
    return _launch(op, a.values, None, grad, a.mask, a.cu_seqlens, statistics, options, a.groups)


def scope_weights(a: WeightsArgs) -> tuple[Tensor, Tensor]:
    statistics = _table(a.values, a.groups, a.cu_seqlens)
    return _weigh(WEIGH, None, statistics, a), statistics


def scope_weights_backward(grad: Tensor, statistics: Tensor, a: WeightsArgs) -> Tensor:
    return _weigh(WEIGH_BACKWARD, grad, statistics.contiguous(), a)


def covariance_terms(
    values: Tensor, others: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    return _launch(COVARY, values, others, None, mask, cu_seqlens, _table(values, None, cu_seqlens))


def _bonus(op: int, grad: Tensor | None, a: BonusArgs) -> Tensor:
    table, options = _table(a.values, None, None), (0, a.alpha, a.kappa)
    return _launch(op, a.values, a.others, grad, a.mask, None, table, options)


def capped_bonus(a: BonusArgs) -> Tensor:
    return _bonus(BONUS, None, a)


def capped_bonus_backward(grad: Tensor, a: BonusArgs) -> Tensor:
    return _bonus(BONUS_BACKWARD, grad, a)


def steered(values: Tensor, mask: Tensor | None, form: str, low: float, high: float) -> Tensor:
    table, options = _table(values, None, None), (FORMS.index(form), low, high)
    return _launch(STEER, values, None, None, mask, None, table, options)
