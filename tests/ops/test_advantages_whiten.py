"""whiten on every backend."""

from __future__ import annotations

import pytest
import torch

import rewardops
from rewardops.core import dispatch
from rewardops.testing import check_backend, random_mask

HARD = {
    "plain": lambda x: x,
    "far from 0": lambda x: x + 1000,
    "the first far from the others": lambda x: x.index_fill(1, torch.tensor([0]), 3e4),
    "equal in each row": lambda x: x[:, :1].expand(x.shape).contiguous(),
    "equal in all rows but one": lambda x: torch.where(torch.arange(len(x))[:, None] == 2, x, 0.7),
    "sparse": lambda x: torch.where(torch.arange(x.shape[1]) % 50 == 49, x, 0),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-25,
}  # fmt: skip


class Test_whiten:
    @pytest.mark.parametrize("hard", HARD)
    @pytest.mark.parametrize("weighs", [False, True])
    @pytest.mark.parametrize("width", [9, 160])
    def test_hard_inputs(self, target, generator, hard, weighs, width):
        """Held to float64; results of equal values are exactly 0 on every backend."""
        x = HARD[hard](torch.randn(7, width, generator=generator))
        mask = random_mask(7, width, generator)
        mask[5] = False
        if weighs:
            mask = torch.where(mask, torch.rand(7, width, generator=generator), 0)
        eps = 0.0 if hard == "tiny" else 1e-8

        def fn(v):
            return rewardops.whiten(v, mask.to(v.device), eps=eps, shift_mean=not weighs)

        ours = check_backend(fn, [x], backend=target.backend, device=target.device, poison=mask != 0)
        assert not ours.outputs[0].cpu()[mask == 0].any()
        with dispatch.use_backend(target.backend):
            same = torch.full((7, width), 0.7).to(target.device)
            assert not rewardops.whiten(same, mask.to(target.device)).any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_shows(self, target, generator, bad):
        x, mask = torch.randn(6, 40, generator=generator), random_mask(6, 40, generator)
        x[~mask] = bad
        for broken in (False, True):
            mask[4, 30], x[4, 30] = True, bad if broken else 1.0
            leaf = x.clone().to(target.device).requires_grad_()
            with dispatch.use_backend(target.backend):
                got = rewardops.whiten(leaf, mask.to(target.device))
                (grad,) = torch.autograd.grad(got.square().sum(), leaf)
            assert torch.equal(got.isnan().cpu(), mask & broken)
            assert torch.equal(grad.isnan().cpu(), mask & broken)

    @pytest.mark.parametrize("shape", [(), (1,), (33,), (2, 3, 4), (3, 0), (5, 64)], ids=str)
    def test_shapes_and_strides(self, target, generator, shape):
        x = torch.randn(shape, generator=generator)
        want = rewardops.whiten(x.reshape(1, -1).double()).view(shape) if x.numel() else x.double()
        with dispatch.use_backend(target.backend):
            got = rewardops.whiten(x.to(target.device))
            assert got.shape == shape
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6)
            if len(shape) == 2 and x.numel():
                turned = rewardops.whiten(x.t().contiguous().to(target.device).t())
                torch.testing.assert_close(turned.cpu().double(), want, rtol=1e-6, atol=1e-6)
