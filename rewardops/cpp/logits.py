"""Token statistics on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import compiled_module
from .memory import address, dense, threads

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _rows(logits: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The logits, and (inner rows, outer stride, inner stride, vocabulary) of their leading dimensions."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    *lead, vocab = logits.shape
    outer, inner = (0, logits.stride(0)) if len(lead) == 1 else logits.stride()[:2]
    return logits, (max(lead[-1], 1), outer, inner, vocab)


def token_stats(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, shape = _rows(logits)
    tokens, mask = tokens.contiguous(), dense(mask)
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    logprob, shift, log_sum = (torch.empty(tokens.shape, dtype=acc) for _ in range(3))
    entropy = torch.empty(tokens.shape if with_entropy else 0, dtype=acc)
    compiled_module().token_stats(  # type: ignore[union-attr]
        address(logits),
        _DTYPES[logits.dtype],
        shape,
        tokens.numel(),
        address(tokens),
        address(mask),
        temperature,
        address(logprob),
        address(entropy) if with_entropy else 0,
        address(shift),
        address(log_sum),
        threads(),
    )
    return logprob, entropy, shift, log_sum


def token_stats_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    logits, shape = _rows(logits)
    tokens, mask = tokens.contiguous(), dense(mask)
    ups = [dense(grad_logprob), dense(grad_entropy), dense(grad_log_sum)]
    entropy, shift, log_sum = entropy.contiguous(), shift.contiguous(), log_sum.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype)
    compiled_module().token_stats_backward(  # type: ignore[union-attr]
        *(address(up) for up in ups),
        address(logits),
        _DTYPES[logits.dtype],
        shape,
        tokens.numel(),
        address(tokens),
        address(mask),
        address(entropy),
        address(shift),
        address(log_sum),
        temperature,
        address(out),
        threads(),
    )
    return out
