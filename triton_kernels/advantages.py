"""Group-relative advantages on the GPU, broadcast to tokens in the same launch.

Memory traffic: labels and rewards of all rows (from the cache, after the first program), the mask, and one write
per token. A program serves a row, or a part of a long one: it joins its row with its group by equality of labels.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..reference.advantages import BASELINES, SCALES, AdvantagesArgs
from .group_statistics import (
    BATCH_STD,
    BY_LENGTH,
    LEAVE_ONE_OUT,
    MEAN,
    MEAN_ABS,
    NO_BASELINE,
    NO_SCALE,
    QUANTILE,
    RANGE,
    SECOND,
    VALUES,
    first_with_reward,
    group_statistics,
)
from .groups import GroupRows, members, with_valid_token
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, load_valid, output, row_bounds, stride
from .segments import row_sums

# Rows joined at once; fewer where masks are read too.
JOIN = 128 if INTERPRETED else 1024
JOIN_BACKWARD = 128 if INTERPRETED else 512  # the size at which ptxas keeps everything in registers
JOIN_MASKED = 128
BLOCK = 256 if INTERPRETED else 1024


@triton.jit
def numerator(reward, baseline, s, best, BASELINE: tl.constexpr):
    """Reward minus baseline, from the group's statistics ``s``; ``best``: its first row of highest reward."""
    if BASELINE == NO_BASELINE:
        value = reward
    elif BASELINE == VALUES:
        value = reward - baseline
    elif BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT or BASELINE == BY_LENGTH:
        value = s.gain * (reward - s.origin - s.mean_above)
    else:
        step = tl.where(s.fraction > 0, s.fraction * (s.above - s.below), 0.0)
        value = reward - s.below - step
        if BASELINE == SECOND:
            value = tl.where(best, 1.0, 0.0) * value
    return tl.where(s.raw, reward, value)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "out_stride", "ddof", "splits"])
