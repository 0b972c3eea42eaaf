"""Discounted sums and temporal differences over the tokens of a row."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from .. import peers
from ..case import Case
from ..data import Data, copy
from ..registry import register

AXES = ("rows", "length", "density", "ragged", "layout", "dtype")
GAMMA, LAM = 0.99, 0.95


def ahead(x: Tensor, mask: Tensor, holes: bool) -> Tensor:
    """The value at the next valid token; 0 after the last."""
    if not holes:
        return torch.nn.functional.pad(torch.where(mask, x, 0)[:, 1:], (0, 1))
    t = x.shape[1]
    place = torch.where(mask, torch.arange(t, device=x.device), t)
    later = place.flip(1).cummin(1).values.flip(1)  # the nearest valid position at or after each token
    later = torch.nn.functional.pad(later[:, 1:], (0, 1), value=t)
    return torch.nn.functional.pad(x, (0, 1)).gather(1, later)


def scan(x: Tensor, a: Tensor) -> Tensor:
    """``y[t] = x[t] + a[t] y[t + 1]`` without a loop over tokens: maps composed over distances 1, 2, 4, ..."""
    step = 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :-step] + a[:, :-step] * x[:, step:], x[:, -step:]], 1)
        a = torch.cat([a[:, :-step] * a[:, step:], a[:, -step:]], 1)
        step *= 2
    return x


def plain_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    x = torch.where(mask, rewards, 0)
    return torch.where(mask, scan(x, torch.where(mask, gamma, 1.0).to(x.dtype)), 0)


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor, holes: bool) -> tuple[Tensor, Tensor]:
    x = torch.where(mask, rewards + GAMMA * ahead(values, mask, holes) - values, 0)
    advantages = scan(x, torch.where(mask, GAMMA * LAM, 1.0).to(x.dtype))
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def plain_vtrace(
    rewards: Tensor, values: Tensor, log_ratio: Tensor, mask: Tensor, holes: bool
) -> tuple[Tensor, Tensor]:
    rho = log_ratio.exp().clamp(max=1)
    x = torch.where(mask, rho * (rewards + GAMMA * ahead(values, mask, holes) - values), 0)
    targets = torch.where(mask, values + scan(x, torch.where(mask, GAMMA * rho, 1)), 0)
    return targets, torch.where(mask, rho * (rewards + GAMMA * ahead(targets, mask, holes) - values), 0)


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over positions, as in trainers."""
    live = mask.to(rewards.dtype)
    following = carry = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        following = live[:, t] * values[:, t] + (1 - live[:, t]) * following
        carry = live[:, t] * (delta + GAMMA * LAM * carry) + (1 - live[:, t]) * carry
        reversed_advantages.append(carry)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return advantages * live, (advantages + values) * live


@register("backward", axes=AXES)
def discounted_returns(d: Data) -> Case:
    rewards, mask, where = d.per_token(-1, 1), d.mask, d.where
    return d.case(
        lambda r: rewardops.discounted_returns(r, gamma=GAMMA, **where),
        lambda r: plain_returns(r, mask, GAMMA),
        (rewards,), 4 * d.numel, gradients=1, again=(),
        peers=peers.discounted_returns(d, GAMMA),
    )  # fmt: skip


@register("backward", "long", axes=AXES)
def gae(d: Data) -> Case:
    rewards, values, mask, holes, where = d.per_token(-0.5, 0.5), d.per_token(), d.mask, d.holes, d.where
    others = peers.gae(d, GAMMA, LAM)
    if d.variant != "long" and not d.backward:
        others["loop over time"] = lambda r, v: loop_gae(r, v, mask)
    return d.case(
        lambda r, v: rewardops.gae(r, v, gamma=GAMMA, lam=LAM, **where),
        lambda r, v: plain_gae(r, v, mask, holes),
        (rewards, values), 8 * d.numel, gradients=2, again=(), peers=others,
        floor=None if d.backward else copy(rewards, values),
    )  # fmt: skip


@register(axes=AXES)
def lambda_returns(d: Data) -> Case:
    rewards, values, mask, holes, where = d.per_token(-0.5, 0.5), d.per_token(), d.mask, d.holes, d.where
    return d.case(
        lambda r, v: rewardops.lambda_returns(r, v, gamma=GAMMA, lam=LAM, **where),
        lambda r, v: plain_gae(r, v, mask, holes)[1],
        (rewards, values), 4 * d.numel, peers=peers.lambda_returns(d, GAMMA, LAM),
    )  # fmt: skip


@register(axes=AXES)
def vtrace(d: Data) -> Case:
    rewards, values, ratio = d.per_token(-0.5, 0.5), d.per_token(), d.per_token(-1, 1)
    mask, holes, where = d.mask, d.holes, d.where
    return d.case(
        lambda r, v, w: rewardops.vtrace(r, v, w, gamma=GAMMA, **where),
        lambda r, v, w: plain_vtrace(r, v, w, mask, holes),
        (rewards, values, ratio), 8 * d.numel, peers=peers.vtrace(d, GAMMA),
    )  # fmt: skip
