"""Step ends on the GPU: every valid token, tokens that flags mark, or tokens before another step id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Constant
from .old_scans import latest
from .rows import as_bytes, dense, load_valid

# Representations of steps.
TOKENS = Constant(0)  # every valid token ends a step
FLAGS = Constant(1)
IDS = Constant(2)  # a step ends at the last valid token before another id

# Step id of tokens outside steps (like any id below 0), and of the end of a row.
NO_STEP = Constant(-1)


@triton.jit
def step_ends(steps, mask, at, end, valid, next_id, KIND: tl.constexpr, HAS_MASK: tl.constexpr):
    """Flags of the tokens of a block that end a step, and the next valid token's id for the next block.

    For ids the positions ``at`` decrease from ``end - 1`` on, and ``next_id`` is the id of the earliest valid token
    in the blocks so far.
    """
    if KIND == TOKENS:
        ends = valid
    elif KIND == FLAGS:
        ends = valid & (tl.load(steps + at, mask=valid, other=0) != 0)
    else:
        ids = tl.load(steps + at, mask=valid, other=NO_STEP)
        # The next valid token's id: a scan over the tokens one further on.
        later = at + 1
        later_valid = load_valid(mask, later, (at >= 0) & (later < end), HAS_MASK)
        later_ids = tl.load(steps + later, mask=later_valid, other=NO_STEP)
        next_ids, any_valid = tl.associative_scan((later_ids, later_valid.to(tl.int32)), 0, latest)
        next_ids = tl.where(any_valid != 0, next_ids, next_id)
        ends = valid & (ids >= 0) & (ids != next_ids)
        next_id = tl.sum(tl.where(at == tl.min(at, 0), next_ids, 0), 0)
    return ends, next_id


@triton.jit
def step_id_after(steps, mask, end, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The id of the first valid token from ``end`` on."""
    next_id = tl.full([], NO_STEP, tl.int64)
    start = end
    while (start < length) & (next_id == NO_STEP):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, at, at < length, HAS_MASK)
        first = tl.min(tl.where(valid, at, length), 0)
        if first < length:
            # The id of a token outside steps is like the end of the row.
            next_id = tl.load(steps + first)
            start = length
        start += BLOCK
    return next_id


def kind_of(steps: Tensor | None) -> int:
    if steps is None:
        return TOKENS.value
    return (FLAGS if steps.dtype is torch.bool else IDS).value


def as_pointer(steps: Tensor | None) -> Tensor | None:
    """Step flags as bytes, ids as they are; both with unit stride along the row."""
    if steps is None or steps.dtype is torch.bool:
        return as_bytes(steps)
    return dense(steps)
