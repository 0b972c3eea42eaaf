"""Entropy weighting on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..reference.entropy import GtpoArgs
from .memory import RowShape, address, allocate, as_bytes, function, rows_dense, strided, threads
from .segments import row_sums


def _launch(grad: Tensor | None, a: GtpoArgs) -> Tensor:
    rows = RowShape(a.entropy.shape, a.cu_seqlens)
    rewards, groups, mask = a.rewards.contiguous(), a.groups.contiguous(), as_bytes(a.mask)
    entropy = rows_dense(a.entropy)
    grad = None if grad is None else rows_dense(grad)
    out = allocate(entropy, entropy.shape, a.cu_seqlens)
    function("gtpo_rewards", rewards)(
        rows.tuple, strided(mask), address(rewards), strided(entropy), address(groups),
        a.alpha1, a.alpha2, a.threshold, a.floor,
        strided(grad), strided(out), rows.longest, threads(),
    )  # fmt: skip
    return out


def gtpo_rewards(a: GtpoArgs) -> Tensor:
    return _launch(None, a)


def gtpo_rewards_backward(grad: Tensor, a: GtpoArgs) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0:  # the address of an empty tensor is 0, which the kernels read as the forward pass
        return a.rewards.new_zeros(a.rewards.shape), a.entropy.new_zeros(a.entropy.shape)
    grad_entropy = _launch(grad, a)
    sums = row_sums(grad, a.mask, a.cu_seqlens)
    return (sums * a.alpha1).masked_fill(~(a.rewards > a.threshold), 0.0), grad_entropy
