"""Prefix trees on the GPU.

Rows in lexicographic order (``tree_places``), and the common prefixes of neighbours, determine the tree. Sums over
subtrees are computed per node, over its rows in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move, places_without_holes
from ..reference.prefix_tree import PrefixTreeArgs, SubtreeArgs
from .groups import ROWS, begin_of_group, end_of_group, place_rows
from .launch import BITS, INTERPRETED, cdiv, pointer, splits, unpair
from .rows import Rows, as_bytes, dense, stride
from .tree_places import CODES, SPANS, WARPS, WHOLE, places_kernel, rows_kernel
from .tree_records import PLACES, TreeNodes, TreeRows, log2_pair, power
from .tree_tokens import nodes_to_tokens
from .tree_tokens_backward import nodes_to_tokens_backward

__all__ = [
    "nodes_to_tokens", "nodes_to_tokens_backward", "prefix_lcp", "prefix_tree", "subtree_sums",
    "subtree_sums_backward",
]  # fmt: skip

PART = 256 if INTERPRETED else 8192  # tokens of a part of a row, at least
MAX_PARTS = 64
GROUP = 16 if INTERPRETED else 64  # members read at once
# Rows from which on a sort costs less than placing each among all.
SORTED = 100 if INTERPRETED else 8192


class ByLabel(NamedTuple):
    """Rows in the order of their labels: sorted, or memory that ``place_rows`` fills by so many programs."""

    rows: Tensor
    labels: Tensor
    programs: int


def by_label(labels: Tensor) -> ByLabel:
    if len(labels) > SORTED:
        in_order, rows = labels.sort(stable=True)
        return ByLabel(rows, in_order, 0)
    return ByLabel(torch.empty_like(labels), torch.empty_like(labels), cdiv(len(labels), ROWS.value))


class Enclosing(NamedTuple):
    """The deepest node that encloses some positions."""

    node: Any  # -1 where there is none
    depth: Any


# ---- the tree ----------------------------------------------------------------------------------------------


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
    labels, mask, tokens = a.groups.contiguous(), as_bytes(mask), dense(tokens)
    r = Rows.of(tokens.shape, a.cu_seqlens, labels)
    rows = labels.new_empty(len(TreeRows._fields), r.batch)
    nodes = labels.new_empty(len(TreeNodes._fields), 2 * r.batch)
    if r.batch == 0:
        return rows, nodes
    out, order = TreeRows(*rows), by_label(labels)
    parts = splits(labels, r.batch, max(1, min(cdiv(r.width, PART), MAX_PARTS)), 1)
    spans = labels.new_empty((2, parts if parts > 1 else 0, r.batch), dtype=torch.int32)
    codes = labels.new_empty(parts, r.batch)
    for stage in (WHOLE,) if parts == 1 else (SPANS, CODES):
        ranked = 0 if stage is CODES else order.programs
        rows_kernel[(ranked + r.batch, parts)](
            tokens, pointer(mask, labels), r.cu, labels, order.rows, order.labels, spans, codes, out.first,
            out.length, r.batch, ranked, parts, stride(tokens), stride(mask), r.width, r.total,
            STAGE=stage.value, SORTED=order.programs == 0, PACKED=r.packed, HAS_MASK=mask is not None,
            num_warps=WARPS, **BITS,
        )  # fmt: skip
    places_kernel[(r.batch,)](
        tokens, r.cu, order.rows, order.labels, codes, out.first, out.length, out.order, out.shared, r.batch,
        parts, stride(tokens), r.width, r.total, PACKED=r.packed, num_warps=1, **BITS,
    )  # fmt: skip
    nodes_kernel[(r.batch,)](
        out.order, out.leaf, out.length, out.shared, *nodes, r.batch, BLOCK=PLACES, **BITS
    )
    return rows, nodes


# ---- common prefixes ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch"])
def order_kernel(labels, rows, sorted_labels, place_of, batch):
    """Program p: a block of rows sorted by label, and the place of each."""
    p = tl.program_id(0)
    place = place_rows(p, labels, rows, sorted_labels, batch)
    block = p * ROWS + tl.arange(0, ROWS)
    tl.store(place_of + block, place.to(tl.int64), mask=block < batch)


@triton.jit
def least(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["batch", "most"])
def prefix_lcp_kernel(
    order, lengths, shared, by_label, labels, place_of, members, lcp, batch, most, BLOCK: tl.constexpr
):
    """Program p: the members of the group of the row at p, and its common prefixes with them.

    Two rows share the least that neighbours between them share.
    """
    p = tl.program_id(0)
    label = tl.load(labels + p)
    begin = begin_of_group(labels, p, label, BLOCK, BLOCK)
    end = end_of_group(labels, p, label, batch, BLOCK, BLOCK)
    row = tl.load(order + p)
    length = tl.load(lengths + row)
    target = lcp + row * most
    lane = tl.arange(0, BLOCK)
    for start in range(0, most, BLOCK):
        at = start + lane
        member = tl.load(by_label + begin + at, mask=at < end - begin, other=-1)
        tl.store(members + row * most + at, member.to(tl.int32), mask=at < most)
        tl.store(target + at, at * 0 - 1, mask=(at >= end - begin) & (at < most))
    own = tl.load(place_of + row) - begin
    tl.store(target + own, tl.where(length > 0, length, -1).to(tl.int32), mask=own < most)
    # Upwards, then downwards.
    for down in tl.static_range(2):
        common = length
        for start in range(0, (p - begin) if down else (end - 1 - p), BLOCK):
            at = p + 1 + start + lane
            between = at
            if down:
                at = p - 1 - start - lane
                between = at + 1
            inside = (at >= begin) & (at < end)
            x = tl.load(shared + between, mask=inside, other=0x7FFFFFFFFFFFFFFF)
            x = tl.minimum(tl.associative_scan(x, 0, least), common)
            common = tl.min(x, 0)
            place = (
                tl.load(place_of + tl.load(order + at, mask=inside, other=0), mask=inside, other=0) - begin
            )
            tl.store(target + place, x.to(tl.int32), mask=inside & (place < most))


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    labels, tree = groups.contiguous(), TreeRows(*rows.contiguous())
    batch = len(labels)
    members, lcp = (labels.new_empty((batch, most), dtype=torch.int32) for _ in range(2))
    if batch:
        order, place_of = by_label(labels), torch.empty_like(labels)
        if order.programs:
            order_kernel[(order.programs,)](labels, order.rows, order.labels, place_of, batch, **BITS)
        else:
            place_of[order.rows] = torch.arange(batch, device=labels.device)
        prefix_lcp_kernel[(batch,)](
            tree.order, tree.length, tree.shared, order.rows, order.labels, place_of, members, lcp, batch, most,
            BLOCK=GROUP, num_warps=1, **BITS,
        )  # fmt: skip
    return members, lcp


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
