"""Tokens of a prefix tree's nodes, which lie in several rows: a chunk of contiguous ones for each thread."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import elements, halved


class NodeRows(NamedTuple):
    """A node, and arrays of rows; pointers and numbers."""

    number: Any
    begin: Any
    count: Any  # of its rows
    depth: Any
    above: Any  # depth of its parent, -1 at the top
    order: Any
    leaf: Any
    first: Any
    length: Any
    depths: Any


class Piece(NamedTuple):
    """What rows have of a node."""

    row: Any
    first: Any  # the row's first token
    length: Any
    deepest: Any  # whether the node is the row's deepest
    reached: Any  # whether the row's path has it


@triton.jit
def pieces(node, k, inside):
    row = tl.load(node.order + node.begin + k, mask=inside, other=0)
    leaf = tl.load(node.leaf + row, mask=inside, other=0)
    first = tl.load(node.first + row, mask=inside, other=0).to(tl.int32)
    length = tl.load(node.length + row, mask=inside, other=0).to(tl.int32)
    reached = inside & (tl.load(node.depths + leaf, mask=inside & (leaf >= 0), other=-1) >= node.depth)
    return Piece(row, first, length, leaf == node.number, reached)


@triton.jit
def end_of_piece(node, piece, SHIFT: tl.constexpr):
    """One past the last token whose state lies in the node; 0 if there is none."""
    end = tl.minimum(tl.where(piece.deepest, piece.length, node.depth) + 1 - SHIFT, piece.length)
    return tl.where(piece.reached, end, 0)


@triton.jit
def load_chunk(row, at, low, end, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """PER elements from each of some pointers, as tensors ``[T]``; ``at`` is the first one's place in its row.

    Those in ``[low, end)``, 0 for others; ALIGNED: all of a chunk, as one load may hold both.
    """
    every = ()
    if ALIGNED:
        W: tl.constexpr = min(PER, 128 // row.dtype.element_ty.primitive_bitwidth)
        for k in tl.static_range(PER // W):
            here = (row + k * W)[:, None] + tl.arange(0, W)[None, :]
            here = tl.multiple_of(tl.max_contiguous(here, [1, W]), [1, 16])
            every = every + elements(halved(tl.load(here, mask=(at < end)[:, None], other=0)))
    else:
        for k in tl.static_range(PER):
            inside = (at + k >= low) & (at + k < end)
            every = every + (tl.load(row + k, mask=inside, other=0),)  # noqa: RUF005 (the compiler knows no stars)
    return every


@triton.jit
def chunk_flags(row, at, low, end, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """Flags of chunks, stored as bytes."""
    every = ()
    if ALIGNED:
        four = load_chunk(row.to(tl.pointer_type(tl.uint32)), at, low, end, PER // 4, True)
        for k in tl.static_range(PER):
            every = every + ((four[k // 4] & (255 << (k % 4 * 8))) != 0,)  # noqa: RUF005
    else:
        flags = load_chunk(row, at, low, end, PER, False)
        for k in tl.static_range(PER):
            every = every + (flags[k] != 0,)  # noqa: RUF005
    return every
