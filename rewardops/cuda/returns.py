"""Returns by CUDA C++ kernels; the soft minimum's rewards, three reductions over a row, are Triton's."""

from __future__ import annotations

from functools import partial

from ..cpp import returns as cpp
from .memory import CUDA

__all__ = [
    "extreme_returns", "extreme_returns_backward", "softmin_returns", "softmin_returns_backward",
]  # fmt: skip

extreme_returns = partial(cpp.extreme_returns, launcher=CUDA)
extreme_returns_backward = partial(cpp.extreme_returns_backward, launcher=CUDA)
softmin_returns = partial(cpp.softmin_returns, launcher=CUDA)
softmin_returns_backward = partial(cpp.softmin_returns_backward, launcher=CUDA)
