"""Values of a prefix tree's nodes written to the tokens of its rows on the GPU, and the gradient.

Memory traffic: one write per token forward, one read per token backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move, move_back, places_without_holes
from ..reference.prefix_tree import AT, NodeTokensArgs
from .launch import BITS, INTERPRETED, Constant, cdiv, pointer, splits, unpair
from .rows import Rows, as_bytes, load_valid, output, row_bounds, stride
from .tree_records import TreeNodes, TreeRows, log2_pair, power

BLOCK = 128 if INTERPRETED else 512  # tokens processed at once

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
    log2_gamma: Any


class Path(NamedTuple):
    """A row's path through the tree."""

    leaf: Any  # its deepest node, -1 for an empty row
    length: Any  # tokens of the row
    factor: Any  # factor of ``scaled`` in this channel; 1 for the derivative by the factor


@triton.jit
def values_of(
    nodes, path, at, lowest,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The values of a block of a row's tokens, counted from its first; ``lowest`` is the block's first."""
    result = tl.zeros([BLOCK], tl.float64)
    state = at + (0 if AT == BEFORE else 1)
    node = path.leaf
    while node >= 0:
        depth = tl.load(nodes.depth + node)
        up = tl.load(nodes.parent + node)
        above = tl.load(nodes.depth + up, mask=up >= 0, other=-1)
        here = node * nodes.channels + nodes.channel
        there = up * nodes.channels + nodes.channel
        value = tl.zeros([], tl.float64)
        before = tl.zeros([], tl.float64)
        if HAS_VALUES:
            value += tl.load(nodes.value + here)
            if AT == STEP:
                before += tl.load(nodes.value + there, mask=up >= 0, other=0.0)
        if SCALED:
            x = path.factor * tl.load(nodes.scaled + here)
            if DECAY:
                x *= power(nodes.log2_gamma, path.length - depth)
            value += x
            if AT == STEP:
                before += path.factor * tl.load(nodes.scaled + there, mask=up >= 0, other=0.0)
        if AT == STEP:
            result = tl.where(at == above, value - before, result)
        else:
            in_node = (state > above) & ((state <= depth) | (node == path.leaf))
            if DECAY:
                value = value * power(nodes.log2_gamma, depth - state)
            result = tl.where(in_node, value, result)
        # Nodes nearer the root have no state in this block.
        node = tl.where(above >= lowest, up, -1)
    return result


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "out_stride", "plane", "channels", "splits", "log_high", "log_low",
])  # fmt: skip
def nodes_to_tokens_kernel(
    values, scaled_values, row_bias, factor_in, leaf, first, lengths, depth_in, parent, mask, cu, out,
    width, total, mask_stride, out_stride, plane, channels, splits, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k, c): the blocks k, k + splits, ... of channel c of row b."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2).to(tl.int64)
    nodes = NodeValues(
        values, scaled_values, depth_in, parent, c, channels, unpair(log_high, log_low, tl.float64)
    )
    begin, columns = row_bounds(cu, b, width, total, PACKED)
    first_column = tl.load(first + b)
    factor = tl.zeros([], tl.float64)
    if SCALED:
        factor = tl.load(factor_in + b * channels + c)
    path = Path(tl.load(leaf + b), tl.load(lengths + b), factor)
    for start in range(tl.program_id(1) * BLOCK, columns, splits * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        at = column - first_column
        valid = load_valid(mask, begin + b * mask_stride + column, inside, HAS_MASK)
        valid = valid & (at >= 0) & (at < path.length)
        x = values_of(nodes, path, at, start - first_column, AT, HAS_VALUES, SCALED, DECAY, BLOCK)
        if HAS_BIAS:
            x += tl.load(row_bias + b * channels + c)
        x = tl.where(valid, x, 0.0).to(out.dtype.element_ty)
        tl.store(out + c * plane + begin + b * out_stride + column, x, mask=inside)


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "log_high", "log_low",
])  # fmt: skip
def nodes_backward_kernel(
    grad, factor_in, order, leaf, first, lengths, begin_in, end_in, depth_in, parent, mask, cu, by_value, by_scaled,
    width, total, mask_stride, grad_stride, plane, channels, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, c): the gradient of node n, summed over the tokens whose state lies in it, row by row."""
    SHIFT: tl.constexpr = 0 if AT == BEFORE else 1
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    depth = tl.load(depth_in + n)
    up = tl.load(parent + n)
    above = tl.load(depth_in + up, mask=up >= 0, other=-1)
    log2_gamma = unpair(log_high, log_low, tl.float64)
    lanes = tl.zeros([BLOCK], tl.float64)
    scaled = tl.zeros([BLOCK], tl.float64)
    for p in range(tl.load(begin_in + n), tl.load(end_in + n)):
        row = tl.load(order + p)
        deepest = tl.load(leaf + row)
        length = tl.load(lengths + row)
        reached = tl.load(depth_in + deepest) >= depth
        begin, _ = row_bounds(cu, row, width, total, PACKED)
        begin += tl.load(first + row)
        source = grad + c * plane + begin + row * grad_stride
        place = begin + row * mask_stride
        factor = tl.zeros([], tl.float64)
        if SCALED:
            factor = tl.load(factor_in + row * channels + c)
            if DECAY:
                factor *= power(log2_gamma, length - depth)
        if AT == STEP:
            lane = tl.arange(0, BLOCK)
            # The token that enters the node, and the one that leaves it.
            at = tl.where(lane == 0, above, depth)
            last = tl.where(deepest != n, 1, 0)
            valid = (lane >= tl.where(above >= 0, 0, 1)) & (lane <= tl.where(reached, last, -1))
            valid = load_valid(mask, place + at, valid, HAS_MASK)
            x = tl.load(source + at, mask=valid, other=0.0).to(tl.float64)
            x = tl.where(lane == 0, x, -x)
            lanes += x
            scaled += factor * x
        else:
            from_token = tl.maximum(above + 1 - SHIFT, 0)
            to_token = tl.minimum(tl.where(deepest == n, length, depth) + 1 - SHIFT, length)
            to_token = tl.where(reached, to_token, from_token)
            for start in range(from_token, to_token, BLOCK):
                at = start + tl.arange(0, BLOCK)
                valid = load_valid(mask, place + at, at < to_token, HAS_MASK)
                x = tl.load(source + at, mask=valid, other=0.0).to(tl.float64)
                if DECAY:
                    x *= power(log2_gamma, depth - at - SHIFT)
                lanes += x
                scaled += factor * x
    if HAS_VALUES:
        tl.store(by_value + n * channels + c, tl.sum(lanes, 0))
    if SCALED:
        tl.store(by_scaled + n * channels + c, tl.sum(scaled, 0))


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "log_high", "log_low",
])  # fmt: skip
def rows_backward_kernel(
    grad, scaled_values, leaf, first, lengths, depth_in, parent, mask, cu, by_bias, by_factor,
    width, total, mask_stride, grad_stride, plane, channels, log_high, log_low,
    AT: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, c): the gradients of row b's bias and factor, summed over its tokens."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    begin, _ = row_bounds(cu, b, width, total, PACKED)
    begin += tl.load(first + b)
    nodes = NodeValues(
        scaled_values, scaled_values, depth_in, parent, c, channels, unpair(log_high, log_low, tl.float64)
    )
    path = Path(tl.load(leaf + b), tl.load(lengths + b), 1.0)
    plain = tl.zeros([BLOCK], tl.float64)
    scaled = tl.zeros([BLOCK], tl.float64)
    for start in range(0, path.length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, begin + b * mask_stride + at, at < path.length, HAS_MASK)
        x = tl.load(grad + c * plane + begin + b * grad_stride + at, mask=valid, other=0.0).to(tl.float64)
        plain += x
        if SCALED:
            value = values_of(nodes, path, at, start, AT, False, True, DECAY, BLOCK)
            scaled += tl.where(valid, x * value, 0.0)
    if HAS_BIAS:
        tl.store(by_bias + b * channels + c, tl.sum(plain, 0))
    if SCALED:
        tl.store(by_factor + b * channels + c, tl.sum(scaled, 0))


