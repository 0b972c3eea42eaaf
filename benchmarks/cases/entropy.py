"""Rewards and weights of tokens and rows from entropy."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data, Groups
from ..registry import register

TOKENS = ("rows", "length", "density", "ragged", "layout", "dtype")
GROUPED = (*TOKENS, "group", "ragged_groups")


def _row_means(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)


def plain_gtpo(rewards: Tensor, entropy: Tensor, mask: Tensor, groups: Groups) -> Tensor:
    right, live = groups.split((rewards > 0)[:, None]), groups.split(mask)
    h = groups.split(entropy)
    weight = torch.where(right, h, 1 / h.clamp(min=1e-2))
    share = []
    for members in (live & right, live & ~right):
        share.append(groups.total(members.float()) * weight / groups.total(weight * members))
    paid = groups.split(rewards[:, None]) + 0.1 * share[0]
    return torch.where(live, torch.where(right, paid, -1 - 0.1 * share[1]), 0).view(entropy.shape)


def plain_grpo_s(rewards: Tensor, entropy: Tensor, mask: Tensor, groups: Groups) -> Tensor:
    live = mask.any(1, keepdim=True)
    return plain_gtpo(rewards, _row_means(entropy, mask)[:, None], live, groups)[:, 0]


def plain_signed(values: Tensor, rewards: Tensor, mask: Tensor, groups: Groups) -> Tensor:
    right = (rewards > 0)[:, None]
    out = torch.zeros_like(values)
    for members in (mask & right, mask & ~right):

        def mean(x: Tensor, members: Tensor = members) -> Tensor:
            total = groups.total(groups.split(torch.where(members, x, 0).sum(1)))
            count = groups.total(groups.split(members.sum(1)))
            rows = groups.split(torch.empty_like(rewards))
            return (total / count.clamp(min=1)).expand_as(rows).reshape(-1, 1)

        centred = torch.where(members, values - mean(values), 0)
        out = out + centred * (mean(centred.square()) + 1e-8).rsqrt()
    return out


def plain_covariance(advantages: Tensor, logprob: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    centred = [x - torch.where(mask, x, 0).sum() / count for x in (advantages, logprob)]
    return torch.where(mask, centred[0] * centred[1], 0)


def plain_unlikeliness(rewards: Tensor, logprob: Tensor, labels: Tensor) -> Tensor:
    """Ranks within groups: a sort by log-probability, then a stable sort by label."""
    order = logprob.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    n = torch.bincount(labels)
    start = n.cumsum(0) - n
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[labels[order]] + 1
    return rewards * (1 - 0.25 * (n[labels] - rank) / n[labels])


@register("backward", axes=GROUPED)
def gtpo_rewards(d: Data) -> Case:
    """The backward variant differentiates in the rewards; the weights have no gradient."""
    rewards, entropy, mask, groups = d.outcomes(), d.per_token(0, 2), d.mask, d.groups
    where, by = d.where, d.by
    return d.case(
        lambda r, h: rewardops.gtpo_rewards(r, h, **by, **where),
        lambda r, h: plain_gtpo(r, h, mask, groups),
        (rewards, entropy), 4 * d.numel, gradients=1, again=(rewards,),
    )  # fmt: skip


@register(axes=GROUPED)
def grpo_s_rewards(d: Data) -> Case:
    rewards, entropy, mask, groups = d.outcomes(), d.per_token(0, 2), d.mask, d.groups
    where, by = d.where, d.by
    return d.case(
        lambda r, h: rewardops.grpo_s_rewards(r, h, **by, **where),
        lambda r, h: plain_grpo_s(r, h, mask, groups),
        (rewards, entropy), 4 * d.rows,
    )  # fmt: skip


@register("backward", axes=GROUPED)
def signed_group_normalize(d: Data) -> Case:
    values, rewards, mask, groups = d.per_token(-1, 1), d.outcomes(), d.mask, d.groups
    where, by = d.where, d.by
    return d.case(
        lambda x, r: rewardops.signed_group_normalize(x, r, **by, **where),
        lambda x, r: plain_signed(x, r, mask, groups),
        (values, rewards), 4 * d.numel, gradients=1,
    )  # fmt: skip


@register(axes=TOKENS)
def entropy_weights(d: Data) -> Case:
    entropy, mask, where = d.per_token(0, 2), d.mask, d.where

    def plain(h: Tensor) -> Tensor:
        h = torch.where(mask, h, 0)
        return h * (mask.sum() / h.sum())

    return d.case(lambda h: rewardops.entropy_weights(h, **where), plain, (entropy,), 4 * d.numel)


@register("backward", axes=TOKENS)
def entropy_bonus(d: Data) -> Case:
    advantages, entropy, mask, where = d.per_token(-1, 1), d.per_token(0, 2), d.mask, d.valid
    return d.case(
        lambda a, h: rewardops.entropy_bonus(a, h, where),
        lambda a, h: torch.where(mask, a + torch.minimum(0.4 * h, a.abs() / 2), 0),
        (advantages, entropy), 4 * d.numel, gradients=1,
    )  # fmt: skip


@register(axes=TOKENS)
def entropy_change(d: Data) -> Case:
    mask, where = d.mask, d.valid
    inputs = (d.per_token(-1, 1), d.per_token(-3, 0), d.per_token(0, 2), d.per_token(), d.per_token(-1, 0))

    def plain(a: Tensor, lp: Tensor, h: Tensor, sq: Tensor, sq_lp: Tensor) -> Tensor:
        return torch.where(mask, a * (sq_lp + h * sq - lp.exp() * (lp + h)), 0)

    return d.case(lambda *x: rewardops.entropy_change(*x, where), plain, inputs, 4 * d.numel)


@register(axes=TOKENS)
def advantage_logprob_cov(d: Data) -> Case:
    advantages, logprob, mask, where = d.per_token(-1, 1), d.per_token(-3, 0), d.mask, d.where
    return d.case(
        lambda a, lp: rewardops.advantage_logprob_cov(a, lp, **where),
        lambda a, lp: plain_covariance(a, lp, mask),
        (advantages, logprob), 4 * d.numel,
    )  # fmt: skip


@register(axes=TOKENS)
def steer_metric(d: Data) -> Case:
    advantages, logprob, entropy, mask = d.per_token(-1, 1), d.per_token(-3, 0), d.per_token(0, 2), d.mask
    where = d.valid
    return d.case(
        lambda a, lp, h: rewardops.steer_metric(a, lp, h, where),
        lambda a, lp, h: torch.where(mask, (a * (1 - lp.exp()) * (lp + h)).abs(), 0),
        (advantages, logprob, entropy), 4 * d.numel,
    )  # fmt: skip


@register(axes=TOKENS)
def steer_weights(d: Data) -> Case:
    metric, mask, where = d.per_token(), d.mask, d.valid

    def plain(x: Tensor) -> Tensor:
        low, high = torch.where(mask, x, torch.inf).amin(), torch.where(mask, x, -torch.inf).amax()
        return torch.where(mask, 1.2 - 0.4 * (x - low) / (high - low), 0)

    return d.case(lambda x: rewardops.steer_weights(x, where), plain, (metric,), 4 * d.numel)


@register(axes=("rows", "group", "ragged_groups"))
def unlikeliness_rewards(d: Data) -> Case:
    rewards, logprob, by, labels = d.outcomes(), d.per_row(), d.by, d.labels
    return d.case(
        lambda r, lp: rewardops.unlikeliness_rewards(r, lp, **by),
        lambda r, lp: plain_unlikeliness(r, lp, labels),
        (rewards, logprob), 4 * d.rows,
    )  # fmt: skip


@register(axes=TOKENS)
def entropy_reward(d: Data) -> Case:
    entropy, mask, where = d.per_token(0, 2), d.mask, d.where
    return d.case(
        lambda h: rewardops.entropy_reward(h, **where),
        lambda h: -_row_means(h, mask),
        (entropy,), 4 * d.rows,
    )  # fmt: skip
