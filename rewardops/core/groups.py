"""Groups of rows: labels of any kind, or sizes of contiguous groups, as int64 ids."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_integer, check_shape, show
from .precision import wide, widest
from .settings import may_read
from .transforms import undisturbed

Labels = Tensor | Sequence[Hashable] | Any | None
GroupSize = int | Sequence[int] | Tensor | None


def label_list(groups: object, batch: int, other: str) -> Sequence[Hashable]:
    """Validate labels that are not a tensor: a numpy array or a sequence of objects, one per row."""
    values = groups.tolist() if hasattr(groups, "tolist") else groups
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"groups: got {type(groups).__name__}, want a tensor, an array or a sequence of labels"
        )
    if len(values) != batch:
        raise ValueError(f"groups: got {len(values)} labels, want {batch} (one per row of {other})")
    return values


def _factorised(groups: object, batch: int, device: torch.device, other: str) -> Tensor:
    """Number hashable labels in the order of their first occurrence, on the host."""
    values = label_list(groups, batch, other)
    seen: dict[Hashable, int] = {}
    try:
        numbers = [seen.setdefault(v, len(seen)) for v in values]
    except TypeError as error:
        raise TypeError(f"groups: got an {error}, want labels that can be hashed") from None
    return from_host(numbers, device)


def from_host(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor on a device, copied without a synchronisation."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def by_size(group_size: object, place: Tensor, total: int | None, other: str) -> Tensor:
    """The group of each row from its index ``place`` among ``total`` rows, groups being contiguous."""
    if isinstance(group_size, Tensor):
        check_integer("group_size", group_size)
        if group_size.dim() != 1:
            raise ValueError(
                f"group_size: got shape {show(group_size.shape)}, want [G] (the size of each group)"
            )
        check_device("group_size", group_size, place.device, other)
        sizes = group_size.detach().to(torch.int64)
        known = sizes.tolist() if may_read(sizes) else None
    elif isinstance(group_size, (list, tuple)):
        known = list(group_size)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in known):
            raise ValueError(f"group_size: got sizes {known}, want whole numbers of at least 0")
        sizes = from_host(known, place.device)
    elif isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size: got {type(group_size).__name__}, want int, or a list or tensor of int")
    elif group_size < 1 or (total is not None and total % group_size):
        raise ValueError(f"group_size: got {group_size}, want a divisor of the {total} rows of {other}")
    else:
        return place if group_size == 1 else place // group_size
    if known is not None and (min(known, default=0) < 0 or total not in (None, sum(known))):
        raise ValueError(f"group_size: got sizes {known}, want sizes that sum to the {total} rows of {other}")
    # A search: sizes on a device are not validated (it would synchronise), and wrong ones cannot cause a write out
    # of bounds.
    return torch.searchsorted(sizes.cumsum(0), place, right=True)


@functools.lru_cache(maxsize=64)
def _contiguous(batch: int, group_size: int, other: str) -> Tensor:
    """As :func:`by_size`, remembered on the CPU, where it would be much of the time of a small call."""
    with torch.inference_mode(False):  # so that it can be saved for a backward pass
        return by_size(group_size, torch.arange(batch, device="cpu"), batch, other)


def group_ids(groups: Labels, group_size: object, batch: int, device: torch.device, other: str) -> Tensor:
    """Group labels ``[B]`` as int64: from labels of any kind, or from the sizes of contiguous groups."""
    if groups is None and group_size is None:
        raise ValueError("groups: got None and no group_size, want one of the two")
    if groups is not None and group_size is not None:
        raise ValueError("group_size: got a value beside groups, want one of the two")
    if groups is None:
        if type(group_size) is int and device.type == "cpu" and group_size > 0 and undisturbed():
            return _contiguous(batch, group_size, other)
        return by_size(group_size, torch.arange(batch, device=device), batch, other)
    if not isinstance(groups, Tensor):
        return _factorised(groups, batch, device, other)
    check_integer("groups", groups)
    check_shape("groups", groups, (batch,), f"one label per row of {other}")
    check_device("groups", groups, device, other)
    return groups.detach().to(torch.int64)


def numbered(groups: Tensor) -> Tensor:
    """``[B]`` int64 from 0 to B - 1: groups numbered in the order of their labels. Nothing is read back."""
    labels, order = groups.sort(stable=True)
    fresh = torch.cat([torch.zeros_like(labels[:1]), (labels[1:] != labels[:-1]).to(torch.int64)])
    return torch.empty_like(order).index_copy_(0, order, fresh.cumsum(0))


def group_sums(x: Tensor, number: Tensor, order: Tensor | None = None) -> Tensor:
    """``[B, ...]``: for each row the sum of ``x`` over its group, the rows with the same ``number`` from 0 to B.

    Float64 numbers, added in ``order`` (by default that of the rows) on every device, which ``index_add`` does not.
    """
    sums = x.new_zeros((x.shape[0] + 1, *x.shape[1:]), dtype=widest(x.device))
    parts, to = (t if order is None else t.index_select(0, order) for t in (wide(x), number))
    return sums.index_put_((to,), parts, accumulate=True).index_select(0, number)
