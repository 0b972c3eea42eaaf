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
from .advantages_backward import batch_kernel, group_advantages_backward_kernel
from .advantages_tokens import (
    BLOCK,
    LIVES,
    NOTHING,
    SUMS,
    Prepared,
    prepare_rows,
    spread_kernel,
    whole_lines,
)
from .group_statistics import (
    BATCH_RECORD,
    BY_LENGTH,
    LEAVE_ONE_OUT,
    MEAN,
    NO_BASELINE,
    SECOND,
    VALUES,
    Settings,
    first_with_reward,
    group_statistics,
)
from .groups import SortedRows, begins_group, group_from, load_members
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits, unpair
from .rows import Rows, as_bytes, dense, stride

# Rows of a group that are read once and held, and rows that are read at once of a larger group.
FEW = 16 if INTERPRETED else 64
TILE = 64 if INTERPRETED else 256
BATCH_TILE = 64 if INTERPRETED else 1024  # rows that the program of the batch reads at once


class Outputs(NamedTuple):
    """What a group's program reads and writes per row; pointers."""

    baselines: Any
    advantages: Any
    inv_scales: Any
    numerators: Any


@triton.jit
def numerator(reward, baseline, s, best, BASELINE: tl.constexpr):
    """Reward minus baseline, from the group's statistics ``s``; ``best``: the first of highest reward."""
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
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: the group that begins at place p, if one does."""
    begin = tl.program_id(0)
    label = tl.load(labels + begin)
    if begins_group(labels, begin, label):
        settings = Settings(
            unpair(quantile_high, quantile_low, rewards.dtype.element_ty),
            unpair(eps_high, eps_low, tl.float64), ddof,
        )  # fmt: skip
        group = group_from(SortedRows(rewards, labels, order, live, batch, parts), begin, label, FEW, TILE)
        out = Outputs(baselines, advantages, inv_scales, numerators)
        if group.end - begin <= FEW:
            write_group(
                group, batch_record, lengths, settings, out,
                BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, True, FEW,
            )  # fmt: skip
        else:
            write_group(
                group, batch_record, lengths, settings, out,
                BASELINE, SCALE, RAW, ORDERED, HAS_LIVE, False, TILE,
            )  # fmt: skip


# ---- launch ------------------------------------------------------------------------------------------------


def _is_relative(a: AdvantagesArgs) -> bool:
    """Whether advantages depend on the group."""
    return a.raw or a.scale != "none" or a.baseline not in ("none", "values")


def _rows(a: AdvantagesArgs) -> Rows:
    """The rows of tokens, or rows without a token where advantages are per row."""
    if a.token_shape is None:
        return Rows(a.rewards.shape[0], 0, 0, False, a.rewards)
    return Rows.of(a.token_shape, a.cu_seqlens, a.rewards)


def _prepare(a: AdvantagesArgs, rows: Rows, grad: Tensor | None, mask: Tensor | None) -> Prepared:
    kind = NOTHING if a.token_shape is None else LIVES if grad is None else SUMS
    return prepare_rows(
        a.groups, a.rewards, rows, grad, mask, sort=_is_relative(a) and not a.contiguous, kind=kind
    )


def _options(a: AdvantagesArgs, p: Prepared) -> dict[str, Any]:
    """Keyword arguments of both directions."""
    return {
        "BASELINE": BASELINES.index(a.baseline), "SCALE": SCALES.index(a.scale), "RAW": a.raw,
        "ORDERED": p.order is not None, "HAS_LIVE": p.live is not None, "FEW": FEW, "TILE": TILE,
        "num_warps": 1,
    }  # fmt: skip


def _batch_record(
    a: AdvantagesArgs, p: Prepared, grads: Tensor | None, inv_grads: Tensor | None, numerators: Tensor | None
) -> Tensor:
    """The moments of the batch, for "batch_std"; else any tensor."""
    rewards = a.rewards.contiguous()
    if a.scale != "batch_std":
        return rewards
    record = rewards.new_empty(BATCH_RECORD, dtype=torch.float64)
    batch_kernel[(1,)](
        pointer(grads, rewards), pointer(inv_grads, rewards), rewards, pointer(p.live, rewards),
        pointer(numerators, rewards), record, rewards.shape[0], p.parts, a.ddof,
        HAS_GRAD=grads is not None, HAS_INV=inv_grads is not None, HAS_LIVE=p.live is not None, TILE=BATCH_TILE,
        num_warps=8, **BITS,
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
        p = _prepare(a, rows, None, mask)
        group_advantages_kernel[(rows.batch,)](
            rewards, p.labels, pointer(p.order, p.labels), pointer(p.live, rewards), pointer(values, rewards),
            pointer(lengths, rewards), _batch_record(a, p, None, None, None), per_row, inv_scale, numerators,
            rows.batch, p.parts, *pair(a.quantile), *pair(a.eps), a.ddof, **_options(a, p), **BITS,
        )  # fmt: skip
    if tokens and not alone and not rows.packed and rows.width == 1:
        out = per_row[:, None]  # a row's only token has its advantage, or is no member
    elif tokens:
        parts = splits(rewards, rows.batch, max(1, cdiv(rows.width, BLOCK)))
        spread_kernel[(rows.batch, parts)](
            rewards if alone else per_row, pointer(values, rewards), pointer(mask, rewards), rows.cu, out,
            inv_scale, numerators, rows.batch, stride(mask), rows.width, rows.total, stride(out), parts,
            ALONE=alone, HAS_VALUES=values is not None, PACKED=rows.packed, HAS_MASK=mask is not None,
            ALIGNED=whole_lines(rows, out, mask), BLOCK=BLOCK, **BITS,
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
    p = _prepare(a, rows, grad, as_bytes(a.mask))
    grads = p.sums if tokens else grad
    numerators = numerator.contiguous()
    inv_scale_grads = None if grad_inv_scale is None else grad_inv_scale.contiguous()
    group_advantages_backward_kernel[(rows.batch,)](
        pointer(grads, rewards), pointer(inv_scale_grads, rewards), rewards, p.labels, pointer(p.order, p.labels),
        pointer(p.live, rewards), pointer(lengths, rewards), numerators,
        _batch_record(a, p, grads, inv_scale_grads, numerators), out, baseline_grads,
        rows.batch, p.parts, *pair(a.quantile), *pair(a.eps), a.ddof,
        HAS_GRAD=grads is not None, HAS_INV=inv_scale_grads is not None, **_options(a, p), **BITS,
    )  # fmt: skip
    return out, baseline_grads
