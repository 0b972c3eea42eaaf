"""Error budgets: how far from float64 a result may be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """How far a result is from float64.

    ``ulps``: the worst error, in units in the last place of its element (an element below a thousandth of the
    largest counts as that large: what cancelled has no digits to speak of). ``of_budget``: the worst error, as a
    share of what its element is allowed; the result passes up to 1. Both are infinite where a value that is not
    finite is wrong. ``fault``: what is wrong, in words; None where the result passes.
    """

    ulps: float
    of_budget: float
    fault: str | None

    @property
    def passes(self) -> bool:
        return self.fault is None


EXACT = Error(0.0, 0.0, None)


def _wrong(fault: str) -> Error:
    return Error(float("inf"), float("inf"), fault)


def measure_error(
    ours: Tensor,
    exact: Tensor,
    eager: Tensor | None = None,
    *,
    ulps: float = 8.0,
    times: float = 1.0,
    scale: float = 0.0,
    name: str = "result",
) -> Error:
    """Hold a result to its budget: see :func:`assert_within_budget`, which raises what this returns."""
    ours, exact = ours.detach().cpu(), exact.detach().cpu()
    if ours.shape != exact.shape:
        return _wrong(f"{name}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}")
    if not ours.dtype.is_floating_point:
        whole = ours.to(torch.int64)
        same = whole == exact.to(torch.int64)
        if eager is not None:
            same |= whole == eager.cpu().to(torch.int64)  # a tie in one precision is none in another
        return EXACT if bool(same.all()) else _wrong(f"{name}: integers differ")
    if ours.numel() == 0:
        return EXACT
    value, exact = ours.to(torch.float64), exact.to(torch.float64)
    info = torch.finfo(ours.dtype)
    # What the dtype cannot hold is infinite in it.
    exact = torch.where(exact.abs() > info.max, exact.sign() * torch.inf, exact)
    finite = exact.isfinite()
    odd = ~finite & ~((value == exact) | (value.isnan() & exact.isnan()))
    if odd.any():
        found, want, where = value[odd][0].item(), exact[odd][0].item(), odd.nonzero()[0].tolist()
        return _wrong(f"{name}: {found} where float64 has {want}, at {where}")
    allowed = torch.zeros((), dtype=torch.float64)
    if eager is not None:
        off = torch.where(finite, eager.detach().cpu().to(torch.float64) - exact, 0).abs()
        allowed = torch.where(off.isfinite(), off, 0).max()
    unit = info.eps * exact.abs() + info.tiny
    # The yardstick's own digits: where ours has as many, allow both the rounding of a long sum.
    largest = torch.where(finite, exact, 0).abs().max().clamp(min=scale)
    budget = times * allowed + ulps * unit + (1e-12 if ours.dtype is torch.float64 else 1e-14) * largest
    error = torch.where(finite, (value - exact).abs(), 0)
    error = torch.where(finite & ~value.isfinite(), torch.inf, error)
    share = torch.where(finite, error / budget, 0)
    worst = share.argmax()
    fault = None
    if not share.flatten()[worst] <= 1:
        fault = (
            f"{name}: {value.flatten()[worst].item():.9g} where float64 has {exact.flatten()[worst].item():.9g}: "
            f"off by {error.flatten()[worst].item():.3g}, the budget is {budget.flatten()[worst].item():.3g} "
            f"(eager's worst error is {allowed.item():.3g})"
        )
    units = (
        torch.where(finite, error / (info.eps * exact.abs().clamp(min=largest / 1000) + info.tiny), 0)
        .max()
        .item()
    )
    return Error(units, share.flatten()[worst].item(), fault)


def assert_within_budget(
    ours: Tensor,
    exact: Tensor,
    eager: Tensor | None = None,
    *,
    ulps: float = 8.0,
    times: float = 1.0,
    scale: float = 0.0,
    name: str = "result",
) -> None:
    """Assert that ``ours`` is no further from float64 than eager code is, plus a few units in the last place.

    The budget of an element is ``max |eager - exact|`` over the tensor (elements on which eager happens to
    be exact are no standard) plus ``ulps`` units in the last place of its own value, in the dtype of
    ``ours``. Where the float64 result is not finite, ours must be the same infinity or NaN; whole numbers and
    flags are those of float64 or of eager. On top comes what float64 itself rounds: 1e-14 of the largest value
    (1e-12 where ours is float64 too).

    Args:
        ours: what is tested. exact: the float64 result, the same shape. eager: the plain computation on the
            same inputs in the precision of ``ours``; None for no allowance.
        ulps: units in the last place. times: of eager's worst error.
        scale: the largest value that the result was made of, where all of it may have cancelled.
    """
    error = measure_error(ours, exact, eager, ulps=ulps, times=times, scale=scale, name=name)
    if error.fault is not None:
        raise AssertionError(error.fault)
