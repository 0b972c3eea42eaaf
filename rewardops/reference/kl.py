"""Per-token KL estimators on log-probabilities, the specification (see :func:`rewardops.token_kl`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, RealTokens

# Near 0, exp(x) - 1 - x loses all its digits to cancellation; the Taylor series for |x| < 1 does not (20 terms:
# the first omitted one is under 1e-19 of the value).
_SERIES = [1.0 / math.factorial(k) for k in range(2, 22)]


def exp_minus_1_minus_x(x: Tensor) -> Tensor:
    small = x.abs() < 1
    near = torch.where(small, x, 0)
    series = torch.zeros_like(near)
    for coefficient in reversed(_SERIES):
        series = series * near + coefficient
    large = torch.where(x == torch.inf, x, x.exp() - 1 - x)
    return torch.where(small, series * near * near, large)


# Where d is below this, exp(-d) - 1 + d is exp(-d) in every digit of float64.
FAR = -64.0


ESTIMATORS = ("k1", "abs", "k2", "k3", "k1_plus", "k3_plus", "binary_kl", "binary_tv")


class TokenKlArgs(NamedTuple):
    """Arguments of ``token_kl`` and its backward pass; tensors of one shape, float32 or float64."""

    logprob: RealTokens
    """Logprob of the policy, in nats."""
    ref_logprob: RealTokens
    """Logprob of the reference, in nats."""
    mask: Flags | None
    """bool; None: every token counts."""
    old_logprob: RealTokens | None
    """Logprob of the sampling policy, NaN where unknown; weights the estimate by ``exp(logprob - old_logprob)``.
    None: no weight."""
    rewards: RealTokens | None
    """Rewards to which the estimate is added; None for none, and in the backward pass."""
    estimator: str
    """One of ``ESTIMATORS``."""
    largest_d: float
    """Clamp of ``|logprob - ref_logprob|`` and of ``|logprob - old_logprob|``; infinite for none."""
    largest_value: float
    """Clamp of the estimate's absolute value; infinite for none."""
    scale: float
    """A factor of the estimate."""
    ratio_grad: bool
    """True: the weight has a gradient."""
    ratio_cap: float
    """The largest weight; infinite for none."""


class Terms(NamedTuple):
    """The estimate, and its slopes in both log-probabilities."""

    value: Tensor
    on_logprob: Tensor
    on_ref: Tensor


