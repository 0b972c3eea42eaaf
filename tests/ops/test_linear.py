"""linear_token_stats and linear_token_loss on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rewardops
from rewardops.core import chunked, heads
from rewardops.cpp import logits as kernels
from rewardops.reference import token_records as spec
from rewardops.reference.linear import LinearArgs
from rewardops.reference.logits import TokenStatsArgs, token_stats_partial
from rewardops.testing import assert_within_budget, evaluate

EVERY = rewardops.logits.OUTPUTS
POLICY = EVERY[:7]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


def draw(generator, tokens=(11,), hidden=8, vocab=130, ref=6, dtype=torch.float32):
    """Hidden states, heads and biases of two models, and tokens."""

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {"hidden": rand(*tokens, hidden), "weight": rand(vocab, hidden), "bias": rand(vocab)}
    if ref:
        inputs |= {"ref_hidden": rand(*tokens, ref), "ref_weight": rand(vocab, ref), "ref_bias": rand(vocab)}
    return inputs, torch.randint(0, vocab, tokens, generator=generator)


def plain(inputs, tokens, outputs, logit_scale=1.0, **options):
    """The plain version: token_stats of all logits."""

    def logits(side):
        parts = (inputs.get(f"{side}{name}") for name in ("hidden", "weight", "bias"))
        return logit_scale * torch.nn.functional.linear(*parts)

    ref = logits("ref_") if "ref_hidden" in inputs else None
    return rewardops.token_stats(logits(""), tokens, ref_logits=ref, outputs=outputs, **options)


def ours(inputs, tokens, outputs, **options):
    rest = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}
    return rewardops.linear_token_stats(
        inputs["hidden"], inputs["weight"], tokens, outputs=outputs, **rest, **options
    )


def outcome(fn, inputs, tokens, outputs, device="cpu", **options):
    """Outputs, and the gradients of every input."""
    leaves = {k: v.detach().to(device).requires_grad_() for k, v in inputs.items()}
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = fn(leaves, tokens.to(device), outputs, **options)
    values = {k: v for k, v in got._asdict().items() if v is not None}
    smooth = [v for k, v in values.items() if k != "is_top1"]
    g = torch.Generator().manual_seed(5)
    ups = [torch.randn(v.shape, generator=g).to(v) for v in smooth]
    grads = torch.autograd.grad(smooth, list(leaves.values()), ups, allow_unused=True)
    grads = {
        k: torch.zeros_like(v) if x is None else x for (k, v), x in zip(leaves.items(), grads, strict=True)
    }
    return values, grads


def check(target, inputs, tokens, outputs, **options):
    """Compare with float64, within the error of the plain formula in this precision, logits rounded or not."""
    chunks = {k: options.pop(k) for k in ("chunk_tokens", "chunk_vocab", "num_tokens") if k in options}
    got, grads = outcome(ours, inputs, tokens, outputs, target.device, **options, **chunks)
    with rewardops.use_backend("reference"):
        exact, exact_grads = outcome(
            plain, {k: v.double() for k, v in inputs.items()}, tokens, outputs, **options
        )
        eager, eager_grads = outcome(plain, inputs, tokens, outputs, **options)
    for name in outputs:
        if name == "is_top1":
            # Ties of logits depend on the rounding of matmuls.
            wide = inputs["hidden"].dtype in (torch.float32, torch.float64)
            assert not wide or got[name].tolist() == exact[name].tolist()
            continue
        assert got[name].dtype == (
            torch.float64 if inputs["hidden"].dtype is torch.float64 else torch.float32
        )
        assert_within_budget(got[name], exact[name], eager[name], ulps=32, name=name)
    for name in inputs:
        assert grads[name].dtype == inputs[name].dtype
        assert_within_budget(grads[name], exact_grads[name], eager_grads[name], ulps=32, name=f"d {name}")


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.untyped_storage().nbytes())
        return out


class Test_linear_token_stats:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("chunks", [(None, None), (4, 64), (3, 130), (11, 37)])
    def test_matches_float64(self, target, generator, dtype, chunks):
        inputs, tokens = draw(generator, dtype=dtype, ref=0)
        check(target, inputs, tokens, POLICY, chunk_tokens=chunks[0], chunk_vocab=chunks[1], temperature=0.8)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("outputs", [EVERY[:10], ("logprob", "kl", "jsd")], ids=["records", "jsd"])
    def test_two_models(self, target, generator, dtype, outputs):
        inputs, tokens = draw(generator, dtype=dtype)
        check(target, inputs, tokens, outputs, chunk_tokens=4, chunk_vocab=64)

    @pytest.mark.parametrize("outputs", [("logprob", "entropy", "kl"), ("logprob", "jsd")])
    def test_every_option(self, target, generator, outputs):
        inputs, tokens = draw(generator, (3, 5))
        mask = torch.rand(3, 5, generator=generator) > 0.4
        tokens[0, 0] = -100
        temperature = torch.rand(3, 5, generator=generator) + 0.5
        options = dict(softcap=7.0, temperature=temperature, logit_scale=0.6, vocab_size=121, mask=mask)
        inputs["hidden"] = inputs["hidden"].masked_fill(~mask[..., None], torch.nan)
        zeroed = {**inputs, "hidden": inputs["hidden"].nan_to_num(0)}
        got, grads = outcome(
            ours, inputs, tokens % 121, outputs, target.device, chunk_tokens=4, chunk_vocab=32, **options
        )
        with rewardops.use_backend("reference"):
            want, want_grads = outcome(
                plain, {k: v.double() for k, v in zeroed.items()}, tokens % 121, outputs, **options
            )
        for name in outputs:
            torch.testing.assert_close(got[name].cpu().double(), want[name], rtol=2e-5, atol=2e-5)
            assert not got[name][~mask.to(got[name].device)].any()
        for name in NAMES:
            torch.testing.assert_close(grads[name].cpu().double(), want_grads[name], rtol=5e-5, atol=5e-5)
        assert not grads["weight"][121:].any()

    def test_number_of_tokens_given(self, target, generator):
        inputs, tokens = draw(generator, (4, 6), ref=0)
        mask = torch.rand(4, 6, generator=generator) > 0.5
        mask[-1, -1] = False
        inputs["hidden"][-1, -1] = torch.nan  # a row read in place of those beyond the valid tokens
        count = int(mask.sum())
        want = outcome(ours, inputs, tokens, ("logprob", "entropy"), target.device, mask=mask)
        for hint in (count, count + 3, 24, 30):
            got = outcome(
                ours, inputs, tokens, ("logprob", "entropy"), target.device, mask=mask, num_tokens=hint
            )
            for a, b in zip(got, want, strict=True):
                for name in a:
                    torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)
        if target.device.type == "cpu":
            with pytest.raises(ValueError, match=rf"num_tokens: got {count - 1}, want at least {count} "):
                ours(inputs, tokens, ("logprob",), mask=mask, num_tokens=count - 1)

    @pytest.mark.parametrize("shape", [(0,), (3,), (2, 0)])
    @pytest.mark.parametrize("outputs", [("logprob", "entropy"), ("logprob", "jsd")])
    def test_no_token_counts(self, target, generator, shape, outputs):
        inputs, tokens = draw(generator, shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        got, grads = outcome(ours, inputs, tokens, outputs, target.device, mask=mask)
        for name in outputs:
            assert got[name].shape == shape
            assert not got[name].any()
        for name in NAMES:
            assert grads[name].shape == inputs[name].shape
            assert not grads[name].any()

    def test_rows_of_padding_may_hold_anything(self, target, generator):
        hidden, weight = torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator)
        tokens, mask = torch.randint(0, 4, (5,), generator=generator), torch.tensor([1, 0, 1, 1, 0]).bool()

        def fn(h, w):
            where = {"mask": mask.to(h.device), "vocab_size": 4}
            return rewardops.linear_token_stats(h, w, tokens.to(h.device), **where)[:2]

        clean = evaluate(fn, [hidden, weight], backend=target.backend, device=target.device)
        hidden[~mask], weight[4:] = torch.nan, torch.inf
        ours = evaluate(fn, [hidden, weight], backend=target.backend, device=target.device)
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)

    def test_tokens_out_of_range_and_infinite_logits(self, target, generator):
        inputs, tokens = draw(generator, ref=0)
        tokens[3] = 500
        inputs["bias"][7] = -torch.inf
        tokens[4] = 7
        got, grads = outcome(
            ours, inputs, tokens, ("logprob", "entropy"), target.device, chunk_vocab=32, chunk_tokens=4
        )
        assert got["logprob"][3].isnan()
        assert got["logprob"][4] == -torch.inf
        assert got["entropy"].isfinite().all()
        assert grads["hidden"][3].isnan().all()
        assert grads["hidden"][:3].isfinite().all()

    @pytest.mark.parametrize("name", ["trl_linear_stats.npz", "trl_linear_stats_softcap.npz"])
    def test_recorded_pairs(self, target, shared, name):
        d = {k: torch.tensor(v) for k, v in np.load(shared / "golden" / name).items()}
        leaves = [d[k].to(target.device).requires_grad_() for k in ("hidden", "weight", "bias")]
        got = rewardops.linear_token_stats(
            leaves[0],
            leaves[1],
            d["targets"].to(target.device),
            bias=leaves[2],
            temperature=float(d["temperature"]),
            softcap=float(d["softcap"]) or None,
            outputs=POLICY,
            chunk_vocab=256,
            chunk_tokens=16,
        )
        for value, theirs in (
            (got.logprob, "logprob"),
            (got.entropy, "entropy"),
            (got.sum_p2.log(), "log_sum_sq_probs"),
            (got.mean_logit, "mean_logit"),
        ):
            torch.testing.assert_close(value.cpu().detach(), d[theirs], rtol=2e-6, atol=5e-6)
        assert got.is_top1.tolist() == d["is_top1"].tolist()
        up = [d[k].to(target.device) for k in ("upstream_logprob", "upstream_entropy")]
        grads = torch.autograd.grad([got.logprob, got.entropy], leaves, up)
        for grad, theirs in zip(grads, ("grad_hidden", "grad_weight", "grad_bias"), strict=True):
            torch.testing.assert_close(grad.cpu(), d[theirs], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
    def test_any_subset_of_gradients(self, target, generator, needs):
        inputs, tokens = draw(generator, ref=0)
        want = outcome(ours, inputs, tokens, ("logprob",), target.device)[1]
        leaves = {
            k: v.to(target.device).requires_grad_(bool(n))
            for (k, v), n in zip(inputs.items(), needs, strict=True)
        }
        got = ours(leaves, tokens.to(target.device), ("logprob",))
        up = torch.randn(got.logprob.shape, generator=torch.Generator().manual_seed(5)).to(got.logprob)
        got.logprob.backward(up)
        for (name, leaf), need in zip(leaves.items(), needs, strict=True):
            if need:
                torch.testing.assert_close(leaf.grad, want[name], rtol=1e-5, atol=1e-6)
            else:
                assert leaf.grad is None

    def test_tied_weights_and_strided_hidden_states(self, target, generator):
        """The embedding's gradient has both parts, and shifted hidden states are read without a copy."""
        weight = torch.randn(50, 8, generator=generator)
        ids = torch.randint(0, 50, (3, 7), generator=generator).to(target.device)
        grads = []
        for fn in (ours, plain):
            tied = weight.to(target.device).requires_grad_()
            hidden = torch.nn.functional.embedding(ids, tied).tanh()[:, :-1]
            fn(
                {"hidden": hidden, "weight": tied}, ids[:, 1:], ("logprob", "entropy")
            ).logprob.sum().backward()
            grads.append(tied.grad)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

    def test_precisions_that_differ(self, target, generator):
        inputs, tokens = draw(generator, ref=0)
        mixed = {**inputs, "hidden": inputs["hidden"].bfloat16()}
        rounded = {**inputs, "hidden": inputs["hidden"].bfloat16().float()}
        got, grads = outcome(
            ours, mixed, tokens, ("logprob", "entropy"), target.device, chunk_tokens=4, chunk_vocab=50
        )
        want, want_grads = outcome(ours, rounded, tokens, ("logprob", "entropy"), target.device)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
        assert grads["hidden"].dtype is torch.bfloat16
        assert grads["weight"].dtype is torch.float32
        torch.testing.assert_close(grads["weight"], want_grads["weight"], rtol=1e-4, atol=1e-5)

    def test_autocast(self, target, generator):
        inputs, tokens = draw(generator, ref=0)
        half = {k: v.bfloat16() for k, v in inputs.items()}
        want, want_grads = outcome(ours, half, tokens, ("logprob",), target.device)
        with torch.autocast(target.device.type, dtype=torch.bfloat16):
            got, grads = outcome(ours, inputs, tokens, ("logprob",), target.device)
        assert torch.equal(got["logprob"], want["logprob"])
        for name, g in grads.items():
            assert g.dtype is torch.float32
            assert torch.equal(g, want_grads[name].float())

    def test_bfloat16_sums_do_not_drift(self, target, generator):
        """Sums over many blocks are as close to float64 as one bfloat16 matmul."""
        vocab = 64 if target.interpreted else 1024
        inputs, tokens = draw(generator, (64,), hidden=16, vocab=vocab, ref=0, dtype=torch.bfloat16)
        up = torch.ones(64)
        worst = []
        for chunks in ((64, 1024), (2, 32)):
            leaves = {k: v.detach().clone().to(target.device).requires_grad_() for k, v in inputs.items()}
            out = ours(
                leaves, tokens.to(target.device), ("logprob",), chunk_tokens=chunks[0], chunk_vocab=chunks[1]
            )
            out.logprob.backward(up.to(target.device))
            exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
            with rewardops.use_backend("reference"):
                plain(exact, tokens, ("logprob",)).logprob.backward(up.double())
            off = (leaves["weight"].grad.cpu().double() - exact["weight"].grad).abs().max()
            worst.append(float(off / exact["weight"].grad.abs().max()))
        assert worst[1] < max(2 * worst[0], 2**-8)

    @pytest.mark.parametrize("products", ["bfloat16", "float32"])
    @pytest.mark.parametrize("chunks", [(None, None), (40, 96)], ids=["whole", "blocks"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"softcap": 4.0},
            {"temperature": 0.7},
            {"logit_scale": 0.5, "softcap": 6.0, "temperature": 1.3},
        ],
        ids=["plain", "softcap", "temperature", "all"],
    )
    def test_a_bias_is_rounded_once(self, target, generator, monkeypatch, options, chunks, products):
        """No further off than the plain formula with a linear layer, with and without products of bfloat16."""
        if target.interpreted and (options or products == "bfloat16"):
            pytest.skip(
                "the products are the same, and the interpreter cuts bfloat16 off instead of rounding"
            )
        monkeypatch.setattr(heads, "multiplies_bfloat16", lambda: products == "bfloat16")
        vocab = 200 if target.interpreted else 800
        inputs, tokens = draw(generator, (128,), hidden=32, vocab=vocab, ref=0, dtype=torch.bfloat16)
        inputs["weight"] /= 6
        up = torch.randn(tokens.shape, generator=generator)
        scale, cap = options.get("logit_scale", 1.0), options.get("softcap")

        def formula(hidden, weight, bias):
            z = torch.nn.functional.linear(hidden, weight, bias)
            z = z * scale if scale != 1.0 else z
            z = cap * torch.tanh(z / cap) if cap else z
            z = z / options["temperature"] if "temperature" in options else z
            z = z.float() if z.dtype is torch.bfloat16 else z
            return z.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

        def blocks(hidden, weight, bias):
            return rewardops.linear_token_stats(
                hidden, weight, tokens.to(target.device), bias=bias, outputs=("logprob",), chunk_tokens=chunks[0],
                chunk_vocab=chunks[1], **options,
            ).logprob  # fmt: skip

        def run(fn, dtype, device="cpu"):
            leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs.values()]
            out = fn(*leaves)
            grads = torch.autograd.grad(out, leaves, up.to(out))
            return [x.detach().cpu().double() for x in (out, *grads)]

        exact, eager = run(formula, torch.float64), run(formula, torch.bfloat16)
        for got, want, plainly in zip(run(blocks, torch.bfloat16, target.device), exact, eager, strict=True):
            assert (got - want).square().mean() <= 1.05 * (plainly - want).square().mean()

    def test_a_bias_in_a_wider_precision(self, target, generator):
        """A float32 bias of a bfloat16 head is not rounded to bfloat16."""
        inputs, tokens = draw(generator, ref=0, dtype=torch.bfloat16)
        inputs["bias"] = inputs["bias"].float() + 1000 * torch.rand(130, generator=generator)
        x = inputs["hidden"].double() @ inputs["weight"].double().T
        want = (x + inputs["bias"].double()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        here = {k: v.to(target.device) for k, v in inputs.items()}
        got = ours(here, tokens.to(target.device), ("logprob",)).logprob.cpu().double()
        assert (got - want).abs().max() < 0.05  # the product may be rounded, to 2^-9 of about 10

    @pytest.mark.parametrize("backward", [False, True])
    def test_nothing_of_the_size_of_the_logits(self, generator, backward):
        if rewardops.core.native.compiled_module() is None:
            pytest.skip("not built")
        n, d, v = 512, 16, 65536
        hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
        tokens = torch.randint(0, v, (n,), generator=generator)
        args = LinearArgs(
            hidden, weight, None, None, None, None, tokens, None, None,
            1.0, 0.0, 0, v, 0.5, ["logprob"], 0, 0, -1,
        )  # fmt: skip
        with Largest() as mode:
            saved, out = chunked.linear_token_stats(kernels, args)
            if backward:
                needs = [True, True, False, False, False, False]
                ups = [torch.ones_like(out)]
                chunked.linear_token_stats_backward(kernels, ups, saved, args, needs)
        workspace = heads.workspace_bytes(n, v, hidden.device)
        assert mode.found <= workspace < n * v * 4 / 3


class Test_linear_token_loss:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_loss_is_the_same_in_three_products(self, target, generator, dtype, masked):
        inputs, tokens = draw(generator, (3, 5), dtype=dtype)
        mask = torch.rand(3, 5, generator=generator) > 0.4 if masked else None
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        co = {n: torch.randn(3, 5, generator=generator, dtype=wide) for n in ("logprob", "entropy", "kl")}
        if masked:
            co["entropy"] = co["entropy"].masked_fill(~mask, torch.nan)
        here = {k: v.to(target.device) for k, v in inputs.items()}
        fixed = {k: v for k, v in here.items() if k.startswith("ref_")}
        options = {"mask": None if mask is None else mask.to(target.device), "temperature": 0.9, **fixed}
        co = {k: v.to(target.device) for k, v in co.items()}

        leaves = [here[k].clone().requires_grad_() for k in NAMES[:3]]
        loss, stats = rewardops.linear_token_loss(
            leaves[0], leaves[1], tokens.to(target.device), co, bias=leaves[2], outputs=("is_top1", "logprob"),
            chunk_tokens=4, **options,
        )  # fmt: skip
        (3 * loss).backward()
        other = [here[k].clone().requires_grad_() for k in NAMES[:3]]
        got = rewardops.linear_token_stats(
            other[0], other[1], tokens.to(target.device), bias=other[2],
            outputs=("logprob", "entropy", "kl", "is_top1"), **options,
        )  # fmt: skip
        live = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
        want = sum(torch.where(live.to(target.device), c, 0) * getattr(got, n) for n, c in co.items()).sum()
        (3 * want).backward()
        tight = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(loss, want, **tight)
        assert loss.dtype == wide
        for a, b in zip(leaves, other, strict=True):
            torch.testing.assert_close(a.grad, b.grad, **tight)
        torch.testing.assert_close(stats.logprob, got.logprob.detach(), **tight)
        assert stats.is_top1.dtype is torch.bool
        assert not stats.logprob.requires_grad
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
            loss.backward()

    def test_loss_without_gradients(self, target, generator):
        inputs, tokens = draw(generator, ref=0)
        with torch.no_grad():
            loss, _ = rewardops.linear_token_loss(
                inputs["hidden"].to(target.device), inputs["weight"].to(target.device), tokens.to(target.device),
                {"logprob": torch.ones(tokens.shape).to(target.device)},
            )  # fmt: skip
        assert not loss.requires_grad

    def test_several_upstream_gradients_at_once(self, target, generator):
        """The gradients of the forward pass are scaled in place for one upstream gradient only."""
        inputs, tokens = draw(generator, ref=0)
        hidden, weight = (inputs[k].to(target.device).requires_grad_() for k in ("hidden", "weight"))
        one = {"logprob": torch.ones(tokens.shape, device=target.device)}

        def loss():
            return rewardops.linear_token_loss(hidden, weight, tokens.to(target.device), one)[0]

        ups = torch.tensor([1.0, -2.0, 0.5], device=target.device)
        got = torch.autograd.grad(loss(), [hidden, weight], ups, is_grads_batched=True)
        want = torch.autograd.grad(loss(), [hidden, weight])
        for several, single in zip(got, want, strict=True):
            torch.testing.assert_close(several, ups[:, None, None] * single)


class Test_linear_token_stats_partial:
    def test_gradient_of_records_is_autograds(self, generator):
        inputs, tokens = draw(generator)
        x, y = (inputs[f"{s}hidden"].double() @ inputs[f"{s}weight"].double().T for s in ("", "ref_"))
        names = list(rewardops.logits.PARTIAL_OUTPUTS)
        record = token_stats_partial(
            TokenStatsArgs(x, tokens, y, None, None, 0.7, 0.0, 0, x.shape[1], 0.5, names)
        )
        record.requires_grad_()
        result = spec.finish(spec.merge(record[None]), names)
        smooth = [n for n in names if n != "is_top1"]
        ups = {n: torch.randn(tokens.shape, generator=generator, dtype=torch.float64) for n in smooth}
        (want,) = torch.autograd.grad([result[n] for n in smooth], record, list(ups.values()))
        got = spec.record_gradient(record.detach(), ups)
        # Shifted logits change the record's maximum and the sums relative to it.
        free = [k for k, n in enumerate(spec.RECORD) if "shift" not in n and n not in ("columns", "found")]
        torch.testing.assert_close(got[:, free], want[:, free], rtol=1e-12, atol=1e-12)


class Test_linear_token_stats_linear_token_loss:
    def test_bad_arguments(self):
        hidden, weight, tokens = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
        stats, loss = rewardops.linear_token_stats, rewardops.linear_token_loss
        with pytest.raises(ValueError, match=r"weight: got shape \[5, 3\], want \[V, 4\]"):
            stats(hidden, torch.zeros(5, 3), tokens)
        with pytest.raises(ValueError, match=r"hidden: got shape \[3\], want \[N, D\]"):
            stats(torch.zeros(3), weight, tokens)
        with pytest.raises(ValueError, match=r"tokens: got shape \[2\], want \[3\]"):
            stats(hidden, weight, tokens[:2])
        with pytest.raises(ValueError, match=r"bias: got shape \[4\], want \[5\]"):
            stats(hidden, weight, tokens, bias=torch.zeros(4))
        with pytest.raises(ValueError, match="ref_weight: got None with ref_hidden"):
            stats(hidden, weight, tokens, ref_hidden=hidden)
        with pytest.raises(ValueError, match=r"ref_weight: got shape \[6, 4\], want \[5, 4\]"):
            stats(hidden, weight, tokens, ref_hidden=hidden, ref_weight=torch.zeros(6, 4), outputs=("kl",))
        with pytest.raises(ValueError, match="outputs: got 'kl' without ref"):
            stats(hidden, weight, tokens, outputs=("kl",))
        with pytest.raises(ValueError, match="logit_scale: got 0"):
            stats(hidden, weight, tokens, logit_scale=0)
        with pytest.raises(ValueError, match="chunk_vocab: got 0, want at least 1"):
            stats(hidden, weight, tokens, chunk_vocab=0)
        with pytest.raises(TypeError, match=r"weight: got dtype torch\.int64"):
            stats(hidden, weight.long(), tokens)
        with pytest.raises(ValueError, match="vocab_size: got 6, want 1 to 5"):
            stats(hidden, weight, tokens, vocab_size=6)
        with pytest.raises(ValueError, match="coefficients: got none"):
            loss(hidden, weight, tokens, {})
        with pytest.raises(ValueError, match="coefficients: got 'is_top1'"):
            loss(hidden, weight, tokens, {"is_top1": torch.zeros(3)})
        with pytest.raises(ValueError, match=r"coefficients\['logprob'\]: got shape \[2\], want \[3\]"):
            loss(hidden, weight, tokens, {"logprob": torch.zeros(2)})

    def test_arguments_of_ops_that_do_not_fit(self, target, generator):
        """Ops called without the public functions raise, before a kernel reads or writes beyond a tensor."""
        ops = torch.ops.rewardops
        inputs, tokens = draw(generator)
        good = {k: v.to(target.device) for k, v in inputs.items()} | {
            "tokens": tokens.to(target.device), "mask": torch.ones(11, dtype=torch.bool, device=target.device),
            "temperatures": torch.ones(11, dtype=torch.float64, device=target.device), "temperature": 1.0,
            "softcap": 0.0, "first": 0, "vocab": 130, "beta": 0.5, "outputs": ["logprob", "kl"],
            "chunk_tokens": 0, "chunk_vocab": 0, "num_tokens": -1,
        }  # fmt: skip
        saved, *outputs = ops.linear_token_stats(**good)
        record = ops.linear_token_stats_partial(**good)
        grads = [torch.ones_like(o) for o in outputs]
        calls = {
            "linear_token_stats": {}, "linear_token_stats_partial": {},
            "linear_token_stats_backward": {"grads": grads, "saved": saved, "needs": [True] * 6},
            "linear_token_stats_partial_backward": {
                "grad_record": torch.ones_like(record), "record": record, "needs": [True] * 6,
            },
            "linear_token_loss": {"coefficients": grads, "terms": ["logprob", "kl"], "needs": [True] * 3},
        }  # fmt: skip
        bad = {
            "hidden": [good["hidden"][:5], good["hidden"][:, :3]], "weight": [good["weight"][:, :3]],
            "bias": [good["bias"][:1], good["bias"].repeat(2)], "ref_hidden": [None, good["ref_hidden"][:5]],
            "ref_weight": [good["ref_weight"][:50]], "ref_bias": [good["ref_bias"][:1]],
            "tokens": [good["tokens"][:5], good["tokens"].int()], "mask": [good["mask"][:5], good["mask"].long()],
            "temperatures": [good["temperatures"][:1], good["temperatures"].float()],
            "vocab": [131, -1], "first": [-1], "outputs": [["kl", "kl"], ["perplexity"]], "chunk_vocab": [-1],
        }  # fmt: skip
        for op, rest in calls.items():
            for name, values in bad.items():
                for value in values:
                    with pytest.raises((ValueError, TypeError)):
                        getattr(ops, op)(**(good | {name: value}), **rest)
        wrong = {
            "grads": [grads[:1], [grads[0][:5], None]], "saved": [saved[:5], saved[:, :5]], "needs": [[True]],
            "record": [record[:5], record[:, :5]], "grad_record": [record[:5], record.float()],
            "coefficients": [grads[:1], [g[:5] for g in grads]],
        }  # fmt: skip
        for op, rest in calls.items():
            for name in rest.keys() & wrong.keys():
                for value in wrong[name]:
                    with pytest.raises((ValueError, TypeError)):
                        getattr(ops, op)(**good, **(rest | {name: value}))
