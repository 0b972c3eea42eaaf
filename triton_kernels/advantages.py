"""Group-relative advantages on the GPU: places and lives of rows, a program per group, and a write of the tokens.

Memory traffic: the mask until a row's first valid token, members once (large groups: once per statistic, from the
cache), the mask and one write per token. Backward: gradients and mask of the tokens once, then the same per group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.advantages import BASELINES, SCALES, AdvantagesArgs
from .advantages_tokens import (
    BLOCK,
    LIVES,
    NOTHING,
    ROWS_AT_ONCE,
    SUMS,
    prepare_kernel,
    spread_kernel,
)
from .group_statistics import (
    BATCH_RECORD,
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
from .groups import ROWS, Group, SortedRows, end_of_group, load_members, over_members
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits, unpair
from .rows import Rows, as_bytes, dense, output, stride

# Members of a group that are read once and held, and members that are read at once of a larger group.
HELD = 16 if INTERPRETED else 64
TILE = 64 if INTERPRETED else 256
# Rows from which on a sort costs less than placing each among all.
SORTED = 100 if INTERPRETED else 8192


class Outputs(NamedTuple):
    """What a group's program reads and writes per row; pointers."""

    baselines: Any
    advantages: Any
    inv_scales: Any
    numerators: Any


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


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit
def numerator(reward, baseline, s, best, BASELINE: tl.constexpr):
    """Reward minus baseline, from the group's statistics ``s``; ``best``: rows that are the first of highest reward."""
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


@triton.jit
def write_members(m, s, best, out, BASELINE: tl.constexpr):
    kind = out.numerators.dtype.element_ty
    reward = m.reward.to(tl.float64)
    baseline = reward
    if BASELINE == VALUES:
        baseline = tl.load(out.baselines + m.rows, mask=m.chosen, other=0.0).to(tl.float64)
    value = tl.where(m.chosen, numerator(reward, baseline, s, m.rows == best, BASELINE), 0.0)
    inv_scale = tl.where(m.chosen, s.inv_scale, 0.0)
    tl.store(out.inv_scales + m.rows, inv_scale.to(kind), mask=m.inside)
    tl.store(out.numerators + m.rows, value.to(kind), mask=m.inside)
    # No negative zeros. Rows that are no members have 0 times 0.
    tl.store(out.advantages + m.rows, (value * inv_scale + 0.0).to(kind), mask=m.inside)