class Ratio(NamedTuple):
    """The weight of the estimate."""

    log: Tensor
    """Its logarithm within the clamp, before the cap."""
    value: Tensor
    capped: Tensor
    """bool: the cap is below it."""
    free: Tensor
    """bool: neither unknown nor clamped nor capped, so it may have a gradient."""


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b``; 0 where they are equal, infinities included."""
    return torch.where(a == b, 0, a - b)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign())


def _terms(a: TokenKlArgs) -> Terms:
    """The estimate without its weight: limits where a probability is 0, NaN where a log-probability is NaN."""
    if a.estimator in ("binary_kl", "binary_tv"):
        return _binary_terms(a)
    whole = difference(a.logprob, a.ref_logprob)
    d = whole.clamp(-a.largest_d, a.largest_d)
    if a.estimator in ("k1", "k1_plus"):
        value, slope = d, torch.where(d.isnan(), d, 1)
    elif a.estimator == "abs":
        value, slope = d.abs(), _sign(d)
    elif a.estimator == "k2":
        value, slope = d * d / 2, d
    else:
        value, slope = exp_minus_1_minus_x(-d), -torch.expm1(-d)
    if a.estimator in ("k1_plus", "k3_plus"):  # straight through: the gradient of k2
        slope = d
    outside = (whole.abs() > a.largest_d) | (value.abs() > a.largest_value)
    slope = torch.where(outside, 0, slope)
    return Terms(value.clamp(-a.largest_value, a.largest_value), slope, -slope)


def _binary_terms(args: TokenKlArgs) -> Terms:
    """The divergence of the sampled token against all others."""
    d = difference(args.logprob, args.ref_logprob)
    a, b = args.logprob.exp(), args.ref_logprob.exp()
    apart = torch.where(d.abs() < 1, b * torch.expm1(d), a - b)
    if args.estimator == "binary_tv":
        value, on_logprob, on_ref = apart.abs(), _sign(apart) * a, -_sign(apart) * b
    else:
        # sum p (e^-x - 1 + x) over both outcomes; each term is at least 0, so nothing cancels. Of an outcome of
        # probability 0 under the policy the reference's probability is left.
        rest, ref_rest = -torch.expm1(args.logprob), -torch.expm1(args.ref_logprob)
        change = -apart / ref_rest
        y = torch.where(change.abs() < 0.5, torch.log1p(change), rest.log() - ref_rest.log())
        y = torch.where(ref_rest > 0, y, torch.inf)
        sampled = torch.where((a > 0) & (d >= FAR), a * exp_minus_1_minus_x(-d), b)
        sampled = torch.where(d == torch.inf, d, sampled)
        others = torch.where(rest > 0, rest * exp_minus_1_minus_x(-y), ref_rest.clamp(min=0))
        value = sampled + others
        on_logprob = torch.where((rest > 0) & (a > 0), a * (d - y), 0)
        on_logprob = torch.where(d == torch.inf, d, on_logprob)
        on_ref = torch.where(rest > 0, torch.inf, 0).to(d.dtype)
        on_ref = torch.where(ref_rest > 0, rest.clamp(min=0) * b / ref_rest - a, on_ref)
    outside, unknown = value.abs() > args.largest_value, d.isnan()
    value = value.clamp(-args.largest_value, args.largest_value)
    on_logprob, on_ref = torch.where(outside, 0, on_logprob), torch.where(outside, 0, on_ref)
    return Terms(*(torch.where(unknown, d, x) for x in (value, on_logprob, on_ref)))


def _ratio(a: TokenKlArgs, old_logprob: Tensor) -> Ratio:
    unknown = old_logprob.isnan()
    whole = torch.where(unknown, 0, difference(a.logprob, old_logprob))
    log = whole.clamp(-a.largest_d, a.largest_d)
    ratio = log.exp()
    capped = ratio > a.ratio_cap
    return Ratio(
        log,
        torch.where(capped, a.ratio_cap, ratio),
        capped,
        ~(unknown | capped) & (whole.abs() <= a.largest_d),
    )


def _weighted(a: TokenKlArgs, old_logprob: Tensor) -> Terms:
    """The estimate times its ratio. Of 0 times infinity the limit is taken: 0 at a token that the policy gives
    probability 0 (but for k3, whose exponential outweighs the ratio's), else infinity."""
    terms, ratio = _terms(a), _ratio(a, old_logprob)
    inf = torch.inf

    def weigh(x: Tensor) -> Tensor:
        product = torch.where(x == 0, x, ratio.value * x)
        return torch.where(x.isinf(), torch.where(ratio.log == -inf, 0, x), product)

    def both(slope: Tensor, value: Tensor) -> Tensor:
        """The slope, and the value where the ratio has a gradient. Of opposite infinities the larger one stays: the
        value, but for ``binary_kl`` against a certain token that is likelier than all others."""
        larger = torch.where(a.logprob > -math.log(2), slope, value) if a.estimator == "binary_kl" else value
        total = torch.where((slope == -inf) & (value == inf), larger, slope + value)
        return torch.where(ratio.free, total, slope) if a.ratio_grad else slope

    weighted = Terms(weigh(terms.value), weigh(both(terms.on_logprob, terms.value)), weigh(terms.on_ref))
    if a.estimator not in ("k3", "k3_plus"):
        return weighted
    # Far below the reference k3 is exp(-d), which may overflow where the ratio vanishes: one exponential of both.
    whole = difference(a.logprob, a.ref_logprob)
    inside, d = whole >= -a.largest_d, whole.clamp(-a.largest_d, a.largest_d)
    far = (d < FAR) & ((terms.value < a.largest_value) | (terms.value == inf)) & ~ratio.capped
    exponent = torch.where(ratio.free & inside, difference(a.ref_logprob, old_logprob), ratio.log - d)
    value = exponent.exp()
    drift = weigh(d)
    if a.estimator == "k3":
        slope = torch.where(inside, -value, 0)
        live = torch.where(inside, drift, value)  # of the slope and the value only the ratio times d is left
        on_logprob = torch.where(ratio.free, live, slope) if a.ratio_grad else slope
    else:
        slope = torch.where(inside, drift, 0)
        on_logprob = both(slope, value)
    return Terms(
        *(torch.where(far, x, y) for x, y in zip((value, on_logprob, -slope), weighted, strict=True))
    )


def _times(factor: Tensor | float, x: Tensor) -> Tensor:
    """The product; 0 where the factor is 0 and the other infinite."""
    return torch.where(x.isinf() & (factor == 0), 0, factor * x)


def token_kl(a: TokenKlArgs) -> Tensor:
    value = (_terms(a) if a.old_logprob is None else _weighted(a, a.old_logprob)).value
    out = _times(a.scale, value)
    if a.rewards is not None:
        out = a.rewards + out
    return out if a.mask is None else torch.where(a.mask, out, 0)


def token_kl_backward(grad: Tensor, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    terms = _terms(a) if a.old_logprob is None else _weighted(a, a.old_logprob)
    up = a.scale * grad

    def gradient(slope: Tensor, wanted: bool) -> Tensor:
        g = _times(up, slope)
        return (g if a.mask is None else torch.where(a.mask, g, 0)) if wanted else g.new_empty(0)

    return gradient(terms.on_logprob, to_logprob), gradient(terms.on_ref, to_ref)
