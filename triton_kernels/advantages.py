"""Group-relative advantages on the GPU, to tokens in the same launch.

Moved: the labels and rewards of all rows (from the cache, after the first program), the mask, and one write per
token. A program serves a row (or a part of a long one): it joins its row with its group by equality of labels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

# Rows joined at once; fewer where their masks have to be looked into, and of a mask so many tokens at a look: one
# look decides for nearly every row.
JOIN = 128 if INTERPRETED else 1024
JOIN_MASKED = 128
LOOK = 16 if INTERPRETED else 32
BLOCK = 256 if INTERPRETED else 1024
_BASELINES = {"none": 0, "mean": 1, "leave_one_out": 2}
_SCALES = {"none": 0, "std": 1}


@triton.jit
def live_rows(
    rows, chosen, mask, mask_stride, cu, width, total,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Which of the chosen rows have a valid token; the masks of no other rows are read."""
    live = chosen
    if TOKENS:
        if PACKED:
            begin = tl.load(cu + rows, mask=chosen, other=0).to(tl.int64)
            end = tl.load(cu + rows + 1, mask=chosen, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), total)
            length = tl.maximum(tl.minimum(end, total) - begin, 0)
        else:
            begin = rows.to(tl.int64) * mask_stride
            length = tl.where(chosen, width, 0).to(tl.int64)
        live = chosen & (length > 0)
        if HAS_MASK:
            pending = live
            live = pending & (length < 0)
            start = 0
            while tl.max((pending & (length > start)).to(tl.int32), 0) > 0:
                at = start + tl.arange(0, LOOK)
                inside = pending[:, None] & (at[None, :] < length[:, None])
                hit = tl.load(mask + begin[:, None] + at[None, :], mask=inside, other=0)
                found = tl.max(hit.to(tl.int32), 1) > 0
                live = live | found
                pending = pending & (found == 0)
                start += LOOK
    return live


