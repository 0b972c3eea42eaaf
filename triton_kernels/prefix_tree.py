"""Prefix trees on the GPU.

A row finds its place among its group's rows by comparing itself with each up to their first difference; what it
shares with its neighbours is all that the tree needs. Moved for that: the tokens that pairs share, from the cache
mostly. Then one write of each token, or one read on the way back; sums are by node, over its rows in order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardops.core.rows import move, move_back, places_without_holes

from ..reference.prefix_tree import AT, OnTokens, by_group, members_of
from .launch import INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

BLOCK = 128 if INTERPRETED else 512  # tokens at once
PLACES = 64 if INTERPRETED else 256  # positions read at once


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


@triton.jit(do_not_specialize=["width", "total", "tokens_stride"])
def places_kernel(
    tokens, members, group_begin, group_end, cu, first, lengths, order, shared, width, total, tokens_stride,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the place of row b among all rows, and what it shares with the row before it.

    Of the rows before it in lexicographic order, the last one is the one that shares most.
    """
    b = tl.program_id(0)
    base, _ = row_bounds(cu, b, width, total, PACKED)
    mine = tokens + base + b.to(tl.int64) * tokens_stride + tl.load(first + b)
    length = tl.load(lengths + b)
    begin = tl.load(group_begin + b)
    place = begin
    most = tl.full([], -1, tl.int64)
    for k in range(begin, tl.load(group_end + b)):
        j = tl.load(members + k)
        other = tl.load(lengths + j)
        shorter = tl.minimum(length, other)
        same = shorter
        ahead = (other > 0) | (j < b)  # of an empty row: what is not empty, and empty rows by number
        if length > 0:
            ahead = (other > 0) & (j < b)
            if shorter > 0:
                base_j, _ = row_bounds(cu, j, width, total, PACKED)
                theirs = tokens + base_j + j.to(tl.int64) * tokens_stride + tl.load(first + j)
                start = shorter * 0
                while start < same:
                    at = start + tl.arange(0, BLOCK)
                    inside = at < shorter
                    x = tl.load(mine + at, mask=inside, other=0)
                    y = tl.load(theirs + at, mask=inside, other=0)
                    same = tl.minimum(same, tl.min(tl.where(inside & (x != y), at, shorter), 0))
                    start += BLOCK
                both = same < shorter
                x = tl.load(mine + same, mask=both, other=0)
                y = tl.load(theirs + same, mask=both, other=0)
                ended = (other < length) | ((other == length) & (j < b))
                ahead = (both & (y < x)) | ((same == shorter) & ended)
                most = tl.where(ahead, tl.maximum(most, same), most)
        place += (ahead & (j != b)).to(tl.int64)
    tl.store(order + place, b.to(tl.int64))
    tl.store(shared + place, most)


@triton.jit
def last_below(shared, upto, depth, BLOCK: tl.constexpr):
    """The last position up to ``upto`` that shares less than ``depth``; -1 where there is none."""
    start = upto // BLOCK * BLOCK
    found = upto * 0 - 1
    while (start >= 0) & (found < 0):
        at = start + tl.arange(0, BLOCK)
        inside = at <= upto
        x = tl.load(shared + at, mask=inside, other=0)
        found = tl.max(tl.where(inside & (x < depth), at, -1), 0)
        start -= BLOCK
    return found


@triton.jit
def first_up_to(shared, begin, batch, depth, BELOW: tl.constexpr, BLOCK: tl.constexpr):
    """The first position from ``begin`` that shares less than ``depth`` (BELOW) or just that; else ``batch``."""
    start = begin // BLOCK * BLOCK
    found = begin * 0 + batch
    while (start < batch) & (found == batch):
        at = start + tl.arange(0, BLOCK)
        inside = (at >= begin) & (at < batch)
        x = tl.load(shared + at, mask=inside, other=0)
        hit = inside & ((x < depth) if BELOW else (x == depth))
        found = tl.min(tl.where(hit, at, batch), 0)
        start += BLOCK
    return found


