"""Process groups: the collectives behind functions that run over several ranks.

A function that takes a ``process_group`` is called on every rank of it, with equal arguments but for the tensors,
and runs one collective. Results are combined in the order of the ranks, so they do not depend on timing. Ranks
exchange values of rows and tokens, records and summaries, never logits.

Gradients are those of the sum of all ranks' losses, so a backward pass is a collective too: where a gradient is
asked for on one rank it is on all. (Shards of a vocabulary are another matter, see :func:`replicated`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks
from .groups import Labels, by_size, from_host, group_ids, label_list
from .precision import wide
from .settings import may_read

# The names of both collectives up to PyTorch 2.12 are the second ones.


def _all_gather(out: Tensor, x: Tensor, process_group: dist.ProcessGroup) -> None:
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, x, group=process_group)


def _reduce_scatter(out: Tensor, x: Tensor, process_group: dist.ProcessGroup) -> None:
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    run(out, x, group=process_group)


def check(process_group: object) -> dist.ProcessGroup:
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        got = type(process_group).__name__
        raise TypeError(f"process_group: got {got}, want a torch.distributed.ProcessGroup")
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group: got a group without this rank, want one that it is a member of")
    return process_group


def size(process_group: dist.ProcessGroup) -> int:
    return dist.get_world_size(process_group)


def rank(process_group: dist.ProcessGroup) -> int:
    return dist.get_rank(process_group)


def exchange(x: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """``[ranks, *x.shape]``: the tensor of every rank, all of one shape; no gradient."""
    x = x.detach().contiguous()
    out = x.new_empty((size(process_group), *x.shape))
    _all_gather(out.view(-1), x.view(-1), process_group)
    return out


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # A sum over many ranks is not taken in half precision.
        wide = grad.to(checks.promote(grad)[0].dtype, copy=True).contiguous()
        dist.all_reduce(wide, group=ctx.process_group)
        return wide.to(grad.dtype), None


def replicated(x: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """Mark a tensor that every rank holds and uses in part: its gradient is summed over the ranks.

    For shards of a vocabulary, where every rank has the same loss (Megatron's convention).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    out: Tensor = _Replicated.apply(x, process_group)
    return out


# ---- rows and tokens of all ranks --------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """Rows (or tokens) of all ranks in the order of the ranks, each rank padded to the same number."""

    tensors: tuple[Tensor, ...]
    present: Tensor  # [ranks * capacity], bool: not padding
    first: int  # index of this rank's first row
    count: int  # rows of this rank

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor over all ranks."""
        return x[self.first : self.first + self.count]


def _columns(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1:].numel())


def _exchange_rows(
    tensors: Sequence[Tensor], process_group: dist.ProcessGroup, capacity: int
) -> list[Tensor]:
    """Gather every tensor as ``[ranks * capacity, ...]`` in one collective of bytes; padding is zeros."""
    parts, sizes = [], []
    for x in tensors:
        filled = torch.nn.functional.pad(_columns(x.detach()), (0, 0, 0, capacity - x.shape[0]))
        part = filled.reshape(-1).view(torch.uint8)
        sizes.append(part.shape[0])
        parts.append(torch.nn.functional.pad(part, (0, -part.shape[0] % 8)))  # aligned for any dtype
    sent = torch.cat(parts)
    everything, at, gathered = exchange(sent, process_group), 0, []
    for x, part, count in zip(tensors, parts, sizes, strict=True):
        received = everything[:, at : at + count].reshape(-1).view(x.dtype)
        gathered.append(received.view(len(everything) * capacity, *x.shape[1:]))
        at += part.shape[0]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, process_group: dist.ProcessGroup, capacity: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        gathered = _exchange_rows(tensors, process_group, capacity)
        ctx.process_group, ctx.capacity = process_group, capacity
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        ctx.mark_non_differentiable(*(x for x in gathered if not x.is_floating_point()))
        return tuple(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        floats = [k for k, (_, dtype) in enumerate(ctx.like) if dtype.is_floating_point]
        columns = [_columns(wide(grads[k])) for k in floats]
        everything = torch.cat(columns, 1)
        own = everything.new_empty((ctx.capacity, everything.shape[1]))
        _reduce_scatter(own.view(-1), everything.view(-1), ctx.process_group)
        out: list[Tensor | None] = [None] * len(ctx.like)
        for k, part in zip(floats, own.split([g.shape[1] for g in columns], 1), strict=True):
            shape, dtype = ctx.like[k]
            out[k] = part[: shape[0]].reshape(shape).to(dtype)
        return None, None, *out


def _capacity(count: int, limit: int | None, process_group: dist.ProcessGroup, device: torch.device) -> int:
    if limit is not None:
        checks.check_whole("max_per_rank", limit, 0)
        if count > limit:
            raise ValueError(f"max_per_rank: got {limit}, want at least {count}, which this rank has")
        return limit
    if torch.compiler.is_compiling():
        raise ValueError("max_per_rank: got None in a compiled graph, want the most that any rank has")
    return int(exchange(torch.tensor([count], device=device), process_group).max())


@dataclass(frozen=True)
class Ranks:
    """The process group of a gather, and the capacity per rank."""

    process_group: dist.ProcessGroup
    max_per_rank: int | None

    @staticmethod
    def of(process_group: dist.ProcessGroup | None, max_per_rank: int | None) -> Ranks | None:
        """Validate both arguments; None without a process group."""
        if process_group is not None:
            return Ranks(check(process_group), max_per_rank)
        if max_per_rank is not None:
            raise ValueError(f"max_per_rank: got {max_per_rank!r} without process_group, want None")
        return None


def gather(
    tensors: Sequence[Tensor], process_group: dist.ProcessGroup, max_per_rank: int | None = None
) -> Gathered:
    """Gather tensors ``[n]`` or ``[n, k]`` of every rank in one collective; float tensors are differentiable.

    ``n`` may differ between ranks and is at most ``max_per_rank``. Without ``max_per_rank`` the ranks exchange
    their ``n`` first, and the host reads the largest.
    """
    count, device = tensors[0].shape[0], tensors[0].device
    capacity = _capacity(count, max_per_rank, process_group, device)
    wide = [torch.ones(count, dtype=torch.bool, device=device), *tensors]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        present, *gathered = _Gather.apply(process_group, capacity, *wide)
    else:
        present, *gathered = _exchange_rows(wide, process_group, capacity)
    return Gathered(tuple(gathered), present, rank(process_group) * capacity, count)


# ---- groups of rows ----------------------------------------------------------------------------------------


def _number(label: Hashable) -> int:
    """A 64-bit hash of a label, equal on all ranks without communication."""
    if isinstance(label, (str, int)):
        label = f"{label}".encode()
    if not isinstance(label, bytes):
        raise TypeError(
            f"groups: got a label of type {type(label).__name__}, want str, bytes or int, on which ranks agree"
        )
    return int.from_bytes(hashlib.blake2b(label, digest_size=8).digest(), "little", signed=True)


def own_labels(groups: Labels, group_size: object, batch: int, device: torch.device, other: str) -> Tensor:
    """Labels ``[B]`` of this rank's rows, equal on all ranks; zeros where ``group_size`` defines the groups."""
    if groups is None and group_size is not None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if groups is None or group_size is not None or isinstance(groups, Tensor):
        return group_ids(groups, group_size, batch, device, other)
    return from_host([_number(x) for x in label_list(groups, batch, other)], device)


def labels(gathered: Gathered, own: Tensor, group_size: object) -> Tensor:
    """Labels of the rows of all ranks: those gathered, or by ``group_size``, which counts on from rank to rank."""
    if group_size is None:
        return own
    present = gathered.present
    total = int(present.sum()) if may_read(present) else None
    return by_size(group_size, present.cumsum(0) - 1, total, "all ranks")
