"""Values of a prefix tree's nodes written to the tokens of its rows on the GPU.

A program takes the tiles of a row from the last to the first, and its path from the leaf to the root: each node is
read once. Where a tile lies in one node, all of its tokens have the same number, or a discount of it. Memory
traffic: one read per token of the mask, and one write.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move_back, places_without_holes
from ..reference.prefix_tree import AT, NodeTokensArgs
from .arithmetic import fused
from .launch import BITS, Constant, cdiv, pointer, splits, unpair
from .rows import Rows, as_bytes, row_bounds, stride
from .tiles import EACH, THREADS, TILE, WARPS, Tile, is_aligned, load_flags, store_tokens, write_gaps
from .tree_records import TreeNodes, TreeRows, log2_pair, power

# States of a token: the one before it, the one after it (neither name), or the difference of their values.
BEFORE = Constant(AT.index("before"))
STEP = Constant(AT.index("step"))


class NodeValues(NamedTuple):
    """Pointers and sizes: one channel of the nodes, their depths and parents."""

    value: Any  # [2 B, C], discounted to the node's depth
    scaled: Any  # [2 B, C], times the row's factor, discounted to the row's end
    depth: Any  # [2 B]
    parent: Any  # [2 B]
    channel: Any
    channels: Any


class Path(NamedTuple):
    """A row's path through the tree, in one channel."""

    length: Any  # tokens of the row
    factor: Any  # factor of ``scaled``; 1 for the derivative by the factor
    bias: Any  # added to the values
    log_high: Any  # the base 2 logarithm of the discount, in two parts
    log_low: Any


class Node(NamedTuple):
    """A node of a row's path."""

    up: Any  # its parent; -1 for the top
    depth: Any  # int32; -1 if the row has no node
    above: Any  # depth of its parent, -1 for the top
    value: Any  # of the row there