@triton.jit
def enclosing(shared, begin, end, batch, BLOCK: tl.constexpr):
    """Node and depth of what the rows at ``[begin, end)`` share with a neighbour; -1 where nothing."""
    depth = tl.maximum(tl.load(shared + begin), tl.load(shared + end, mask=end < batch, other=-1))
    node = begin * 0 - 1
    if depth >= 0:
        start = last_below(shared, begin, depth, BLOCK)
        node = first_up_to(shared, start + 1, batch, depth, False, BLOCK)
    return node, depth


@triton.jit(do_not_specialize=["batch"])
def nodes_kernel(
    order, leaf, lengths, shared, begin_out, end_out, depth_out, parent_out, batch, BLOCK: tl.constexpr
):
    """Program p: the nodes p and batch + p."""
    p = tl.program_id(0).to(tl.int64)
    depth = tl.load(shared + p)
    begin = p * 0
    end = p * 0
    up = p * 0 - 1
    parts = depth >= 0
    if parts:
        begin = last_below(shared, p - 1, depth, BLOCK)
        parts = first_up_to(shared, begin + 1, batch, depth, False, BLOCK) == p
        end = first_up_to(shared, p + 1, batch, depth, True, BLOCK)
        up, _ = enclosing(shared, begin, end, batch, BLOCK)
    tl.store(begin_out + p, tl.where(parts, begin, 0))
    tl.store(end_out + p, tl.where(parts, end, 0))
    tl.store(depth_out + p, tl.where(parts, depth, -1))
    tl.store(parent_out + p, tl.where(parts, up, -1))

    row = tl.load(order + p)
    length = tl.load(lengths + row)
    up, depth = enclosing(shared, p, p + 1, batch, BLOCK)
    own = length > tl.maximum(depth, 0)
    node = batch + p
    tl.store(begin_out + node, tl.where(own, p, 0))
    tl.store(end_out + node, tl.where(own, p + 1, 0))
    tl.store(depth_out + node, tl.where(own, length, -1))
    tl.store(parent_out + node, tl.where(own, up, -1))
    tl.store(leaf + row, tl.where(own, node, tl.where(length > 0, up, -1)))


def prefix_tree(
    tokens: Tensor, groups: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, skip: bool
) -> tuple[Tensor, Tensor]:
    if skip and mask is not None:
        places = places_without_holes(mask, cu_seqlens)
        tokens, mask = move(tokens, mask, places), move(mask, mask, places)
    groups, mask, tokens = groups.contiguous(), as_bytes(mask), dense(tokens)
    r = Rows.of(tokens.shape, cu_seqlens, groups)
    rows, nodes = groups.new_empty(5, r.batch), groups.new_empty(4, 2 * r.batch)
    if r.batch == 0:
        return rows, nodes
    order, leaf, first, lengths, shared = rows
    grid = (r.batch,)
    spans_kernel[grid](
        pointer(mask, groups), r.cu, first, lengths, r.width, r.total, stride(mask),
        PACKED=r.packed, HAS_MASK=mask is not None, BLOCK=BLOCK,
    )  # fmt: skip
    places_kernel[grid](
        tokens, *by_group(groups), r.cu, first, lengths, order, shared, r.width, r.total, stride(tokens),
        PACKED=r.packed, BLOCK=BLOCK,
    )  # fmt: skip
    nodes_kernel[grid](order, leaf, lengths, shared, *nodes, r.batch, BLOCK=PLACES)
    return rows, nodes


