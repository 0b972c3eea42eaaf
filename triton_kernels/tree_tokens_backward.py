"""Gradients of a prefix tree's nodes and rows from those of their tokens, on the GPU.

A node's tokens lie in all of its rows: threads take chunks of 16 of them, row by row. Memory traffic: one read per
token for the nodes, and one for bias and factor of the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move, places_without_holes
from ..reference.prefix_tree import AT, NodeTokensArgs
from .arithmetic import Pair, sum_pairs
from .launch import BITS, INTERPRETED, cdiv, pointer, splits, unpair
from .rows import Rows, as_bytes, load_valid, row_bounds, stride
from .scans import plus
from .tiles import (
    EACH,
    THREADS,
    TILE,
    WARPS,
    Tile,
    is_aligned,
    load_flags,
    load_tokens,
)
from .tree_chunks import NodeRows, chunk_flags, end_of_piece, load_chunk, pieces
from .tree_records import TreeNodes, TreeRows, log2_pair, power
from .tree_tokens import BEFORE, STEP, NodeValues, Path, discounted, node_at, strides, tiles_of

CHUNKS = 8 if INTERPRETED else 128  # threads of a node's program, each with a chunk of EACH tokens
CHUNK_WARPS = 4


class Gradients(NamedTuple):
    """Gradients of tokens; pointers and sizes."""

    grad: Any  # one channel
    mask: Any  # bytes
    cu: Any  # offsets of packed rows
    factor: Any  # [B, C], of the channel
    width: Any
    total: Any
    grad_stride: Any  # between padded rows; 0 for packed ones
    mask_stride: Any
    channels: Any
    log_high: Any
    log_low: Any


@triton.jit
def sum_node(
    x, node, part, parts,
    ACC: tl.constexpr, AT: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of the tokens whose state lies in the node, summed; and the same times the rows' factors."""
    SHIFT: tl.constexpr = 0 if AT == BEFORE else 1
    thread = tl.arange(0, T)
    begin = tl.maximum(node.above + 1 - SHIFT, 0)
    ends = tl.zeros([T], tl.int32)
    for start in range(0, node.count, T):
        k = start + thread
        ends = tl.maximum(ends, end_of_piece(node, pieces(node, k, k < node.count), SHIFT))
    # Chunks begin at multiples of PER tokens of the row; this many hold a piece wherever it begins.
    chunks = tl.maximum((tl.max(ends, 0) - begin + (2 * PER - 2)) // PER, 1)
    plain = Pair(tl.zeros([T], ACC), tl.zeros([T], ACC))
    scaled = tl.zeros([T], tl.float64)
    log2_gamma = unpair(x.log_high, x.log_low, tl.float64)
    for start in range(part * T, node.count * chunks, parts * T):
        k = (start + thread) // chunks
        inside = k < node.count
        piece = pieces(node, k, inside)
        end = piece.first + end_of_piece(node, piece, SHIFT)
        low = piece.first + begin
        at = low // PER * PER + (start + thread - k * chunks) * PER
        base, _ = row_bounds(x.cu, tl.where(inside, piece.row, 0), x.width, x.total, PACKED)
        tokens = load_chunk(x.grad + base + piece.row * x.grad_stride + at, at, low, end, PER, ALIGNED)
        if HAS_MASK:
            flags = chunk_flags(x.mask + base + piece.row * x.mask_stride + at, at, low, end, PER, ALIGNED)
        total = Pair(tl.zeros([T], ACC), tl.zeros([T], ACC))
        for i in tl.static_range(PER):
            token = tokens[i]
            if ALIGNED:
                token = tl.where((at + i >= low) & (at + i < end), token, 0.0)
            if HAS_MASK:
                token = tl.where(flags[i], token, 0.0)
            token = token.to(ACC)
            if DECAY:
                left = tl.maximum(node.depth - (at + i - piece.first) - SHIFT, 0)
                token = discounted(token, left, x.log_high, x.log_low)
            total = plus(total, token)
        if SCALED:
            factor = tl.load(x.factor + piece.row * x.channels, mask=inside, other=0.0).to(tl.float64)
            if DECAY:
                factor *= power(log2_gamma, piece.length - node.depth)
            term = factor * (total.sum.to(tl.float64) + total.rest.to(tl.float64))
            scaled += tl.where(piece.reached, term, 0.0)
        plain = plus(plain, total.sum)
        plain = Pair(plain.sum, plain.rest + total.rest)
    return sum_pairs(plain), tl.sum(scaled, 0)


@triton.jit
def sum_steps(
    x, node, part, parts,
    SCALED: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of the tokens that enter a node less those of the tokens that leave it; and times factors."""
    plain = tl.zeros([T], tl.float64)
    scaled = tl.zeros([T], tl.float64)
    log2_gamma = unpair(x.log_high, x.log_low, tl.float64)
    for start in range(part * T, node.count, parts * T):
        k = start + tl.arange(0, T)
        inside = k < node.count
        piece = pieces(node, k, inside)
        base, _ = row_bounds(x.cu, tl.where(inside, piece.row, 0), x.width, x.total, PACKED)
        source = x.grad + base + piece.row * x.grad_stride + piece.first
        flags = x.mask + base + piece.row * x.mask_stride + piece.first
        above = tl.zeros([T], tl.int32) + node.above
        enters = load_valid(flags, above, piece.reached & (above >= 0), HAS_MASK)
        leaves = load_valid(flags, node.depth, piece.reached & ~piece.deepest, HAS_MASK)
        term = tl.load(source + above, mask=enters, other=0.0).to(tl.float64)
        term -= tl.load(source + node.depth, mask=leaves, other=0.0).to(tl.float64)
        plain += term
        if SCALED:
            factor = tl.load(x.factor + piece.row * x.channels, mask=piece.reached, other=0.0).to(tl.float64)
            if DECAY:
                factor *= power(log2_gamma, piece.length - node.depth)
            scaled += factor * term
    return tl.sum(plain, 0), tl.sum(scaled, 0)


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "parts", "log_high", "log_low",
])  # fmt: skip
def nodes_backward_kernel(
    grad, factor_in, order, leaf, first, lengths, begin_in, end_in, depth_in, parent, mask, cu, by_value, by_scaled,
    width, total, mask_stride, grad_stride, plane, channels, parts, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (n, k, c): part k of the gradient of channel c of node n."""
    n = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    begin = tl.load(begin_in + n).to(tl.int32)
    count = tl.load(end_in + n).to(tl.int32) - begin
    depth = tl.load(depth_in + n).to(tl.int32)
    up = tl.load(parent + n)
    above = tl.load(depth_in + up, mask=up >= 0, other=-1).to(tl.int32)
    node = NodeRows(n, begin, count, depth, above, order, leaf, first, lengths, depth_in)
    x = Gradients(
        grad + c * plane, mask, cu, factor_in + c, width, total, grad_stride, mask_stride, channels, log_high,
        log_low,
    )  # fmt: skip
    plain = tl.zeros([], tl.float64)
    scaled = tl.zeros([], tl.float64)
    if count > 0:
        if AT == STEP:
            plain, scaled = sum_steps(x, node, part, parts, SCALED, DECAY, PACKED, HAS_MASK, T)
        else:
            plain, scaled = sum_node(
                x,
                node,
                part,
                parts,
                grad.dtype.element_ty,
                AT,
                SCALED,
                DECAY,
                PACKED,
                HAS_MASK,
                ALIGNED,
                PER,
                T,
            )
            # What is infinite or NaN, or beyond the range of float32 on the way, is summed plainly.
            if (tl.abs(plain) < float("inf")) & (tl.abs(scaled) < float("inf")) == 0:
                plain, scaled = sum_node(
                    x, node, part, parts, tl.float64, AT, SCALED, DECAY, PACKED, HAS_MASK, ALIGNED, PER, T
                )
    here = (part * tl.num_programs(0) + n).to(tl.int64) * channels + c
    if HAS_VALUES:
        tl.store(by_value + here, plain)
    if SCALED:
        tl.store(by_scaled + here, scaled)


@triton.jit
def tokens_of_node(tokens, state, node, path, CARRIED: tl.constexpr, AT: tl.constexpr, DECAY: tl.constexpr):
    """The sum of a thread's tokens whose state lies in the node, float64; CARRIED: no token of the tile is deeper.

    Of a difference, that of the token which leaves the node above.
    """
    KIND: tl.constexpr = tokens[0].dtype
    total = Pair(tl.zeros(state.shape, KIND), tl.zeros(state.shape, KIND))
    for k in tl.static_range(len(tokens)):
        token = tokens[k]
        if AT == STEP:
            token = tl.where(state + k == node.above, token, 0.0)
        else:
            inside = state + k > node.above
            if not CARRIED:
                inside = inside & (state + k <= node.depth)
            if DECAY:
                left = tl.maximum(node.depth - (state + k), 0)
                token = discounted(token, left, path.log_high, path.log_low)
            token = tl.where(inside, token, 0.0)
        total = plus(total, token)
    return total.sum.to(tl.float64) + total.rest.to(tl.float64)


@triton.jit
def sum_row(
    grads, flags, nodes, path, leaf, begin, columns, part, parts,
    ACC: tl.constexpr, AT: tl.constexpr, SCALED: tl.constexpr, DECAY: tl.constexpr, HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of a row's tokens, summed; and the same times the derivatives by the factor."""
    SHIFT: tl.constexpr = 0 if AT == BEFORE or AT == STEP else 1
    thread = tl.arange(0, T)
    plain = Pair(tl.zeros([T], ACC), tl.zeros([T], ACC))
    scaled = tl.zeros([T], tl.float64)
    depth = tl.load(nodes.depth + leaf, mask=leaf >= 0, other=-1).to(tl.int32)
    node = node_at(nodes, path, leaf, depth, AT, tl.float64, False, SCALED, DECAY)
    end = tl.minimum(begin + path.length, columns)
    low, high = tiles_of(columns, part, parts, T * PER)
    for turn in range(0, high - low):
        at = (high - 1 - turn) * (T * PER)
        tile = Tile(at, tl.minimum(end - at, T * PER), thread * PER, thread == 0, thread)
        valid = load_flags(flags, tile, HAS_MASK, PER, ALIGNED)
        loaded = load_tokens(grads, tile, PER, ALIGNED)
        tokens = ()
        for k in tl.static_range(PER):
            token = tl.where(valid[k], loaded[k], 0.0).to(ACC)
            tokens = tokens + (token,)  # noqa: RUF005 (the compiler knows no stars)
            plain = plus(plain, token)
        if SCALED:
            lowest = at - begin + SHIFT
            state = tile.start + lowest
            if AT != STEP:
                scaled += node.value * tokens_of_node(tokens, state, node, path, True, AT, DECAY)
            while (node.up >= 0) & (node.above >= lowest):
                upper = node_at(nodes, path, node.up, node.above, AT, tl.float64, False, SCALED, DECAY)
                if AT == STEP:
                    step = node.value - upper.value
                    scaled += step * tokens_of_node(tokens, state, node, path, False, AT, DECAY)
                else:
                    scaled += upper.value * tokens_of_node(tokens, state, upper, path, False, AT, DECAY)
                node = upper
    return sum_pairs(plain), tl.sum(scaled, 0)


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "parts", "log_high", "log_low",
])  # fmt: skip
def rows_backward_kernel(
    grad, scaled_values, leaf, first, lengths, depth_in, parent, mask, cu, by_bias, by_factor,
    width, total, mask_stride, grad_stride, plane, channels, parts, log_high, log_low,
    AT: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, k, c): part k of the gradients of row b's bias and factor, summed over its tokens."""
    b = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.program_id(2).to(tl.int64)
    row = b.to(tl.int64)
    base, size = row_bounds(cu, b, width, total, PACKED)
    grads = grad + c * plane + base + row * grad_stride
    flags = mask + base + row * mask_stride
    nodes = NodeValues(scaled_values, scaled_values, depth_in, parent, c, channels)
    one = tl.full([], 1.0, tl.float64)
    path = Path(tl.load(lengths + b).to(tl.int32), one, one * 0.0, log_high, log_low)
    begin = tl.load(first + b).to(tl.int32)
    deepest = tl.load(leaf + b)
    columns = size.to(tl.int32)
    plain, scaled = sum_row(
        grads, flags, nodes, path, deepest, begin, columns, part, parts,
        grad.dtype.element_ty, AT, SCALED, DECAY, HAS_MASK, ALIGNED, PER, T,
    )  # fmt: skip
    if (tl.abs(plain) < float("inf")) & (tl.abs(scaled) < float("inf")) == 0:
        plain, scaled = sum_row(
            grads, flags, nodes, path, deepest, begin, columns, part, parts,
            tl.float64, AT, SCALED, DECAY, HAS_MASK, ALIGNED, PER, T,
        )  # fmt: skip
    here = (part * tl.num_programs(0) + b).to(tl.int64) * channels + c
    if HAS_BIAS:
        tl.store(by_bias + here, plain.to(by_bias.dtype.element_ty))
    if SCALED:
        tl.store(by_factor + here, scaled.to(by_factor.dtype.element_ty))


# ---- launch ------------------------------------------------------------------------------------------------


def nodes_to_tokens_backward(grad: Tensor, a: NodeTokensArgs) -> tuple[Tensor, ...]:
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, a.without_holes())
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    if grad.numel() == 0 or batch == 0:
        return a.zero_gradients(grad)
    grad, mask = grad.contiguous(), as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
    parts = splits(a.rows, batch * channels, max(1, cdiv(r.width, TILE)))
    gradients = [
        grad.new_empty(0)
        if t is None
        else t.new_empty((parts, *t.shape), dtype=t.dtype if parts == 1 else torch.float64)
        for t in a[:4]
    ]
    by_value, by_scaled, by_bias, by_factor = gradients
    grad_stride, plane = strides(a.shape)
    sizes = (r.width, r.total, stride(mask), grad_stride, plane, channels, parts, *log2_pair(a.gamma))
    aligned = is_aligned(r, mask) and grad.data_ptr() % 16 == 0
    options = {
        "AT": AT.index(a.at), "SCALED": a.scaled_values is not None, "DECAY": a.gamma != 1.0, "PACKED": packed,
        "HAS_MASK": mask is not None, "ALIGNED": aligned, "PER": EACH,
    }  # fmt: skip
    nodes_backward_kernel[(a.nodes.shape[1], parts, channels)](
        grad, grad if a.row_factor is None else a.row_factor.contiguous(), row.order, row.leaf, row.first,
        row.length, *node, pointer(mask, a.rows), r.cu, by_value, by_scaled, *sizes,
        HAS_VALUES=a.values is not None, T=CHUNKS, num_warps=CHUNK_WARPS, **options, **BITS,
    )  # fmt: skip
    if a.row_bias is not None or a.row_factor is not None:
        rows_backward_kernel[(batch, parts, channels)](
            grad, grad if a.scaled_values is None else a.scaled_values.contiguous(), row.leaf, row.first,
            row.length, node.depth, node.parent, pointer(mask, a.rows), r.cu, by_bias, by_factor, *sizes,
            HAS_BIAS=a.row_bias is not None, T=THREADS, num_warps=WARPS, **options, **BITS,
        )  # fmt: skip
    return tuple(
        g if t is None else g[0] if parts == 1 else g.sum(0).to(t.dtype)
        for g, t in zip(gradients, a[:4], strict=True)
    )
