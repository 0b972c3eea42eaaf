"""Returns on the GPU: scans along a row, a block at a time with a carry.

Moved forward: rewards, mask and steps once, one write. Blocks are walked from the right and read in decreasing
time, so that every reverse scan is a forward one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardops.core.rows import Layout, batch_of
from rewardops.reference.returns import differences, prefix_scan
from rewardops.returns import step_ends as find_step_ends
from rewardops.returns import sums_between

from .launch import INTERPRETED, pair, pointer
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride
from .td import CHUNK, chunk_bounds, chunks_of, latest, td_scan, td_scan_backward

__all__ = [
    "differences", "extreme_returns", "extreme_returns_backward", "prefix_scan", "softmin_returns",
    "softmin_returns_backward", "softmin_rewards", "softmin_rewards_backward", "td_scan", "td_scan_backward",
]  # fmt: skip

BLOCK = 64 if INTERPRETED else 1024
SCAN_BLOCK = 64 if INTERPRETED else 512


# ---- step ends ---------------------------------------------------------------------------------------------


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


# ---- the smallest, or largest, step reward still to come ---------------------------------------------------


@triton.jit
def earlier_or_smaller(a, a_any, b, b_any):
    """The smaller of a later (a) and an earlier (b) stretch; a NaN stays."""
    take = (b_any != 0) & ((a_any == 0) | (b <= a) | (b != b))
    return tl.where(take, b, a), a_any | b_any


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
    """Program (b, c): row b, or its chunk c. STAGE 0: the whole row; 1: aggregates only; 2: from what follows.

    The largest is the smallest of the negated rewards.
    """
    ACC: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    begin, end = chunk_bounds(c, length, STAGE, CHUNK)
    best = tl.zeros([], ACC)
    begun = tl.zeros([], tl.int32)
    if STAGE == 2:
        for k in range(c + 1, chunks):
            # The chunks that follow; the nearest last, so that its NaN is met last.
            later = state + (row * chunks + (chunks + c - k)) * 2
            best, begun = earlier_or_smaller(
                best, begun, tl.load(later).to(ACC), tl.load(later + 1).to(tl.int32)
            )
    following = tl.full([], -1, tl.int64)
    if KIND == 2 and STAGE > 0:
        start = end
        while (start < length) & (following == -1):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
            first = tl.min(tl.where(valid, at, length), 0)
            if first < length:
                # Of no step, which is -1 or below, is like the end of the row.
                following = tl.load(steps + base + row * steps_stride + first)
                start = length
            start += BLOCK
    for done in range(0, end - begin, BLOCK):
        at = end - 1 - done - tl.arange(0, BLOCK)
        inside = at >= begin
        valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
        ends, following = step_ends(
            steps, base + row * steps_stride, at, end, valid, mask, base + row * mask_stride, following,
            KIND, HAS_MASK,
        )  # fmt: skip
        r = tl.load(rewards + base + row * rewards_stride + at, mask=ends, other=0.0)
        if LARGEST:
            r = -r
        value, any_here = tl.associative_scan((r, ends.to(tl.int32)), 0, earlier_or_smaller)
        value, any_here = earlier_or_smaller(best, begun, value, any_here)
        if STAGE != 1:
            found = value
            if LARGEST:
                found = -value
            found = tl.where(valid & (any_here != 0), found, 0.0)
            tl.store(out + base + row * out_stride + at, found, mask=inside)
        last = tl.arange(0, BLOCK) == BLOCK - 1
        best = tl.sum(tl.where(last, value, 0.0), 0)
        begun = tl.max(tl.where(last, any_here, 0), 0)
    if STAGE == 1:
        tl.store(state + (row * chunks + c) * 2, best.to(tl.float64))
        tl.store(state + (row * chunks + c) * 2 + 1, begun.to(tl.float64))


# ---- the soft minimum of the steps still to come -----------------------------------------------------------


@triton.jit
def log_add(a, x, b, y):
    """Of sums ``x e^a`` and ``y e^b``: the larger exponent, and the sum relative to it."""
    top = tl.maximum(a, b)
    left = tl.where(a == top, x, tl.where(x == 0.0, 0.0, x * tl.exp(a - top)))
    right = tl.where(b == top, y, tl.where(y == 0.0, 0.0, y * tl.exp(b - top)))
    return top, left + right


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
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    inverse = tl.full([], inv_high, tl.float64) + tl.full([], inv_low, tl.float64)
    temperature = tl.full([], temperature_high, tl.float64) + tl.full([], temperature_low, tl.float64)
    top = tl.full([], float("-inf"), tl.float64)
    mass = tl.zeros([], tl.float64)
    steps_left = tl.zeros([], tl.float64)
    following = tl.full([], -1, tl.int64)
    for done in range(0, length, BLOCK):
        at = length - 1 - done - tl.arange(0, BLOCK)
        inside = at >= 0
        valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
        ends, following = step_ends(
            steps, base + row * steps_stride, at, length, valid, mask, base + row * mask_stride, following,
            KIND, HAS_MASK,
        )  # fmt: skip
        r = tl.load(rewards + base + row * rewards_stride + at, mask=ends, other=0.0).to(tl.float64)
        u = tl.where(ends, -r * inverse, float("-inf"))
        one = ends.to(tl.float64)
        tops, masses = tl.associative_scan((u, one), 0, log_add)
        tops, masses = log_add(top, mass, tops, masses)
        counts = steps_left + tl.cumsum(one, 0)
        some = valid & (counts > 0)
        log_sum = tops + tl.log(tl.where(some, masses, 1.0))
        log_sum = tl.where(tops == float("-inf"), tops, log_sum)
        value = log_sum
        if MEAN:
            value = value - tl.log(tl.where(some, counts, 1.0))
        where = base + row * out_stride + at
        tl.store(out + where, tl.where(some, -temperature * value, 0.0).to(out.dtype.element_ty), mask=inside)
        tl.store(log_sums + where, tl.where(some, log_sum, 0.0), mask=inside)
        last = tl.arange(0, BLOCK) == BLOCK - 1
        top = tl.max(tl.where(last, tops, float("-inf")), 0)
        mass = tl.sum(tl.where(last, masses, 0.0), 0)
        steps_left = tl.max(counts, 0)


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


def extreme_returns(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None, largest: bool
) -> Tensor:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    rewards, mask = dense(rewards), as_bytes(mask)
    kind, steps = _steps(steps)
    out = output(rewards, rewards.shape, rows.packed)
    if not out.numel() or not rows.batch:
        return out
    chunks = chunks_of(rows, rewards)
    state = torch.empty((rows.batch, chunks, 2), dtype=torch.float64, device=rewards.device)
    for stage in (0,) if chunks == 1 else (1, 2):
        extremes_kernel[(rows.batch, chunks)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, state, rows.width, rows.total,
            chunks, stride(rewards), stride(mask), stride(steps), stride(out), LARGEST=largest,
            PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, STAGE=stage, CHUNK=CHUNK, BLOCK=SCAN_BLOCK,
        )  # fmt: skip
    return out


def _ends(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None
) -> tuple[Layout, Tensor]:
    """The layout, and which tokens end a step."""
    rows = Layout(batch_of(rewards.shape, cu_seqlens), tuple(rewards.shape), mask, cu_seqlens)
    return rows, rows.valid(rewards.device) if steps is None else find_step_ends(steps, rows)


def extreme_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    largest: bool,
) -> Tensor:
    """A step end whose reward is the return there takes what came since the last such: a sum that starts anew."""
    rows, ends = _ends(rewards, mask, cu_seqlens, steps)
    takes = ends & ((rewards == returns) | (rewards.isnan() & returns.isnan()))
    return sums_between(grad, takes, rows)


def softmin_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    rewards, mask = dense(rewards), as_bytes(mask)
    kind, steps = _steps(steps)
    out = output(rewards, rewards.shape, rows.packed)
    log_sums = output(rewards, rewards.shape, rows.packed, torch.float64)
    if out.numel() and rows.batch:
        softmin_returns_kernel[(rows.batch,)](
            rewards, pointer(mask, rewards), rows.cu, pointer(steps, rewards), out, log_sums, rows.width,
            rows.total, stride(rewards), stride(mask), stride(steps), stride(out), *pair(1.0 / temperature),
            *pair(temperature), MEAN=mean, PACKED=rows.packed, HAS_MASK=mask is not None, KIND=kind, BLOCK=BLOCK,
        )  # fmt: skip
    return out, log_sums


def softmin_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    log_sums: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
) -> Tensor:
    """``S[t] = grad[t] + exp(log_sum[t] - log_sum[t-]) S[t-]``, and at step ends ``exp(-r / T - log_sum) S``."""
    rows, ends = _ends(rewards, mask, cu_seqlens, steps)
    none = torch.zeros_like(log_sums)
    factors = (None, None, None, None, mask, cu_seqlens, 1.0, 0.0, False)
    apart, _ = td_scan(none, log_sums, log_sums.new_zeros(rows.batch), *factors)
    fall = torch.where(apart.isnan(), 0, apart.clamp(max=0).exp())
    sums = prefix_scan(grad.double(), fall, mask, cu_seqlens)
    weight = (-torch.where(ends, rewards, 0).double() / temperature - log_sums).exp()
    kept = ends & ~log_sums.isinf()
    return torch.where(kept, weight * torch.where(kept, sums, 0), 0).to(rewards.dtype)


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
