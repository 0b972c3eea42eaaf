"""Run every CUDA C++ kernel once or twice, on small rows, against the specification.

A separate program, to run under a sanitizer: ``test_cuda_kernels.py`` does, and ``make gpu`` on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import rewardops
from rewardops.cuda.memory import CUDA
from rewardops.testing import pack

CUDA.most_threads = CUDA.most_threads_on_host  # so that rows of a few hundred tokens have several tiles
KINDS = ("every_token", "flags", "ids")


def generator() -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def same(fn: Callable[..., Any], *inputs: Tensor) -> None:
    """Check that values and gradients of CUDA C++ equal the specification's."""
    results = []
    for backend in ("cuda,reference", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with rewardops.use_backend(backend):
            out = fn(*leaves)
            outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            loss = sum((x.double() * (1 + k)).sum() for k, x in enumerate(outputs))
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([x.detach() for x in (*outputs, *grads) if x is not None])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def scans(dtype: torch.dtype) -> Iterator[str]:
    g = generator()
    r, v = (torch.randn(1, 300, generator=g, dtype=dtype) for _ in range(2))  # two tiles
    mask = torch.rand(1, 300, generator=g) > 0.2
    flags = torch.rand(1, 300, generator=g) > 0.6
    boot = torch.randn(1, generator=g, dtype=dtype)
    for masked in ("skip", "step"):
        options = {"gamma": 0.9, "lam": 0.8, "mask": mask, "masked": masked}
        same(lambda r, v, b, o=options: rewardops.gae(r, v, bootstrap=b, **o), r, v, boot)
        yield f"gae {masked}"
    same(lambda r, v: rewardops.vtrace(r, v, v.detach(), lam=0.9, mask=mask), r, v)
    yield "vtrace"
    same(lambda r: rewardops.discounted_returns(r, gamma=0.9, mask=mask), r)
    yield "discounted_returns"
    for kind, steps in dict(zip(KINDS, (None, flags, flags.long().cumsum(1)), strict=True)).items():
        for fn in (rewardops.min_returns, rewardops.softmin_returns):
            same(lambda r, fn=fn, s=steps: fn(r, mask=mask, steps=s), r)
            yield f"{fn.__name__} {kind}"


def returns() -> Iterator[str]:
    """Scans by tiles with look-back, and by one block per row."""
    for CUDA.rows_enough in (2, 0):
        for dtype in (torch.float32, torch.float64):
            for done in scans(dtype):
                yield f"{done} {dtype} {CUDA.rows_enough}"
    g = generator()
    packed, cu = pack(torch.randn(3, 140, generator=g), torch.tensor([70, 0, 133]))
    same(lambda r: rewardops.gae(r, r.detach(), gamma=0.9, lam=0.9, cu_seqlens=cu), packed)
    yield "packed rows"


def prefix_trees() -> Iterator[str]:
    """Rows with shared prefixes longer than a step of the search, in two tiles, with and without holes."""
    g = generator()
    groups = torch.zeros(3, dtype=torch.int64)
    tokens = torch.randint(0, 3, (1, 1100), generator=g).repeat(3, 1)
    tokens[1:, 5] += 1
    tokens[2, 1090] += 1
    mask = (torch.rand(1100, generator=g) > 0.2).repeat(3, 1)
    mask[0, 900:] = False
    kinds = ((torch.int32, torch.float32, "prefix"), (torch.int64, torch.float64, "skip"))
    forms = ({"gamma": 0.99}, {"leave_one_out": True})
    for at, (dtype_of_ids, dtype, masked) in enumerate(kinds):
        ids, rewards = tokens.to(dtype_of_ids), torch.randn(3, generator=g, dtype=dtype)
        for options in forms if ALL else forms[at:][:1]:
            arguments = {"mask": mask, "masked": masked, **options}
            same(lambda r, x=ids, o=arguments: rewardops.prefix_values(x, r, groups, **o), rewards)
            yield f"prefix_values {masked} {dtype} {options}"
    same(lambda r: rewardops.tempo_advantages(tokens, r, groups, mask=mask), rewards)
    yield "tempo_advantages"
    packed, cu = pack(tokens[:, :40], torch.tensor([7, 0, 26]))
    results = []
    for backend in ("cuda,reference", "reference"):
        with rewardops.use_backend(backend):
            results.append(rewardops.prefix_lcp(packed, groups, cu_seqlens=cu, max_group_size=3).lcp)
    assert torch.equal(*results)
    yield "prefix_lcp of packed rows"


def advantages() -> Iterator[str]:
    g = generator()
    groups = torch.tensor([3, 1, 3, 3, 1, 1, 3])
    mask = (torch.rand(7, 70, generator=g) > 0.3)[:, 1:66]
    mask[4] = False
    forms = (("mean", "std"), ("median", "batch_std"), (0.3, "range"), ("length_weighted", "none"))
    for at, dtype in enumerate((torch.float32, torch.float64)):
        r = torch.randn(7, generator=g, dtype=dtype)
        for baseline, scale in forms if ALL else forms[at::2]:
            options: dict[str, Any] = {"baseline": baseline, "scale": scale, "mask": mask}
            same(lambda r, o=options: rewardops.group_advantages(r, groups, **o), r)
            yield f"group_advantages {baseline} {scale} {dtype}"
        same(lambda r: rewardops.group_advantages(r, groups), r)
    packed, cu = pack(mask, torch.tensor([60, 0, 3, 65, 1, 7, 64]))
    same(lambda r: rewardops.group_advantages(r, groups, mask=packed, cu_seqlens=cu), r)
    yield "packed rows"


def logits() -> Iterator[str]:
    """Clusters of every size, by limiting the part of a row that a block may hold."""
    kernels = importlib.import_module("rewardops.cuda.logits")
    g = generator()
    for dtype, limit in itertools.product((torch.float32, torch.bfloat16, torch.float16), (2**16, 1024)):
        kernels.BYTES_PER_BLOCK = limit
        x = (torch.randn(4, 1001, generator=g) * 3).to(dtype)
        y = torch.tensor([7, 1000, -100, 512])
        for names in (("logprob",), ("logprob", "entropy"), rewardops.logits.OUTPUTS[:6]):
            coefficients = {name: torch.randn(4, generator=g) for name in names}
            results = []
            for backend in ("cuda", "reference"):
                with rewardops.use_backend(backend):
                    stats, grad = rewardops.token_stats_and_grad(x.clone(), y, coefficients, inplace=True)
                    results.append([*(s for s in stats if s is not None), grad])
            for ours, want in zip(*results, strict=True):
                torch.testing.assert_close(ours, want, rtol=2e-2, atol=1e-2)
            yield f"token_stats_and_grad {dtype} {limit} {len(names)}"


FAMILIES = {f.__name__: f for f in (returns, prefix_trees, advantages, logits)}
ALL = False  # every form in every dtype: a sanitizer takes ten seconds for each

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU, and not by the harness")
    parser.add_argument("--all", action="store_true", help="every form in every dtype, not in one of them")
    chosen = parser.parse_args()
    torch.set_default_device(chosen.device)
    torch.set_num_threads(1)
    ALL = chosen.all
    for family in chosen.families or FAMILIES:
        for done in FAMILIES[family]():
            print(done, flush=True)
    print("every kernel ran")
