"""Values of steps at the tokens of rows on the GPU: broadcasts, values at step ends, gradients of reductions."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .scans import AGGREGATES, RESUMED, WHOLE, at_row, row_part
from .segments_open import MEAN, PROD, SUM
from .segments_reduce import quotient
from .steps import FLAGS, IDS, NO_STEP, load_step_ends, load_step_numbers, step_id_after
from .tiles import load_flags, load_tokens, store_tokens, tile_of, write_gaps


class Steps(NamedTuple):
    """Pointers to the numbers of a row's first step."""

    up: Any  # what goes to the tokens: values, or the gradients of a reduction
    reduced: Any  # products
    kept: Any  # see the specification


@triton.jit
def count_flags(
    steps, mask, part, HAS_MASK: tl.constexpr, PER: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr
):
    """The number of step ends by flags in a row or its part, int32."""
    count = tl.zeros([T], tl.int32)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
        flags = load_flags(steps, tile, True, PER, ALIGNED)
        for k in tl.static_range(PER):
            count += (valid[k] & flags[k]).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def of_token(row, number, x, position, some, OP: tl.constexpr):
    """What a token has from its step: its value, or the gradient through the reduction OP."""
    up = tl.load(row.up + number, mask=some, other=0.0)
    if OP == SUM:
        return up
    kept = tl.load(row.kept + number, mask=some, other=1.0)
    if OP == MEAN:
        # Tokens after the last flag are of a step that has none, and a count of 0.
        count = kept.to(up.dtype)
        return tl.where(count > 0.0, quotient(up, tl.maximum(count, 1.0)), 0.0)
    elif OP == PROD:
        product = tl.load(row.reduced + number, mask=some, other=0.0)
        others = tl.where(product == 0.0, 0.0, kept / tl.where(x == 0.0, 1.0, x).to(tl.float64))
        return (up.to(tl.float64) * tl.where(x == 0.0, kept, others)).to(up.dtype)
    else:
        return tl.where(kept.to(tl.int64) == position, up, 0.0)


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "chunks", "chunk", "segments", "values_stride", "steps_stride", "mask_stride",
        "out_stride",
    ]
)  # fmt: skip
def steps_to_tokens_kernel(
    up, values, steps, mask, cu, reduced, kept, out, ends_out, state, batch, width, total, chunks, chunk, segments,
    values_stride, steps_stride, mask_stride, out_stride,
    OP: tl.constexpr, AT_ENDS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    STAGE: tl.constexpr, ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c): the tokens of row b, or its chunk c. STAGE as in ``scans``, KIND as in ``steps``.

    OP is the reduction whose gradient is written; that of sums is the value of the step itself. With AT_ENDS tokens
    that end no step have 0. Only flags have aggregates, their number in every chunk.
    """
    b = tl.program_id(0)
    c = tl.program_id(1)
    PART: tl.constexpr = WHOLE if STAGE == WHOLE else RESUMED
    part = row_part(cu, b, c, width, total, chunk, PART, PACKED)
    steps = at_row(steps, part, steps_stride)
    mask = at_row(mask, part, mask_stride)
    if STAGE == AGGREGATES:
        tl.store(
            state + part.number * chunks + c,
            count_flags(steps, mask, part, HAS_MASK, PER, T, ALIGNED).to(tl.float64),
        )
    else:
        if c == 0:
            write_gaps(out, cu, b, batch, total, T, PACKED)
            if AT_ENDS:
                write_gaps(ends_out, cu, b, batch, total, T, PACKED)
        row = Steps(
            up + part.number * segments, reduced + part.number * segments, kept + part.number * segments
        )
        values = at_row(values, part, values_stride)
        out = at_row(out, part, out_stride)
        ends_out = at_row(ends_out, part, width * (PACKED == 0))
        flags = tl.zeros([T], tl.int32)
        number_of_steps = segments
        if KIND == FLAGS:
            # Tokens after the last flag are of no step.
            TRAILING: tl.constexpr = OP == SUM and not AT_ENDS
            if STAGE == RESUMED:
                lane = tl.arange(0, MAX_CHUNKS)
                inside = lane < tl.cdiv(part.length, chunk)
                count = tl.load(state + part.number * chunks + lane, mask=inside, other=0.0).to(tl.int32)
                flags += tl.sum(tl.where(lane < c, count, 0), 0)
                if TRAILING:
                    number_of_steps = tl.minimum(tl.sum(count, 0), segments).to(tl.int32)
            elif TRAILING:
                count = count_flags(steps, mask, part, HAS_MASK, PER, T, ALIGNED)
                number_of_steps = tl.minimum(count, segments).to(tl.int32)
        REVERSE: tl.constexpr = AT_ENDS and KIND == IDS
        next_id = tl.full([T], NO_STEP, tl.int64)
        if REVERSE and STAGE != WHOLE:
            next_id = tl.zeros([T], tl.int64) + step_id_after(steps, mask, part.end, part.length, HAS_MASK, T)
        for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
            tile = tile_of(part.begin, part.end, turn, PER, T, REVERSE)
            valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
            ends = valid
            if AT_ENDS:
                ends, next_id = load_step_ends(steps, valid, next_id, tile, KIND, PER, ALIGNED)
            numbers, flags = load_step_numbers(steps, valid, flags, segments, tile, KIND, PER, ALIGNED)
            if OP == PROD:  # noqa: SIM108 (the compiler knows it)
                x = load_tokens(values, tile, PER, ALIGNED)
            else:
                x = numbers
            results = ()
            at_end = ()
            for k in tl.static_range(PER):
                some = numbers[k] >= 0
                if KIND == FLAGS:
                    some = some & (numbers[k] < number_of_steps)
                if AT_ENDS:
                    some = some & ends[k]
                    at_end = at_end + (some.to(tl.int32),)  # noqa: RUF005 (the compiler knows no stars)
                position = tile.low + (tile.start + k)
                result = of_token(row, numbers[k], x[k], position, some, OP)
                results = results + (tl.where(some, result, 0.0),)  # noqa: RUF005
            store_tokens(out, tile, results, PER, ALIGNED)
            if AT_ENDS:
                store_tokens(ends_out, tile, at_end, PER, ALIGNED)
