"""Prefix trees on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import compiled_module
from ..reference.prefix_tree import channels_of
from .memory import Shape, address, as_bytes, dense, fresh, rows_dense, strided, threads

_AT = {"after": 0, "before": 1, "step": 2}
_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.int32: "i32"}


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(compiled_module(), f"{name}_{_SUFFIX[dtype]}")


def prefix_tree(
    tokens: Tensor, groups: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, skip: bool
) -> tuple[Tensor, Tensor]:
    shape = Shape(tokens.shape, cu_seqlens)
    # Ids are compared in one of two widths.
    wide = tokens.dtype is torch.int64
    ids = rows_dense(tokens if wide else tokens.to(torch.int32))
    groups, mask = groups.contiguous(), as_bytes(mask)
    rows, nodes = groups.new_empty(5, shape.batch), groups.new_empty(4, 2 * shape.batch)
    getattr(compiled_module(), "prefix_tree_i64" if wide else "prefix_tree_i32")(
        shape.tuple,
        strided(mask),
        strided(ids),
        address(groups),
        address(rows),
        address(nodes),
        skip,
        threads(),
    )
    return rows, nodes


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    rows, groups = rows.contiguous(), groups.contiguous()
    members, lcp = (groups.new_empty((len(groups), most), dtype=torch.int32) for _ in range(2))
    compiled_module().prefix_lcp(  # type: ignore[union-attr]
        len(groups), address(rows), address(groups), most, address(members), address(lcp), threads()
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
    grad_weights = x.new_empty(0 if weights is None else weights.shape)
    outs = (address(grad_x), 0 if weights is None else address(grad_weights))
    compiled_module().subtree_sums(*head, 0, address(up), *outs, threads())  # type: ignore[union-attr]
    return grad_x, grad_weights


class _NodesOnTokens:
    """The leading arguments of both passes, and what they point at."""

    def __init__(
        self,
        values: Tensor | None,
        along: Tensor | None,
        base: Tensor | None,
        factor: Tensor | None,
        rows: Tensor,
        nodes: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        skip: bool,
        size: int,
        at: str,
        gamma: float,
    ) -> None:
        batch = rows.shape[1]
        self.channels = channels_of(values, along)
        self.tokens = (batch, size) if cu_seqlens is None else (size,)
        self.shape = Shape(self.tokens, cu_seqlens)
        self.kept = [dense(t) for t in (rows, nodes, values, along, base, factor)]
        self.mask = as_bytes(mask)
        a = [address(t) for t in self.kept]
        plane = batch * size if cu_seqlens is None else size
        self.head = [
            self.shape.tuple,
            strided(self.mask),
            *a[:2],
            self.channels,
            plane,
            *a[2:],
            _AT[at],
            gamma,
            skip,
        ]

    def planes(self, tensor: Tensor) -> tuple[int, int]:
        return address(tensor), 0 if self.shape.cu is not None else tensor.shape[-1]


def nodes_to_tokens(
    values: Tensor | None,
    along: Tensor | None,
    base: Tensor | None,
    factor: Tensor | None,
    rows: Tensor,
    nodes: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: bool,
    size: int,
    at: str,
    gamma: float,
    dtype: torch.dtype,
) -> Tensor:
    p = _NodesOnTokens(values, along, base, factor, rows, nodes, mask, cu_seqlens, skip, size, at, gamma)
    shape = (p.channels, *p.tokens)
    out = fresh(shape, dtype) if cu_seqlens is None else torch.zeros(shape, dtype=dtype)
    _function("nodes_to_tokens", dtype)(*p.head, p.planes(out), threads())
    return out


def nodes_to_tokens_backward(
    grad: Tensor,
    values: Tensor | None,
    along: Tensor | None,
    base: Tensor | None,
    factor: Tensor | None,
    rows: Tensor,
    nodes: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: bool,
    size: int,
    at: str,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = _NodesOnTokens(values, along, base, factor, rows, nodes, mask, cu_seqlens, skip, size, at, gamma)
    up = grad.contiguous()
    outs = [
        torch.empty(0 if t is None else t.shape, dtype=torch.float64) for t in (values, along, base, factor)
    ]
    addresses = [address(o) if o.numel() else 0 for o in outs]
    _function("nodes_to_tokens_backward", grad.dtype)(*p.head, p.planes(up), *addresses, threads())
    return outs[0], outs[1], outs[2], outs[3]
