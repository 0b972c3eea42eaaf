"""Reductions over the steps of rows on the GPU: one pass over the tokens, a segmented scan of the threads a tile.

A thread reduces the steps of its own tokens. Those that begin and end among them are stored at once; what is open
at its ends meets that of other threads in the scan, in float64. A step is stored where the next one begins, so that
tokens of no step may lie anywhere in it. Within a thread float32 tokens are summed in two parts, which is right
where all are finite; a row with a sum that is not is reduced again in float64.

A few long rows are cut into chunks: a pass for what is open at the ends of every chunk, and a pass to store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair
from .scans import AGGREGATES, RESUMED, Row, at_row, plus, row_part, where_pair, widened
from .segments_open import (
    ANY,
    FIELDS,
    FIRST,
    LAST,
    MAX,
    MEAN,
    MIN,
    NOWHERE,
    PROD,
    SUM,
    Open,
    Part,
    merged,
    of_lane,
    scanned,
    start_of_part,
    store_record,
    where_open,
)  # fmt: skip
from .steps import FLAGS, ROW, load_step_numbers
from .tiles import from_before, load_flags, load_tokens, tile_of


class Results(NamedTuple):
    """A row's values and results."""

    tokens: Any  # pointer to the row's first token
    out: Any  # pointers to the numbers of its first step
    kept: Any
    number: Any  # of steps, int32


# ---- the tokens of a thread ----------------------------------------------------------------------------------


@triton.jit
def with_token(part, x, k, some, fresh, OP: tl.constexpr, ACC: tl.constexpr):
    """The reduction with token k where ``some``; ``fresh`` where it is the first of its step."""
    if OP == SUM or OP == MEAN or OP == ANY:
        if OP == ANY:  # noqa: SIM108 (the compiler knows it)
            term = (some & (x != 0.0)).to(ACC)
        else:
            term = tl.where(some, x, 0.0).to(ACC)
        zero = tl.zeros(term.shape, ACC)
        value = plus(where_pair(fresh, Pair(zero, zero), part.value), term)
        more = part.more
        if OP == MEAN:
            more = tl.where(fresh, 0, more) + some.to(tl.int32)
    elif OP == PROD:
        is_zero = x == 0.0
        factor = tl.where(some & (is_zero == 0), x, 1.0).to(ACC)
        value = Pair(tl.where(fresh, 1.0, part.value.sum) * factor, part.value.rest)
        more = tl.where(fresh, 0, part.more) + (some & is_zero).to(tl.int32)
    else:
        if OP == MAX:
            x = -x
        take = fresh
        if OP == MIN or OP == MAX:
            now = part.value.sum
            take = fresh | (some & ((x < now) | ((x != x) & (now == now))))
        elif OP == LAST:
            take = some
        value = Pair(tl.where(take, x, part.value.sum), part.value.rest)
        more = tl.where(take, k, part.more)
    return Part(value, more)


@triton.jit
def where_part(flag, a, b):
    return Part(where_pair(flag, a.value, b.value), tl.where(flag, a.more, b.more))


@triton.jit
def in_row(part, step, tile, OP: tl.constexpr, WIDE: tl.constexpr):
    """A thread's reduction as the scan has it, where it has a step: in float64, with positions in the row."""
    if OP == SUM or OP == MEAN or OP == ANY or OP == PROD:
        return Part(widened(part.value).to(WIDE), part.more.to(tl.int64))
    else:
        position = tile.low + (tile.start + part.more)
        value = part.value.sum.to(WIDE)
        if OP == FIRST:
            value = position.to(WIDE)
        elif OP == LAST:
            value = -position.to(WIDE)
        none = step < 0
        return Part(tl.where(none, float("inf"), value), tl.where(none, NOWHERE, position))


# ---- storing -------------------------------------------------------------------------------------------------


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def is_step(row, step):
    return (step >= 0) & (step < row.number)


