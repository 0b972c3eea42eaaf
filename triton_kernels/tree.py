"""Trees as arrays of parents, on the GPU: values, by a launch per level and a program per node, and advantages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import tree as spec
from ..reference.tree import (
    FORMS,
    REDUCES,
    TreeArgs,
    at_nodes,
    at_nodes_backward,
    depths,
    path_ends,
    tree_values_backward,
)
from .launch import BITS, INTERPRETED, Constant, cdiv, pair, pointer, unpair

__all__ = [
    "at_nodes", "at_nodes_backward", "path_ends", "sibling_labels", "tree_rl", "tree_rl_backward", "tree_values",
    "tree_values_backward",
]  # fmt: skip

CHILDREN = 16  # children read at once
NODES = 32 if INTERPRETED else 1024  # nodes read at once
# Nodes up to which the gradient of each looks for its children among all; beyond, they are sorted.
SEARCHED = 64 if INTERPRETED else 16384

# Reductions by their index in REDUCES.
MEAN = Constant(0)
MAX = Constant(1)
MIN = Constant(2)
SOFTMAX = Constant(3)


@triton.jit(do_not_specialize=["level", "temperature_high", "temperature_low"])
def tree_values_kernel(
    depth, children, starts, visits, values, slope, level, temperature_high, temperature_low,
    REDUCE: tl.constexpr, HAS_VISITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n: the value of node n of this level from its children's values, and the derivatives by these."""
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + n)
    end = tl.load(starts + n + 1)
    if (tl.load(depth + n) == level) & (begin < end):
        temperature = unpair(temperature_high, temperature_low, tl.float64)
        sign: tl.constexpr = -1.0 if REDUCE == MIN else 1.0
        lane = tl.arange(0, BLOCK)
        largest = tl.full([], float("-inf"), tl.float64)
        if (REDUCE == MAX) | (REDUCE == MIN) | (REDUCE == SOFTMAX):
            for start in range(begin, end, BLOCK):
                inside = start + lane < end
                child = tl.load(children + start + lane, mask=inside, other=0)
                counts = inside
                if HAS_VISITS:
                    counts = inside & (tl.load(visits + child, mask=inside, other=0.0) != 0)
                v = tl.load(values + child, mask=counts, other=0.0)
                largest = tl.maximum(largest, tl.max(tl.where(counts, sign * v, float("-inf")), 0))
        total = tl.zeros([], tl.float64)
        weight = tl.zeros([], tl.float64)
        chosen = begin * 0 - 1
        for start in range(begin, end, BLOCK):
            inside = start + lane < end
            child = tl.load(children + start + lane, mask=inside, other=0)
            w = inside.to(tl.float64)
            if HAS_VISITS:
                w = tl.load(visits + child, mask=inside, other=0.0)
            counts = inside & (w != 0)
            v = tl.load(values + child, mask=counts, other=0.0)
            if REDUCE == SOFTMAX:
                w = tl.where(counts, tl.exp((v - largest) / temperature), 0.0)
            elif REDUCE != MEAN:
                w = counts.to(tl.float64)
            if (REDUCE == MAX) | (REDUCE == MIN):
                # Children are in ascending order: ties go to the first one.
                hit = tl.where(counts & (sign * v == largest), start + lane, end)
                first = tl.min(hit, 0)
                chosen = tl.where((chosen < 0) & (first < end), first, chosen)
            total += tl.sum(w * v, 0)
            weight += tl.sum(w, 0)
        if (REDUCE == MAX) | (REDUCE == MIN):
            total = tl.where(chosen < 0, 0.0, sign * largest)
        elif (REDUCE == MEAN) | (REDUCE == SOFTMAX):
            total = tl.where(weight == 0, 0.0, total / tl.where(weight == 0, 1.0, weight))
        tl.store(values + n, total)
        for start in range(begin, end, BLOCK):
            inside = start + lane < end
            child = tl.load(children + start + lane, mask=inside, other=0)
            w = inside.to(tl.float64)
            if HAS_VISITS:
                w = tl.load(visits + child, mask=inside, other=0.0)
            counts = inside & (w != 0)
            if (REDUCE == MAX) | (REDUCE == MIN):
                w = (start + lane == chosen).to(tl.float64)
            elif REDUCE == MEAN:
                w = w / weight
            elif REDUCE == SOFTMAX:
                v = tl.load(values + child, mask=counts, other=0.0)
                w = tl.exp((v - largest) / temperature) / weight * (1.0 + (v - total) / temperature)
            else:
                w = counts.to(tl.float64)
            tl.store(slope + child, tl.where(counts, w, 0.0), mask=inside)


def tree_values(a: TreeArgs) -> tuple[Tensor, Tensor]:
    parent, rewards, max_depth = a.parent, a.rewards, a.max_depth
    nodes = parent.shape[0]
    values, slope = rewards.clone(), torch.zeros_like(rewards)
    if nodes == 0:
        return values, slope
    depth = depths(parent)
    up, children = torch.where(depth > 0, parent, -1).sort(stable=True)
    starts = torch.searchsorted(up, torch.arange(nodes + 1, device=parent.device))
    if max_depth < 0:
        max_depth = int(depth.max())  # a number on the CPU
    visits = None if a.visits is None else a.visits.contiguous()
    for level in range(max_depth - 1, -1, -1):
        tree_values_kernel[(nodes,)](
            depth, children, starts, pointer(visits, rewards), values, slope, level, *pair(a.temperature),
            REDUCE=REDUCES.index(a.reduce), HAS_VISITS=visits is not None, BLOCK=CHILDREN, **BITS,
        )  # fmt: skip
    return values, slope


