"""``pytest benchmarks --benchmark-only``: the quick cases under pytest-benchmark.

The table has a group per case and a line per variant. torch.compile is left to ``python -m benchmarks``:
compiling takes longer than all of these.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks import case, cases, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(name, dtype) for name in cases.names() for dtype in cases.dtypes(name)]


@functools.lru_cache(maxsize=1)  # consecutive variants of a case share its data
def _case(name: str, dtype: torch.dtype) -> case.Case:
    return cases.make(name, case.QUICK, DEVICE, dtype)


def _variants() -> list[Any]:
    """All variants; the peers are listed on tiny data, so that collection stays fast."""
    params = []
    for name, dtype in CASES:
        tiny = cases.make(name, case.TINY, DEVICE, dtype)
        for variant in ("ours", "eager", *tiny.peers):
            peer = tiny.peers.get(variant)
            marks = [pytest.mark.skip(reason=peer.why)] if isinstance(peer, case.Missing) else []
            label = f"{name}-{run.dtype_name(dtype)}-{variant}"
            params.append(pytest.param(name, dtype, variant, id=label, marks=marks))
    return params


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize(("name", "dtype", "variant"), _variants())
def test_quick(benchmark: Any, name: str, dtype: torch.dtype, variant: str) -> None:
    timed = _case(name, dtype)
    call = timed.call({"ours": timed.ours, "eager": timed.plain, **timed.peers}[variant])

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {run.dtype_name(dtype)}"
    benchmark.extra_info |= {"bytes": timed.bytes_moved, "threads": torch.get_num_threads()}
    benchmark(finished)
