"""Gradients of group advantages on the GPU: a program per group, and one for the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .group_statistics import (
    BATCH_SCALE,
    BATCH_STD,
    BY_LENGTH,
    DIFFER,
    INV_SCALE_GRAD,
    LEAVE_ONE_OUT,
    MEAN,
    MEAN_ABOVE,
    MEAN_ABS,
    NO_BASELINE,
    NO_SCALE,
    ORIGIN,
    QUANTILE,
    RANGE,
    SECOND,
    SIZE,
    VALUES,
    Settings,
    first_with_reward,
    group_statistics,
    reward_moments,
)
from .groups import Group, SortedRows, begins_group, group_from, load_members, over_members
from .launch import unpair


class Upstream(NamedTuple):
    """Gradients that arrive at a row; pointers and sizes."""

    grads: Any  # [parts, B], of the advantages
    numerators: Any
    inv_scales: Any
    batch: Any
    parts: Any


class Arriving(NamedTuple):
    """Sums of upstream gradients, float64."""

    grad: Any  # over the rows whose numerator contains the baseline
    inv_scale: Any  # gradient of the inverse scale; with "batch_std" that of all rows


class Earliest(NamedTuple):
    """The earliest members with these rewards; the batch size where there are none, or they are not needed."""

    lowest: Any
    highest: Any
    below: Any
    above: Any


@triton.jit
def upstream_of(rows, mask, up):
    """The gradients that arrive at the advantages of rows, float64."""
    grad = tl.load(up.grads + rows, mask=mask, other=0.0).to(tl.float64)
    for part in range(1, up.parts):
        grad += tl.load(up.grads + part * up.batch.to(tl.int64) + rows, mask=mask, other=0.0).to(tl.float64)
    return grad


@triton.jit
def add_grads(to, m, up):
    return to + upstream_of(m.rows, m.chosen, up)


@triton.jit
def add_products(to, m, up):
    factor = tl.load(up.numerators + m.rows, mask=m.chosen, other=0.0).to(tl.float64)
    return to + upstream_of(m.rows, m.chosen, up) * factor


@triton.jit
def add_inv_scale_grads(to, m, up):
    return to + tl.load(up.inv_scales + m.rows, mask=m.chosen, other=0.0).to(tl.float64)


@triton.jit
def inv_scale_gradient(
    held, group, up, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of the inverse scale that members share."""
    lanes = tl.zeros([TILE], tl.float64)
    if HAS_GRAD:
        lanes = over_members(add_products, lanes, up, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    if HAS_INV:
        lanes = over_members(add_inv_scale_grads, lanes, up, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    return tl.sum(lanes, 0)


@triton.jit
def write_gradients(
    m, s, at, arriving, up, lengths, ddof, reward_grads, baseline_grads,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, HAS_GRAD: tl.constexpr,
):  # fmt: skip
    """The gradients of the members' rewards, and of their baselines where these are an argument."""
    ACC: tl.constexpr = tl.float64
    kind = reward_grads.dtype.element_ty
    reward = m.reward.to(ACC)
    grad = reward * 0.0
    if HAS_GRAD:
        grad = upstream_of(m.rows, m.chosen, up)
    # Derivatives by the row's reward: of its own numerator, and of the baseline.
    gain = s.gain
    weight = tl.zeros([], ACC)
    if BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT:
        weight = gain / tl.maximum(s.size, 1.0)
    elif BASELINE == BY_LENGTH:
        equal = s.length == 0
        length = tl.load(lengths + m.rows, mask=m.chosen, other=0.0).to(ACC)
        weight = tl.where(equal, 1.0, length) / tl.where(equal, tl.maximum(s.size, 1.0), s.length)
    elif BASELINE != NO_BASELINE and BASELINE != VALUES:
        weight = tl.where(m.rows == at.below, 1.0 - s.fraction, 0.0)
        if BASELINE == QUANTILE:
            weight += tl.where(m.rows == at.above, s.fraction, 0.0)
        weight = tl.where(s.low == s.low, weight, s.low)  # a NaN has no rank
        if BASELINE == SECOND:
            gain = tl.where(m.rows == at.highest, 1.0, 0.0)
    reward_grad = s.inv_scale * (gain * grad - weight * arriving.grad)
    if SCALE != NO_SCALE:
        # d scale / d reward
        if SCALE == RANGE:
            slope = tl.where(m.rows == at.highest, 1.0, 0.0) - tl.where(m.rows == at.lowest, 1.0, 0.0)
        elif SCALE == MEAN_ABS:
            slope = (tl.where(reward > 0, 1.0, 0.0) - tl.where(reward < 0, 1.0, 0.0)) / tl.maximum(
                s.size, 1.0
            )
        else:
            # d std / d r = centred / ((n - ddof) std)
            freedom = tl.maximum(s.scale_size - ddof, 1.0)
            centred = reward - s.scale_origin - s.scale_mean_above
            slope = tl.where(s.scale == 0, 0.0, centred / (freedom * tl.where(s.scale == 0, 1.0, s.scale)))
        reward_grad -= arriving.inv_scale * s.inv_scale * s.inv_scale * slope
    reward_grad = tl.where(m.chosen, tl.where(s.raw, grad, reward_grad), 0.0)
    tl.store(reward_grads + m.rows, reward_grad.to(kind), mask=m.inside)
    if BASELINE == VALUES:
        baseline_grad = tl.where(m.chosen & (s.raw == 0), -s.inv_scale * grad, 0.0)
        tl.store(baseline_grads + m.rows, baseline_grad.to(kind), mask=m.inside)


@triton.jit
def write_group_gradients(
    group, batch_record, lengths, settings, up, reward_grads, baseline_grads,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    held = load_members(group, group.begin, ORDERED, HAS_LIVE, TILE)
    s = group_statistics(
        held, group, batch_record, lengths, settings, BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, HELD, TILE
    )
    lowest = group.sorted.batch
    highest = lowest
    below = lowest
    above = lowest
    if SCALE == RANGE or BASELINE == SECOND:
        highest = first_with_reward(s.high, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    if SCALE == RANGE:
        lowest = first_with_reward(s.low, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    RANKED: tl.constexpr = not (
        BASELINE == MEAN or BASELINE == LEAVE_ONE_OUT or BASELINE == BY_LENGTH or BASELINE == NO_BASELINE
        or BASELINE == VALUES
    )  # fmt: skip
    if RANKED:
        below = first_with_reward(s.below, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    if BASELINE == QUANTILE:
        above = first_with_reward(s.above, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    grad_sum = tl.zeros([], tl.float64)
    if HAS_GRAD:
        if BASELINE == SECOND:
            grad_sum = upstream_of(highest, highest < group.sorted.batch, up)
        elif BASELINE != NO_BASELINE and BASELINE != VALUES:
            lanes = tl.zeros([TILE], tl.float64)
            grad_sum = tl.sum(
                over_members(add_grads, lanes, up, held, group, ORDERED, HAS_LIVE, HELD, TILE), 0
            )
    inv_scale_grad = tl.zeros([], tl.float64)
    if SCALE == BATCH_STD:
        inv_scale_grad = tl.load(batch_record + INV_SCALE_GRAD)
    elif SCALE != NO_SCALE:
        inv_scale_grad = inv_scale_gradient(held, group, up, HAS_GRAD, HAS_INV, ORDERED, HAS_LIVE, HELD, TILE)
    at = Earliest(lowest, highest, below, above)
    arriving = Arriving(grad_sum, inv_scale_grad)
    if HELD:
        write_gradients(
            held, s, at, arriving, up, lengths, settings.ddof, reward_grads, baseline_grads,
            BASELINE, SCALE, HAS_GRAD,
        )  # fmt: skip
    else:
        for start in range(group.begin, group.end, TILE):
            m = load_members(group, start, ORDERED, HAS_LIVE, TILE)
            write_gradients(
                m, s, at, arriving, up, lengths, settings.ddof, reward_grads, baseline_grads,
                BASELINE, SCALE, HAS_GRAD,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "parts", "ddof"])
def group_advantages_backward_kernel(
    grads, inv_scale_grads, rewards, labels, order, live, lengths, numerators, batch_record,
    reward_grads, baseline_grads, batch, parts, quantile_high, quantile_low, eps_high, eps_low, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: the gradients of the group that begins at place p, if one does."""
    begin = tl.program_id(0)
    label = tl.load(labels + begin)
    if begins_group(labels, begin, label):
        settings = Settings(
            unpair(quantile_high, quantile_low, rewards.dtype.element_ty),
            unpair(eps_high, eps_low, tl.float64), ddof,
        )  # fmt: skip
        group = group_from(SortedRows(rewards, labels, order, live, batch, parts), begin, label, FEW, TILE)
        up = Upstream(grads, numerators, inv_scale_grads, batch, parts)
        if group.end - begin <= FEW:
            write_group_gradients(
                group, batch_record, lengths, settings, up, reward_grads, baseline_grads,
                BASELINE, SCALE, RAW, HAS_GRAD, HAS_INV, ORDERED, HAS_LIVE, True, FEW,
            )  # fmt: skip
        else:
            write_group_gradients(
                group, batch_record, lengths, settings, up, reward_grads, baseline_grads,
                BASELINE, SCALE, RAW, HAS_GRAD, HAS_INV, ORDERED, HAS_LIVE, False, TILE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "parts", "ddof"])
def batch_kernel(
    grads, inv_scale_grads, rewards, live, numerators, batch_record, batch, parts, ddof,
    HAS_GRAD: tl.constexpr, HAS_INV: tl.constexpr, HAS_LIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the moments of all rewards, and the gradient of their inverse scale."""
    group = Group(SortedRows(rewards, rewards, rewards, live, batch, parts), batch * 0, batch)
    moments = reward_moments(group, group, ddof, True, False, HAS_LIVE, False, TILE)
    tl.store(batch_record + SIZE, moments.size)
    tl.store(batch_record + ORIGIN, moments.origin)
    tl.store(batch_record + MEAN_ABOVE, moments.mean_above)
    tl.store(batch_record + BATCH_SCALE, moments.std)
    tl.store(batch_record + DIFFER, moments.differ.to(tl.float64))
    if HAS_GRAD or HAS_INV:
        up = Upstream(grads, numerators, inv_scale_grads, batch, parts)
        total = inv_scale_gradient(group, group, up, HAS_GRAD, HAS_INV, False, HAS_LIVE, False, TILE)
        tl.store(batch_record + INV_SCALE_GRAD, total)