# ---- advantages --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["nodes"])
def sibling_labels_kernel(parent, out, nodes, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    up = tl.load(parent + n, mask=n < nodes, other=-1)
    alone = (up < 0) | (up >= nodes) | (up == n)
    tl.store(out + n, tl.where(alone, -1 - n.to(tl.int64), up), mask=n < nodes)


def sibling_labels(parent: Tensor) -> Tensor:
    parent = parent.contiguous()
    out, nodes = torch.empty_like(parent), parent.shape[0]
    if nodes:
        sibling_labels_kernel[(cdiv(nodes, NODES),)](parent, out, nodes, BLOCK=NODES, **BITS)
    return out


@triton.jit
def gain_of(leaves, number, RELEASED: tl.constexpr):
    """What multiplies a value less its root's, for a node above so many leaves in a tree of ``number``."""
    gain = 1.0 / tl.sqrt(tl.maximum(leaves, 1.0))
    if RELEASED:
        gain *= tl.where(number > 1.0, number / tl.maximum(number - 1.0, 1.0), 1.0)
    return gain


@triton.jit
def parent_of(parent, n, nodes):
    """The parent of a node; a root is its own."""
    up = tl.load(parent + n)
    return tl.where((up >= 0) & (up < nodes), up, n)


@triton.jit(do_not_specialize=["nodes", "channels"])
def tree_rl_kernel(
    values, parent, leaves, out, root_out, nodes, channels, RELEASED: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program n: node n, all channels."""
    n = tl.program_id(0).to(tl.int64)
    up = parent_of(parent, n, nodes)
    root = up
    steps = nodes * 0
    above = parent_of(parent, root, nodes)
    while (above != root) & (steps < nodes):  # a cycle has no root
        root = above
        above = parent_of(parent, root, nodes)
        steps += 1
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    here = tl.load(values + n * channels + c, mask=inside, other=0.0)
    there = tl.load(values + up * channels + c, mask=inside, other=0.0)
    top = tl.load(values + root * channels + c, mask=inside, other=0.0)
    number = tl.load(leaves + root)
    gain = gain_of(tl.load(leaves + n), number, RELEASED)
    if RELEASED:
        top = tl.where(number > 1.0, top, 0.0)
        value = (here - top) * gain
        result = value + (value - (there - top) * gain_of(tl.load(leaves + up), number, RELEASED))
    else:
        result = ((here - there) + (here - top)) * gain
    tl.store(out + n * channels + c, result, mask=inside)
    tl.store(root_out + n, root)


@triton.jit(do_not_specialize=["nodes", "channels"])
def tree_rl_backward_kernel(
    grad, parent, leaves, root_in, out, nodes, channels, RELEASED: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (n, c): channel c of the gradient of node n, of its children, for a root of its tree."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    root = tl.load(root_in + n)
    number = tl.load(leaves + root)
    is_root = parent_of(parent, n, nodes) == n
    children = tl.zeros([BLOCK], tl.float64)
    tree = tl.zeros([BLOCK], tl.float64)
    for start in range(0, nodes, BLOCK):
        m = start + tl.arange(0, BLOCK)
        some = m < nodes
        up = tl.load(parent + m, mask=some, other=-1)
        inner = some & (up >= 0) & (up < nodes) & (up != m)
        child = inner & (up == n)
        below = child
        if is_root:
            below = some & (tl.load(root_in + m, mask=some, other=-1) == n)
        g = tl.load(grad + m.to(tl.int64) * channels + c, mask=below, other=0.0)
        gain = gain_of(tl.load(leaves + m, mask=below, other=1.0), number, RELEASED)
        if RELEASED:
            children += tl.where(child, g, 0.0)
            upper = gain_of(tl.load(leaves + up, mask=below & inner, other=1.0), number, RELEASED)
            tree += tl.where(below, tl.where(inner, (2.0 * gain - upper) * g, gain * g), 0.0)
        else:
            children += tl.where(child, g * gain, 0.0)
            tree += tl.where(below & inner, g * gain, 0.0)
    g = tl.load(grad + n * channels + c)
    gain = gain_of(tl.load(leaves + n), number, RELEASED)
    from_children = tl.sum(children, 0)
    from_tree = tl.where(is_root, tl.sum(tree, 0), 0.0)
    if RELEASED:
        own = tl.where(is_root, g, 2.0 * g)
        result = (own - from_children) * gain - tl.where(number > 1.0, from_tree, 0.0)
    else:
        result = tl.where(is_root, 0.0, 2.0 * g * gain) - from_children - from_tree
    tl.store(out + n * channels + c, result)


def tree_rl(values: Tensor, parent: Tensor, leaves: Tensor, form: str) -> tuple[Tensor, Tensor]:
    nodes, channels = values.shape
    out, root = values.new_empty(values.shape), torch.empty_like(parent)
    if nodes:
        tree_rl_kernel[(nodes,)](
            values.contiguous(), parent.contiguous(), leaves.contiguous(), out, root, nodes, channels,
            RELEASED=form == FORMS[1], CHANNELS=triton.next_power_of_2(max(channels, 1)), **BITS,
        )  # fmt: skip
    return out, root


def tree_rl_backward(grad: Tensor, parent: Tensor, leaves: Tensor, root: Tensor, form: str) -> Tensor:
    nodes, channels = grad.shape
    if nodes > SEARCHED:
        return spec.tree_rl_backward(grad, parent, leaves, root, form)
    out = grad.new_empty(grad.shape)
    if out.numel():
        tree_rl_backward_kernel[(nodes, channels)](
            *(t.contiguous() for t in (grad, parent, leaves, root)), out, nodes, channels,
            RELEASED=form == FORMS[1], BLOCK=NODES, **BITS,
        )  # fmt: skip
    return out
