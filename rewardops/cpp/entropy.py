"""Entropy weighting on the CPU."""

from __future__ import annotations

from torch import Tensor

from .memory import Shape, address, allocate, as_bytes, function, rows_dense, strided, threads
from .segments import row_sums


def _run(
    grad: Tensor | None,
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple[float, float, float, float],
) -> Tensor:
    rows = Shape(entropy.shape, cu_seqlens)
    rewards, groups, mask = rewards.contiguous(), groups.contiguous(), as_bytes(mask)
    entropy = rows_dense(entropy)
    grad = None if grad is None else rows_dense(grad)
    out = allocate(entropy, entropy.shape, cu_seqlens)
    function("gtpo_rewards", rewards)(
        rows.tuple,
        strided(mask),
        address(rewards),
        strided(entropy),
        address(groups),
        *options,
        strided(grad),
        strided(out),
        rows.longest,
        threads(),
    )
    return out


def gtpo_rewards(
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha1: float,
    alpha2: float,
    threshold: float,
    floor: float,
) -> Tensor:
    options = (alpha1, alpha2, threshold, floor)
    return _run(None, rewards, entropy, groups, mask, cu_seqlens, options)


def gtpo_rewards_backward(
    grad: Tensor,
    rewards: Tensor,
    entropy: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha1: float,
    alpha2: float,
    threshold: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0:  # an empty tensor has no address, by which the kernels tell the two passes apart
        return rewards.new_zeros(rewards.shape), entropy.new_zeros(entropy.shape)
    options = (alpha1, alpha2, threshold, floor)
    grad_entropy = _run(grad, rewards, entropy, groups, mask, cu_seqlens, options)
    sums = row_sums(grad, mask, cu_seqlens)
    return (sums * alpha1).masked_fill(~(rewards > threshold), 0.0), grad_entropy
