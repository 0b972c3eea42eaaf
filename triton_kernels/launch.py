"""Launch policy: how many programs a device wants, and scalars that keep their digits on the way."""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import torch
from torch import Tensor

# Where kernels are interpreted, small blocks keep small inputs fast, and give them several blocks.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Compiler options that decide bits, passed at every launch: their defaults differ between versions of Triton.
BITS = {"enable_fp_fusion": True}


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 4
    return _multiprocessors(tensor.device.index or 0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def splits(tensor: Tensor, programs: int, blocks: int, per_multiprocessor: int = 4) -> int:
    """Into how many parts of its blocks each of ``programs`` rows is cut, to fill the device."""
    wanted = cdiv(per_multiprocessor * multiprocessors(tensor), max(programs, 1))
    return max(1, min(blocks, wanted))


def pair(value: float) -> tuple[float, float]:
    """A scalar as two float32 parts: kernels receive floats as float32, and float64 inputs need more."""
    high = float(np.float32(value))
    return high, 0.0 if math.isinf(high) else float(np.float32(value - high))


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at where an argument is not given (the kernel does not read it then)."""
    return other if tensor is None else tensor
