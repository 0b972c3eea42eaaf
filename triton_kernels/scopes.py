"""Tokens relative to a scope on the GPU: sums of parts of rows, numbers of scopes, and a map of the tokens.

Memory traffic: the tokens twice (the second time partly from the cache) and one write. Three launches in either
direction. Rows are sorted by label in the first one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.scopes import STATISTICS, StandardizedArgs, scope_count
from .advantages import SORTED
from .groups import ROWS, begins_group, end_of_group
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits, unpair
from .rows import Rows, as_bytes, dense, stride
from .scopes_parts import (
    COLUMNS,
    COUNT,
    FIELDS,
    MEAN,
    ORIGIN,
    SQUARES,
    STANDARD,
    STANDARD_BACKWARD,
    map_kernel,
    parts_kernel,
)
from .tiles import EACH, THREADS, TILE, WARPS, empty_tokens, is_aligned

# Records that a program reads at once: of the rows of a group, of the batch.
FEW = 16 if INTERPRETED else 64
MANY = 64 if INTERPRETED else 1024
FILL = 8  # programs per multiprocessor, at least, where rows are cut into parts


class Scope(NamedTuple):
    """The rows at the places [begin, end); pointers and sizes."""

    order: Any  # the row at each place; not read where the places are the rows
    outcomes: Any
    threshold: Any
    begin: Any
    end: Any
    parts: Any


class Settings(NamedTuple):
    eps: Any
    ddof: Any


@triton.jit
def load_rows(scope, place, RIGHT: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr):
    """The rows at these places, and which of them are of the class."""
    inside = place < scope.end
    rows = place
    if ORDERED:
        rows = tl.load(scope.order + place, mask=inside, other=0).to(tl.int32)
    if CLASSES == 2:
        outcome = tl.load(scope.outcomes + rows, mask=inside, other=0.0)
        inside = inside & ((outcome > scope.threshold) == (RIGHT == 1))
    return rows, inside


@triton.jit
def load_records(
    scope, start, RIGHT: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr
):
    """The records from the one of number ``start`` on, and which of them are of the class."""
    number = start + tl.arange(0, TILE)
    place = number // scope.parts
    rows, inside = load_rows(scope, scope.begin + place, RIGHT, ORDERED, CLASSES)
    return rows.to(tl.int64) * scope.parts + (number - place * scope.parts), inside


@triton.jit
def scope_moments(
    records,
    plane,
    scope,
    RIGHT: tl.constexpr,
    ORDERED: tl.constexpr,
    CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count, mean in two parts and squares about it, of the parts of a scope: relative to the first of them."""
    count = (scope.end - scope.begin) * scope.parts
    first = tl.full([], -1, tl.int64)
    start = count * 0
    while (start < count) & (first < 0):
        at, inside = load_records(scope, start, RIGHT, ORDERED, CLASSES, TILE)
        some = tl.load(records + COUNT * plane + at, mask=inside, other=0.0) > 0.0
        # By number, so that the first row of a group is the first.
        number = tl.min(tl.where(some, tl.arange(0, TILE), TILE), 0)
        if number < TILE:
            first = tl.sum(tl.where(tl.arange(0, TILE) == number, at, 0), 0)
        start += TILE
    known = first >= 0
    origin = tl.load(records + ORIGIN * plane + first, mask=known, other=0.0)
    base = tl.load(records + MEAN * plane + first, mask=known, other=0.0)
    size = tl.zeros([TILE], tl.float64)
    moved = tl.zeros([TILE], tl.float64)
    apart = tl.zeros([TILE], tl.float64)
    within = tl.zeros([TILE], tl.float64)
    for begin in range(0, count, TILE):
        at, inside = load_records(scope, begin, RIGHT, ORDERED, CLASSES, TILE)
        n = tl.load(records + COUNT * plane + at, mask=inside, other=0.0)
        away = tl.load(records + ORIGIN * plane + at, mask=inside, other=0.0) - origin
        away += tl.load(records + MEAN * plane + at, mask=inside, other=0.0) - base
        away = tl.where(n > 0.0, away, 0.0)
        size += n
        moved += n * away
        apart += n * away * away
        within += tl.load(records + SQUARES * plane + at, mask=inside, other=0.0)
    size = tl.sum(size, 0)
    shift = tl.sum(moved, 0)
    mean = shift / tl.where(size > 0.0, size, 1.0)
    between = tl.sum(apart, 0) - shift * mean
    return size, origin, base + mean, tl.sum(within, 0) + tl.where(between < 0.0, 0.0, between)


