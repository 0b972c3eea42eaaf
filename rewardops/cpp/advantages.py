"""Group-relative advantages on the CPU, and by CUDA C++ kernels (``rewardops.cuda.advantages``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.advantages import BASELINES, SCALES, AdvantagesArgs
from .memory import CPU, NONE, Launcher, RowShape, address, as_bytes, dense, rows_dense, strided


class _Launch:
    """Arguments that both directions share, as the compiled module takes them; keeps their tensors alive."""

    def __init__(self, a: AdvantagesArgs, launcher: Launcher) -> None:
        self.rows = None if a.token_shape is None else RowShape(a.token_shape, a.cu_seqlens, launcher)
        per_row = [dense(t) for t in (a.rewards, a.groups, a.baseline_values, a.lengths)]
        mask = as_bytes(a.mask)
        self.tensors = (*per_row, mask)
        rewards, *relative = [address(t) for t in per_row]
        options = (BASELINES.index(a.baseline), a.quantile, SCALES.index(a.scale), a.eps, a.ddof, a.raw)
        shape = (a.rewards.shape[0], 0, 0, 0, True) if self.rows is None else self.rows.tuple
        self.args = (shape, self.rows is not None, strided(mask), rewards, (*relative, *options))


def group_advantages(a: AdvantagesArgs, *, launcher: Launcher = CPU) -> tuple[Tensor, Tensor, Tensor]:
    launch, rewards = _Launch(a, launcher), a.rewards
    per_row, inv_scale, numerator = [launcher.fresh_like(rewards) for _ in range(3)]
    shape = a.token_shape
    out = per_row if shape is None else launcher.allocate(rewards, shape, a.cu_seqlens)
    on_tokens = NONE if shape is None else strided(out)
    launcher.function("group_advantages", rewards)(
        *launch.args,
        address(per_row),
        address(inv_scale),
        address(numerator),
        on_tokens,
        *launcher.execution(rewards),
    )
    return out, inv_scale, numerator


# On a GPU a few long rows are summed in parts. Their number follows from the shape alone, so that bits do not
# depend on the device.
_PARTS, _BLOCKS, _TOKENS = 16, 256, 4096


def _parts(rows: RowShape | None, launcher: Launcher) -> int:
    if launcher is CPU or rows is None:
        return 1
    return max(1, min(_PARTS, -(-_BLOCKS // max(rows.batch, 1)), -(-rows.longest // _TOKENS)))


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    a: AdvantagesArgs,
    *,
    launcher: Launcher = CPU,
) -> tuple[Tensor, Tensor]:
    launch, rewards = _Launch(a, launcher), a.rewards
    grad, grad_inv_scale = None if grad is None else rows_dense(grad), dense(grad_inv_scale)
    inv_scale, numerator = inv_scale.contiguous(), numerator.contiguous()
    on_rewards = launcher.fresh_like(rewards)
    on_values = rewards.new_empty(0 if a.baseline_values is None else rewards.shape)
    sums = rewards.new_empty((rewards.shape[0], _parts(launch.rows, launcher)), dtype=torch.float64)
    launcher.function("group_advantages_backward", rewards)(
        *launch.args, strided(grad), address(grad_inv_scale), (address(inv_scale), address(numerator)),
        (address(sums), sums.shape[1]), address(on_rewards), 0 if a.baseline_values is None else address(on_values),
        *launcher.execution(rewards),
    )  # fmt: skip
    return on_rewards, on_values
