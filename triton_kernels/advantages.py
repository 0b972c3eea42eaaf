"""Group-relative advantages on the GPU, to tokens in the same launch.

Moved: the labels and rewards of all rows (from the cache, after the first program), the mask, and one write per
token. A program serves a row (or a part of a long one): it joins its row with its group by equality of labels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardops.reference.advantages import BASELINES, SCALES

from .launch import INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, load_valid, output, row_bounds, stride
from .segments import row_sums

# Rows joined at once; fewer where their masks have to be looked into, and of a mask so many tokens at a look: one
# look decides for nearly every row.
JOIN = 128 if INTERPRETED else 1024
JOIN_BACKWARD = 128 if INTERPRETED else 512  # the sizes at which ptxas keeps everything in registers
JOIN_MASKED = 128
LOOK = 16
BLOCK = 256 if INTERPRETED else 1024

# Baselines and scales as the kernels know them: their places in the tables of the specification.
MEAN = tl.constexpr(BASELINES.index("mean"))
LEAVE_ONE_OUT = tl.constexpr(BASELINES.index("leave_one_out"))
MEDIAN = tl.constexpr(BASELINES.index("median"))
QUANTILE = tl.constexpr(BASELINES.index("quantile"))
HIGHEST = tl.constexpr(BASELINES.index("max"))
SECOND = tl.constexpr(BASELINES.index("second_max"))
BY_LENGTH = tl.constexpr(BASELINES.index("length_weighted"))
GIVEN = tl.constexpr(BASELINES.index("given"))
NO_BASELINE = tl.constexpr(BASELINES.index("none"))
STD = tl.constexpr(SCALES.index("std"))
BATCH_STD = tl.constexpr(SCALES.index("batch_std"))
MEAN_ABS = tl.constexpr(SCALES.index("mean_abs"))
RANGE = tl.constexpr(SCALES.index("range"))
NO_SCALE = tl.constexpr(SCALES.index("none"))


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
def members(
    start, label, groups, batch, mask, mask_stride, cu, width, total,
    EVERYONE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """The rows of a block, and which of them are live and of the group."""
    rows = start + tl.arange(0, JOIN)
    chosen = rows < batch
    if not EVERYONE:
        chosen = chosen & (tl.load(groups + rows, mask=rows < batch, other=0) == label)
    return rows, live_rows(rows, chosen, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK)


@triton.jit
def spread_of(
    label, rewards, groups, batch, mask, mask_stride, cu, width, total, ddof,
    SQUARES: tl.constexpr, EVERYONE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Of a group: the blocks it lies in, count, smallest and largest reward, mean above the smallest, std, mean of
    the absolute values, and whether any differ.

    Centred on the smallest reward first: rewards near 1000 keep their differences, and equal rewards, whose std
    comes out of rounding size, are told by comparison. All labels are read once; after that only the blocks
    between the group's first and last row. In float64: it is little work, and gradients cancel.
    """
    ACC: tl.constexpr = tl.float64
    low = tl.full([], float("inf"), ACC)
    high = tl.full([], float("-inf"), ACC)
    count = tl.zeros([], tl.int32)
    begin = batch
    end = batch * 0
    for start in range(0, batch, JOIN):
        rows, chosen = members(
            start, label, groups, batch, mask, mask_stride, cu, width, total,
            EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        low = tl.minimum(low, tl.min(tl.load(rewards + rows, mask=chosen, other=float("inf")), 0).to(ACC))
        high = tl.maximum(high, tl.max(tl.load(rewards + rows, mask=chosen, other=float("-inf")), 0).to(ACC))
        found = tl.sum(chosen.to(tl.int32), 0)
        count += found
        if found > 0:
            begin = tl.minimum(begin, start)
            end = start + JOIN
    above = tl.zeros([], ACC)
    magnitude = tl.zeros([], ACC)
    differ = tl.zeros([], tl.int32)
    for start in range(begin, end, JOIN):
        rows, chosen = members(
            start, label, groups, batch, mask, mask_stride, cu, width, total,
            EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        r = tl.load(rewards + rows, mask=chosen, other=0.0).to(ACC)
        above += tl.sum(tl.where(chosen, r - low, 0.0), 0)
        magnitude += tl.sum(tl.abs(r), 0)
        differ += tl.sum((chosen & (r != low)).to(tl.int32), 0)
    n = count.to(ACC)
    # A NaN, where there is one, has no rank.
    low = tl.where(magnitude == magnitude, low, magnitude)
    high = tl.where(magnitude == magnitude, high, magnitude)
    mean_above = above / tl.maximum(n, 1.0)
    std = tl.zeros([], ACC)
    if SQUARES:
        square = tl.zeros([], ACC)
        for start in range(begin, end, JOIN):
            rows, chosen = members(
                start, label, groups, batch, mask, mask_stride, cu, width, total,
                EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
            )  # fmt: skip
            centred = tl.load(rewards + rows, mask=chosen, other=0.0).to(ACC) - low - mean_above
            square += tl.sum(tl.where(chosen, centred * centred, 0.0), 0)
        std = tl.where(differ > 0, tl.sqrt(square / tl.maximum((count - ddof).to(ACC), 1.0)), 0.0)
    return begin, end, n, low, high, mean_above, std, magnitude / tl.maximum(n, 1.0), differ > 0


@triton.jit
def sort_key(r):
    """Integers in the order of the numbers."""
    if r.dtype == tl.float64:
        key = (r + 0.0).to(tl.int64, bitcast=True)
        return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key)
    else:
        key = (r + 0.0).to(tl.int32, bitcast=True)
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key)


