"""Advantages relative to a group, and whitening."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rewardops

from .. import peers
from ..case import Case
from ..data import Data, Groups
from ..registry import register

AXES = ("rows", "length", "density", "ragged", "layout")


def plain_group_advantages(rewards: Tensor, groups: Groups) -> Tensor:
    r = groups.split(rewards)
    n = groups.total(torch.ones_like(r))
    centred = r - groups.total(r) / n
    std = (groups.total(centred.square()) / (n - 1)).sqrt()
    return (centred / (std + 1e-6)).view(-1)


def loop_group_advantages(rewards: Tensor, mask: Tensor, labels: list[int]) -> Tensor:
    """GRPO as in trainers: scores gathered by label, a loop over samples."""
    members: dict[int, list[Tensor]] = {}
    scores = rewards.clone()
    for b, label in enumerate(labels):
        members.setdefault(label, []).append(scores[b])
    mean = {label: torch.stack(ones).mean() for label, ones in members.items()}
    std = {label: torch.stack(ones).std() for label, ones in members.items()}
    for b, label in enumerate(labels):
        scores[b] = (scores[b] - mean[label]) / (std[label] + 1e-6)
    return scores[:, None] * mask


def plain_whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    centred = torch.where(mask, x - mean, 0)
    return centred * (centred.square().sum() / (count - 1) + 1e-8).rsqrt()


def multiply(rows: int, length: int, device: torch.device) -> tuple[str, Callable[[], Tensor]]:
    """A product of two float32 tensors ``[rows, length]`` written to a third."""
    x, y = (torch.rand(rows, length, dtype=torch.float32, device=device) for _ in range(2))
    return "torch.mul [B, T]", lambda: torch.mul(x, y)


@register("backward", axes=(*AXES, "group", "ragged_groups"))
def group_advantages(d: Data) -> Case:
    rewards, mask, groups, labels = d.per_row(), d.mask, d.groups, d.labels.tolist()
    where, by = d.where, d.by
    if d.packed:
        where = {**where, "num_tokens": d.numel}
    others = peers.group_advantages(d)
    if not d.backward:  # the loop writes in place
        others["loop over samples"] = lambda r: loop_group_advantages(r, mask, labels)
    return d.case(
        lambda r: rewardops.group_advantages(r, **by, **where),
        lambda r: plain_group_advantages(r, groups)[:, None] * mask,
        (rewards,), 4 * d.numel, gradients=1, peers=others,
        floor=None if d.backward else multiply(d.rows, d.sizes.length, d.device),
    )  # fmt: skip


@register("backward", axes=AXES)
def advantages_to_tokens(d: Data) -> Case:
    advantages, mask, where = d.per_row(), d.mask, d.where
    if d.packed:
        where = {**where, "num_tokens": d.numel}
    return d.case(
        lambda a: rewardops.advantages_to_tokens(a, **where),
        lambda a: torch.where(mask, a[:, None], 0),
        (advantages,), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=(*AXES, "dtype"))
def whiten(d: Data) -> Case:
    values, mask, where = d.per_token(), d.mask, d.valid
    return d.case(
        lambda x: rewardops.whiten(x, where),
        lambda x: plain_whiten(x, mask),
        (values,), 4 * d.numel, gradients=1, peers=peers.whiten(d),
    )  # fmt: skip
