"""Trees given by their parents."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from ..case import Case
from ..data import Data
from ..registry import register

AXES = ("rows",)
WIDER = (1, 4, 16, 64)  # nodes per tree at each depth


def _trees(d: Data) -> tuple[Tensor, Tensor, list[slice]]:
    """A search tree per row with nodes ordered by depth: parents, rewards, and the node range of each depth."""
    parts, levels = [torch.full((d.sizes.rows,), -1, device=d.device)], [slice(0, d.sizes.rows)]
    for wider in WIDER[1:]:
        before = levels[-1]
        parts.append(d.ids(before.stop - before.start, d.sizes.rows * wider) + before.start)
        levels.append(slice(before.stop, before.stop + len(parts[-1])))
    parent = torch.cat(parts)
    return parent, d.uniform(len(parent)), levels


def plain_values(parent: Tensor, rewards: Tensor, levels: list[slice]) -> Tensor:
    """Values depth by depth, from the leaves up."""
    values = [rewards[level] for level in levels]
    for k in range(len(levels) - 1, 0, -1):
        place = parent[levels[k]] - levels[k - 1].start
        above = values[k - 1]
        total = torch.zeros_like(above).index_add(0, place, values[k])
        count = torch.zeros_like(above).index_add(0, place, torch.ones_like(values[k]))
        values[k - 1] = torch.where(count > 0, total / count.clamp(min=1), above)
    return torch.cat(values)


def plain_advantages(parent: Tensor, rewards: Tensor, levels: list[slice]) -> Tensor:
    values = plain_values(parent, rewards, levels)
    return torch.where(parent >= 0, values - values[parent], 0)


@register("backward", axes=AXES)
def tree_values(d: Data) -> Case:
    parent, rewards, levels = _trees(d)
    return d.case(
        lambda r, p: rewardops.tree_values(p, r, max_depth=len(levels) - 1),
        lambda r, p: plain_values(p, r, levels),
        (rewards, parent), 4 * len(parent), gradients=1, again=(parent,),
    )  # fmt: skip


@register(axes=AXES)
def tree_advantages(d: Data) -> Case:
    parent, rewards, levels = _trees(d)
    return d.case(
        lambda r, p: rewardops.tree_advantages(p, r, max_depth=len(levels) - 1),
        lambda r, p: plain_advantages(p, r, levels),
        (rewards, parent), 4 * len(parent),
    )  # fmt: skip
