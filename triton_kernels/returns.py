"""Returns on the GPU: scans along a row, a block at a time with a carry.

Moved forward: rewards, mask and steps once, returns and arg-min once; backward: gradient and arg-min once, one
write. Blocks are walked from the right and read in decreasing time, so that every reverse scan is a forward one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, pair, pointer
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

BLOCK = 64 if INTERPRETED else 1024


# ---- step ends ---------------------------------------------------------------------------------------------


@triton.jit
def latest(a_id, a_valid, b_id, b_valid):
    """Of two neighbouring stretches, read in decreasing time, the id of the last valid token read."""
    return tl.where(b_valid != 0, b_id, a_id), a_valid | b_valid


@triton.jit
def step_ends(
    steps, base, at, length, valid, mask, mask_base, following,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Which tokens of a block end a step. Returns them and the id of the next valid token for the next block.

    KIND 0: every valid token; 1: by flags; 2: by ids, where a step ends at the last valid token before another
    id. For ids the positions ``at`` decrease, and ``following`` is that of the first token read so far.
    """
    if KIND == 0:
        ends = valid
    elif KIND == 1:
        ends = valid & (tl.load(steps + base + at, mask=valid, other=0) != 0)
    else:
        ids = tl.load(steps + base + at, mask=valid, other=-1)
        # The next valid token's id: a scan over the tokens one further on.
        later = at + 1
        inside = (at >= 0) & (later < length)
        later_valid = load_valid(mask, mask_base + later, inside, HAS_MASK)
        later_ids = tl.load(steps + base + later, mask=later_valid, other=-1)
        near, seen = tl.associative_scan((later_ids, later_valid.to(tl.int32)), 0, latest)
        near = tl.where(seen != 0, near, following)
        ends = valid & (ids >= 0) & (ids != near)
        # Of the last token read, which is position min(at).
        last = at == tl.min(at, 0)
        following = tl.sum(tl.where(last, near, 0), 0)
    return ends, following


# ---- min-form ----------------------------------------------------------------------------------------------


@triton.jit
def earlier_or_smaller(a, a_at, b, b_at):
    """The smaller of a later (a) and an earlier (b) stretch; of equals the earlier; a NaN stays."""
    take = (b_at >= 0) & ((a_at < 0) | (b <= a) | (b != b))
    return tl.where(take, b, a), tl.where(take, b_at, a_at)


@triton.jit(
    do_not_specialize=["width", "total", "rewards_stride", "mask_stride", "steps_stride", "out_stride"]
)
def min_returns_kernel(
    rewards, mask, cu, steps, out, argmin, width, total, rewards_stride, mask_stride, steps_stride, out_stride,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: row b."""
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    best = tl.zeros([], ACC)
    best_at = tl.full([], -1, tl.int32)
    following = tl.full([], -1, tl.int64)
    for done in range(0, length, BLOCK):
        at = length - 1 - done - tl.arange(0, BLOCK)
        inside = at >= 0
        valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
        ends, following = step_ends(
            steps, base + row * steps_stride, at, length, valid, mask, base + row * mask_stride, following,
            KIND, HAS_MASK,
        )  # fmt: skip
        r = tl.load(rewards + base + row * rewards_stride + at, mask=ends, other=0.0)
        value, where = tl.associative_scan((r, tl.where(ends, at, -1).to(tl.int32)), 0, earlier_or_smaller)
        value, where = earlier_or_smaller(best, best_at, value, where)
        tl.store(out + base + row * out_stride + at, tl.where(valid, value, 0.0), mask=inside)
        tl.store(argmin + base + row * out_stride + at, tl.where(valid, where, -1), mask=inside)
        last = tl.arange(0, BLOCK) == BLOCK - 1
        best = tl.sum(tl.where(last, value, 0.0), 0)
        best_at = tl.sum(tl.where(last, where, 0), 0)


@triton.jit
def segmented_sum(a_new, a, b_new, b):
    """Running sums that start anew at marked places."""
    return a_new | b_new, tl.where(b_new != 0, b, a + b)


@triton.jit(do_not_specialize=["width", "total", "grad_stride", "where_stride", "out_stride"])
def min_returns_backward_kernel(
    grad, argmin, cu, out, width, total, grad_stride, where_stride, out_stride,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: row b. The tokens whose arg-min is j are neighbours, and j is the last of them."""
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    carry = tl.zeros([], ACC)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        wheres = argmin + base + row * where_stride + at
        where = tl.load(wheres, mask=inside, other=-1)
        before = tl.load(wheres - 1, mask=inside & (at > 0), other=-1)
        g = tl.load(grad + base + row * grad_stride + at, mask=inside & (where >= 0), other=0.0)
        first = ((before == at - 1) & (at > 0)).to(tl.int32)
        new, total_here = tl.associative_scan((first, g), 0, segmented_sum)
        total_here = tl.where(new != 0, total_here, total_here + carry)
        tl.store(out + base + row * out_stride + at, tl.where(where == at, total_here, 0.0), mask=inside)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, total_here, 0.0), 0)


