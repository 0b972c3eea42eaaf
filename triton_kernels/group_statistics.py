"""Statistics of a group's rewards, in float64: the inputs of baselines, scales and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.advantages import BASELINES, SCALES
from .groups import members
from .launch import Constant

# Indices of baselines and scales in the tables of the specification.
MEAN = Constant(BASELINES.index("mean"))
LEAVE_ONE_OUT = Constant(BASELINES.index("leave_one_out"))
MEDIAN = Constant(BASELINES.index("median"))
QUANTILE = Constant(BASELINES.index("quantile"))
HIGHEST = Constant(BASELINES.index("max"))
SECOND = Constant(BASELINES.index("second_max"))
BY_LENGTH = Constant(BASELINES.index("length_weighted"))
VALUES = Constant(BASELINES.index("values"))
NO_BASELINE = Constant(BASELINES.index("none"))
STD = Constant(SCALES.index("std"))
BATCH_STD = Constant(SCALES.index("batch_std"))
MEAN_ABS = Constant(SCALES.index("mean_abs"))
RANGE = Constant(SCALES.index("range"))
NO_SCALE = Constant(SCALES.index("none"))
# Spreads of rewards whose square may leave the range of float64, and factors that bring them back.
HUGE, SHRINK = Constant(2.0**400), Constant(2.0**-600)
TINY, GROW = Constant(2.0**-400), Constant(2.0**600)


class Moments(NamedTuple):
    """Extremes and moments of the rewards of a group, or of the whole batch; float64 unless noted."""

    begin: Any  # int32: all members lie in the rows [begin, end), whole blocks
    end: Any
    size: Any  # number of members
    low: Any  # smallest reward; NaN if a reward is NaN
    high: Any  # largest reward; likewise
    origin: Any  # low, or 0 where that is infinite or NaN
    mean_above: Any  # mean of reward - origin
    std: Any  # 0 unless requested
    mean_abs: Any  # mean of |reward|
    differ: Any  # bool: any two rewards differ, or one is infinite or NaN


class GroupStatistics(NamedTuple):
    """Baseline and scale of a group, and the inputs of their gradients; float64 unless noted."""

    begin: Any  # int32: all members lie in the rows [begin, end), whole blocks
    end: Any
    size: Any  # number of members
    low: Any  # smallest reward; NaN if a reward is NaN
    high: Any  # largest reward; likewise
    origin: Any  # low, or 0 where that is infinite or NaN
    mean_above: Any  # mean of reward - origin; weighted by length for the baseline "length_weighted"
    below: Any  # an order statistic as baseline is below + fraction * (above - below):
    above: Any  # two rewards of neighbouring rank,
    fraction: Any  # and the relative position between the two, in [0, 1)
    length: Any  # sum of the members' lengths, for "length_weighted"
    gain: Any  # factor of reward - mean: n / (n - 1) for "leave_one_out", else 1
    inv_scale: Any  # 1 / (scale + eps); 0 where no rewards differ, 1 without a scale
    raw: Any  # bool: a group of one, whose advantage is its reward
    scale_size: Any  # the rewards that the scale comes from, the group's or the batch's: size,
    scale_origin: Any  # origin
    scale_mean_above: Any  # and mean_above,
    scale: Any  # and the scale itself, without eps


@triton.jit
def reward_moments(
    group, ddof,
    SQUARES: tl.constexpr, EVERYONE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """``Moments`` of a group, or of ``EVERYONE``; ``SQUARES`` requests the standard deviation.

    Rewards are centred on the smallest one first: rewards near 1000 keep the digits of their differences. Equal
    rewards are detected by comparison: their computed std is rounding error, not 0. Infinite rewards make moments
    infinite or NaN, whatever their place. All labels are read once; later
    passes read only the blocks between the group's first and last row. Float64 costs little here, and gradients
    cancel.
    """
    ACC: tl.constexpr = tl.float64
    low = tl.full([], float("inf"), ACC)
    high = tl.full([], float("-inf"), ACC)
    count = tl.zeros([], tl.int32)
    begin = group.batch
    end = group.batch * 0
    for start in range(0, group.batch, JOIN):
        rows, chosen = members(start, group, EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN)
        low = tl.minimum(
            low, tl.min(tl.load(group.rewards + rows, mask=chosen, other=float("inf")), 0).to(ACC)
        )
        high = tl.maximum(
            high, tl.max(tl.load(group.rewards + rows, mask=chosen, other=float("-inf")), 0).to(ACC)
        )
        in_block = tl.sum(chosen.to(tl.int32), 0)
        count += in_block
        if in_block > 0:
            begin = tl.minimum(begin, start)
            end = start + JOIN
    origin = tl.where(tl.abs(low) < float("inf"), low, 0.0)
    above = tl.zeros([], ACC)
    magnitude = tl.zeros([], ACC)
    differ = tl.zeros([], tl.int32)
    for start in range(begin, end, JOIN):
        rows, chosen = members(start, group, EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN)
        r = tl.load(group.rewards + rows, mask=chosen, other=0.0).to(ACC)
        above += tl.sum(tl.where(chosen, r - origin, 0.0), 0)
        magnitude += tl.sum(tl.abs(r), 0)
        differ += tl.sum((chosen & (r != low)).to(tl.int32), 0)
    size = count.to(ACC)
    differs = (differ > 0) | (tl.abs(low) == float("inf"))
    # A NaN may be missing from minimum and maximum, but not from the sum.
    low = tl.where(magnitude == magnitude, low, magnitude)
    high = tl.where(magnitude == magnitude, high, magnitude)
    mean_above = above / tl.maximum(size, 1.0)
    std = tl.zeros([], ACC)
    if SQUARES:
        square = tl.zeros([], ACC)
        spread = high - low
        unit = tl.where(spread > HUGE, SHRINK, tl.where(spread < TINY, GROW, 1.0)).to(ACC)
        back = tl.where(spread > HUGE, GROW, tl.where(spread < TINY, SHRINK, 1.0)).to(ACC)
        for start in range(begin, end, JOIN):
            rows, chosen = members(start, group, EVERYONE, TOKENS, PACKED, HAS_MASK, JOIN)
            r = tl.load(group.rewards + rows, mask=chosen, other=0.0).to(ACC)
            centred = (r - origin - mean_above) * unit
            square += tl.sum(tl.where(chosen, centred * centred, 0.0), 0)
        std = tl.where(differs, tl.sqrt(square / tl.maximum((count - ddof).to(ACC), 1.0)) * back, 0.0)
    mean_abs = magnitude / tl.maximum(size, 1.0)
    return Moments(begin, end, size, low, high, origin, mean_above, std, mean_abs, differs)


@triton.jit
def sort_key(r):
    """Signed integer keys in the order of the numbers; 0 and -0 have the same key."""
    if r.dtype == tl.float64:
        key = (r + 0.0).to(tl.int64, bitcast=True)
        return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key)
    else:
        key = (r + 0.0).to(tl.int32, bitcast=True)
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key)


@triton.jit
def order_statistics(
    rank,
    begin,
    end,
    group,
    TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    JOIN: tl.constexpr,
):
    """The group's rewards of rank ``rank`` and ``rank + 1`` from below, by bisection over all keys: no sort."""
    ACC: tl.constexpr = group.rewards.dtype.element_ty
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
            rows, chosen = members(start, group, False, TOKENS, PACKED, HAS_MASK, JOIN)
            key = sort_key(tl.load(group.rewards + rows, mask=chosen, other=0.0))
            reached += tl.sum((chosen & (key <= middle)).to(tl.int32), 0)
        enough = reached > rank
        upper = tl.where(enough, middle, upper)
        lower = tl.where(enough, lower, tl.minimum(middle, upper - 1) + 1)
    value = tl.full([], float("inf"), ACC)
    for start in range(begin, end, JOIN):
        rows, chosen = members(start, group, False, TOKENS, PACKED, HAS_MASK, JOIN)
        r = tl.load(group.rewards + rows, mask=chosen, other=0.0)
        key = sort_key(r)
        at_most += tl.sum((chosen & (key <= upper)).to(tl.int32), 0)
        value = tl.minimum(value, tl.min(tl.where(chosen & (key == upper), r, float("inf")), 0))
    above = tl.full([], float("inf"), ACC)
    for start in range(begin, end, JOIN):
        rows, chosen = members(start, group, False, TOKENS, PACKED, HAS_MASK, JOIN)
        r = tl.load(group.rewards + rows, mask=chosen, other=0.0)
        above = tl.minimum(above, tl.min(tl.where(chosen & (sort_key(r) > upper), r, float("inf")), 0))
    return value, tl.where(at_most > rank + 1, value, above)


