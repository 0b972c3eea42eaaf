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

    @pytest.mark.parametrize("per", ["all", "row", "token"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_discounted_progress(self, target, generator, per, packed):
        """``gamma q_k - q_{k-1}``, the first less the start, with NaN wherever nothing is read."""
        q, mask = torch.randn(5, 14, generator=generator), random_mask(5, 14, generator)
        flags = torch.rand(5, 14, generator=generator) > 0.5
        start = torch.randn(5, generator=generator)
        gammas = {
            "all": 0.7,
            "row": torch.rand(5, generator=generator),
            "token": torch.rand(5, 14, generator=generator),
        }
        gamma = gammas[per]
        if per == "token":
            gamma = gamma.masked_fill(~mask, torch.nan)
        lengths = torch.full((5,), 14)
        tokens = [q, flags, mask, gamma if per == "token" else mask]
        cu = None
        if packed:
            (q_in, f_in, m_in, g_in), cu = [pack(x, lengths)[0] for x in tokens], pack(q, lengths)[1]
        else:
            q_in, f_in, m_in, g_in = tokens
        given = g_in if per == "token" else gamma

        def fn(q, start):
            f, m, c = there(q.device, f_in, m_in, cu)
            g = given.to(q.device) if isinstance(given, torch.Tensor) else given
            return rewardops.step_progress(q, f, start=start, gamma=g, mask=m, cu_seqlens=c)

        inputs = [q_in.masked_fill(~(m_in & f_in), 0), start]
        ours = check_backend(fn, inputs, backend=target.backend, device=target.device)
        want = torch.zeros_like(q)
        for b, ends in enumerate(step_ends(flags, mask)):
            before = float(start[b])
            for t in ends:
                g = gamma if per == "all" else float(gamma[b] if per == "row" else gamma[b, t])
                want[b, t], before = g * q[b, t] - before, float(q[b, t])
        got = ours.outputs[0].cpu().view(5, 14)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match=r"gamma: got 1\.5"):
            rewardops.step_progress(q, flags, gamma=1.5)


def clip_delta(values, delta, last):
    """The cases of the paper, for the clipped rewards of the steps of a row."""
    if not delta:
        return values
    count = len(values)
    out = [values[k] - values[k + 1] for k in range(count - 1)] + values[-1:]
    if last == "zero":
        out[-2:] = [*values[-2:-1], 0.0][-count:] if count else []
    return out


class Test_clip_delta_rewards:
    @pytest.mark.parametrize(
        "options",
        [
            {}, {"eta": 0.3}, {"eta": None}, {"delta": False}, {"last": "own"}, {"eta": None, "last": "own"},
            {"delta": False, "last": "own"},
        ],
        ids=str,
    )  # fmt: skip
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
            for t, value in zip(
                ends, clip_delta(values, options.get("delta", True), options.get("last", "zero")), strict=True
            ):
                want[b, t] = value
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    def test_the_last_step_has_the_reward_of_success_alone(self, target):
        """By hand, in both layouts; the last step's own reward is not read."""
        r = torch.tensor([[0.9, 0.3, 0.7, 0.5], [0.4, 9.0, torch.nan, 0.0]]).to(target.device)
        ends = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool().to(target.device)
        cu = torch.tensor([0, 4, 8]).to(target.device)
        for options, want in (
            ({"eta": None}, [[0.6, -0.4, 0.7, 0.0], [0.4, 0.0, 0.0, 0.0]]),
            ({"eta": 0.8}, [[0.5, -0.4, -0.1, 0.0], [-0.4, 0.0, 0.0, 0.0]]),
        ):
            want = torch.tensor(want)
            got = rewardops.clip_delta_rewards(r, ends, **options)
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-6)
            packed = rewardops.clip_delta_rewards(r.view(-1), ends.view(-1), cu_seqlens=cu, **options)
            assert torch.equal(packed.view(2, 4), got)
        own = rewardops.clip_delta_rewards(r[:1], ends[:1], eta=None, last="own")
        torch.testing.assert_close(own.cpu(), torch.tensor([[0.6, -0.4, 0.2, 0.5]]))
        alone = rewardops.clip_delta_rewards(r[:1, :1], eta=None)
        assert alone.tolist() == [[0.0]]
        with pytest.raises(ValueError, match="last: got 'first'"):
            rewardops.clip_delta_rewards(r, ends, last="first")


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

    @pytest.mark.parametrize("norm", ["sum", "max", "none", "softmax"])
    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_norms_and_signs(self, target, generator, norm, signed, packed):
        mask, lengths = random_mask(5, 12, generator), torch.full((5,), 12)
        w = torch.randn(5, 12, generator=generator) + 0.3
        w[3] = 0
        outcome = torch.randn(5, generator=generator)
        m, cu = (pack(mask, lengths)[0], pack(mask, lengths)[1]) if packed else (mask, None)

        def fn(o, w):
            at = dict(zip(("mask", "cu_seqlens"), there(o.device, m, cu), strict=True))
            return rewardops.redistribute_outcome(o, w, share=0.6, signed=signed, norm=norm, **at)

        inputs = [outcome, pack(w, lengths)[0] if packed else w]
        ours = check_backend(fn, inputs, backend=target.backend, device=target.device)
        want = torch.zeros(5, 12, dtype=torch.float64)
        for b in range(5):
            at = mask[b].nonzero()[:, 0]
            x, r = w[b, at].double(), float(outcome[b])
            x = x if signed or norm == "softmax" else x.clamp(min=0)
            size = {"sum": x.sum(), "max": x.abs().amax() if len(x) else 0.0, "none": 1.0, "softmax": 1.0}[
                norm
            ]
            if not len(x):
                continue
            if norm == "softmax":
                x = x.softmax(0)
            if float(size) != 0:
                want[b, at] = 0.6 * r * x / size
            want[b, at[-1]] += 0.4 * r if float(size) != 0 else r
        torch.testing.assert_close(ours.outputs[0].cpu().double().view(5, 12), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30, 1e-38, 1e-41, 1e-44])
    @pytest.mark.parametrize("signed", [False, True])
    def test_weights_of_any_size(self, target, size, signed):
        """The shares are those of the weights as they were rounded; the gradient times the weights as well."""
        x = torch.tensor([[1.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 1.0]]) * size
        wide, leaf = x.double().requires_grad_(), x.to(target.device).requires_grad_()
        outcome, up = torch.tensor([1.0, -2.0]), torch.tensor([[0.3, -1.0, 0.5, 0.2], [1.0, 0.1, 0.2, -0.4]])
        want = outcome.double()[:, None] * wide / wide.sum(1, keepdim=True)
        got = rewardops.redistribute_outcome(outcome.to(target.device), leaf, signed=signed)
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=1e-7)
        (even,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
        assert bool(even.isfinite().all())
        assert float((even.cpu().double() * wide.detach()).abs().max()) < 1e-6
        if size > 1e-38:  # the gradient is about 1 / size
            (expected,) = torch.autograd.grad((want * up.double()).sum(), wide)
            (grad,) = torch.autograd.grad((got * up.to(target.device)).sum(), leaf)
            torch.testing.assert_close(grad.cpu().double() * size, expected * size, rtol=1e-4, atol=1e-5)

    def test_weights_of_any_size_in_float64(self):
        for size in (1e-300, 1e-310, 1e300):
            x = (torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64) * size).requires_grad_()
            got = rewardops.redistribute_outcome(torch.tensor([4.0], dtype=torch.float64), x)
            torch.testing.assert_close(got.detach(), torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))
            got.sum().backward()
            assert bool(x.grad.isfinite().all())

    def test_attributions(self, target):
        """Signed shares by hand, and what is stated where they cancel."""
        d = target.device
        w = torch.tensor([[3.0, -1.0, 2.0], [1.0, -1.0, 0.0], [0.1, 0.2, -0.3], [-1.0, -3.0, 0.0]]).to(d)
        r = torch.tensor([2.0, 5.0, 7.0, 8.0]).to(d)
        got = rewardops.redistribute_outcome(r, w, signed=True).cpu()
        want = torch.tensor([[1.5, -0.5, 1.0], [0.0, 0.0, 5.0], [0.0, 0.0, 7.0], [2.0, 6.0, 0.0]])
        torch.testing.assert_close(got, want)
        got = rewardops.redistribute_outcome(r, w, signed=True, norm="max").cpu()
        torch.testing.assert_close(got[0], torch.tensor([2.0, -2 / 3, 4 / 3]))
        with pytest.raises(ValueError, match="norm: got 'mean'"):
            rewardops.redistribute_outcome(r, w, norm="mean")
        with pytest.raises(TypeError, match="signed: got int, want True or False"):
            rewardops.redistribute_outcome(r, w, signed=1)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("norm", ["sum", "max", "none", "softmax"])
    def test_weights_that_are_not_finite_show(self, target, bad, norm):
        if norm == "softmax" and bad == -torch.inf:
            bad = torch.nan
        for signed in (False, True):
            w = torch.tensor([[0.5, bad, 0.2], [0.5, 0.3, bad]]).to(target.device).requires_grad_()
            mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).to(target.device)
            got = rewardops.redistribute_outcome(
                torch.ones(2).to(target.device), w, signed=signed, norm=norm, mask=mask
            )
            (grad,) = torch.autograd.grad(got.square().sum(), w)
            of_row = slice(1, 2) if norm == "none" else slice(None)
            assert bool(got[0, of_row].isnan().all())
            assert bool(grad[0, of_row].isnan().all())
            assert bool(got[1].isfinite().all())
            assert bool(grad[1].isfinite().all())
            assert got[1, 2] == 0
            assert grad[1, 2] == 0


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
        for kept in ("own", "zero"):
            deltas = rewardops.clip_delta_rewards(r, flags, last=kept, mask=mask)
            back = rewardops.discounted_returns(deltas, mask=flags & mask)
            want = torch.where(flags & mask, r.clamp(max=0), 0)
            if kept == "zero":
                for b, ends in enumerate(step_ends(flags, mask)):
                    want[b, ends[-1:]] = 0
            torch.testing.assert_close(back, want)

    @pytest.mark.parametrize("gamma", [1.0, 0.9, "row"])
    @pytest.mark.parametrize("number", [False, True])
    def test_final_potential(self, target, generator, gamma, number):
        r, phi = torch.randn(2, 5, 13, generator=generator)
        mask = random_mask(5, 13, generator)
        mask[2] = False
        gamma = torch.rand(5, generator=generator) if gamma == "row" else gamma
        final = torch.full((5,), 0.75) if number else torch.randn(5, generator=generator)

        def fn(r, phi, final):
            m, g = mask.to(r.device), gamma.to(r.device) if isinstance(gamma, torch.Tensor) else gamma
            last = 0.75 if number else final
            return rewardops.potential_shaping(r, phi, gamma=g, final=last, mask=m)

        ours = check_backend(fn, [r, phi, final], backend=target.backend, device=target.device)
        want = torch.zeros(5, 13, dtype=torch.float64)
        for b in range(5):
            at, g = (
                mask[b].nonzero()[:, 0].tolist(),
                float(gamma[b]) if isinstance(gamma, torch.Tensor) else gamma,
            )
            ahead = [*(float(phi[b, t]) for t in at[1:]), float(final[b])]
            for t, following in zip(at, ahead, strict=True) if at else ():
                want[b, t] = float(r[b, t]) + g * following - float(phi[b, t])
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-5, atol=1e-5)
        lengths = torch.full((5,), 13)
        packed, cu = pack(r, lengths)
        again = rewardops.potential_shaping(
            packed,
            pack(phi, lengths)[0],
            gamma=gamma,
            final=final,
            mask=pack(mask, lengths)[0],
            cu_seqlens=cu,
        )
        torch.testing.assert_close(again.view(5, 13).double(), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"final: got shape \[4\], want \[5\]"):
            rewardops.potential_shaping(r, phi, final=final[:4])
        with pytest.raises(ValueError, match="final: got inf"):
            rewardops.potential_shaping(r, phi, final=torch.inf)


