"""Selection: exactly so many of the largest values of a batch, a row or a group, on the device, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .core.dispatch import define
from .core.rows import Layout

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


def scope_counts(counts: Tensor, ids: Tensor) -> Tensor:
    """``[B]``, at the place of each scope: the sum of its rows' counts, integers."""
    return ids.new_zeros(ids.shape).index_add_(0, ids, counts.to(torch.int64))


_largest = define(
    "selection",
    "largest(Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor scopes, Tensor wanted) -> Tensor",
    fake=lambda values, *_: values.new_empty(values.shape, dtype=torch.bool),
)


def largest(values: Tensor, rows: Layout, ids: Tensor, wanted: Tensor) -> Tensor:
    """A mask of the ``wanted[ids]`` largest valid values of each scope; of equal ones the earliest.

    By selection over the bit patterns of the numbers: integers throughout, so exact, deterministic, of any size,
    and nothing is read back.

    Args:
        values: float32 or float64, in the layout ``rows``. ids: ``[B]``, see :func:`scope_ids`. wanted: ``[B]``, at
            the place of each scope, at most as many as it has valid tokens.
    """
    out: Tensor = _largest(values.detach(), rows.mask, rows.cu_seqlens, ids, wanted)
    return out
