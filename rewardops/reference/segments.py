"""Reductions over rows and steps, the specification (see :mod:`rewardops.segments`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, IdTokens, Offsets, RealTokens
from ..core.rows import Layout, from_rows, to_rows

REDUCTIONS = ("sum", "mean", "min", "max", "prod", "first", "last", "any")


class SegmentsArgs(NamedTuple):
    """Arguments of ``segment_reduce`` and its backward pass."""

    values: RealTokens
    """``[B, T]`` or ``[N]``, float32 or float64."""
    ids: IdTokens
    """int64, the shape of ``values``: step ids, non-decreasing along a row; negative ids belong to no step."""
    mask: Flags | None
    """bool, the shape of ``values``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    num_steps: int
    """Steps per row of the output; ids from here on are left out."""
    op: str
    """One of ``REDUCTIONS``."""


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(mask, mask, cu_seqlens)[0].sum(1).double()


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return to_rows(values, mask, cu_seqlens)[0].double().sum(1).to(values.dtype)


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    """Reductions ``[B, num_steps]``, and a number per step for the backward pass: a count, position or product."""
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    x, step_of = x.double(), to_rows(a.ids, None, a.cu_seqlens)[0]
    shape, size = (x.shape[0], a.num_steps), x.shape[0] * a.num_steps
    inside = valid & (step_of >= 0) & (step_of < a.num_steps)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    # The place of each token's step; one more for tokens of none.
    place = torch.where(inside, row * a.num_steps + step_of, size).flatten()

    def total(terms: Tensor) -> Tensor:
        """Sums in the order of the tokens."""
        out = x.new_zeros(size + 1).index_put_((place,), terms.flatten(), accumulate=True)
        return out[:size].view(shape)

    def extreme(terms: Tensor, kind: str) -> Tensor:
        start = x.new_full((size + 1,), torch.inf if kind == "amin" else -torch.inf)
        return start.scatter_reduce(0, place, terms.flatten(), kind)[:size].view(shape)

    count = total(inside.double())
    some = count > 0
    where = torch.full_like(count, -1.0)
    if a.op in ("sum", "mean"):
        value = total(x)
        if a.op == "mean":
            value, where = value / count.clamp(min=1), torch.where(some, count, where)
    elif a.op == "any":
        value = (total((inside & (x != 0)).double()) > 0).double()
    elif a.op == "prod":
        zeros = total((inside & (x == 0)).double())
        factors = torch.where(inside & (x != 0), x, 1)
        steps = [torch.where(step_of == step, factors, 1).prod(1) for step in range(a.num_steps)]
        value = torch.stack(steps, 1) if steps else x.new_zeros(shape)
        where = torch.where(some, torch.where(zeros > 1, 0, value), where)
        value = torch.where(zeros > 0, 0, value)
    else:
        candidates = inside
        if a.op in ("min", "max") and x.numel():
            # The earliest of equal values, and of NaNs, which are the extreme.
            number = x.isnan()
            signed = torch.where(number, -torch.inf, x if a.op == "min" else -x)
            least = _at(extreme(signed, "amin"), place, x)
            broken = _at(total(number.double()), place, x) > 0
            candidates = inside & torch.where(broken, number, signed == least)
        position = torch.arange(x.shape[1], device=x.device, dtype=torch.float64).expand(x.shape)
        if a.op == "last":
            at = extreme(torch.where(candidates, position, -torch.inf), "amax")
        else:
            at = extreme(torch.where(candidates, position, torch.inf), "amin")
        where = torch.where(some, at, where)
        value = x.gather(1, where.clamp(min=0).to(torch.int64)) if x.shape[1] else x.new_zeros(shape)
    return torch.where(some, value, 0).to(a.values.dtype), where


def _at(of_steps: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """The number of each token's step; 0 for tokens of none."""
    return torch.cat([of_steps.flatten(), of_steps.new_zeros(1)])[place].view(like.shape)


def segment_reduce_backward(grad: Tensor, out: Tensor, saved: Tensor, a: SegmentsArgs) -> Tensor:
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    step = to_rows(a.ids, None, a.cu_seqlens)[0]
    inside = valid & (step >= 0) & (step < grad.shape[1])
    if not grad.shape[1]:
        return torch.zeros_like(a.values)
    step = torch.where(inside, step, 0)
    up, saved_here, value = (t.double().gather(1, step) for t in (grad, saved, out))
    if a.op == "sum":
        grad_values = up
    elif a.op == "mean":
        grad_values = up / saved_here
    elif a.op == "prod":
        others = torch.where(value == 0, 0, saved_here / torch.where(x == 0, 1, x.double()))
        grad_values = up * torch.where(x == 0, saved_here, others)
    elif a.op == "any":
        grad_values = torch.zeros_like(up)
    else:
        position = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
        grad_values = torch.where(position == saved_here, up, 0)
    return from_rows(torch.where(inside, grad_values, 0).to(a.values.dtype), a.values.shape, a.cu_seqlens)


def segment_broadcast(steps: Tensor, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A gather, shared by all backends: torch's is as good as any kernel."""
    rows = Layout(steps.shape[0], tuple(ids.shape), mask, cu_seqlens)
    inside = (ids >= 0) & (ids < steps.shape[1])
    if mask is not None:
        inside = inside & mask
    if not steps.numel():
        return steps.new_zeros(ids.shape)
    row = rows.expand(torch.arange(rows.batch, dtype=torch.int64, device=ids.device))
    index = torch.where(inside, row * steps.shape[1] + ids, 0)
    return torch.where(inside, steps.reshape(-1)[index], 0)