@triton.jit
def first_with_reward(
    value,
    begin,
    end,
    group,
    TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    JOIN: tl.constexpr,
):
    """The earliest member whose reward is ``value``; the batch size where there is none."""
    first = group.batch
    for start in range(begin, end, JOIN):
        rows, chosen = members(start, group, False, TOKENS, PACKED, HAS_MASK, JOIN)
        r = tl.load(group.rewards + rows, mask=chosen, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(chosen & (r == value), rows, group.batch), 0))
    return first


@triton.jit
def group_statistics(
    group, lengths, quantile, eps, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """``GroupStatistics`` of a group, for a baseline and a scale."""
    ACC: tl.constexpr = tl.float64
    moments = reward_moments(group, ddof, SCALE == STD, False, TOKENS, PACKED, HAS_MASK, JOIN)
    begin, end, size, low, high, origin, mean_above, std, mean_abs, _ = moments
    raw = RAW and size == 1.0
    source = moments  # moments of the rewards that the scale comes from
    scale = std
    if SCALE == BATCH_STD:
        source = reward_moments(group, ddof, True, True, TOKENS, PACKED, HAS_MASK, JOIN)
        scale = source.std
    elif SCALE == MEAN_ABS:
        scale = mean_abs
    elif SCALE == RANGE:
        scale = high - low
    inv_scale = tl.full([], 1.0, ACC)
    if SCALE != NO_SCALE:
        inv_scale = tl.where(raw, 1.0, tl.where(source.differ, 1.0 / (scale + eps), 0.0))
    gain = tl.full([], 1.0, ACC)
    if BASELINE == LEAVE_ONE_OUT:
        gain = tl.where(size > 1.0, size / tl.maximum(size - 1.0, 1.0), 0.0)
    below = low
    above = low
    fraction = tl.zeros([], ACC)
    length = tl.zeros([], ACC)
    if BASELINE == BY_LENGTH:
        weighted = tl.zeros([], ACC)
        for start in range(begin, end, JOIN):
            rows, chosen = members(start, group, False, TOKENS, PACKED, HAS_MASK, JOIN)
            each = tl.load(lengths + rows, mask=chosen, other=0.0).to(ACC)
            length += tl.sum(each, 0)
            r = tl.load(group.rewards + rows, mask=chosen, other=0.0).to(ACC)
            weighted += tl.sum(tl.where(chosen, each * (r - origin), 0.0), 0)
        # Lengths of 0 alone weigh rows equally.
        mean_above = tl.where(length == 0, mean_above, weighted / tl.where(length == 0, 1.0, length))
    elif BASELINE == HIGHEST:
        below = high
        above = high
    elif BASELINE == MEDIAN or BASELINE == SECOND or BASELINE == QUANTILE:
        count = size.to(tl.int32)
        if BASELINE == MEDIAN:
            rank = tl.maximum(count - 1, 0) // 2
        elif BASELINE == SECOND:
            rank = tl.maximum(count - 2, 0)
        else:
            # The rank is computed in the precision of the rewards, as in torch.quantile.
            at = quantile * tl.maximum(size - 1.0, 0.0).to(group.rewards.dtype.element_ty)
            rank = at.to(tl.int32)
            fraction = (at - rank.to(at.dtype)).to(ACC)
        below, above = order_statistics(rank, begin, end, group, TOKENS, PACKED, HAS_MASK, JOIN)
        below = tl.where(low == low, below.to(ACC), low)
        above = tl.where(fraction > 0, above.to(ACC), below)
    return GroupStatistics(
        begin, end, size, low, high, origin, mean_above, below, above, fraction, length, gain, inv_scale, raw,
        source.size, source.origin, source.mean_above, scale,
    )  # fmt: skip
