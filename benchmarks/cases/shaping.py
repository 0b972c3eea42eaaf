"""Step rewards from values, outcomes distributed over tokens, thinking budgets."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data, Groups
from ..registry import register
from .td import ahead

AXES = ("rows", "length", "density", "ragged", "layout", "dtype")
STEPS = (*AXES, "steps")


def plain_progress(values: Tensor, ends: Tensor) -> Tensor:
    at = torch.where(ends, torch.arange(values.shape[1], device=values.device), -1).cummax(1).values
    before = torch.nn.functional.pad(at[:, :-1], (1, 0), value=-1)
    earlier = torch.where(before >= 0, values.gather(1, before.clamp(min=0)), 0)
    return torch.where(ends, values - earlier, 0)


def plain_redistribute(outcome: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    w = torch.where(mask, weights, 0)
    last = torch.where(mask, torch.arange(w.shape[1], device=w.device), -1).amax(1, keepdim=True)
    spread = w * (0.8 * outcome / w.sum(1).clamp(min=1e-30))[:, None]
    rest = torch.where(last >= 0, 0.2 * outcome[:, None], 0)
    return spread.scatter_add(1, last.clamp(min=0), rest)


def plain_budget_returns(scores: Tensor) -> Tensor:
    return scores.flip(1).cumsum(1).flip(1) / scores.shape[1]


def plain_budget_advantages(scores: Tensor, groups: Groups) -> Tensor:
    count = scores.shape[1]
    returns = groups.split(plain_budget_returns(scores))
    group = (groups.total(returns) / groups.total(torch.ones_like(returns[..., :1]))).expand_as(returns)
    j = torch.arange(count, device=scores.device)
    w = 2.0**j
    before = (scores * w).cumsum(1) - scores * w
    history = before / (w.cumsum(0) - w).clamp(min=1e-30) * (1 - j / count)
    return returns.reshape(scores.shape) - (j * history + (count - j) * group.reshape(scores.shape)) / count


@register("backward", axes=STEPS)
def step_progress(d: Data) -> Case:
    values, ends, steps, where = d.per_token(), d.ends, d.steps, d.where
    return d.case(
        lambda q: rewardops.step_progress(q, steps, **where),
        lambda q: plain_progress(q, ends),
        (values,), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register(axes=STEPS)
def clip_delta_rewards(d: Data) -> Case:
    rewards, ends, steps, where = d.per_token(-1, 1), d.ends, d.steps, d.where

    def plain(r: Tensor) -> Tensor:
        later = ends.flip(1).cumsum(1).flip(1) - ends.long() > 0  # another step end follows
        clipped = torch.where(ends & later, r.clamp(max=0), 0)
        return torch.where(ends, clipped - ahead(clipped, ends, True), 0)

    return d.case(lambda r: rewardops.clip_delta_rewards(r, steps, **where), plain, (rewards,), 4 * d.numel)


@register("backward", axes=AXES)
def redistribute_outcome(d: Data) -> Case:
    outcome, weights, mask, where = d.per_row(), d.per_token(), d.mask, d.where
    return d.case(
        lambda r, w: rewardops.redistribute_outcome(r, w, share=0.8, **where),
        lambda r, w: plain_redistribute(r, w, mask),
        (outcome, weights), 4 * d.numel, gradients=2,
    )  # fmt: skip


@register("backward", axes=AXES)
def potential_shaping(d: Data) -> Case:
    rewards, potential, mask, holes, where = d.per_token(-1, 1), d.per_token(), d.mask, d.holes, d.where
    return d.case(
        lambda r, p: rewardops.potential_shaping(r, p, gamma=0.99, **where),
        lambda r, p: torch.where(mask, r + 0.99 * ahead(p, mask, holes) - p, 0),
        (rewards, potential), 4 * d.numel, gradients=2, again=(),
    )  # fmt: skip


BUDGETS = 8


@register(axes=("rows",))
def budget_returns(d: Data) -> Case:
    scores = d.uniform(d.rows, BUDGETS)
    return d.case(rewardops.budget_returns, plain_budget_returns, (scores,), 4 * scores.numel())


@register(axes=("rows", "group", "ragged_groups"))
def budget_advantages(d: Data) -> Case:
    scores, by, groups = d.uniform(d.rows, BUDGETS), d.by, d.groups
    return d.case(
        lambda s: rewardops.budget_advantages(s, **by),
        lambda s: plain_budget_advantages(s, groups),
        (scores,), 4 * scores.numel(),
    )  # fmt: skip
