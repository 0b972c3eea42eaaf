"""Prefix trees on the GPU.

The place of a row among its group's rows comes from comparisons with each of them, up to the first difference.
The common prefixes of neighbours determine the tree. Memory traffic: the tokens that pairs share, mostly from the
cache. Sums over subtrees are computed per node, over its rows in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move, places_without_holes
from ..reference.prefix_tree import PrefixTreeArgs, SubtreeArgs, by_group, members_of
from .launch import BITS, INTERPRETED, pointer, unpair
from .rows import Rows, as_bytes, dense, load_valid, row_bounds, stride
from .tree_records import PLACES, TreeNodes, TreeRows, log2_pair, power
from .tree_tokens import nodes_to_tokens, nodes_to_tokens_backward

__all__ = [
    "nodes_to_tokens", "nodes_to_tokens_backward", "prefix_lcp", "prefix_tree", "subtree_sums",
    "subtree_sums_backward",
]  # fmt: skip

BLOCK = 128 if INTERPRETED else 512  # tokens processed at once


class Enclosing(NamedTuple):
    """The deepest node that encloses some positions."""

    node: Any  # -1 where there is none
    depth: Any


# ---- the tree ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["width", "total", "mask_stride"])
def spans_kernel(
    mask, cu, first, length_out, width, total, mask_stride,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the first valid token of row b, and the length up to its last one."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    begin = tl.zeros([], tl.int64)
    end = length
    if HAS_MASK:
        begin = length
        end = tl.zeros([], tl.int64)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, at < length, True)
            begin = tl.minimum(begin, tl.min(tl.where(valid, at, length), 0))
            end = tl.maximum(end, tl.max(tl.where(valid, at + 1, 0), 0).to(tl.int64))
    tl.store(first + b, tl.where(end > begin, begin, 0))
    tl.store(length_out + b, tl.maximum(end - begin, 0))


@triton.jit
def first_valid(tokens, cu, first, b, width, total, stride, PACKED: tl.constexpr):
    """Pointer to row b's first valid token."""
    base, _ = row_bounds(cu, b, width, total, PACKED)
    return tokens + base + b.to(tl.int64) * stride + tl.load(first + b)


@triton.jit
def common_prefix(x, y, length, BLOCK: tl.constexpr):
    """The number of equal tokens at the front of two rows, of which the shorter has ``length``."""
    same = length
    start = length * 0
    while start < same:
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        x_tokens = tl.load(x + at, mask=inside, other=0)
        y_tokens = tl.load(y + at, mask=inside, other=0)
        same = tl.minimum(same, tl.min(tl.where(inside & (x_tokens != y_tokens), at, length), 0))
        start += BLOCK
    return same