# ---- launch ------------------------------------------------------------------------------------------------


def _strides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Elements between the rows and between the channels of a dense per-token array."""
    return (shape[1], shape[0] * shape[1]) if len(shape) == 2 else (0, shape[0])


def nodes_to_tokens(a: NodeTokensArgs, dtype: torch.dtype) -> Tensor:
    if a.skip and a.mask is not None:
        front = nodes_to_tokens(a.without_holes(), dtype)
        return move_back(front, a.mask, places_without_holes(a.mask, a.cu_seqlens))
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    out = output(a.rows, (channels, *a.shape), packed, dtype)
    if out.numel() == 0 or batch == 0:
        return out
    mask = as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
    out_stride, plane = _strides(a.shape)
    parts = splits(a.rows, batch * channels, max(1, cdiv(r.width, BLOCK)))
    nodes_to_tokens_kernel[(batch, parts, channels)](
        *(a.rows if t is None else t.contiguous() for t in a[:4]), row.leaf, row.first, row.length,
        node.depth, node.parent, pointer(mask, a.rows), r.cu, out, r.width, r.total, stride(mask), out_stride,
        plane, channels, parts, *log2_pair(a.gamma), AT=AT.index(a.at), HAS_VALUES=a.values is not None,
        SCALED=a.scaled_values is not None, HAS_BIAS=a.row_bias is not None, DECAY=a.gamma != 1.0, PACKED=packed,
        HAS_MASK=mask is not None, BLOCK=BLOCK, **BITS,
    )  # fmt: skip
    return out


def nodes_to_tokens_backward(grad: Tensor, a: NodeTokensArgs) -> tuple[Tensor, ...]:
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, a.without_holes())
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    by_value, by_scaled, by_bias, by_factor = a.zero_gradients(grad)
    if grad.numel() == 0 or batch == 0:
        return by_value, by_scaled, by_bias, by_factor
    grad, mask = grad.contiguous(), as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
    grad_stride, plane = _strides(a.shape)
    sizes = (r.width, r.total, stride(mask), grad_stride, plane, channels, *log2_pair(a.gamma))
    options = {
        "AT": AT.index(a.at), "SCALED": a.scaled_values is not None, "DECAY": a.gamma != 1.0, "PACKED": packed,
        "HAS_MASK": mask is not None, "BLOCK": BLOCK,
    }  # fmt: skip
    nodes_backward_kernel[(a.nodes.shape[1], channels)](
        grad, grad if a.row_factor is None else a.row_factor.contiguous(), row.order, row.leaf, row.first,
        row.length, *node, pointer(mask, a.rows), r.cu, by_value, by_scaled, *sizes,
        HAS_VALUES=a.values is not None, **options, **BITS,
    )  # fmt: skip
    if a.row_bias is not None or a.row_factor is not None:
        rows_backward_kernel[(batch, channels)](
            grad, grad if a.scaled_values is None else a.scaled_values.contiguous(), row.leaf, row.first,
            row.length, node.depth, node.parent, pointer(mask, a.rows), r.cu, by_bias, by_factor, *sizes,
            HAS_BIAS=a.row_bias is not None, **options, **BITS,
        )  # fmt: skip
    return by_value, by_scaled, by_bias, by_factor
