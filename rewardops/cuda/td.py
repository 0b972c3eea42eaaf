"""Discounted sums and temporal differences by CUDA C++ kernels."""

from __future__ import annotations

from functools import partial

from ..cpp import td as cpp
from ..reference.td import of_scan
from .memory import CUDA

__all__ = ["differences", "prefix_scan", "td_scan", "td_scan_backward"]

td_scan = partial(cpp.td_scan, launcher=CUDA)
td_scan_backward = partial(cpp.td_scan_backward, launcher=CUDA)
prefix_scan, differences = of_scan(td_scan_backward)
