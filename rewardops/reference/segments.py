"""Reductions over rows and steps, the specification (see :mod:`rewardops.segments`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, Markers, Offsets, RealTokens
from ..core.rows import from_rows, to_rows
from .returns import step_ends

REDUCTIONS = ("sum", "mean", "min", "max", "prod", "first", "last", "any")
# Those whose backward pass needs a number per step: a mean's count; the product of all values, or of the others if
# one is 0; the position of the value that is the result. 0 for a step without a token, a position -1.
KEEPING = ("mean", "prod", "min", "max", "first", "last")


class SegmentsArgs(NamedTuple):
    """Arguments of ``segment_reduce`` and its backward pass."""

    values: RealTokens
    """``[B, T]`` or ``[N]``, float32 or float64."""
    steps: Markers | None
    """The shape of ``values``: int64 step ids, non-decreasing along a row, negative ones of no step; or bool flags,
    of which the k-th ends step k, and tokens after the last are of no step. None: a row is one step."""
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


def step_ids(steps: Tensor | None, valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T]`` int64: the step of every token, below 0 for tokens of none."""
    if steps is None:
        return torch.zeros_like(valid, dtype=torch.int64)
    by_row = to_rows(steps, None, cu_seqlens)[0]
    if steps.dtype is not torch.bool:
        return by_row
    flags = (by_row & valid).to(torch.int64)
    before = flags.cumsum(1) - flags
    return torch.where(before < flags.sum(1, keepdim=True), before, -1)


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    """Reductions ``[B, num_steps]``, and a number per step for the backward pass (see ``KEEPING``)."""
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    x, step_of = x.double(), step_ids(a.steps, valid, a.cu_seqlens)
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
    kept = x.new_empty((len(x), 0))
    if a.op == "sum":
        value = total(x)
    elif a.op == "mean":
        value, kept = total(x) / count.clamp(min=1), count
    elif a.op == "any":
        value = (total((inside & (x != 0)).double()) > 0).double()
    elif a.op == "prod":
        zeros = total((inside & (x == 0)).double())
        factors = torch.where(inside & (x != 0), x, 1)
        steps = [torch.where(step_of == step, factors, 1).prod(1) for step in range(a.num_steps)]
        value = torch.stack(steps, 1) if steps else x.new_zeros(shape)
        kept = torch.where(some & (zeros <= 1), value, 0)
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
        kept = torch.where(some, at, -1)
        value = x.gather(1, kept.clamp(min=0).to(torch.int64)) if x.shape[1] else x.new_zeros(shape)
    return torch.where(some, value, 0).to(a.values.dtype), kept


def _at(of_steps: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """The number of each token's step; 0 for tokens of none."""
    return torch.cat([of_steps.flatten(), of_steps.new_zeros(1)])[place].view(like.shape)


def segment_reduce_backward(grad: Tensor, out: Tensor, kept: Tensor, a: SegmentsArgs) -> Tensor:
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    step = step_ids(a.steps, valid, a.cu_seqlens)
    inside = valid & (step >= 0) & (step < a.num_steps)
    if not a.num_steps:
        return torch.zeros_like(a.values)
    step = torch.where(inside, step, 0)
    if a.op not in KEEPING:
        kept = out  # not read
    up, kept_here, value = (t.double().gather(1, step) for t in (grad, kept, out))
    if a.op == "sum":
        grad_values = up
    elif a.op == "any":
        grad_values = torch.zeros_like(up)
    elif a.op == "mean":
        grad_values = up / kept_here
    elif a.op == "prod":
        others = torch.where(value == 0, 0, kept_here / torch.where(x == 0, 1, x.double()))
        grad_values = up * torch.where(x == 0, kept_here, others)
    else:
        position = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
        grad_values = torch.where(position == kept_here, up, 0)
    return from_rows(torch.where(inside, grad_values, 0).to(a.values.dtype), a.values.shape, a.cu_seqlens)


def steps_to_tokens(
    step_values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, at_ends: bool
) -> tuple[Tensor, Tensor]:
    """The value of its step at every token, or at those alone that end a step; and flags of these tokens.

    The flags serve the backward pass; without ``at_ends`` they are empty.
    """
    valid = to_rows(steps, mask, cu_seqlens)[1]
    step = step_ids(steps, valid, cu_seqlens)
    inside = valid & (step >= 0) & (step < step_values.shape[1])
    ends = steps.new_empty(0, dtype=torch.bool)
    if at_ends:
        inside &= step_ends(steps, valid, cu_seqlens)
        ends = from_rows(inside, steps.shape, cu_seqlens)
    if not step_values.numel():
        return step_values.new_zeros(steps.shape), ends
    out = torch.where(inside, step_values.gather(1, torch.where(inside, step, 0)), 0)
    return from_rows(out, steps.shape, cu_seqlens), ends
