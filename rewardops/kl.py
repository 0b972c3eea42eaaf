"""KL: per-token estimators on log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .dispatch import define

ESTIMATORS = ("k1", "k2", "k3")


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logprob, ref_logprob, mask, estimator = inputs
    ctx.save_for_backward(logprob, ref_logprob, mask)
    ctx.estimator = estimator


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    logprob, ref_logprob, mask = ctx.saved_tensors
    out = _backward(grad, logprob, ref_logprob, mask, ctx.estimator)
    # Every estimator is a function of logprob - ref_logprob.
    return (
        out if ctx.needs_input_grad[0] else None,
        -out if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


_backward = define(
    "kl",
    "token_kl_backward(Tensor grad, Tensor logprob, Tensor ref_logprob, Tensor? mask, str estimator)"
    " -> Tensor",
    fake=lambda grad, logprob, *_: logprob.new_empty(logprob.shape),
)

_forward = define(
    "kl",
    "token_kl(Tensor logprob, Tensor ref_logprob, Tensor? mask, str estimator) -> Tensor",
    fake=lambda logprob, *_: logprob.new_empty(logprob.shape),
    setup_context=_setup,
    backward=_gradient,
)


def token_kl(
    logprob: Tensor, ref_logprob: Tensor, *, estimator: str = "k3", mask: Tensor | None = None
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens' log-probabilities.

    With ``d = logprob - ref_logprob``: ``k1 = d``; ``k2 = d**2 / 2``; ``k3 = exp(-d) - 1 + d``, to full
    relative accuracy also where ``d`` is near 0 (Schulman, "Approximating KL divergence", 2020).

    What one differentiates matters more than the value. Over samples from the policy the expected gradient
    of ``k1`` is 0, that of ``k2`` is the gradient of KL(policy || reference), and that of ``k3`` is the
    gradient of the other direction, KL(reference || policy). As a term of the reward, without gradient,
    ``k1`` and ``k3`` are unbiased.

    Args:
        logprob: any shape, so ``[B, T]`` as well as packed ``[N]``; float32, bfloat16, float16 or float64,
            in nats.
        ref_logprob: the same shape.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        mask: the same shape; bool, integer or float 0/1. Masked tokens are exactly 0, and so is their
            gradient.

    Returns:
        The shape of ``logprob``; float32 (float64 where an input is). Differentiable in both inputs.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an
            unknown estimator.
    """
    layout.check_float("logprob", logprob)
    layout.check_float("ref_logprob", ref_logprob)
    layout.check_shape("ref_logprob", ref_logprob, logprob.shape, "the shape of logprob")
    layout.check_device("ref_logprob", ref_logprob, logprob.device, "logprob")
    layout.check_choice("estimator", estimator, ESTIMATORS)
    mask = layout.as_mask(mask, logprob.shape, logprob.device, "logprob")
    logprob, ref_logprob = layout.promote(logprob, ref_logprob)
    out: torch.Tensor = _forward(logprob, ref_logprob, mask, estimator)
    return out
