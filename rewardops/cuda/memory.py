"""How the callers of ``rewardops.cpp`` reach the CUDA C++ kernels: on a stream, without reading anything back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpp.memory import Via
from ..dispatch import cuda_module


class Stream(Via):
    """The current stream of the tensors' device."""

    def module(self) -> Any:
        return cuda_module()

    def longest(self, cu_seqlens: Tensor, total: int) -> int:
        return total

    def fresh(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def execution(self, like: Tensor) -> tuple[int, ...]:
        if like.device.type != "cuda":
            return (0,)
        return (torch._C._cuda_getCurrentRawStream(like.device.index),)


CUDA = Stream()
