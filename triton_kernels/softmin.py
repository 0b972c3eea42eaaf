"""Soft minima over step rewards on the GPU: over the steps still to come at every token, and over a whole row.

Memory traffic, forward: returns take one read of rewards, mask and steps, and two writes; transformed rewards
take three reads, and one write. Blocks are read in decreasing time, as in ``returns``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.returns import ReturnsArgs
from .launch import BITS, INTERPRETED, pair, pointer, unpair
from .old_scans import WHOLE, at_row, row_part
from .old_steps import NO_STEP, as_pointer, kind_of, step_ends
from .rows import Rows, as_bytes, dense, load_valid, output, stride

BLOCK = 64 if INTERPRETED else 1024


class Future(NamedTuple):
    """The steps that end at a token or later, in float64."""

    top: Any  # the largest exponent -reward / temperature
    mass: Any  # sum of exp(exponent - top)
    count: Any


@triton.jit
def log_add(a, x, b, y):
    """Associative combine: the larger exponent of ``x e^a`` and ``y e^b``, and their sum relative to it."""
    top = tl.maximum(a, b)
    left = tl.where(a == top, x, tl.where(x == 0.0, 0.0, x * tl.exp(a - top)))
    right = tl.where(b == top, y, tl.where(y == 0.0, 0.0, y * tl.exp(b - top)))
    return top, left + right


@triton.jit
def steps_to_come(later, exponents, ends, BLOCK: tl.constexpr):
    """The future at every token of a block, and the carry for the next block; ``later``: this block's carry."""
    one = ends.to(tl.float64)
    tops, masses = tl.associative_scan((exponents, one), 0, log_add)
    tops, masses = log_add(later.top, later.mass, tops, masses)
    counts = later.count + tl.cumsum(one, 0)
    last = tl.arange(0, BLOCK) == BLOCK - 1
    carry = Future(
        tl.max(tl.where(last, tops, float("-inf")), 0),
        tl.sum(tl.where(last, masses, 0.0), 0),
        tl.max(counts, 0),
    )
    return Future(tops, masses, counts), carry


