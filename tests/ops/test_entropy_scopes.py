"""Weights and covariances relative to a scope, on every backend."""

from __future__ import annotations

import pytest
import torch

import rewardops
from rewardops.core import dispatch
from rewardops.testing import check_backend, pack, random_mask

HARD = {
    "plain": lambda h: h,
    "zeros": lambda h: h * 0,
    "below the floor": lambda h: h * 1e-2,
    "far apart": lambda h: h.index_add(0, torch.tensor([2]), torch.full((1, h.shape[1]), 90.0)),
    "large": lambda h: h * 1e4,
}


class Test_signed_group_normalize:
    def test_a_first_value_far_from_all_others(self, target):
        """The squares about it cancel but for one part in the number of tokens."""
        x = torch.full((33, 1024), 0.1)
        x[:, 0] = 3e4
        rewards = torch.ones(33)

        def fn(x):
            return rewardops.signed_group_normalize(x, rewards.to(x.device), group_size=33, joint=True)

        ours = check_backend(fn, [x], backend=target.backend, device=target.device).outputs[0].cpu()
        want = (x.double() - x.double().mean()) / x.double().var(correction=0).sqrt()
        torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-6)


class Test_entropy_weights:
    @pytest.mark.parametrize("hard", HARD)
    @pytest.mark.parametrize("mode", ["linear", "softmax"])
    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("normalize", ["batch", "row", "group"])
    def test_hard_inputs(self, target, generator, hard, mode, inverse, normalize):
        h, mask = HARD[hard](torch.rand(7, 80, generator=generator)), random_mask(7, 80, generator)
        mask[5] = False
        groups = torch.tensor([4, 4, -3, 4, 4, -3, 0]) if normalize == "group" else None

        def fn(h):
            return rewardops.entropy_weights(
                h, mask.to(h.device), mode=mode, inverse=inverse, normalize=normalize, temperature=0.7,
                groups=None if groups is None else groups.to(h.device), entropy_grad=True,
            )  # fmt: skip

        check_backend(fn, [h], backend=target.backend, device=target.device, poison=mask)

    @pytest.mark.parametrize("mode", ["linear", "softmax", "rank", "quantile"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_shows(self, target, generator, mode, bad):
        h = torch.rand(5, 40, generator=generator) + 0.1
        lengths = torch.tensor([40, 0, 17, 33, 40])
        h[2, 3], h[3, 35] = bad, bad
        packed, cu = (t.to(target.device) for t in pack(h, lengths))
        for inverse in (False, True):
            with dispatch.use_backend(target.backend):
                got = rewardops.entropy_weights(
                    packed, cu_seqlens=cu, mode=mode, normalize="row", inverse=inverse
                )
            place = torch.arange(130)
            broken = (place >= 40) & (place < 57)
            assert torch.equal(got.isnan().cpu(), broken)


class Test_advantage_logprob_cov:
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    @pytest.mark.parametrize("packed", [False, True])
    def test_every_backend(self, target, generator, offset, packed):
        a = torch.randn(7, 80, generator=generator) + offset
        lp, mask = -torch.rand(7, 80, generator=generator) * 9, random_mask(7, 80, generator)
        where = {"mask": mask}
        if packed:
            lengths = torch.tensor([80, 0, 13, 64, 80, 1, 79])
            (a, cu), (lp, _), (mask, _) = (pack(t, lengths) for t in (a, lp, mask))
            where = {"mask": mask, "cu_seqlens": cu}

        def fn(a, lp):
            there = {k: t.to(a.device) for k, t in where.items()}
            return rewardops.advantage_logprob_cov(a, lp, **there)

        ours = check_backend(fn, [a, lp], backend=target.backend, device=target.device)
        x, y = a.double()[mask], lp.double()[mask]
        want = (x - x.mean()) * (y - y.mean())
        torch.testing.assert_close(ours.outputs[0].cpu()[mask].double(), want, rtol=1e-5, atol=1e-5)
        assert not ours.outputs[0].cpu()[~mask].any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_shows(self, target, bad):
        a, lp = torch.tensor([[1.0, 2.0, bad, bad]]), torch.tensor([[-1.0, -2.0, -4.0, 0.0]])
        mask = torch.tensor([[1, 1, 1, 0]])
        with dispatch.use_backend(target.backend):
            got = rewardops.advantage_logprob_cov(*(t.to(target.device) for t in (a, lp, mask)))
        assert got.isfinite().tolist() == [[False, False, False, True]]
        assert got[0, 2].isnan()


class Test_entropy_bonus:
    @pytest.mark.parametrize("width", [5, 80])
    def test_every_backend(self, target, generator, width):
        a = torch.randn(7, width, generator=generator) * 3
        h, mask = torch.rand(7, width, generator=generator) * 4, random_mask(7, width, generator)
        a[0, 0], h[1, 1] = 0.0, 0.0

        def fn(a):
            return rewardops.entropy_bonus(a, h.to(a), mask.to(a.device), alpha=0.3, kappa=1.7)

        ours = check_backend(fn, [a], backend=target.backend, device=target.device, poison=mask)
        want = torch.where(mask, a + torch.minimum(0.3 * h, a.abs() / 1.7), 0)
        torch.testing.assert_close(ours.outputs[0].cpu(), want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_shows(self, target, bad):
        leaf = torch.tensor([1.0, -1.0, 0.5, 0.2]).to(target.device).requires_grad_()
        h, mask = torch.tensor([bad, 1.0, 1.0, bad]), torch.tensor([1, 1, 1, 0])
        with dispatch.use_backend(target.backend):
            got = rewardops.entropy_bonus(leaf, h.to(target.device), mask.to(target.device))
            (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert got.isnan().tolist() == grad.isnan().tolist() == [True, False, False, False]


class Test_steer_weights:
    @pytest.mark.parametrize("mode", ["linear", "exp"])
    @pytest.mark.parametrize("hard", ["plain", "zeros", "equal", "sparse", "small"])
    def test_every_backend(self, target, generator, mode, hard):
        x, mask = torch.rand(7, 80, generator=generator), random_mask(7, 80, generator)
        x = {
            "plain": x, "zeros": x * 0, "equal": x * 0 + 0.3, "small": x * 1e-3,
            "sparse": torch.where(torch.arange(80) % 40 == 9, x * 50, 0),
        }[hard]  # fmt: skip

        def fn(x):
            return rewardops.steer_weights(x, mask.to(x.device), mode=mode, low=0.7, high=1.3)

        ours = check_backend(fn, [x], backend=target.backend, device=target.device).outputs[0].cpu()
        top, least = x[mask].max().double(), x[mask].min().double()
        if mode == "exp":
            want = (x * (torch.tensor(0.7).double().log() / top.clamp(min=0.02))).exp().clamp(0.7, 1)
        else:
            want = 1.3 - (x - least) * (0.6 / (top - least)) if top > least else torch.ones_like(x)
        torch.testing.assert_close(ours.double(), torch.where(mask, want.double(), 0), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("mode", ["linear", "exp"])
    def test_a_nan_shows(self, target, mode):
        x, mask = torch.tensor([1.0, torch.nan, 2.0, torch.nan]), torch.tensor([1, 1, 1, 0])
        with dispatch.use_backend(target.backend):
            got = rewardops.steer_weights(x.to(target.device), mask.to(target.device), mode=mode)
            assert got.isnan().tolist() == [True, True, True, False]
            none = rewardops.steer_weights(x.to(target.device), (mask * 0).to(target.device), mode=mode)
        assert not none.any()
