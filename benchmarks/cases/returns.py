"""Minimum, maximum and soft minimum of the remaining step rewards of a row."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data, copy
from ..registry import register

STEPS = ("rows", "length", "density", "ragged", "layout", "dtype", "steps")


def plain_extremes(rewards: Tensor, mask: Tensor, ends: Tensor, largest: bool) -> Tensor:
    none = -torch.inf if largest else torch.inf
    x = torch.where(ends, rewards, none).flip(1)
    extremes = (x.cummax(1) if largest else x.cummin(1)).values.flip(1)
    return torch.where(mask & extremes.isfinite(), extremes, 0)


def plain_softmin_returns(rewards: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    x = torch.where(ends, -rewards / 0.1, -torch.inf).flip(1)
    returns = -0.1 * x.logcumsumexp(1).flip(1)
    return torch.where(mask & returns.isfinite(), returns, 0)


def plain_softmin_rewards(rewards: Tensor, ends: Tensor) -> Tensor:
    weight = torch.where(ends, -rewards / 0.1, -torch.inf).softmax(1)
    return torch.where(ends, weight * rewards, 0)


def _extremes(d: Data, largest: bool) -> Case:
    rewards, mask, ends, steps, where = d.per_token(), d.mask, d.ends, d.steps, d.where
    op = rewardops.max_returns if largest else rewardops.min_returns
    return d.case(
        lambda r: op(r, steps=steps, **where),
        lambda r: plain_extremes(r, mask, ends, largest),
        (rewards,), 4 * d.numel, gradients=1, floor=None if d.backward else copy(rewards),
    )  # fmt: skip


@register("backward", "long", axes=STEPS)
def min_returns(d: Data) -> Case:
    return _extremes(d, largest=False)


@register(axes=STEPS)
def max_returns(d: Data) -> Case:
    return _extremes(d, largest=True)


@register("backward", axes=STEPS)
def softmin_returns(d: Data) -> Case:
    rewards, mask, ends, steps, where = d.per_token(), d.mask, d.ends, d.steps, d.where
    return d.case(
        lambda r: rewardops.softmin_returns(r, steps=steps, **where),
        lambda r: plain_softmin_returns(r, mask, ends),
        (rewards,), 4 * d.numel, gradients=1,
    )  # fmt: skip


@register("backward", axes=STEPS)
def softmin_rewards(d: Data) -> Case:
    rewards, ends, steps, where = d.per_token(), d.ends, d.steps, d.where
    return d.case(
        lambda r: rewardops.softmin_rewards(r, steps=steps, **where),
        lambda r: plain_softmin_rewards(r, ends),
        (rewards,), 4 * d.numel, gradients=1,
    )  # fmt: skip
