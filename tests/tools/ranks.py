"""Processes of a process group, reused by all tests of a module: a test's function runs on every rank."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60


class Ranks:
    """``run(n, fn, *args)`` calls ``fn(process_group, *args)`` on the first ``n`` ranks; returns what they return.

    ``fn`` is a module-level function; ``args`` and results must be picklable. After a failure the processes are
    unusable.
    """

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, folder / "store", there), daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, count: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self._ends[:count]:
            end.send((count, fn, args))
        results: dict[int, Any] = {}
        while len(results) < count:
            waiting = {end: k for k, end in enumerate(self._ends[:count]) if k not in results}
            ready = wait(list(waiting), TIMEOUT)
            if not ready:
                raise TimeoutError(f"no answer from ranks {sorted(waiting.values())}")
            for end in ready:
                rank = waiting[end]
                results[rank], error = end.recv()
                if error is not None:  # others may be waiting for this rank
                    raise AssertionError(f"rank {rank}: {error}")
        return [results[k] for k in range(count)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: Path, commands: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    # Every rank participates in creating a group, members and others.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while True:
        count, fn, args = commands.recv()
        try:
            commands.send((fn(groups[count], *args), None))
        except Exception:
            commands.send((None, traceback.format_exc()))
