"""The gradients of returns on the GPU: sums of upstream gradients, one scan with time.

Memory traffic: rewards, gradients, mask, steps, and what the forward pass has returned, once; one write. A few long
rows are read twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference.returns import ReturnsArgs
from .arithmetic import Pair, expm1_negative
from .launch import BITS, cdiv, pair, pointer, unpair
from .rows import Rows, as_bytes, dense, load_valid, stride
from .scans import (
    AGGREGATES,
    MAX_CHUNKS,
    WHOLE,
    Map,
    at_row,
    chunk_of,
    handed_on,
    new_state,
    not_finite,
    paired,
    plus,
    record_of,
    row_part,
    scan_in_stages,
    scan_start,
    scan_threads,
    store_map,
    times,
    where_pair,
    widened,
)
from .steps import IDS, as_pointer, kind_of, load_step_ends_ahead
from .tiles import (
    EACH,
    THREADS,
    WARPS,
    empty_tokens,
    is_aligned,
    load_flags,
    load_tokens,
    of_first,
    store_tokens,
    tile_of,
    write_gaps,
)


class Inputs(NamedTuple):
    """Pointers to a row's first tokens."""

    rewards: Any
    result: Any  # of the forward pass: extremes, or log-sums
    grad: Any
    mask: Any
    steps: Any


class Fall(NamedTuple):
    """The factor exp(change) of a change that is not above 0."""

    near: Any  # whether it is near 1
    factor: Any  # then what it lacks to be 1, negative


@triton.jit
def fall_of(change, ACC: tl.constexpr):
    """The fall of a log-sum; one that is not defined cuts."""
    change = change.to(ACC)
    change = tl.where(change == change, tl.where(change > 0.0, 0.0, change), float("-inf"))
    near = change > -0.5
    return Fall(near, tl.where(near, expm1_negative(change), tl.exp(change)))


@triton.jit
def with_token(s, up, fall, valid, SOFT: tl.constexpr):
    """What is carried to a token, and its upstream gradient."""
    there = s
    if SOFT:
        there = plus(
            Pair(tl.where(fall.near, s.sum, 0.0), tl.where(fall.near, s.rest, 0.0)), times(fall.factor, s.sum)
        )
        there = Pair(there.sum, there.rest + times(fall.factor, s.rest))
    return where_pair(valid, plus(there, up.to(s.sum.dtype)), s)


