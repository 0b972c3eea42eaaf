"""Token statistics and the gradient of a known loss by a CUDA C++ kernel, from one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpp.logits import Problem, rows
from ..cpp.memory import address
from ..reference.logits import OUTPUTS, REF_OUTPUTS, with_gradient
from .memory import CUDA

# A block's part of a row, so that two blocks share a multiprocessor; a row too long for that gives its blocks more.
BYTES_PER_BLOCK = 100 << 10
_POLICY = OUTPUTS[: -len(REF_OUTPUTS)]

# What the kernel does not do is left to the forward and backward passes of the backends that come next.
_ops = torch.ops.rewardops
_two_passes, _two_passes_ = with_gradient(
    _ops.token_stats.default, _ops.token_stats_backward.default, _ops.token_stats_backward_.default
)


def _one_pass(
    coefficients: Sequence[Tensor],
    terms: Sequence[str],
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor] | None:
    """None where the kernel does not serve: a reference's logits, float64, rows that do not fit."""
    if ref_logits is not None or logits.dtype is torch.float64:
        return None
    module = CUDA.module()
    blocks = module.blocks_of_a_row(logits.element_size(), vocab, BYTES_PER_BLOCK)
    if not blocks:
        return None
    problem = Problem(logits, tokens, None, mask, temperatures, temperature, softcap, 0, vocab, beta)
    assert problem.logits is not None
    grad = problem.logits if inplace else CUDA.fresh(logits.shape, logits.dtype, logits.device)
    stacked = CUDA.fresh((len(outputs), *tokens.shape), torch.float32, logits.device)
    found = dict(zip(outputs, stacked.unbind(0), strict=True))
    given = {name: c.to(torch.float32).contiguous() for name, c in zip(terms, coefficients, strict=True)}
    module.token_stats_and_grad(
        problem.tuple,
        tuple(address(found.get(name)) for name in _POLICY),
        tuple(address(given.get(name)) for name in _POLICY),
        logits.shape[-1],
        rows(grad),
        blocks,
        *CUDA.execution(logits),
    )
    if inplace and grad is not logits:
        logits.copy_(grad)  # columns that were no unit stride apart
    return stacked, grad


def token_stats_and_grad(*args: Any) -> tuple[Tensor, Tensor]:
    return _one_pass(*args, inplace=False) or _two_passes(*args)


def token_stats_and_grad_(*args: Any) -> Tensor:
    """The gradient written over the logits."""
    made = _one_pass(*args, inplace=True)
    return _two_passes_(*args) if made is None else made[0]