@triton.jit
def node_at(
    nodes, path, node, depth,
    AT: tl.constexpr, KIND: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """A node of the path; its value includes the bias, but for a discount, or a difference, which is of float64."""
    exists = node >= 0
    up = tl.load(nodes.parent + node, mask=exists, other=-1)
    above = tl.load(nodes.depth + up, mask=up >= 0, other=-1).to(tl.int32)
    here = node * nodes.channels + nodes.channel
    value = tl.zeros([], tl.float64)
    if HAS_VALUES:
        value += tl.load(nodes.value + here, mask=exists, other=0.0)
    if SCALED:
        x = path.factor * tl.load(nodes.scaled + here, mask=exists, other=0.0)
        if DECAY:
            x *= power(unpair(path.log_high, path.log_low, tl.float64), path.length - depth)
        value += x
    if AT == STEP:
        return Node(up, depth, above, value)
    elif DECAY:
        return Node(up, depth, above, value.to(KIND))
    else:
        return Node(up, depth, above, (value + path.bias).to(KIND))


@triton.jit
def discounted(value, exponent, log_high, log_low):
    """``value * gamma ** exponent`` for exponents of at least 0, in the value's precision."""
    if value.dtype == tl.float64:
        return value * power(unpair(log_high, log_low, tl.float64), exponent)
    else:
        n = exponent.to(tl.float32)
        high = n * log_high
        whole = tl.floor(high + 0.5)
        rest = (high - whole) + (fused(n, log_high, -high) + n * log_low)
        # Powers of two in two steps, so that a large value times a small power is not lost.
        twos = tl.maximum(whole, -252.0).to(tl.int32)
        half = twos >> 1
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        second = ((twos - half + 127) << 23).to(tl.float32, bitcast=True)
        second = tl.where(whole < -1074.0, 0.0, second)
        return tl.where(exponent == 0, value, value * tl.exp2(rest) * first * second)


@triton.jit
def tile_values(
    nodes, path, node, tile, shift,
    AT: tl.constexpr, KIND: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """Values of the tokens of a tile, which ``shift`` makes counted from the row's first, and the node there.

    ``node`` is that of the tile behind.
    """
    LATER: tl.constexpr = 1 if AT == BEFORE or AT == STEP else 0
    state = tile.start + (tile.low + shift + 1 - LATER)
    lowest = tile.low + shift + 1 - LATER
    xs = ()
    for k in tl.static_range(PER):
        x = tl.zeros(tile.start.shape, KIND)
        if AT == STEP:
            x += path.bias.to(KIND)
        elif DECAY:
            left = tl.maximum(node.depth - (state + k), 0)
            x += discounted(node.value, left, path.log_high, path.log_low) + path.bias.to(KIND)
        else:
            x += node.value
        xs = xs + (x,)  # noqa: RUF005 (the compiler knows no stars)
    while (node.up >= 0) & (node.above >= lowest):
        upper = node_at(nodes, path, node.up, node.above, AT, KIND, HAS_VALUES, SCALED, DECAY)
        changed = ()
        for k in tl.static_range(PER):
            if AT == STEP:
                step = (path.bias + (node.value - upper.value)).to(KIND)
                x = tl.where(state + k == node.above, step, xs[k])
            elif DECAY:
                left = tl.maximum(upper.depth - (state + k), 0)
                x = discounted(upper.value, left, path.log_high, path.log_low) + path.bias.to(KIND)
                x = tl.where(state + k <= upper.depth, x, xs[k])
            else:
                x = tl.where(state + k <= upper.depth, upper.value, xs[k])
            changed = changed + (x,)  # noqa: RUF005
        xs = changed
        node = upper
    return xs, node


@triton.jit
def tiles_of(columns, part, parts, TILE: tl.constexpr):
    """The tiles ``[low, high)`` of a part of a row."""
    tiles = tl.cdiv(columns, TILE)
    each = tl.cdiv(tiles, parts)
    low = tl.minimum(part * each, tiles)
    return low, tl.minimum(low + each, tiles)


@triton.jit(do_not_specialize=[
    "batch", "width", "total", "mask_stride", "out_stride", "plane", "channels", "parts", "log_high", "log_low",
])  # fmt: skip
def nodes_to_tokens_kernel(
    values, scaled_values, row_bias, factor_in, leaf, first, lengths, depth_in, parent, mask, cu, out,
    batch, width, total, mask_stride, out_stride, plane, channels, parts, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, k, c): the tiles of part k of channel c of row b."""
    # Counts are whole numbers, which float64 holds; a discounted value has the precision of the result.
    KIND: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    row = b.to(tl.int64)
    base, size = row_bounds(cu, b, width, total, PACKED)
    out += c * plane
    if PACKED:  # noqa: SIM102 (known when compiled; the part is not)
        if part == 0:
            write_gaps(out, cu, b, batch, total, T * PER, PACKED)
    numbers = out + base + row * out_stride
    flags = mask + base + row * mask_stride
    columns = size.to(tl.int32)
    begin = tl.load(first + b).to(tl.int32)
    length = tl.load(lengths + b).to(tl.int32)
    factor = tl.zeros([], tl.float64)
    if SCALED:
        factor = tl.load(factor_in + row * channels + c).to(tl.float64)
    bias = tl.zeros([], tl.float64)
    if HAS_BIAS:
        bias = tl.load(row_bias + row * channels + c).to(tl.float64)
    nodes = NodeValues(values, scaled_values, depth_in, parent, c, channels)
    path = Path(length, factor, bias, log_high, log_low)
    deepest = tl.load(leaf + b)
    depth = tl.load(depth_in + deepest, mask=deepest >= 0, other=-1).to(tl.int32)
    node = node_at(nodes, path, deepest, depth, AT, KIND, HAS_VALUES, SCALED, DECAY)
    thread = tl.arange(0, T)
    low, high = tiles_of(columns, part, parts, T * PER)
    for turn in range(0, high - low):
        at = (high - 1 - turn) * (T * PER)
        tile = Tile(at, tl.minimum(columns - at, T * PER), thread * PER, thread == 0, thread)
        # No token behind the row's last one is valid.
        used = Tile(at, tl.minimum(begin + length - at, tile.left), tile.start, tile.first, tile.before)
        xs, node = tile_values(nodes, path, node, tile, -begin, AT, KIND, HAS_VALUES, SCALED, DECAY, PER)
        valid = load_flags(flags, used, HAS_MASK, PER, ALIGNED)
        result = ()
        for k in tl.static_range(PER):
            result = result + (tl.where(valid[k], xs[k], 0),)  # noqa: RUF005
        store_tokens(numbers, tile, result, PER, ALIGNED)


# ---- launch ------------------------------------------------------------------------------------------------


def strides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Elements between the rows and between the channels of a dense per-token array."""
    return (shape[1], shape[0] * shape[1]) if len(shape) == 2 else (0, shape[0])


def nodes_to_tokens(a: NodeTokensArgs, dtype: torch.dtype) -> Tensor:
    if a.skip and a.mask is not None:
        front = nodes_to_tokens(a.without_holes(), dtype)
        return move_back(front, a.mask, places_without_holes(a.mask, a.cu_seqlens))
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    make = a.rows.new_empty if batch else a.rows.new_zeros
    out = make((channels, *a.shape), dtype=dtype)
    if out.numel() == 0 or batch == 0:
        return out
    mask = as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
    out_stride, plane = strides(a.shape)
    parts = splits(a.rows, batch * channels, max(1, cdiv(r.width, TILE)))
    nodes_to_tokens_kernel[(batch, parts, channels)](
        *(a.rows if t is None else t.contiguous() for t in a[:4]), row.leaf, row.first, row.length,
        node.depth, node.parent, pointer(mask, a.rows), r.cu, out, batch, r.width, r.total, stride(mask),
        out_stride, plane, channels, parts, *log2_pair(a.gamma), AT=AT.index(a.at),
        HAS_VALUES=a.values is not None, SCALED=a.scaled_values is not None, HAS_BIAS=a.row_bias is not None,
        DECAY=a.gamma != 1.0, PACKED=packed, HAS_MASK=mask is not None, ALIGNED=is_aligned(r, mask),
        PER=EACH, T=THREADS, num_warps=WARPS, **BITS,
    )  # fmt: skip
    return out
