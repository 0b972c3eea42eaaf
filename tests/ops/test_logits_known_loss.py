"""token_stats_and_grad on every backend, against autograd through token_stats."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_logits import DTYPES, EVERY, POLICY, draw

import rewardops
from rewardops.testing import assert_within_budget, random_mask

CUDA = True  # its kernel runs in the harness if there is no GPU

TERMS = tuple(name for name in EVERY if name != "is_top1")


class Found(NamedTuple):
    stats: dict[str, torch.Tensor]
    grad: torch.Tensor


def draw_coefficients(names, shape, generator):
    return {name: torch.randn(shape, generator=generator) for name in names}


def moved(value, device):
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def ours(target, logits, tokens, coefficients, **options) -> Found:
    here = {k: moved(v, target.device) for k, v in options.items()}
    args = (moved(x, target.device) for x in (logits, tokens, coefficients))
    stats, grad = rewardops.token_stats_and_grad(*args, **here)
    return Found({k: v.cpu() for k, v in stats._asdict().items() if v is not None}, grad.cpu())


def expected(logits, tokens, coefficients, dtype=None, outputs=(), **options) -> Found:
    """The gradient by autograd through the specification, in the logits' precision or another."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    if options.get("ref_logits") is not None:
        options = {**options, "ref_logits": options["ref_logits"].to(dtype or logits.dtype)}
    with rewardops.use_backend("reference"):
        stats = rewardops.token_stats(leaf, tokens, outputs=[*coefficients, *outputs], **options)
        ups = {k: c.to(getattr(stats, k).dtype) for k, c in coefficients.items()}
        (grad,) = torch.autograd.grad([getattr(stats, k) for k in ups], leaf, list(ups.values()))
    return Found({k: v.detach() for k, v in stats._asdict().items() if v is not None}, grad)


def check(target, logits, tokens, coefficients, outputs=POLICY, **options) -> Found:
    """Check the error budget, and that in-place results are the same."""
    options["outputs"] = outputs
    got = ours(target, logits, tokens, coefficients, **options)
    over = ours(target, logits.clone(), tokens, coefficients, inplace=True, **options)
    exact = expected(logits, tokens, coefficients, torch.float64, **options)
    eager = expected(logits, tokens, coefficients, **options)
    assert got.grad.dtype is logits.dtype
    assert list(got.stats) == list(exact.stats)
    for name, value in got.stats.items():
        assert_within_budget(value, exact.stats[name], eager.stats[name], name=name)
        torch.testing.assert_close(value, over.stats[name], rtol=0, atol=0, equal_nan=True)
    assert_within_budget(got.grad, exact.grad, eager.grad, name="gradient")
    torch.testing.assert_close(got.grad, over.grad, rtol=0, atol=0, equal_nan=True)
    return got


def split(monkeypatch, target, size):
    """Split rows over several blocks, as long rows are, by limiting the bytes per block."""
    if target.backend.startswith("cuda"):
        monkeypatch.setattr(importlib.import_module("rewardops.cuda.logits"), "BYTES_PER_BLOCK", size)


def only_cuda(target):
    if not target.backend.startswith("cuda"):
        pytest.skip("CUDA's")


