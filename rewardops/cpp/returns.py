"""Returns on the CPU, and by CUDA C++ kernels (``rewardops.cuda.returns``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.returns import ReturnsArgs
from .memory import CPU, NONE, Launcher, RowShape, Strided, as_bytes, rows_dense, strided


def _run(
    which: str,
    a: ReturnsArgs,
    *,
    grad: Tensor | None = None,
    returns: Tensor | None = None,
    largest: bool = False,
    temperature: float = 1.0,
    flag: bool = False,
    log_sums: Strided = NONE,
    launcher: Launcher = CPU,
) -> Tensor:
    rows = RowShape(a.rewards.shape, a.cu_seqlens, launcher)
    rewards, mask, steps = rows_dense(a.rewards), as_bytes(a.mask), a.steps
    grad, returns = (None if x is None else rows_dense(x) for x in (grad, returns))
    kind = 0
    if steps is not None:
        kind = 1 if steps.dtype is torch.bool else 2
        steps = as_bytes(steps) if kind == 1 else rows_dense(steps)
    out = launcher.allocate(rewards, rewards.shape, a.cu_seqlens)
    execution, _scratch = launcher.scan(rewards, rows)
    launcher.function("returns", rewards)(
        rows.tuple, rows.longest, strided(mask), strided(rewards), (kind, strided(steps)), strided(grad),
        strided(returns), largest, temperature, flag, log_sums, strided(out), which, *execution,
    )  # fmt: skip
    return out


def extreme_returns(a: ReturnsArgs, largest: bool, launcher: Launcher = CPU) -> Tensor:
    return _run("extremes", a, largest=largest, launcher=launcher)


def extreme_returns_backward(
    grad: Tensor, returns: Tensor, a: ReturnsArgs, largest: bool, launcher: Launcher = CPU
) -> Tensor:
    return _run("extremes_backward", a, grad=grad, returns=returns, launcher=launcher)


def softmin_returns(
    a: ReturnsArgs, temperature: float, mean: bool, launcher: Launcher = CPU
) -> tuple[Tensor, Tensor]:
    logs = launcher.allocate(a.rewards, a.rewards.shape, a.cu_seqlens, torch.float64)
    out = _run(
        "softmin_returns", a, temperature=temperature, flag=mean, log_sums=strided(logs), launcher=launcher
    )
    return out, logs


def softmin_returns_backward(
    grad: Tensor, log_sums: Tensor, a: ReturnsArgs, temperature: float, launcher: Launcher = CPU
) -> Tensor:
    logs = rows_dense(log_sums)
    return _run(
        "softmin_returns_backward", a, grad=grad, temperature=temperature, log_sums=strided(logs),
        launcher=launcher,
    )  # fmt: skip


def softmin_rewards(a: ReturnsArgs, temperature: float, through_weights: bool) -> Tensor:
    return _run("softmin", a, temperature=temperature)


def softmin_rewards_backward(
    grad: Tensor, a: ReturnsArgs, temperature: float, through_weights: bool
) -> Tensor:
    return _run("softmin_backward", a, grad=grad, temperature=temperature, flag=through_weights)
