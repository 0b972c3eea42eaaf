"""Returns on the CPU, and by CUDA C++ kernels (``rewardops.cuda.returns``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.rows import batch_of
from ..reference.returns import differences, prefix_scan
from .memory import CPU, NONE, Shape, Strided, Via, address, as_bytes, rows_dense, strided

__all__ = [
    "differences", "extreme_returns", "extreme_returns_backward", "prefix_scan", "softmin_returns",
    "softmin_returns_backward", "softmin_rewards", "softmin_rewards_backward", "td_scan", "td_scan_backward",
]  # fmt: skip


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_dense(x)


def _run(
    which: str,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    *,
    grad: Tensor | None = None,
    returns: Tensor | None = None,
    largest: bool = False,
    temperature: float = 1.0,
    flag: bool = False,
    log_sums: Strided = NONE,
    via: Via = CPU,
) -> Tensor:
    rows = Shape(rewards.shape, cu_seqlens, via)
    rewards, grad, returns, mask = rows_dense(rewards), _dense(grad), _dense(returns), as_bytes(mask)
    kind = 0
    if steps is not None:
        kind = 1 if steps.dtype is torch.bool else 2
        steps = as_bytes(steps) if kind == 1 else rows_dense(steps)
    out = via.allocate(rewards, rewards.shape, cu_seqlens)
    execution, _kept = via.scan(rewards, rows)
    via.function("returns", rewards)(
        rows.tuple, rows.longest, strided(mask), strided(rewards), (kind, strided(steps)), strided(grad),
        strided(returns), largest, temperature, flag, log_sums, strided(out), which, *execution,
    )  # fmt: skip
    return out


def extreme_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    largest: bool,
    via: Via = CPU,
) -> Tensor:
    return _run("extremes", rewards, mask, cu_seqlens, steps, largest=largest, via=via)


def extreme_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    largest: bool,
    via: Via = CPU,
) -> Tensor:
    return _run("extremes_backward", rewards, mask, cu_seqlens, steps, grad=grad, returns=returns, via=via)


def softmin_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    mean: bool,
    via: Via = CPU,
) -> tuple[Tensor, Tensor]:
    logs = via.allocate(rewards, rewards.shape, cu_seqlens, torch.float64)
    out = _run(
        "softmin_returns", rewards, mask, cu_seqlens, steps, temperature=temperature, flag=mean,
        log_sums=strided(logs), via=via,
    )  # fmt: skip
    return out, logs


def softmin_returns_backward(
    grad: Tensor,
    rewards: Tensor,
    log_sums: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    via: Via = CPU,
) -> Tensor:
    logs = rows_dense(log_sums)
    return _run(
        "softmin_returns_backward", rewards, mask, cu_seqlens, steps, grad=grad, temperature=temperature,
        log_sums=strided(logs), via=via,
    )  # fmt: skip


def softmin_rewards(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    temperature: float,
    through_weights: bool,
) -> Tensor:
    return _run("softmin", rewards, mask, cu_seqlens, steps, temperature=temperature)


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
        "softmin_backward", rewards, mask, cu_seqlens, steps, grad=grad, temperature=temperature,
        flag=through_weights,
    )  # fmt: skip


# ---- discounted sums and temporal differences --------------------------------------------------------------


def _per_row(factors: Tensor | None) -> Tensor | None:
    return (
        factors.contiguous() if factors is not None and factors.dim() == 2 and factors.shape[1] == 1 else None
    )


def _td(
    tokens: tuple[Tensor | None, ...],
    factors: tuple[Tensor | None, Tensor | None],
    bootstrap: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple[float, float, bool, bool],
    outputs: tuple[Tensor | None, ...],
    grad_bootstrap: Tensor | None,
    via: Via,
) -> None:
    rewards = tokens[0]
    assert rewards is not None
    rows = Shape(rewards.shape, cu_seqlens, via)
    per_row = [_per_row(x) for x in factors]
    per_token = [None if row is not None else x for x, row in zip(factors, per_row, strict=True)]
    kept = [_dense(x) for x in (*tokens, *per_token)]
    mask, bootstrap = as_bytes(mask), None if bootstrap is None else bootstrap.contiguous()
    execution, _state = via.scan(rewards, rows)
    via.function("td_scan", rewards)(
        rows.tuple, rows.longest, strided(mask), tuple(strided(x) for x in kept),
        (*(address(x) for x in per_row), address(bootstrap)), *options, tuple(strided(x) for x in outputs),
        address(grad_bootstrap), *execution,
    )  # fmt: skip


def td_scan(
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
    via: Via = CPU,
) -> tuple[Tensor, Tensor]:
    out = via.allocate(rewards, rewards.shape, cu_seqlens)
    returns = None if values is None else via.allocate(rewards, rewards.shape, cu_seqlens)
    options = (gamma, lam, decay, False)
    tokens = (rewards, values, rho, trace)
    _td(tokens, (gammas, lambdas), bootstrap, mask, cu_seqlens, options, (out, returns), None, via)
    return out, rewards.new_empty(0) if returns is None else returns


def td_scan_backward(
    grad: Tensor | None,
    grad_returns: Tensor | None,
    rewards: Tensor,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
    has_values: bool,
    has_bootstrap: bool,
    via: Via = CPU,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, grad_returns = _dense(grad), _dense(grad_returns)
    on_rewards = via.allocate(rewards, rewards.shape, cu_seqlens)
    on_values = via.allocate(rewards, rewards.shape, cu_seqlens) if has_values else None
    batch = batch_of(rewards.shape, cu_seqlens)
    on_bootstrap = rewards.new_zeros(batch) if has_bootstrap else None
    options, outputs = (gamma, lam, decay, True), (grad, grad_returns, on_rewards, on_values)
    _td(
        (rewards, None, rho, trace),
        (gammas, lambdas),
        None,
        mask,
        cu_seqlens,
        options,
        outputs,
        on_bootstrap,
        via,
    )
    return (
        on_rewards,
        rewards.new_empty(0) if on_values is None else on_values,
        rewards.new_empty(0) if on_bootstrap is None else on_bootstrap,
    )
