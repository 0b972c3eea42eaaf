"""The error of a result against the same computation in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import as_tuple

BLOCK = 2**24  # elements per comparison: float64 copies of whole results may not fit


def _differences(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest difference (infinite if exactly one is NaN), and the largest finite value."""
    difference = largest = 0.0
    for a, b in zip(got.flatten().split(BLOCK), want.flatten().split(BLOCK), strict=True):
        a, b = a.detach().double(), b.detach().to(a.device, torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())  # the difference of equal infinities is NaN
        off = torch.where(same, 0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        difference = max(difference, float(off.max()))
        largest = max(largest, float(torch.where(b.isfinite(), b, 0).abs().max()))
    return difference, largest


def largest_error(got: Any, want: Any) -> dict[str, float]:
    """The largest error of any output, absolute and relative to the largest value of that output."""
    errors = {"absolute": 0.0, "relative": 0.0}
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        if not a.numel():
            continue
        difference, largest = _differences(a, b)
        errors["absolute"] = max(errors["absolute"], difference)
        errors["relative"] = max(errors["relative"], difference / largest if largest else difference)
    return errors
