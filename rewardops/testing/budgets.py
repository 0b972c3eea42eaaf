"""Error budgets: how far from float64 a result may be."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    ours: Tensor, exact: Tensor, eager: Tensor | None = None, *, ulps: float = 8.0, name: str = "result"
) -> None:
    """Assert that ``ours`` is no further from float64 than eager code is, plus a few units in the last place.

    The budget of an element is ``max |eager - exact|`` over the tensor (elements on which eager happens to
    be exact are no standard) plus ``ulps`` units in the last place of its own value, in the dtype of
    ``ours``. Where the float64 result is not finite, ours must be the same infinity or NaN. A float64
    ``ours`` is given 1e-12 of the largest value on top.

    Args:
        ours: what is tested. exact: the float64 result, the same shape. eager: the plain computation on the
            same inputs in the precision of ``ours``; None for no allowance.
    """
    ours, exact = ours.detach().cpu(), exact.detach().cpu()
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
    if not ours.dtype.is_floating_point:
        assert torch.equal(ours.to(torch.int64), exact.to(torch.int64)), f"{name}: integers differ"
        return
    if ours.numel() == 0:
        return
    value, exact = ours.to(torch.float64), exact.to(torch.float64)
    finite = exact.isfinite()
    odd = ~finite & ~((value == exact) | (value.isnan() & exact.isnan()))
    assert not odd.any(), (
        f"{name}: {value[odd][0].item()} where float64 has {exact[odd][0].item()}, "
        f"at {odd.nonzero()[0].tolist()}"
    )
    allowed = torch.zeros((), dtype=torch.float64)
    if eager is not None:
        off = torch.where(finite, eager.detach().cpu().to(torch.float64) - exact, 0).abs()
        allowed = torch.where(off.isfinite(), off, 0).max()
    info = torch.finfo(ours.dtype)
    budget = allowed + ulps * (info.eps * exact.abs() + info.tiny)
    if ours.dtype is torch.float64:
        # The yardstick has no more digits than what it measures: allow both the rounding of a long sum.
        budget = budget + 1e-12 * torch.where(finite, exact, 0).abs().max()
    error = torch.where(finite, (value - exact).abs(), 0)
    error = torch.where(finite & ~value.isfinite(), torch.inf, error)
    worst = (error - torch.where(finite, budget, 0)).argmax()
    assert bool((error <= torch.where(finite, budget, 0)).all()), (
        f"{name}: {value.flatten()[worst].item():.9g} where float64 has {exact.flatten()[worst].item():.9g}: "
        f"off by {error.flatten()[worst].item():.3g}, the budget is {budget.flatten()[worst].item():.3g} "
        f"(eager's worst error is {allowed.item():.3g})"
    )
