"""Group-relative advantages on the CPU, and by CUDA C++ kernels (``rewardops.cuda.advantages``)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..reference.advantages import BASELINES, SCALES
from .memory import CPU, NONE, Shape, Via, address, as_bytes, dense, rows_dense, strided


def _rows(
    mask: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int, via: Via
) -> tuple[Shape | None, tuple[int, ...]]:
    if mask is not None:
        return Shape(mask.shape, cu_seqlens, via), tuple(mask.shape)
    if cu_seqlens is not None:
        return Shape((num_tokens,), cu_seqlens, via), (num_tokens,)
    return None, ()


class _Problem:
    """What both directions have in common, as the compiled module takes it; keeps its tensors alive."""

    def __init__(
        self,
        rewards: Tensor,
        groups: Tensor,
        given: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        num_tokens: int,
        options: tuple[Any, ...],
        via: Via,
    ) -> None:
        baseline, quantile, scale, eps, ddof, raw = options
        self.rows, self.shape = _rows(mask, cu_seqlens, num_tokens, via)
        self.kept = (rewards.contiguous(), groups.contiguous(), dense(given), dense(lengths), as_bytes(mask))
        labels, *per_row = (address(t) for t in self.kept[1:4])
        relative = (
            labels, *per_row, BASELINES.index(baseline), quantile, SCALES.index(scale), eps, ddof, raw,
        )  # fmt: skip
        shape = (rewards.shape[0], 0, 0, 0, True) if self.rows is None else self.rows.tuple
        tokens = self.rows is not None
        self.args = (shape, tokens, strided(self.kept[4]), address(self.kept[0]), relative)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    given: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens: int,
    *options: Any,
    via: Via = CPU,
) -> tuple[Tensor, Tensor, Tensor]:
    p = _Problem(rewards, groups, given, lengths, mask, cu_seqlens, num_tokens, options, via)
    per_row, inv_scale, numerator = (rewards.new_empty(rewards.shape) for _ in range(3))
    out = per_row if p.rows is None else via.allocate(rewards, p.shape, cu_seqlens)
    spread = NONE if p.rows is None else strided(out)
    via.function("group_advantages", rewards)(
        *p.args, address(per_row), address(inv_scale), address(numerator), spread, *via.execution(rewards)
    )
    return out, inv_scale, numerator


# On a GPU a few long rows are summed in parts, by their shape alone: bits do not depend on the device.
_PARTS, _BLOCKS, _TOKENS = 16, 256, 4096


def _parts(p: _Problem, via: Via) -> int:
    if via is CPU or p.rows is None:
        return 1
    return max(1, min(_PARTS, -(-_BLOCKS // max(p.rows.batch, 1)), -(-p.rows.longest // _TOKENS)))


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    rewards: Tensor,
    groups: Tensor,
    given: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    *options: Any,
    via: Via = CPU,
) -> tuple[Tensor, Tensor]:
    # Which packed rows are empty is asked of the offsets alone where no gradient of tokens says how many there are.
    count = sys.maxsize if grad is None else grad.shape[0]
    p = _Problem(rewards, groups, given, lengths, mask, cu_seqlens, count, options, via)
    grad, grad_inv_scale = None if grad is None else rows_dense(grad), dense(grad_inv_scale)
    inv_scale, numerator = inv_scale.contiguous(), numerator.contiguous()
    out = rewards.new_empty(rewards.shape)
    on_given = rewards.new_empty(0 if given is None else rewards.shape)
    sums = rewards.new_empty((rewards.shape[0], _parts(p, via)), dtype=torch.float64)
    via.function("group_advantages_backward", rewards)(
        *p.args, strided(grad), address(grad_inv_scale), (address(inv_scale), address(numerator)),
        (address(sums), sums.shape[1]), address(out), 0 if given is None else address(on_given),
        *via.execution(rewards),
    )  # fmt: skip
    return out, on_given
