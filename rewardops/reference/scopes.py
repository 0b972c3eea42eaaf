"""Tokens relative to a scope (the batch, groups of rows, their classes), the specification.

Each op reduces the tokens of a scope to a few numbers, and maps the tokens by them.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.groups import group_sums, numbered
from ..core.kinds import Flags, IdRows, Offsets, RealRows, RealTokens
from ..core.rows import from_rows, to_rows

STATISTICS = 5  # columns of what `standardized` finds of a scope
Statistics = Annotated[Tensor, "float64", "S", "5"]


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
    return from_rows(out, a.values.shape, a.cu_seqlens), _table(s, a)


def _table(s: Tensor, a: StandardizedArgs) -> Tensor:
    """The statistics of rows as the backward pass takes them: one row for the batch."""
    if a.groups is not None:
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