@triton.jit(do_not_specialize=["width", "total", "tokens_stride"])
def places_kernel(
    tokens, members, group_begin, group_end, cu, first, lengths, order, shared, width, total, tokens_stride,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the place of row b among all rows, and its common prefix with the row before it.

    Among all rows before it in lexicographic order, the last one has the longest common prefix with it.
    """
    b = tl.program_id(0)
    x = first_valid(tokens, cu, first, b, width, total, tokens_stride, PACKED)
    length = tl.load(lengths + b)
    begin = tl.load(group_begin + b)
    place = begin
    most = tl.full([], -1, tl.int64)
    for k in range(begin, tl.load(group_end + b)):
        j = tl.load(members + k)
        other_length = tl.load(lengths + j)
        # True if row j is before row b. Empty rows come last, in the order of their numbers.
        before = (other_length > 0) | (j < b)
        if length > 0:
            before = (other_length > 0) & (j < b)
            shorter = tl.minimum(length, other_length)
            if shorter > 0:
                y = first_valid(tokens, cu, first, j, width, total, tokens_stride, PACKED)
                same = common_prefix(x, y, shorter, BLOCK)
                differ = same < shorter
                x_token = tl.load(x + same, mask=differ, other=0)
                y_token = tl.load(y + same, mask=differ, other=0)
                ends_first = (other_length < length) | ((other_length == length) & (j < b))
                before = (differ & (y_token < x_token)) | ((same == shorter) & ends_first)
                most = tl.where(before, tl.maximum(most, same), most)
        place += (before & (j != b)).to(tl.int64)
    tl.store(order + place, b.to(tl.int64))
    tl.store(shared + place, most)


@triton.jit
def last_below(shared, upto, depth, BLOCK: tl.constexpr):
    """The last position up to ``upto`` that shares less than ``depth``; -1 where there is none."""
    start = upto // BLOCK * BLOCK
    position = upto * 0 - 1
    while (start >= 0) & (position < 0):
        at = start + tl.arange(0, BLOCK)
        inside = at <= upto
        x = tl.load(shared + at, mask=inside, other=0)
        position = tl.max(tl.where(inside & (x < depth), at, -1), 0)
        start -= BLOCK
    return position


@triton.jit
def first_up_to(shared, begin, batch, depth, BELOW: tl.constexpr, BLOCK: tl.constexpr):
    """The first position from ``begin`` that shares less than ``depth`` (BELOW) or equals it; else ``batch``."""
    start = begin // BLOCK * BLOCK
    position = begin * 0 + batch
    while (start < batch) & (position == batch):
        at = start + tl.arange(0, BLOCK)
        inside = (at >= begin) & (at < batch)
        x = tl.load(shared + at, mask=inside, other=0)
        hit = inside & ((x < depth) if BELOW else (x == depth))
        position = tl.min(tl.where(hit, at, batch), 0)
        start += BLOCK
    return position


@triton.jit
def enclosing(shared, begin, end, batch, BLOCK: tl.constexpr):
    """The prefix that the rows at ``[begin, end)`` share with a neighbour; -1 where there is none."""
    depth = tl.maximum(tl.load(shared + begin), tl.load(shared + end, mask=end < batch, other=-1))
    node = begin * 0 - 1
    if depth >= 0:
        start = last_below(shared, begin, depth, BLOCK)
        node = first_up_to(shared, start + 1, batch, depth, False, BLOCK)
    return Enclosing(node, depth)


@triton.jit
def store_node(nodes, n, node, exists):
    tl.store(nodes.begin + n, tl.where(exists, node.begin, 0))
    tl.store(nodes.end + n, tl.where(exists, node.end, 0))
    tl.store(nodes.depth + n, tl.where(exists, node.depth, -1))
    tl.store(nodes.parent + n, tl.where(exists, node.parent, -1))


@triton.jit(do_not_specialize=["batch"])
def nodes_kernel(
    order, leaf, lengths, shared, begin_out, end_out, depth_out, parent_out, batch, BLOCK: tl.constexpr
):
    """Program p: the nodes p and batch + p."""
    p = tl.program_id(0).to(tl.int64)
    nodes = TreeNodes(begin_out, end_out, depth_out, parent_out)
    # The prefix at which the rows at p - 1 and p diverge, unless an earlier position has the same one.
    depth = tl.load(shared + p)
    begin = p * 0
    end = p * 0
    parent = p * 0 - 1
    is_first = depth >= 0
    if is_first:
        begin = last_below(shared, p - 1, depth, BLOCK)
        is_first = first_up_to(shared, begin + 1, batch, depth, False, BLOCK) == p
        end = first_up_to(shared, p + 1, batch, depth, True, BLOCK)
        parent, _ = enclosing(shared, begin, end, batch, BLOCK)
    store_node(nodes, p, TreeNodes(begin, end, depth, parent), is_first)

    # The tokens that the row at p shares with no other row.
    row = tl.load(order + p)
    length = tl.load(lengths + row)
    parent, depth = enclosing(shared, p, p + 1, batch, BLOCK)
    is_alone = length > tl.maximum(depth, 0)
    node = batch + p
    store_node(nodes, node, TreeNodes(p, p + 1, length, parent), is_alone)
    tl.store(leaf + row, tl.where(is_alone, node, tl.where(length > 0, parent, -1)))


def prefix_tree(a: PrefixTreeArgs) -> tuple[Tensor, Tensor]:
    tokens, mask = a.tokens, a.mask
    if a.skip and mask is not None:
        places = places_without_holes(mask, a.cu_seqlens)
        tokens, mask = move(tokens, mask, places), move(mask, mask, places)
    groups, mask, tokens = a.groups.contiguous(), as_bytes(mask), dense(tokens)
    r = Rows.of(tokens.shape, a.cu_seqlens, groups)
    rows = groups.new_empty(len(TreeRows._fields), r.batch)
    nodes = groups.new_empty(len(TreeNodes._fields), 2 * r.batch)
    if r.batch == 0:
        return rows, nodes
    out = TreeRows(*rows)
    grid = (r.batch,)
    spans_kernel[grid](
        pointer(mask, groups), r.cu, out.first, out.length, r.width, r.total, stride(mask),
        PACKED=r.packed, HAS_MASK=mask is not None, BLOCK=BLOCK, **BITS,
    )  # fmt: skip
    places_kernel[grid](
        tokens, *by_group(groups), r.cu, out.first, out.length, out.order, out.shared, r.width, r.total,
        stride(tokens), PACKED=r.packed, BLOCK=BLOCK, **BITS,
    )  # fmt: skip
    nodes_kernel[grid](out.order, out.leaf, out.length, out.shared, *nodes, r.batch, BLOCK=PLACES, **BITS)
    return rows, nodes


@triton.jit(do_not_specialize=["batch", "most"])
def prefix_lcp_kernel(order, lengths, shared, rank, lcp, batch, most):
    """Program p: the common prefixes of the row at p with the rows of its group, from its neighbours outwards."""
    p = tl.program_id(0).to(tl.int64)
    row = tl.load(order + p)
    target = lcp + row * most
    place = tl.load(rank + row)
    length = tl.load(lengths + row)
    tl.store(target + place, tl.where(length > 0, length, -1).to(tl.int32), mask=place < most)
    least = length
    q = p
    common = tl.load(shared + q)
    while common >= 0:
        q -= 1
        least = tl.minimum(least, common)
        place = tl.load(rank + tl.load(order + q))
        tl.store(target + place, least.to(tl.int32), mask=place < most)
        common = tl.load(shared + q)
    least = length
    q = p + 1
    common = tl.load(shared + q, mask=q < batch, other=-1)
    while common >= 0:
        least = tl.minimum(least, common)
        place = tl.load(rank + tl.load(order + q))
        tl.store(target + place, least.to(tl.int32), mask=place < most)
        q += 1
        common = tl.load(shared + q, mask=q < batch, other=-1)


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    members, rank = members_of(groups, most)
    tree = TreeRows(*rows.contiguous())
    lcp = groups.new_full((len(groups), most), -1, dtype=torch.int32)
    if len(groups):
        prefix_lcp_kernel[(len(groups),)](
            tree.order, tree.length, tree.shared, rank, lcp, len(groups), most, **BITS
        )
    return members.to(torch.int32), lcp


# ---- sums over subtrees ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["channels", "log_high", "log_low"])
def subtree_sums_kernel(
    x, weights, centre, order, lengths, begin_in, end_in, depth_in, out, channels, log_high, log_low,
    HAS_WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, c): channel c over the rows of node n."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    begin = tl.load(begin_in + n)
    end = tl.load(end_in + n)
    log2_gamma = unpair(log_high, log_low, tl.float64)
    lanes = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        row = tl.load(order + at, mask=inside, other=0)
        term = tl.load(x + row * channels + c, mask=inside, other=0.0)
        if CENTRED:
            term -= tl.load(centre + n * channels + c)
            term *= term
        if DECAY:
            tokens_left = tl.load(lengths + row, mask=inside, other=0) - tl.load(depth_in + n)
            term *= power(log2_gamma, tokens_left)
        if HAS_WEIGHTS:
            term *= tl.load(weights + row, mask=inside, other=0.0)
        lanes += tl.where(inside, term, 0.0)
    tl.store(out + n * channels + c, tl.sum(lanes, 0))


@triton.jit(do_not_specialize=["channels", "log_high", "log_low"])
def subtree_sums_backward_kernel(
    grad, x, weights, centre, leaf, lengths, depth_in, parent, grad_x, grad_weights, channels, log_high, log_low,
    HAS_WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, DECAY: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program b: the gradient of row b, summed over the nodes on its path."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    log2_gamma = unpair(log_high, log_low, tl.float64)
    value = tl.load(x + b * channels + c, mask=inside, other=0.0)
    node = tl.load(leaf + b)
    weight = tl.full([], 1.0, tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights + b, mask=node >= 0, other=0.0)  # the weight of an empty row is arbitrary
    by_x = tl.zeros([CHANNELS], tl.float64)
    by_weight = tl.zeros([CHANNELS], tl.float64)
    length = tl.load(lengths + b)
    while node >= 0:
        up = tl.load(grad + node * channels + c, mask=inside, other=0.0)
        if DECAY:
            up *= power(log2_gamma, length - tl.load(depth_in + node))
        if CENTRED:
            difference = value - tl.load(centre + node * channels + c, mask=inside, other=0.0)
            by_x += 2.0 * difference * up
            by_weight += difference * difference * up
        else:
            by_x += up
            by_weight += value * up
        node = tl.load(parent + node)
    tl.store(grad_x + b * channels + c, weight * by_x, mask=inside)
    if HAS_WEIGHTS:
        tl.store(grad_weights + b, tl.sum(tl.where(inside, by_weight, 0.0), 0))


def subtree_sums(a: SubtreeArgs) -> Tensor:
    x, number = a.x.contiguous(), a.nodes.shape[1]
    out = x.new_empty(number, x.shape[1])
    if out.numel():
        row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
        subtree_sums_kernel[(number, x.shape[1])](
            x, *(x if t is None else t.contiguous() for t in (a.weights, a.centre)), row.order, row.length,
            node.begin, node.end, node.depth, out, x.shape[1], *log2_pair(a.gamma),
            HAS_WEIGHTS=a.weights is not None, CENTRED=a.centre is not None,
            DECAY=a.gamma != 1.0 and a.centre is None, BLOCK=PLACES, **BITS,
        )  # fmt: skip
    return out


def subtree_sums_backward(grad: Tensor, a: SubtreeArgs) -> tuple[Tensor, Tensor]:
    x = a.x.contiguous()
    by_x = x.new_empty(x.shape)
    by_weight = x.new_zeros(0 if a.weights is None else a.weights.shape)
    if by_x.numel():
        row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
        subtree_sums_backward_kernel[(x.shape[0],)](
            grad.contiguous(), x, *(x if t is None else t.contiguous() for t in (a.weights, a.centre)),
            row.leaf, row.length, node.depth, node.parent, by_x, by_weight, x.shape[1], *log2_pair(a.gamma),
            HAS_WEIGHTS=a.weights is not None, CENTRED=a.centre is not None,
            DECAY=a.gamma != 1.0 and a.centre is None, CHANNELS=triton.next_power_of_2(x.shape[1]), **BITS,
        )  # fmt: skip
    return by_x, by_weight
