"""Tokens relative to a scope on the GPU: sums of parts of rows, numbers of scopes, and a map of the tokens.

Memory traffic: the tokens twice (the second time partly from the cache) and one write. Three launches in either
direction. Rows are sorted by label in the first one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.rows import batch_of
from ..reference import scopes as spec
from ..reference.scopes import FORMS, STATISTICS, BonusArgs, StandardizedArgs, WeightsArgs, scope_count
from .groups import by_label
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, dense, stride
from .scopes_numbers import scopes_kernel
from .scopes_parts import (
    BONUS,
    BONUS_BACKWARD,
    COVARIANCE,
    FIELDS,
    STANDARD,
    STANDARD_BACKWARD,
    STEER,
    WEIGHTS,
    WEIGHTS_BACKWARD,
)
from .scopes_tokens import map_kernel, parts_kernel
from .tiles import EACH, THREADS, TILE, WARPS, empty_tokens, is_aligned

# Records that a program reads at once: of the rows of a group, of the batch.
FEW = 16 if INTERPRETED else 64
MANY = 64 if INTERPRETED else 1024
FILL = 8  # programs per multiprocessor, at least, where rows are cut into parts


@dataclass(frozen=True)
class _Call:
    """The arguments of an op of this kind; what an op does not use has its default."""

    kind: int
    numbers: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    other: Tensor | None = None
    grad: Tensor | None = None
    groups: Tensor | None = None
    outcomes: Tensor | None = None
    threshold: float = 0.0
    eps: float = 0.0
    ddof: int = 0
    of_variance: bool = False
    rounded: bool = False
    shifted: bool = True
    form: str = "linear"
    rate: float = 0.0  # of powers of 2; a factor; the smallest weight
    floor: float = 0.0  # or the inverse of what caps; the largest weight


class _Tokens(NamedTuple):
    """Rows of tokens; the batch is one row where memory allows it."""

    rows: Rows
    numbers: Tensor
    other: Tensor | None
    grad: Tensor | None
    mask: Tensor | None


def _tokens(a: _Call) -> _Tokens:
    given = (a.numbers, a.other, a.grad, as_bytes(a.mask))
    if a.groups is None and a.cu_seqlens is None and all(t is None or t.is_contiguous() for t in given):
        given = tuple(None if t is None else t.view(1, -1) for t in given)
    numbers, *others = (None if t is None else dense(t) for t in given)
    assert numbers is not None
    return _Tokens(Rows.of(numbers.shape, a.cu_seqlens, numbers), numbers, *others)


def _table(values: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The statistics of the scopes, which a forward pass fills."""
    scopes = scope_count(groups, batch_of(values.shape, cu_seqlens))
    return values.new_empty((scopes, STATISTICS), dtype=torch.float64)