def brpo_loop(scores, probs, size, kind, base=2.0):
    """The authors' loop (sail-sg/AnytimeReasoner, compute_cot_advantage)."""
    batch, count = scores.shape
    out = torch.zeros_like(scores)
    growth = base ** torch.arange(count, dtype=scores.dtype)
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

    @pytest.mark.parametrize("growth", [1e-3, 0.5, 1.0, 2.0, 1e3])
    def test_growth(self, target, generator, growth):
        scores, probs = torch.rand(6, 9, generator=generator), torch.full((9,), 1 / 9, dtype=torch.float64)

        def fn(s):
            return rewardops.budget_advantages(s, group_size=3, growth=growth)

        got = check_backend(fn, [scores], backend=target.backend, device=target.device).outputs[0].cpu()
        want = brpo_loop(scores.double(), probs, 3, "brpo", growth)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("count", [130, 2000])
    @pytest.mark.parametrize("growth", [1e-3, 0.5, 2.0, 1e3])
    def test_many_budgets(self, generator, count, growth):
        """Against averages by recursion: ``growth^i`` itself overflows float32, and float64."""
        scores = torch.rand(4, count, generator=generator)
        got = rewardops.budget_advantages(scores, group_size=2, growth=growth)
        history, moved, average = torch.zeros(4, count, dtype=torch.float64), 1.0, torch.zeros(4).double()
        for j in range(count):
            history[:, j] = average * (count - j) / count
            average = average + (scores[:, j].double() - average) * moved
            moved = moved * growth / (1 + moved * growth)  # g^j over the sum up to it
        returns = scores.double().flip(1).cumsum(1).flip(1) / count
        group = returns.view(2, 2, count).mean(1, keepdim=True).expand(2, 2, count).reshape(4, count)
        j = torch.arange(count)
        want = returns - (j * history + (count - j) * group) / count
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)

    def test_scattered_groups(self, target, generator):
        scores, labels = torch.rand(7, 5, generator=generator), torch.tensor([3, -1, 3, 8, -1, 3, 2**40])
        fn = lambda s: rewardops.budget_advantages(s, labels.to(s.device), baseline="group")  # noqa: E731
        got = check_backend(fn, [scores], backend=target.backend, device=target.device).outputs[0].cpu()
        returns = scores.double().flip(1).cumsum(1).flip(1) / 5
        for b in range(7):
            rows = labels == labels[b]
            want = returns[b] - (returns[rows].mean(0) if int(rows.sum()) > 1 else 0)
            torch.testing.assert_close(got[b].double(), want, rtol=0, atol=1e-6)
