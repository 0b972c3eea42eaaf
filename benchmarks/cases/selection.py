"""Masks of an exact fraction of the tokens: highest entropy, highest covariance, or a random draw from a band."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data
from ..registry import register

AXES = ("rows", "length", "density", "ragged", "layout", "dtype")


def plain_largest(x: Tensor, mask: Tensor, count: int) -> Tensor:
    flat = x.masked_fill(~mask, -torch.inf).flatten()
    out = torch.zeros_like(flat, dtype=torch.bool)
    out[flat.topk(count, sorted=False).indices] = True
    return out.view(mask.shape)


def plain_largest_of_groups(x: Tensor, mask: Tensor, groups: int) -> Tensor:
    """A sort per group, as the number of valid tokens differs."""
    x, m = x.view(groups, -1), mask.view(groups, -1)
    order = x.masked_fill(~m, -torch.inf).argsort(1, descending=True)
    wanted = (0.2 * m.sum(1, keepdim=True) + 0.5).floor().clamp(min=1)
    first = torch.arange(x.shape[1], device=x.device) < wanted
    return torch.zeros_like(m).scatter_(1, order, first).view(mask.shape)


@register(axes=AXES)
def high_entropy_mask(d: Data) -> Case:
    """The plain formula reads the number of valid tokens back to the host, as trainers do."""
    entropy, mask, where = d.per_token(0, 2), d.mask, d.where
    return d.case(
        lambda h: rewardops.high_entropy_mask(h, **where),
        lambda h: plain_largest(h, mask, int(0.2 * int(mask.sum()) + 0.5)),
        (entropy,), d.numel,
    )  # fmt: skip


@register(op="high_entropy_mask", axes=(*AXES, "group"))
def high_entropy_mask_groups(d: Data) -> Case:
    entropy, mask, where, groups = d.per_token(0, 2), d.mask, d.where, d.rows // d.sizes.group
    return d.case(
        lambda h: rewardops.high_entropy_mask(h, scope="group", group_size=d.sizes.group, **where),
        lambda h: plain_largest_of_groups(h, mask, groups),
        (entropy,), d.numel,
    )  # fmt: skip


@register(axes=AXES)
def kl_cov_mask(d: Data) -> Case:
    cov, mask, where = d.per_token(-6, 6), d.mask, d.where
    return d.case(
        lambda x: rewardops.kl_cov_mask(x, **where),
        lambda x: plain_largest(x, mask, max(int(2e-4 * int(mask.sum())), 1)),
        (cov,), d.numel,
    )  # fmt: skip


@register(axes=AXES)
def clip_cov_mask(d: Data) -> Case:
    """A random draw: each variant draws different tokens."""
    cov, mask, where = d.per_token(-6, 6), d.mask, d.where

    def plain(x: Tensor) -> Tensor:
        """The authors' code: the positions of the band, shuffled."""
        count = max(int(2e-4 * int(mask.sum())), 1)
        places = (mask & (x > 1) & (x < 5)).nonzero()
        chosen = places[torch.randperm(len(places), device=x.device)[:count]]
        out = torch.zeros_like(mask)
        out[chosen[:, 0], chosen[:, 1]] = True
        return out

    return d.case(lambda x: rewardops.clip_cov_mask(x, **where), plain, (cov,), d.numel, compared=False)
