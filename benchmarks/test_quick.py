"""``pytest benchmarks --benchmark-only``: the quick cases for those who live in pytest-benchmark.

A group of the table is a case, a line of it a variant. torch.compile is left to ``python -m benchmarks``: compiling
takes longer than all of this.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks import case, cases, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(name, dtype) for name in cases.names() for dtype in cases.dtypes(name)]


@functools.lru_cache(maxsize=1)  # the variants of a case follow each other and share its data
def _case(name: str, dtype: torch.dtype) -> case.Case:
    return cases.make(name, case.QUICK, DEVICE, dtype)


def _variants() -> list[Any]:
    """The variants of every case, from tiny data: collecting must not allocate the quick sizes."""
    found = []
    for name, dtype in CASES:
        tiny = cases.make(name, case.TINY, DEVICE, dtype)
        for variant in ("ours", "eager", *tiny.peers):
            peer = tiny.peers.get(variant)
            marks = [pytest.mark.skip(reason=peer.why)] if isinstance(peer, case.Missing) else []
            label = f"{name}-{run.dtype_name(dtype)}-{variant}"
            found.append(pytest.param(name, dtype, variant, id=label, marks=marks))
    return found


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize(("name", "dtype", "variant"), _variants())
def test_quick(benchmark: Any, name: str, dtype: torch.dtype, variant: str) -> None:
    made = _case(name, dtype)
    call = made.call({"ours": made.ours, "eager": made.plain, **made.peers}[variant])

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {run.dtype_name(dtype)}"
    benchmark.extra_info |= {"bytes": made.bytes_moved, "threads": torch.get_num_threads()}
    benchmark(finished)
