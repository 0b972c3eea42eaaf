"""Statistics of a group's rewards, in float64: the inputs of baselines, scales and their gradients.

Each lane adds up its own members (`over_members`); lanes meet once per statistic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.advantages import BASELINES, SCALES
from .groups import over_members
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
# Places in the record of the batch, for "batch_std".
SIZE, ORIGIN, MEAN_ABOVE, BATCH_SCALE, DIFFER, INV_SCALE_GRAD = (Constant(k) for k in range(6))
BATCH_RECORD = 6


class Settings(NamedTuple):
    """Numbers of a call."""

    quantile: Any  # in the dtype of the rewards
    eps: Any
    ddof: Any


class Moments(NamedTuple):
    """Extremes and moments of rewards, float64."""

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


# ---- sums over members -------------------------------------------------------------------------------------


class Extremes(NamedTuple):
    low: Any
    high: Any
    size: Any


class Sums(NamedTuple):
    first: Any
    second: Any


class Ranked(NamedTuple):
    """Of a key: the number of members up to it, the reward that has it, and the smallest one beyond."""

    at_most: Any
    value: Any
    above: Any


class Centre(NamedTuple):
    """What squares are taken of: (reward - origin - mean_above) * unit."""

    origin: Any
    mean_above: Any
    unit: Any


@triton.jit
def add_extremes(to, m, x):
    return Extremes(
        tl.minimum(to.low, tl.where(m.chosen, m.reward, float("inf"))),
        tl.maximum(to.high, tl.where(m.chosen, m.reward, float("-inf"))),
        to.size + m.chosen.to(tl.int32),
    )


@triton.jit
def add_moments(to, m, origin):
    r = m.reward.to(tl.float64)
    return Sums(to.first + tl.where(m.chosen, r - origin, 0.0), to.second + tl.abs(r))


@triton.jit
def add_squares(to, m, x):
    centred = (m.reward.to(tl.float64) - x.origin - x.mean_above) * x.unit
    return to + tl.where(m.chosen, centred * centred, 0.0)


@triton.jit
def add_lengths(to, m, x):
    """The lengths, and the weighted rewards above the origin; ``x``: the lengths' pointer, the origin."""
    length = tl.load(x.first + m.rows, mask=m.chosen, other=0.0).to(tl.float64)
    weighted = tl.where(m.chosen, length * (m.reward.to(tl.float64) - x.second), 0.0)
    return Sums(to.first + length, to.second + weighted)


@triton.jit
def count_up_to(to, m, key):
    return to + (m.chosen & (sort_key(m.reward) <= key)).to(tl.int32)


@triton.jit
def add_ranked(to, m, key):
    keys = sort_key(m.reward)
    return Ranked(
        to.at_most + (m.chosen & (keys <= key)).to(tl.int32),
        tl.minimum(to.value, tl.where(m.chosen & (keys == key), m.reward, float("inf"))),
        tl.minimum(to.above, tl.where(m.chosen & (keys > key), m.reward, float("inf"))),
    )


@triton.jit
def earliest(to, m, value):
    """The earliest row so far whose reward is ``value``."""
    return tl.minimum(to, tl.where(m.chosen & (m.reward.to(tl.float64) == value), m.rows, to))


# ---- statistics --------------------------------------------------------------------------------------------