def _launch(a: _Call, statistics: Tensor) -> Tensor:
    """Three launches, and a sort before them for many rows in any order."""
    t, by_row = _tokens(a), a.groups is not None
    values, rows = t.numbers, t.rows
    out = empty_tokens(values, rows)
    if not values.numel() or not rows.batch:
        return out.view(a.numbers.shape)
    parts = splits(values, rows.batch, max(1, cdiv(rows.width, TILE)), FILL)
    records = values.new_empty((FIELDS.value, rows.batch * parts), dtype=torch.float64)
    found = values.new_empty((len(statistics), 2), dtype=torch.float64)
    labels = sorted_labels = order = records
    ranked = 0
    if a.groups is not None:
        labels = a.groups.contiguous()
        order, sorted_labels, ranked = by_label(labels)
    outcomes = values if a.outcomes is None else a.outcomes.contiguous()
    inputs = (values, pointer(t.other, values), pointer(t.grad, values), pointer(t.mask, values), rows.cu)
    sizes = (rows.width, rows.total, parts, stride(values), stride(t.other), stride(t.grad), stride(t.mask))
    rate, floor = pair(a.rate), pair(a.floor)
    chosen = {"KIND": a.kind, "FORM": FORMS.index(a.form), "BY_ROW": by_row}
    flags = {
        "PACKED": rows.packed, "HAS_MASK": t.mask is not None, "HAS_OTHER": t.other is not None,
        "ALIGNED": is_aligned(rows, values, t.other, t.grad, t.mask, out), "PER": EACH, "T": THREADS,
        "num_warps": WARPS,
    }  # fmt: skip
    if a.kind not in (BONUS.value, BONUS_BACKWARD.value):
        parts_kernel[(ranked + rows.batch, parts)](
            *inputs, outcomes, statistics, labels, order, sorted_labels, records, rows.batch, ranked, *sizes,
            *rate, *floor, HAS_OUTCOMES=a.outcomes is not None, **chosen, **flags, **BITS,
        )  # fmt: skip
        scopes_kernel[(rows.batch if by_row else 1,)](
            records, sorted_labels, order, outcomes, statistics, found, rows.batch, parts,
            *pair(a.threshold), *pair(a.eps), a.ddof, *rate, *floor, OF_VARIANCE=a.of_variance, ROUNDED=a.rounded,
            SHIFTED=a.shifted, ORDERED=by_row, CLASSES=1 if a.outcomes is None else 2,
            TILE=FEW if by_row else MANY, num_warps=1 if by_row else 8, **chosen, **BITS,
        )  # fmt: skip
    map_kernel[(rows.batch, parts)](
        *inputs, statistics, found, out, rows.batch, *sizes, stride(out), *rate, *floor, SHIFTED=a.shifted,
        **chosen, **flags, **BITS,
    )  # fmt: skip
    return out.view(a.numbers.shape)


def _standard(kind: int, a: StandardizedArgs, grad: Tensor | None) -> _Call:
    return _Call(
        kind, a.values, a.mask, a.cu_seqlens, a.weights, grad, a.groups, a.outcomes, a.threshold, a.eps, a.ddof,
        a.of_variance, a.rounded, a.shifted,
    )  # fmt: skip


def standardized(a: StandardizedArgs) -> tuple[Tensor, Tensor]:
    if not a.values.numel():
        return spec.standardized(a)
    statistics = _table(a.values, a.groups, a.cu_seqlens)
    return _launch(_standard(STANDARD.value, a, None), statistics), statistics


def standardized_backward(grad: Tensor, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    return _launch(_standard(STANDARD_BACKWARD.value, a, grad), statistics.contiguous())


def _weights(kind: int, a: WeightsArgs, grad: Tensor | None) -> _Call:
    return _Call(
        kind, a.values, a.mask, a.cu_seqlens, grad=grad, groups=a.groups, form=a.form,
        rate=a.rate / math.log(2), floor=a.floor,
    )  # fmt: skip


def scope_weights(a: WeightsArgs) -> tuple[Tensor, Tensor]:
    if not a.values.numel():
        return spec.scope_weights(a)
    statistics = _table(a.values, a.groups, a.cu_seqlens)
    return _launch(_weights(WEIGHTS.value, a, None), statistics), statistics


def scope_weights_backward(grad: Tensor, statistics: Tensor, a: WeightsArgs) -> Tensor:
    return _launch(_weights(WEIGHTS_BACKWARD.value, a, grad), statistics.contiguous())


def covariance_terms(
    values: Tensor, others: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    call = _Call(COVARIANCE.value, values, mask, cu_seqlens, others)
    return _launch(call, _table(values, None, cu_seqlens))


def _bonus(kind: int, a: BonusArgs, grad: Tensor | None) -> Tensor:
    call = _Call(kind, a.values, a.mask, None, a.others, grad, rate=a.alpha, floor=1 / a.kappa)
    return _launch(call, _table(a.values, None, None))


def capped_bonus(a: BonusArgs) -> Tensor:
    return _bonus(BONUS.value, a, None)


def capped_bonus_backward(grad: Tensor, a: BonusArgs) -> Tensor:
    return _bonus(BONUS_BACKWARD.value, a, grad)


def steered(values: Tensor, mask: Tensor | None, form: str, low: float, high: float) -> Tensor:
    call = _Call(STEER.value, values, mask, None, form=form, rate=low, floor=high)
    return _launch(call, _table(values, None, None))