@triton.jit
def store_step(row, step, value, more, some, OP: tl.constexpr):
    """Store the reduction of a step where ``some``, and what is kept of it."""
    if OP == MEAN:
        tl.store(row.kept + step, more.to(tl.float64), mask=some)
        value = quotient(value, tl.maximum(more, 1).to(value.dtype))
    elif OP == ANY:
        value = tl.where(value > 0.0, 1.0, 0.0)
    elif OP == PROD:
        tl.store(row.kept + step, tl.where(more > 1, 0.0, value), mask=some)
        value = tl.where(more > 0, 0.0, value)
    elif OP != SUM:
        tl.store(row.kept + step, more.to(tl.float64), mask=some)
        if OP == MAX:
            value = -value
    tl.store(row.out + step, value.to(row.out.dtype.element_ty), mask=some)


@triton.jit
def store_own(row, step, part, tile, some, OP: tl.constexpr, KIND: tl.constexpr):
    """Store the reduction of a step that begins and ends in a thread."""
    if KIND == FLAGS:  # ids are below the number of steps
        some = some & (step < row.number)
    value = part.value.sum + part.value.rest
    if OP == SUM or OP == MEAN or OP == ANY or OP == PROD:
        store_step(row, step, value, part.more, some, OP)
    else:
        store_step(row, step, part.value.sum, tile.low + (tile.start + part.more), some, OP)


@triton.jit
def store_open(row, step, part, some, OP: tl.constexpr):
    """Store the reduction of a step that was open at the ends of threads."""
    value = part.value
    if OP == FIRST or OP == LAST:  # which was a position
        value = tl.load(row.tokens + part.more, mask=some, other=0.0)
    store_step(row, step, value, part.more, some, OP)


@triton.jit
def clear_steps(row, c, chunks, T: tl.constexpr, OP: tl.constexpr):
    """Store the numbers of a step without tokens for all steps: tokens overwrite them behind the barrier."""
    empty = 0.0
    if OP == MIN or OP == MAX or OP == FIRST or OP == LAST:
        empty = -1.0
    for start in range(c * T, row.number, chunks * T):
        step = start + tl.arange(0, T)
        tl.store(row.out + step, tl.zeros([T], row.out.dtype.element_ty), mask=step < row.number)
        if OP != SUM and OP != ANY:
            tl.store(row.kept + step, tl.full([T], empty, tl.float64), mask=step < row.number)
    tl.debug_barrier()


# ---- a row or a part of it -----------------------------------------------------------------------------------


class Carry(NamedTuple):
    """What is carried from a tile to the next: in the first thread, or, where a row is one step, that of each."""

    open: Any
    flags: Any  # int32, the number of step ends by flags
    odd: Any  # NaN if a sum of the thread is not finite, else 0


