"""What the parts of rows have in common in their scope: a program per group, or one for the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .groups import begins_group, end_of_group
from .launch import unpair
from .scopes_bonus import steering
from .scopes_parts import (
    ABOVE,
    COLUMNS,
    COUNT,
    COVARIANCE,
    ORIGIN,
    SQUARES,
    STANDARD,
    STANDARD_BACKWARD,
    STEER,
    TOP,
    TOTAL,
    WEIGHTS,
)
from .scopes_weights import EXPONENTIAL, LN2


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
    base = tl.load(records + ABOVE * plane + first, mask=known, other=0.0)
    base = base / tl.load(records + COUNT * plane + first, mask=known, other=1.0)
    size = tl.zeros([TILE], tl.float64)
    moved = tl.zeros([TILE], tl.float64)
    apart = tl.zeros([TILE], tl.float64)
    within = tl.zeros([TILE], tl.float64)
    for begin in range(0, count, TILE):
        at, inside = load_records(scope, begin, RIGHT, ORDERED, CLASSES, TILE)
        n = tl.load(records + COUNT * plane + at, mask=inside, other=0.0)
        total = tl.load(records + ABOVE * plane + at, mask=inside, other=0.0)
        mean = total / tl.where(n > 0.0, n, 1.0)
        away = (tl.load(records + ORIGIN * plane + at, mask=inside, other=0.0) - origin) + (mean - base)
        away = tl.where(n > 0.0, away, 0.0)
        squares = tl.load(records + SQUARES * plane + at, mask=inside, other=0.0) - total * mean
        size += n
        moved += n * away
        apart += n * away * away
        within += tl.where(squares < 0.0, 0.0, squares)
    size = tl.sum(size, 0)
    shift = tl.sum(moved, 0)
    moved_by = shift / tl.where(size > 0.0, size, 1.0)
    between = tl.sum(apart, 0) - shift * moved_by
    return size, origin, base + moved_by, tl.sum(within, 0) + tl.where(between < 0.0, 0.0, between)


@triton.jit
def store_columns(
    table, scope, columns, RIGHT: tl.constexpr, BY_ROW: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the statistics of a scope, for each of its rows, or once for the batch."""
    for start in range(scope.begin, scope.end if BY_ROW else 1, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < 1
        if BY_ROW:
            rows, inside = load_rows(scope, rows, RIGHT, ORDERED, CLASSES)
        to = table + rows.to(tl.int64) * COLUMNS
        for k in tl.static_range(COLUMNS):
            tl.store(to + k, columns[k], mask=inside)


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
    store_columns(
        statistics, scope, (centre, rest, scale, slope, 1.0 / count), RIGHT, BY_ROW, ORDERED, CLASSES, TILE
    )


@triton.jit
def write_found(
    records, plane, statistics, found, scope, RIGHT: tl.constexpr, KIND: tl.constexpr, SHIFTED: tl.constexpr,
    BY_ROW: tl.constexpr, ORDERED: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each row of a scope the gradient through the mean, and of z-scores that through the scale, per z-score."""
    grads = tl.zeros([TILE], tl.float64)
    products = tl.zeros([TILE], tl.float64)
    for begin in range(0, (scope.end - scope.begin) * scope.parts, TILE):
        at, inside = load_records(scope, begin, RIGHT, ORDERED, CLASSES, TILE)
        grads += tl.load(records + at, mask=inside, other=0.0)
        if KIND == STANDARD_BACKWARD:
            products += tl.load(records + plane + at, mask=inside, other=0.0)
    through_mean = tl.sum(grads, 0)
    through_scale = tl.sum(products, 0)
    for start in range(scope.begin, scope.end if BY_ROW else 1, TILE):
        rows = start + tl.arange(0, TILE)
        inside = rows < 1
        if BY_ROW:
            rows, inside = load_rows(scope, rows, RIGHT, ORDERED, CLASSES)
        s = statistics + rows.to(tl.int64) * COLUMNS
        to = found + rows.to(tl.int64) * 2
        if KIND == STANDARD_BACKWARD:
            back = -tl.load(s + 2, mask=inside, other=0.0)
            if not SHIFTED:
                back = 1.0 + back
            tl.store(to + 1, tl.load(s + 3, mask=inside, other=0.0) * through_scale, mask=inside)
        else:
            back = tl.load(s, mask=inside, other=0.0)  # 1 / mean
        tl.store(to, back * tl.load(s + 4, mask=inside, other=0.0) * through_mean, mask=inside)


@triton.jit
def write_weights(
    records, plane, statistics, scope, rate, FORM: tl.constexpr, BY_ROW: tl.constexpr, ORDERED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The inverse mean weight of a scope, and the value to which exponential weights are relative, the largest."""
    count = (scope.end - scope.begin) * scope.parts
    lanes = tl.full([TILE], -float("inf"), tl.float64)
    sign = tl.where(rate < 0.0, -1.0, 1.0).to(tl.float64)
    top = sign * 0.0
    if FORM == EXPONENTIAL:
        for begin in range(0, count, TILE):
            at, inside = load_records(scope, begin, 0, ORDERED, 1, TILE)
            some = inside & (tl.load(records + COUNT * plane + at, mask=inside, other=0.0) > 0.0)
            here = sign * tl.load(records + TOP * plane + at, mask=some, other=0.0)
            lanes = tl.maximum(lanes, tl.where(some, here, -float("inf")))
        highest = tl.max(lanes, 0)
        top = tl.where(highest == -float("inf"), 0.0, sign * highest)
    size = tl.zeros([TILE], tl.float64)
    total = tl.zeros([TILE], tl.float64)
    for begin in range(0, count, TILE):
        at, inside = load_records(scope, begin, 0, ORDERED, 1, TILE)
        n = tl.load(records + COUNT * plane + at, mask=inside, other=0.0)
        sums = tl.load(records + TOTAL * plane + at, mask=inside, other=0.0)
        if FORM == EXPONENTIAL:
            sums *= tl.exp(rate * (tl.load(records + TOP * plane + at, mask=inside, other=0.0) - top))
        size += n
        total += tl.where(n > 0.0, sums, 0.0)
    size = tl.maximum(tl.sum(size, 0), 1.0)
    mean = tl.sum(total, 0) / size
    none = mean <= 0.0
    inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, mean))
    columns = (inverse, none.to(tl.float64), top, rate, 1.0 / size)
    store_columns(statistics, scope, columns, 0, BY_ROW, ORDERED, 1, TILE)


