"""Returns on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import NONE, Shape, Strided, allocate, as_bytes, function, rows_dense, strided, threads


def _run(
    which: str,
    rewards: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    *,
    like: Tensor,
    grad: Tensor | None = None,
    where: Tensor | None = None,
    temperature: float = 1.0,
    through_weights: bool = False,
    argmin: Strided = NONE,
) -> Tensor:
    rows = Shape(like.shape, cu_seqlens)
    rewards = None if rewards is None else rows_dense(rewards)
    grad = None if grad is None else rows_dense(grad)
    where = None if where is None else rows_dense(where)
    mask = as_bytes(mask)
    kind = 0
    if steps is not None:
        kind = 1 if steps.dtype is torch.bool else 2
        steps = as_bytes(steps) if kind == 1 else rows_dense(steps)
    out = allocate(like, like.shape, cu_seqlens)
    function("returns", like)(
        rows.tuple,
        strided(mask),
        strided(rewards),
        kind,
        strided(steps),
        strided(grad),
        strided(where),
        temperature,
        through_weights,
        strided(out),
        argmin,
        which,
        threads(),
    )
    return out


def min_returns(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None
) -> tuple[Tensor, Tensor]:
    argmin = torch.full(rewards.shape, -1, dtype=torch.int32)
    out = _run("min", rewards, mask, cu_seqlens, steps, like=rewards, argmin=strided(argmin))
    return out, argmin


def min_returns_backward(grad: Tensor, argmin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return _run("min_backward", None, None, cu_seqlens, None, like=grad, grad=grad, where=argmin)


def softmin_rewards(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    return _run("softmin", rewards, mask, cu_seqlens, steps, like=rewards, temperature=temperature)


def softmin_rewards_backward(
    grad: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    return _run(
        "softmin_backward",
        rewards,
        mask,
        cu_seqlens,
        steps,
        like=rewards,
        grad=grad,
        temperature=temperature,
        through_weights=through_weights,
    )
