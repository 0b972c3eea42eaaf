"""Logits: token statistics from one pass over ``[N, V]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout
from .dispatch import define

OUTPUTS = ("logprob", "entropy", "logsumexp")


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, in nats; None for what was not asked for.

    All have the shape of ``tokens`` and are float32 (float64 for float64 logits).
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _fake(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def out() -> Tensor:
        return logits.new_empty(tokens.shape, dtype=_acc(logits))

    entropy = out() if with_entropy else logits.new_empty(0, dtype=_acc(logits))
    return out(), entropy, out(), out()


def _fake_backward(grad_logprob, grad_entropy, grad_log_sum, logits, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, tokens, mask, temperature, _ = inputs
    _, entropy, shift, log_sum = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, tokens, mask, entropy, shift, log_sum)
    ctx.temperature = temperature


def _gradient(ctx, grad_logprob, grad_entropy, grad_shift, grad_log_sum):  # type: ignore[no-untyped-def]
    logits, *saved = ctx.saved_tensors
    grad = _backward(grad_logprob, grad_entropy, grad_log_sum, logits, *saved, ctx.temperature)
    return grad, None, None, None, None


_backward = define(
    "logits",
    "token_stats_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_log_sum, Tensor logits,"
    " Tensor tokens, Tensor? mask, Tensor entropy, Tensor shift, Tensor log_sum, float temperature)"
    " -> Tensor",
    fake=_fake_backward,
)

# shift (the row's largest logit) and log_sum apart, and not their sum: with logits near 1e4 the sum has
# lost the digits that the backward needs. log_sum carries the whole gradient of logsumexp.
_forward = define(
    "logits",
    "token_stats(Tensor logits, Tensor tokens, Tensor? mask, float temperature, bool with_entropy)"
    " -> (Tensor logprob, Tensor entropy, Tensor shift, Tensor log_sum)",
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
) -> TokenStats:
    """Log-probability and entropy of every token, from one read of the logits.

    With ``z = logits / temperature``, ``L = log sum exp z`` and ``p = exp(z - L)``:

    - ``logprob = z[token] - L``, gradient ``onehot(token) - p``
    - ``entropy = -sum p log p`` (nats), gradient ``-p (log p + entropy)``
    - ``logsumexp = L``, gradient ``p``

    all as max-shifted sums, which keep their digits for logits of any offset. A logit of ``-inf`` has
    probability 0 and contributes nothing; a token there has logprob ``-inf``.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``; float32, bfloat16, float16 or float64. Strided rows, such as
            ``logits[:, :-1]``, are read in place. Accumulation is in float32 (float64 for float64).
        tokens: ``[N]`` or ``[B, T]``, integer column ids. An id outside ``[0, V)`` gives NaN at that token
            and is never read (under :func:`rewardops.debug` it raises).
        temperature: the logits are divided by it first.
        mask: the shape of ``tokens``; bool, integer or float 0/1. Masked rows are not read: their outputs
            and their gradient are exactly 0, whatever the logits hold.
        outputs: which of ``"logprob"``, ``"entropy"``, ``"logsumexp"`` to return.

    Returns:
        :class:`TokenStats`, with the outputs asked for. Differentiable in ``logits`` once: all upstream
        gradients are folded into one read and one write, in the dtype of the logits.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an
            unknown output, a temperature that is not above 0.
    """
    layout.check_float("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: got shape {layout.show(logits.shape)}, want [N, V] or [B, T, V]")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {layout.show(logits.shape)}, want a vocabulary of at least 1")
    layout.check_integer("tokens", tokens)
    layout.check_shape("tokens", tokens, logits.shape[:-1], "the shape of logits without the vocabulary")
    layout.check_device("tokens", tokens, logits.device, "logits")
    layout.check_positive("temperature", temperature)
    mask = layout.as_mask(mask, tokens.shape, logits.device, "tokens")
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"outputs: got {outputs!r}, want a sequence of names out of {OUTPUTS}")
    for name in outputs:
        layout.check_choice("outputs", name, OUTPUTS)
    if layout.debugging():
        layout.check_token_ids(tokens, logits.shape[-1], mask)

    logprob, entropy, shift, log_sum = _forward(
        logits, tokens.to(torch.int64), mask, float(temperature), "entropy" in outputs
    )
    return TokenStats(
        logprob=logprob if "logprob" in outputs else None,
        entropy=entropy if "entropy" in outputs else None,
        logsumexp=shift.detach() / temperature + log_sum if "logsumexp" in outputs else None,
    )
