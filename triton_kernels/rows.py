"""Rows of tokens in the kernels: padded rows with a stride, or packed rows with offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The shape of per-token tensors, and the offsets of packed rows."""

    batch: int
    width: int  # tokens of a padded row; for packed ones an upper bound
    total: int  # tokens of all rows, padding included
    packed: bool
    cu: Tensor  # offsets of packed rows; any tensor for padded rows, whose kernels do not read it

    @staticmethod
    def of(shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None, other: Tensor) -> Rows:
        if cu_seqlens is None:
            return Rows(shape[0], shape[1], shape[0] * shape[1], False, other)
        return Rows(cu_seqlens.shape[0] - 1, shape[0], shape[0], True, cu_seqlens.contiguous())


def dense(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along the row, copied if necessary; padded rows may have any stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def stride(tensor: Tensor | None) -> int:
    """Stride between padded rows; 0 for packed ones, which have offsets."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as 0 and 1 in bytes, with unit stride along the row."""
    return None if mask is None else dense(mask).view(torch.uint8)


def output(like: Tensor, shape: torch.Size | tuple[int, ...], packed: bool, dtype=None) -> Tensor:
    """An uninitialised tensor; zeros for packed rows, as their offsets may leave gaps."""
    return (like.new_zeros if packed else like.new_empty)(shape, dtype=dtype or like.dtype)


@triton.jit
def row_bounds(cu, row, width, total, PACKED: tl.constexpr):
    """Offset and length of a row, clamped: wrong offsets cannot cause an access out of bounds."""
    if PACKED:
        begin = tl.load(cu + row).to(tl.int64)
        end = tl.load(cu + row + 1).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), total)
        end = tl.minimum(end, total)
        length = tl.maximum(end - begin, 0)
    else:
        begin = tl.zeros([], tl.int64)
        length = begin + width
    return begin, length


@triton.jit
def load_valid(mask, offset, inside, HAS_MASK: tl.constexpr):
    """Flags of the tokens at these offsets: true if inside the row and valid."""
    valid = inside
    if HAS_MASK:
        valid = inside & (tl.load(mask + offset, mask=inside, other=0) != 0)
    return valid


@triton.jit
def to_boundary(row):
    """Number of elements from a pointer to the next address that is a multiple of 16 bytes."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return ((-row.to(tl.int64)) & 15).to(tl.int32) // SIZE
