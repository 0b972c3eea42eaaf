"""Step shaping: progress, clip and delta, redistribution, budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import check_backend, pack, random_mask


def there(device, *tensors):
    return [None if x is None else x.to(device) for x in tensors]


def step_ends(flags, mask):
    return [(flags[b] & mask[b]).nonzero()[:, 0].tolist() for b in range(flags.shape[0])]


class Test_step_progress:
    @pytest.mark.parametrize("started", [False, True])
    def test_progress(self, target, generator, started):
        q, mask = torch.rand(6, 25, generator=generator), random_mask(6, 25, generator)
        flags = torch.rand(6, 25, generator=generator) > 0.6
        start = torch.rand(6, generator=generator) if started else None

        def fn(q, *start):
            m, f = there(q.device, mask, flags)
            return rewardops.step_progress(q, f, start=start[0] if start else None, mask=m)

        inputs = [q.masked_fill(~(mask & flags), 0)] + ([start] if started else [])
        got = check_backend(fn, inputs, backend=target.backend, device=target.device).outputs[0].cpu()
        want = torch.zeros_like(q)
        for b, ends in enumerate(step_ends(flags, mask)):
            before = float(start[b]) if started else 0.0
            for t in ends:
                want[b, t], before = q[b, t] - before, float(q[b, t])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        dirty = rewardops.step_progress(
            q.masked_fill(~(mask & flags), torch.nan).to(target.device), flags.to(target.device),
            mask=mask.to(target.device),
        ).cpu()  # fmt: skip
        assert not dirty.isnan().any()


class Test_clip_delta_rewards:
    @pytest.mark.parametrize("options", [{}, {"eta": 0.3}, {"eta": None}, {"delta": False}], ids=str)
    def test_clip_delta(self, target, generator, options):
        r, mask = torch.randn(6, 25, generator=generator), random_mask(6, 25, generator)
        flags = torch.rand(6, 25, generator=generator) > 0.6

        def fn(r):
            m, f = there(r.device, mask, flags)
            return rewardops.clip_delta_rewards(r, f, mask=m, **options)

        where = {"backend": target.backend, "device": target.device}
        plain = "delta" in options  # torch's minimum alone
        got = check_backend(fn, [r], allow_fallback=plain, **where).outputs[0].cpu()
        eta = options.get("eta", 0.0)
        want = torch.zeros_like(r)
        for b, ends in enumerate(step_ends(flags, mask)):
            values = [float(r[b, t]) if eta is None else min(float(r[b, t]) - eta, 0.0) for t in ends]
            for k, t in enumerate(ends):
                following = values[k + 1] if k + 1 < len(ends) and options.get("delta", True) else 0.0
                want[b, t] = values[k] - following
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


class Test_redistribute_outcome:
    def test_redistribute(self, target, generator):
        d = target.device
        got = rewardops.redistribute_outcome(
            torch.tensor([2.0, 3.0, 1.0]).to(d),
            torch.tensor([[0.1, 0.3, 0.2], [0.0, 0.0, 9.0], [1.0, 1.0, 1.0]]).to(d),
            share=0.8, mask=torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).to(d),
        ).cpu()  # fmt: skip
        want = torch.tensor([[0.26667, 0.8, 0.93333], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        mask = random_mask(5, 20, generator)
        fn = lambda o, w: rewardops.redistribute_outcome(o, w, share=0.6, mask=mask.to(o.device))  # noqa: E731
        inputs = [torch.randn(5, generator=generator), torch.rand(5, 20, generator=generator)]
        ours = check_backend(fn, inputs, backend=target.backend, device=d).outputs[0].cpu()
        live = mask.any(1)
        torch.testing.assert_close(ours.sum(1)[live], inputs[0][live], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"share: got 1\.5"):
            rewardops.redistribute_outcome(*inputs, share=1.5)


class Test_potential_shaping:
    @given(seed=st.integers(0, 10**6))
    def test_property_potentials_telescope(self, seed):
        g = torch.Generator().manual_seed(seed)
        r, phi = (torch.randn(3, 12, generator=g, dtype=torch.float64) for _ in range(2))
        mask = random_mask(3, 12, g)
        shaped = rewardops.potential_shaping(r, phi, mask=mask)
        before, after = (rewardops.discounted_returns(x, mask=mask) for x in (r, shaped))
        torch.testing.assert_close(after, torch.where(mask, before - phi, 0))
        lengths = torch.full((3,), 12)
        packed, cu = pack(r, lengths)
        again = rewardops.potential_shaping(
            packed, pack(phi, lengths)[0], mask=pack(mask, lengths)[0], cu_seqlens=cu
        )
        torch.testing.assert_close(again.view(3, 12), shaped)
        # Progress telescopes too, and the return of a clipped delta is its reward.
        flags = torch.rand(3, 12, generator=g) > 0.5
        total = rewardops.step_progress(phi, flags, mask=mask).sum(1)
        last = [float(phi[b, ends[-1]]) if ends else 0.0 for b, ends in enumerate(step_ends(flags, mask))]
        torch.testing.assert_close(total, torch.tensor(last, dtype=torch.float64))
        back = rewardops.discounted_returns(
            rewardops.clip_delta_rewards(r, flags, mask=mask), mask=flags & mask
        )
        torch.testing.assert_close(back, torch.where(flags & mask, r.clamp(max=0), 0))


def brpo_loop(scores, probs, size, kind):
    """The authors' loop (sail-sg/AnytimeReasoner, compute_cot_advantage)."""
    batch, count = scores.shape
    out = torch.zeros_like(scores)
    growth = 2.0 ** torch.arange(count, dtype=scores.dtype)
    for b in range(batch):
        first = b // size * size
        for s in range(count):
            baseline = (scores[b, s:] * probs[s:]).sum()
            group = (scores[first : first + size, s:] * probs[s:]).sum(-1).mean() if size > 1 else 0.0
            history = 0.0
            if s > 0:
                history = (scores[b, :s] * growth[:s]).sum() / growth[:s].sum() * probs[s:].sum()
            mixed = (s * history + (count - s) * group) / count
            out[b, s] = baseline - {"brpo": mixed, "history": history, "group": group, "none": 0.0}[kind]
    return out


class Test_budget_returns_budget_advantages:
    @pytest.mark.parametrize("kind", rewardops.shaping.BUDGET_BASELINES)
    @pytest.mark.parametrize("size", [1, 4])
    def test_budgets(self, target, generator, kind, size):
        scores = torch.rand(8, 4, generator=generator, dtype=torch.float64)
        probs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

        def fn(s):
            return rewardops.budget_advantages(s, group_size=size, probs=(probs * 5).tolist(), baseline=kind)

        where = {"backend": target.backend, "device": target.device, "allow_fallback": kind == "none"}
        got = check_backend(fn, [scores], **where).outputs[0].cpu()
        torch.testing.assert_close(got, brpo_loop(scores, probs, size, kind))
        assert rewardops.budget_advantages(torch.zeros(0, 3), group_size=1).shape == (0, 3)
        torch.testing.assert_close(rewardops.budget_returns(scores)[:, 0], scores.mean(1))
        with pytest.raises(ValueError, match=r"probs: got 2, want 4 \(the columns of scores\)"):
            rewardops.budget_returns(scores, [0.5, 0.5])
