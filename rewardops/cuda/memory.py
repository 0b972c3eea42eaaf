"""Launcher of the CUDA C++ kernels for the callers in ``rewardops.cpp``: on a stream, never synchronising."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.native import cuda_module
from ..cpp.memory import Launcher, RowShape


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return int(cuda_module().multiprocessors())  # type: ignore[union-attr]


class StreamLauncher(Launcher):
    """Launch on the current stream of the tensors' device."""

    # Threads per block; fewer in the host emulation, where every thread costs time (small inputs then have
    # several tiles).
    most_threads = 256
    most_threads_on_host = 64
    # From this many rows per multiprocessor on, one block scans each row.
    rows_enough = 2

    def module(self) -> Any:
        return cuda_module()

    def longest(self, cu_seqlens: Tensor, total: int) -> int:
        return total

    def fresh(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def fresh_like(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    def execution(self, like: Tensor) -> tuple[int, ...]:
        if like.device.type != "cuda":
            return (0,)
        return (torch._C._cuda_getCurrentRawStream(like.device.index),)

    def scan(self, like: Tensor, rows: RowShape) -> tuple[tuple[int, ...], Tensor | None]:
        """Stream, threads per block, and the number of tiles per row with a block each (0: one block scans a row).

        The number depends on the shape and the device alone, and so do the bits of the result.
        """
        module, batch, longest = self.module(), rows.batch, rows.longest
        most = self.most_threads if like.is_cuda else self.most_threads_on_host
        threads = min(most, max(32, -(-longest // 128) * 32))
        tile = module.scan_tile(threads)
        if batch >= self.rows_enough * _multiprocessors(like.device) or longest <= tile:
            return (*self.execution(like), threads, 0, 0), None
        chunks = -(-longest // tile) + 1  # the first may be shorter, so that the others are aligned
        state = torch.zeros(module.scan_state(batch, chunks), dtype=torch.uint8, device=like.device)
        return (*self.execution(like), threads, chunks, state.data_ptr()), state


CUDA = StreamLauncher()


def on_stream(cpp: types.ModuleType) -> Callable[[str], Any]:
    """The ``__getattr__`` of a family's module: the callers of ``cpp`` that take a launcher, with :data:`CUDA`.

    A caller takes a launcher where its kernel exists in CUDA C++ too.
    """

    def bound(name: str) -> Any:
        caller = getattr(cpp, name, None)
        if not inspect.isfunction(caller) or "launcher" not in inspect.signature(caller).parameters:
            raise AttributeError(f"no kernel in CUDA C++: {name}")
        return functools.partial(caller, launcher=CUDA)

    return bound
