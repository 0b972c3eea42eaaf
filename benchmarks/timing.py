"""Timing: variants interleaved run by run, a cold cache on GPUs, medians, spreads and paired ratios."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
Rounds = dict[int, float]  # round -> milliseconds

LEAST = 3  # minimum number of rounds, also for slow calls
LARGEST_COPY = 2**30  # bytes


@dataclass(frozen=True)
class Timing:
    """A timing in milliseconds."""

    p20: float
    median: float
    p80: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """Time of another call as a multiple of ours, with a 95 % confidence interval."""

    median: float
    low: float
    high: float
    pairs: int


def summary(rounds: Rounds) -> Timing:
    ordered = sorted(rounds.values())

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(at(0.2), at(0.5), at(0.8), len(ordered))


def paired_ratio(theirs: Rounds, ours: Rounds, resamples: int = 1000) -> Ratio:
    """Ratio over the rounds in which both ran, so that other load on the machine cancels; a seeded bootstrap."""
    pairs = np.array([theirs[i] / ours[i] for i in theirs if i in ours])
    drawn = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.quantile(np.median(pairs[drawn], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(pairs)), float(low), float(high), len(pairs))


class Clock:
    """Times single calls on a device, each with a cold last-level cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * cache // 4, dtype=torch.int32, device=device)

    def once(self, call: Call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        # Work queued before the kernels hides their launch time on the host.
        torch.cuda._sleep(2_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleaved(
    calls: dict[str, Call],
    device: torch.device,
    *,
    runs: int,
    seconds: float,
    around: Callable[[str], contextlib.AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
) -> dict[str, Rounds]:
    """Time calls in turn, in a new order each round, each inside the untimed context ``around(name)``.

    Each call has an equal share of the seconds, and stops once it has used it, after at least LEAST rounds.
    """
    clock = Clock(device)
    order = random.Random(0)
    rounds: dict[str, Rounds] = {name: {} for name in calls}
    for name, call in calls.items():
        with around(name):
            call()  # warm-up
    spent = dict.fromkeys(calls, 0.0)
    for i in range(runs):
        names = [n for n in calls if i < LEAST or spent[n] < seconds / len(calls)]
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            with around(name):
                rounds[name][i] = clock.once(calls[name])
            spent[name] += time.perf_counter() - start
    return rounds


def copy_of(size: int, device: torch.device) -> tuple[Call, int]:
    """A copy that moves up to this many bytes, half read and half written; and the bytes moved.

    The roofline of ops of this size: it benefits from caches as a case of the size does.
    """
    count = max(min(size, LARGEST_COPY) // 8, 1)
    source = torch.randint(0, 2**31 - 1, (count,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * count
