"""Reductions over rows and steps, the specification (see :mod:`rewardops.segments`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import Layout, from_rows, to_rows

REDUCTIONS = ("sum", "mean", "min", "max", "prod", "first", "last", "any")


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(mask, mask, cu_seqlens)[0].sum(1).double()


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(values, mask, cu_seqlens)[0].double().sum(1).to(values.dtype)


def segment_reduce(
    values: Tensor, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, segments: int, op: str
) -> tuple[Tensor, Tensor]:
    """The reductions ``[B, segments]``, and what the backward keeps of each: a count, a position, a product."""
    x, valid = to_rows(values, mask, cu_seqlens)
    x, own = x.double(), to_rows(ids, None, cu_seqlens)[0]
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    found, kept = [], []
    for segment in range(segments):
        inside = valid & (own == segment)
        count = inside.sum(1)
        some = count > 0
        where = torch.full_like(count, -1, dtype=torch.float64)
        if op in ("sum", "mean"):
            value = torch.where(inside, x, 0).sum(1)
            if op == "mean":
                value, where = value / count.clamp(min=1), torch.where(some, count.double(), where)
        elif op == "any":
            value = (inside & (x != 0)).any(1).double()
        elif op == "prod":
            zeros = (inside & (x == 0)).sum(1)
            value = torch.where(inside & (x != 0), x, 1).prod(1)
            where = torch.where(some, torch.where(zeros > 1, 0, value), where)
            value = torch.where(zeros > 0, 0, value)
        else:
            candidates = inside
            if op in ("min", "max") and x.shape[1]:
                # Of equals the earliest, and of NaNs, which are the extreme, too.
                sign = 1 if op == "min" else -1
                least = torch.where(inside, sign * x, torch.inf).amin(1, keepdim=True)
                candidates = inside & ((sign * x == least) | x.isnan())
                candidates = torch.where(
                    (inside & x.isnan()).any(1, keepdim=True), inside & x.isnan(), candidates
                )
            if op == "last":
                at = torch.where(candidates, position, -1).amax(1) if x.shape[1] else where
            else:
                at = torch.where(candidates, position, torch.inf).amin(1) if x.shape[1] else where
            where = torch.where(some, at, where)
            index = where.clamp(min=0).to(torch.int64)[:, None]
            value = x.gather(1, index)[:, 0] if x.shape[1] else x.new_zeros(x.shape[0])
        found.append(torch.where(some, value, 0))
        kept.append(where)
    empty = x.new_zeros((x.shape[0], 0))
    out = torch.stack(found, 1) if found else empty
    return out.to(values.dtype), torch.stack(kept, 1) if kept else empty


def segment_reduce_backward(
    grad: Tensor,
    values: Tensor,
    ids: Tensor,
    out: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    op: str,
) -> Tensor:
    x, valid = to_rows(values, mask, cu_seqlens)
    own = to_rows(ids, None, cu_seqlens)[0]
    inside = valid & (own >= 0) & (own < grad.shape[1])
    if not grad.shape[1]:
        return torch.zeros_like(values)
    own = torch.where(inside, own, 0)
    up, keep, value = (t.double().gather(1, own) for t in (grad, kept, out))
    if op == "sum":
        made = up
    elif op == "mean":
        made = up / keep
    elif op == "prod":
        others = torch.where(value == 0, 0, keep / torch.where(x == 0, 1, x.double()))
        made = up * torch.where(x == 0, keep, others)
    elif op == "any":
        made = torch.zeros_like(up)
    else:
        made = torch.where(torch.arange(x.shape[1], device=x.device) == keep, up, 0)
    return from_rows(torch.where(inside, made, 0).to(values.dtype), values.shape, cu_seqlens)


def segment_broadcast(steps: Tensor, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A gather, which torch does as well as any kernel of ours: every backend's."""
    rows = Layout(steps.shape[0], tuple(ids.shape), mask, cu_seqlens)
    inside = (ids >= 0) & (ids < steps.shape[1])
    if mask is not None:
        inside = inside & mask
    if not steps.numel():
        return steps.new_zeros(ids.shape)
    row = rows.expand(torch.arange(rows.batch, device=ids.device))
    index = torch.where(inside, row * steps.shape[1] + ids, 0)
    return torch.where(inside, steps.reshape(-1)[index], 0)
