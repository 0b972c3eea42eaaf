"""Process-wide choices that hold while a context is open."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .transforms import in_func

T = TypeVar("T")


class ContextSetting(Generic[T]):
    """Process-wide setting: the most recently entered context wins, on any thread; contexts may exit in any order.

    Not per thread, because backward passes run on autograd's threads.
    """

    def __init__(self, value: T) -> None:
        self._open = [[value]]
        self._lock = threading.Lock()

    @property
    def value(self) -> T:
        return self._open[-1][0]

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        mine = [value]
        with self._lock:
            self._open = [*self._open, mine]
        try:
            yield
        finally:
            with self._lock:
                self._open = [each for each in self._open if each is not mine]


_debug = ContextSetting(os.environ.get("REWARDOPS_DEBUG", "0") not in ("", "0"))


def debug(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Check the values of arguments too, on any device, at the price of a host synchronisation.

    Token ids in range, ``cu_seqlens`` non-decreasing and ending at the number of tokens, step ids
    non-decreasing, rewards and values finite where the mask counts. The first that is wrong is named with its
    index. Process-wide while the context is open; ``REWARDOPS_DEBUG=1`` turns it on from the start.

    Args:
        enabled: False turns the checks off while the context is open.

    Returns:
        A context manager; the checks hold while it is open.

    Example:
        >>> with ro.debug():
        ...     ro.min_returns(torch.tensor([[1.0, torch.nan]]))
        Traceback (most recent call last):
        ValueError: rewards: got nan at [0, 1], want finite values wherever the mask counts
    """
    return _debug.use(enabled)


def is_traced(tensor: Tensor) -> bool:
    """True if the tensor stands for many values, or for none: in a graph, in ``torch.func``, on the meta device."""
    return (
        torch.compiler.is_compiling()
        or isinstance(tensor, torch._subclasses.FakeTensor)
        or in_func(tensor)
        or tensor.is_meta
    )


def may_read(tensor: Tensor) -> bool:
    """True if a check may read values: always on the CPU, elsewhere under :func:`debug`, never while tracing."""
    return not is_traced(tensor) and (_debug.value or tensor.device.type == "cpu")


def debugging() -> bool:
    """True if checks that cost a synchronisation are on."""
    return (
        not torch.compiler.is_compiling() and _debug.value and not torch._C._are_functorch_transforms_active()
    )
