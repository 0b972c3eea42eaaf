"""Returns: what is still to come, as reverse scans over the rewards of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .dispatch import define
from .reference.layout import from_rows, to_rows


def _setup_min(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, argmin = output
    ctx.mark_non_differentiable(argmin)
    ctx.save_for_backward(argmin, inputs[2])


def _gradient_min(ctx, grad, _grad_argmin):  # type: ignore[no-untyped-def]
    return _min_backward(grad, *ctx.saved_tensors), None, None, None


_min_backward = define(
    "returns",
    "min_returns_backward(Tensor grad, Tensor argmin, Tensor? cu_seqlens) -> Tensor",
    fake=lambda grad, *_: grad.new_empty(grad.shape),
)

_min_forward = define(
    "returns",
    "min_returns(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps)"
    " -> (Tensor returns, Tensor argmin)",
    fake=lambda rewards, *_: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(rewards.shape, dtype=torch.int32),
    ),
    setup_context=_setup_min,
    backward=_gradient_min,
)


def _setup_softmin(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, temperature, through_weights = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (temperature, through_weights)


def _gradient_softmin(ctx, grad):  # type: ignore[no-untyped-def]
    return (_softmin_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5)


_softmin_backward = define(
    "returns",
    "softmin_rewards_backward(Tensor grad, Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps,"
    " float temperature, bool through_weights) -> Tensor",
    fake=lambda grad, rewards, *_: rewards.new_empty(rewards.shape),
)

_softmin_forward = define(
    "returns",
    "softmin_rewards(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps, float temperature,"
    " bool through_weights) -> Tensor",
    fake=lambda rewards, *_: rewards.new_empty(rewards.shape),
    setup_context=_setup_softmin,
    backward=_gradient_softmin,
)


def _prepare(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, steps: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    layout.check_float("rewards", rewards)
    tokens = layout.token_layout("rewards", rewards, mask, cu_seqlens)
    markers = layout.step_markers(steps, rewards, tokens, "rewards")
    (rewards,) = layout.promote(rewards)
    return rewards, tokens.mask, tokens.cu_seqlens, markers


def min_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Min-form return: the smallest step reward still to come, ``G_k = min(r_k, G_{k+1})``.

    The credit assignment of PURE (arXiv 2504.15275, section 4), exact. Every valid token carries the return
    of the step it is in; where no step is left (the tokens after the last step end) it is 0. Rewards at
    positions that end no step are not read, so they never act as a reward of 0.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``rewards``; bool, integer or float 0/1. Masked tokens are passed over.
        cu_seqlens: ``[B + 1]`` for packed rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step and hold its reward. Integer:
            step ids, non-decreasing along a row, negative for none; a step's reward is that at its last
            valid token. None: every valid token is a step.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64), 0 where masked. Differentiable in
        ``rewards``: the gradient goes to the arg-min, of equal rewards to the earliest. A NaN reward makes
        its step's and every earlier return NaN.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
    """
    out: Tensor = _min_forward(*_prepare(rewards, mask, cu_seqlens, steps))[0]
    return out


def softmin_rewards(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    temperature: float = 0.1,
    through_weights: bool = True,
) -> Tensor:
    """PURE's transform of step rewards: ``r*_k = w_k r_k`` with ``w = softmax(-r / temperature)``.

    The softmax runs over the steps of a row. The plain sum of ``r*`` over a row tends to its smallest step
    reward as the temperature goes to 0 (arXiv 2504.15275, section 4; the authors train with 0.1).

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``rewards``; bool, integer or float 0/1. Masked tokens are passed over.
        cu_seqlens: ``[B + 1]`` for packed rows.
        steps: as in :func:`min_returns`.
        temperature: above 0.
        through_weights: whether the gradient flows through ``w`` as well.

    Returns:
        The layout of ``rewards``: ``r*`` at step ends and 0 elsewhere; float32 (float64 for float64).
        Differentiable in ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, a
            temperature that is not above 0.
    """
    layout.check_positive("temperature", temperature)
    arguments = _prepare(rewards, mask, cu_seqlens, steps)
    out: Tensor = _softmin_forward(*arguments, float(temperature), bool(through_weights))
    return out


def scan(x: Tensor, a: Tensor) -> Tensor:
    """``G[t] = x[t] + a[t] * G[t + 1]`` along rows ``[B, T]``, the maps composed over distances 1, 2, 4, ..."""
    step, width = 1, x.shape[1]
    while step < width:
        x = torch.cat([x[:, :-step] + a[:, :-step] * x[:, step:], x[:, -step:]], 1)
        a = torch.cat([a[:, :-step] * a[:, step:], a[:, -step:]], 1)
        step *= 2
    return x


def discounted_returns(
    rewards: Tensor, *, gamma: float = 1.0, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """``G[t] = r[t] + gamma * G[t + 1]`` along every row; masked tokens are skipped and do not discount.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64. gamma: 0 to 1.

    Returns:
        The layout of ``rewards``, float32 (float64 for float64), 0 where masked. Differentiable.
    """
    layout.check_float("rewards", rewards)
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma: got {gamma!r}, want a number from 0 to 1")
    rows = layout.token_layout("rewards", rewards, mask, cu_seqlens)
    (wide,) = layout.promote(rewards)
    x, valid = to_rows(wide, rows.mask, rows.cu_seqlens)
    a = torch.where(valid, gamma, torch.ones((), dtype=x.dtype, device=x.device))
    x = scan(x, a)
    return from_rows(torch.where(valid, x, 0), rows.shape, rows.cu_seqlens)
