"""Values of trees, as arrays of parents, on the GPU: a launch per level, a program per node."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.tree import (
    REDUCES,
    TreeArgs,
    at_nodes,
    at_nodes_backward,
    depths,
    path_ends,
    tree_values_backward,
)
from .launch import BITS, Constant, pair, pointer, unpair

__all__ = ["at_nodes", "at_nodes_backward", "path_ends", "tree_values", "tree_values_backward"]

CHILDREN = 16  # children read at once

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