@triton.jit
def group_statistics(
    label, rewards, groups, batch, mask, mask_stride, cu, width, total, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Of a group: count, smallest reward, mean above it, gain of the baseline, 1 / scale, std, whether any differ.

    Centred on the smallest reward first: rewards near 1000 keep their differences, and equal rewards, whose std
    comes out of rounding size, are told by comparison.
    """
    ACC: tl.constexpr = rewards.dtype.element_ty
    low = tl.full([], float("inf"), ACC)
    count = tl.zeros([], tl.int32)
    for start in range(0, batch, JOIN):
        rows = start + tl.arange(0, JOIN)
        chosen = (rows < batch) & (tl.load(groups + rows, mask=rows < batch, other=0) == label)
        chosen = live_rows(rows, chosen, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK)
        r = tl.load(rewards + rows, mask=chosen, other=float("inf"))
        low = tl.minimum(low, tl.min(r, 0))
        count += tl.sum(chosen.to(tl.int32), 0)
    above = tl.zeros([], ACC)
    differ = tl.zeros([], tl.int32)
    for start in range(0, batch, JOIN):
        rows = start + tl.arange(0, JOIN)
        chosen = (rows < batch) & (tl.load(groups + rows, mask=rows < batch, other=0) == label)
        chosen = live_rows(rows, chosen, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK)
        r = tl.load(rewards + rows, mask=chosen, other=0.0)
        above += tl.sum(tl.where(chosen, r - low, 0.0), 0)
        differ += tl.sum((chosen & (r != low)).to(tl.int32), 0)
    n = count.to(ACC)
    mean_above = above / tl.maximum(n, 1.0)
    std = tl.zeros([], ACC)
    inv_scale = tl.full([], 1.0, ACC)
    if SCALE == 1:
        square = tl.zeros([], ACC)
        for start in range(0, batch, JOIN):
            rows = start + tl.arange(0, JOIN)
            chosen = (rows < batch) & (tl.load(groups + rows, mask=rows < batch, other=0) == label)
            chosen = live_rows(
                rows, chosen, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK
            )
            r = tl.load(rewards + rows, mask=chosen, other=0.0)
            centred = r - low - mean_above
            square += tl.sum(tl.where(chosen, centred * centred, 0.0), 0)
        std = tl.where(differ > 0, tl.sqrt(square / tl.maximum((count - ddof).to(ACC), 1.0)), 0.0)
        inv_scale = tl.where(differ > 0, 1.0 / (std + eps), 0.0)
    gain = tl.zeros([], ACC)
    if BASELINE == 1:
        gain = tl.full([], 1.0, ACC)
    elif BASELINE == 2:
        gain = tl.where(count > 1, n / tl.maximum(n - 1.0, 1.0), 0.0)
    return n, low, mean_above, gain, inv_scale, std, differ > 0


@triton.jit
def numerator(r, low, mean_above, gain, differs, BASELINE: tl.constexpr):
    """Reward less baseline."""
    if BASELINE == 0:
        return r
    return tl.where(differs, gain * (r - low - mean_above), 0.0)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "out_stride", "ddof", "splits"])
def group_advantages_kernel(
    rewards, groups, mask, cu, advantages, inv_scales, batch, mask_stride, width, total, out_stride,
    eps_high, eps_low, ddof, splits,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): row b, and of its tokens the blocks k, k + splits, ..."""
    ACC: tl.constexpr = rewards.dtype.element_ty
    b = tl.program_id(0)
    eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
    label = tl.load(groups + b)
    _, low, mean_above, gain, inv_scale, _, differs = group_statistics(
        label, rewards, groups, batch, mask, mask_stride, cu, width, total, eps, ddof,
        BASELINE, SCALE, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
    )  # fmt: skip
    # A row without a valid token is no member; it has no token to write to either.
    one = b + tl.zeros([1], tl.int32)
    alive = tl.max(
        live_rows(
            one, one < batch, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK
        ).to(tl.int32),
        0,
    )  # fmt: skip
    counts = (alive > 0) & (inv_scale != 0)
    reward = tl.load(rewards + b)
    value = tl.where(counts, numerator(reward, low, mean_above, gain, differs, BASELINE) * inv_scale, 0.0)
    if tl.program_id(1) == 0:
        tl.store(inv_scales + b, tl.where(counts, inv_scale, 0.0))
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


@triton.jit(do_not_specialize=["grad_stride", "mask_stride", "width", "total"])
def row_sums_kernel(
    grad, mask, cu, sums, grad_stride, mask_stride, width, total,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the upstream gradient of row b, summed over its tokens."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    lanes = tl.zeros([BLOCK], sums.dtype.element_ty)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, at < length, HAS_MASK)
        lanes += tl.load(grad + base + b.to(tl.int64) * grad_stride + at, mask=valid, other=0.0)
    tl.store(sums + b, tl.sum(lanes, 0))


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "ddof"])
def group_advantages_backward_kernel(
    up, grad_inv_scale, rewards, groups, mask, cu, out, batch, mask_stride, width, total,
    eps_high, eps_low, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr, JOIN: tl.constexpr,
    LOOK: tl.constexpr,
):  # fmt: skip
    """Program b: the gradient of row b's reward."""
    ACC: tl.constexpr = rewards.dtype.element_ty
    b = tl.program_id(0)
    eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
    label = tl.load(groups + b)
    n, low, mean_above, gain, inv_scale, std, differs = group_statistics(
        label, rewards, groups, batch, mask, mask_stride, cu, width, total, eps, ddof,
        BASELINE, SCALE, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
    )  # fmt: skip
    total_up = tl.zeros([], ACC)
    through = tl.zeros([], ACC)
    mine = tl.zeros([], ACC)
    alive = tl.zeros([], tl.int32)
    for start in range(0, batch, JOIN):
        rows = start + tl.arange(0, JOIN)
        chosen = (rows < batch) & (tl.load(groups + rows, mask=rows < batch, other=0) == label)
        chosen = live_rows(rows, chosen, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK)
        r = tl.load(rewards + rows, mask=chosen, other=0.0)
        u = tl.zeros([JOIN], ACC)
        if HAS_GRAD:
            u = tl.load(up + rows, mask=chosen, other=0.0)
        t = u * numerator(r, low, mean_above, gain, differs, BASELINE)
        if HAS_INV:
            t += tl.load(grad_inv_scale + rows, mask=chosen, other=0.0)
        total_up += tl.sum(u, 0)
        through += tl.sum(tl.where(chosen, t, 0.0), 0)
        mine += tl.sum(tl.where(rows == b, u, 0.0), 0)
        alive += tl.sum((chosen & (rows == b)).to(tl.int32), 0)
    grad = mine
    if BASELINE != 0:
        grad = gain * (mine - total_up / tl.maximum(n, 1.0))
    grad *= inv_scale
    if SCALE == 1:
        # d std / d r = centred / ((n - ddof) std)
        freedom = tl.maximum(n - ddof, 1.0)
        centred = tl.load(rewards + b) - low - mean_above
        d_std = tl.where(std > 0, centred / (freedom * tl.where(std > 0, std, 1.0)), 0.0)
        grad -= d_std * inv_scale * inv_scale * through
    tl.store(out + b, tl.where((alive > 0) & (inv_scale != 0), grad, 0.0))