@triton.jit(do_not_specialize=["batch", "most"])
def prefix_lcp_kernel(order, lengths, shared, rank, lcp, batch, most):
    """Program p: what the row at p shares with the rows of its group, from its neighbours on."""
    p = tl.program_id(0).to(tl.int64)
    row = tl.load(order + p)
    target = lcp + row * most
    own = tl.load(rank + row)
    length = tl.load(lengths + row)
    tl.store(target + own, tl.where(length > 0, length, -1).to(tl.int32), mask=own < most)
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
    order, _, _, lengths, shared = rows.contiguous()
    lcp = groups.new_full((len(groups), most), -1, dtype=torch.int32)
    if len(groups):
        prefix_lcp_kernel[(len(groups),)](order, lengths, shared, rank, lcp, len(groups), most)
    return members.to(torch.int32), lcp


# ---- sums over subtrees ------------------------------------------------------------------------------------


@triton.jit
def discount(left, log_high, log_low):
    """``gamma ** left``, 1 for what is below 0."""
    log2 = tl.full([], log_high, tl.float64) + tl.full([], log_low, tl.float64)
    left = tl.maximum(left, 0)
    return tl.where(left == 0, 1.0, tl.exp2(left.to(tl.float64) * log2))


def _log2(gamma: float) -> tuple[float, float]:
    # Of 0 a number whose every multiple is the logarithm of 0 as well, and no infinity.
    return pair(math.log2(gamma) if gamma > 0 else -1e5)


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
            left = tl.load(lengths + row, mask=inside, other=0) - tl.load(depth_in + n)
            term *= discount(left, log_high, log_low)
        if HAS_WEIGHTS:
            term *= tl.load(weights + row, mask=inside, other=0.0)
        lanes += tl.where(inside, term, 0.0)
    tl.store(out + n * channels + c, tl.sum(lanes, 0))


