"""Tokens relative to a scope (the batch, groups of rows, their classes), the specification.

Each op reduces the tokens of a scope to a few numbers, and maps the tokens by them.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.groups import group_sums, numbered
from ..core.kinds import Flags, IdRows, Offsets, RealRows, RealTokens
from ..core.rows import from_rows, to_rows

STATISTICS = 5  # columns of what `standardized` finds of a scope
Statistics = Annotated[Tensor, "float64", "S", "5"]
RealGrid = Annotated[Tensor, "real", "B", "T"]
FlagGrid = Annotated[Tensor, "bool", "B", "T"]


class StandardizedArgs(NamedTuple):
    """Arguments of ``standardized`` and its backward pass; floats are of one dtype, float32 or float64."""

    values: RealTokens
    """``[B, T]`` or ``[N]``."""
    weights: RealTokens | None
    """The shape of ``values``, above 0 where valid: weights of tokens in mean and variance; None: 1."""
    mask: Flags | None
    """bool, the shape of ``values``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    groups: IdRows | None
    """``[B]`` int64 labels, in any order: a scope is a group; None: the batch."""
    outcomes: RealRows | None
    """``[B]``: a scope is a class of a group, rows above the threshold or the others; None: the whole group."""
    threshold: float
    """Rows with an outcome above it are a class."""
    eps: float
    """Added to the variance, or to the standard deviation."""
    ddof: int
    """Taken from the number of tokens in the variance."""
    of_variance: bool
    """``eps`` is added to the variance."""
    rounded: bool
    """A variance that rounding of equal values explains is 0, and so are its results and gradients."""
    shifted: bool
    """False: the mean is added again."""


def scope_count(groups: Tensor | None, batch: int) -> int:
    """The rows of a table of scopes: one for the batch, else one for each row of tokens."""
    return 1 if groups is None else batch


def scopes_of(
    batch: int, like: Tensor, groups: Tensor | None, outcomes: Tensor | None, threshold: float
) -> Tensor:
    """``[B]`` int64: the number of each row's scope, from 0 to B - 1."""
    if groups is None:
        return torch.zeros(batch, dtype=torch.int64, device=like.device)
    number = numbered(groups)
    return number if outcomes is None else numbered(2 * number + (outcomes > threshold))


class _Tokens(NamedTuple):
    """Tokens as rows ``[B, T]``, 0 where masked, in float64."""

    x: Tensor
    weight: Tensor
    valid: Tensor
    scope: Tensor  # [B]

    def total(self, terms: Tensor) -> Tensor:
        """``[B]``: the sum of what is 0 where masked over each row's scope."""
        return group_sums(terms.sum(1), self.scope)


def _tokens(a: StandardizedArgs) -> _Tokens:
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    x = x.double()
    if a.outcomes is not None:  # the class of a row whose outcome is NaN is not known
        x = torch.where(valid & a.outcomes.isnan()[:, None], torch.nan, x)
    weight = valid.double()
    if a.weights is not None:
        weight = to_rows(a.weights, a.mask, a.cu_seqlens)[0].double()
    return _Tokens(x, weight, valid, scopes_of(x.shape[0], x, a.groups, a.outcomes, a.threshold))


def _statistics(t: _Tokens, a: StandardizedArgs) -> Tensor:
    """``[B, 5]``: the mean in two parts, the scale, its derivative over its square, 1 over the number of tokens."""
    count = t.total(t.weight)
    # Some token of the scope is subtracted first: large values keep their differences, equal ones give exactly 0.
    least = torch.where(t.valid, t.x, torch.inf).amin(1) if t.x.shape[1] else t.x.new_zeros(t.x.shape[0])
    origin = torch.full_like(least, torch.inf).scatter_reduce(0, t.scope, least, "amin")[t.scope]
    origin = torch.where(origin.isfinite(), origin, 0)
    above = torch.where(t.valid, t.x - origin[:, None], 0)
    some = count > 0
    mean = t.total(t.weight * above) / torch.where(some, count, 1)
    squares = t.total(t.weight * torch.where(t.valid, above - mean[:, None], 0).square())
    divisor = torch.where(count > a.ddof, count - a.ddof, torch.where(some, count, 1))
    var = squares / divisor
    if a.of_variance:
        flat = var + a.eps <= 0
        scale = torch.where(flat, 1, var + a.eps).rsqrt()
        slope = -scale / divisor
    else:
        flat = var <= 0
        std = torch.where(flat, 1, var).sqrt()
        scale = 1 / (std + a.eps)
        slope = -1 / (std * divisor)
    if a.rounded:
        flat = flat | (var <= (torch.finfo(a.values.dtype).eps * (origin + mean)).square())
    scale, slope = (torch.where(flat, 0, x) for x in (scale, slope))
    centre = (origin + mean).to(a.values.dtype).double()
    return torch.stack([centre, origin - centre + mean, scale, slope, 1 / torch.where(some, count, 1)], 1)


