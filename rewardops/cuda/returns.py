"""Returns by CUDA C++ kernels; the soft minimum's rewards, three reductions over a row, are Triton's."""

from __future__ import annotations

from functools import partial

from ..cpp import returns as cpp
from ..reference.returns import differences, prefix_scan
from .memory import CUDA

__all__ = [
    "differences", "extreme_returns", "extreme_returns_backward", "prefix_scan", "softmin_returns",
    "softmin_returns_backward", "td_scan", "td_scan_backward",
]  # fmt: skip

td_scan = partial(cpp.td_scan, via=CUDA)
td_scan_backward = partial(cpp.td_scan_backward, via=CUDA)
extreme_returns = partial(cpp.extreme_returns, via=CUDA)
extreme_returns_backward = partial(cpp.extreme_returns_backward, via=CUDA)
softmin_returns = partial(cpp.softmin_returns, via=CUDA)
softmin_returns_backward = partial(cpp.softmin_returns_backward, via=CUDA)