@triton.jit
def write_group(
    group, batch_record, lengths, settings, out,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    held = load_members(group, group.begin, ORDERED, HAS_LIVE, TILE)
    s = group_statistics(
        held, group, batch_record, lengths, settings, BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, HELD, TILE
    )
    best = group.sorted.batch
    if BASELINE == SECOND:
        best = first_with_reward(s.high, held, group, ORDERED, HAS_LIVE, HELD, TILE)
    if HELD:
        write_members(held, s, best, out, BASELINE)
    else:
        for start in range(group.begin, group.end, TILE):
            write_members(load_members(group, start, ORDERED, HAS_LIVE, TILE), s, best, out, BASELINE)


@triton.jit(do_not_specialize=["batch", "parts", "ddof"])
def group_advantages_kernel(
    rewards, labels, order, live, baselines, lengths, batch_record, advantages, inv_scales, numerators,
    batch, parts, quantile_high, quantile_low, eps_high, eps_low, ddof,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: the group that begins at place p, if one does."""
    begin = tl.program_id(0)
    label = tl.load(labels + begin)
    if label != tl.load(labels + begin - 1, mask=begin > 0, other=~label):
        settings = Settings(
            unpair(quantile_high, quantile_low, rewards.dtype.element_ty),
            unpair(eps_high, eps_low, tl.float64), ddof,
        )  # fmt: skip
        end = end_of_group(labels, begin, label, batch, HELD, TILE)
        group = Group(SortedRows(rewards, labels, order, live, batch, parts), begin, end)
        out = Outputs(baselines, advantages, inv_scales, numerators)
        if end - begin <= HELD:
            write_group(
                group, batch_record, lengths, settings, out, BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, True, HELD
            )
        else:
            write_group(
                group, batch_record, lengths, settings, out, BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, False, TILE
            )


# ---- backward ----------------------------------------------------------------------------------------------


@triton.jit
def upstream_of(rows, mask, up):
    """The gradients that arrive at the advantages of rows, float64."""
    grad = tl.load(up.grads + rows, mask=mask, other=0.0).to(tl.float64)
    for part in range(1, up.parts):
        grad += tl.load(up.grads + part.to(tl.int64) * up.batch + rows, mask=mask, other=0.0).to(tl.float64)
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
            slope = (tl.where(reward > 0, 1.0, 0.0) - tl.where(reward < 0, 1.0, 0.0)) / tl.maximum(s.size, 1.0)
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
            grad_sum = tl.sum(over_members(add_grads, lanes, up, held, group, ORDERED, HAS_LIVE, HELD, TILE), 0)
    inv_scale_grad = tl.zeros([], tl.float64)
    if SCALE == BATCH_STD:
        inv_scale_grad = tl.load(batch_record + INV_SCALE_GRAD)
    elif SCALE != NO_SCALE:
        inv_scale_grad = inv_scale_gradient(
            held, group, up, HAS_GRAD, HAS_INV, ORDERED, HAS_LIVE, HELD, TILE
        )
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
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: the gradients of the group that begins at place p, if one does."""
    begin = tl.program_id(0)
    label = tl.load(labels + begin)
    if label != tl.load(labels + begin - 1, mask=begin > 0, other=~label):
        settings = Settings(
            unpair(quantile_high, quantile_low, rewards.dtype.element_ty),
            unpair(eps_high, eps_low, tl.float64), ddof,
        )  # fmt: skip
        end = end_of_group(labels, begin, label, batch, HELD, TILE)
        group = Group(SortedRows(rewards, labels, order, live, batch, parts), begin, end)
        up = Upstream(grads, numerators, inv_scale_grads, batch, parts)
        if end - begin <= HELD:
            write_group_gradients(
                group, batch_record, lengths, settings, up, reward_grads, baseline_grads,
                BASELINE, SCALE, RAW, HAS_GRAD, HAS_INV, ORDERED, HAS_LIVE, True, HELD,
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


# ---- launch ------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What the programs of groups read: sorted rows, rows with a token, sums of the gradients of tokens."""

    labels: Tensor
    order: Tensor | None  # None: rows are sorted
    live: Tensor | None  # None: all rows are members
    sums: Tensor | None
    parts: int


def _is_relative(a: AdvantagesArgs) -> bool:
    """Whether advantages depend on the group."""
    return a.raw or a.scale != "none" or a.baseline not in ("none", "values")


def _rows(a: AdvantagesArgs) -> Rows:
    """The rows of tokens, or rows without a token where advantages are per row."""
    if a.token_shape is None:
        return Rows(a.rewards.shape[0], 0, 0, False, a.rewards)
    return Rows.of(a.token_shape, a.cu_seqlens, a.rewards)


def _aligned(rows: Rows, *tokens: Tensor | None) -> bool:
    """Whether rows of these tensors begin and end at multiples of 16 bytes, and of 4 bytes of a mask."""
    given = [t for t in tokens if t is not None]
    bytes_of = [(t.data_ptr() | stride(t) * t.element_size() | rows.width * t.element_size(), 4 if t.element_size() == 1 else 16) for t in given]
    return not rows.packed and all(place % unit == 0 for place, unit in bytes_of)


def _prepare(a: AdvantagesArgs, rows: Rows, grad: Tensor | None, mask: Tensor | None, lives: bool) -> Prepared:
    """One launch, where anything is to do; a sort before it for many rows in any order."""
    labels, order, ranked, batch = a.groups.contiguous(), None, 0, rows.batch
    if not a.contiguous and _is_relative(a):
        if batch > SORTED:
            labels, order = labels.sort(stable=True)
        elif batch > 1:
            ranked, order, sorted_labels = cdiv(batch, ROWS.value), torch.empty_like(labels), torch.empty_like(labels)
    kind, parts, programs, live, sums = NOTHING, 1, 0, None, None
    if a.token_shape is not None and grad is not None:
        kind, programs = SUMS, batch
        parts = splits(a.rewards, batch, max(1, cdiv(rows.width, BLOCK)))
        live, sums = (a.rewards.new_empty((parts, batch), dtype=d) for d in (torch.uint8, torch.float64))
    elif a.token_shape is not None and lives:
        kind, programs = LIVES, cdiv(batch, ROWS_AT_ONCE)
        live = a.rewards.new_empty((1, batch), dtype=torch.uint8)
    if ranked or programs:
        prepare_kernel[(ranked + programs, parts)](
            labels, pointer(order, labels), sorted_labels if ranked else labels, pointer(grad, a.rewards),
            pointer(mask, labels), rows.cu, pointer(live, labels), pointer(sums, a.rewards), batch, ranked,
            stride(mask), stride(grad) if programs else 0, rows.width, rows.total, parts,
            KIND=kind, PACKED=rows.packed, HAS_MASK=mask is not None,
            ALIGNED=_aligned(rows, grad if kind == SUMS else None, mask), BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return Prepared(sorted_labels if ranked else labels, order, live, sums, parts)


def _options(a: AdvantagesArgs, p: Prepared) -> dict[str, Any]:
    """Keyword arguments of both directions."""
    return {
        "BASELINE": BASELINES.index(a.baseline), "SCALE": SCALES.index(a.scale), "RAW": a.raw,
        "ORDERED": p.order is not None, "HAS_LIVE": p.live is not None, "HELD": HELD, "TILE": TILE,
        "num_warps": 1, **BITS,
    }  # fmt: skip


def _batch_record(
    a: AdvantagesArgs, p: Prepared, grads: Tensor | None, inv_scale_grads: Tensor | None, numerators: Tensor | None
) -> Tensor:
    """The moments of the batch, for "batch_std"; else any tensor."""
    rewards = a.rewards.contiguous()
    if a.scale != "batch_std":
        return rewards
    record = rewards.new_empty(BATCH_RECORD, dtype=torch.float64)
    batch_kernel[(1,)](
        pointer(grads, rewards), pointer(inv_scale_grads, rewards), rewards, pointer(p.live, rewards),
        pointer(numerators, rewards), record, rewards.shape[0], p.parts, a.ddof,
        HAS_GRAD=grads is not None, HAS_INV=inv_scale_grads is not None, HAS_LIVE=p.live is not None, TILE=TILE,
        **BITS,
    )  # fmt: skip
    return record


def group_advantages(a: AdvantagesArgs) -> tuple[Tensor, Tensor, Tensor]:
    rewards, rows, tokens = a.rewards.contiguous(), _rows(a), a.token_shape is not None
    values, lengths = (None if t is None else t.contiguous() for t in (a.baseline_values, a.lengths))
    per_row, inv_scale, numerators = (rewards.new_empty(rewards.shape) for _ in range(3))
    mask = as_bytes(a.mask)
    out = per_row if a.token_shape is None else rewards.new_empty(a.token_shape)
    if rows.batch == 0:
        return out.zero_(), inv_scale, numerators
    alone = tokens and not _is_relative(a)
    if not alone:
        p = _prepare(a, rows, None, mask, True)
        group_advantages_kernel[(rows.batch,)](
            rewards, p.labels, pointer(p.order, p.labels), pointer(p.live, rewards), pointer(values, rewards),
            pointer(lengths, rewards), _batch_record(a, p, None, None, None), per_row, inv_scale, numerators,
            rows.batch, p.parts, *pair(a.quantile), *pair(a.eps), a.ddof, **_options(a, p),
        )  # fmt: skip
    if tokens:
        parts = splits(rewards, rows.batch, max(1, cdiv(rows.width, BLOCK)))
        spread_kernel[(rows.batch, parts)](
            rewards if alone else per_row, pointer(values, rewards), pointer(mask, rewards), rows.cu, out,
            inv_scale, numerators, rows.batch, stride(mask), rows.width, rows.total, stride(out), parts,
            ALONE=alone, HAS_VALUES=values is not None, PACKED=rows.packed, HAS_MASK=mask is not None,
            ALIGNED=_aligned(rows, out, mask), BLOCK=BLOCK, **BITS,
        )  # fmt: skip
    return out, inv_scale, numerators


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    a: AdvantagesArgs,
) -> tuple[Tensor, Tensor]:
    rewards, rows, tokens = a.rewards.contiguous(), _rows(a), a.token_shape is not None
    lengths = None if a.lengths is None else a.lengths.contiguous()
    out = rewards.new_empty(rewards.shape)
    baseline_grads = rewards.new_empty(0 if a.baseline_values is None else rewards.shape)
    if rows.batch == 0:
        return out, baseline_grads
    grad = None if grad is None else dense(grad) if tokens else grad.contiguous()
    p = _prepare(a, rows, grad, as_bytes(a.mask), True)
    grads = p.sums if tokens else grad
    inv_scale_grads, numerators = None if grad_inv_scale is None else grad_inv_scale.contiguous(), numerator.contiguous()
    group_advantages_backward_kernel[(rows.batch,)](
        pointer(grads, rewards), pointer(inv_scale_grads, rewards), rewards, p.labels, pointer(p.order, p.labels),
        pointer(p.live, rewards), pointer(lengths, rewards), numerators,
        _batch_record(a, p, grads, inv_scale_grads, numerators), out, baseline_grads,
        rows.batch, p.parts, *pair(a.quantile), *pair(a.eps), a.ddof,
        HAS_GRAD=grads is not None, HAS_INV=inv_scale_grads is not None, **_options(a, p),
    )  # fmt: skip
    return out, baseline_grads
