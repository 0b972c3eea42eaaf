"""Per-token KL estimators on log-probabilities, the specification (see :func:`rewardops.token_kl`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(x) - 1 - x loses all its digits to cancellation near 0; below 1 the Taylor series has them (20 terms:
# the first one left out is under 1e-19 of the value).
_SERIES = [1.0 / math.factorial(k) for k in range(2, 22)]


def exp_minus_1_minus_x(x: Tensor) -> Tensor:
    small = x.abs() < 1
    near = torch.where(small, x, 0)
    series = torch.zeros_like(near)
    for coefficient in reversed(_SERIES):
        series = series * near + coefficient
    return torch.where(small, series * near * near, x.exp() - 1 - x)


def token_kl(logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    d = logprob - ref_logprob
    if mask is not None:
        d = torch.where(mask, d, 0)
    if estimator == "k1":
        return d.clone()
    if estimator == "k2":
        return d * d / 2
    return exp_minus_1_minus_x(-d)


def token_kl_backward(
    grad: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    """The gradient in ``logprob``; that in ``ref_logprob`` is its negative."""
    d = logprob - ref_logprob
    if mask is not None:
        d, grad = torch.where(mask, d, 0), torch.where(mask, grad, 0)
    if estimator == "k1":
        return grad.clone()
    if estimator == "k2":
        return grad * d
    return grad * -torch.expm1(-d)