@triton.jit(do_not_specialize=["channels", "log_high", "log_low"])
def subtree_sums_backward_kernel(
    grad, x, weights, centre, leaf, lengths, depth_in, parent, grad_x, grad_weights, channels, log_high, log_low,
    HAS_WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, DECAY: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program b: what the nodes on row b's path send to it."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    given = c < channels
    value = tl.load(x + b * channels + c, mask=given, other=0.0)
    node = tl.load(leaf + b)
    weight = tl.full([], 1.0, tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights + b, mask=node >= 0, other=0.0)  # a row without a token may have any
    by_x = tl.zeros([CHANNELS], tl.float64)
    by_weight = tl.zeros([CHANNELS], tl.float64)
    length = tl.load(lengths + b)
    while node >= 0:
        up = tl.load(grad + node * channels + c, mask=given, other=0.0)
        if DECAY:
            up *= discount(length - tl.load(depth_in + node), log_high, log_low)
        if CENTRED:
            off = value - tl.load(centre + node * channels + c, mask=given, other=0.0)
            by_x += 2.0 * off * up
            by_weight += off * off * up
        else:
            by_x += up
            by_weight += value * up
        node = tl.load(parent + node)
    tl.store(grad_x + b * channels + c, weight * by_x, mask=given)
    if HAS_WEIGHTS:
        tl.store(grad_weights + b, tl.sum(tl.where(given, by_weight, 0.0), 0))


def subtree_sums(
    x: Tensor, weights: Tensor | None, centre: Tensor | None, rows: Tensor, nodes: Tensor, gamma: float
) -> Tensor:
    out = x.new_empty(nodes.shape[1], x.shape[1])
    if out.numel():
        x = x.contiguous()
        order, _, _, lengths, _ = rows.contiguous()
        begin, end, depth, _ = nodes.contiguous()
        subtree_sums_kernel[(nodes.shape[1], x.shape[1])](
            x, *(x if t is None else t.contiguous() for t in (weights, centre)), order, lengths, begin, end,
            depth, out, x.shape[1], *_log2(gamma), HAS_WEIGHTS=weights is not None,
            CENTRED=centre is not None, DECAY=gamma != 1.0 and centre is None, BLOCK=PLACES,
        )  # fmt: skip
    return out


def subtree_sums_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    centre: Tensor | None,
    rows: Tensor,
    nodes: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    by_x = x.new_empty(x.shape)
    by_weight = x.new_zeros(0 if weights is None else weights.shape)
    if by_x.numel():
        x = x.contiguous()
        _, leaf, _, lengths, _ = rows.contiguous()
        _, _, depth, parent = nodes.contiguous()
        subtree_sums_backward_kernel[(x.shape[0],)](
            grad.contiguous(), x, *(x if t is None else t.contiguous() for t in (weights, centre)), leaf,
            lengths, depth, parent, by_x, by_weight, x.shape[1], *_log2(gamma),
            HAS_WEIGHTS=weights is not None, CENTRED=centre is not None,
            DECAY=gamma != 1.0 and centre is None, CHANNELS=triton.next_power_of_2(x.shape[1]),
        )  # fmt: skip
    return by_x, by_weight


# ---- nodes and tokens --------------------------------------------------------------------------------------

# In the order of AT.
AFTER = tl.constexpr(0)
BEFORE = tl.constexpr(1)
STEP = tl.constexpr(2)


@triton.jit
def values_of(
    values, along, factor, span, depth_in, parent, leaf, at, lowest, channels, c, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, ALONG: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The values of a block of a row's tokens, counted from its first; ``lowest`` is the block's first.

    ``factor`` is the row's; 1 for the derivative by it (without values then).
    """
    result = tl.zeros([BLOCK], tl.float64)
    state = at + (0 if AT == BEFORE else 1)
    node = leaf
    while node >= 0:
        depth = tl.load(depth_in + node)
        up = tl.load(parent + node)
        above = tl.load(depth_in + up, mask=up >= 0, other=-1)
        value = tl.zeros([], tl.float64)
        before = tl.zeros([], tl.float64)
        if HAS_VALUES:
            value += tl.load(values + node * channels + c)
            if AT == STEP:
                before += tl.load(values + up * channels + c, mask=up >= 0, other=0.0)
        if ALONG:
            x = factor * tl.load(along + node * channels + c)
            if DECAY:
                x *= discount(span - depth, log_high, log_low)
            value += x
            if AT == STEP:
                before += factor * tl.load(along + up * channels + c, mask=up >= 0, other=0.0)
        if AT == STEP:
            result = tl.where(at == above, value - before, result)
        else:
            here = (state > above) & ((state <= depth) | (node == leaf))
            if DECAY:
                value = value * discount(depth - state, log_high, log_low)
            result = tl.where(here, value, result)
        # What lies above holds no state of this block.
        node = tl.where(above >= lowest, up, -1)
    return result


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "out_stride", "plane", "channels", "splits", "log_high", "log_low",
])  # fmt: skip
def nodes_to_tokens_kernel(
    values, along, base_in, factor_in, leaf, first, lengths, depth_in, parent, mask, cu, out,
    width, total, mask_stride, out_stride, plane, channels, splits, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, ALONG: tl.constexpr, HAS_BASE: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k, c): the blocks k, k + splits, ... of channel c of row b."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2).to(tl.int64)
    begin, length = row_bounds(cu, b, width, total, PACKED)
    start_of_row = tl.load(first + b)
    span = tl.load(lengths + b)
    node = tl.load(leaf + b)
    factor = tl.zeros([], tl.float64)
    if ALONG:
        factor = tl.load(factor_in + b * channels + c)
    for start in range(tl.program_id(1) * BLOCK, length, splits * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < length
        at = column - start_of_row
        valid = load_valid(mask, begin + b * mask_stride + column, inside, HAS_MASK)
        valid = valid & (at >= 0) & (at < span)
        x = values_of(
            values, along, factor, span, depth_in, parent, node, at, start - start_of_row, channels, c,
            log_high, log_low, AT, HAS_VALUES, ALONG, DECAY, BLOCK,
        )  # fmt: skip
        if HAS_BASE:
            x += tl.load(base_in + b * channels + c)
        x = tl.where(valid, x, 0.0).to(out.dtype.element_ty)
        tl.store(out + c * plane + begin + b * out_stride + column, x, mask=inside)


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "log_high", "log_low",
])  # fmt: skip
def nodes_backward_kernel(
    grad, factor_in, order, leaf, first, lengths, begin_in, end_in, depth_in, parent, mask, cu, by_value, by_along,
    width, total, mask_stride, grad_stride, plane, channels, log_high, log_low,
    AT: tl.constexpr, HAS_VALUES: tl.constexpr, ALONG: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, c): what the tokens whose state lies in node n send to it, row by row."""
    SHIFT: tl.constexpr = 0 if AT == BEFORE else 1
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    depth = tl.load(depth_in + n)
    up = tl.load(parent + n)
    above = tl.load(depth_in + up, mask=up >= 0, other=-1)
    lanes = tl.zeros([BLOCK], tl.float64)
    weighed = tl.zeros([BLOCK], tl.float64)
    for p in range(tl.load(begin_in + n), tl.load(end_in + n)):
        row = tl.load(order + p)
        path = tl.load(leaf + row)
        span = tl.load(lengths + row)
        reached = tl.load(depth_in + path) >= depth
        begin, _ = row_bounds(cu, row, width, total, PACKED)
        begin += tl.load(first + row)
        source = grad + c * plane + begin + row * grad_stride
        place = begin + row * mask_stride
        factor = tl.zeros([], tl.float64)
        if ALONG:
            factor = tl.load(factor_in + row * channels + c)
            if DECAY:
                factor *= discount(span - depth, log_high, log_low)
        if AT == STEP:
            lane = tl.arange(0, BLOCK)
            # The token that enters the node, and the one that leaves it.
            at = tl.where(lane == 0, above, depth)
            last = tl.where(path != n, 1, 0)
            valid = (lane >= tl.where(above >= 0, 0, 1)) & (lane <= tl.where(reached, last, -1))
            valid = load_valid(mask, place + at, valid, HAS_MASK)
            x = tl.load(source + at, mask=valid, other=0.0).to(tl.float64)
            x = tl.where(lane == 0, x, -x)
            lanes += x
            weighed += factor * x
        else:
            from_token = tl.maximum(above + 1 - SHIFT, 0)
            to_token = tl.minimum(tl.where(path == n, span, depth) + 1 - SHIFT, span)
            to_token = tl.where(reached, to_token, from_token)
            for start in range(from_token, to_token, BLOCK):
                at = start + tl.arange(0, BLOCK)
                valid = load_valid(mask, place + at, at < to_token, HAS_MASK)
                x = tl.load(source + at, mask=valid, other=0.0).to(tl.float64)
                if DECAY:
                    x *= discount(depth - at - SHIFT, log_high, log_low)
                lanes += x
                weighed += factor * x
    if HAS_VALUES:
        tl.store(by_value + n * channels + c, tl.sum(lanes, 0))
    if ALONG:
        tl.store(by_along + n * channels + c, tl.sum(weighed, 0))


@triton.jit(do_not_specialize=[
    "width", "total", "mask_stride", "grad_stride", "plane", "channels", "log_high", "log_low",
])  # fmt: skip
def rows_backward_kernel(
    grad, along, leaf, first, lengths, depth_in, parent, mask, cu, by_base, by_factor,
    width, total, mask_stride, grad_stride, plane, channels, log_high, log_low,
    AT: tl.constexpr, ALONG: tl.constexpr, HAS_BASE: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, c): what row b's tokens send to its base and factor."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64)
    begin, _ = row_bounds(cu, b, width, total, PACKED)
    begin += tl.load(first + b)
    span = tl.load(lengths + b)
    node = tl.load(leaf + b)
    plain = tl.zeros([BLOCK], tl.float64)
    scaled = tl.zeros([BLOCK], tl.float64)
    for start in range(0, span, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, begin + b * mask_stride + at, at < span, HAS_MASK)
        x = tl.load(grad + c * plane + begin + b * grad_stride + at, mask=valid, other=0.0).to(tl.float64)
        plain += x
        if ALONG:
            value = values_of(
                along, along, 1.0, span, depth_in, parent, node, at, start, channels, c, log_high, log_low,
                AT, False, True, DECAY, BLOCK,
            )  # fmt: skip
            scaled += tl.where(valid, x * value, 0.0)
    if HAS_BASE:
        tl.store(by_base + b * channels + c, tl.sum(plain, 0))
    if ALONG:
        tl.store(by_factor + b * channels + c, tl.sum(scaled, 0))


def _strides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Between the rows and between the channels of a dense per-token array."""
    return (shape[1], shape[0] * shape[1]) if len(shape) == 2 else (0, shape[0])


def nodes_to_tokens(*arguments: Any) -> Tensor:
    a, dtype = OnTokens(*arguments[:-1]), arguments[-1]
    if a.skip and a.mask is not None:
        front = nodes_to_tokens(*a.at_front(), dtype)
        return move_back(front, a.mask, places_without_holes(a.mask, a.cu_seqlens))
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    out = output(a.rows, (channels, *a.shape), packed, dtype)
    if out.numel() == 0 or batch == 0:
        return out
    mask = as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    _, leaf, first, lengths, _ = a.rows.contiguous()
    _, _, depth, parent = a.nodes.contiguous()
    out_stride, plane = _strides(a.shape)
    parts = splits(a.rows, batch * channels, max(1, cdiv(r.width, BLOCK)))
    nodes_to_tokens_kernel[(batch, parts, channels)](
        *(a.rows if t is None else t.contiguous() for t in a[:4]), leaf, first, lengths, depth, parent,
        pointer(mask, a.rows), r.cu, out, r.width, r.total, stride(mask), out_stride, plane, channels, parts,
        *_log2(a.gamma), AT=AT.index(a.at), HAS_VALUES=a.values is not None, ALONG=a.along is not None,
        HAS_BASE=a.base is not None, DECAY=a.gamma != 1.0, PACKED=packed, HAS_MASK=mask is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def nodes_to_tokens_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    a = OnTokens(*arguments)
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, *a.at_front())
    packed, channels, batch = a.cu_seqlens is not None, a.channels, a.rows.shape[1]
    by_value, by_along, by_base, by_factor = a.gradients(grad)
    if grad.numel() == 0 or batch == 0:
        return by_value, by_along, by_base, by_factor
    grad, mask = grad.contiguous(), as_bytes(a.mask)
    r = Rows.of(a.shape, a.cu_seqlens, a.rows)
    order, leaf, first, lengths, _ = a.rows.contiguous()
    begin, end, depth, parent = a.nodes.contiguous()
    grad_stride, plane = _strides(a.shape)
    sizes = (r.width, r.total, stride(mask), grad_stride, plane, channels, *_log2(a.gamma))
    options = {
        "AT": AT.index(a.at), "ALONG": a.along is not None, "DECAY": a.gamma != 1.0, "PACKED": packed,
        "HAS_MASK": mask is not None, "BLOCK": BLOCK,
    }  # fmt: skip
    nodes_backward_kernel[(a.nodes.shape[1], channels)](
        grad, grad if a.factor is None else a.factor.contiguous(), order, leaf, first, lengths, begin, end,
        depth, parent, pointer(mask, a.rows), r.cu, by_value, by_along, *sizes,
        HAS_VALUES=a.values is not None, **options,
    )  # fmt: skip
    if a.base is not None or a.factor is not None:
        rows_backward_kernel[(batch, channels)](
            grad, grad if a.along is None else a.along.contiguous(), leaf, first, lengths, depth, parent,
            pointer(mask, a.rows), r.cu, by_base, by_factor, *sizes, HAS_BASE=a.base is not None, **options,
        )  # fmt: skip
    return by_value, by_along, by_base, by_factor
