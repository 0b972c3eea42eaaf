"""Prefix trees on the CPU, and by CUDA C++ kernels (``rewardops.cuda.prefix_tree``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.native import compiled_module
from ..reference.prefix_tree import AT, OnTokens
from .memory import CPU, Shape, Via, address, as_bytes, dense, rows_dense, strided, threads

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.int32: "i32"}

# What kernels on a device work in, made of the arguments: addresses ahead of the stream.
Memory = Callable[..., Sequence[Tensor | None]]


def _none(*_: Any) -> Sequence[Tensor | None]:
    return ()


def prefix_tree(
    tokens: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: bool,
    via: Via = CPU,
    memory: Memory = _none,
) -> tuple[Tensor, Tensor]:
    shape = Shape(tokens.shape, cu_seqlens, via)
    # Ids are compared in one of two widths.
    wide = tokens.dtype is torch.int64
    ids = rows_dense(tokens if wide else tokens.to(torch.int32))
    groups, mask = groups.contiguous(), as_bytes(mask)
    rows, nodes = groups.new_empty(5, shape.batch), groups.new_empty(4, 2 * shape.batch)
    kept = memory(groups, ids, skip and mask is not None)
    getattr(via.module(), "prefix_tree_i64" if wide else "prefix_tree_i32")(
        shape.tuple,
        strided(mask),
        strided(ids),
        address(groups),
        address(rows),
        address(nodes),
        skip,
        *map(address, kept),
        *via.execution(groups),
    )
    return rows, nodes


def prefix_lcp(
    rows: Tensor, groups: Tensor, most: int, via: Via = CPU, memory: Memory = _none
) -> tuple[Tensor, Tensor]:
    rows, groups = rows.contiguous(), groups.contiguous()
    members, lcp = (groups.new_empty((len(groups), most), dtype=torch.int32) for _ in range(2))
    kept = memory(groups)
    via.module().prefix_lcp(
        len(groups),
        address(rows),
        address(groups),
        most,
        address(members),
        address(lcp),
        *map(address, kept),
        *via.execution(groups),
    )
    return members, lcp


def _subtrees(
    x: Tensor, weights: Tensor | None, centre: Tensor | None, rows: Tensor, nodes: Tensor, gamma: float
) -> tuple[list[Any], list[Tensor | None]]:
    """The leading arguments, and what they point at."""
    kept = [dense(t) for t in (rows, nodes, x, weights, centre)]
    a = [address(t) for t in kept]
    return [x.shape[0], a[0], a[1], x.shape[1], *a[2:], gamma], kept


def subtree_sums(
    x: Tensor, weights: Tensor | None, centre: Tensor | None, rows: Tensor, nodes: Tensor, gamma: float
) -> Tensor:
    head, _kept = _subtrees(x, weights, centre, rows, nodes, gamma)
    out = x.new_empty(nodes.shape[1], x.shape[1])
    compiled_module().subtree_sums(*head, address(out), 0, 0, 0, threads())  # type: ignore[union-attr]
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
    head, _kept = _subtrees(x, weights, centre, rows, nodes, gamma)
    up = grad.contiguous()
    grad_x = x.new_empty(x.shape)
    grad_weights = x.new_zeros(0 if weights is None else weights.shape)  # of no channels nothing is written
    outs = (address(grad_x), 0 if weights is None else address(grad_weights))
    compiled_module().subtree_sums(*head, 0, address(up), *outs, threads())  # type: ignore[union-attr]
    return grad_x, grad_weights


def _run(a: OnTokens, tokens: Tensor, gradients: Sequence[Tensor], via: Via, memory: Memory) -> None:
    """Nodes to ``tokens``, ``[C, *tokens]``, or, where gradients are wanted, back: these are the tokens' then."""
    shape, mask = Shape(a.shape, a.cu_seqlens, via), as_bytes(a.mask)
    kept = [dense(t) for t in (a.rows, a.nodes, *a[:4])]  # alive until the call is over
    tree_rows, nodes, *given = map(address, kept)
    work = memory(tokens, a.skip and mask is not None and bool(gradients))
    getattr(via.module(), f"nodes_to_tokens_{_SUFFIX[tokens.dtype]}")(
        shape.tuple,
        strided(mask),
        tree_rows,
        nodes,
        a.channels,
        math.prod(a.shape),
        tuple(given),
        AT.index(a.at),
        a.gamma,
        a.skip,
        (address(tokens), 0 if a.cu_seqlens is not None else a.size),
        tuple(address(g) if g.numel() else 0 for g in gradients),
        *map(address, work),
        *via.execution(a.rows),
    )


def nodes_to_tokens(*arguments: Any, via: Via = CPU, memory: Memory = _none) -> Tensor:
    a, dtype = OnTokens(*arguments[:-1]), arguments[-1]
    out = via.allocate(a.rows, (a.channels, *a.shape), a.cu_seqlens, dtype)
    _run(a, out, (), via, memory)
    return out


def nodes_to_tokens_backward(
    grad: Tensor, *arguments: Any, via: Via = CPU, memory: Memory = _none
) -> tuple[Tensor, ...]:
    a = OnTokens(*arguments)
    gradients = a.gradients(grad)
    _run(a, grad.contiguous(), gradients, via, memory)
    return gradients