# ---- launch ------------------------------------------------------------------------------------------------


def _settings(mask: Tensor | None) -> dict[str, int]:
    # Eight warps: a tile of masks held by four does not fit into registers.
    join, warps = (JOIN, 4) if mask is None else (JOIN_MASKED, 8)
    return {"JOIN": join, "LOOK": LOOK, "num_warps": warps}


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor]:
    rewards, groups = rewards.contiguous(), groups.contiguous()
    inv_scale = rewards.new_empty(rewards.shape)
    tokens = mask is not None or cu_seqlens is not None
    rows = Rows(rewards.shape[0], 0, 0, False, rewards)
    shape: torch.Size | tuple[int, ...] = rewards.shape
    if tokens:
        shape = (num_tokens,) if mask is None else mask.shape
        rows = Rows.of(shape, cu_seqlens, rewards)
    out = output(rewards, shape, rows.packed)
    mask = as_bytes(mask)
    if rows.batch == 0:
        return out, inv_scale
    blocks = max(1, cdiv(rows.width, BLOCK))
    parts = splits(rewards, rows.batch, blocks) if tokens else 1
    group_advantages_kernel[(rows.batch, parts)](
        rewards, groups, pointer(mask, rewards), rows.cu, out, inv_scale,
        rows.batch, stride(mask), rows.width, rows.total, stride(out) if tokens else 0, *pair(eps), ddof, parts,
        BASELINE=_BASELINES[baseline], SCALE=_SCALES[scale], TOKENS=tokens, PACKED=rows.packed,
        HAS_MASK=mask is not None, BLOCK=BLOCK, **_settings(mask),
    )  # fmt: skip
    return out, inv_scale


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> Tensor:
    rewards, groups = rewards.contiguous(), groups.contiguous()
    out = rewards.new_empty(rewards.shape)
    tokens = mask is not None or cu_seqlens is not None
    rows = Rows(rewards.shape[0], 0, 0, False, rewards)
    if rows.batch == 0:
        return out
    if tokens:
        like = mask if mask is not None else grad
        # Without a mask the rows' tokens are not looked at where there is no gradient of them either.
        shape = (torch.iinfo(torch.int64).max,) if like is None else like.shape
        rows = Rows.of(shape, cu_seqlens, rewards)
    mask = as_bytes(mask)
    up = grad
    if grad is not None and tokens:
        grad = dense(grad)
        up = rewards.new_empty(rewards.shape)
        row_sums_kernel[(rows.batch,)](
            grad, pointer(mask, rewards), rows.cu, up, stride(grad), stride(mask), rows.width, rows.total,
            PACKED=rows.packed, HAS_MASK=mask is not None, BLOCK=BLOCK,
        )  # fmt: skip
    elif up is not None:
        up = up.contiguous()
    inv = None if grad_inv_scale is None else grad_inv_scale.contiguous()
    group_advantages_backward_kernel[(rows.batch,)](
        pointer(up, rewards), pointer(inv, rewards), rewards, groups, pointer(mask, rewards), rows.cu, out,
        rows.batch, stride(mask), rows.width, rows.total, *pair(eps), ddof,
        BASELINE=_BASELINES[baseline], SCALE=_SCALES[scale], TOKENS=tokens, PACKED=rows.packed,
        HAS_MASK=mask is not None, HAS_GRAD=up is not None, HAS_INV=inv is not None, **_settings(mask),
    )  # fmt: skip
    return out
