"""Tensors as arguments of the compiled module (addresses, row strides, row shapes), and its launcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.native import compiled_module, fresh, fresh_like

NONE = (0, 0)
Strided = tuple[int, int]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_dense(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along the row; the stride between padded rows may be any."""
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def strided(tensor: Tensor | None) -> Strided:
    """Address and row stride of a per-token tensor that is dense along the row."""
    if tensor is None:
        return NONE
    return tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask with unit stride along the row; its elements are bytes."""
    return None if mask is None else rows_dense(mask)


class RowShape:
    """Rows of per-token tensors, padded or packed; keeps the packed offsets alive."""

    def __init__(
        self, shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None, launcher: Launcher | None = None
    ) -> None:
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        if self.cu is None:
            self.batch, self.longest = shape[0], shape[1]
            self.tuple = (shape[0], shape[1], 0, 0, True)
        else:
            self.batch = self.cu.shape[0] - 1
            self.longest = (launcher or CPU).longest(self.cu, shape[0])
            self.tuple = (self.batch, 0, self.cu.data_ptr(), shape[0], self.cu.dtype is torch.int64)


class Launcher:
    """Find the compiled function for a dtype, allocate outputs, append launch arguments (here: threads).

    The launcher of ``rewardops.cuda``, for the same callers, is :class:`rewardops.cuda.memory.StreamLauncher`.
    """

    def module(self) -> Any:
        return compiled_module()

    def function(self, name: str, like: Tensor) -> Any:
        """The compiled function for the precision of ``like``."""
        return getattr(self.module(), name + ("_f64" if like.dtype is torch.float64 else "_f32"))

    def longest(self, cu_seqlens: Tensor, total: int) -> int:
        """The length of the longest packed row, or an upper bound."""
        return int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if len(cu_seqlens) > 1 else 0

    def fresh(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised output."""
        return fresh(shape, dtype)

    def fresh_like(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised output of the shape of another tensor: less time than by its shape."""
        return fresh_like(like, dtype)

    def allocate(
        self,
        like: Tensor,
        shape: torch.Size | tuple[int, ...],
        cu_seqlens: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """An output per token. Packed ones are zeros: offsets may leave gaps, which no kernel writes."""
        if cu_seqlens is not None:
            return like.new_zeros(shape, dtype=dtype or like.dtype)
        if shape == like.shape:
            return self.fresh_like(like, dtype)
        return self.fresh(shape, dtype or like.dtype, like.device)

    def execution(self, like: Tensor) -> tuple[int, ...]:
        """The last arguments of every call: the number of threads (on a GPU, the stream)."""
        return (torch.get_num_threads(),)

    def scan(self, like: Tensor, rows: RowShape) -> tuple[tuple[int, ...], Tensor | None]:
        """The last arguments of a scan along rows, and its scratch memory, alive until the call returns."""
        return self.execution(like), None


CPU = Launcher()
function, allocate = CPU.function, CPU.allocate


def threads() -> int:
    return torch.get_num_threads()
