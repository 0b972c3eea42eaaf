"""Discounted sums and temporal differences by CUDA C++ kernels."""

from __future__ import annotations

from ..cpp import td as cpp
from ..reference.td import of_scan
from .memory import on_stream

__getattr__ = on_stream(cpp)
prefix_scan, differences = of_scan(__getattr__("td_scan_backward"))
