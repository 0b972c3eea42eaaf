"""Group-relative advantages by CUDA C++ kernels."""

from __future__ import annotations

from ..cpp import advantages as cpp
from .memory import on_stream

__getattr__ = on_stream(cpp)
