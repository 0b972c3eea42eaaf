"""Group-relative advantages on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference.advantages import BASELINES, SCALES
from .memory import NONE, Shape, address, allocate, as_bytes, dense, function, rows_dense, strided, threads


def _rows(
    mask: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int
) -> tuple[Shape | None, tuple[int, ...]]:
    if mask is not None:
        return Shape(mask.shape, cu_seqlens), tuple(mask.shape)
    if cu_seqlens is not None:
        return Shape((num_tokens,), cu_seqlens), (num_tokens,)
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
        *options: Any,
    ) -> None:
        baseline, quantile, scale, eps, ddof, raw = options
        self.rows, self.shape = _rows(mask, cu_seqlens, num_tokens)
        self.kept = (rewards.contiguous(), groups.contiguous(), dense(given), dense(lengths), as_bytes(mask))
        labels, *per_row = (address(t) for t in self.kept[1:4])
        relative = (
            labels, *per_row, BASELINES.index(baseline), quantile, SCALES.index(scale), eps, ddof, raw,
        )  # fmt: skip
        shape = (rewards.shape[0], 0, 0, 0) if self.rows is None else self.rows.tuple
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
) -> tuple[Tensor, Tensor, Tensor]:
    p = _Problem(rewards, groups, given, lengths, mask, cu_seqlens, num_tokens, *options)
    per_row, inv_scale, numerator = (rewards.new_empty(rewards.shape) for _ in range(3))
    out = per_row if p.rows is None else allocate(rewards, p.shape, cu_seqlens)
    spread = NONE if p.rows is None else strided(out)
    function("group_advantages", rewards)(
        *p.args, address(per_row), address(inv_scale), address(numerator), spread, threads()
    )
    return out, inv_scale, numerator


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
) -> tuple[Tensor, Tensor]:
    count = -1 if grad is None else grad.shape[0]
    p = _Problem(rewards, groups, given, lengths, mask, cu_seqlens, count, *options)
    grad, grad_inv_scale = None if grad is None else rows_dense(grad), dense(grad_inv_scale)
    out = rewards.new_empty(rewards.shape)
    on_given = rewards.new_empty(0 if given is None else rewards.shape)
    function("group_advantages_backward", rewards)(
        *p.args, strided(grad), address(grad_inv_scale), address(out),
        0 if given is None else address(on_given), threads(),
    )  # fmt: skip
    return out, on_given
