"""Soft minima over step rewards on the GPU: over the steps still to come at every token, and over a whole row.

Memory traffic, forward: returns take one read of rewards, mask and steps, and two writes; transformed rewards
take two reads, and one write. Tiles are read in decreasing time, as in ``returns``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.returns import ReturnsArgs
from .arithmetic import Pair, fused
from .launch import BITS, pair, pointer, unpair
from .rows import Rows, as_bytes, dense, stride
from .scans import WHOLE, at_row, lesser, paired, plus, row_part, where_pair
from .steps import NO_STEP, as_pointer, kind_of, load_step_ends
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


class Steps(NamedTuple):
    """Adjacent steps, in the precision of the rewards."""

    low: Any  # the smallest reward; infinite for no steps
    mass: Any  # sum of exp((low - reward) / temperature), a pair
    count: Any  # int32


@triton.jit
def fall(a, b, inverse):
    """exp(-|a - b| / temperature) for the rewards of two steps, which may be equal infinities."""
    return tl.where(a == b, 1.0, tl.exp(-tl.abs(a - b) * inverse))


@triton.jit
def add_step(steps, reward, ends, inverse):
    """The steps with one more, if one ends here."""
    change = fall(reward, steps.low, inverse)
    below = reward < steps.low
    mass = Pair(fused(steps.mass.sum, change, 0.0), steps.mass.rest * change)
    mass = plus(where_pair(below, mass, steps.mass), tl.where(below, 1.0, change))
    low = tl.where(ends, lesser(steps.low, reward), steps.low)
    return Steps(low, where_pair(ends, mass, steps.mass), steps.count + ends.to(tl.int32))


@triton.jit
def add_steps(a, x, x_rest, a_count, inverse, b, y, y_rest, b_count, _):
    """Associative combine of the steps of two segments; the inverse temperature goes along."""
    change = fall(a, b, inverse)
    below = b < a
    small = tl.where(below, x, y)
    small_rest = tl.where(below, x_rest, y_rest)
    mass = plus(
        Pair(tl.where(below, y, x), tl.where(below, y_rest, x_rest) + small_rest * change),
        fused(small, change, 0.0),
    )
    return lesser(a, b), mass.sum, mass.rest, a_count + b_count, inverse


@triton.jit
def where_steps(flag, a, b):
    return Steps(
        tl.where(flag, a.low, b.low), where_pair(flag, a.mass, b.mass), tl.where(flag, a.count, b.count)
    )


@triton.jit
def no_steps(ACC: tl.constexpr, T: tl.constexpr):
    zero = tl.zeros([T], ACC)
    return Steps(zero + float("inf"), Pair(zero, zero), tl.zeros([T], tl.int32))


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "rewards_stride", "mask_stride", "steps_stride", "out_stride",
    ]
)  # fmt: skip
def softmin_returns_kernel(
    rewards, mask, cu, steps, out, log_sums, batch, width, total,
    rewards_stride, mask_stride, steps_stride, out_stride, inv_high, inv_low, temperature_high, temperature_low,
    MEAN: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr,
    ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program b: row b. A log-sum is that of its smallest reward, in float64, plus the logarithm of a mass."""
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    row = row_part(cu, b, b, width, total, 0, WHOLE, PACKED)
    write_gaps(out, cu, b, batch, total, T, PACKED)
    write_gaps(log_sums, cu, b, batch, total, T, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    out = at_row(out, row, out_stride)
    log_sums = at_row(log_sums, row, out_stride)
    wide_inverse = unpair(inv_high, inv_low, tl.float64)
    inverse = wide_inverse.to(ACC)
    temperature = paired(unpair(temperature_high, temperature_low, tl.float64), ACC)
    carry = no_steps(ACC, T)
    next_id = tl.full([T], NO_STEP, tl.int64)
    for turn in range(0, tl.cdiv(row.length, T * PER)):
        tile = tile_of(row.begin, row.end, turn, PER, T, True)
        valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
        r = load_tokens(rewards, tile, PER, ALIGNED)
        ends, next_id = load_step_ends(steps, valid, next_id, tile, KIND, PER, ALIGNED)
        own = where_steps(tile.first, carry, no_steps(ACC, T))
        for k in tl.static_range(PER - 1, -1, -1):
            own = add_step(own, r[k], ends[k], inverse)
        low, mass, rest, count, _ = tl.associative_scan(
            (own.low, own.mass.sum, own.mass.rest, own.count, tl.zeros([T], ACC) + inverse), 0, add_steps
        )
        after = Steps(
            from_before(low, tile),
            Pair(from_before(mass, tile), from_before(rest, tile)),
            from_before(count, tile),
        )
        here = where_steps(tile.first, carry, after)
        carry = after
        results = ()
        logs = ()
        for k in tl.static_range(PER - 1, -1, -1):
            here = add_step(here, r[k], ends[k], inverse)
            some = valid[k] & (here.count > 0)
            mass = tl.where(some, here.mass.sum + here.mass.rest, 1.0)
            log_mass = tl.log(mass)
            log_sum = log_mass.to(tl.float64) - here.low.to(tl.float64) * wide_inverse
            if MEAN:
                log_mass = tl.log(mass / tl.where(some, here.count, 1).to(ACC))
            value = fused(-temperature.sum, log_mass, here.low - temperature.rest * log_mass)
            results = (tl.where(some, value, 0.0),) + results  # noqa: RUF005 (the compiler knows no stars)
            logs = (tl.where(some, log_sum, 0.0),) + logs  # noqa: RUF005
        store_tokens(out, tile, results, PER, ALIGNED)
        store_tokens(log_sums, tile, logs, PER, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "rewards_stride", "mask_stride", "steps_stride", "grad_stride", "out_stride",
    ]
)  # fmt: skip
def softmin_kernel(
    rewards, mask, cu, steps, grad, out, batch, width, total,
    rewards_stride, mask_stride, steps_stride, grad_stride, out_stride, inv_high, inv_low,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, BACKWARD: tl.constexpr,
    THROUGH: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program b: row b. Pass 0 sums, with sums of each thread; pass 1 writes."""
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    row = row_part(cu, b, b, width, total, 0, WHOLE, PACKED)
    write_gaps(out, cu, b, batch, total, T, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    grad = at_row(grad, row, grad_stride)
    out = at_row(out, row, out_stride)
    inverse = unpair(inv_high, inv_low, ACC)
    low = tl.full([T], float("inf"), ACC)
    zero = tl.zeros([T], ACC)
    mass = Pair(zero, zero)
    mean = Pair(zero, zero)  # of gradient times reward, weighted
    smallest = tl.full([], float("inf"), ACC)
    total_mass = tl.zeros([], ACC)
    total_mean = tl.zeros([], ACC)
    for stage in tl.static_range(2):
        next_id = tl.full([T], NO_STEP, tl.int64)
        for turn in range(0, tl.cdiv(row.length, T * PER)):
            tile = tile_of(row.begin, row.end, turn, PER, T, True)
            valid = load_flags(mask, tile, HAS_MASK, PER, ALIGNED)
            r = load_tokens(rewards, tile, PER, ALIGNED)
            up = r
            if BACKWARD:
                up = load_tokens(grad, tile, PER, ALIGNED)
            ends, next_id = load_step_ends(steps, valid, next_id, tile, KIND, PER, ALIGNED)
            if stage == 0:
                before = low
                for k in tl.static_range(PER):
                    low = tl.where(ends[k], lesser(low, r[k]), low)
                change = fall(before, low, inverse)
                mass = Pair(fused(mass.sum, change, 0.0), mass.rest * change)
                mean = Pair(fused(mean.sum, change, 0.0), mean.rest * change)
                for k in tl.static_range(PER):
                    weight = tl.where(ends[k], tl.exp((low - r[k]) * inverse), 0.0)
                    mass = plus(mass, weight)
                    if BACKWARD and THROUGH:
                        mean = plus(mean, tl.where(ends[k], weight * r[k] * up[k], 0.0))
            else:
                results = ()
                for k in tl.static_range(PER):
                    weight = tl.exp((smallest - r[k]) * inverse) / total_mass
                    value = up[k]
                    if BACKWARD and THROUGH:
                        value = up[k] - (up[k] * r[k] - total_mean) * inverse
                    results = results + (tl.where(ends[k], weight * value, 0.0),)  # noqa: RUF005
                store_tokens(out, tile, results, PER, ALIGNED)
        if stage == 0:
            smallest = tl.reduce(low, 0, lesser)
            scale = tl.where(low == float("inf"), 0.0, tl.exp((smallest - low) * inverse))
            scale = tl.where(smallest == float("inf"), float("nan"), scale)
            total_mass = tl.sum((mass.sum + mass.rest) * scale, 0)
            total_mean = tl.sum((mean.sum + mean.rest) * scale, 0) / total_mass


# ---- launch ------------------------------------------------------------------------------------------------


def softmin_returns(a: ReturnsArgs, temperature: float, mean: bool) -> tuple[Tensor, Tensor]:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out, log_sums = empty_tokens(rewards, rows), empty_tokens(rewards, rows, torch.float64)
    if out.numel() and rows.batch:
        softmin_returns_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, log_sums, rows.batch,
            rows.width, rows.total, stride(rewards), stride(mask), stride(steps), stride(out),
            *pair(1.0 / temperature), *pair(temperature), MEAN=mean, PACKED=rows.packed,
            HAS_MASK=mask is not None, KIND=kind, ALIGNED=is_aligned(rows, rewards, mask, steps, out),
            PER=EACH, T=THREADS, num_warps=WARPS, **BITS,
        )  # fmt: skip
    return out, log_sums


def _softmin(grad: Tensor | None, a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    grad = None if grad is None else dense(grad)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out = empty_tokens(rewards, rows)
    if out.numel() and rows.batch:
        softmin_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), pointer(grad, rewards), out,
            rows.batch, rows.width, rows.total, stride(rewards), stride(mask), stride(steps), stride(grad),
            stride(out), *pair(1.0 / temperature), PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind,
            BACKWARD=grad is not None, THROUGH=through_weights,
            ALIGNED=is_aligned(rows, rewards, mask, steps, grad, out), PER=EACH, T=THREADS, num_warps=WARPS, **BITS,
        )  # fmt: skip
    return out


def softmin_rewards(a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    return _softmin(None, a, temperature, through_weights)


def softmin_rewards_backward(
    grad: Tensor, a: ReturnsArgs, temperature: float, through_weights: bool
) -> Tensor:
    return _softmin(grad, a, temperature, through_weights)
