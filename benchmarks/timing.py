"""How it is timed: variants interleaved run by run, a cold cache on GPUs, medians and spreads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    p20: float
    median: float
    p80: float
    runs: int


def _quantiles(samples: list[float]) -> Timing:
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(at(0.2), at(0.5), at(0.8), len(ordered))


class Clock:
    """Times single calls on a device, each with a cold last-level cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * cache // 4, dtype=torch.int32, device=device)

    def once(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        # Work queued ahead of the kernels hides the time that launching them takes on the host.
        torch.cuda._sleep(2_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, *, runs: int, seconds: float
) -> dict[str, Timing]:
    """Median and spread of each call, the calls taking turns; warmed up once, bounded in time."""
    clock = Clock(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds
    for done in range(runs):
        for name, call in calls.items():
            samples[name].append(clock.once(call))
        if done >= 2 and time.perf_counter() > deadline:
            break
    return {name: _quantiles(s) for name, s in samples.items()}


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a large copy on the device, bytes read and bytes written: the ceiling for these ops."""
    source = torch.randint(0, 2**31 - 1, (max(size // 4, 1),), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, runs=15, seconds=10)["copy"]
    return 2 * source.numel() * 4 / timing.median / 1e6
