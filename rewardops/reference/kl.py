"""Per-token KL estimators on log-probabilities, the specification (see :func:`rewardops.token_kl`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Near 0, exp(x) - 1 - x loses all its digits to cancellation; the Taylor series for |x| < 1 does not (20 terms:
# the first omitted one is under 1e-19 of the value).
_SERIES = [1.0 / math.factorial(k) for k in range(2, 22)]


def exp_minus_1_minus_x(x: Tensor) -> Tensor:
    small = x.abs() < 1
    near = torch.where(small, x, 0)
    series = torch.zeros_like(near)
    for coefficient in reversed(_SERIES):
        series = series * near + coefficient
    return torch.where(small, series * near * near, x.exp() - 1 - x)


ESTIMATORS = ("k1", "abs", "k2", "k3", "k1_plus", "k3_plus", "binary_kl", "binary_tv")


class TokenKlArgs(NamedTuple):
    """Arguments of ``token_kl`` and its backward pass; tensors of one shape, float32 or float64."""

    logprob: Tensor
    """Logprob of the policy, in nats."""
    ref_logprob: Tensor
    """Logprob of the reference, in nats."""
    mask: Tensor | None
    """bool; None: every token counts."""
    old_logprob: Tensor | None
    """Logprob of the sampling policy; weights the estimate by ``exp(logprob - old_logprob)``. None: no weight."""
    rewards: Tensor | None
    """Rewards to which the estimate is added; None for none, and in the backward pass."""
    estimator: str
    """One of ``ESTIMATORS``."""
    largest_d: float
    """Clamp of ``|logprob - ref_logprob|``; infinite for none."""
    largest_value: float
    """Clamp of the estimate's absolute value; infinite for none."""
    scale: float
    """A factor of the estimate."""
    ratio_grad: bool
    """True: the weight has a gradient."""


def _terms(
    logprob: Tensor, ref: Tensor, estimator: str, largest_d: float, largest_value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The estimate, and its slopes in both log-probabilities."""
    whole = logprob - ref
    if estimator in ("binary_kl", "binary_tv"):
        a, b = logprob.exp(), ref.exp()
        apart = torch.where(whole.abs() < 1, b * torch.expm1(whole), a - b)
        if estimator == "binary_tv":
            value, on_logprob, on_ref = apart.abs(), apart.sign() * a, -apart.sign() * b
        else:
            # sum p (e^-x - 1 + x) over both outcomes; each term is at least 0, so nothing cancels.
            rest, ref_rest = -torch.expm1(logprob), -torch.expm1(ref)
            change = -apart / ref_rest
            y = torch.where(change.abs() < 0.5, torch.log1p(change), rest.log() - ref_rest.log())
            y = torch.where(ref_rest > 0, y, torch.inf)
            sampled = torch.where(a > 0, a * exp_minus_1_minus_x(-whole), b)
            value = sampled + torch.where(rest > 0, rest * exp_minus_1_minus_x(-y), ref_rest)
            on_logprob = torch.where((rest > 0) & (a > 0), a * (whole - y), 0)
            on_ref = torch.where(rest > 0, rest * b / ref_rest - a, 0)
        inside = value.abs() <= largest_value
        on_logprob, on_ref = torch.where(inside, on_logprob, 0), torch.where(inside, on_ref, 0)
        return value.clamp(-largest_value, largest_value), on_logprob, on_ref
    d = whole.clamp(-largest_d, largest_d)
    if estimator in ("k1", "k1_plus"):
        value, slope = d, torch.ones_like(d)
    elif estimator == "abs":
        value, slope = d.abs(), d.sign()
    elif estimator == "k2":
        value, slope = d * d / 2, d
    else:
        value, slope = exp_minus_1_minus_x(-d), -torch.expm1(-d)
    slope = torch.where((whole.abs() <= largest_d) & (value.abs() <= largest_value), slope, 0)
    if estimator in ("k1_plus", "k3_plus"):  # straight through: the gradient of k2
        slope = whole
    return value.clamp(-largest_value, largest_value), slope, -slope


def token_kl(a: TokenKlArgs) -> Tensor:
    value, _, _ = _terms(a.logprob, a.ref_logprob, a.estimator, a.largest_d, a.largest_value)
    if a.old_logprob is not None:
        value = value * (a.logprob - a.old_logprob).exp()
    out = a.scale * value
    if a.rewards is not None:
        out = a.rewards + out
    return out if a.mask is None else torch.where(a.mask, out, 0)


def token_kl_backward(grad: Tensor, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    value, on_logprob, on_ref = _terms(a.logprob, a.ref_logprob, a.estimator, a.largest_d, a.largest_value)
    if a.old_logprob is not None:
        ratio = (a.logprob - a.old_logprob).exp()
        on_logprob, on_ref = ratio * (on_logprob + a.ratio_grad * value), ratio * on_ref

    def gradient(slope: Tensor, wanted: bool) -> Tensor:
        g = a.scale * grad * slope
        return (g if a.mask is None else torch.where(a.mask, g, 0)) if wanted else g.new_empty(0)

    return gradient(on_logprob, to_logprob), gradient(on_ref, to_ref)
