"""Rows split over the ranks of a process group: summaries of the parts, exchanged and joined.

Each rank holds the next part of every row. A summary is a few numbers per row, ``[B]`` float64 each; the
contribution of later parts to a part follows from their summaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import distributed
from .precision import wide, widest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ScanPart(NamedTuple):
    """Summary of a part of each row under a temporal-difference scan."""

    live: Tensor
    """1 where the part has a valid token."""
    advantage: Tensor
    """The first valid token's advantage if the value after the part is 0."""
    growth: Tensor
    """The increase of that advantage per unit of the value after the part."""
    value: Tensor
    """The first valid token's value."""
    trace: Tensor
    """``lam`` at the last valid token."""


class StepsPart(NamedTuple):
    """Summary of a part of each row under a reduction over the steps still to come."""

    number: Tensor
    """The number of steps that end in the part."""
    result: Tensor
    """The reduction over them."""


Part = TypeVar("Part", ScanPart, StepsPart)


def later_parts(process_group: ProcessGroup, record: Part) -> list[Part]:
    """Summaries of the ranks after this one, the last rank's first; zeros for the other ranks.

    The zeros give every rank a part in the backward pass, which is a collective as well.
    """
    columns = torch.stack(list(record), 1)
    ranks, at = distributed.size(process_group), distributed.rank(process_group)
    gathered = distributed.gather([columns], process_group, columns.shape[0])
    everyone = gathered.tensors[0].view(ranks, *columns.shape)
    later = torch.arange(ranks, device=columns.device) > at
    parts = torch.where(later[:, None, None], everyone, 0).flip(0).unbind(0)
    return [type(record)(*part.unbind(1)) for part in parts]


def _times(factor: Tensor, x: Tensor) -> Tensor:
    """``factor * x``; 0 where the factor is 0, even if ``x`` is infinite or NaN."""
    return torch.where(factor == 0, 0, factor * torch.where(factor == 0, 0, x))


def value_beyond(process_group: ProcessGroup, record: ScanPart, bootstrap: Tensor) -> Tensor:
    """``[B]``, the bootstrap value of this rank's part such that scanning it equals scanning the whole row.

    With value V and advantage A of the next valid token, on a later rank, it is ``V + lam A``: a scan is linear in
    it. ``bootstrap`` is the value after the whole row.
    """
    value, advantage = wide(bootstrap), torch.zeros_like(bootstrap, dtype=widest(bootstrap.device))
    for part in later_parts(process_group, record):
        carried = part.advantage + _times(part.growth, value + _times(part.trace, advantage))
        advantage = torch.where(part.live > 0, carried, advantage)
        value = torch.where(part.live > 0, part.value, value)
    return value + _times(record.trace, advantage)


def join_later(
    process_group: ProcessGroup, record: StepsPart, join: Callable[[Tensor, Tensor], Tensor]
) -> StepsPart:
    """Summary of all later parts together; ``join(part, later)`` reduces two neighbouring parts' results."""
    number, result = torch.zeros_like(record.number), torch.zeros_like(record.number)
    for part in later_parts(process_group, record):
        joined = torch.where(number > 0, join(part.result, result), part.result)
        result = torch.where(part.number > 0, joined, result)
        number = number + part.number
    return StepsPart(number, result)
