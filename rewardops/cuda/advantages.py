"""Group-relative advantages by CUDA C++ kernels."""

from __future__ import annotations

from functools import partial

from ..cpp import advantages as cpp
from .memory import CUDA

__all__ = ["group_advantages", "group_advantages_backward"]

group_advantages = partial(cpp.group_advantages, launcher=CUDA)
group_advantages_backward = partial(cpp.group_advantages_backward, launcher=CUDA)
