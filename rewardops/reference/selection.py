"""Selection, the specification (see :mod:`rewardops.selection`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import from_rows, to_rows


def largest(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scopes: Tensor, wanted: Tensor
) -> Tensor:
    """Sorted: by value downwards within a scope, of equal ones in order of row and position."""
    x, valid = to_rows(values, mask, cu_seqlens)
    place = torch.where(valid, scopes[:, None], scopes.shape[0]).flatten()
    order = x.flatten().argsort(descending=True, stable=True)
    order = order[place[order].argsort(stable=True)]
    sizes = torch.bincount(place, minlength=scopes.shape[0] + 1)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - (sizes.cumsum(0) - sizes)[place[order]]
    chosen = valid & (rank.view(x.shape) < wanted[scopes][:, None])
    return from_rows(chosen, values.shape, cu_seqlens)
