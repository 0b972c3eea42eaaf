"""Returns on the GPU: the smallest or largest step reward to come.

Memory traffic, forward: rewards, mask and steps once, one write. Blocks are read from the right, in decreasing
time, so that every reverse scan is a forward one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference.returns import ReturnsArgs
from .launch import BITS, Constant, cdiv, pointer
from .returns_backward import backward_of_extremes as extreme_returns_backward
from .returns_backward import backward_of_soft_minima as softmin_returns_backward
from .rows import Rows, as_bytes, dense, stride
from .scans import (
    AGGREGATES,
    MAX_CHUNKS,
    RESUMED,
    WHOLE,
    at_row,
    chunk_of,
    lesser,
    new_state,
    record_of,
    row_part,
    scan_in_stages,
)
from .softmin import softmin_returns, softmin_rewards, softmin_rewards_backward
from .steps import IDS, NO_STEP, as_pointer, kind_of, load_step_ends, step_id_after
from .tiles import (
    EACH,
    THREADS,
    WARPS,
    empty_tokens,
    from_before,
    is_aligned,
    load_flags,
    load_tokens,
    store_tokens,
    tile_of,
    write_gaps,
)

__all__ = [
    "extreme_returns", "extreme_returns_backward", "softmin_returns", "softmin_returns_backward", "softmin_rewards",
    "softmin_rewards_backward",
]  # fmt: skip

# Fields of a chunk's record in `state`.
VALUE = Constant(0)
ANY = Constant(1)


class Smallest(NamedTuple):
    """The smallest step reward of adjacent tokens."""

    value: Any  # infinite where no step ends
    any: Any  # int32: 1 if a step ends there


@triton.jit
def smaller(a, a_any, b, b_any):
    """Associative combine: the smallest step reward of both."""
    return lesser(a, b), a_any | b_any


@triton.jit
def smallest_behind(
    state, row, c, chunks, chunk, STAGE: tl.constexpr, MAX_CHUNKS: tl.constexpr, ACC: tl.constexpr
):
    """The smallest step reward in the chunks after chunk c, from their aggregates."""
    smallest = Smallest(tl.full([], float("inf"), ACC), tl.zeros([], tl.int32))
    if STAGE == RESUMED:
        lane = tl.arange(0, MAX_CHUNKS)
        behind = (lane > c) & (lane < tl.cdiv(row.length, chunk))
        record = record_of(state, row, lane, chunks)
        value = tl.load(record + VALUE, mask=behind, other=float("inf")).to(ACC)
        ends = tl.load(record + ANY, mask=behind, other=0.0).to(tl.int32)
        smallest = Smallest(tl.reduce(value, 0, lesser), tl.max(ends, 0))
    return smallest


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "chunks", "chunk", "rewards_stride", "mask_stride", "steps_stride", "out_stride",
    ]
)  # fmt: skip
def extremes_kernel(
    rewards, mask, cu, steps, out, state, batch, width, total, chunks, chunk,
    rewards_stride, mask_stride, steps_stride, out_stride,
    LARGEST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, STAGE: tl.constexpr,
    ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c): row b, or its chunk c. STAGE as in ``scans``, KIND as in ``steps``.

    The largest is the smallest of the negated rewards.
    """
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, chunk, STAGE, PACKED)
    if STAGE != AGGREGATES and c == 0:
        write_gaps(out, cu, b, batch, total, T, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    out = at_row(out, row, out_stride)
    behind = smallest_behind(state, row, c, chunks, chunk, STAGE, MAX_CHUNKS, ACC)
    infinite = tl.full([T], float("inf"), ACC)
    carry = Smallest(lesser(infinite, behind.value), tl.zeros([T], tl.int32) + behind.any)
    next_id = tl.full([T], NO_STEP, tl.int64)
    if KIND == IDS and STAGE != WHOLE:
        next_id = tl.zeros([T], tl.int64) + step_id_after(steps, mask, row.end, row.length, HAS_MASK, T)
    for turn in range(0, tl.cdiv(row.end - row.begin, T * PER)):
        tile = tile_of(row.begin, row.end, turn, PER, T, True)
        valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
        r = load_tokens(rewards, tile, PER, ALIGNED)
        ends, next_id = load_step_ends(steps, valid, next_id, tile, KIND, PER, ALIGNED)
        value = tl.where(tile.first, carry.value, infinite)
        some = tl.where(tile.first, carry.any, 0)
        of_steps = ()
        for k in tl.static_range(PER - 1, -1, -1):
            x = r[k]
            if LARGEST:
                x = -x
            x = tl.where(ends[k], x, float("inf"))
            value = lesser(value, x)
            some |= ends[k].to(tl.int32)
            of_steps = (x,) + of_steps  # noqa: RUF005 (the compiler knows no stars)
        value, some = tl.associative_scan((value, some), 0, smaller)
        value = from_before(value, tile)
        some = from_before(some, tile)
        if STAGE != AGGREGATES:
            smallest = tl.where(tile.first, carry.value, value)
            begun = tl.where(tile.first, carry.any, some) != 0
            results = ()
            for k in tl.static_range(PER - 1, -1, -1):
                smallest = lesser(smallest, of_steps[k])
                begun = begun | ends[k]
                extreme = smallest
                if LARGEST:
                    extreme = -extreme
                results = (tl.where(valid[k] & begun, extreme, 0.0),) + results  # noqa: RUF005
            store_tokens(out, tile, results, PER, ALIGNED)
        carry = Smallest(value, some)
    if STAGE == AGGREGATES:
        record = record_of(state, row, c, chunks)
        first = tl.arange(0, T) == 0
        tl.store(
            record + VALUE, tl.reduce(tl.where(first, carry.value, float("inf")), 0, lesser).to(tl.float64)
        )
        tl.store(record + ANY, tl.max(tl.where(first, carry.any, 0), 0).to(tl.float64))


# ---- launch ------------------------------------------------------------------------------------------------


def extreme_returns(a: ReturnsArgs, largest: bool) -> Tensor:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out = empty_tokens(rewards, rows)
    if not out.numel() or not rows.batch:
        return out
    chunk = chunk_of(rows, rewards)
    chunks = cdiv(rows.width, chunk)
    state = new_state(rows.batch, chunks, rewards)

    def launch(stage: int) -> None:
        extremes_kernel[(rows.batch, chunks)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, state, rows.batch, rows.width,
            rows.total, chunks, chunk, stride(rewards), stride(mask), stride(steps), stride(out), LARGEST=largest,
            PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, STAGE=stage,
            ALIGNED=is_aligned(rows, rewards, mask, steps, out), MAX_CHUNKS=MAX_CHUNKS, PER=EACH, T=THREADS,
            num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out