@triton.jit
def write_statistics(
    records, plane, statistics, scope, s, RIGHT: tl.constexpr, OF_VARIANCE: tl.constexpr, ROUNDED: tl.constexpr,
    DTYPE: tl.constexpr, BY_ROW: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    size, origin, above, squares = scope_moments(records, plane, scope, RIGHT, ORDERED, CLASSES, TILE)
    count = tl.where(size > 0.0, size, 1.0)
    divisor = tl.where(size > s.ddof, size - s.ddof, count)
    var = squares / divisor
    mean = origin + above
    flat = var + s.eps <= 0.0
    if OF_VARIANCE:
        scale = 1.0 / tl.sqrt(tl.where(flat, 1.0, var + s.eps))
        slope = -scale / divisor
    else:
        flat = var <= 0.0
        std = tl.sqrt(tl.where(flat, 1.0, var))
        scale = 1.0 / (std + s.eps)
        slope = -1.0 / (std * divisor)
    if ROUNDED:
        EPS: tl.constexpr = 2.0**-23 if scope.threshold.dtype == tl.float32 else 2.0**-52
        noise = EPS * mean
        flat = flat | (var <= noise * noise)
    scale = tl.where(flat, 0.0, scale)
    slope = tl.where(flat, 0.0, slope)
    centre = mean.to(DTYPE).to(tl.float64)
    rest = (origin - centre) + above
    for start in range(scope.begin, scope.end if BY_ROW else 1, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < 1
        if BY_ROW:
            rows, inside = load_rows(scope, rows, RIGHT, ORDERED, CLASSES)
        to = statistics + rows.to(tl.int64) * COLUMNS
        tl.store(to, centre, mask=inside)
        tl.store(to + 1, rest, mask=inside)
        tl.store(to + 2, scale, mask=inside)
        tl.store(to + 3, slope, mask=inside)
        tl.store(to + 4, 1.0 / count, mask=inside)


@triton.jit
def write_found(
    records, plane, statistics, found, scope, RIGHT: tl.constexpr, SHIFTED: tl.constexpr, BY_ROW: tl.constexpr,
    ORDERED: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient through the mean, and through the scale per z-score, of each row of a scope."""
    grads = tl.zeros([TILE], tl.float64)
    products = tl.zeros([TILE], tl.float64)
    for begin in range(0, (scope.end - scope.begin) * scope.parts, TILE):
        at, inside = load_records(scope, begin, RIGHT, ORDERED, CLASSES, TILE)
        grads += tl.load(records + at, mask=inside, other=0.0)
        products += tl.load(records + plane + at, mask=inside, other=0.0)
    through_mean = tl.sum(grads, 0)
    through_scale = tl.sum(products, 0)
    for start in range(scope.begin, scope.end if BY_ROW else 1, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < 1
        if BY_ROW:
            rows, inside = load_rows(scope, rows, RIGHT, ORDERED, CLASSES)
        s = statistics + rows.to(tl.int64) * COLUMNS
        scale = tl.load(s + 2, mask=inside, other=0.0)
        back = -scale
        if not SHIFTED:
            back = 1.0 - scale
        to = found + rows.to(tl.int64) * 2
        tl.store(to, back * tl.load(s + 4, mask=inside, other=0.0) * through_mean, mask=inside)
        tl.store(to + 1, tl.load(s + 3, mask=inside, other=0.0) * through_scale, mask=inside)


@triton.jit(do_not_specialize=["batch", "parts", "ddof"])
def scopes_kernel(
    records, labels, order, outcomes, statistics, found, batch, parts,
    threshold_high, threshold_low, eps_high, eps_low, ddof,
    KIND: tl.constexpr, OF_VARIANCE: tl.constexpr, ROUNDED: tl.constexpr, SHIFTED: tl.constexpr,
    BY_ROW: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: the group that begins at place p, if one does; or the batch."""
    begin = tl.program_id(0)
    DTYPE: tl.constexpr = outcomes.dtype.element_ty
    end = batch
    here = begin == 0
    if BY_ROW:
        label = tl.load(labels + begin)
        here = begins_group(labels, begin, label)
        if here:
            end = end_of_group(labels, begin, label, batch, TILE, TILE)
    if here:
        scope = Scope(order, outcomes, unpair(threshold_high, threshold_low, DTYPE), begin, end, parts)
        plane = batch.to(tl.int64) * parts
        for right in tl.static_range(CLASSES):
            if KIND == STANDARD:
                settings = Settings(unpair(eps_high, eps_low, tl.float64), ddof.to(tl.float64))
                write_statistics(
                    records, plane, statistics, scope, settings, right, OF_VARIANCE, ROUNDED, DTYPE, BY_ROW,
                    ORDERED, CLASSES, TILE,
                )  # fmt: skip
            else:
                write_found(
                    records, plane, statistics, found, scope, right, SHIFTED, BY_ROW, ORDERED, CLASSES, TILE
                )


# ---- launch ------------------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
    """Rows of tokens; the batch is one row where memory allows it."""

    rows: Rows
    numbers: Tensor
    other: Tensor | None
    grad: Tensor | None
    mask: Tensor | None


def _tokens(a: StandardizedArgs, grad: Tensor | None) -> _Tokens:
    given = (a.values, a.weights, grad, as_bytes(a.mask))
    cu = a.cu_seqlens
    if a.groups is None and cu is None and all(t is None or t.is_contiguous() for t in given):
        given = tuple(None if t is None else t.view(1, -1) for t in given)
    values, weights, grad, mask = (None if t is None else dense(t) for t in given)
    return _Tokens(Rows.of(values.shape, cu, values), values, weights, grad, mask)


def _launch(grad: Tensor | None, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    """Three launches, and a sort before them for many rows in any order."""
    t, by_row = _tokens(a, grad), a.groups is not None
    values, rows = t.numbers, t.rows
    out = empty_tokens(values, rows)
    if not values.numel() or not rows.batch:
        return out.view(a.values.shape)
    kind = STANDARD.value if grad is None else STANDARD_BACKWARD.value
    parts = splits(values, rows.batch, max(1, cdiv(rows.width, TILE)), FILL)
    records = values.new_empty((FIELDS.value, rows.batch * parts), dtype=torch.float64)
    found = values.new_empty((statistics.shape[0], 2), dtype=torch.float64)
    labels, order, ranked = records, records, 0
    sorted_labels = labels
    if a.groups is not None:
        labels = a.groups.contiguous()
        if rows.batch > SORTED:
            sorted_labels, order = labels.sort(stable=True)
        else:
            sorted_labels, order = torch.empty_like(labels), torch.empty_like(labels)
            ranked = cdiv(rows.batch, ROWS.value)
    outcomes = values if a.outcomes is None else a.outcomes.contiguous()
    inputs = (values, pointer(t.other, values), pointer(t.grad, values), pointer(t.mask, values), rows.cu)
    sizes = (rows.width, rows.total, parts, stride(values), stride(t.other), stride(t.grad), stride(t.mask))
    flags = {
        "KIND": kind, "BY_ROW": by_row, "PACKED": rows.packed, "HAS_MASK": t.mask is not None,
        "HAS_OTHER": t.other is not None, "ALIGNED": is_aligned(rows, values, t.other, t.grad, t.mask, out),
        "PER": EACH, "T": THREADS, "num_warps": WARPS,
    }  # fmt: skip
    parts_kernel[(ranked + rows.batch, parts)](
        *inputs, outcomes, statistics, labels, order, sorted_labels, records, rows.batch, ranked, *sizes,
        HAS_OUTCOMES=a.outcomes is not None, **flags, **BITS,
    )  # fmt: skip
    scopes_kernel[(rows.batch if by_row else 1,)](
        records, sorted_labels, order, outcomes, statistics, found, rows.batch, parts,
        *pair(a.threshold), *pair(a.eps), a.ddof, KIND=kind, OF_VARIANCE=a.of_variance, ROUNDED=a.rounded,
        SHIFTED=a.shifted, BY_ROW=by_row, ORDERED=by_row, CLASSES=1 if a.outcomes is None else 2,
        TILE=FEW if by_row else MANY, num_warps=1 if by_row else 8, **BITS,
    )  # fmt: skip
    map_kernel[(rows.batch, parts)](
        *inputs, statistics, found, out, rows.batch, *sizes, stride(out), SHIFTED=a.shifted, **flags, **BITS
    )
    return out.view(a.values.shape)


def standardized(a: StandardizedArgs) -> tuple[Tensor, Tensor]:
    batch = a.values.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    statistics = a.values.new_empty((scope_count(a.groups, batch), STATISTICS), dtype=torch.float64)
    return _launch(None, statistics, a), statistics


def standardized_backward(grad: Tensor, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    return _launch(grad, statistics.contiguous(), a)