class Test_token_stats_and_grad:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab", [1, 2, 7, 1000, 5003])
    def test_matches_autograd(self, target, generator, dtype, vocab):
        logits, tokens = draw((5,), vocab, generator, dtype=dtype)
        check(target, logits, tokens, draw_coefficients(TERMS[:6], (5,), generator), temperature=0.7)

    @pytest.mark.parametrize("names", [*((name,) for name in TERMS[:6]), ("entropy", "logprob")])
    def test_only_what_was_asked_for(self, target, generator, names):
        logits, tokens = draw((4,), 90, generator)
        coefficients = draw_coefficients(names, (4,), generator)
        got = check(target, logits, tokens, coefficients, outputs=())
        assert set(got.stats) == set(names)
        check(target, logits, tokens, coefficients, outputs=("is_top1", "logsumexp"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_with_a_reference(self, target, generator, dtype):
        logits, tokens = draw((3, 2), 300, generator, dtype=dtype)
        ref, _ = draw((3, 2), 300, generator, dtype=dtype)
        coefficients = draw_coefficients(TERMS, (3, 2), generator)
        mask = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
        options = {"ref_logits": ref, "mask": mask, "beta": 0.3, "temperature": 1.3, "vocab_size": 290}
        check(target, logits, tokens, coefficients, outputs=EVERY, **options)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_reference_in_float64_keeps_the_dtype_of_the_gradient(self, target, generator, inplace):
        logits, tokens = draw((4,), 50, generator, dtype=torch.bfloat16)
        ref, _ = draw((4,), 50, generator, dtype=torch.float64)
        coefficients = draw_coefficients(("kl",), (4,), generator)
        got = ours(target, logits.clone(), tokens, coefficients, ref_logits=ref, inplace=inplace)
        want = expected(logits, tokens, coefficients, torch.float64, ref_logits=ref)
        assert got.stats["kl"].dtype is torch.float64
        assert_within_budget(got.grad, want.grad, ulps=1)

    @pytest.mark.parametrize("offset", [0.0, 1e4, -120.0])
    @pytest.mark.parametrize("scale", [0.1, 100.0])
    def test_scales_and_offsets(self, target, generator, scale, offset):
        logits, tokens = draw((4,), 1500, generator, scale)
        check(target, logits + offset, tokens, draw_coefficients(TERMS[:6], (4,), generator))

    def test_peaked_and_flat_rows(self, target):
        logits = torch.stack([torch.zeros(4096), torch.full((4096,), 3.0)])
        logits[0, 17] = 25.0  # entropy about 1e-6
        coefficients = {"entropy": torch.ones(2), "logprob": torch.ones(2)}
        got = check(target, logits, torch.tensor([17, 5]), coefficients)
        if target.backend != "reference":
            p = logits[0].double().softmax(0)
            assert got.stats["entropy"][0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)

    def test_minus_infinity(self, target, generator, monkeypatch):
        split(monkeypatch, target, 4 << 10)
        vocab = 3000
        logits, _ = draw((4,), vocab, generator)
        logits[0, 3] = -torch.inf  # one column
        logits[1, :2500] = -torch.inf  # whole blocks
        logits[2, torch.arange(vocab) != 2800] = -torch.inf  # everywhere but at the token
        logits[3, 11] = -torch.inf  # at the token
        tokens = torch.tensor([5, 2800, 2800, 11])
        coefficients = draw_coefficients(TERMS[:5], (4,), generator)
        got = check(target, logits, tokens, coefficients, outputs=POLICY)
        assert got.grad.isfinite().all()
        assert bool((got.grad[1, :2500] == 0).all())
        assert got.stats["logprob"].isinf().tolist() == [False, False, False, True]

    def test_nan_and_rows_without_mass_are_alone(self, target, generator, monkeypatch):
        split(monkeypatch, target, 4 << 10)
        logits, tokens = draw((4,), 3000, generator)
        logits[0] = -torch.inf
        logits[1, 2999] = torch.nan
        logits[2, :2000] = -torch.inf
        logits[2, 5] = torch.nan
        coefficients = draw_coefficients(TERMS[:6], (4,), generator)
        got = ours(target, logits, tokens, coefficients, outputs=POLICY)
        assert got.grad.isnan().all(-1).tolist() == [True, True, True, False]
        assert got.grad[3].isfinite().all()
        assert not got.stats.pop("is_top1")[:3].any()
        assert got.stats.pop("mean_logit")[0].item() == -torch.inf
        for name, value in got.stats.items():
            assert value.isnan().tolist() == [True, True, True, False], name

    def test_masked_rows_never_influence(self, target, generator):
        logits, tokens = draw((4, 5), 70, generator)
        mask = random_mask(4, 5, generator)
        coefficients = draw_coefficients(TERMS[:6], (4, 5), generator)
        clean = ours(target, logits, tokens, coefficients, mask=mask, outputs=POLICY)
        dirty = torch.where(mask[..., None], logits, torch.nan)
        marked = torch.where(mask, tokens, -100)
        poisoned = {k: torch.where(mask, v, torch.nan) for k, v in coefficients.items()}
        for options in ({"mask": mask}, {}, {"mask": mask, "inplace": True}):
            got = ours(target, dirty.clone(), marked, poisoned, outputs=POLICY, **options)
            assert torch.equal(got.grad, clean.grad)
            assert bool((got.grad[~mask] == 0).all())
            for name, value in got.stats.items():
                assert torch.equal(value, clean.stats[name]), name
                assert bool((value[~mask] == 0).all()), name

    def test_ids_out_of_range_are_nan_and_never_read(self, target, generator):
        logits, tokens = draw((4,), 9, generator)
        tokens[1], tokens[2] = 9, -1
        coefficients = draw_coefficients(("entropy",), (4,), generator)
        got = ours(target, logits, tokens, coefficients, outputs=("logprob", "is_top1"))
        assert got.stats["logprob"].isnan().tolist() == [False, True, True, False]
        assert not got.stats["is_top1"][1:3].any()
        assert got.grad.isfinite().all()  # only gradients of NaN rows are NaN
        got = ours(target, logits, tokens, {"logprob": torch.ones(4)})
        assert got.grad.isnan().all(-1).tolist() == [False, True, True, False]
        with (
            rewardops.debug(),
            pytest.raises(ValueError, match=r"tokens: got 9 at \[1\], want ids in \[0, 9\)"),
        ):
            ours(target, logits, tokens, coefficients)

    @pytest.mark.parametrize("per", ["row", "token", "one"])
    def test_temperature_tensors(self, target, generator, per):
        logits, tokens = draw((3, 4), 60, generator)
        shape = {"row": (3,), "token": (3, 4), "one": ()}[per]
        t = torch.rand(shape, generator=generator) + 0.5
        check(target, logits, tokens, draw_coefficients(TERMS[:6], (3, 4), generator), temperature=t)

    @pytest.mark.parametrize("softcap", [5.0, 30.0])
    def test_softcap(self, target, generator, softcap):
        logits, tokens = draw((4,), 1300, generator, scale=20.0)
        logits[1] *= 1e-3  # where tanh x and x differ only in the last digits
        logits[2, :4] = torch.tensor([-torch.inf, 1e4, -1e4, 0.0])
        coefficients = draw_coefficients(TERMS[:6], (4,), generator)
        check(target, logits, tokens, coefficients, softcap=softcap, temperature=0.9)

    @pytest.mark.parametrize("vocab", [1, 40, 2047])
    def test_columns_beyond_vocab_size_do_not_exist(self, target, generator, vocab):
        logits, tokens = draw((4,), vocab, generator)
        coefficients = draw_coefficients(TERMS[:6], (4,), generator)
        want = ours(target, logits, tokens, coefficients, outputs=POLICY)
        padded = torch.cat([logits, torch.full((4, 33), torch.nan)], 1)
        for inplace in (False, True):
            options = {"vocab_size": vocab, "outputs": POLICY, "inplace": inplace}
            got = ours(target, padded.clone(), tokens, coefficients, **options)
            assert torch.equal(got.grad[:, :vocab], want.grad)
            assert bool((got.grad[:, vocab:] == 0).all())
            assert all(torch.equal(got.stats[name], value) for name, value in want.stats.items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("view", ["sequence", "rows", "columns", "odd"])
    def test_strided_views(self, target, generator, view, dtype):
        """The gradient of a view; in place, memory around the view is unchanged."""
        base = (torch.randn(3, 6, 131, generator=generator) * 3).to(dtype).to(target.device)
        cut = {
            "sequence": lambda x: x[:, :-1],
            "rows": lambda x: x[1:, ::2],
            "columns": lambda x: x[..., ::2],
            "odd": lambda x: x[..., 3:100],
        }[view]
        logits = cut(base)
        tokens = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
        coefficients = draw_coefficients(TERMS[:6], tokens.shape, generator)
        want = check(target, logits.detach().cpu(), tokens, coefficients)
        got = ours(target, logits, tokens, coefficients, outputs=POLICY)
        assert got.grad.shape == logits.shape
        before, touched = base.clone(), torch.zeros(base.shape, dtype=torch.bool)
        cut(touched)[:] = True
        args = (moved(x, target.device) for x in (tokens, coefficients))
        _, grad = rewardops.token_stats_and_grad(logits, *args, inplace=True)
        assert grad.data_ptr() == logits.data_ptr()
        assert grad.stride() == logits.stride()
        for result in (got.grad, grad.cpu()):
            torch.testing.assert_close(result, want.grad, rtol=1e-6, atol=1e-7)
        assert torch.equal(base.cpu()[~touched], before.cpu()[~touched])

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
    def test_empty(self, target, shape):
        coefficients = {"logprob": torch.zeros(shape)}
        tokens = torch.zeros(shape, dtype=torch.int64)
        got = check(target, torch.zeros(*shape, 5), tokens, coefficients)
        assert got.grad.shape == (*shape, 5)

    def test_same_bits_every_time(self, target, generator):
        logits, tokens = draw((6,), 3001, generator)
        coefficients = draw_coefficients(TERMS[:6], (6,), generator)
        runs = [ours(target, logits, tokens, coefficients, outputs=POLICY) for _ in range(2)]
        assert torch.equal(runs[0].grad, runs[1].grad)
        assert all(torch.equal(runs[0].stats[name], runs[1].stats[name]) for name in POLICY)

    # ---- with autograd -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("inplace", [False, True])
    def test_the_gradient_starts_a_backward_pass(self, target, generator, inplace):
        hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(30, 8, generator=generator)
        hidden, weight = (x.to(target.device).requires_grad_() for x in (hidden, weight))
        tokens = torch.randint(0, 30, (6,), generator=generator).to(target.device)
        ups = moved(draw_coefficients(("logprob", "entropy"), (6,), generator), target.device)
        stats = rewardops.token_stats(hidden @ weight.T, tokens)
        want = torch.autograd.grad([stats.logprob, stats.entropy], [hidden, weight], list(ups.values()))
        logits = hidden @ weight.T
        version = logits._version
        stats, grad = rewardops.token_stats_and_grad(logits, tokens, ups, inplace=inplace)
        assert not grad.requires_grad
        assert not stats.logprob.requires_grad
        assert (grad.data_ptr() == logits.data_ptr()) == inplace
        assert (logits._version > version) == inplace
        logits.backward(grad)
        for a, b in zip((hidden.grad, weight.grad), want, strict=True):
            torch.testing.assert_close(a, b)

    def test_what_others_saved_of_the_logits_is_not_overwritten_in_silence(self, target, generator):
        logits, tokens = draw((3,), 20, generator)
        logits = logits.to(target.device).requires_grad_() * 1
        saved = logits.exp().sum() + (logits * logits).sum()
        one = {"logprob": torch.ones(3, device=target.device)}
        rewardops.token_stats_and_grad(logits, tokens.to(target.device), one, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_autograd(self, target, generator, context):
        with context():
            logits, tokens = draw((3,), 20, generator)
            got = ours(target, logits, tokens, {"logprob": torch.ones(3)}, inplace=True)
        want = expected(*draw((3,), 20, generator.manual_seed(20260)), {"logprob": torch.ones(3)})
        torch.testing.assert_close(got.grad, want.grad)

    def test_compiled_in_place_writes_over_the_logits(self, generator):
        logits, tokens = draw((4,), 30, generator)
        ups = draw_coefficients(("logprob", "entropy"), (4,), generator)

        def step(logits):
            stats, grad = rewardops.token_stats_and_grad(
                logits, tokens, ups, outputs=("is_top1",), inplace=True
            )
            return stats.is_top1, stats.logprob + 1, grad

        want = step(logits.clone())
        torch._dynamo.reset()
        here = logits.clone()
        got = torch.compile(step, fullgraph=True)(here)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert got[2].data_ptr() == here.data_ptr()

    @given(seed=st.integers(0, 10**6), vocab=st.integers(1, 60), rows=st.integers(1, 4))
    def test_property_gradients_of_probabilities_sum_to_nothing(self, seed, vocab, rows):
        """An offset of the logits changes only logsumexp and mean logit, by the offset."""
        generator = torch.Generator().manual_seed(seed)
        logits, tokens = draw((rows,), vocab, generator, dtype=torch.float64)
        ups = {k: v.double() for k, v in draw_coefficients(TERMS[:6], (rows,), generator).items()}
        _, grad = rewardops.token_stats_and_grad(logits, tokens, ups)
        torch.testing.assert_close(grad.sum(-1), ups["logsumexp"] + ups["mean_logit"], rtol=1e-9, atol=1e-9)

    # ---- rows that several blocks share, and others that are CUDA's alone ----------------------------------

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize("vocab", [40, 1000, 2047, 9001])
    def test_rows_shared_by_blocks(self, target, generator, monkeypatch, dtype, vocab):
        only_cuda(target)
        split(monkeypatch, target, 2 << 10)
        logits, tokens = draw((3,), vocab, generator, dtype=dtype)
        tokens[0], tokens[2] = 0, vocab - 1  # in the first and in the last slice
        coefficients = draw_coefficients(TERMS[:6], (3,), generator)
        check(target, logits, tokens, coefficients, temperature=0.8)
        mask = torch.tensor([True, False, True])
        check(target, logits, tokens, coefficients, mask=mask, vocab_size=vocab - 7)
        whole = {"logprob": coefficients["logprob"], "entropy": coefficients["entropy"]}
        check(target, logits, tokens, whole, outputs=(), softcap=8.0)

    def test_how_many_blocks_share_a_row(self, target):
        only_cuda(target)
        kernels = importlib.import_module("rewardops.cuda.logits")
        if target.device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("no clusters")

        def blocks(element, vocab):
            return kernels.CUDA.module().blocks_of_a_row(element, vocab, kernels.BYTES_PER_BLOCK)

        vocabularies = (1, 32000, 50257, 128256, 151936, 262144)
        assert [blocks(2, v) for v in vocabularies] == [1, 2, 4, 8, 8, 8]
        assert [blocks(4, v) for v in vocabularies] == [1, 4, 8, 8, 8, 8]
        assert blocks(2, 900_000) == 8
        assert blocks(2, 940_000) == blocks(4, 470_000) == 0

    def test_many_rows_in_turn(self, target, generator, monkeypatch):
        """A cluster takes several rows, masked ones among them."""
        only_cuda(target)
        split(monkeypatch, target, 64)  # eight blocks per row, some of them empty
        count = 20_000 if target.device.type == "cuda" else 100
        logits, tokens = draw((count,), 77, generator, dtype=torch.bfloat16)
        mask = torch.rand(count, generator=generator) > 0.3
        coefficients = draw_coefficients(TERMS[:6], (count,), generator)
        check(target, logits, tokens, coefficients, mask=mask)
        check(target, logits[:, :72], tokens % 72, coefficients, mask=mask)

    @pytest.mark.parametrize("vocab", [17, 9001])
    def test_the_tail_of_a_peaked_row_keeps_its_digits(self, target, generator, monkeypatch, vocab):
        only_cuda(target)
        split(monkeypatch, target, 2 << 10)
        logits, _ = draw((4,), vocab, generator, scale=0.5)
        rows, tokens = torch.arange(4), torch.arange(4) * 977 % vocab
        logits[rows, tokens] = 15.0 + 6.0 * rows
        got = ours(target, logits, tokens, {"logprob": torch.ones(4)}, outputs=("entropy",))
        below = logits.double() - logits.amax(-1, keepdim=True)
        tail = below.exp().scatter(1, tokens[:, None], 0.0)
        log_total = tail.sum(-1).log1p()
        entropy = log_total - (tail * below).sum(-1) / (1 + tail.sum(-1))
        assert_within_budget(got.stats["logprob"], -log_total, ulps=24)
        assert_within_budget(got.stats["entropy"], entropy, ulps=24)

    def test_alignments(self, target, generator):
        """Rows and gradients at every offset from multiples of 16 bytes give the same bits."""
        only_cuda(target)
        coefficients = draw_coefficients(TERMS[:6], (2,), generator)
        for dtype in (torch.float32, torch.float16):
            for vocab in (5, 16, 130, 1031):
                logits, tokens = draw((2,), vocab, generator, dtype=dtype)
                want = check(target, logits, tokens, coefficients)
                for start in range(1, 9):
                    base = torch.full((2, start + vocab + start % 3), torch.nan, dtype=dtype)
                    here = base[:, start : start + vocab]
                    for inplace in (False, True):
                        here.copy_(logits)
                        got = ours(target, here, tokens, coefficients, outputs=POLICY, inplace=inplace)
                        assert torch.equal(got.grad, want.grad)
                        assert all(torch.equal(got.stats[name], value) for name, value in want.stats.items())
                    assert base[:, :start].isnan().all()
                    assert base[:, start + vocab :].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_a_real_vocabulary(self, target, generator, dtype):
        only_cuda(target)
        logits, tokens = draw((2,), 151936, generator, dtype=dtype)
        check(target, logits, tokens, draw_coefficients(TERMS[:6], (2,), generator))

    def test_a_row_too_long_for_a_cluster_takes_two_passes(self, target, generator):
        only_cuda(target)
        vocab = 470_000
        logits, tokens = draw((1,), vocab, generator)
        check(target, logits, tokens, {"logprob": torch.ones(1)}, outputs=("entropy",))

    def test_what_the_kernel_does_not_serve_needs_another_backend(self, target, generator):
        only_cuda(target)
        logits, tokens = draw((2,), 20, generator, dtype=torch.float64)
        with (
            rewardops.use_backend("cuda"),
            pytest.raises(rewardops.BackendUnavailable, match="cannot serve token_stats"),
        ):
            ours(target, logits, tokens, {"logprob": torch.ones(2)})
        with rewardops.use_backend("cuda"):
            ours(target, logits.float(), tokens, {"logprob": torch.ones(2)})