# ---- soft-min ----------------------------------------------------------------------------------------------


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
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    inverse = tl.full([], inv_high, ACC) + tl.full([], inv_low, ACC)
    low = tl.full([], float("inf"), ACC)
    mass = tl.zeros([], ACC)
    mean = tl.zeros([], ACC)  # of gradient times reward under the weights
    for stage in tl.static_range(3):
        following = tl.full([], -1, tl.int64)
        for done in range(0, length, BLOCK):
            at = length - 1 - done - tl.arange(0, BLOCK)
            inside = at >= 0
            valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
            ends, following = step_ends(
                steps, base + row * steps_stride, at, length, valid, mask, base + row * mask_stride,
                following, KIND, HAS_MASK,
            )  # fmt: skip
            r = tl.load(rewards + base + row * rewards_stride + at, mask=ends, other=float("inf"))
            if stage == 0:
                low = tl.minimum(low, tl.min(r, 0))
            else:
                weight = tl.where(ends, tl.exp((low - tl.where(ends, r, low)) * inverse), 0.0)
                up = tl.zeros([BLOCK], ACC)
                if BACKWARD:
                    up = tl.load(grad + base + row * grad_stride + at, mask=ends, other=0.0)
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
                    value = tl.where(ends, weight * value, 0.0)
                    tl.store(out + base + row * out_stride + at, value, mask=inside)


# ---- launch ------------------------------------------------------------------------------------------------


def _steps(steps: Tensor | None) -> tuple[int, Tensor | None]:
    if steps is None:
        return 0, None
    return (1, as_bytes(steps)) if steps.dtype is torch.bool else (2, dense(steps))


def min_returns(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    rewards, mask = dense(rewards), as_bytes(mask)
    kind, steps = _steps(steps)
    out = output(rewards, rewards.shape, rows.packed)
    argmin = torch.full(rewards.shape, -1, dtype=torch.int32, device=rewards.device)
    if out.numel() and rows.batch:
        min_returns_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, argmin,
            rows.width, rows.total, stride(rewards), stride(mask), stride(steps), stride(out),
            PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, BLOCK=BLOCK,
        )  # fmt: skip
    return out, argmin


def min_returns_backward(grad: Tensor, argmin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = Rows.of(grad.shape, cu_seqlens, grad)
    grad, argmin = dense(grad), dense(argmin)
    out = output(grad, grad.shape, rows.packed)
    if out.numel() and rows.batch:
        min_returns_backward_kernel[(rows.batch,)](
            grad, argmin, rows.cu, out, rows.width, rows.total, stride(grad), stride(argmin), stride(out),
            PACKED=rows.packed, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def _softmin(
    grad: Tensor | None,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    rewards, mask = dense(rewards), as_bytes(mask)
    grad = None if grad is None else dense(grad)
    kind, steps = _steps(steps)
    out = output(rewards, rewards.shape, rows.packed)
    if out.numel() and rows.batch:
        softmin_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), pointer(grad, rewards), out,
            rows.width, rows.total, stride(rewards), stride(mask), stride(steps), stride(grad), stride(out),
            *pair(1.0 / temperature), PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind,
            BACKWARD=grad is not None, THROUGH=through_weights, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def softmin_rewards(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    return _softmin(None, rewards, mask, cu_seqlens, steps, temperature, through_weights)


def softmin_rewards_backward(
    grad: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    return _softmin(grad, rewards, mask, cu_seqlens, steps, temperature, through_weights)