@triton.jit
def reward_moments(
    held, group, ddof,
    SQUARES: tl.constexpr, ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``Moments`` of a group; ``SQUARES`` requests the standard deviation.

    Rewards are centred on the smallest one first: rewards near 1000 keep the digits of their differences. Equal
    rewards are detected by comparison: their computed std is rounding error, not 0. Infinite rewards make moments
    infinite or NaN, whatever their place.
    """
    ACC: tl.constexpr = tl.float64
    zeros = tl.zeros([TILE], ACC)
    most = tl.full([TILE], float("inf"), group.sorted.rewards.dtype.element_ty)
    ends = Extremes(most, -most, tl.zeros([TILE], tl.int32))
    ends = over_members(add_extremes, ends, 0, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    low = tl.min(ends.low, 0).to(ACC)
    high = tl.max(ends.high, 0).to(ACC)
    count = tl.sum(ends.size, 0)
    size = tl.maximum(count, 1).to(ACC)
    origin = tl.where(tl.abs(low) < float("inf"), low, 0.0)
    sums = over_members(add_moments, Sums(zeros, zeros), origin, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    magnitude = tl.sum(sums.second, 0)
    mean_above = tl.sum(sums.first, 0) / size
    # A NaN may be missing from minimum and maximum, but not from the sum.
    low = tl.where(magnitude == magnitude, low, magnitude)
    high = tl.where(magnitude == magnitude, high, magnitude)
    differ = (count > 0) & ((low != high) | (tl.abs(low) == float("inf")))
    std = tl.zeros([], ACC)
    if SQUARES:
        spread = high - low
        unit = tl.where(spread > HUGE, SHRINK, tl.where(spread < TINY, GROW, 1.0)).to(ACC)
        back = tl.where(spread > HUGE, GROW, tl.where(spread < TINY, SHRINK, 1.0)).to(ACC)
        x = Centre(origin, mean_above, unit)
        squares = over_members(add_squares, zeros, x, held, group, ORDERED, HAS_LIVE, HELD, TILE)
        freedom = tl.maximum(count - ddof, 1).to(ACC)
        std = tl.where(differ, tl.sqrt(tl.sum(squares, 0) / freedom) * back, 0.0)
    return Moments(count.to(ACC), low, high, origin, mean_above, std, magnitude / size, differ)


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
    rank, held, group, ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr
):
    """The group's rewards of rank ``rank`` and ``rank + 1`` from below, by bisection over all keys: no sort."""
    REWARD: tl.constexpr = group.sorted.rewards.dtype.element_ty
    if tl.float64 == REWARD:
        lower = tl.full([], -0x8000000000000000, tl.int64)
        upper = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        lower = tl.full([], -0x80000000, tl.int32)
        upper = tl.full([], 0x7FFFFFFF, tl.int32)
    zeros = tl.zeros([TILE], tl.int32)
    for _ in range(64 if tl.float64 == REWARD else 32):
        middle = (lower & upper) + ((lower ^ upper) >> 1)
        reached = over_members(count_up_to, zeros, middle, held, group, ORDERED, HAS_LIVE, HELD, TILE)
        enough = tl.sum(reached, 0) > rank
        upper = tl.where(enough, middle, upper)
        lower = tl.where(enough, lower, tl.minimum(middle, upper - 1) + 1)
    most = tl.full([TILE], float("inf"), REWARD)
    found = over_members(
        add_ranked, Ranked(zeros, most, most), upper, held, group, ORDERED, HAS_LIVE, HELD, TILE
    )
    at_most = tl.sum(found.at_most, 0)
    value = tl.min(found.value, 0)
    return value, tl.where(at_most > rank + 1, value, tl.min(found.above, 0))


@triton.jit
def first_with_reward(
    value, held, group, ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr
):
    """The earliest member whose reward is ``value``; the batch size where there is none."""
    none = tl.zeros([TILE], tl.int32) + group.sorted.batch
    return tl.min(over_members(earliest, none, value, held, group, ORDERED, HAS_LIVE, HELD, TILE), 0)


@triton.jit
def group_statistics(
    held, group, batch_record, lengths, settings,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``GroupStatistics`` of a group, for a baseline and a scale."""
    ACC: tl.constexpr = tl.float64
    moments = reward_moments(held, group, settings.ddof, SCALE == STD, ORDERED, HAS_LIVE, HELD, TILE)
    size, low, high, origin, mean_above, std, mean_abs, differ = moments
    raw = RAW and size == 1.0
    scale_size = size  # of the rewards that the scale comes from
    scale_origin = origin
    scale_mean_above = mean_above
    scale = std
    if SCALE == BATCH_STD:
        scale_size = tl.load(batch_record + SIZE)
        scale_origin = tl.load(batch_record + ORIGIN)
        scale_mean_above = tl.load(batch_record + MEAN_ABOVE)
        scale = tl.load(batch_record + BATCH_SCALE)
        differ = tl.load(batch_record + DIFFER) != 0
    elif SCALE == MEAN_ABS:
        scale = mean_abs
    elif SCALE == RANGE:
        scale = high - low
    inv_scale = tl.full([], 1.0, ACC)
    if SCALE != NO_SCALE:
        inv_scale = tl.where(raw, 1.0, tl.where(differ, 1.0 / (scale + settings.eps), 0.0))
    gain = tl.full([], 1.0, ACC)
    if BASELINE == LEAVE_ONE_OUT:
        gain = tl.where(size > 1.0, size / tl.maximum(size - 1.0, 1.0), 0.0)
    below = low
    above = low
    fraction = tl.zeros([], ACC)
    length = tl.zeros([], ACC)
    if BASELINE == BY_LENGTH:
        zeros = tl.zeros([TILE], ACC)
        sums = over_members(
            add_lengths, Sums(zeros, zeros), Sums(lengths, origin), held, group, ORDERED, HAS_LIVE, HELD, TILE
        )
        length = tl.sum(sums.first, 0)
        weighted = tl.sum(sums.second, 0)
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
            at = settings.quantile * tl.maximum(size - 1.0, 0.0).to(settings.quantile.dtype)
            rank = at.to(tl.int32)
            fraction = (at - rank.to(at.dtype)).to(ACC)
        below, above = order_statistics(rank, held, group, ORDERED, HAS_LIVE, HELD, TILE)
        below = tl.where(low == low, below.to(ACC), low)
        above = tl.where(fraction > 0, above.to(ACC), below)
    return GroupStatistics(
        size, low, high, origin, mean_above, below, above, fraction, length, gain, inv_scale, raw,
        scale_size, scale_origin, scale_mean_above, scale,
    )  # fmt: skip