@triton.jit
def last_before(x, mask, begin, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The number of the last valid token before ``begin``, float64; 0 where there is none."""
    value = tl.zeros([], tl.float64)
    end = begin
    while end > 0:
        at = end - 1 - tl.arange(0, BLOCK)
        last = tl.max(tl.where(load_valid(mask, at, at >= 0, HAS_MASK), at, -1), 0)
        end -= BLOCK
        if last >= 0:
            value = tl.load(x + last).to(tl.float64)
            end = end * 0
    return value


@triton.jit
def scan_row(
    p, out, row, start, inverse,
    SOFT: tl.constexpr, KIND: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scan a row or its part, PER tokens a thread in ACC, and write the results; what the part carries on.

    The second result is NaN if a sum is not finite, else 0.
    """
    zero = tl.zeros([T], ACC)
    wide = tl.zeros([T], tl.float64)
    carry = Map(wide + 1.0, wide + start)
    log_sum = wide
    if SOFT and STAGE != WHOLE:
        log_sum = wide + last_before(p.result, p.mask, row.begin, HAS_MASK, T)
    odd = zero
    for turn in range(0, tl.cdiv(row.end - row.begin, T * PER)):
        tile = tile_of(row.begin, row.end, turn, PER, T, False)
        valid = load_flags(p.mask, tile, HAS_MASK, PER, ALIGNED)
        up = load_tokens(p.grad, tile, PER, ALIGNED)
        r = load_tokens(p.rewards, tile, PER, ALIGNED)
        result = load_tokens(p.result, tile, PER, ALIGNED)
        ends = load_step_ends_ahead(p.steps, p.mask, valid, tile, row.length, KIND, HAS_MASK, PER, ALIGNED, T)
        falls = ()
        takes = ()  # tokens that have a gradient
        weights = ()
        slope = wide + 1.0
        if SOFT:
            some = tl.zeros([T], tl.int32)
            last = wide
            for k in tl.static_range(PER):
                some |= valid[k].to(tl.int32)
                last = tl.where(valid[k], result[k], last)
            before, following = handed_on(last, some, log_sum, tile)
            here = before
            for k in tl.static_range(PER):
                falls = falls + (fall_of(result[k] - here, ACC),)  # noqa: RUF005 (the compiler knows no stars)
                here = tl.where(valid[k], result[k], here)
                counts = ends[k] & (tl.abs(result[k]) != float("inf"))
                weight = tl.exp((-r[k].to(tl.float64) * inverse - result[k]).to(ACC))
                takes = takes + (counts,)  # noqa: RUF005
                weights = weights + (weight,)  # noqa: RUF005
            log_sum = following
            change = here - before
            # Of all tokens at once, so that rounding does not add up over threads.
            slope = tl.where(change == change, tl.exp(tl.where(change > 0.0, 0.0, change)), 0.0)
        else:
            for k in tl.static_range(PER):
                same = (r[k] == result[k]) | ((r[k] != r[k]) & (result[k] != result[k]))
                takes = takes + (ends[k] & same,)  # noqa: RUF005
                falls = falls + (Fall(valid[k], zero),)  # noqa: RUF005
                slope = tl.where(takes[k], 0.0, slope)
        s = Pair(zero, zero)
        for k in tl.static_range(PER):
            s = with_token(s, up[k], falls[k], valid[k], SOFT)
            if not SOFT:
                s = where_pair(takes[k], Pair(zero, zero), s)
        begin, carry = scan_threads(Map(slope, widened(s)), carry, tile, ACC)
        s = paired(begin, ACC)
        results = ()
        for k in tl.static_range(PER):
            s = with_token(s, up[k], falls[k], valid[k], SOFT)
            odd = tl.where(valid[k], odd + s.sum * 0.0, odd)
            value = s.sum + s.rest
            if SOFT:
                value = tl.where(takes[k], weights[k] * tl.where(takes[k], value, 0.0), 0.0)
            else:
                value = tl.where(takes[k], value, 0.0)
                s = where_pair(takes[k], Pair(zero, zero), s)
            results = results + (value,)  # noqa: RUF005
        if STAGE != AGGREGATES:
            store_tokens(out, tile, results, PER, ALIGNED)
    return Map(of_first(carry.slope, T), of_first(carry.shift, T)), tl.sum(odd, 0).to(tl.float64)


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "chunks", "chunk", "rewards_stride", "result_stride", "grad_stride",
        "mask_stride", "steps_stride", "out_stride",
    ]
)  # fmt: skip
def returns_backward_kernel(
    rewards, result, grad, mask, cu, steps, out, state, batch, width, total, chunks, chunk,
    rewards_stride, result_stride, grad_stride, mask_stride, steps_stride, out_stride, inv_high, inv_low,
    SOFT: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, STAGE: tl.constexpr,
    ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c): row b, or its chunk c. STAGE as in ``scans``, KIND as in ``steps``.

    Of extremes, a step end that attains the extreme has the sum of the gradients since the previous such end. SOFT:
    a step end has ``exp(-r / T - log_sum) S``, with ``S[t] = grad[t] + exp(log_sum[t] - log_sum[t-]) S[t-]``.
    """
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, chunk, STAGE, PACKED)
    if STAGE != AGGREGATES and c == 0:
        write_gaps(out, cu, b, batch, total, T, PACKED)
    if row.end > row.begin:
        p = Inputs(
            at_row(rewards, row, rewards_stride), at_row(result, row, result_stride),
            at_row(grad, row, grad_stride), at_row(mask, row, mask_stride), at_row(steps, row, steps_stride),
        )  # fmt: skip
        out = at_row(out, row, out_stride)
        inverse = unpair(inv_high, inv_low, tl.float64)
        start = scan_start(state, row, c, chunks, chunk, STAGE, MAX_CHUNKS, False)
        part, odd = scan_row(p, out, row, start, inverse, SOFT, KIND, HAS_MASK, STAGE, ALIGNED, ACC, PER, T)
        if tl.float32 == ACC:  # noqa: SIM102 (known when compiled; the map is not)
            if not_finite(Map(part.slope + odd, part.shift)):
                part, odd = scan_row(
                    p, out, row, start, inverse, SOFT, KIND, HAS_MASK, STAGE, False, tl.float64, 1, T
                )
        if STAGE == AGGREGATES:
            store_map(record_of(state, row, c, chunks), part)


# ---- launch ------------------------------------------------------------------------------------------------


def _backward(grad: Tensor, result: Tensor, a: ReturnsArgs, temperature: float, soft: bool) -> Tensor:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask, grad, result = dense(a.rewards), as_bytes(a.mask), dense(grad), dense(result)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    per = min(EACH, 8) if soft and kind == IDS.value else EACH  # with 16 tokens a thread registers spill
    out = empty_tokens(rewards, rows)
    if not out.numel() or not rows.batch:
        return out
    chunk = chunk_of(rows, rewards)
    chunks = cdiv(rows.width, chunk)
    state = new_state(rows.batch, chunks, rewards)

    def launch(stage: int) -> None:
        returns_backward_kernel[(rows.batch, chunks)](
            rewards, result, grad, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, state, rows.batch,
            rows.width, rows.total, chunks, chunk, stride(rewards), stride(result), stride(grad), stride(mask),
            stride(steps), stride(out), *pair(1.0 / temperature), SOFT=soft, PACKED=rows.packed,
            HAS_MASK=mask is not None, KIND=kind, STAGE=stage,
            ALIGNED=is_aligned(rows, rewards, result, grad, mask, steps, out), MAX_CHUNKS=MAX_CHUNKS, PER=per,
            T=THREADS, num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out


def backward_of_extremes(grad: Tensor, returns: Tensor, a: ReturnsArgs, largest: bool) -> Tensor:
    return _backward(grad, returns, a, 1.0, False)


def backward_of_soft_minima(grad: Tensor, log_sums: Tensor, a: ReturnsArgs, temperature: float) -> Tensor:
    return _backward(grad, log_sums, a, temperature, True)
