"""Error budgets: the error allowed against float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """The error of a result against float64.

    ``ulps`` and ``of_budget`` are infinite if a non-finite value is wrong. A result of which nothing tells
    something passes, as an empty, masked or all-NaN one must; :func:`check_op` and ``verify`` ask for some.

    Attributes:
        ulps: the worst error, in units in the last place of its element (an element below a thousandth of the
            largest counts as that large: after cancellation it has few correct digits).
        of_budget: the worst ratio of an element's error to its budget; the result passes up to 1.
        fault: the message of a failure; None if the result passes.
        compared: how many of the numbers compared tell something, namely integers, and floats that are finite
            and not 0 in float64.
    """

    ulps: float
    of_budget: float
    fault: str | None
    compared: int = 0

    @property
    def passes(self) -> bool:
        """True if there is no fault."""
        return self.fault is None


EXACT = Error(0.0, 0.0, None)


def _wrong(fault: str) -> Error:
    return Error(float("inf"), float("inf"), fault)


def _same_integers(a: Tensor, b: Tensor) -> Tensor:
    """Equality of integers or flags with integers, or with floats, of which a fraction equals no integer."""
    if b.is_floating_point():
        return a.to(torch.float64) == b.to(torch.float64)
    return a.to(torch.int64) == b.to(torch.int64)


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
    """Measure a result against its budget; :func:`assert_within_budget` raises the fault that this returns.

    Args:
        ours: the result under test, any shape, dtype and device.
        exact: the float64 result, the same shape.
        eager: the plain computation on the same inputs in the precision of ``ours``; None for no allowance.
        ulps: the budget's units in the last place.
        times: the budget's multiples of eager's worst error.
        scale: the largest value that entered the result, if the whole result may have cancelled.
        name: of the result in the message of a fault.

    Returns:
        :class:`Error`, numbers without gradients. A shape that does not match is a fault.

    Raises:
        AttributeError: a result that is no tensor.

    Example:
        >>> from rewardops.testing import measure_error
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> measure_error(exact.float(), exact)
        Error(ulps=0.0, of_budget=0.0, fault=None, compared=2)
        >>> measure_error(exact.float() * 1.001, exact).passes
        False
    """
    ours, exact = ours.detach().cpu(), exact.detach().cpu()
    if ours.shape != exact.shape:
        return _wrong(f"{name}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}")
    if ours.is_complex() or exact.is_complex():
        return _wrong(f"{name}: {ours.dtype}, which has no budget")
    if not ours.dtype.is_floating_point:
        same = _same_integers(ours, exact)
        if eager is not None:
            same |= _same_integers(ours, eager.detach().cpu())  # ties differ between precisions
        return (
            EXACT._replace(compared=ours.numel()) if bool(same.all()) else _wrong(f"{name}: integers differ")
        )
    if ours.numel() == 0:
        return EXACT
    value, exact = ours.to(torch.float64), exact.to(torch.float64)
    info = torch.finfo(ours.dtype)
    # Values beyond the range of the dtype are infinite in it.
    exact = torch.where(exact.abs() > info.max, exact.sign() * torch.inf, exact)
    finite = exact.isfinite()
    odd = ~finite & ~((value == exact) | (value.isnan() & exact.isnan()))
    if odd.any():
        got, want, where = value[odd][0].item(), exact[odd][0].item(), odd.nonzero()[0].tolist()
        return _wrong(f"{name}: {got} where float64 has {want}, at {where}")
    allowed = torch.zeros((), dtype=torch.float64, device="cpu")
    if eager is not None:
        off = torch.where(finite, eager.detach().cpu().to(torch.float64) - exact, 0).abs()
        allowed = torch.where(off.isfinite(), off, 0).max()
    unit = info.eps * exact.abs() + info.tiny
    # float64 rounds too: allow for the rounding of a long sum, in both results if ours is float64.
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
    return Error(units, share.flatten()[worst].item(), fault, int((finite & (exact != 0)).sum()))


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
    """Assert that a result is no further from float64 than eager code is, plus a few units in the last place.

    The budget of an element is ``max |eager - exact|`` over the tensor (not per element: eager is exact on
    some by accident) plus ``ulps`` units in the last place of its own value, in the dtype of ``ours``. Where
    the float64 result is not finite, ours must be the same infinity or NaN; integers and flags must equal
    those of float64 or of eager. The rounding of float64 itself is added: 1e-14 of the largest value (1e-12
    where ours is float64 too).

    Args:
        ours: the result under test, any shape, dtype and device.
        exact: the float64 result, the same shape.
        eager: the plain computation on the same inputs in the precision of ``ours``; None for no allowance.
        ulps: units in the last place.
        times: multiples of eager's worst error.
        scale: the largest value that entered the result, if the whole result may have cancelled.
        name: of the result in the message.

    Raises:
        AssertionError: a result outside its budget, of another shape, or of a complex dtype.

    Example:
        >>> from rewardops.testing import assert_within_budget
        >>> x = torch.tensor([0.1, 0.2, 0.3])
        >>> assert_within_budget(x.exp(), x.double().exp())
        >>> assert_within_budget(x.exp() + 1, x.double().exp())
        Traceback (most recent call last):
        AssertionError: result: ... where float64 has 1.10517092: off by 1, the budget is ...
    """
    error = measure_error(ours, exact, eager, ulps=ulps, times=times, scale=scale, name=name)
    if error.fault is not None:
        raise AssertionError(error.fault)
