"""Selection: exactly so many of the largest values of a batch, a row or a group, on the device, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

SCOPES = ("batch", "row", "group")


def scope_ids(scope: str, groups: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """``[B]``, the place of each row's scope, in 0 .. B - 1."""
    if scope == "row":
        return torch.arange(batch, device=device)
    if scope == "batch":
        return torch.zeros(batch, dtype=torch.int64, device=device)
    assert groups is not None
    labels, order = groups.sort(stable=True)
    fresh = torch.cat([torch.zeros_like(labels[:1]), (labels[1:] != labels[:-1]).to(torch.int64)])
    return torch.empty_like(order).index_copy_(0, order, fresh.cumsum(0))


def scope_counts(valid: Tensor, ids: Tensor) -> Tensor:
    """``[B]``, at the place of each scope: how many of its tokens are valid."""
    return ids.new_zeros(ids.shape).index_add_(0, ids, valid.sum(1))


def _sort_keys(values: Tensor, valid: Tensor) -> Tensor:
    """Integers in the order of the numbers; the least where not valid."""
    kind = torch.int64 if values.dtype is torch.float64 else torch.int32
    info = torch.iinfo(kind)
    key = (values.detach() + 0.0).view(kind)
    return torch.where(valid, torch.where(key < 0, key ^ info.max, key), info.min)


def largest(values: Tensor, valid: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """A mask of the ``wanted[ids]`` largest valid values of each scope; of equal ones the earliest.

    By bisection over the bit patterns of the numbers: 32 counts (64 for float64), integers throughout, so exact,
    deterministic, of any size, and nothing is read back.

    Args:
        values, valid: ``[B, T]``; float32 or float64. ids: ``[B]``, see :func:`scope_ids`. wanted: ``[B]``, at the
            place of each scope.
    """
    if not values.numel():
        return valid.clone()
    key = _sort_keys(values, valid)
    info = torch.iinfo(key.dtype)
    low, high = torch.full_like(ids, info.min), torch.full_like(ids, info.max)

    def count(hit: Tensor) -> Tensor:
        return ids.new_zeros(ids.shape).index_add_(0, ids, hit.sum(1))

    aim = wanted.clamp(min=1)
    for _ in range(64 if key.dtype is torch.int64 else 32):
        middle = (low & high) + ((low ^ high) >> 1)
        enough = count(key > middle[ids, None].to(key.dtype)) < aim
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle, high - 1) + 1)
    least = high[ids, None].to(key.dtype)
    above = (key > least) & valid
    ties = (key == least) & valid
    # Of the ties the earliest: those of the scope's earlier rows come first.
    each = ties.sum(1)
    order = ids.argsort(stable=True)
    sums = each[order].cumsum(0) - each[order]
    first = torch.cat([torch.ones_like(order[:1], dtype=torch.bool), ids[order][1:] != ids[order][:-1]])
    start = torch.where(first, sums, 0).cummax(0).values
    before = torch.empty_like(order).index_copy_(0, order, sums - start)
    need = (aim - count(above))[ids]
    chosen = ties & (ties.cumsum(1) + before[:, None] <= need[:, None])
    return (above | chosen) & (wanted[ids] > 0)[:, None]
