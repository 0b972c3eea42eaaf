"""Selection, the specification (see :mod:`rewardops.selection`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, IdRows, Offsets, RealTokens
from ..core.rows import from_rows, to_rows


class LargestArgs(NamedTuple):
    """Arguments of ``largest``."""

    values: RealTokens
    """``[B, T]`` or ``[N]``, float32 or float64."""
    mask: Flags | None
    """bool, the shape of ``values``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    scopes: IdRows
    """``[B]`` int64, the scope of each row, from 0 to B - 1."""
    wanted: IdRows
    """``[B]`` int64, at each scope the number of tokens to select, at most its valid ones."""


def largest(a: LargestArgs) -> Tensor:
    """Select by sorting: by value, descending, within a scope; equal values in order of row and position."""
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    scopes = a.scopes
    place = torch.where(valid, scopes[:, None], scopes.shape[0]).flatten()
    order = x.flatten().argsort(descending=True, stable=True)
    order = order[place[order].argsort(stable=True)]
    sizes = torch.bincount(place, minlength=scopes.shape[0] + 1)
    rank = torch.empty_like(order)
    position = torch.arange(order.shape[0], dtype=torch.int64, device=order.device)
    rank[order] = position - (sizes.cumsum(0) - sizes)[place[order]]
    chosen = valid & (rank.view(x.shape) < a.wanted[scopes][:, None])
    return from_rows(chosen, a.values.shape, a.cu_seqlens)
