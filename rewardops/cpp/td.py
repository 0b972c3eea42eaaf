"""Discounted sums and temporal differences on the CPU, and by CUDA C++ kernels (``rewardops.cuda.td``)."""

from __future__ import annotations

from torch import Tensor

from ..core.rows import batch_of
from ..reference.td import TdArgs, of_scan
from .memory import CPU, Launcher, RowShape, address, as_bytes, dense, rows_dense, strided


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_dense(x)


def _by_layout(factors: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Factors as (a value per token, a value per row); one of the two is None."""
    if factors is not None and factors.dim() == 2 and factors.shape[1] == 1:
        return None, factors.contiguous()
    return _dense(factors), None


def _run(
    a: TdArgs,
    backward: bool,
    outputs: tuple[Tensor | None, ...],
    grad_bootstrap: Tensor | None,
    launcher: Launcher,
) -> None:
    """Launch the scan, or its backward pass with the gradients as the first of ``outputs``."""
    rows = RowShape(a.rewards.shape, a.cu_seqlens, launcher)
    (gammas, row_gammas), (lambdas, row_lambdas) = _by_layout(a.gammas), _by_layout(a.lambdas)
    tokens = [_dense(x) for x in (a.rewards, a.values, a.rho, a.trace)]  # alive until the call returns
    mask, bootstrap = as_bytes(a.mask), dense(a.bootstrap)
    execution, _scratch = launcher.scan(a.rewards, rows)
    launcher.function("td_scan", a.rewards)(
        rows.tuple, rows.longest, strided(mask), tuple([strided(x) for x in (*tokens, gammas, lambdas)]),
        (address(row_gammas), address(row_lambdas), address(bootstrap)), a.gamma, a.lam, a.decay, backward,
        tuple([strided(x) for x in outputs]), address(grad_bootstrap), *execution,
    )  # fmt: skip


def td_scan(a: TdArgs, launcher: Launcher = CPU) -> tuple[Tensor, Tensor]:
    rewards = a.rewards
    out = launcher.allocate(rewards, rewards.shape, a.cu_seqlens)
    returns = None if a.values is None else launcher.allocate(rewards, rewards.shape, a.cu_seqlens)
    _run(a, False, (out, returns), None, launcher)
    return out, rewards.new_empty(0) if returns is None else returns


def td_scan_backward(
    grad: Tensor | None,
    grad_returns: Tensor | None,
    a: TdArgs,
    to_values: bool,
    to_bootstrap: bool,
    launcher: Launcher = CPU,
) -> tuple[Tensor, Tensor, Tensor]:
    rewards, shape = a.rewards, a.rewards.shape
    grad, grad_returns = _dense(grad), _dense(grad_returns)
    on_rewards = launcher.allocate(rewards, shape, a.cu_seqlens)
    on_values = launcher.allocate(rewards, shape, a.cu_seqlens) if to_values else None
    on_bootstrap = rewards.new_zeros(batch_of(shape, a.cu_seqlens)) if to_bootstrap else None
    _run(a, True, (grad, grad_returns, on_rewards, on_values), on_bootstrap, launcher)
    return (
        on_rewards,
        rewards.new_empty(0) if on_values is None else on_values,
        rewards.new_empty(0) if on_bootstrap is None else on_bootstrap,
    )


prefix_scan, differences = of_scan(td_scan_backward)
