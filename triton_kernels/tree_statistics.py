"""Statistics of the rows below the nodes of prefix trees on the GPU: a program per node, over its rows in order.

Backward: a program per row, over the nodes of its path. Nothing is added atomically.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.prefix_tree import STATISTICS, SubtreeArgs, SubtreeStatistics
from .launch import BITS, INTERPRETED, Constant, pointer, unpair
from .tree_records import TreeNodes, TreeRows, log2_pair, power

ROWS = 16 if INTERPRETED else 64  # rows of a node read at once
# Statistics by their index.
MEAN = Constant(STATISTICS.index("mean"))
STD = Constant(STATISTICS.index("std"))


class RowValues(NamedTuple):
    """One channel of the rows; pointers and sizes."""

    x: Any  # [B, C], of the channel
    weights: Any  # [B]
    order: Any
    lengths: Any
    channels: Any
    log2_gamma: Any


class Span(NamedTuple):
    """Places of a node's rows, and the node's depth."""

    begin: Any
    end: Any
    depth: Any


@triton.jit
def load_weights(weights, row, inside, HAS_WEIGHTS: tl.constexpr):
    weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights + row, mask=inside, other=0.0).to(tl.float64)
    return weight


@triton.jit
def sum_rows(
    values, node, centre, HAS_WEIGHTS: tl.constexpr, CENTRED: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weighted sum of a node's rows, or of their squared distances from a centre; and of their weights."""
    lanes = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(node.begin, node.end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < node.end
        row = tl.load(values.order + at, mask=inside, other=0)
        weight = load_weights(values.weights, row, inside, HAS_WEIGHTS)
        term = tl.load(values.x + row * values.channels, mask=inside, other=0.0).to(tl.float64)
        if CENTRED:
            term -= centre
            term *= term
        if DECAY:
            tokens_left = tl.load(values.lengths + row, mask=inside, other=0) - node.depth
            term *= power(values.log2_gamma, tokens_left)
        lanes += tl.where(inside, term * weight, 0.0)
        if HAS_WEIGHTS and not CENTRED:
            total += weight
    if HAS_WEIGHTS:
        return tl.sum(lanes, 0), tl.sum(total, 0)
    else:
        return tl.sum(lanes, 0), (node.end - node.begin).to(tl.float64)


@triton.jit
def corrected(count, ddof):
    """n / (n - ddof) for n rows; 0 for at most ddof."""
    left = tl.maximum(count - ddof, 1)
    return tl.where(count > ddof, count.to(tl.float64) / left.to(tl.float64), 0.0)


@triton.jit(do_not_specialize=["channels", "ddof", "log_high", "log_low"])
def subtree_statistics_kernel(
    x, weights, order, lengths, begin_in, end_in, depth_in, out, total_out, centre_out,
    channels, ddof, log_high, log_low,
    STATISTIC: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, c): channel c over the rows of node n."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    values = RowValues(x + c, weights, order, lengths, channels, unpair(log_high, log_low, tl.float64))
    node = Span(tl.load(begin_in + n), tl.load(end_in + n), tl.load(depth_in + n))
    result, total = sum_rows(values, node, 0.0, HAS_WEIGHTS, False, DECAY, BLOCK)
    here = n * channels + c
    if c == 0:
        tl.store(total_out + n, total)
    divisor = tl.where(total > 0, total, 1.0)
    mean = result / divisor
    tl.store(centre_out + here, mean)
    if STATISTIC == MEAN:
        result = mean
    if STATISTIC == STD:
        squares, _ = sum_rows(values, node, mean, HAS_WEIGHTS, True, False, BLOCK)
        variance = squares / divisor * corrected(node.end - node.begin, ddof)
        result = tl.where(variance > 0, tl.sqrt(tl.where(variance > 0, variance, 1.0)), 0.0)
    tl.store(out + here, result)


@triton.jit(do_not_specialize=["channels", "ddof", "log_high", "log_low"])
def subtree_statistics_backward_kernel(
    grad, out, total_in, centre, x, weights, leaf, lengths, begin_in, end_in, depth_in, parent, grad_x,
    grad_weights, channels, ddof, log_high, log_low,
    STATISTIC: tl.constexpr, HAS_WEIGHTS: tl.constexpr, DECAY: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program b: the gradient of row b, summed over the nodes on its path."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    log2_gamma = unpair(log_high, log_low, tl.float64)
    value = tl.load(x + b * channels + c, mask=inside, other=0.0).to(tl.float64)
    node = tl.load(leaf + b)
    # The weight of an empty row is arbitrary.
    weight = load_weights(weights, b, node >= 0, HAS_WEIGHTS)
    by_x = tl.zeros([CHANNELS], tl.float64)
    by_weight = tl.zeros([CHANNELS], tl.float64)
    length = tl.load(lengths + b)
    while node >= 0:
        here = node * channels + c
        up = tl.load(grad + here, mask=inside, other=0.0)
        if STATISTIC == MEAN or STATISTIC == STD:
            total = tl.load(total_in + node)
            up /= tl.where(total > 0, total, 1.0)
            found = tl.load(out + here, mask=inside, other=0.0)
        if STATISTIC == STD:
            some = found > 0
            correction = corrected(tl.load(end_in + node) - tl.load(begin_in + node), ddof)
            up = tl.where(some, up * correction / tl.where(some, 2.0 * found, 1.0), 0.0)
            off = tl.where(some, value - tl.load(centre + here, mask=inside, other=0.0), 0.0)
            mean = found * found / tl.where(correction > 0, correction, 1.0)
            by_x += 2.0 * off * up
            by_weight += (off * off - tl.where(some, tl.where(total > 0, mean, 0.0), 0.0)) * up
        else:
            factor = 1.0
            if DECAY:
                factor = power(log2_gamma, length - tl.load(depth_in + node))
            term = factor * value
            if STATISTIC == MEAN:
                term -= tl.where(total > 0, found, 0.0)
            by_x += factor * up
            by_weight += term * up
        node = tl.load(parent + node)
    tl.store(grad_x + b * channels + c, (weight * by_x).to(grad_x.dtype.element_ty), mask=inside)
    if HAS_WEIGHTS:
        by_weight = tl.sum(tl.where(inside, by_weight, 0.0), 0)
        tl.store(grad_weights + b, by_weight.to(grad_weights.dtype.element_ty))


def _options(a: SubtreeArgs) -> dict[str, Any]:
    return {
        "STATISTIC": STATISTICS.index(a.statistic),
        "HAS_WEIGHTS": a.weights is not None,
        "DECAY": a.gamma != 1.0,
    }


def subtree_statistics(a: SubtreeArgs) -> SubtreeStatistics:
    x, nodes, channels = a.x.contiguous(), a.nodes.shape[1], a.x.shape[1]
    out = x.new_empty((nodes, channels), dtype=torch.float64)
    total = out.new_empty if channels else out.new_zeros
    results = SubtreeStatistics(out, total((nodes, 1)), torch.empty_like(out))
    if out.numel():
        weights = x if a.weights is None else a.weights.contiguous()
        row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
        subtree_statistics_kernel[(nodes, channels)](
            x, weights, row.order, row.length, node.begin, node.end, node.depth, *results, channels, a.ddof,
            *log2_pair(a.gamma), BLOCK=ROWS, num_warps=1, **_options(a), **BITS,
        )  # fmt: skip
    return results


def subtree_statistics_backward(
    grad: Tensor, out: Tensor, total: Tensor, centre: Tensor, a: SubtreeArgs
) -> tuple[Tensor, Tensor]:
    x, weights = a.x.contiguous(), None if a.weights is None else a.weights.contiguous()
    by_x = x.new_empty(x.shape)
    by_weight = grad.new_empty(0) if weights is None else torch.empty_like(weights)
    if not by_x.numel():
        return by_x, by_weight.zero_() if by_weight.numel() else by_weight
    row, node = TreeRows(*a.rows.contiguous()), TreeNodes(*a.nodes.contiguous())
    subtree_statistics_backward_kernel[(x.shape[0],)](
        *(t.contiguous() for t in (grad, out, total, centre)), x, pointer(weights, x), row.leaf, row.length,
        *node, by_x, by_weight, x.shape[1], a.ddof, *log2_pair(a.gamma),
        CHANNELS=triton.next_power_of_2(x.shape[1]), **_options(a), **BITS,
    )  # fmt: skip
    return by_x, by_weight
