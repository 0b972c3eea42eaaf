"""token_kl on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rewardops
from rewardops.kl import ESTIMATORS
from rewardops.testing import check_backend, evaluate, pack, random_mask


def kl(estimator, mask=None):
    def fn(logprob, ref):
        m = None if mask is None else mask.to(logprob.device)
        return rewardops.token_kl(logprob, ref, estimator=estimator, mask=m)

    return fn


class Test_token_kl:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(5, 37), (211,)], ids=["padded", "packed"])
    def test_matches_float64(self, target, generator, estimator, dtype, shape):
        logprob = (-torch.rand(shape, generator=generator) * 5).to(dtype)
        ref = (logprob + torch.randn(shape, generator=generator) * 0.5).clamp(max=-0.01).to(dtype)
        check_backend(kl(estimator), [logprob, ref], backend=target.backend, device=target.device)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("live", [False, True])
    def test_every_option(self, target, generator, estimator, live):
        """Importance weights, factor, rewards and clamps in one pass, with the gradients of the plain formula."""
        logprob, ref, old = (
            -torch.rand(6, 41, generator=generator, dtype=torch.float64) * 4 - 0.05 for _ in range(3)
        )
        rewards = torch.randn(6, 41, generator=generator, dtype=torch.float64)
        mask = random_mask(6, 41, generator)
        largest_d, largest_value, beta, cap = 1.5, 0.8, 0.3, 3.0

        def plain(lp, r, extra):
            w = (lp - old).clamp(-largest_d, largest_d).exp().clamp(max=cap)
            w = w if live else w.detach()
            whole = lp - r
            d = whole.clamp(-largest_d, largest_d)
            k = {
                "k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "k1_plus": d,
                "k3_plus": (-d).exp() - 1 + d, "binary_tv": (lp.exp() - r.exp()).abs(),
                "binary_kl": lp.exp() * whole + (1 - lp.exp()) * ((1 - lp.exp()) / (1 - r.exp())).log(),
            }[estimator].clamp(-largest_value, largest_value)  # fmt: skip
            if estimator.endswith("plus"):
                inside = (whole.abs() <= largest_d) & (k.abs() < largest_value)
                k = k.detach() + torch.where(inside, whole**2 / 2 - (whole**2 / 2).detach(), 0)
            return torch.where(mask, extra - beta * w * k, 0)

        def ours(lp, r, extra):
            there = {k: v.to(lp.device) for k, v in {"old_logprob": old.to(lp.dtype), "mask": mask}.items()}
            return rewardops.token_kl(
                lp, r, estimator=estimator, clamp=(largest_d, largest_value), ratio_grad=live, beta=beta,
                ratio_cap=cap, rewards=extra, **there,
            )  # fmt: skip

        leaves = [x.clone().requires_grad_() for x in (logprob, ref, rewards)]
        up = torch.randn(6, 41, generator=generator, dtype=torch.float64)
        want = plain(*leaves)
        grads = torch.autograd.grad(want, leaves, up)
        here = [x.detach().float().to(target.device).requires_grad_() for x in leaves]
        got = ours(*here)
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=2e-5, atol=2e-6)
        for a, b in zip(torch.autograd.grad(got, here, up.float().to(target.device)), grads, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k1_plus", "k3_plus"])
    def test_extreme_differences_are_finite_under_a_clamp(self, target, estimator):
        d = torch.tensor([1e4, -1e4, 200.0, -200.0, 88.0, -89.0, 0.0])
        out = evaluate(
            lambda a, b: rewardops.token_kl(a, b, estimator=estimator, clamp=(20, 10)), [d, torch.zeros(7)],
            backend=target.backend, device=target.device,
        )  # fmt: skip
        assert out.outputs[0].abs().max() <= 10
        for g in out.gradients:
            assert g.isfinite().all()
            assert not g[:6].any()

    def test_binary_forms_at_the_edges(self, target):
        """Tokens of probability 1 and 0."""
        inf = torch.inf
        logprob = torch.tensor([0.0, 0.0, -1e-6, -inf, -2.0, -20.0])
        ref = torch.tensor([0.0, -1.0, -2e-6, -1.0, 0.0, -20.0])
        for name in ("binary_kl", "binary_tv"):
            got = rewardops.token_kl(logprob.to(target.device), ref.to(target.device), estimator=name).cpu()
            a, b = logprob.double().exp(), ref.double().exp()
            want = (a - b).abs()
            if name == "binary_kl":
                rest, other = (torch.expm1(x.double()).abs() for x in (logprob, ref))
                want = torch.where(a > 0, a * (logprob.double() - ref.double()), 0)
                want = want + torch.where(rest > 0, rest * (rest / other).log(), 0)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-12)

    def test_k3_keeps_its_digits_near_zero(self, target):
        d = torch.logspace(-12, 1.5, 400, dtype=torch.float64)
        d = torch.cat([d, -d]).float()
        zero = torch.zeros_like(d)
        ours = evaluate(kl("k3"), [d, zero], backend=target.backend, device=target.device)
        x = -d.double()
        exact = torch.where(x.abs() < 1e-3, x * x / 2 * (1 + x / 3 * (1 + x / 4)), torch.expm1(x) - x)
        value = ours.outputs[0].cpu().double()
        relative = ((value - exact) / exact).abs()
        assert relative.max() < 1e-6
        assert (value >= 0).all()

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_masked_tokens_never_influence(self, target, generator, estimator):
        logprob, ref = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
        mask = random_mask(4, 9, generator)
        clean = evaluate(kl(estimator, mask), [logprob, ref], backend=target.backend, device=target.device)
        dirty = [torch.where(mask, x, torch.nan) for x in (logprob, ref)]
        ours = evaluate(kl(estimator, mask), dirty, backend=target.backend, device=target.device, poison=mask)
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
            assert bool((b.cpu()[~mask] == 0).all())

    @pytest.mark.parametrize("convert", [lambda m: m.long(), lambda m: m.float()], ids=["integer", "float"])
    def test_masks_of_other_types(self, target, generator, convert):
        logprob, ref = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
        mask = random_mask(3, 5, generator)
        args = [x.to(target.device) for x in (logprob, ref)]
        a = rewardops.token_kl(*args, mask=mask.to(target.device))
        b = rewardops.token_kl(*args, mask=convert(mask).to(target.device))
        assert torch.equal(a, b)

    def test_strided_and_empty(self, target, generator):
        wide = torch.randn(4, 12, generator=generator)
        check_backend(
            lambda x: rewardops.token_kl(x[:, 1:6], x[:, ::2][:, :5]),
            [wide],
            backend=target.backend,
            device=target.device,
        )
        check_backend(kl("k3"), [torch.zeros(0, 3)] * 2, backend=target.backend, device=target.device)

    @pytest.mark.parametrize("estimator", ESTIMATORS[:6])
    def test_recorded_pairs(self, target, shared, estimator):
        d = np.load(shared / "golden" / "verl_kl.npz")
        logprob, ref = (torch.tensor(d[k]).to(target.device) for k in ("logprob", "ref_logprob"))
        logprob.requires_grad_()
        clamp = (20, 10) if estimator.startswith("k3") else None  # row 0 holds extreme differences
        out = rewardops.token_kl(logprob, ref, estimator=estimator, clamp=clamp)
        (grad,) = torch.autograd.grad(out.sum(), logprob)
        torch.testing.assert_close(out.detach().cpu(), torch.tensor(d[estimator]), rtol=1e-5, atol=1e-6)
        want = torch.tensor(d[f"{estimator}_grad"])
        if clamp is not None:  # verl does not clamp the gradient of k2
            inside = (logprob - ref).abs() <= 20
            want = torch.where(inside.cpu() & (torch.tensor(d[estimator]) < 10), want, 0)
        torch.testing.assert_close(grad.cpu(), want, rtol=1e-5, atol=1e-6)

    def test_expected_gradients_are_what_the_docstring_says(self):
        """Expected gradients by enumeration over a distribution of five tokens."""
        torch.manual_seed(0)
        z = torch.randn(5, dtype=torch.float64, requires_grad=True)
        logq = torch.randn(5, dtype=torch.float64).log_softmax(0)
        p = z.detach().softmax(0)

        def expected(estimator):
            logp = z.log_softmax(0)
            return torch.autograd.grad((p * rewardops.token_kl(logp, logq, estimator=estimator)).sum(), z)[0]

        logp = z.log_softmax(0)
        (forward,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), z)
        torch.testing.assert_close(expected("k1"), torch.zeros_like(p), rtol=0, atol=1e-12)
        torch.testing.assert_close(expected("k2"), forward, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(expected("k3"), p - logq.exp(), rtol=1e-10, atol=1e-12)
        for straight in ("k1_plus", "k3_plus"):
            torch.testing.assert_close(expected(straight), forward, rtol=1e-10, atol=1e-12)
        logp = z.log_softmax(0)
        live = rewardops.token_kl(logp, logq, estimator="k3", old_logprob=logp.detach())
        (grad,) = torch.autograd.grad((p * live).sum(), z)
        torch.testing.assert_close(grad, forward, rtol=1e-10, atol=1e-12)


class Test_token_kl_arguments:
    def test_bad_options(self):
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="clamp: got 0, want a number above 0"):
            rewardops.token_kl(x, x, clamp=0)
        with pytest.raises(ValueError, match=r"old_logprob: got shape \[3\], want \[2, 3\]"):
            rewardops.token_kl(x, x, old_logprob=torch.zeros(3))
        with pytest.raises(TypeError, match=r"rewards: got dtype torch\.int64"):
            rewardops.token_kl(x, x, rewards=x.long(), beta=0.1)
        with pytest.raises(ValueError, match="beta: got -1"):
            rewardops.token_kl(x, x, beta=-1)


class Test_implicit_rewards:
    def test_implicit_rewards_by_step(self, generator):
        lp, ref = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
        mask = random_mask(3, 9, generator)
        ids = torch.tensor([[0, 0, 1, 1, 1, 4, 4, 9, 9], [-1, -1, 0, 0, 2, 2, 2, 2, 3], [5] * 9])
        ends = torch.rand(3, 9, generator=generator) > 0.6
        dense = rewardops.implicit_rewards(lp, ref, beta=0.5, mask=mask)
        torch.testing.assert_close(dense, torch.where(mask, 0.5 * (lp - ref), 0))
        clamped = rewardops.implicit_rewards(lp, ref, beta=0.5, mask=mask, clamp=0.3)
        torch.testing.assert_close(clamped, torch.where(mask, 0.5 * (lp - ref).clamp(-0.3, 0.3), 0))
        for segments in (ids, ends):
            want = torch.zeros_like(lp)
            for b in range(3):
                total, last = 0.0, None
                for t in range(9):
                    if not mask[b, t]:
                        continue
                    if segments is ids:
                        if ids[b, t] < 0:
                            continue
                        if last is not None and ids[b, last] == ids[b, t]:
                            want[b, last] = 0
                        else:
                            total = 0.0
                        total += dense[b, t]
                        want[b, t], last = total, t
                    else:
                        total += dense[b, t]
                        if ends[b, t]:
                            want[b, t], total = total, 0.0
            got = rewardops.implicit_rewards(lp, ref, beta=0.5, mask=mask, steps=segments)
            torch.testing.assert_close(got, want)
            lengths = torch.full((3,), 9)
            packed = rewardops.implicit_rewards(
                pack(lp, lengths)[0], pack(ref, lengths)[0], beta=0.5, mask=pack(mask, lengths)[0],
                steps=pack(segments, lengths)[0], cu_seqlens=pack(lp, lengths)[1],
            )  # fmt: skip
            torch.testing.assert_close(packed, pack(want, lengths)[0])


class Test_tdpo_terms:
    def test_tdpo_terms(self, generator):
        lp, ref, kl_ = torch.randn(3, 2, 5, generator=generator)
        mask = torch.ones(2, 5, dtype=torch.bool)
        terms = rewardops.tdpo_terms(lp, ref, kl_, mask=mask)
        torch.testing.assert_close(terms.log_ratio, (lp - ref).sum(1))
        torch.testing.assert_close(terms.sequential_kl, kl_.sum(1))
