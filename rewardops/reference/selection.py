"""Selection, the specification (see :mod:`rewardops.selection`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, IdRows, Offsets, RealTokens
from ..core.precision import wide
from ..core.rows import from_rows, to_rows
from .segments import row_counts


class LargestArgs(NamedTuple):
    """Arguments of ``largest``."""

    values: RealTokens
    """``[B, T]`` or ``[N]``, float32 or float64."""
    mask: Flags | None
    """bool, the shape of ``values``; None: every token is valid."""
    band: RealTokens | None
    """the shape of ``values``: valid tokens are selected only where it is inside (low, high); None: everywhere."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    scopes: IdRows | None
    """``[B]`` int64, the scope of each row, from 0 to B - 1; None: all rows are one scope."""
    fraction: float
    """0 to 1, of a scope's valid tokens: how many are selected; at least one, if there are as many."""
    nearest: bool
    """that number is rounded to the nearest, else down."""
    low: float
    high: float


def share_of(fraction: float | Tensor, counts: Tensor, nearest: bool) -> Tensor:
    """``fraction * counts``, rounded; at least one of a count above 0. int64."""
    exact = wide(counts) * fraction
    down = exact.floor()
    if nearest:
        down = down + (exact >= down + 0.5)
    return torch.minimum(down.to(torch.int64).clamp(min=1), counts)


def eligible(a: LargestArgs) -> Tensor | None:
    """The tokens that can be selected; None: all."""
    if a.band is None:
        return a.mask
    inside = (a.band > a.low) & (a.band < a.high)
    return inside if a.mask is None else a.mask & inside


def scopes_of(a: LargestArgs, batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64, device=a.values.device) if a.scopes is None else a.scopes


def wanted(a: LargestArgs, scopes: Tensor, row_counts: Callable[..., Tensor] = row_counts) -> Tensor:
    """``[B]`` int64, at each scope the number of tokens to select; a backend may count flags of rows by its own."""

    def count(flags: Tensor | None) -> Tensor:
        if flags is not None:
            of_rows = row_counts(flags, a.cu_seqlens)
        elif a.cu_seqlens is not None:
            of_rows = a.cu_seqlens[1:] - a.cu_seqlens[:-1]
        else:
            of_rows = torch.full_like(scopes, a.values.shape[1])
        return torch.zeros_like(scopes).index_add(0, scopes, of_rows.to(torch.int64))

    share = share_of(a.fraction, count(a.mask), a.nearest)
    return share if a.band is None else torch.minimum(share, count(eligible(a)))


def largest(a: LargestArgs) -> Tensor:
    """Select by sorting: by value, descending, within a scope; equal values in order of row and position."""
    x, valid = to_rows(a.values, eligible(a), a.cu_seqlens)
    scopes = scopes_of(a, x.shape[0])
    place = torch.where(valid, scopes[:, None], scopes.shape[0]).flatten()
    order = x.flatten().argsort(descending=True, stable=True)
    order = order[place[order].argsort(stable=True)]
    sizes = torch.bincount(place, minlength=scopes.shape[0] + 1)
    rank = torch.empty_like(order)
    position = torch.arange(order.shape[0], dtype=torch.int64, device=order.device)
    rank[order] = position - (sizes.cumsum(0) - sizes)[place[order]]
    chosen = valid & (rank.view(x.shape) < wanted(a, scopes)[scopes][:, None])
    return from_rows(chosen, a.values.shape, a.cu_seqlens)
