"""Tensors as the compiled module takes them: addresses, row strides and the shape of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import compiled_module

NONE = (0, 0)
Strided = tuple[int, int]


def function(name: str, like: Tensor, suffix: str = "") -> Any:
    """The compiled function for the precision of ``like``."""
    precision = "f64" if like.dtype is torch.float64 else "f32"
    return getattr(compiled_module(), f"{name}_{precision}{suffix}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_dense(tensor: Tensor) -> Tensor:
    """Unit stride along the row; padded rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strided(tensor: Tensor | None) -> Strided:
    """Address and row stride of a per-token tensor that is dense along the row."""
    if tensor is None:
        return NONE
    return tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else rows_dense(mask).view(torch.uint8)


class Shape:
    """The rows of per-token tensors: padded, or packed by offsets that are kept alive here."""

    def __init__(self, shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None) -> None:
        self.cu = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        if self.cu is None:
            self.batch, self.longest = shape[0], shape[1]
            self.tuple = (shape[0], shape[1], 0, 0)
        else:
            self.batch = self.cu.shape[0] - 1
            self.longest = int((self.cu[1:] - self.cu[:-1]).max()) if self.batch else 0
            self.tuple = (self.batch, 0, self.cu.data_ptr(), shape[0])


def fresh(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for an output of any size, in huge pages where the system has them."""
    out = torch.empty(shape, dtype=dtype)
    compiled_module().prefer_huge_pages(out.data_ptr(), out.numel() * out.element_size())  # type: ignore[union-attr]
    return out


def allocate(like: Tensor, shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None) -> Tensor:
    """An output per token: what lies between packed rows, should the offsets leave gaps, is 0."""
    return fresh(shape, like.dtype) if cu_seqlens is None else like.new_zeros(shape)


def threads() -> int:
    return torch.get_num_threads()
