"""Returns on the GPU: the smallest or largest step reward to come, and gradients that are compositions of scans.

Memory traffic, forward: rewards, mask and steps once, one write. Blocks are read from the right, in decreasing
time, so that every reverse scan is a forward one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import Layout, batch_of
from ..reference.returns import ReturnsArgs
from ..reference.td import TdArgs, sums_between
from ..reference.td import step_ends as step_ends_of
from .launch import BITS, INTERPRETED, Constant, pointer
from .rows import Rows, as_bytes, dense, load_valid, output, stride
from .scans import (
    AGGREGATES,
    CHUNK,
    RESUMED,
    WHOLE,
    at_row,
    chunks_of,
    new_state,
    record_of,
    row_part,
)
from .softmin import softmin_returns, softmin_rewards, softmin_rewards_backward
from .steps import IDS, NO_STEP, as_pointer, kind_of, step_ends, step_id_after
from .td import prefix_scan, td_scan

__all__ = [
    "extreme_returns", "extreme_returns_backward", "softmin_returns", "softmin_returns_backward", "softmin_rewards",
    "softmin_rewards_backward",
]  # fmt: skip

BLOCK = 64 if INTERPRETED else 512

# Fields of a chunk's record in `state`.
VALUE = Constant(0)
ANY = Constant(1)


class Smallest(NamedTuple):
    """The smallest step reward of adjacent tokens."""

    value: Any
    any: Any  # int32: 1 if a step ends there, else 0 and the value is meaningless


@triton.jit
def smaller(a, a_any, b, b_any):
    """Associative combine: the smaller of a later (a) and an earlier (b) segment's; a NaN stays."""
    take = (b_any != 0) & ((a_any == 0) | (b <= a) | (b != b))
    return tl.where(take, b, a), a_any | b_any


@triton.jit
def smallest_behind(state, row, c, chunks, STAGE: tl.constexpr, ACC: tl.constexpr):
    """The smallest reward in the chunks after chunk c, from their aggregates."""
    value = tl.zeros([], ACC)
    any_step = tl.zeros([], tl.int32)
    if STAGE == RESUMED:
        for k in range(c + 1, chunks):
            # The nearest chunk is last, so that its NaN is combined last.
            record = record_of(state, row, chunks + c - k, chunks)
            value, any_step = smaller(
                value, any_step, tl.load(record + VALUE).to(ACC), tl.load(record + ANY).to(tl.int32)
            )
    return Smallest(value, any_step)


@triton.jit(
    do_not_specialize=[
        "width", "total", "chunks", "rewards_stride", "mask_stride", "steps_stride", "out_stride",
    ]
)  # fmt: skip
def extremes_kernel(
    rewards, mask, cu, steps, out, state, width, total, chunks,
    rewards_stride, mask_stride, steps_stride, out_stride,
    LARGEST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, STAGE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, c): row b, or its chunk c. STAGE as in ``scans``, KIND as in ``steps``.

    The largest is the smallest of the negated rewards.
    """
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, STAGE, CHUNK, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    out = at_row(out, row, out_stride)
    carry = smallest_behind(state, row, c, chunks, STAGE, ACC)
    next_id = tl.full([], NO_STEP, tl.int64)
    if KIND == IDS and STAGE != WHOLE:
        next_id = step_id_after(steps, mask, row.end, row.length, HAS_MASK, BLOCK)
    for done in range(0, row.end - row.begin, BLOCK):
        at = row.end - 1 - done - tl.arange(0, BLOCK)
        inside = at >= row.begin
        valid = load_valid(mask, at, inside, HAS_MASK)
        ends, next_id = step_ends(steps, mask, at, row.end, valid, next_id, KIND, HAS_MASK)
        r = tl.load(rewards + at, mask=ends, other=0.0)
        if LARGEST:
            r = -r
        value, any_step = tl.associative_scan((r, ends.to(tl.int32)), 0, smaller)
        value, any_step = smaller(carry.value, carry.any, value, any_step)
        if STAGE != AGGREGATES:
            extreme = value
            if LARGEST:
                extreme = -value
            tl.store(out + at, tl.where(valid & (any_step != 0), extreme, 0.0), mask=inside)
        last = tl.arange(0, BLOCK) == BLOCK - 1
        carry = Smallest(tl.sum(tl.where(last, value, 0.0), 0), tl.max(tl.where(last, any_step, 0), 0))
    if STAGE == AGGREGATES:
        record = record_of(state, row, c, chunks)
        tl.store(record + VALUE, carry.value.to(tl.float64))
        tl.store(record + ANY, carry.any.to(tl.float64))


# ---- launch ------------------------------------------------------------------------------------------------


def extreme_returns(a: ReturnsArgs, largest: bool) -> Tensor:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out = output(rewards, rewards.shape, rows.packed)
    if not out.numel() or not rows.batch:
        return out
    chunks = chunks_of(rows, rewards)
    state = new_state(rows.batch, chunks, rewards)
    for stage in (WHOLE,) if chunks == 1 else (AGGREGATES, RESUMED):
        extremes_kernel[(rows.batch, chunks)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, state, rows.width, rows.total,
            chunks, stride(rewards), stride(mask), stride(steps), stride(out), LARGEST=largest,
            PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, STAGE=stage.value, CHUNK=CHUNK, BLOCK=BLOCK,
            **BITS,
        )  # fmt: skip
    return out


def _ends(a: ReturnsArgs) -> tuple[Layout, Tensor]:
    """The layout, and flags of the tokens that end a step."""
    rows = Layout(batch_of(a.rewards.shape, a.cu_seqlens), tuple(a.rewards.shape), a.mask, a.cu_seqlens)
    if a.steps is None:
        return rows, rows.valid(a.rewards.device)
    return rows, step_ends_of(td_scan, a.steps, rows)


def extreme_returns_backward(grad: Tensor, returns: Tensor, a: ReturnsArgs, largest: bool) -> Tensor:
    """At a step end that attains the extreme: the sum of upstream gradients since the previous such end."""
    rows, ends = _ends(a)
    attains = ends & ((a.rewards == returns) | (a.rewards.isnan() & returns.isnan()))
    return sums_between(prefix_scan, grad, attains, rows)


def softmin_returns_backward(grad: Tensor, log_sums: Tensor, a: ReturnsArgs, temperature: float) -> Tensor:
    """At step ends ``exp(-r / T - log_sum) S``, with ``S[t] = grad[t] + exp(log_sum[t] - log_sum[t-]) S[t-]``."""
    rows, ends = _ends(a)
    zeros, beyond = torch.zeros_like(log_sums), log_sums.new_zeros(rows.batch)
    change, _ = td_scan(
        TdArgs(zeros, log_sums, beyond, None, None, None, None, a.mask, a.cu_seqlens, 1.0, 0.0, False)
    )
    decay = torch.where(change.isnan(), 0, change.clamp(max=0).exp())
    sums = prefix_scan(grad.double(), decay, a.mask, a.cu_seqlens)
    weight = (-torch.where(ends, a.rewards, 0).double() / temperature - log_sums).exp()
    finite_ends = ends & ~log_sums.isinf()
    return torch.where(finite_ends, weight * torch.where(finite_ends, sums, 0), 0).to(a.rewards.dtype)
