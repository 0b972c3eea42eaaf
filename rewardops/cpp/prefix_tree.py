"""Prefix trees on the CPU, and by CUDA C++ kernels (``rewardops.cuda.prefix_tree``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.native import compiled_module
from ..core.precision import wide
from ..reference.prefix_tree import (
    AT,
    STATISTICS,
    NodeTokensArgs,
    PrefixTreeArgs,
    SubtreeArgs,
    SubtreeStatistics,
)
from .memory import CPU, Launcher, RowShape, address, as_bytes, dense, rows_dense, strided, threads

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.int32: "i32"}

# Allocates the kernels' scratch memory on a device; its addresses precede the stream among the arguments.
Scratch = Callable[..., Sequence[Tensor | None]]


def _no_scratch(*_: Any) -> Sequence[Tensor | None]:
    return ()


def prefix_tree(
    a: PrefixTreeArgs, launcher: Launcher = CPU, scratch: Scratch = _no_scratch
) -> tuple[Tensor, Tensor]:
    shape = RowShape(a.tokens.shape, a.cu_seqlens, launcher)
    # Ids are compared in one of two widths.
    wide = a.tokens.dtype is torch.int64
    ids = rows_dense(a.tokens if wide else a.tokens.to(torch.int32))
    groups, mask = a.groups.contiguous(), as_bytes(a.mask)
    rows, nodes = groups.new_empty(5, shape.batch), groups.new_empty(4, 2 * shape.batch)
    work = scratch(groups, ids, a.skip and mask is not None)
    getattr(launcher.module(), "prefix_tree_i64" if wide else "prefix_tree_i32")(
        shape.tuple, strided(mask), strided(ids), address(groups), address(rows), address(nodes), a.skip,
        *map(address, work), *launcher.execution(groups),
    )  # fmt: skip
    return rows, nodes


def prefix_lcp(
    rows: Tensor, groups: Tensor, most: int, launcher: Launcher = CPU, scratch: Scratch = _no_scratch
) -> tuple[Tensor, Tensor]:
    rows, groups = rows.contiguous(), groups.contiguous()
    members, lcp = (groups.new_empty((len(groups), most), dtype=torch.int32) for _ in range(2))
    work = scratch(groups)
    launcher.module().prefix_lcp(
        len(groups), address(rows), address(groups), most, address(members), address(lcp),
        *map(address, work), *launcher.execution(groups),
    )  # fmt: skip
    return members, lcp


def _subtrees(
    a: SubtreeArgs, results: SubtreeStatistics, grad: Tensor | None = None, on: Sequence[Tensor] = ()
) -> None:
    """Compute ``results``; or, with ``grad``, the gradients ``on`` from them."""
    x, weights = (None if t is None else wide(t) for t in (a.x, a.weights))
    inputs = [dense(t) for t in (a.rows, a.nodes, x, weights)]  # alive until the call returns
    rows, nodes, *terms = map(address, inputs)
    gradients = [address(g) if g.numel() else 0 for g in on] or [0, 0]
    compiled_module().subtree_statistics(  # type: ignore[union-attr]
        a.x.shape[0], rows, nodes, a.x.shape[1], *terms, a.gamma, STATISTICS.index(a.statistic), a.ddof,
        tuple(map(address, results)), address(grad), *gradients, threads(),
    )  # fmt: skip


def subtree_statistics(a: SubtreeArgs) -> SubtreeStatistics:
    out = torch.empty(a.nodes.shape[1], a.x.shape[1], dtype=torch.float64)
    results = SubtreeStatistics(out, out.new_empty(len(out), 1), torch.empty_like(out))
    _subtrees(a, results)
    return results


def subtree_statistics_backward(
    grad: Tensor, out: Tensor, total: Tensor, centre: Tensor, a: SubtreeArgs
) -> tuple[Tensor, Tensor]:
    results = SubtreeStatistics(*(t.contiguous() for t in (out, total, centre)))
    on_x = grad.new_empty(a.x.shape)
    # Zeros: without channels the kernel writes nothing.
    on_weights = grad.new_zeros(0 if a.weights is None else a.weights.shape)
    if grad.numel():
        _subtrees(a, results, grad.contiguous(), (on_x, on_weights))
    return on_x.to(a.x.dtype), on_weights if a.weights is None else on_weights.to(a.weights.dtype)


def _node_tokens(
    a: NodeTokensArgs, tokens: Tensor, gradients: Sequence[Tensor], launcher: Launcher, scratch: Scratch
) -> None:
    """Write ``tokens``, ``[C, *tokens]``, from node values; or, if any, ``gradients`` from their gradient."""
    shape, mask = RowShape(a.shape, a.cu_seqlens, launcher), as_bytes(a.mask)
    terms_given = (None if t is None else wide(t) for t in a[:4])
    inputs = [dense(t) for t in (a.rows, a.nodes, *terms_given)]  # alive until the call returns
    tree_rows, nodes, *terms = map(address, inputs)
    work = scratch(tokens, a.skip and mask is not None and bool(gradients))
    getattr(launcher.module(), f"nodes_to_tokens_{_SUFFIX[tokens.dtype]}")(
        shape.tuple, strided(mask), tree_rows, nodes, a.channels, math.prod(a.shape), tuple(terms),
        AT.index(a.at), a.gamma, a.skip, (address(tokens), 0 if a.cu_seqlens is not None else a.size),
        tuple(address(g) if g.numel() else 0 for g in gradients), *map(address, work),
        *launcher.execution(a.rows),
    )  # fmt: skip


def nodes_to_tokens(
    a: NodeTokensArgs, dtype: torch.dtype, launcher: Launcher = CPU, scratch: Scratch = _no_scratch
) -> Tensor:
    out = launcher.allocate(a.rows, (a.channels, *a.shape), a.cu_seqlens, dtype)
    _node_tokens(a, out, (), launcher, scratch)
    return out


def nodes_to_tokens_backward(
    grad: Tensor, a: NodeTokensArgs, launcher: Launcher = CPU, scratch: Scratch = _no_scratch
) -> tuple[Tensor, ...]:
    gradients = a.zero_gradients(grad)
    sums = [wide(g) for g in gradients]
    _node_tokens(a, grad.contiguous(), sums, launcher, scratch)
    return tuple(x.to(g.dtype) for x, g in zip(sums, gradients, strict=True))
