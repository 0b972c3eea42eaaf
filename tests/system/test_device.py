"""Properties on a GPU: no host synchronisation, graph capture, and kernels shared by sizes."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU
from test_dispatch import leaves, smooth_on

import rewardops
from rewardops.testing.calls import LAYOUTS

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no GPU")

BACKENDS = ("triton", "cuda,triton")


def both_ways(fn, xs):
    """Outputs and gradients of one call."""
    outputs = fn(*xs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, xs, [torch.ones_like(o) for o in outputs])]


@pytest.fixture(params=[(b, c) for b in BACKENDS for c in LAYOUTS], ids=lambda p: f"{p[0]}-{p[1]}")
def calls(request):
    """The calls of every public op on the device, under a backend."""
    backend, layout = request.param
    with rewardops.use_backend(backend):
        yield [(c.name, c.fn, leaves(c.inputs)) for c in smooth_on("cuda", layout, torch.float32)]


def test_nothing_is_read_back(calls):
    for name, fn, xs in calls:
        both_ways(fn, xs)  # kernels are compiled and loaded
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            both_ways(fn, xs)
        except RuntimeError as error:
            raise AssertionError(f"{name} synchronises") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_calls_can_be_captured(calls):
    for name, fn, xs in calls:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            want = [x.detach().clone() for x in both_ways(fn, xs)]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = both_ways(fn, xs)
        for x in got:
            x.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        for ours, eager in zip(got, want, strict=True):
            assert torch.equal(ours.detach().nan_to_num(), eager.nan_to_num()), name


def test_bits_are_the_same_every_time(calls):
    for name, fn, xs in calls:
        first, *others = ([x.detach() for x in both_ways(fn, xs)] for _ in range(5))
        for other in others:
            assert all(
                torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, other, strict=True)
            ), name


def test_sizes_share_their_kernels():
    """No compilation for another T, V or temperature, nor for another number of rows."""
    triton = pytest.importorskip("triton")
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["repr"])
    try:
        counts = []
        for rows, width, vocab, temperature in (
            (8, 64, 1024, 1.0),
            (16, 96, 2048, 0.7),
            (32, 512, 4096, 0.3),
        ):
            logits = torch.randn(rows, width, vocab, device="cuda", requires_grad=True)
            tokens = torch.randint(0, vocab, (rows, width), device="cuda")
            rewards, mask = torch.randn(rows, device="cuda"), torch.rand(rows, width, device="cuda") > 0.1
            with rewardops.use_backend("triton"):
                stats = rewardops.token_stats(logits, tokens, temperature=temperature, mask=mask)
                advantages = rewardops.group_advantages(rewards, group_size=4, mask=mask)
                kl = rewardops.token_kl(stats.logprob, stats.logprob.detach(), mask=mask)
                returns = rewardops.gae(advantages, kl.detach(), gamma=temperature, lam=0.9, mask=mask)[0]
                rewardops.prefix_values(tokens, rewards, group_size=4, mask=mask)
                (stats.logprob * returns + stats.entropy + kl).sum().backward()
            counts.append(len(compiled))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    # An op may have two kernels: one that splits few rows over programs, one for many rows.
    assert counts[-1] == counts[-2], compiled[counts[-2] :]


def test_few_long_rows_beyond_two_to_the_31():
    """Offsets are 64-bit: the last row has the same result as on its own."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("40 GiB of memory are not free")
    rows, width = 65_600, 32_768
    rewards = torch.zeros(rows, width, device="cuda")
    rewards[-1] = torch.randn(width, device="cuda")
    for backend in BACKENDS:
        with rewardops.use_backend(backend):
            want = rewardops.discounted_returns(rewards[-1:], gamma=0.99)
            got = rewardops.discounted_returns(rewards, gamma=0.99)
            torch.testing.assert_close(got[-1:], want)
            assert not got[:-1].any()
            del got
