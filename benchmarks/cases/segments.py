"""From tokens to steps and back."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data
from ..registry import register

AXES = ("rows", "length", "density", "ragged", "layout", "dtype", "steps")


def _steps(d: Data) -> tuple[Tensor, Tensor, int]:
    """Step ids in the layout of the case and as ``[B, T]``, and the largest number of steps of a row."""
    ends = d.ends
    ids = ends.cumsum(1) - ends.long()
    packed = d.known["steps"] = d.pack(ids)
    return packed, ids, int(ends.sum(1).max())


def plain_sums(values: Tensor, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    valid = torch.where(mask, values, 0)
    return valid.new_zeros(len(valid), steps + 1).scatter_add(1, ids.clamp(max=steps), valid)[:, :steps]


@register("backward", axes=AXES)
def segment_reduce(d: Data) -> Case:
    values, mask, where = d.per_token(), d.mask, d.where
    steps, ids, count = _steps(d)
    return d.case(
        lambda x: rewardops.segment_reduce(x, steps, num_steps=count, **where),
        lambda x: plain_sums(x, ids, mask, count),
        (values,), 4 * d.rows * count, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=AXES)
def segment_broadcast(d: Data) -> Case:
    mask, where = d.mask, d.where
    steps, ids, count = _steps(d)
    return d.case(
        lambda s: rewardops.segment_broadcast(s, steps, **where),
        lambda s: torch.where(mask, s.gather(1, ids.clamp(max=count - 1)), 0),
        (d.uniform(d.rows, count).to(d.dtype),), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register(axes=AXES)
def place_at_step_end(d: Data) -> Case:
    ends, where = d.ends, d.where
    steps, ids, count = _steps(d)
    return d.case(
        lambda s: rewardops.place_at_step_end(s, steps, **where),
        lambda s: torch.where(ends, s.gather(1, ids.clamp(max=count - 1)), 0),
        (d.uniform(d.rows, count).to(d.dtype),), 4 * d.numel,
    )  # fmt: skip


@register("backward", axes=AXES[:-1])
def row_sum(d: Data) -> Case:
    x, mask, where = d.per_token(), d.mask, d.where
    return d.case(
        lambda x: rewardops.row_sum(x, **where),
        lambda x: torch.where(mask, x, 0).sum(1),
        (x,), 4 * d.rows, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=AXES[:-1])
def running_sum(d: Data) -> Case:
    x, mask, where = d.per_token(), d.mask, d.where
    return d.case(
        lambda x: rewardops.running_sum(x, **where),
        lambda x: torch.where(mask, torch.where(mask, x, 0).cumsum(1), 0),
        (x,), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=AXES[:-1])
def running_mean(d: Data) -> Case:
    x, mask, where = d.per_token(), d.mask, d.where
    return d.case(
        lambda x: rewardops.running_mean(x, **where),
        lambda x: torch.where(mask, torch.where(mask, x, 0).cumsum(1) / mask.cumsum(1).clamp(min=1), 0),
        (x,), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=AXES[:-1])
def row_mean(d: Data) -> Case:
    x, mask, where = d.per_token(), d.mask, d.where
    return d.case(
        lambda x: rewardops.row_mean(x, **where),
        lambda x: torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1),
        (x,), 4 * d.rows, gradients=1, again=(),
    )  # fmt: skip
