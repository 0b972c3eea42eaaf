"""Token statistics and the gradient of a known loss by a CUDA C++ kernel, from one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpp.logits import TokenStatsLaunch, rows
from ..cpp.memory import address
from ..reference.logits import OUTPUTS, REF_OUTPUTS, TokenStatsArgs, with_gradient
from .memory import CUDA

# Bytes of a row per block, so that five blocks share a multiprocessor; blocks of a longer row hold more.
BYTES_PER_BLOCK = 44 << 10
_POLICY = OUTPUTS[: -len(REF_OUTPUTS)]


# ---- the fallback: forward and backward passes of the next backends ----------------------------------------


def _forward(a: TokenStatsArgs, inplace: bool) -> list[Tensor]:
    return torch.ops.rewardops.token_stats.default(*a, inplace)


def _backward(grads: Any, saved: Tensor, a: TokenStatsArgs, *wanted: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.rewardops.token_stats_backward.default(grads, saved, *a, *wanted)


def _backward_(grads: Any, saved: Tensor, a: TokenStatsArgs, *wanted: bool) -> Tensor:
    return torch.ops.rewardops.token_stats_backward_.default(grads, saved, *a, *wanted)


_two_passes, _two_passes_ = with_gradient(_forward, _backward, _backward_)


# ---- the kernel --------------------------------------------------------------------------------------------


def _one_pass(
    coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs, inplace: bool
) -> tuple[Tensor, Tensor] | None:
    """Statistics and gradient; None where the kernel does not apply: reference logits, float64, too long rows."""
    if a.ref_logits is not None or a.logits.dtype is torch.float64:
        return None
    module = CUDA.module()
    blocks = module.blocks_of_a_row(a.logits.element_size(), a.vocab, BYTES_PER_BLOCK)
    if not blocks:
        return None
    launch = TokenStatsLaunch(a)
    grad = launch.logits if inplace else CUDA.fresh(a.logits.shape, a.logits.dtype, a.logits.device)
    stacked = CUDA.fresh((len(a.outputs), *a.tokens.shape), torch.float32, a.logits.device)
    out = dict(zip(a.outputs, stacked.unbind(0), strict=True))
    ups = {name: c.to(torch.float32).contiguous() for name, c in zip(terms, coefficients, strict=True)}
    module.token_stats_and_grad(
        launch.tuple,
        tuple(address(out.get(name)) for name in _POLICY),
        tuple(address(ups.get(name)) for name in _POLICY),
        a.logits.shape[-1],
        rows(grad),
        blocks,
        *CUDA.execution(a.logits),
    )
    if inplace and grad is not a.logits:
        a.logits.copy_(grad)  # the columns did not have unit stride
    return stacked, grad


def token_stats_and_grad(
    coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs
) -> tuple[Tensor, Tensor]:
    return _one_pass(coefficients, terms, a, inplace=False) or _two_passes(coefficients, terms, a)


def token_stats_and_grad_(coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs) -> Tensor:
    """Statistics; the gradient is written over the logits."""
    result = _one_pass(coefficients, terms, a, inplace=True)
    return _two_passes_(coefficients, terms, a) if result is None else result[0]
