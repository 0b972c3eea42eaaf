"""Step ends on the GPU: every valid token, tokens that flags mark, or tokens before another step id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Constant
from .rows import as_bytes, dense, load_valid
from .scans import handed_on, latest
from .tiles import from_before, load_flags, load_tokens

# Representations of steps.
TOKENS = Constant(0)  # every valid token ends a step
FLAGS = Constant(1)
IDS = Constant(2)  # a step ends at the last valid token before another id
ROW = Constant(3)  # a row is one step

# Step id of tokens outside steps (like any id below 0), and of the end of a row.
NO_STEP = Constant(-1)


@triton.jit
def load_step_ends(
    steps, valid, next_id, tile,
    KIND: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Flags of the tokens of a tile that end a step, and for the next tile the id behind it.

    With ids, tiles and threads are in decreasing time, and ``next_id`` is the id of the next valid token.
    """
    if KIND == TOKENS:
        return valid, next_id
    else:
        ends = ()
        if KIND == FLAGS:
            flags = load_flags(steps, tile, True, PER, ALIGNED)
            for k in tl.static_range(PER):
                ends = ends + (valid[k] & flags[k],)  # noqa: RUF005 (the compiler knows no stars)
        else:
            ids = load_tokens(steps, tile, PER, ALIGNED)
            some = tl.zeros(tile.start.shape, tl.int32)
            following = tl.zeros(tile.start.shape, tl.int64)
            for k in tl.static_range(PER - 1, -1, -1):
                some |= valid[k].to(tl.int32)
                following = tl.where(valid[k], ids[k], following)
            following, next_id = handed_on(following, some, next_id, tile)
            for k in tl.static_range(PER - 1, -1, -1):
                ends = (valid[k] & (ids[k] >= 0) & (ids[k] != following),) + ends  # noqa: RUF005
                following = tl.where(valid[k], ids[k], following)
        return ends, next_id


@triton.jit
def load_step_ends_ahead(
    steps, mask, valid, tile, length,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The same flags where tiles and threads are in increasing time: with ids, tokens behind the tile are read."""
    if KIND == IDS:
        ids = load_tokens(steps, tile, PER, ALIGNED)
        beyond = step_id_after(steps, mask, tile.low + tile.left, length, HAS_MASK, T)
        last = tl.arange(0, T) == T - 1
        some = tl.zeros(tile.start.shape, tl.int32)
        following = tl.zeros(tile.start.shape, tl.int64)
        for k in tl.static_range(PER - 1, -1, -1):
            some |= valid[k].to(tl.int32)
            following = tl.where(valid[k], ids[k], following)
        following = tl.where(last & (some == 0), beyond, following)
        following, some = tl.associative_scan((following, tl.where(last, 1, some)), 0, latest, reverse=True)
        following = tl.gather(following, tl.minimum(tl.arange(0, T) + 1, T - 1), 0)
        following = tl.where(last, beyond, following)
        ends = ()
        for k in tl.static_range(PER - 1, -1, -1):
            ends = (valid[k] & (ids[k] >= 0) & (ids[k] != following),) + ends  # noqa: RUF005
            following = tl.where(valid[k], ids[k], following)
        return ends
    else:
        ends, _ = load_step_ends(steps, valid, 0, tile, KIND, PER, ALIGNED)
        return ends


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


@triton.jit
def load_step_numbers(
    steps, valid, flags, number, tile,
    KIND: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The steps of the tokens of a tile, int32, -1 for tokens of none; and the number of flags up to the next tile.

    Ids from ``number`` on are of no step. Flags are counted from the left: ``flags`` before the tile, in its first
    thread; and tokens after a row's last flag are those of one step more.
    """
    numbers = ()
    if KIND == ROW:
        for k in tl.static_range(PER):
            numbers = numbers + (tl.where(valid[k], 0, -1),)  # noqa: RUF005 (the compiler knows no stars)
    elif KIND == FLAGS:
        marked = load_flags(steps, tile, True, PER, ALIGNED)
        count = tl.zeros(tile.start.shape, tl.int32)
        for k in tl.static_range(PER):
            count += (valid[k] & marked[k]).to(tl.int32)
        through = from_before(tl.associative_scan(tl.where(tile.first, flags, 0) + count, 0, total), tile)
        count = tl.where(tile.first, flags, through)
        flags = through
        for k in tl.static_range(PER):
            numbers = numbers + (tl.where(valid[k], count, -1),)  # noqa: RUF005
            count += (valid[k] & marked[k]).to(tl.int32)
    else:
        ids = load_tokens(steps, tile, PER, ALIGNED)
        for k in tl.static_range(PER):
            inside = valid[k] & (ids[k].to(tl.uint64) < tl.full([], number, tl.uint64))
            numbers = numbers + (tl.where(inside, ids[k], -1).to(tl.int32),)  # noqa: RUF005
    return numbers, flags


@triton.jit
def total(a, b):
    return a + b


def kind_of(steps: Tensor | None) -> int:
    if steps is None:
        return TOKENS.value
    return (FLAGS if steps.dtype is torch.bool else IDS).value


def as_pointer(steps: Tensor | None) -> Tensor | None:
    """Step flags as bytes, ids as they are; both with unit stride along the row."""
    if steps is None or steps.dtype is torch.bool:
        return as_bytes(steps)
    return dense(steps)
