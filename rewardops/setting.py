"""A choice that holds for the whole process while a context is open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(Generic[T]):
    """Of the contexts that are open, on whichever thread, the one opened last holds; they may close in any order.

    Not per thread: backward passes run on threads of autograd's.
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
