"""Returns by CUDA C++ kernels; the soft minimum's rewards, three reductions over a row, are Triton's."""

from __future__ import annotations

from ..cpp import returns as cpp
from .memory import on_stream

__getattr__ = on_stream(cpp)