@triton.jit
def ranked(
    rank, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """The reward of that rank from below and the next larger rank's, by bisection over all numbers: no sort."""
    ACC: tl.constexpr = rewards.dtype.element_ty
    if tl.float64 == ACC:
        lower = tl.full([], -0x8000000000000000, tl.int64)
        upper = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        lower = tl.full([], -0x80000000, tl.int32)
        upper = tl.full([], 0x7FFFFFFF, tl.int32)
    at_most = rank * 0
    for _ in range(64 if tl.float64 == ACC else 32):
        middle = (lower & upper) + ((lower ^ upper) >> 1)
        reached = rank * 0
        for start in range(begin, end, JOIN):
            rows, chosen = members(
                start, label, groups, batch, mask, mask_stride, cu, width, total,
                False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
            )  # fmt: skip
            key = sort_key(tl.load(rewards + rows, mask=chosen, other=0.0))
            reached += tl.sum((chosen & (key <= middle)).to(tl.int32), 0)
        enough = reached > rank
        upper = tl.where(enough, middle, upper)
        lower = tl.where(enough, lower, tl.minimum(middle, upper - 1) + 1)
    value = tl.full([], float("inf"), ACC)
    for start in range(begin, end, JOIN):
        rows, chosen = members(
            start, label, groups, batch, mask, mask_stride, cu, width, total,
            False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        r = tl.load(rewards + rows, mask=chosen, other=0.0)
        key = sort_key(r)
        at_most += tl.sum((chosen & (key <= upper)).to(tl.int32), 0)
        value = tl.minimum(value, tl.min(tl.where(chosen & (key == upper), r, float("inf")), 0))
    above = tl.full([], float("inf"), ACC)
    for start in range(begin, end, JOIN):
        rows, chosen = members(
            start, label, groups, batch, mask, mask_stride, cu, width, total,
            False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        r = tl.load(rewards + rows, mask=chosen, other=0.0)
        above = tl.minimum(above, tl.min(tl.where(chosen & (sort_key(r) > upper), r, float("inf")), 0))
    return value, tl.where(at_most > rank + 1, value, above)


@triton.jit
def first_of(
    value, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """The earliest member with that reward."""
    first = batch
    for start in range(begin, end, JOIN):
        rows, chosen = members(
            start, label, groups, batch, mask, mask_stride, cu, width, total,
            False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        r = tl.load(rewards + rows, mask=chosen, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(chosen & (r == value), rows, batch), 0))
    return first


@triton.jit
def group_statistics(
    label, rewards, groups, lengths, batch, mask, mask_stride, cu, width, total, quantile, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """What an advantage needs of its group: see the return."""
    ACC: tl.constexpr = tl.float64
    begin, end, n, low, high, mean_above, std, mean_abs, differs = spread_of(
        label, rewards, groups, batch, mask, mask_stride, cu, width, total, ddof,
        SCALE == STD, False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
    )  # fmt: skip
    alone = RAW and n == 1.0
    # The group, or all rows, whose rewards the scale is made of.
    size = std
    of_n, of_low, of_mean, of_differs = n, low, mean_above, differs
    if SCALE == BATCH_STD:
        _, _, of_n, of_low, _, of_mean, size, _, of_differs = spread_of(
            label, rewards, groups, batch, mask, mask_stride, cu, width, total, ddof,
            True, True, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
    elif SCALE == MEAN_ABS:
        size = mean_abs
    elif SCALE == RANGE:
        size = high - low
    inv_scale = tl.full([], 1.0, ACC)
    if SCALE != NO_SCALE:
        inv_scale = tl.where(alone, 1.0, tl.where(of_differs, 1.0 / (size + eps), 0.0))
    gain = tl.full([], 1.0, ACC)
    if BASELINE == LEAVE_ONE_OUT:
        gain = tl.where(n > 1.0, n / tl.maximum(n - 1.0, 1.0), 0.0)
    below = low
    above = low
    part = tl.zeros([], ACC)
    length = tl.zeros([], ACC)
    if BASELINE == BY_LENGTH:
        for start in range(begin, end, JOIN):
            rows, chosen = members(
                start, label, groups, batch, mask, mask_stride, cu, width, total,
                False, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
            )  # fmt: skip
            each = tl.load(lengths + rows, mask=chosen, other=0.0).to(ACC)
            length += tl.sum(each, 0)
            part += tl.sum(each * (tl.load(rewards + rows, mask=chosen, other=0.0).to(ACC) - low), 0)
        mean_above = tl.where(length > 0, part / tl.where(length > 0, length, 1.0), 0.0)
    elif BASELINE == HIGHEST:
        below = high
        above = high
    elif BASELINE == MEDIAN or BASELINE == SECOND or BASELINE == QUANTILE:
        count = n.to(tl.int32)
        if BASELINE == MEDIAN:
            rank = tl.maximum(count - 1, 0) // 2
        elif BASELINE == SECOND:
            rank = tl.maximum(count - 2, 0)
        else:
            # In the precision of the rewards, as torch.quantile.
            at = quantile * tl.maximum(n - 1.0, 0.0).to(rewards.dtype.element_ty)
            rank = at.to(tl.int32)
            part = (at - rank.to(at.dtype)).to(ACC)
        below, above = ranked(
            rank, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
            TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        below = tl.where(low == low, below.to(ACC), low)
        above = tl.where(part > 0, above.to(ACC), below)
    # Where the group lies; count, smallest, largest, mean above the smallest (by length, where so asked); whether
    # any differ; what the baseline lies between, and how far; sum of lengths; gain of the baseline; 1 / scale; a
    # raw
    # group of one; and of the rewards that the scale is made of count, smallest, mean above it, and scale.
    return (
        begin, end, n, low, high, mean_above, differs, below, above, part, length, gain, inv_scale, alone,
        of_n, of_low, of_mean, size,
    )  # fmt: skip


@triton.jit
def numerator(
    r, baseline, low, mean_above, gain, differs, below, above, part, alone, best, BASELINE: tl.constexpr
):  # fmt: skip
    """Reward less baseline."""
    if BASELINE == NO_BASELINE:
        value = r
    elif BASELINE == GIVEN:
        value = r - baseline
    elif BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT or BASELINE == BY_LENGTH:
        value = tl.where(differs, gain * (r - low - mean_above), 0.0)
    else:
        value = tl.where(differs, r - below - tl.where(part > 0, part * (above - below), 0.0), 0.0)
        if BASELINE == SECOND:
            value = tl.where(best | (low != low), value, 0.0)
    return tl.where(alone, r, value)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "out_stride", "ddof", "splits"])
def group_advantages_kernel(
    rewards, groups, given, lengths, mask, cu, advantages, inv_scales, numerators,
    batch, mask_stride, width, total, out_stride, quantile_high, quantile_low, eps_high, eps_low, ddof, splits,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr, LOOK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): row b, and of its tokens the blocks k, k + splits, ..."""
    ACC: tl.constexpr = tl.float64
    b = tl.program_id(0)
    # A row without a valid token is no member; it has no token to write to either.
    one = b + tl.zeros([1], tl.int32)
    alive = tl.max(
        live_rows(
            one, one < batch, mask, mask_stride, cu, width, total, TOKENS, PACKED, HAS_MASK, LOOK
        ).to(tl.int32),
        0,
    )  # fmt: skip
    reward = tl.load(rewards + b).to(ACC)
    if SCALE == NO_SCALE and not RAW and (BASELINE == NO_BASELINE or BASELINE == GIVEN):
        # Nothing of the group is needed.
        value = reward
        if BASELINE == GIVEN:
            value = reward - tl.load(given + b).to(ACC)
        inv_scale = tl.full([], 1.0, ACC)
    else:
        eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
        REWARD: tl.constexpr = rewards.dtype.element_ty
        quantile = tl.full([], quantile_high, REWARD) + tl.full([], quantile_low, REWARD)
        label = tl.load(groups + b)
        (
            begin, end, n, low, high, mean_above, differs, below, above, part, length, gain, inv_scale, alone,
            of_n, of_low, of_mean, size,
        ) = group_statistics(
            label, rewards, groups, lengths, batch, mask, mask_stride, cu, width, total, quantile, eps, ddof,
            BASELINE, SCALE, RAW, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        baseline = reward
        if BASELINE == GIVEN:
            baseline = tl.load(given + b).to(ACC)
        best = b < 0
        if BASELINE == SECOND:
            best = b == first_of(
                high, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
                TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
            )  # fmt: skip
        value = numerator(
            reward, baseline, low, mean_above, gain, differs, below, above, part, alone, best, BASELINE
        )
    counts = (alive > 0) & (inv_scale != 0)
    if tl.program_id(1) == 0:
        tl.store(inv_scales + b, tl.where(counts, inv_scale, 0.0))
        tl.store(numerators + b, tl.where(alive > 0, value, 0.0))
    value = tl.where(counts, value * inv_scale, 0.0).to(advantages.dtype.element_ty)
    if TOKENS:
        base, size_of_row = row_bounds(cu, b, width, total, PACKED)
        for start in range(tl.program_id(1) * BLOCK, size_of_row, splits * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < size_of_row
            valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, inside, HAS_MASK)
            where = advantages + base + b.to(tl.int64) * out_stride + at
            tl.store(where, tl.where(valid, value, 0.0), mask=inside)
    else:
        tl.store(advantages + b, value)


@triton.jit(do_not_specialize=["batch", "mask_stride", "width", "total", "ddof"])
def group_advantages_backward_kernel(
    up, grad_inv_scale, rewards, groups, lengths, inv_scales, numerators, mask, cu, out, out_given,
    batch, mask_stride, width, total, quantile_high, quantile_low, eps_high, eps_low, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr, JOIN: tl.constexpr,
    LOOK: tl.constexpr,
):  # fmt: skip
    """Program b: the gradient of row b's reward, and of its given baseline."""
    ACC: tl.constexpr = tl.float64
    REWARD: tl.constexpr = rewards.dtype.element_ty
    b = tl.program_id(0)
    eps = tl.full([], eps_high, ACC) + tl.full([], eps_low, ACC)
    quantile = tl.full([], quantile_high, REWARD) + tl.full([], quantile_low, REWARD)
    label = tl.load(groups + b)
    (
        begin, end, n, low, high, mean_above, differs, below, above, part, length, gain, inv_scale, alone,
        of_n, of_low, of_mean, size,
    ) = group_statistics(
        label, rewards, groups, lengths, batch, mask, mask_stride, cu, width, total, quantile, eps, ddof,
        BASELINE, SCALE, RAW, TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
    )  # fmt: skip
    lowest = batch
    highest = batch
    if SCALE == RANGE or BASELINE == SECOND:
        highest = first_of(
            high, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
            TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
    if SCALE == RANGE:
        lowest = first_of(
            low, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
            TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
    total_up = tl.zeros([], ACC)
    through = tl.zeros([], ACC)
    # Rows that do not count have no inverse scale; a batch-wide scale is every row's.
    if SCALE == BATCH_STD:
        first = batch * 0
        last = batch
    else:
        first = begin
        last = end
    for start in range(first, last, JOIN):
        rows = start + tl.arange(0, JOIN)
        inside = rows < batch
        member = inside & (tl.load(groups + rows, mask=inside, other=0) == label)
        inv = tl.load(inv_scales + rows, mask=inside, other=0.0)
        u = tl.zeros([JOIN], ACC)
        if HAS_GRAD:
            u = tl.load(up + rows, mask=inv != 0, other=0.0).to(ACC)
        t = u * tl.load(numerators + rows, mask=inv != 0, other=0.0).to(ACC)
        if HAS_INV:
            t += tl.load(grad_inv_scale + rows, mask=inv != 0, other=0.0).to(ACC)
        if SCALE != BATCH_STD:
            t = tl.where(member, t, 0.0)
        if BASELINE == SECOND:
            member = member & (rows == highest)
        total_up += tl.sum(tl.where(member, u, 0.0), 0)
        through += tl.sum(t, 0)
    mine = tl.load(inv_scales + b) != 0
    u = tl.zeros([], ACC)
    if HAS_GRAD:
        u = tl.load(up + b, mask=mine, other=0.0).to(ACC)
    reward = tl.load(rewards + b).to(ACC)
    weight = tl.zeros([], ACC)
    if BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT:
        weight = gain / tl.maximum(n, 1.0)
    elif BASELINE == BY_LENGTH:
        weight = tl.where(length > 0, tl.load(lengths + b).to(ACC) / tl.where(length > 0, length, 1.0), 0.0)
    elif BASELINE != NO_BASELINE and BASELINE != GIVEN:
        at_below = first_of(
            below, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
            TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
        )  # fmt: skip
        weight = tl.where(b == at_below, 1.0 - part, 0.0)
        if BASELINE == QUANTILE:
            at_above = first_of(
                above, begin, end, label, rewards, groups, batch, mask, mask_stride, cu, width, total,
                TOKENS, PACKED, HAS_MASK, JOIN, LOOK,
            )  # fmt: skip
            weight += tl.where(b == at_above, part, 0.0)
        if BASELINE == SECOND:
            gain = tl.where(b == highest, 1.0, 0.0)
    grad = inv_scale * (gain * u - weight * total_up)
    slope = tl.zeros([], ACC)
    if SCALE == RANGE:
        slope = tl.where(b == highest, 1.0, 0.0) - tl.where(b == lowest, 1.0, 0.0)
    elif SCALE == MEAN_ABS:
        slope = (tl.where(reward > 0, 1.0, 0.0) - tl.where(reward < 0, 1.0, 0.0)) / tl.maximum(n, 1.0)
    elif SCALE != NO_SCALE:
        # d std / d r = centred / ((n - ddof) std)
        freedom = tl.maximum(of_n - ddof, 1.0)
        slope = tl.where(
            size > 0, (reward - of_low - of_mean) / (freedom * tl.where(size > 0, size, 1.0)), 0.0
        )
    grad -= slope * inv_scale * inv_scale * through
    tl.store(out + b, tl.where(mine, tl.where(alone, u, grad), 0.0))
    if BASELINE == GIVEN:
        tl.store(out_given + b, tl.where(mine & (alone == 0), -inv_scale * u, 0.0))


# ---- launch ------------------------------------------------------------------------------------------------


def _settings(mask: Tensor | None, unmasked: int, baseline: str, scale: str, raw: bool) -> dict[str, Any]:
    # Eight warps: a tile of masks held by four does not fit into registers.
    join, warps = (unmasked, 4) if mask is None else (JOIN_MASKED, 8)
    return {
        "BASELINE": BASELINES.index(baseline), "SCALE": SCALES.index(scale), "RAW": raw,
        "HAS_MASK": mask is not None, "JOIN": join, "LOOK": LOOK, "num_warps": warps,
    }  # fmt: skip


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    given: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    baseline: str,
    quantile: float,
    scale: str,
    eps: float,
    ddof: int,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rewards, groups = rewards.contiguous(), groups.contiguous()
    given, lengths = (None if t is None else t.contiguous() for t in (given, lengths))
    inv_scale, numerators = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    tokens = mask is not None or cu_seqlens is not None
    rows = Rows(rewards.shape[0], 0, 0, False, rewards)
    shape: torch.Size | tuple[int, ...] = rewards.shape
    if tokens:
        shape = (num_tokens,) if mask is None else mask.shape
        rows = Rows.of(shape, cu_seqlens, rewards)
    out = output(rewards, shape, rows.packed)
    mask = as_bytes(mask)
    if rows.batch == 0:
        return out, inv_scale, numerators
    blocks = max(1, cdiv(rows.width, BLOCK))
    parts = splits(rewards, rows.batch, blocks) if tokens else 1
    group_advantages_kernel[(rows.batch, parts)](
        rewards, groups, pointer(given, rewards), pointer(lengths, rewards), pointer(mask, rewards), rows.cu, out,
        inv_scale, numerators, rows.batch, stride(mask), rows.width, rows.total, stride(out) if tokens else 0,
        *pair(quantile), *pair(eps), ddof, parts, TOKENS=tokens, PACKED=rows.packed, BLOCK=BLOCK,
        **_settings(mask, JOIN, baseline, scale, raw),
    )  # fmt: skip
    return out, inv_scale, numerators


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    rewards: Tensor,
    groups: Tensor,
    given: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    baseline: str,
    quantile: float,
    scale: str,
    eps: float,
    ddof: int,
    raw: bool,
) -> tuple[Tensor, Tensor]:
    rewards, groups = rewards.contiguous(), groups.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    out = rewards.new_empty(rewards.shape)
    on_given = rewards.new_empty(0 if given is None else rewards.shape)
    tokens = mask is not None or cu_seqlens is not None
    rows = Rows(rewards.shape[0], 0, 0, False, rewards)
    if rows.batch == 0:
        return out, on_given
    if tokens:
        like = mask if mask is not None else grad
        # Without a mask the rows' tokens are not looked at where there is no gradient of them either.
        shape = (torch.iinfo(torch.int64).max,) if like is None else like.shape
        rows = Rows.of(shape, cu_seqlens, rewards)
    mask = as_bytes(mask)
    up = grad
    if grad is not None and tokens:
        up = row_sums(grad, mask, cu_seqlens)
    elif up is not None:
        up = up.contiguous()
    inv = None if grad_inv_scale is None else grad_inv_scale.contiguous()
    group_advantages_backward_kernel[(rows.batch,)](
        pointer(up, rewards), pointer(inv, rewards), rewards, groups, pointer(lengths, rewards),
        inv_scale.contiguous(), numerator.contiguous(), pointer(mask, rewards), rows.cu, out, on_given,
        rows.batch, stride(mask), rows.width, rows.total, *pair(quantile), *pair(eps), ddof,
        TOKENS=tokens, PACKED=rows.packed, HAS_GRAD=up is not None, HAS_INV=inv is not None,
        **_settings(mask, JOIN_BACKWARD, baseline, scale, raw),
    )  # fmt: skip
    return out, on_given
