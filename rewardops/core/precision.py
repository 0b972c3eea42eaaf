"""Precision by device: the widest is float64, or float32 where there is none (MPS, some GPUs); autocast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@functools.cache
def _computes_in_float64(device_type: str) -> bool:
    try:
        return bool((torch.ones(2, dtype=torch.float64, device=device_type) + 1).sum() == 4)
    except (TypeError, RuntimeError, NotImplementedError):
        return False


def has_float64(device_type: str) -> bool:
    return device_type in ("cpu", "cuda", "meta") or _computes_in_float64(device_type)


def widest(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device."""
    return torch.float64 if has_float64(device.type) else torch.float32


def wide(x: Tensor) -> Tensor:
    """The tensor in the widest precision of its device."""
    return x.to(widest(x.device))


def autocast_enabled(device_type: str) -> bool:
    """False for devices that have no autocast, such as meta."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


class InFloat32(TorchFunctionMode):
    """While it is open, float32 stands for float64: the reference on a device without the latter."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def narrow(value: Any) -> Any:
            return torch.float32 if value is torch.float64 else value

        if func is Tensor.double:
            func = Tensor.float
        return func(*map(narrow, args), **{key: narrow(value) for key, value in (kwargs or {}).items()})