@triton.jit
def write_means(records, plane, statistics, scope, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The means of both values of the batch, in two parts each."""
    lanes = (tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64))
    size, total, others = lanes
    for begin in range(0, (scope.end - scope.begin) * scope.parts, TILE):
        at, inside = load_records(scope, begin, 0, False, 1, TILE)
        size += tl.load(records + at, mask=inside, other=0.0)
        total += tl.load(records + plane + at, mask=inside, other=0.0)
        others += tl.load(records + 2 * plane + at, mask=inside, other=0.0)
    count = tl.maximum(tl.sum(size, 0), 1.0)
    first = tl.sum(total, 0) / count
    second = tl.sum(others, 0) / count
    centre = first.to(DTYPE).to(tl.float64)
    other = second.to(DTYPE).to(tl.float64)
    rest = tl.where(tl.abs(first) < float("inf"), first - centre, 0.0)
    other_rest = tl.where(tl.abs(second) < float("inf"), second - other, 0.0)
    store_columns(statistics, scope, (centre, rest, other, other_rest, 1.0 / count), 0, False, False, 1, TILE)


@triton.jit(do_not_specialize=["batch", "parts", "ddof"])
def scopes_kernel(
    records, labels, order, outcomes, statistics, found, batch, parts,
    threshold_high, threshold_low, eps_high, eps_low, ddof, rate_high, rate_low, floor_high,
    floor_low,
    KIND: tl.constexpr, FORM: tl.constexpr, OF_VARIANCE: tl.constexpr, ROUNDED: tl.constexpr, SHIFTED: tl.constexpr,
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
            elif KIND == WEIGHTS:
                rate = unpair(rate_high, rate_low, tl.float64) * LN2
                write_weights(records, plane, statistics, scope, rate, FORM, BY_ROW, ORDERED, TILE)
            elif KIND == STEER:
                low = unpair(rate_high, rate_low, tl.float64)
                high = unpair(floor_high, floor_low, tl.float64)
                least, slope, base = steering(records, batch * parts, low, high, FORM == EXPONENTIAL, TILE)
                columns = (least, slope, base, low, high)
                store_columns(statistics, scope, columns, 0, BY_ROW, ORDERED, 1, TILE)
            elif KIND == COVARIANCE:
                write_means(records, plane, statistics, scope, DTYPE, TILE)
            else:
                write_found(
                    records,
                    plane,
                    statistics,
                    found,
                    scope,
                    right,
                    KIND,
                    SHIFTED,
                    BY_ROW,
                    ORDERED,
                    CLASSES,
                    TILE,
                )
