"""Token statistics from logits, the specification (see :func:`rewardops.token_stats`)."""

from __future__ import annotations

import torch
from torch import Tensor


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _shifted(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    # The difference first: exact near the maximum, where the weight is, whatever the common offset.
    return (logits.to(shift.dtype) - shift[..., None]) / temperature


def token_stats(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, shift (the row's largest logit) and log_sum (log sum exp(z - shift))."""
    acc = _acc(logits)
    vocab = logits.shape[-1]
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    x = torch.where(valid[..., None], logits.to(acc), 0)
    shift = x.amax(-1)
    d = _shifted(x, shift, temperature)
    weight = d.exp()
    total = weight.sum(-1)
    log_sum = total.log()

    in_range = (tokens >= 0) & (tokens < vocab)
    column = torch.where(in_range, tokens, 0).to(torch.int64)
    logprob = d.gather(-1, column[..., None])[..., 0] - log_sum
    logprob = torch.where(in_range, logprob, torch.nan)

    entropy = logits.new_empty(0, dtype=acc)
    if with_entropy:
        # weight * d is 0 * -inf where a logit is -inf; its limit is 0.
        entropy = log_sum - torch.where(weight == 0, 0, weight * d).sum(-1) / total
        entropy = torch.where(valid, entropy, 0)
    return torch.where(valid, logprob, 0), entropy, shift, torch.where(valid, log_sum, 0)


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
    """All upstream gradients folded into one gradient of the logits."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros_like(shift)
    up_logprob = zero if grad_logprob is None else torch.where(valid, grad_logprob, 0)
    up_log_sum = zero if grad_log_sum is None else torch.where(valid, grad_log_sum, 0)

    x = torch.where(valid[..., None], logits.to(shift.dtype), 0)
    logp = _shifted(x, shift, temperature) - log_sum[..., None]
    p = logp.exp()
    grad = (up_log_sum - up_logprob)[..., None] * p
    if grad_entropy is not None:
        up_entropy = torch.where(valid, grad_entropy, 0)[..., None]
        grad = grad - torch.where(p == 0, 0, up_entropy * p * (logp + entropy[..., None]))
    in_range = (tokens >= 0) & (tokens < logits.shape[-1])
    column = torch.where(in_range, tokens, 0).to(torch.int64)
    grad = grad.scatter_add(-1, column[..., None], torch.where(in_range, up_logprob, torch.nan)[..., None])
    return torch.where(valid[..., None], grad / temperature, 0).to(logits.dtype)