@triton.jit
def reduce_part(
    part, row, steps, mask, start, flags,
    OP: tl.constexpr, KIND: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Reduce a row or its part, sums of a thread in ACC, and store the steps that end there."""
    carry = Carry(start, flags, tl.zeros([T], ACC))
    zero = tl.zeros([T], ACC)
    no_step = tl.full([T], -1, tl.int32)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(row.tokens, tile, PER, ALIGNED)
        numbers, flags = load_step_numbers(steps, valid, carry.flags, row.number, tile, KIND, PER, ALIGNED)
        first = no_step
        last = no_step
        if OP == MIN or OP == MAX or OP == FIRST or OP == LAST:
            own = Part(Pair(zero + float("inf"), zero), no_step)
        elif OP == PROD:
            own = Part(Pair(zero + 1.0, zero), tl.zeros([T], tl.int32))
        else:
            own = Part(Pair(zero, zero), tl.zeros([T], tl.int32))
        head = own  # of the thread's first step, where another one follows
        odd = carry.odd
        for k in tl.static_range(PER):
            fresh = numbers[k] > last  # an id that falls along a row counts as the one before it
            if KIND != ROW and k > 0:
                is_head = first == last
                head = where_part(fresh & is_head, own, head)
                if STAGE != AGGREGATES:
                    store_own(row, last, own, tile, fresh & (is_head == 0), OP, KIND)
            own = with_token(own, x[k], k, numbers[k] >= 0, fresh, OP, ACC)
            if OP == SUM or OP == MEAN:
                odd += own.value.sum * 0.0
            first = tl.where(first < 0, numbers[k], first)
            last = tl.maximum(last, numbers[k])
        own_open = Open(first, last, in_row(own, last, tile, OP, WIDE))
        if KIND == ROW:
            carry = Carry(merged(carry.open, own_open, OP), flags, odd)
        else:
            along = where_open(tile.first, merged(carry.open, own_open, OP), own_open)
            along = scanned(along, OP)
            more = along.part.more
            if OP != SUM and OP != ANY:
                more = from_before(more, tile)
            behind = Open(
                from_before(along.first, tile), from_before(along.last, tile),
                Part(from_before(along.part.value, tile), more),
            )  # fmt: skip
            before = where_open(tile.first, carry.open, behind)
            if STAGE != AGGREGATES:
                head_open = Open(first, first, in_row(head, first, tile, OP, WIDE))
                joined = merged(before, head_open, OP)
                ended = is_step(row, before.last) & (first >= 0) & (before.last != first)
                store_open(row, before.last, before.part, ended, OP)
                ended = is_step(row, first) & (first != last)
                store_open(row, first, joined.part, ended, OP)
            carry = Carry(behind, flags, odd)
    return carry


@triton.jit(
    do_not_specialize=[
        "width", "total", "chunks", "chunk", "segments", "values_stride", "steps_stride", "mask_stride",
    ]
)  # fmt: skip
def segment_reduce_kernel(
    values, steps, mask, cu, out, kept, state, width, total, chunks, chunk, segments,
    values_stride, steps_stride, mask_stride,
    OP: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr,
    ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c): the steps of row b, or those that end in its chunk c.

    STAGE is one of ``scans``, and KIND of ``steps``. ``kept`` is for the backward pass (see the specification).
    """
    REAL: tl.constexpr = values.dtype.element_ty
    LEAST: tl.constexpr = OP == MIN or OP == MAX
    WIDE: tl.constexpr = REAL if LEAST else tl.float64
    # The range of float32 is too small for products.
    ACC: tl.constexpr = tl.float64 if OP == PROD else REAL
    b = tl.program_id(0)
    c = tl.program_id(1)
    part = row_part(cu, b, c, width, total, chunk, STAGE, PACKED)
    to_steps = part.number * segments
    row = Results(at_row(values, part, values_stride), out + to_steps, kept + to_steps, segments)
    if KIND != ROW and STAGE != RESUMED:
        clear_steps(row, c, chunks, T, OP)
    steps = at_row(steps, part, steps_stride)
    mask = at_row(mask, part, mask_stride)
    upto = c
    if KIND == ROW and STAGE == RESUMED:  # a long row is merged by one program
        upto = tl.cdiv(part.length, chunk).to(tl.int32)
        end = tl.where(upto > 1, part.begin, part.end)
        part = Row(part.number, part.offset, part.length, part.begin, end)
        upto = tl.where(upto > 1, upto, 0)
    start, flags = start_of_part(state, part, upto, chunks, OP, WIDE, STAGE, MAX_CHUNKS, T)
    carry = reduce_part(
        part, row, steps, mask, start, flags, OP, KIND, HAS_MASK, STAGE, ALIGNED, WIDE, ACC, PER, T
    )
    if (OP == SUM or OP == MEAN) and tl.float64 != ACC:  # noqa: SIM102
        if tl.sum(carry.odd, 0) != 0.0:
            again = reduce_part(
                part, row, steps, mask, start, flags,
                OP, KIND, HAS_MASK, STAGE, ALIGNED, WIDE, tl.float64, PER, T,
            )  # fmt: skip
            carry = Carry(again.open, again.flags, carry.odd)
    opened = carry.open
    if KIND == ROW:  # noqa: SIM108
        opened = of_lane(scanned(opened, OP), T - 1)
    else:
        opened = of_lane(opened, 0)
    first_lane = tl.arange(0, T) == 0
    if STAGE == AGGREGATES:
        flags = tl.sum(tl.where(first_lane, carry.flags, 0), 0)
        store_record(state + (part.number * chunks + c) * FIELDS, opened, flags)
    elif KIND == ROW:
        if opened.last < 0:
            clear_steps(row, 0, 1, T, OP)
        store_open(row, opened.last, opened.part, opened.last == 0, OP)
    elif (part.end == part.length) & (part.begin < part.length):
        ended = is_step(row, opened.last)
        if KIND == FLAGS:  # tokens after the last flag are of no step
            ended = ended & (opened.last < tl.sum(tl.where(first_lane, carry.flags, 0), 0))
        store_open(row, opened.last, opened.part, ended, OP)