@triton.jit(
    do_not_specialize=["width", "total", "rewards_stride", "mask_stride", "steps_stride", "out_stride"]
)
def softmin_returns_kernel(
    rewards, mask, cu, steps, out, log_sums, width, total, rewards_stride, mask_stride, steps_stride, out_stride,
    inv_high, inv_low, temperature_high, temperature_low,
    MEAN: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: row b, in float64."""
    b = tl.program_id(0)
    row = row_part(cu, b, b, width, total, WHOLE, 0, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    out = at_row(out, row, out_stride)
    log_sums = at_row(log_sums, row, out_stride)
    inverse = unpair(inv_high, inv_low, tl.float64)
    temperature = unpair(temperature_high, temperature_low, tl.float64)
    zero = tl.zeros([], tl.float64)
    carry = Future(tl.full([], float("-inf"), tl.float64), zero, zero)
    next_id = tl.full([], NO_STEP, tl.int64)
    for done in range(0, row.length, BLOCK):
        at = row.length - 1 - done - tl.arange(0, BLOCK)
        inside = at >= 0
        valid = load_valid(mask, at, inside, HAS_MASK)
        ends, next_id = step_ends(steps, mask, at, row.length, valid, next_id, KIND, HAS_MASK)
        r = tl.load(rewards + at, mask=ends, other=0.0).to(tl.float64)
        future, carry = steps_to_come(carry, tl.where(ends, -r * inverse, float("-inf")), ends, BLOCK)
        some = valid & (future.count > 0)
        log_sum = future.top + tl.log(tl.where(some, future.mass, 1.0))
        log_sum = tl.where(future.top == float("-inf"), future.top, log_sum)
        value = log_sum
        if MEAN:
            value = value - tl.log(tl.where(some, future.count, 1.0))
        tl.store(out + at, tl.where(some, -temperature * value, 0.0).to(out.dtype.element_ty), mask=inside)
        tl.store(log_sums + at, tl.where(some, log_sum, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=[
        "width", "total", "rewards_stride", "mask_stride", "steps_stride", "grad_stride", "out_stride",
    ]
)  # fmt: skip
def softmin_kernel(
    rewards, mask, cu, steps, grad, out, width, total,
    rewards_stride, mask_stride, steps_stride, grad_stride, out_stride, inv_high, inv_low,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, BACKWARD: tl.constexpr,
    THROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: row b. Pass 0 finds the smallest step reward, pass 1 sums, pass 2 writes."""
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    row = row_part(cu, b, b, width, total, WHOLE, 0, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    mask = at_row(mask, row, mask_stride)
    steps = at_row(steps, row, steps_stride)
    grad = at_row(grad, row, grad_stride)
    out = at_row(out, row, out_stride)
    inverse = unpair(inv_high, inv_low, ACC)
    smallest = tl.full([], float("inf"), ACC)
    mass = tl.zeros([], ACC)
    mean = tl.zeros([], ACC)  # weighted mean of gradient times reward
    for stage in tl.static_range(3):
        next_id = tl.full([], NO_STEP, tl.int64)
        for done in range(0, row.length, BLOCK):
            at = row.length - 1 - done - tl.arange(0, BLOCK)
            inside = at >= 0
            valid = load_valid(mask, at, inside, HAS_MASK)
            ends, next_id = step_ends(steps, mask, at, row.length, valid, next_id, KIND, HAS_MASK)
            r = tl.load(rewards + at, mask=ends, other=float("inf"))
            if stage == 0:
                smallest = tl.minimum(smallest, tl.min(r, 0))
            else:
                weight = tl.where(ends, tl.exp((smallest - tl.where(ends, r, smallest)) * inverse), 0.0)
                up = tl.zeros([BLOCK], ACC)
                if BACKWARD:
                    up = tl.load(grad + at, mask=ends, other=0.0)
                if stage == 1:
                    mass += tl.sum(weight, 0)
                    if BACKWARD and THROUGH:
                        mean += tl.sum(tl.where(ends, weight * r * up, 0.0), 0)
                else:
                    weight = weight / mass
                    if BACKWARD:
                        value = up
                        if THROUGH:
                            value = up - (up * r - mean / mass) * inverse
                    else:
                        value = r
                    tl.store(out + at, tl.where(ends, weight * value, 0.0), mask=inside)


# ---- launch ------------------------------------------------------------------------------------------------


def softmin_returns(a: ReturnsArgs, temperature: float, mean: bool) -> tuple[Tensor, Tensor]:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out = output(rewards, rewards.shape, rows.packed)
    log_sums = output(rewards, rewards.shape, rows.packed, torch.float64)
    if out.numel() and rows.batch:
        softmin_returns_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, log_sums, rows.width,
            rows.total, stride(rewards), stride(mask), stride(steps), stride(out), *pair(1.0 / temperature),
            *pair(temperature), MEAN=mean, PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, BLOCK=BLOCK,
            **BITS,
        )  # fmt: skip
    return out, log_sums


def _softmin(grad: Tensor | None, a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    grad = None if grad is None else dense(grad)
    kind, steps = kind_of(a.steps), as_pointer(a.steps)
    out = output(rewards, rewards.shape, rows.packed)
    if out.numel() and rows.batch:
        softmin_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), pointer(grad, rewards), out,
            rows.width, rows.total, stride(rewards), stride(mask), stride(steps), stride(grad), stride(out),
            *pair(1.0 / temperature), PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind,
            BACKWARD=grad is not None, THROUGH=through_weights, BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return out


def softmin_rewards(a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    return _softmin(None, a, temperature, through_weights)


def softmin_rewards_backward(
    grad: Tensor, a: ReturnsArgs, temperature: float, through_weights: bool
) -> Tensor:
    return _softmin(grad, a, temperature, through_weights)
