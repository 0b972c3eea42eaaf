"""Group-relative advantages on the CPU."""

from __future__ import annotations

from torch import Tensor

from .memory import NONE, Shape, address, allocate, as_bytes, dense, function, rows_dense, strided, threads

_BASELINES = {"none": 0, "mean": 1, "leave_one_out": 2}
_SCALES = {"none": 0, "std": 1}


def _rows(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int
) -> tuple[Shape | None, tuple[int, ...]]:
    if mask is not None:
        return Shape(mask.shape, cu_seqlens), tuple(mask.shape)
    if cu_seqlens is not None:
        return Shape((num_tokens,), cu_seqlens), (num_tokens,)
    return None, ()


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor]:
    rewards, groups = rewards.contiguous(), groups.contiguous()
    per_row, inv_scale = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    rows, shape = _rows(rewards, mask, cu_seqlens, num_tokens)
    mask = as_bytes(mask)
    out = per_row if rows is None else allocate(rewards, shape, cu_seqlens)
    function("group_advantages", rewards)(
        (rewards.shape[0], 0, 0, 0) if rows is None else rows.tuple,
        rows is not None,
        strided(mask),
        address(rewards),
        address(groups),
        _BASELINES[baseline],
        _SCALES[scale],
        eps,
        ddof,
        address(per_row),
        address(inv_scale),
        NONE if rows is None else strided(out),
        threads(),
    )
    return out, inv_scale


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
) -> Tensor:
    rewards, groups, grad_inv_scale = rewards.contiguous(), groups.contiguous(), dense(grad_inv_scale)
    rows, _ = _rows(rewards, mask, cu_seqlens, -1 if grad is None else grad.shape[0])
    mask = as_bytes(mask)
    grad = None if grad is None else rows_dense(grad)
    out = rewards.new_empty(rewards.shape)
    function("group_advantages_backward", rewards)(
        (rewards.shape[0], 0, 0, 0) if rows is None else rows.tuple,
        rows is not None,
        strided(mask),
        strided(grad),
        address(grad_inv_scale),
        address(rewards),
        address(groups),
        _BASELINES[baseline],
        _SCALES[scale],
        eps,
        ddof,
        address(out),
        threads(),
    )
    return out