def standardized(a: StandardizedArgs) -> tuple[Tensor, Tensor]:
    """``(value - mean) / sqrt(var + eps)`` or ``/ (std + eps)`` in each scope; and what the backward pass reads."""
    t = _tokens(a)
    s = _statistics(t, a)
    centre, rest, scale, _, _ = s.t()[:, :, None]
    out = (t.x - centre - rest) * scale
    if not a.shifted:
        out = out + centre + rest
    out = torch.where(t.valid, out, 0).to(a.values.dtype)
    return from_rows(out, a.values.shape, a.cu_seqlens), _table(s, a.groups)


def _table(s: Tensor, groups: Tensor | None) -> Tensor:
    """The statistics of rows as the backward pass takes them: one row for the batch."""
    if groups is not None:
        return s
    return s[:1].contiguous() if len(s) else s.new_zeros(1, s.shape[1])


def standardized_backward(grad: Tensor, statistics: Tensor, a: StandardizedArgs) -> Tensor:
    t = _tokens(a)
    centre, rest, scale, slope, inv_count = statistics.expand(t.x.shape[0], -1).t()[:, :, None]
    z = torch.where(t.valid, (t.x - centre - rest) * scale, 0)
    up = to_rows(grad, a.mask, a.cu_seqlens)[0].double()
    through_mean = ((0 if a.shifted else 1) - scale) * inv_count * t.total(up)[:, None]
    through_scale = slope * t.total(up * z)[:, None]
    on_values = scale * up + t.weight * (through_mean + through_scale * z)
    on_values = torch.where(t.valid, on_values, 0).to(a.values.dtype)
    return from_rows(on_values, a.values.shape, a.cu_seqlens)


# ---- weights with mean 1 -----------------------------------------------------------------------------------

FORMS = ("linear", "inverse", "exponential")