def group_advantages_kernel(
    rewards, labels, baselines, lengths, mask, cu, advantages, inv_scales, numerators,
    batch, mask_stride, width, total, out_stride, quantile_high, quantile_low, eps_high, eps_low, ddof, splits,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): row b, and of its tokens the blocks k, k + splits, ..."""
    ACC: tl.constexpr = tl.float64
    b = tl.program_id(0)
    group = GroupRows(tl.load(labels + b), rewards, labels, batch, mask, mask_stride, cu, width, total)
    # A row without a valid token is not a member, and has no token to write.
    row = b + tl.zeros([1], tl.int32)
    nonempty = with_valid_token(row, row < batch, group, TOKENS, PACKED, HAS_MASK)
    nonempty = tl.max(nonempty.to(tl.int32), 0) > 0
    reward = tl.load(rewards + b).to(ACC)
    if SCALE == NO_SCALE and not RAW and (BASELINE == NO_BASELINE or BASELINE == VALUES):
        # The advantage does not depend on the group.
        value = reward
        if BASELINE == VALUES:
            value = reward - tl.load(baselines + b).to(ACC)
        inv_scale = tl.full([], 1.0, ACC)
    else:
        eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
        REWARD: tl.constexpr = rewards.dtype.element_ty
        quantile = tl.full([], quantile_high, REWARD) + tl.full([], quantile_low, REWARD)
        s = group_statistics(
            group, lengths, quantile, eps, ddof, BASELINE, SCALE, RAW, TOKENS, PACKED, HAS_MASK, JOIN
        )
        baseline = reward
        if BASELINE == VALUES:
            baseline = tl.load(baselines + b).to(ACC)
        best = b < 0
        if BASELINE == SECOND:
            best = b == first_with_reward(s.high, s.begin, s.end, group, TOKENS, PACKED, HAS_MASK, JOIN)
        value = numerator(reward, baseline, s, best, BASELINE)
        inv_scale = s.inv_scale
    if tl.program_id(1) == 0:
        tl.store(inv_scales + b, tl.where(nonempty, inv_scale, 0.0))
        tl.store(numerators + b, tl.where(nonempty, value, 0.0))
    # No negative zeros.
    value = tl.where(nonempty, value * inv_scale + 0.0, 0.0).to(advantages.dtype.element_ty)
    if TOKENS:
        base, length = row_bounds(cu, b, width, total, PACKED)
        for start in range(tl.program_id(1) * BLOCK, length, splits * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < length
            valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, inside, HAS_MASK)
            where = advantages + base + b.to(tl.int64) * out_stride + at
            tl.store(where, tl.where(valid, value, 0.0), mask=inside)
    else:
        tl.store(advantages + b, value)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "ddof"])
def group_advantages_backward_kernel(
    grads, inv_scale_grads, rewards, labels, lengths, numerators, mask, cu, reward_grads, baseline_grads,
    batch, mask_stride, width, total, quantile_high, quantile_low, eps_high, eps_low, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Program b: the gradients of row b's reward, and of its baseline where that is an argument."""
    ACC: tl.constexpr = tl.float64
    REWARD: tl.constexpr = rewards.dtype.element_ty
    b = tl.program_id(0)
    eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
    quantile = tl.full([], quantile_high, REWARD) + tl.full([], quantile_low, REWARD)
    label = tl.load(labels + b)
    group = GroupRows(label, rewards, labels, batch, mask, mask_stride, cu, width, total)
    s = group_statistics(
        group, lengths, quantile, eps, ddof, BASELINE, SCALE, RAW, TOKENS, PACKED, HAS_MASK, JOIN
    )
    lowest = batch
    highest = batch
    if SCALE == RANGE or BASELINE == SECOND:
        highest = first_with_reward(s.high, s.begin, s.end, group, TOKENS, PACKED, HAS_MASK, JOIN)
    if SCALE == RANGE:
        lowest = first_with_reward(s.low, s.begin, s.end, group, TOKENS, PACKED, HAS_MASK, JOIN)
    # Sums of upstream gradients over the rows whose numerator contains the baseline, and the gradient of the
    # inverse scale, which with "batch_std" is that of all rows.
    grad_sum = tl.zeros([], ACC)
    inv_scale_grad = tl.zeros([], ACC)
    if SCALE == BATCH_STD:
        first = batch * 0
        last = batch
    else:
        first = s.begin
        last = s.end
    for start in range(first, last, JOIN):
        rows, chosen = members(start, group, SCALE == BATCH_STD, TOKENS, PACKED, HAS_MASK, JOIN)
        grad = tl.zeros([JOIN], ACC)
        if HAS_GRAD:
            grad = tl.load(grads + rows, mask=chosen, other=0.0).to(ACC)
        if SCALE != NO_SCALE:
            term = grad * tl.load(numerators + rows, mask=chosen, other=0.0).to(ACC)
            if HAS_INV:
                term += tl.load(inv_scale_grads + rows, mask=chosen, other=0.0).to(ACC)
            inv_scale_grad += tl.sum(term, 0)
        if SCALE == BATCH_STD:
            chosen = chosen & (tl.load(labels + rows, mask=chosen, other=0) == label)
        if BASELINE == SECOND:
            chosen = chosen & (rows == highest)
        grad_sum += tl.sum(tl.where(chosen, grad, 0.0), 0)
    row = b + tl.zeros([1], tl.int32)
    nonempty = with_valid_token(row, row < batch, group, TOKENS, PACKED, HAS_MASK)
    nonempty = tl.max(nonempty.to(tl.int32), 0) > 0
    grad = tl.zeros([], ACC)
    if HAS_GRAD:
        grad = tl.load(grads + b, mask=nonempty, other=0.0).to(ACC)
    reward = tl.load(rewards + b).to(ACC)
    # Derivatives by this row's reward: of its own numerator, and of the baseline.
    gain = s.gain
    weight = tl.zeros([], ACC)
    if BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT:
        weight = gain / tl.maximum(s.size, 1.0)
    elif BASELINE == BY_LENGTH:
        equal = s.length == 0
        weight = tl.where(equal, 1.0, tl.load(lengths + b).to(ACC)) / tl.where(equal, s.size, s.length)
    elif BASELINE != NO_BASELINE and BASELINE != VALUES:
        at_below = first_with_reward(s.below, s.begin, s.end, group, TOKENS, PACKED, HAS_MASK, JOIN)
        weight = tl.where(b == at_below, 1.0 - s.fraction, 0.0)
        if BASELINE == QUANTILE:
            at_above = first_with_reward(s.above, s.begin, s.end, group, TOKENS, PACKED, HAS_MASK, JOIN)
            weight += tl.where(b == at_above, s.fraction, 0.0)
        weight = tl.where(s.low == s.low, weight, s.low)  # a NaN has no rank
        if BASELINE == SECOND:
            gain = tl.where(b == highest, 1.0, 0.0)
    reward_grad = s.inv_scale * (gain * grad - weight * grad_sum)
    slope = tl.zeros([], ACC)  # d scale / d reward
    if SCALE == RANGE:
        slope = tl.where(b == highest, 1.0, 0.0) - tl.where(b == lowest, 1.0, 0.0)
    elif SCALE == MEAN_ABS:
        slope = (tl.where(reward > 0, 1.0, 0.0) - tl.where(reward < 0, 1.0, 0.0)) / tl.maximum(s.size, 1.0)
    elif SCALE != NO_SCALE:
        # d std / d r = centred / ((n - ddof) std)
        freedom = tl.maximum(s.scale_size - ddof, 1.0)
        centred = reward - s.scale_origin - s.scale_mean_above
        slope = tl.where(s.scale == 0, 0.0, centred / (freedom * tl.where(s.scale == 0, 1.0, s.scale)))
    if SCALE != NO_SCALE:
        reward_grad -= inv_scale_grad * s.inv_scale * s.inv_scale * slope
    tl.store(reward_grads + b, tl.where(nonempty, tl.where(s.raw, grad, reward_grad), 0.0))
    if BASELINE == VALUES:
        tl.store(baseline_grads + b, tl.where(nonempty & (s.raw == 0), -s.inv_scale * grad, 0.0))


