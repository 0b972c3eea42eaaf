"""Peak memory of a call, without its inputs and its result."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .case import as_tuple

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    """Memory of this process in bytes, from the system's counters."""
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert match
    return int(match[1]) * 1024


def _size(result: Any) -> int:
    return sum(t.numel() * t.element_size() for t in as_tuple(result))


def keep() -> bool:
    """Make the C library keep freed memory, as GPU allocators do; False if it cannot.

    By default every large result is allocated from the system. On some machines that takes longer than computing
    it, for every variant alike.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def _give_back() -> None:
    """Return freed memory to the system: kept memory would hide allocations of the next call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak in bytes; None if the system does not count. Warm the call up first, for the buffers of libraries."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _size(result)
    try:
        _give_back()
        _CLEAR.write_text("5")  # reset the peak
        before = _resident("VmRSS")
        result = call()
        return max(_resident("VmHWM") - before - _size(result), 0)
    except OSError:
        return None
