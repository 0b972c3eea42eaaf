"""Prefix trees on the GPU.

Rows in lexicographic order (``tree_places``), and the common prefixes of neighbours, determine the tree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import move, places_without_holes
from ..reference.prefix_tree import PrefixTreeArgs
from .groups import ROWS, by_label, end_of_group, place_rows
from .launch import BITS, INTERPRETED, cdiv, pointer, splits
from .rows import Rows, as_bytes, dense, stride
from .tree_places import CODES, SPANS, WARPS, WHOLE, places_kernel, rows_kernel
from .tree_records import PLACES, TreeNodes, TreeRows
from .tree_statistics import subtree_statistics, subtree_statistics_backward
from .tree_tokens import nodes_to_tokens
from .tree_tokens_backward import nodes_to_tokens_backward

__all__ = [
    "nodes_to_tokens", "nodes_to_tokens_backward", "prefix_lcp", "prefix_tree", "subtree_statistics",
    "subtree_statistics_backward",
]  # fmt: skip

PART = 256 if INTERPRETED else 8192  # tokens of a part of a row, at least
MAX_PARTS = 64
GROUP = 16 if INTERPRETED else 64  # members read at once


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
    begin = end_of_group(labels, p, label, batch, BLOCK, BLOCK, -1) + 1
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