# ---- launch ------------------------------------------------------------------------------------------------


def _options(a: AdvantagesArgs, unmasked: int) -> dict[str, Any]:
    """Keyword arguments of both launches; ``unmasked``: rows joined at once where no mask is read."""
    # Eight warps: a tile of masks does not fit into the registers of four.
    join, warps = (unmasked, 4) if a.mask is None else (JOIN_MASKED, 8)
    return {
        "BASELINE": BASELINES.index(a.baseline), "SCALE": SCALES.index(a.scale), "RAW": a.raw,
        "HAS_MASK": a.mask is not None, "JOIN": join, "num_warps": warps,
    }  # fmt: skip


def _rows(a: AdvantagesArgs) -> Rows:
    """The rows of tokens, or rows without a token where advantages are per row."""
    if a.token_shape is None:
        return Rows(a.rewards.shape[0], 0, 0, False, a.rewards)
    return Rows.of(a.token_shape, a.cu_seqlens, a.rewards)


def group_advantages(a: AdvantagesArgs) -> tuple[Tensor, Tensor, Tensor]:
    rewards, groups = a.rewards.contiguous(), a.groups.contiguous()
    values, lengths = (None if t is None else t.contiguous() for t in (a.baseline_values, a.lengths))
    inv_scale, numerators = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    rows, tokens = _rows(a), a.token_shape is not None
    out = output(rewards, rewards.shape if a.token_shape is None else a.token_shape, rows.packed)
    mask = as_bytes(a.mask)
    if rows.batch == 0:
        return out, inv_scale, numerators
    blocks = max(1, cdiv(rows.width, BLOCK))
    parts = splits(rewards, rows.batch, blocks) if tokens else 1
    group_advantages_kernel[(rows.batch, parts)](
        rewards, groups, pointer(values, rewards), pointer(lengths, rewards), pointer(mask, rewards), rows.cu, out,
        inv_scale, numerators, rows.batch, stride(mask), rows.width, rows.total, stride(out) if tokens else 0,
        *pair(a.quantile), *pair(a.eps), a.ddof, parts, TOKENS=tokens, PACKED=rows.packed, BLOCK=BLOCK,
        **_options(a, JOIN), **BITS,
    )  # fmt: skip
    return out, inv_scale, numerators


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    a: AdvantagesArgs,
) -> tuple[Tensor, Tensor]:
    rewards, groups = a.rewards.contiguous(), a.groups.contiguous()
    lengths = None if a.lengths is None else a.lengths.contiguous()
    out = rewards.new_empty(rewards.shape)
    baseline_grads = rewards.new_empty(0 if a.baseline_values is None else rewards.shape)
    rows, tokens = _rows(a), a.token_shape is not None
    if rows.batch == 0:
        return out, baseline_grads
    mask = as_bytes(a.mask)
    grads = grad
    if grad is not None:
        grads = row_sums(grad, a.mask, a.cu_seqlens) if tokens else grad.contiguous()
    inv_scale_grads = None if grad_inv_scale is None else grad_inv_scale.contiguous()
    group_advantages_backward_kernel[(rows.batch,)](
        pointer(grads, rewards), pointer(inv_scale_grads, rewards), rewards, groups, pointer(lengths, rewards),
        numerator.contiguous(), pointer(mask, rewards), rows.cu, out, baseline_grads,
        rows.batch, stride(mask), rows.width, rows.total, *pair(a.quantile), *pair(a.eps), a.ddof,
        TOKENS=tokens, PACKED=rows.packed, HAS_GRAD=grads is not None, HAS_INV=inv_scale_grads is not None,
        **_options(a, JOIN_BACKWARD), **BITS,
    )  # fmt: skip
    return out, baseline_grads
