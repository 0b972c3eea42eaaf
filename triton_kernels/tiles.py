"""Tokens of a row by threads: a thread has PER contiguous tokens of a tile in registers, a tensor for each of them.

Tiles are counted from the first token of a row, and a thread has the same tokens wherever the row begins, so that a
row's bits do not depend on its layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED
from .rows import Rows

EACH = 4 if INTERPRETED else 16  # tokens of a thread: a mask's load of 16 bytes
THREADS = 16 if INTERPRETED else 64
TILE = THREADS * EACH
WARPS = 2


class Tile(NamedTuple):
    """A tile of a row, and the order of its threads."""

    low: Any  # its first token in the row
    left: Any  # number of its tokens in the row, int32
    start: Any  # [T], the first token of each thread in the tile, int32
    first: Any  # [T], whether a thread is the first in the direction of the scan
    before: Any  # [T], the thread before in that direction; the last for the first


@triton.jit
def tile_of(begin, end, turn, PER: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr):
    """The tile of the tokens from ``begin`` to ``end`` that a scan visits in this turn."""
    thread = tl.arange(0, T)
    first = thread == 0
    before = tl.where(first, T - 1, thread - 1)
    place = thread
    number = turn
    if REVERSE:
        place = T - 1 - thread
        number = (end - begin + (T * PER - 1)) // (T * PER) - 1 - turn
    low = begin + number * (T * PER)
    left = tl.minimum(end - low, T * PER).to(tl.int32)
    return Tile(low, left, place * PER, first, before)


@triton.jit
def elements(x):
    """The elements ``[T]`` of a tensor ``[T, 2, ..., 2]``, in order."""
    every = (x,)
    for _ in tl.static_range(len(x.shape) - 1):
        # The last dimension is the lowest bit of an element's number.
        evens = ()
        odds = ()
        for k in tl.static_range(len(every)):
            even, odd = tl.split(every[k])
            evens = evens + (even,)  # noqa: RUF005 (the compiler knows no stars)
            odds = odds + (odd,)  # noqa: RUF005
        every = evens + odds
    return every


@triton.jit
def halved(x):
    """A tensor ``[T, N]`` as ``[T, 2, ..., 2]``."""
    if x.shape[1] == 1:
        return tl.reshape(x, [x.shape[0]])
    elif x.shape[1] == 2:
        return x
    elif x.shape[1] == 4:
        return tl.reshape(x, [x.shape[0], 2, 2])
    else:
        return tl.reshape(x, [x.shape[0], 2, 2, 2, 2])


@triton.jit
def joined(xs, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the tensors ``[T]`` from FIRST on, as one ``[T, 2, ..., 2]``: the inverse of :func:`elements`."""
    every = ()
    for k in tl.static_range(COUNT):
        every = every + (xs[FIRST + k],)  # noqa: RUF005
    for _ in tl.static_range(COUNT.bit_length() - 1):
        pairs = ()
        for k in tl.static_range(len(every) // 2):
            pairs = pairs + (tl.join(every[k], every[k + len(every) // 2]),)  # noqa: RUF005
        every = pairs
    return every[0]


@triton.jit
def load_tokens(row, tile, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """The tokens of every thread; 0 beyond the tile's. ``row`` points to the row's first token."""
    if ALIGNED:
        W: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
        here = tl.multiple_of(row + tile.low, 16)
        every = ()
        for k in tl.static_range(PER // W):
            start = tile.start[:, None] + k * W
            x = tl.load(here + (start + tl.arange(0, W)[None, :]), mask=start < tile.left, other=0)
            every = every + elements(halved(x))
        return every
    else:
        # Each of its own: the other tokens of a sector are then in the cache.
        every = ()
        for k in tl.static_range(PER):
            at = (row + tile.low) + tile.start
            every = every + (tl.load(at + k, mask=tile.start + k < tile.left, other=0),)  # noqa: RUF005
        return every


@triton.jit
def load_flags(row, tile, HAS_FLAGS: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """Flags of every thread's tokens, stored as bytes; without them whether a token lies in the tile."""
    every = ()
    if HAS_FLAGS and ALIGNED:
        words = tl.multiple_of((row + tile.low).to(tl.pointer_type(tl.uint32)), 16)
        at = tile.start[:, None] // 4 + tl.arange(0, PER // 4)[None, :]
        word = elements(halved(tl.load(words + at, mask=tile.start[:, None] < tile.left, other=0)))
        for k in tl.static_range(PER):
            every = every + ((word[k // 4] & (255 << (k % 4 * 8))) != 0,)  # noqa: RUF005
    elif HAS_FLAGS:
        flags = load_tokens(row, tile, PER, False)
        for k in tl.static_range(PER):
            every = every + (flags[k] != 0,)  # noqa: RUF005
    else:
        for k in tl.static_range(PER):
            every = every + (tile.start + k < tile.left,)  # noqa: RUF005
    return every


@triton.jit
def store_tokens(row, tile, xs, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the tokens of every thread."""
    if ALIGNED:
        W: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
        here = tl.multiple_of(row + tile.low, 16)
        for k in tl.static_range(PER // W):
            start = tile.start[:, None] + k * W
            x = tl.reshape(joined(xs, k * W, W), [tile.start.shape[0], W])
            x = x.to(row.dtype.element_ty)
            tl.store(here + (start + tl.arange(0, W)[None, :]), x, mask=start < tile.left)
    elif PER == 1:
        at = (row + tile.low) + tile.start
        tl.store(at, xs[0].to(row.dtype.element_ty), mask=tile.start < tile.left)
    else:
        at = tile.start[:, None] + tl.arange(0, PER)[None, :]
        x = tl.reshape(joined(xs, 0, PER), [tile.start.shape[0], PER]).to(row.dtype.element_ty)
        tl.store(row + tile.low + at, x, mask=at < tile.left)


@triton.jit
def from_before(x, tile):
    """Every thread's ``x`` in the thread before it; the last thread's in the first, for the next tile."""
    return tl.gather(x, tile.before, 0)


@triton.jit
def of_first(x, T: tl.constexpr):
    """The ``x`` of the first thread, float."""
    return tl.sum(tl.where(tl.arange(0, T) == 0, x, 0.0), 0)


@triton.jit
def write_gaps(out, cu, b, batch, total, T: tl.constexpr, PACKED: tl.constexpr):
    """Zeros before the first of packed rows, and behind the last one."""
    if PACKED:
        if b == 0:
            end = tl.minimum(tl.load(cu).to(tl.int64), total)
            for at in range(tl.zeros([], tl.int64), end, T):
                write_zeros(out, at, end, T)
        if b == batch - 1:
            for at in range(tl.maximum(tl.load(cu + batch).to(tl.int64), 0), total, T):
                write_zeros(out, at, total, T)


@triton.jit
def write_zeros(out, begin, end, T: tl.constexpr):
    at = begin + tl.arange(0, T)
    tl.store(out + at, tl.zeros([T], out.dtype.element_ty), mask=at < end)


# ---- launch ------------------------------------------------------------------------------------------------


def is_aligned(rows: Rows, *tensors: Tensor | None) -> bool:
    """Whether rows consist of whole loads of 16 bytes of every tensor."""
    if rows.packed or rows.width % 16:
        return False
    for t in tensors:
        if t is not None and t.dim() == 2 and t.shape[1] > 1:
            stride = t.stride(0) * t.element_size() if rows.batch > 1 else 0
            if t.data_ptr() % 16 or stride % 16:
                return False
    return True


def empty_tokens(like: Tensor, rows: Rows, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of per-token results; zeros if there is no row."""
    make = like.new_empty if rows.batch else like.new_zeros
    return make(like.shape, dtype=dtype or like.dtype)