class WeightsArgs(NamedTuple):
    """Arguments of ``scope_weights`` and its backward pass."""

    values: RealTokens
    """``[B, T]`` or ``[N]``, float32 or float64."""
    mask: Flags | None
    """bool, the shape of ``values``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    groups: IdRows | None
    """``[B]`` int64 labels, in any order: a scope is a group; None: the batch."""
    form: str
    """Raw weight of a token x, of ``FORMS``: x; ``1 / max(x, floor)``; ``exp(rate x)``."""
    rate: float
    floor: float


class _Raw(NamedTuple):
    """Raw weights, and what they are divided by."""

    weight: Tensor  # [B, T] float64, 0 where masked
    slope: Tensor  # their derivatives
    valid: Tensor
    mean: Tensor  # [B], over the scope
    count: Tensor  # type: ignore[assignment]
    top: Tensor  # the value of the largest weight, to which exponential ones are relative
    scope: Tensor


def _raw(a: WeightsArgs) -> _Raw:
    x, valid = to_rows(a.values, a.mask, a.cu_seqlens)
    x = torch.where(x.isfinite(), x.double(), torch.nan)
    scope = scopes_of(x.shape[0], x, a.groups, None, 0.0)
    top = x.new_zeros(x.shape[0])
    if a.form == "linear":
        weight, slope = x, torch.ones_like(x)
    elif a.form == "inverse":
        weight = 1 / torch.where(x < a.floor, a.floor, x)
        slope = torch.where(x <= a.floor, 0, -weight.square())
    else:
        score = torch.where(valid, a.rate * x, -torch.inf)
        # Relative to the scope's largest, so that nothing overflows, or vanishes beside a larger scope.
        of_rows = score.amax(1) if x.shape[1] else torch.full_like(top, -torch.inf)
        largest = torch.full_like(top, -torch.inf).scatter_reduce(0, scope, of_rows, "amax")[scope]
        top = torch.where(largest == -torch.inf, 0, largest / a.rate)
        weight = (a.rate * (x - top[:, None])).exp()
        slope = a.rate * weight
    weight, slope = (torch.where(valid, t, 0) for t in (weight, slope))
    count = group_sums(valid.sum(1), scope).clamp(min=1)
    return _Raw(weight, slope, valid, group_sums(weight.sum(1), scope) / count, count, top, scope)


def scope_weights(a: WeightsArgs) -> tuple[Tensor, Tensor]:
    """Raw weights over their mean in the scope, 1 where that is 0; and what the backward pass reads, ``[S, 5]``."""
    raw = _raw(a)
    none = raw.mean <= 0
    inverse = torch.where(none, 0, 1 / torch.where(none, 1, raw.mean))
    out = raw.weight * inverse[:, None] + none.double()[:, None]
    out = torch.where(raw.valid, out, 0).to(a.values.dtype)
    table = torch.stack([inverse, none.double(), raw.top, torch.full_like(inverse, a.rate), 1 / raw.count], 1)
    return from_rows(out, a.values.shape, a.cu_seqlens), _table(table, a.groups)


def scope_weights_backward(grad: Tensor, statistics: Tensor, a: WeightsArgs) -> Tensor:
    raw = _raw(a)
    inverse = statistics[:, 0].expand(raw.mean.shape)
    up = to_rows(grad, a.mask, a.cu_seqlens)[0].double()
    through = group_sums((up * raw.weight).sum(1), raw.scope) * inverse / raw.count
    on_values = raw.slope * inverse[:, None] * (up - through[:, None])
    on_values = torch.where(raw.valid, on_values, 0).to(a.values.dtype)
    return from_rows(on_values, a.values.shape, a.cu_seqlens)


# ---- products of differences from the mean -----------------------------------------------------------------


def covariance_terms(
    values: Tensor, others: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """``(value - mean) * (other - mean)`` of each token, with the means of the batch; 0 where masked."""
    rows = [to_rows(t, mask, cu_seqlens) for t in (values, others)]
    valid = rows[0][1]
    a, b = (t.double() - t.double().sum() / valid.sum().clamp(min=1) for t, _ in rows)
    return from_rows(torch.where(valid, a * b, 0).to(values.dtype), values.shape, cu_seqlens)


# ---- bonuses, and weights by a range -----------------------------------------------------------------------


class BonusArgs(NamedTuple):
    """Arguments of ``capped_bonus`` and its backward pass."""

    values: RealGrid
    """``[B, T]``"""
    others: RealGrid
    """``[B, T]``, what is added, times alpha."""
    mask: FlagGrid | None
    """bool, ``[B, T]``; None: every token counts."""
    alpha: float
    kappa: float
    """No more is added than ``abs(value) / kappa``."""


def capped_bonus(a: BonusArgs) -> Tensor:
    """``x + min(alpha y, abs(x) / kappa)``; NaN where y is not finite, 0 where masked."""
    x, y = a.values.double(), a.others.double()
    bonus = torch.where(y.isfinite(), torch.minimum(a.alpha * y, x.abs() / a.kappa), torch.nan)
    out = x + bonus
    return (out if a.mask is None else torch.where(a.mask, out, 0)).to(a.values.dtype)


def capped_bonus_backward(grad: Tensor, a: BonusArgs) -> Tensor:
    x, y = a.values.double(), a.others.double()
    bonus, most = a.alpha * y, x.abs() / a.kappa
    share = torch.where(bonus < most, 0, torch.where(bonus == most, 0.5, 1))
    on_values = grad * (1 + torch.where(y.isfinite(), share * x.sign() / a.kappa, torch.nan))
    return (on_values if a.mask is None else torch.where(a.mask, on_values, 0)).to(a.values.dtype)


def steered(values: Tensor, mask: Tensor | None, form: str, low: float, high: float) -> Tensor:
    """Weights by the range of the batch: from ``high`` at its smallest value to ``low``; or exponential, to 1."""
    x = values.double()
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if not x.numel():
        return values.clone()
    top = torch.where(valid, x, -torch.inf).amax()
    if form == "exponential":
        out = torch.exp(math.log(low) / top.clamp(min=0.02) * x).clamp(min=low).clamp(max=1)
    else:
        least = torch.where(valid, x, torch.inf).amin()
        span = top - least
        out = high - (x - least) * ((high - low) / torch.where(span == 0, 1, span))
        out = torch.where(span == 0, (low + high) / 2, out)
    return torch.where(valid, out, 0).to(values.dtype)
