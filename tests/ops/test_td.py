"""Discounted returns, GAE, lambda-returns and V-trace on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.core import dispatch
from rewardops.testing import check_backend, evaluate, pack, random_mask

CUDA = True  # the `target` fixture runs the kernels in CUDA C++ as well
MASKED = ("skip", "step")


def on(device, **given):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def gae(**options):
    def fn(rewards, values, *bootstrap):
        return rewardops.gae(
            rewards, values, bootstrap=bootstrap[0] if bootstrap else None, **on(rewards.device, **options)
        )

    return fn


def at(factor, b, t):
    if not isinstance(factor, torch.Tensor):
        return factor
    return factor[b].item() if factor.dim() == 1 else factor[b, t].item()


def loop(r, v, mask, gamma, lam, masked="skip", bootstrap=None, rho=None, trace=None):
    """The definition as a loop over tokens in float64; returns the term added to the values."""
    out = torch.zeros_like(r, dtype=torch.float64)
    for b in range(r.shape[0]):
        live = mask[b].nonzero()[:, 0].tolist()
        steps = list(range(live[-1] + 1)) if live and masked == "step" else live
        y, ahead = 0.0, 0.0 if bootstrap is None else bootstrap[b].item()
        for t in reversed(steps):
            here, reward = (v[b, t].item(), r[b, t].item()) if mask[b, t] else (0.0, 0.0)
            g, w = at(gamma, b, t), 1.0 if rho is None else rho[b, t].item()
            y = (
                w * (reward + g * ahead - here)
                + g * at(lam, b, t) * (1.0 if trace is None else trace[b, t].item()) * y
            )
            ahead = here
            if mask[b, t]:
                out[b, t] = y
    return out


def draw(batch, width, generator, dtype=torch.float32):
    r, v = (torch.randn(batch, width, generator=generator).to(dtype) for _ in range(2))
    return r, v, random_mask(batch, width, generator), torch.randn(batch, generator=generator).to(dtype)


class Test_gae:
    @pytest.mark.parametrize("masked", MASKED)
    @pytest.mark.parametrize("factors", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)], ids=str)
    def test_gae_matches_the_loop(self, target, generator, masked, factors):
        r, v, mask, boot = draw(7, 29, generator)
        gamma, lam = factors
        fn = gae(gamma=gamma, lam=lam, mask=mask, masked=masked)
        ours = check_backend(fn, [r, v, boot], backend=target.backend, device=target.device)
        want = loop(r, v, mask, gamma, lam, masked, boot)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=2e-6, atol=2e-6)
        returns = torch.where(mask, want + v, 0)
        torch.testing.assert_close(ours.outputs[1].cpu().double(), returns, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("width", [1, 8, 150])
    def test_gae_matches_float64(self, target, generator, dtype, width):
        """Full and partial registers and blocks, with and without a mask."""
        r, v, mask, boot = draw(3, width, generator, dtype)
        for options in ({}, {"mask": mask}, {"mask": mask, "masked": "step"}):
            fn = gae(gamma=0.97, lam=0.9, **options)
            check_backend(fn, [r, v, boot], backend=target.backend, device=target.device)

    def test_factors_per_row_and_per_token(self, target, generator):
        r, v, mask, boot = draw(5, 40, generator)
        rows = torch.rand(5, generator=generator, dtype=torch.float64)
        tokens = torch.rand(5, 40, generator=generator)
        tokens[tokens < 0.2] = 0
        for gamma, lam, masked in (
            (rows, 0.9, "skip"),
            (rows, rows.flip(0), "step"),
            (tokens, rows, "skip"),
            (0.9, tokens, "skip"),
        ):
            dirty = [
                x.masked_fill(~mask, torch.nan) if isinstance(x, torch.Tensor) and x.dim() == 2 else x
                for x in (gamma, lam)
            ]
            fn = gae(gamma=dirty[0], lam=dirty[1], mask=mask, masked=masked)
            ours = check_backend(fn, [r, v, boot], backend=target.backend, device=target.device)
            want = loop(r, v, mask, gamma, lam, masked, boot)
            torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("masked", MASKED)
    def test_masked_tokens_never_influence(self, target, generator, masked):
        r, v, mask, boot = draw(6, 30, generator)
        fn = gae(gamma=0.9, lam=0.8, mask=mask, masked=masked)
        clean = evaluate(fn, [r, v, boot], backend=target.backend, device=target.device)
        dirty = [x.masked_fill(~mask, torch.nan) for x in (r, v)]
        ours = evaluate(fn, [*dirty, boot], backend=target.backend, device=target.device, poison=mask)
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("masked", MASKED)
    def test_few_long_rows_are_cut(self, target, generator, masked):
        """Chunks give the result of one piece, forward and backward, with runs of holes longer than a chunk."""
        if target.backend == "reference":
            pytest.skip("a loop over time")
        n = 900 if target.interpreted else 150_000
        r, v = (torch.randn(1, n, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = torch.rand(1, n, generator=generator) > 0.3
        mask[0, n // 4 : n // 4 + n // 3] = False
        mask[0, -n // 10 :] = False
        boot = torch.randn(1, generator=generator, dtype=torch.float64)
        many = {"cpp": 40, "triton": 5}.get(target.backend, 9)  # too many rows for a split
        got = []
        for copies in (1, many):
            fn = gae(gamma=0.999, lam=0.99, mask=mask.expand(copies, -1), masked=masked)
            xs = [
                x.expand(copies, *x.shape[1:]).clone().to(target.device).requires_grad_()
                for x in (r, v, boot)
            ]
            with dispatch.use_backend(target.backend):
                outputs = fn(*xs)
                loss = sum((o[0] * (k + 1 + o[0].detach().cos())).sum() for k, o in enumerate(outputs))
                got.append([o[0].detach() for o in outputs] + [g[0] for g in torch.autograd.grad(loss, xs)])
        for a, b in zip(*got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_bits_do_not_depend_on_threads(self, generator):
        r, v = (torch.randn(2, 140_000, generator=generator) for _ in range(2))
        got = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got.append(rewardops.gae(r, v, gamma=0.999, lam=0.95))
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))

    def test_strided_rows_and_empty(self, target, generator):
        wide = torch.randn(3, 60, generator=generator)
        fn = lambda x: rewardops.gae(x[:, 5:41], x[:, 20:56], gamma=0.9, lam=0.9)  # noqa: E731
        check_backend(fn, [wide], backend=target.backend, device=target.device)
        for shape in ((0, 4), (3, 0)):
            check_backend(
                gae(), [torch.ones(shape), torch.ones(shape), torch.ones(shape[0])], backend=target.backend
            )
        cu = torch.zeros(4, dtype=torch.int32)
        check_backend(
            gae(cu_seqlens=cu), [torch.ones(0), torch.ones(0), torch.ones(3)], backend=target.backend
        )


class Test_discounted_returns:
    @pytest.mark.parametrize("masked", MASKED)
    def test_discounted_returns(self, target, generator, masked):
        r, _, mask, boot = draw(5, 33, generator)
        none = torch.zeros_like(r)
        for gamma in (0.0, 0.9, 1.0):
            fn = lambda r, boot, g=gamma: rewardops.discounted_returns(  # noqa: E731
                r, gamma=g, bootstrap=boot, mask=mask.to(r.device), masked=masked
            )
            ours = check_backend(fn, [r, boot], backend=target.backend, device=target.device)
            want = loop(r, none, mask, gamma, 1.0, masked, boot)
            torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=2e-6, atol=2e-6)
            plain = lambda r, g=gamma: rewardops.discounted_returns(  # noqa: E731
                r, gamma=g, mask=mask.to(r.device), masked=masked
            )
            check_backend(plain, [r], backend=target.backend, device=target.device)

    def test_infinities_stay_where_they_belong(self, target):
        inf = torch.inf
        r = torch.tensor([[1.0, 2.0, inf, 3.0], [1.0, -inf, 0.0, 0.0]]).to(target.device)
        out = rewardops.discounted_returns(r, gamma=0.5).cpu()
        assert out.tolist() == [[inf, inf, inf, 3.0], [-inf, -inf, 0.0, 0.0]]
        assert rewardops.discounted_returns(r, gamma=0.0).cpu().tolist() == r.cpu().tolist()
        cut = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
        out = rewardops.discounted_returns(r, gamma=cut.to(target.device)).cpu()
        assert out.tolist() == [[3.0, 2.0, inf, 3.0], [1.0, -inf, 0.0, 0.0]]

    @pytest.mark.parametrize("gamma", [1.0, 0.999])
    def test_long_sums(self, target, gamma, generator):
        """Sums over 131,072 tokens are within a unit in the last place of a float64 loop."""
        n = 700 if target.interpreted else 131_072
        r = torch.rand(1, n, generator=generator)
        want, running = np.zeros(n), 0.0
        for t in reversed(range(n)):
            running = want[t] = float(r[0, t]) + gamma * running
        with dispatch.use_backend(target.backend):
            if target.backend == "reference":
                n = 2000  # a loop over time, in Python
                want = None
            got = rewardops.discounted_returns(r[:, -n:].to(target.device), gamma=gamma).cpu()[0]
        if want is None:
            want, running = np.zeros(n), 0.0
            for t in reversed(range(n)):
                running = want[t] = float(r[0, r.shape[1] - n + t]) + gamma * running
        want32 = torch.from_numpy(want).float()
        assert torch.equal(got, want32) or bool(((got - want32).abs() <= want32.abs() * 2**-23).all())


class Test_lambda_returns:
    def test_lambda_returns(self, target, generator):
        """Comparison with the recurrence, which mixes the next value and the next return."""
        r, v, mask, boot = draw(5, 20, generator)
        got = rewardops.lambda_returns(
            *(x.to(target.device) for x in (r, v)), gamma=0.9, lam=0.7, bootstrap=boot.to(target.device),
            mask=mask.to(target.device),
        ).cpu()  # fmt: skip
        for b in range(5):
            ahead = running = boot[b].item()
            for t in reversed(mask[b].nonzero()[:, 0].tolist()):
                running = r[b, t].item() + 0.9 * (0.3 * ahead + 0.7 * running)
                ahead = v[b, t].item()
                assert got[b, t].item() == pytest.approx(running, rel=1e-5, abs=1e-5)


class Test_vtrace:
    @pytest.mark.parametrize("clips", [(1.0, 1.0, 1.0), (None, 0.8, 2.0)], ids=str)
    def test_vtrace(self, target, generator, clips):
        r, v, mask, boot = draw(5, 24, generator)
        log_ratio = torch.randn(5, 24, generator=generator) * 0.5

        def fn(r, v, boot):
            return rewardops.vtrace(
                r, v, log_ratio.masked_fill(~mask, torch.nan).to(r.device), gamma=0.95, lam=0.9, rho_clip=clips[0],
                trace_clip=clips[1], advantage_rho_clip=clips[2], bootstrap=boot, mask=mask.to(r.device),
            )  # fmt: skip

        ours = check_backend(fn, [r, v, boot], backend=target.backend, device=target.device, ulps=32)
        ratio = log_ratio.double().exp()
        rho, trace, advantage_ratio = (ratio if c is None else ratio.clamp(max=c) for c in clips)
        targets = loop(r, v, mask, 0.95, 0.9, "skip", boot, rho, trace) + torch.where(mask, v, 0)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), targets, rtol=1e-5, atol=1e-5)
        for b in range(5):
            ahead = boot[b].item()
            for t in reversed(mask[b].nonzero()[:, 0].tolist()):
                want = advantage_ratio[b, t].item() * (r[b, t].item() + 0.95 * ahead - v[b, t].item())
                assert ours.outputs[1][b, t].item() == pytest.approx(want, rel=1e-4, abs=1e-4)
                ahead = 0.9 * targets[b, t].item() + 0.1 * v[b, t].item()


class Test_gae_lambda_returns_vtrace:
    def test_by_hand(self, target):
        """Worked numbers: verl's GAE over masked tokens, rlax's V-trace and lambda-returns."""
        d = target.device
        r = torch.tensor([[0.0, 0.0, 0.0, 1.0]], device=d)
        v = torch.tensor([[0.2, 0.9, 0.4, 0.6]], device=d)
        mask = torch.tensor([[1, 0, 1, 1]], device=d)
        got = rewardops.gae(r, v, lam=0.9, mask=mask)
        torch.testing.assert_close(got.returns.cpu(), torch.tensor([[0.904, 0.0, 0.96, 1.0]]))
        r, v = torch.tensor([[0.0, 0.0, 1.0]], device=d), torch.tensor([[0.5, 0.2, 0.7]], device=d)
        ratio = torch.tensor([[2.0, 0.5, 1.0]], device=d)
        torch.testing.assert_close(
            rewardops.vtrace(r, v, ratio.log()).targets.cpu(), torch.tensor([[0.6, 0.6, 1.0]])
        )
        torch.testing.assert_close(
            rewardops.lambda_returns(r, v, lam=0.9).cpu(), torch.tensor([[0.893, 0.97, 1.0]])
        )


class Test_gae_discounted_returns:
    @pytest.mark.parametrize("name", ["uniform", "ragged", "holes"])
    def test_matches_verl(self, shared, target, name):
        d = np.load(shared / "golden" / f"verl_advantages_{name}.npz")
        mask = torch.from_numpy(d["response_mask"]).bool().to(target.device)
        load = lambda key: torch.from_numpy(d[key]).float().to(target.device)  # noqa: E731
        with dispatch.use_backend(target.backend):
            got = rewardops.gae(
                load("gae_rewards"),
                load("gae_values"),
                gamma=float(d["gae_gamma"]),
                lam=float(d["gae_lam"]),
                mask=mask,
            )
            whitened = rewardops.whiten(got.advantages, mask)
            reinforce = rewardops.discounted_returns(
                load("token_level_rewards"), gamma=float(d["reinforce_pp_gamma"]), mask=mask
            )
            remax = rewardops.discounted_returns(load("token_level_rewards"), mask=mask)
        valid = mask.cpu()
        for key, ours in (
            ("gae_returns", got.returns), ("gae", whitened), ("reinforce_pp_returns", reinforce),
            ("remax_returns", remax),
        ):  # fmt: skip
            want = torch.from_numpy(d[key]).float()
            torch.testing.assert_close(ours.cpu()[valid], want[valid], rtol=2e-4, atol=2e-4, msg=key)

    @given(seed=st.integers(0, 10**6), masked=st.sampled_from(MASKED))
    def test_property_rows(self, seed, masked):
        """Padded equals packed; a row cut in two and bootstrapped with what follows equals the row."""
        g = torch.Generator().manual_seed(seed)
        r, v, mask, boot = draw(4, 17, g, torch.float64)
        lengths = torch.randint(0, 18, (4,), generator=g)
        options = {"gamma": 0.93, "lam": 0.8, "masked": masked}
        inside = torch.arange(17) < lengths[:, None]
        want = rewardops.gae(r, v, mask=mask & inside, bootstrap=boot, **options)
        (pr, cu), pv, pm = pack(r, lengths), pack(v, lengths)[0], pack(mask, lengths)[0]
        got = rewardops.gae(pr, pv, mask=pm, cu_seqlens=cu, bootstrap=boot, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b[inside])
        # With lambda = 1 a return needs only the next return.
        whole = rewardops.discounted_returns(r, gamma=0.93)
        cut = int(torch.randint(1, 17, (), generator=g))
        left = rewardops.discounted_returns(r[:, :cut], gamma=0.93, bootstrap=whole[:, cut])
        torch.testing.assert_close(left, whole[:, :cut])


class Test_gae_vtrace:
    @pytest.mark.parametrize("batch", [2, 9])
    def test_rows_that_start_anywhere(self, target, generator, batch):
        """Vector loads, and rows whose arrays have no common alignment."""
        if target.interpreted and target.backend == "triton":
            pytest.skip("Triton's compiler sees to that")
        n = {"reference": 40, "cpp": 1211}.get(target.backend, 611 if target.interpreted else 2611)
        wide = torch.randn(3, batch, n + 8, generator=generator)
        mask = torch.rand(batch, n + 8, generator=generator) > 0.1
        for shift, other, end in ((0, 0, 0), (1, 1, 0), (3, 3, 3), (0, 2, 1), (2, 1, 2)):
            r, v = wide[0][:, shift : n - end], wide[1][:, other : n - end + other - shift]
            for m in (None, mask[:, shift : n - end]):
                fn = gae(gamma=0.99, lam=0.9, mask=m)
                check_backend(fn, [r, v], backend=target.backend, device=target.device)
        lengths = torch.full((batch,), n // 2) - torch.arange(batch)  # packed rows of odd lengths
        packed, cu = pack(wide[0][:, :n], lengths)
        values, _ = pack(wide[1][:, :n], lengths)
        ratio, _ = pack(wide[2][:, :n], lengths)
        for dtype in (torch.int32, torch.int64):

            def fn(r, v, dtype=dtype):
                where = {"cu_seqlens": cu.to(r.device, dtype)}
                return rewardops.vtrace(r, v, ratio.to(r), lam=0.9, **where)

            check_backend(fn, [packed, values], backend=target.backend, device=target.device)

    def test_errors(self, generator):
        r, v, mask, boot = draw(4, 5, generator)
        cases = [
            (lambda: rewardops.gae(r, v[:3]), r"values: got shape \[3, 5\], want \[4, 5\]"),
            (lambda: rewardops.gae(r, v, gamma=1.5), r"gamma: got 1\.5, want a number from 0 to 1"),
            (lambda: rewardops.gae(r, v, lam=torch.ones(3)), r"lam: got shape \[3\], want \[4\] or \[4, 5\]"),
            (lambda: rewardops.gae(r, v, lam=-0.5), r"lam: got -0\.5, want a number of at least 0"),
            (
                lambda: rewardops.gae(r, v, gamma=torch.tensor(1.5)),
                "gamma: got tensor.*, want a number from",
            ),
            (
                lambda: rewardops.gae(r, v, lam=torch.full((4,), -2.0)),
                "lam: got a value that is not of at least 0",
            ),
            (
                lambda: rewardops.gae(r, v, gamma=torch.full((4,), 2.0)),
                "gamma: got a value that is not from",
            ),
            (lambda: rewardops.gae(r, v, bootstrap=boot[:2]), r"bootstrap: got shape \[2\], want \[4\]"),
            (lambda: rewardops.gae(r, v, masked="hold"), "masked: got 'hold', want one of 'skip', 'step'"),
            (
                lambda: rewardops.gae(r, v, gamma=torch.ones(4, 5), mask=mask, masked="step"),
                "gamma: got a value per token with masked='step'",
            ),
            (lambda: rewardops.vtrace(r, v, r[:1]), r"log_ratio: got shape \[1, 5\], want \[4, 5\]"),
        ]
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()


class Test_gae_where_rows_lie:
    def test_bits_do_not_depend_on_where_rows_lie(self, target, generator):
        """Rows in wide loads, rows that begin anywhere, and packed rows behind others."""
        if not target.backend.startswith("triton"):
            pytest.skip("of Triton's tiles")
        r, v = (torch.randn(6, 81, generator=generator) for _ in range(2))
        mask = torch.rand(6, 81, generator=generator) > 0.2

        def run(r, v, mask, cu=None):
            tensors = [x.contiguous() if cu is not None else x for x in (r, v, mask)]
            r, v, mask = (x.to(target.device) for x in tensors)
            where = {"mask": mask, "cu_seqlens": cu}
            with dispatch.use_backend(target.backend):
                return rewardops.gae(r, v, gamma=0.99, lam=0.95, **where)

        inner = [x[:, 1:] for x in (r, v, mask)]
        want = run(*(x.contiguous() for x in inner))
        packed = [torch.cat([x[0, :3], x[:, 1:].flatten()]) for x in (r, v, mask)]
        cu = torch.tensor([0, 3, *range(83, 484, 80)], device=target.device)
        for a, b, c in zip(want, run(*inner), run(*packed, cu), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c[3:].view_as(a))


class Test_gae_min_returns:
    @pytest.mark.parametrize("shape", [(16_384, 5), (1, 262_144)], ids=str)
    def test_many_rows_and_long_ones(self, target, generator, shape):
        if target.backend == "reference" or target.interpreted:
            pytest.skip("too slow")
        r, v, mask, _ = draw(*shape, generator)
        got = rewardops.gae(*(x.to(target.device) for x in (r, v)), mask=mask.to(target.device))
        # gamma = lambda = 1: the remaining rewards minus the value.
        left = torch.where(mask, r, 0).double().flip(1).cumsum(1).flip(1)
        for a, b in zip(got, (left - v, left), strict=True):
            torch.testing.assert_close(a.cpu().double(), torch.where(mask, b, 0), rtol=1e-6, atol=1e-4)
        low = rewardops.min_returns(r.to(target.device), mask=mask.to(target.device)).cpu()
        want = torch.where(mask, r, torch.inf).flip(1).cummin(1).values.flip(1)
        assert torch.equal(low, torch.where(mask, want, 0))
