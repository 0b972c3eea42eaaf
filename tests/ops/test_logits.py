"""token_stats on every backend."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import assert_within_budget, check_backend, evaluate, random_mask

EVERY = rewardops.logits.OUTPUTS
POLICY = EVERY[:7]  # outputs that need no reference model
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stats(tokens, mask=None, outputs=POLICY, **options):
    """token_stats as a function of the logits, and of the reference's logits if passed."""

    def fn(logits, ref_logits=None):
        def here(x):
            return x.to(logits.device) if isinstance(x, torch.Tensor) else x

        return rewardops.token_stats(
            logits,
            here(tokens),
            ref_logits=ref_logits,
            mask=here(mask),
            outputs=outputs,
            **{k: here(v) for k, v in options.items()},
        )

    return fn


def draw(shape, vocab, generator, scale=3.0, dtype=torch.float32):
    logits = (torch.randn(*shape, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, vocab, shape, generator=generator)


def plain(logits, tokens, ref_logits, temperature, beta):
    """An independent oracle: the formulas with log_softmax, differentiated by autograd."""
    z = logits / temperature
    logp, logq = z.log_softmax(-1), (ref_logits / temperature).log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    m = beta * q + (1 - beta) * p
    return {
        "logprob": logp.gather(-1, tokens[:, None])[:, 0],
        "entropy": -(p * logp).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "sum_p2": (p * p).sum(-1),
        "sum_p2_logp": (p * p * logp).sum(-1),
        "mean_logit": z.mean(-1),
        "ref_logprob": logq.gather(-1, tokens[:, None])[:, 0],
        "kl": (p * (logp - logq)).sum(-1),
        "reverse_kl": (q * (logq - logp)).sum(-1),
        "jsd": beta * (q * (logq - m.log())).sum(-1) + (1 - beta) * (p * (logp - m.log())).sum(-1),
    }


def allocated(fn):
    """Bytes that a call allocates on the CPU, and its result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(e.nbytes(), 0) for e in events), result


if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
    from rewardops.triton_kernels.logits_rows import row_offset

    @triton.jit
    def write_offsets(out, inner, stride_outer, stride_inner):
        n = tl.program_id(0)
        tl.store(out + n, row_offset(n, inner, stride_outer, stride_inner))


class Test_token_stats:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab", [1, 2, 7, 1000, 5003])
    def test_matches_float64(self, target, generator, dtype, vocab):
        logits, tokens = draw((4 if target.interpreted else 9,), vocab, generator, dtype=dtype)
        check_backend(stats(tokens, temperature=0.7), [logits], backend=target.backend, device=target.device)

    @pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
    @pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, -120.0])
    def test_scales_and_offsets(self, target, generator, scale, offset):
        logits, tokens = draw((6,), 2500, generator, scale)
        check_backend(stats(tokens), [logits + offset], backend=target.backend, device=target.device)

    @pytest.mark.parametrize("masked", [False, True])
    def test_padded_rows_and_strided_views(self, target, generator, masked):
        logits, tokens = draw((3, 6), 130, generator)
        mask = random_mask(3, 5, generator) if masked else None
        fn = stats(tokens[:, 1:], mask)
        check_backend(lambda x: fn(x[:, :-1]), [logits], backend=target.backend, device=target.device)
        # Rows with a padded stride, and columns with a stride other than 1.
        wide = torch.randn(5, 200, generator=generator)
        fn = stats(torch.arange(5))
        check_backend(lambda x: fn(x[:, :77]), [wide], backend=target.backend, device=target.device)
        check_backend(lambda x: fn(x[:, ::2]), [wide], backend=target.backend, device=target.device)

    @pytest.mark.parametrize("vocab", [50257, 128256, 151936, 262144])
    def test_real_vocabularies(self, target, generator, vocab):
        logits, tokens = draw((2,), vocab, generator)
        check_backend(stats(tokens), [logits], backend=target.backend, device=target.device)

    def test_peaked_and_flat_rows(self, target):
        vocab = 4096
        peaked = torch.zeros(vocab)
        peaked[17] = 25.0  # entropy about 1e-6
        flat = torch.full((vocab,), 3.0)
        logits = torch.stack([peaked, flat])
        ours = check_backend(
            stats(torch.tensor([17, 5])), [logits], backend=target.backend, device=target.device
        ).outputs
        # An entropy of 1e-6 to its last digits, all of which a float32 sum of probabilities loses.
        if target.backend != "reference":
            p = peaked.double().softmax(0)
            assert ours[1][0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
        assert ours[1][1].item() == pytest.approx(math.log(vocab), rel=1e-6)
        assert ours[0][1].item() == pytest.approx(-math.log(vocab), rel=1e-6)

    def test_minus_infinity(self, target, generator):
        vocab = 9000
        logits, _ = draw((5,), vocab, generator)
        logits[0, 3] = -torch.inf  # one column
        logits[1, :8192] = -torch.inf  # whole first blocks
        logits[2, torch.arange(vocab) != 8500] = -torch.inf  # everywhere but at the token
        logits[3, 11] = -torch.inf  # at the token
        logits[4, 0], logits[4, 5000] = 15, -torch.inf  # one column of a block behind that of the largest
        tokens = torch.tensor([5, 8500, 8500, 11, 5])
        ours = check_backend(stats(tokens), [logits], backend=target.backend, device=target.device)
        logprob, entropy = ours.outputs[:2]
        assert logprob[2].item() == 0.0
        assert entropy[2].item() == 0.0
        assert logprob[3].item() == -math.inf
        assert ours.gradients[0].isfinite().all()

    def test_a_row_without_mass_is_nan_and_alone(self, target):
        logits = torch.zeros(2, 8)
        logits[0] = -torch.inf
        out = evaluate(stats(torch.tensor([1, 1])), [logits], backend=target.backend, device=target.device)
        named = dict(zip(POLICY, out.outputs, strict=True))
        assert not named.pop("is_top1")[0]
        assert named.pop("mean_logit").tolist() == [-math.inf, 0.0]
        assert all(o[0].isnan() and o[1].isfinite() for o in named.values())

    def test_nan_in_a_logit_shows(self, target):
        logits = torch.zeros(3, 5000)
        logits[0, 4999] = torch.nan
        logits[1, :4096] = -torch.inf
        logits[1, 5] = torch.nan
        out = evaluate(
            stats(torch.tensor([1, 4999, 1])), [logits], backend=target.backend, device=target.device
        )
        for name, o in zip(POLICY, out.outputs, strict=True):
            if name != "is_top1":
                assert o.isnan().tolist() == [True, True, False], name

    @pytest.mark.parametrize("known", [False, True])
    def test_an_infinite_logit_shows_as_a_nan_does(self, target, generator, known):
        """Everything of its model and row is NaN, with the gradient; the other rows are what they were."""
        vocab = 2100  # several blocks, also of the interpreter's
        logits, tokens = draw((1,), vocab, generator)
        logits = logits.repeat(7, 1)
        for row, (column, value) in enumerate(
            [(0, math.inf), (1500, math.inf), (vocab - 1, math.inf), (1100, math.nan)], 1
        ):
            logits[row, column] = value
        logits[5], logits[6] = -math.inf, math.inf
        logits[5, 1500] = math.inf
        tokens = tokens.repeat(7)
        names = [n for n in POLICY if n != "is_top1"]
        x, here = logits.to(target.device).requires_grad_(), tokens.to(target.device)
        for name in names:
            if known:
                one = {name: torch.ones(7, device=target.device)}
                got, grad = rewardops.token_stats_and_grad(x, here, one, outputs=("is_top1",))
            else:
                got = rewardops.token_stats(x, here, outputs=(name, "is_top1"))
                (grad,) = torch.autograd.grad(getattr(got, name).sum(), x)
            assert getattr(got, name).isnan().tolist() == [False] + [True] * 6, name
            assert grad.isnan().all(-1).tolist() == [False] + [True] * 6, name
            assert grad[0].isfinite().all(), name
            assert not got.is_top1[1:].any()

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    @pytest.mark.parametrize("to_ref", [False, True])
    def test_a_broken_row_of_one_model_is_not_in_the_gradient_of_the_other(
        self, target, generator, to_ref, broken
    ):
        logits, tokens = draw((2,), 300, generator)
        ref = logits.flip(0).clone()
        ref[1, 7] = broken
        x, r = logits.to(target.device).requires_grad_(), ref.to(target.device).requires_grad_(to_ref)
        got = rewardops.token_stats(
            x, tokens.to(target.device), ref_logits=r, outputs=("logprob", "ref_logprob", "kl", "jsd")
        )
        assert got.ref_logprob.isnan().tolist() == got.kl.isnan().tolist() == [False, True]
        (grad,) = torch.autograd.grad(got.logprob.sum(), x, retain_graph=True)
        d = logits.double().requires_grad_()
        (want,) = torch.autograd.grad(d.log_softmax(-1).gather(1, tokens[:, None]).sum(), d)
        torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(got.kl.sum(), x)
        assert grad.isnan().all(-1).tolist() == [False, True]

    @pytest.mark.parametrize("low", [-1e4, -1e9, -1e30])
    @pytest.mark.parametrize("of", ["policy", "ref", "both"])
    def test_columns_far_below(self, target, generator, of, low):
        """Columns that are switched off by a large negative number, as many do instead of -inf."""
        logits, tokens = draw((4,), 2100, generator)
        ref, _ = draw((4,), 2100, generator)
        for x in (logits, ref) if of == "both" else (logits if of == "policy" else ref,):
            x[:, 3], x[1:, 500:1700] = low, low
        got = stats(tokens, outputs=EVERY[:10])(logits.to(target.device), ref.to(target.device))
        for name, expected in plain(logits.double(), tokens, ref.double(), 1.0, 0.5).items():
            if name != "jsd":
                value = getattr(got, name).cpu().double()
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab", [77, 3001])
    def test_bits_do_not_depend_on_where_rows_begin(self, target, generator, vocab, dtype):
        """Wide loads need addresses that are multiples of 16 bytes, and rows may begin anywhere."""
        logits, tokens = draw((3,), vocab, generator, dtype=dtype)
        ref, _ = draw((3,), vocab, generator, dtype=dtype)
        names = [name for name in EVERY if name != "is_top1"]

        def run(*tensors):
            leaves = [x.to(target.device).detach().requires_grad_() for x in tensors]
            outputs = tuple(x for x in stats(tokens, outputs=names)(*leaves) if x is not None)
            return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

        want = run(logits, ref)
        for begin, stride in ((1, 3016), (2, 3009), (5, 3011), (8, 3024), (0, 3032)):
            wide = [torch.zeros(3, stride, dtype=dtype, device=target.device) for _ in range(2)]
            views = [x[:, begin : begin + vocab] for x in wide]
            for view, x in zip(views, (logits, ref), strict=True):
                view.copy_(x)
            for a, b in zip(run(*views), want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def test_masked_rows_never_influence(self, target, generator):
        logits, tokens = draw((4, 5), 70, generator)
        mask = random_mask(4, 5, generator)
        clean = evaluate(stats(tokens, mask), [logits], backend=target.backend, device=target.device)
        dirty = torch.where(mask[..., None], logits, torch.nan)
        tokens = torch.where(mask, tokens, -100)
        ours = evaluate(
            stats(tokens, mask), [dirty], backend=target.backend, device=target.device, poison=mask
        )
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
        assert all(bool((o.cpu()[~mask] == 0).all()) for o in ours.outputs)
        assert bool((ours.gradients[0].cpu()[~mask] == 0).all())

    @pytest.mark.parametrize("outputs", [*((name,) for name in POLICY), ("entropy", "logprob")])
    def test_only_what_was_asked_for(self, target, generator, outputs):
        logits, tokens = draw((5,), 40, generator)
        result = stats(tokens, outputs=outputs)(logits.to(target.device))
        assert {name for name, value in result._asdict().items() if value is not None} == set(outputs)
        check_backend(stats(tokens, outputs=outputs), [logits], backend=target.backend, device=target.device)

    def test_ids_out_of_range_are_nan_and_never_read(self, target, generator):
        logits, tokens = draw((4,), 9, generator)
        tokens[1], tokens[2] = 9, -1
        result = stats(tokens)(logits.to(target.device))
        assert result.logprob.isnan().tolist() == [False, True, True, False]
        assert result.entropy.isfinite().all()
        # Only gradients of NaN rows are NaN.
        ours = evaluate(
            stats(tokens, outputs=("entropy",)), [logits], backend=target.backend, device=target.device
        )
        assert ours.gradients[0].isfinite().all()
        with (
            rewardops.debug(),
            pytest.raises(ValueError, match=r"tokens: got 9 at \[1\], want ids in \[0, 9\)"),
        ):
            stats(tokens)(logits.to(target.device))

    def test_offsets_beyond_2_to_the_31(self, target, generator):
        """Rows 2^31 elements apart; memory between them is never touched, so it takes only address space."""
        if target.interpreted:
            pytest.skip("the interpreter copies its arguments")
        apart, vocab = 2**31 + 16, 300
        logits, tokens = draw((2,), vocab, generator, dtype=torch.bfloat16)
        far = torch.empty(apart + vocab, dtype=torch.bfloat16, device=target.device)
        far = far.as_strided((2, vocab), (apart, 1))
        far.copy_(logits)
        ours = stats(tokens)(far)
        near = stats(tokens)(logits.to(target.device))
        assert torch.equal(ours.logprob, near.logprob)
        assert torch.equal(ours.entropy, near.entropy)

    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
    def test_empty(self, target, shape):
        logits = torch.zeros(*shape, 5)
        ours = check_backend(
            stats(torch.zeros(shape, dtype=torch.int64)),
            [logits],
            backend=target.backend,
            device=target.device,
        )
        assert ours.outputs[0].shape == shape

    def test_same_bits_every_time(self, target, generator):
        logits, tokens = draw((7,), 3001, generator)
        runs = [
            evaluate(stats(tokens), [logits], backend=target.backend, device=target.device) for _ in range(3)
        ]
        for run in runs[1:]:
            for a, b in zip(
                [*runs[0].outputs, *runs[0].gradients], [*run.outputs, *run.gradients], strict=True
            ):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_against_torch_in_float64(self, target, generator, beta):
        logits, tokens = draw((8,), 301, generator, dtype=torch.float64)
        ref, _ = draw((8,), 301, generator, dtype=torch.float64)
        logits, ref = (x.to(target.device).requires_grad_() for x in (logits, ref))
        y = tokens.to(target.device)
        want = plain(logits, y, ref, 1.3, beta)
        got = rewardops.token_stats(
            logits, y, temperature=1.3, ref_logits=ref, outputs=EVERY, beta=beta
        )._asdict()
        # The interpreter's float64 arithmetic is exact; its exp2 and log are those of numpy.
        for name, expected in want.items():
            torch.testing.assert_close(
                got[name], expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
            ours = torch.autograd.grad(got[name].sum(), [logits, ref], retain_graph=True)
            theirs = torch.autograd.grad(expected.sum(), [logits, ref], retain_graph=True, allow_unused=True)
            for a, b in zip(ours, theirs, strict=True):
                b = torch.zeros_like(a) if b is None else b
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        top = (logits == logits.max(-1, keepdim=True).values).gather(-1, y[:, None])[:, 0]
        assert got["is_top1"].tolist() == top.tolist()

    @pytest.mark.parametrize("name", ["trl_linear_stats.npz", "trl_linear_stats_softcap.npz"])
    def test_recorded_pairs(self, target, shared, name):
        d = np.load(shared / "golden" / name)
        hidden, weight, bias = (torch.tensor(d[k], dtype=torch.float64) for k in ("hidden", "weight", "bias"))
        hidden.requires_grad_()
        logits = (hidden @ weight.T + bias).float().to(target.device)
        got = rewardops.token_stats(
            logits,
            torch.tensor(d["targets"]).to(target.device),
            temperature=float(d["temperature"]),
            softcap=float(d["softcap"]) or None,
            outputs=POLICY,
        )
        for ours, theirs in (
            (got.logprob, "logprob"),
            (got.entropy, "entropy"),
            (got.sum_p2.log(), "log_sum_sq_probs"),
            (got.mean_logit, "mean_logit"),
        ):
            torch.testing.assert_close(ours.cpu().detach(), torch.tensor(d[theirs]), rtol=2e-6, atol=5e-6)
        assert got.is_top1.tolist() == d["is_top1"].tolist()
        up = [torch.tensor(d[k]).to(target.device) for k in ("upstream_logprob", "upstream_entropy")]
        (grad,) = torch.autograd.grad([got.logprob, got.entropy], hidden, up)
        torch.testing.assert_close(grad.float(), torch.tensor(d["grad_hidden"]), rtol=1e-4, atol=1e-5)

    @given(
        shift=st.floats(-100, 100, width=32),
        rows=st.integers(1, 4),
        vocab=st.integers(1, 60),
        seed=st.integers(0, 10**6),
    )
    def test_property_shift_invariance_and_bounds(self, shift, rows, vocab, seed):
        logits, tokens = draw((rows,), vocab, torch.Generator().manual_seed(seed), dtype=torch.float64)
        here = rewardops.token_stats(logits, tokens)
        there = rewardops.token_stats(logits + shift, tokens)
        torch.testing.assert_close(here.logprob, there.logprob, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(here.entropy, there.entropy, rtol=1e-10, atol=1e-10)
        assert bool((here.entropy >= -1e-12).all())
        assert bool((here.entropy <= math.log(vocab) + 1e-12).all())
        assert bool((here.logprob <= 1e-12).all())

    def test_beats_eager_on_half_precision(self, target, generator):
        """bf16 logits: outputs are float32 and carry float32's error, not bf16's."""
        logits, tokens = draw((16,), 2000, generator, dtype=torch.bfloat16)
        exact = evaluate(stats(tokens), [logits], backend="reference", dtype=torch.float64)
        ours = evaluate(stats(tokens), [logits], backend=target.backend, device=target.device)
        assert [o.dtype for o in ours.outputs] == [torch.float32] * 6 + [torch.bool]
        assert ours.gradients[0].dtype is torch.bfloat16
        for name, a, b in zip(POLICY, ours.outputs, exact.outputs, strict=True):
            if name != "mean_logit":  # a sum that nearly cancels; another test compares it with eager's error
                assert_within_budget(a, b, ulps=16, name=name)

    # ---- with a reference's logits -------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab", [1, 2, 1000, 5003])
    def test_pairs_match_float64(self, target, generator, dtype, vocab):
        rows = 4 if target.interpreted else 7
        logits, tokens = draw((rows,), vocab, generator, dtype=dtype)
        ref, _ = draw((rows,), vocab, generator, dtype=dtype)
        fn = stats(tokens, outputs=EVERY, temperature=0.7, beta=0.3)
        check_backend(fn, [logits, ref], backend=target.backend, device=target.device)

    @pytest.mark.parametrize(
        "kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str
    )
    def test_a_reference_of_another_dtype(self, target, generator, kinds):
        logits, tokens = draw((5,), 2100, generator, dtype=kinds[0])
        ref, _ = draw((5,), 2100, generator, dtype=kinds[1])
        ours = check_backend(
            stats(tokens, outputs=EVERY), [logits, ref], backend=target.backend, device=target.device
        )
        assert [g.dtype for g in ours.gradients] == list(kinds)
        wide = rewardops.token_stats(
            logits.to(target.device),
            tokens.to(target.device),
            ref_logits=ref.double().to(target.device),
            outputs=["kl"],
        )
        assert wide.kl.dtype is torch.float64

    @pytest.mark.parametrize("scale", [0.1, 100.0])
    @pytest.mark.parametrize("offsets", [(1e4, 1e4), (1e4, -1e4), (0.0, -120.0)])
    def test_pairs_of_any_scale_and_offset(self, target, generator, scale, offsets):
        logits, tokens = draw((5,), 2500, generator, scale)
        ref, _ = draw((5,), 2500, generator, scale)
        inputs = [logits + offsets[0], ref + offsets[1]]
        check_backend(stats(tokens, outputs=EVERY), inputs, backend=target.backend, device=target.device)

    def test_kl_of_near_neighbours_beats_eager(self, target, generator):
        """A KL of 1e-6, as after one step of training: differences of log-probabilities lose most digits."""
        logits, tokens = draw((16,), 3000, generator)
        ref = logits + 1e-3 * torch.randn(logits.shape, generator=generator)
        exact = plain(logits.double(), tokens, ref.double(), 1.0, 0.5)["kl"]
        eager = plain(logits, tokens, ref, 1.0, 0.5)["kl"]
        ours = stats(tokens, outputs=("kl",))(logits.to(target.device), ref.to(target.device)).kl.cpu()
        assert exact.max() < 2e-6
        if target.backend != "reference":
            assert (ours - exact).abs().max() < 0.5 * (eager - exact).abs().max()

    def test_minus_infinity_in_pairs(self, target, generator):
        vocab = 3000
        logits, tokens = draw((7,), vocab, generator, scale=10.0)
        ref, _ = draw((7,), vocab, generator)
        logits[0, :1500] = ref[0, :1500] = -torch.inf  # in both: no contribution to a divergence
        ref[1, 7] = -torch.inf  # mass only in the policy, however little
        logits[1, 7] = logits[1].max() - 1000
        logits[2, :1100] = -torch.inf  # mass only in the reference
        logits[3, :2100] = -torch.inf  # both, in turn
        ref[3, 1500:] = -torch.inf
        ref[4, 1:] = logits[4, 1:] = -torch.inf  # one column left
        ref[6, 0] = logits[6, 0] = 50  # and one column of a block behind that of the largest
        ref[6, 1500] = logits[6, 1500] = -torch.inf
        ours = check_backend(
            stats(tokens, outputs=EVERY), [logits, ref], backend=target.backend, device=target.device
        )
        named = dict(zip(EVERY, ours.outputs, strict=True))
        assert named["kl"].isinf().tolist() == [False, True, False, True, False, False, False]
        assert named["reverse_kl"].isinf().tolist() == [False, False, True, True, False, False, False]
        assert named["kl"][4] == named["reverse_kl"][4] == named["jsd"][4] == 0
        assert named["jsd"].isfinite().all()
        assert all(g.isfinite().all() for g in ours.gradients)

    def test_masked_pairs_never_influence(self, target, generator):
        logits, tokens = draw((4, 5), 70, generator)
        ref, _ = draw((4, 5), 70, generator)
        mask = random_mask(4, 5, generator)
        fn = stats(tokens, mask, EVERY)
        clean = evaluate(fn, [logits, ref], backend=target.backend, device=target.device)
        dirty = [torch.where(mask[..., None], x, torch.nan) for x in (logits, ref)]
        ours = evaluate(fn, dirty, backend=target.backend, device=target.device, poison=mask)
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
        assert all(bool((o.cpu()[~mask] == 0).all()) for o in [*ours.outputs, *ours.gradients])

    def test_nan_in_either_row_of_a_pair_shows(self, target, generator):
        logits, tokens = draw((3,), 3000, generator)
        ref, _ = draw((3,), 3000, generator)
        logits[0, 2999] = torch.nan
        ref[1, 5] = torch.nan
        result = stats(tokens, outputs=EVERY)(logits.to(target.device), ref.to(target.device))
        for name in ("kl", "reverse_kl", "jsd"):
            assert getattr(result, name).isnan().tolist() == [True, True, False], name
        assert result.logprob.isnan().tolist() == [True, False, False]
        assert result.ref_logprob.isnan().tolist() == [False, True, False]

    def test_by_hand(self, target):
        """p = (.5, .3, .2) against q = (.2, .2, .6)."""
        p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
        logits, ref = p.log().to(target.device), q.log().to(target.device)
        for beta, jsd in ((0.1, 0.03464), (0.5, 0.09057), (0.9, 0.03225)):
            got = stats(torch.tensor([0]), outputs=EVERY, beta=beta)(logits, ref)
            assert got.jsd.item() == pytest.approx(jsd, abs=1e-5)
        assert got.kl.item() == pytest.approx(0.36006, abs=1e-5)
        assert got.reverse_kl.item() == pytest.approx(0.39482, abs=1e-5)
        assert got.sum_p2.item() == pytest.approx(0.38, abs=1e-6)
        moment = 0.25 * math.log(0.5) + 0.09 * math.log(0.3) + 0.04 * math.log(0.2)
        assert got.sum_p2_logp.item() == pytest.approx(moment, abs=1e-6)
        assert got.logprob.item() == pytest.approx(math.log(0.5), abs=1e-6)
        assert got.ref_logprob.item() == pytest.approx(math.log(0.2), abs=1e-6)
        assert got.mean_logit.item() == pytest.approx(math.log(0.03) / 3, abs=1e-6)
        assert got.is_top1.item()

    # ---- options -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("per", ["row", "token", "one"])
    def test_temperature_tensors(self, target, generator, per):
        logits, tokens = draw((3, 4), 300, generator)
        ref, _ = draw((3, 4), 300, generator)
        shape = {"row": (3,), "token": (3, 4), "one": ()}[per]
        t = torch.rand(shape, generator=generator) + 0.5
        fn = stats(tokens, outputs=EVERY, temperature=t)
        ours = check_backend(fn, [logits, ref], backend=target.backend, device=target.device)
        every = t.view(3, 1).expand(3, 4) if per == "row" else t.expand(3, 4)
        for b in range(3):
            for k in range(4):
                one = stats(tokens[b, k : k + 1], outputs=EVERY, temperature=every[b, k].item())
                want = evaluate(
                    one,
                    [logits[b, k : k + 1], ref[b, k : k + 1]],
                    backend=target.backend,
                    device=target.device,
                )
                for a, c in zip(ours.outputs, want.outputs, strict=True):
                    torch.testing.assert_close(a[b, k], c[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("softcap", [5.0, 30.0])
    def test_softcap(self, target, generator, softcap):
        logits, tokens = draw((5,), 1300, generator, scale=20.0)
        logits[1] *= 1e-3  # where tanh x and x differ only in the last digits
        logits[2, :4] = torch.tensor([-torch.inf, 1e4, -1e4, 0.0])
        ref, _ = draw((5,), 1300, generator, scale=20.0)
        fn = stats(tokens, outputs=EVERY, softcap=softcap, temperature=0.9)
        check_backend(fn, [logits, ref], backend=target.backend, device=target.device)
        got = fn(logits.to(target.device), ref.to(target.device))
        want = plain(*(softcap * torch.tanh(x.double() / softcap) if x.is_floating_point() else x
                       for x in (logits, tokens, ref)), 0.9, 0.5)  # fmt: skip
        for name, expected in want.items():
            torch.testing.assert_close(getattr(got, name).cpu().double(), expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("vocab", [1, 40, 2047])
    def test_columns_beyond_vocab_size_do_not_exist(self, target, generator, vocab):
        logits, tokens = draw((4,), vocab, generator)
        ref, _ = draw((4,), vocab, generator)
        want = evaluate(
            stats(tokens, outputs=EVERY), [logits, ref], backend=target.backend, device=target.device
        )
        padding = torch.full((4, 33), torch.nan)
        padded = [torch.cat([x, padding], 1) for x in (logits, ref)]
        fn = stats(tokens, outputs=EVERY, vocab_size=vocab)
        ours = evaluate(fn, padded, backend=target.backend, device=target.device)
        for a, b in zip(ours.outputs, want.outputs, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(ours.gradients, want.gradients, strict=True):
            assert torch.equal(a[:, :vocab], b)
            assert bool((a[:, vocab:] == 0).all())
        beyond = rewardops.token_stats(
            padded[0].to(target.device), torch.full((4,), vocab, device=target.device), vocab_size=vocab
        )
        assert beyond.logprob.isnan().all()

    def test_ignored_tokens_are_masked(self, target, generator):
        logits, tokens = draw((6,), 500, generator)
        ignored = torch.tensor([False, True, False, False, True, False])
        logits[ignored] = torch.nan
        marked = torch.where(ignored, -100, tokens)
        ours = evaluate(stats(marked), [logits], backend=target.backend, device=target.device)
        want = evaluate(stats(tokens, ~ignored), [logits], backend=target.backend, device=target.device)
        for a, b in zip([*ours.outputs, *ours.gradients], [*want.outputs, *want.gradients], strict=True):
            assert torch.equal(a, b)
        with rewardops.debug():
            stats(marked)(logits.to(target.device))

    def test_ties_at_the_top_all_count(self, target):
        logits = torch.zeros(4, 2500, device=target.device)
        logits[:, 3] = logits[:, 2400] = 2.0
        got = rewardops.token_stats(
            logits, torch.tensor([3, 2400, 5, 3], device=target.device), outputs=["is_top1"]
        )
        assert got.is_top1.dtype is torch.bool
        assert got.is_top1.tolist() == [True, True, False, True]

    # ---- the gradient over the logits ----------------------------------------------------------------------

    @pytest.mark.parametrize("with_ref", [False, True])
    @pytest.mark.parametrize("view", ["whole", "sequence", "columns"])
    def test_inplace_backward(self, target, generator, view, with_ref):
        cut = {
            "whole": lambda x: x,
            "sequence": lambda x: x[:, :-1],
            "columns": lambda x: x[..., ::2],
        }[view]
        base, _ = draw((2, 4), 130, generator)
        ref = draw(cut(base).shape[:-1], cut(base).shape[-1], generator)[0].to(target.device)
        base = base.to(target.device)
        tokens = torch.randint(0, 60, cut(base).shape[:-1], generator=generator).to(target.device)
        options = {"outputs": EVERY if with_ref else POLICY, "ref_logits": ref if with_ref else None}
        results = []
        for inplace in (False, True):
            logits = cut(base.clone()).detach().requires_grad_()
            got = rewardops.token_stats(logits, tokens, inplace_backward=inplace, **options)
            loss = sum(o.sum() for o in got if o is not None and o.requires_grad)
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
            results.append(grad.clone())
            assert (grad.data_ptr() == logits.data_ptr()) == inplace
            if inplace:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(loss, logits)
        assert torch.equal(*results)

    def test_the_op_that_writes_over_the_logits_says_so(self, target, generator):
        """Its schema declares the mutated argument, and its fake agrees."""
        logits, tokens = (x.to(target.device) for x in draw((3,), 20, generator))
        ref = logits.flip(0).clone()
        options = (1.0, 0.0, 0, 20, 0.5, ["logprob", "kl"])
        saved, *outputs = torch.ops.rewardops.token_stats(logits, tokens, ref, None, None, *options, True)
        grads = [torch.ones_like(o) for o in outputs]
        args = (grads, saved, logits, tokens, ref, None, None, *options, True, True)
        torch.library.opcheck(torch.ops.rewardops.token_stats_backward_.default, args)

    # ---- memory and addresses ------------------------------------------------------------------------------

    def test_nothing_of_the_size_of_the_logits_is_allocated(self, target, generator):
        if target.backend != "cpp":
            pytest.skip("the specification copies, and the interpreter's memory is numpy's")
        logits, tokens = draw((64,), 20000, generator)
        ref, _ = draw((64,), 20000, generator)
        size = logits.numel() * 4
        whole = logits.requires_grad_()
        taken, got = allocated(lambda: stats(tokens, outputs=EVERY)(whole, ref))
        assert 0 < taken < 0.01 * size
        up = torch.ones(64)
        taken, _ = allocated(lambda: torch.autograd.grad([got.logprob, got.kl], whole, [up, up]))
        assert size <= taken < 1.01 * size
        got = stats(tokens, inplace_backward=True)(whole)
        taken, _ = allocated(lambda: torch.autograd.grad([got.logprob, got.entropy], whole, [up, up]))
        assert taken < 0.01 * size

    def test_row_offsets_are_64_bit(self, target):
        """The arithmetic of the kernels' addresses, far beyond any memory."""
        if target.backend != "triton":
            pytest.skip("Triton's")
        # 64-bit strides, and 32-bit strides whose multiples exceed 32 bits.
        for outer, inner in ((3 * 2**33, 2**31 + 16), (2**31 - 16, 2**30 + 16)):
            out = torch.zeros(16, dtype=torch.int64, device=target.device)
            write_offsets[(16,)](out, 4, outer, inner)
            assert out.tolist() == [n // 4 * outer + n % 4 * inner for n in range(16)]
