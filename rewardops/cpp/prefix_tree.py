"""Prefix values on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Shape, address, allocate, as_bytes, function, rows_dense, strided, threads


def _ids(tokens: Tensor) -> tuple[Tensor, str]:
    """Token ids in one of the two widths that the kernels compare."""
    if tokens.dtype is torch.int64:
        return rows_dense(tokens), "_i64"
    return rows_dense(tokens.to(torch.int32)), "_i32"


def prefix_values(
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Shape(tokens.shape, cu_seqlens)
    ids, width = _ids(tokens)
    rewards, groups, mask = rewards.contiguous(), groups.contiguous(), as_bytes(mask)
    before, after = (allocate(rewards, tokens.shape, cu_seqlens) for _ in range(2))
    count = torch.zeros(tokens.shape, dtype=torch.int32)
    function("prefix_values", rewards, width)(
        rows.tuple,
        strided(mask),
        strided(ids),
        address(groups),
        address(rewards),
        strided(before),
        strided(after),
        strided(count),
        threads(),
    )
    return before, after, count


def prefix_values_backward(
    grad_before: Tensor | None,
    grad_after: Tensor | None,
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> Tensor:
    rows = Shape(tokens.shape, cu_seqlens)
    ids, width = _ids(tokens)
    groups, mask = groups.contiguous(), as_bytes(mask)
    ups = [None if grad is None else rows_dense(grad) for grad in (grad_before, grad_after)]
    out = rewards.new_empty(rewards.shape)
    function("prefix_values_backward", rewards, width)(
        rows.tuple,
        strided(mask),
        strided(ids),
        address(groups),
        *(strided(up) for up in ups),
        address(out),
        threads(),
    )
    return out
