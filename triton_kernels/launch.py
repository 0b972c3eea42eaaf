"""Launch policy: number of programs, compiler options, and scalar arguments without loss of digits."""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# In the interpreter, small blocks keep small inputs fast, and divide them into several blocks.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Compiler options that decide bits, passed at every launch: their defaults differ between versions of Triton.
BITS = {"enable_fp_fusion": True}


class Constant(tl.constexpr):
    """A number that kernels of a module read.

    At each launch Triton compares every one with its copy, as it may have been changed. A comparison of
    ``tl.constexpr`` makes new objects and takes a microsecond, and a kernel reads tens of them.
    """

    def __deepcopy__(self, memo: dict) -> Constant:
        return self

    def __ne__(self, other: object):
        return self is not other and super().__ne__(other)

    __eq__ = tl.constexpr.__eq__
    __hash__ = tl.constexpr.__hash__


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
    """The number of parts into which each of ``programs`` rows of blocks is cut to fill the device."""
    wanted = cdiv(per_multiprocessor * multiprocessors(tensor), max(programs, 1))
    return max(1, min(blocks, wanted))


def pair(value: float) -> tuple[float, float]:
    """A scalar as two float32 parts: kernels receive floats as float32, which is too little for float64 inputs."""
    high = float(np.float32(value))
    return high, 0.0 if math.isinf(high) else float(np.float32(value - high))


@triton.jit
def unpair(high, low, DTYPE: tl.constexpr):
    """The scalar from the two parts that ``pair`` returned; an infinity has no low part."""
    return tl.full([], high, DTYPE) + tl.full([], low, DTYPE)


def bits_of(value: float) -> int:
    """A scalar's bits, for kernels that need all digits of a float64 (see ``from_bits``)."""
    return int(np.float64(value).view(np.int64))


@triton.jit
def from_bits(bits):
    """The float64 scalar from the bits that ``bits_of`` returned."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or if it is None another one as a placeholder, which kernels do not read."""
    return other if tensor is None else tensor
