"""token_kl at impossible tokens, unknown log-probabilities and limits, against formulas in many digits."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.core import dispatch
from rewardops.kl import ESTIMATORS
from rewardops.testing import random_mask

INF, NAN = math.inf, math.nan
CLAMPS = (None, 20.0, (20.0, 10.0), (0.75, 1.5), (INF, 2.0), (70.0, INF))


# ---- the formulas ------------------------------------------------------------------------------------------


def divergence(estimator, p, q):
    """The estimate of finite log-probabilities, and its slopes in both."""
    exp, d = mpmath.exp, p - q
    if not estimator.startswith("binary"):
        k3 = (exp(-d) - 1 + d, 1 - exp(-d))
        value, slope = {
            "k1": (d, 1), "abs": (abs(d), mpmath.sign(d)), "k2": (d * d / 2, d), "k3": k3,
            "k1_plus": (d, d), "k3_plus": (k3[0], d),
        }[estimator]  # fmt: skip
        return value, slope, -slope
    a, b = exp(p), exp(q)
    if estimator == "binary_tv":
        return abs(a - b), mpmath.sign(a - b) * a, mpmath.sign(b - a) * b
    if p == q:
        return 0, 0, 0
    if b == 1:
        return mpmath.inf, -mpmath.inf if a > SMALL else 0, mpmath.inf
    # By convention a policy's probability of 1 has slope 0, unless the reference excludes the token.
    slope = a * (d - mpmath.log1p(-a) + mpmath.log1p(-b)) if a < 1 else (FAR if q == -FAR else 0)
    other = (1 - a) * (mpmath.log1p(-a) - mpmath.log1p(-b)) if a < 1 else 0
    return a * d + other, slope, (b - a) / (1 - b)


# In place of infinity; what it leads to is beyond LARGE, other results are not.
FAR, LARGE, SMALL = mpmath.mpf(10) ** 120, mpmath.mpf(10) ** 60, mpmath.mpf(10) ** -1000


@functools.cache
def formula(estimator, p, q, old, clamp, cap, live):
    """Value and slopes; infinite log-probabilities are far numbers, and far results are infinite."""
    if math.isnan(p) or math.isnan(q):
        return NAN, NAN, NAN
    largest_d, largest_value = clamp if isinstance(clamp, tuple) else (clamp or INF, INF)
    with mpmath.workprec(600):
        p, q = (mpmath.mpf(x) if math.isfinite(x) else math.copysign(1, x) * FAR for x in (p, q))
        d = p - q
        if estimator.startswith("binary") or abs(d) <= largest_d:
            value, on_p, on_q = divergence(estimator, p, q)
        else:
            value, on_p, on_q = divergence(estimator, mpmath.sign(d) * largest_d, 0)[0], 0, 0
        if abs(value) > largest_value:
            value, on_p, on_q = mpmath.sign(value) * largest_value, 0, 0
        if old is not None:
            log, free = 0, False
            if not math.isnan(old):
                log = p - (mpmath.mpf(old) if math.isfinite(old) else math.copysign(1, old) * FAR)
                free = live and abs(log) <= largest_d
                log = max(min(log, largest_d), -largest_d)
            ratio = mpmath.exp(log)
            if cap is not None and ratio > cap:
                ratio, free = mpmath.mpf(cap), False
            # Of k3's slope and value the difference is left, which many digits would not be enough to see.
            both = d if estimator == "k3" and on_p != 0 else on_p + value
            value, on_p, on_q = ratio * value, ratio * (both if free else on_p), ratio * on_q
        found = (value, on_p, on_q)
        return tuple(float(mpmath.sign(x)) * INF if abs(x) > LARGE else float(x) for x in found)


def settled(estimator, p, q, old, clamp):
    """False where a limit depends on the path, or a float32 loses the result before the last step."""
    certain = estimator == "binary_kl" and q == 0 and p < 0 and old is not None
    rounded = estimator.startswith("binary") and old is not None and (p > old + 10 or p == -95)
    return not certain and not rounded


class Served(NamedTuple):
    backend: str
    device: torch.device


def served():
    """Every backend that there is, with a device that it serves."""
    for backend, device in itertools.product(("reference", "cpp", "triton"), ("cpu", "cuda")):
        if (device == "cpu" or torch.cuda.is_available()) and dispatch.unavailable(backend, device) is None:
            yield Served(backend, torch.device(device))


# ---- calls -------------------------------------------------------------------------------------------------


def call(target, columns, dtype, estimator, up=1.0, **options):
    """Value and both gradients, on the CPU, of log-probabilities given as tuples (p, q, old)."""
    p, q, old = (torch.tensor(x, dtype=torch.float64).to(dtype) for x in zip(*columns, strict=True))
    leaves = [x.to(target.device).requires_grad_() for x in (p, q)]
    if options.pop("weighted"):
        options["old_logprob"] = old.to(target.device)
    out = rewardops.token_kl(*leaves, estimator=estimator, **options)
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, up))
    return [x.detach().cpu().double() for x in (out, *grads)]


def compare(target, columns, dtype, estimator, clamp=None, cap=None, live=True, weighted=True):
    options = {
        "clamp": clamp,
        "ratio_grad": live,
        "weighted": weighted,
        **({"ratio_cap": cap} if cap else {}),
    }
    columns = [c for c in columns if settled(estimator, *c[:2], c[2] if weighted else None, clamp)]
    if not columns:
        return
    got = call(target, columns, dtype, estimator, **options)
    columns = [(p, q, old if weighted else None) for p, q, old in columns]
    want = [formula(estimator, *c, clamp, cap, live) for c in columns]
    # Of the slope with the ratio's gradient only the digits are known that its two terms leave.
    still = [
        formula(estimator, *c, clamp, cap, False) if live and weighted else w
        for c, w in zip(columns, want, strict=True)
    ]
    for at, column in enumerate(columns):
        for n in range(3):
            ours, exact = float(got[n][at]), want[at][n]
            exact = float(torch.tensor(exact, dtype=torch.float64).to(dtype))
            close = 2e-5 if dtype is torch.float32 else 1e-11
            loose = max((abs(x) for x in (*still[at], exact) if math.isfinite(x)), default=0.0)
            loose += 0.05 if estimator.startswith("binary") else 1e-3
            same = ours == exact or (math.isnan(ours) and math.isnan(exact))
            same = same or (math.isfinite(exact) and abs(ours - exact) <= close * loose)
            assert same, (estimator, column, options, ("value", "on logprob", "on ref")[n], ours, exact)


# Numbers that float32 has as well, so that the formula of each is worked out once.
SOME = (-INF, 0.0, -0.25, -1.5, -95.0)
LOGPROBS = (*SOME, NAN, -0.25 - 2**-17, -7.0)
OLD = (-INF, INF, NAN, -0.25, -2.0, -20.0)


class Test_token_kl_limits:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_every_pair(self, target, estimator):
        pairs = [(p, q, 0.0) for p, q in itertools.product(LOGPROBS, LOGPROBS)]
        for dtype, clamp in itertools.product((torch.float32, torch.float64), CLAMPS):
            compare(target, pairs, dtype, estimator, clamp, weighted=False)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("live", [True, False])
    def test_every_ratio(self, target, estimator, live):
        columns = list(itertools.product(SOME, SOME, OLD))
        for dtype, (clamp, cap) in itertools.product(
            (torch.float32, torch.float64), ((None, None), (None, 3.0), ((20.0, 10.0), None))
        ):
            compare(target, columns, dtype, estimator, clamp, cap, live)

    @given(
        columns=st.lists(
            st.tuples(*[st.sampled_from(x) | st.floats(-9, -0.0625, width=32) for x in (LOGPROBS, LOGPROBS, OLD)]),
            min_size=1, max_size=12,
        ),
        estimator=st.sampled_from(ESTIMATORS), clamp=st.sampled_from(CLAMPS), cap=st.sampled_from((None, 0.5, 3.0)),
        live=st.booleans(), dtype=st.sampled_from((torch.float32, torch.float64)),
    )  # fmt: skip
    def test_property_of_any_numbers(self, columns, estimator, clamp, cap, live, dtype):
        for target in served():
            with rewardops.use_backend(target.backend):
                compare(target, columns, dtype, estimator, clamp, cap, live)
                compare(target, columns, dtype, estimator, clamp, weighted=False)

    def test_by_hand(self, target):
        """A token that the policy alone excludes, the reference alone, and both: value, slopes in both."""
        e = math.exp(-1)
        hand = {
            "k1": ((-INF, 1, -1), (INF, 1, -1), (0, 1, -1)),
            "abs": ((INF, -1, 1), (INF, 1, -1), (0, 0, 0)),
            "k2": ((INF, -INF, INF), (INF, INF, -INF), (0, 0, 0)),
            "k3": ((INF, -INF, INF), (INF, 1, -1), (0, 0, 0)),
            "k1_plus": ((-INF, -INF, INF), (INF, INF, -INF), (0, 0, 0)),
            "k3_plus": ((INF, -INF, INF), (INF, INF, -INF), (0, 0, 0)),
            "binary_kl": ((-math.log1p(-e), 0, e / (1 - e)), (INF, INF, -e), (0, 0, 0)),
            "binary_tv": ((e, 0, e), (e, e, 0), (0, 0, 0)),
        }
        tokens = [(-INF, -1.0, 0.0), (-1.0, -INF, 0.0), (-INF, -INF, 0.0)]
        for estimator, want in hand.items():
            for dtype in (torch.float32, torch.float64):
                got = call(target, tokens, dtype, estimator, weighted=False)
                torch.testing.assert_close(
                    torch.stack(got, 1), torch.tensor(want).double(), rtol=1e-6, atol=0, msg=estimator
                )

    @pytest.mark.parametrize("live", [True, False])
    def test_by_hand_with_a_ratio(self, target, live):
        """exp(logprob - old) k3 tends to exp(ref - old) where the policy excludes the token; others to 0."""
        tokens = [(-INF, -1.0, -3.0), (-200.0, -1.0, -3.0)]
        e = math.exp(2)
        hand = {
            "k3": (e, 0, e) if live else (e, -e, e), "k3_plus": (e, e if live else 0, 0),
            **dict.fromkeys(("k1", "abs", "k2", "k1_plus", "binary_kl", "binary_tv"), (0, 0, 0)),
        }  # fmt: skip
        for estimator, want in hand.items():
            for got in zip(
                *call(target, tokens, torch.float32, estimator, weighted=True, ratio_grad=live), strict=True
            ):
                torch.testing.assert_close(
                    torch.stack(got), torch.tensor(want).double(), rtol=1e-5, atol=1e-30
                )

    def test_a_certain_reference(self, target):
        """binary_kl is infinite where the reference gives all others 0; the slope is that of what is larger."""
        tokens = [(-1.0, 0.0, -1.0), (-0.1, 0.0, -1.0)]
        value, on_p, on_q = call(target, tokens, torch.float32, "binary_kl", weighted=True)
        assert value.tolist() == [INF, INF]
        assert on_p.tolist() == [INF, -INF]
        assert on_q.tolist() == [INF, INF]

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_a_factor_of_zero(self, target, estimator):
        """Neither a beta of 0 nor an upstream gradient of 0 makes NaN of an infinite estimate; NaN still shows."""
        tokens = [(-INF, -1.0, -2.0), (-1.0, -INF, -2.0), (-1.0, -2.0, -INF), (NAN, -1.0, -2.0)]
        for beta in (0.0, torch.zeros((), device=target.device), torch.zeros(4, device=target.device)):
            for rewards in (None, torch.ones(4, device=target.device)):
                got = call(
                    target, tokens, torch.float32, estimator, weighted=True, beta=beta, rewards=rewards,
                )  # fmt: skip
                assert got[0][:3].tolist() == [0.0 if rewards is None else 1.0] * 3
                assert got[0][3].isnan()
                for g in got[1:]:
                    assert g[:3].tolist() == [0.0] * 3
        got = call(target, tokens, torch.float32, estimator, up=0.0, weighted=True)
        assert not torch.stack(got[1:])[:, :3].any()
        # A where() after the estimate is enough to leave an impossible token out.
        logprob = torch.tensor([-INF, -1.0], device=target.device, requires_grad=True)
        k = rewardops.token_kl(logprob, torch.full_like(logprob, -2.0), estimator=estimator)
        torch.where(logprob > -INF, k, 0).sum().backward()
        assert logprob.grad.isfinite().all()

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_rewards_of_any_number(self, target, bad):
        x = torch.tensor([-1.0, -2.0], device=target.device)
        rewards = torch.tensor([bad, 1.0], device=target.device)
        for beta in (0.5, torch.tensor(0.5, device=target.device)):
            out = rewardops.token_kl(x, x - 1, estimator="k1", rewards=rewards, beta=beta).cpu()
            torch.testing.assert_close(out, torch.tensor([bad, 0.5]), equal_nan=True)

    def test_masked_numbers_of_any_kind(self, target, generator):
        """Infinite log-probabilities, factors and rewards behind the mask change no bit."""
        mask = random_mask(4, 9, generator).to(target.device)
        p, q, old, beta = (-torch.rand(4, 9, generator=generator).to(target.device) - 0.01 for _ in range(4))
        for estimator, bad in itertools.product(ESTIMATORS, (NAN, INF, -INF)):
            results = []
            for fill in (-0.5, bad):
                args = [torch.where(mask, x, fill).requires_grad_() for x in (p, q, p)]
                extra = {
                    "old_logprob": torch.where(mask, old, fill), "beta": torch.where(mask, -beta, fill),
                    "mask": mask,
                }  # fmt: skip
                out = rewardops.token_kl(*args[:2], estimator=estimator, rewards=args[2], **extra)
                results.append((out.detach(), *torch.autograd.grad(out.sum(), args)))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
                assert not b[~mask].any()


class Test_token_kl_clamp:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_finite_for_any_number(self, target, estimator):
        """Beyond the clamp the gradient is 0; nothing is infinite, nothing NaN, whatever the sampling policy."""
        numbers = (-INF, 0.0, -1.0, -1e4, -1e30)
        columns = list(itertools.product(numbers, numbers, (*numbers, INF, NAN)))
        clamps = [(20.0, 10.0), (1.5, 0.5), 20.0]
        if estimator == "binary_kl":  # only the second number bounds it
            clamps.remove(20.0)
        for weighted, clamp in itertools.product((False, True), clamps):
            found = call(target, columns, torch.float32, estimator, weighted=weighted, clamp=clamp)
            assert all(x.isfinite().all() for x in found)
            if not estimator.startswith("binary"):
                beyond = torch.tensor([p != q and abs(p - q) > 20 for p, q, _ in columns])
                assert not found[2][beyond].any()
                assert weighted or not found[1][beyond].any()

    @pytest.mark.parametrize("estimator", ["k1_plus", "k3_plus"])
    def test_straight_through_forms(self, target, estimator):
        tokens = [(-101.0, -1.0, 0.0), (-1.0, -101.0, 0.0), (-6.0, -1.0, 0.0), (-2.0, -1.0, 0.0)]
        _, on_p, on_q = call(target, tokens, torch.float32, estimator, weighted=False, clamp=(20, 4))
        assert on_p.tolist() == [0, 0, 0, -1]
        assert on_q.tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_nan_shows(self, target, estimator):
        for clamp, weighted in itertools.product((None, 20.0, (20.0, 10.0)), (False, True)):
            tokens = [
                (NAN, -1.0, -1.0),
                (-1.0, NAN, -1.0),
                (NAN, NAN, NAN),
                (NAN, -INF, -INF),
                (-INF, NAN, -1.0),
            ]
            for x in call(target, tokens, torch.float64, estimator, weighted=weighted, clamp=clamp):
                assert x.isnan().all()


class Test_token_kl_ratio:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_unknown(self, target, estimator):
        """A sampling policy's log-probability of NaN: the estimate as it is, and its gradient."""
        known = [(-1.0, -2.0, -1.5), (-0.5, -0.25, -0.5)]
        unknown = [(p, q, NAN) for p, q, _ in known]
        plain = call(target, known, torch.float64, estimator, weighted=False)
        for a, b in zip(call(target, unknown, torch.float64, estimator, weighted=True), plain, strict=True):
            assert torch.equal(a, b)

    def test_capped(self, target):
        """r = e^2 above the cap, e^-1 below it, and infinite: value and slopes of k2 by hand."""
        tokens = [(-1.0, -2.0, -3.0), (-2.0, -3.0, -1.0), (-1.0, -2.0, -INF), (-1.0, -2.0, NAN)]
        value, on_p, on_q = call(target, tokens, torch.float64, "k2", weighted=True, ratio_cap=2.0)
        e = math.exp(-1)
        torch.testing.assert_close(value, torch.tensor([1.0, e / 2, 1.0, 0.5]).double())
        torch.testing.assert_close(on_p, torch.tensor([2.0, 1.5 * e, 2.0, 1.0]).double())
        torch.testing.assert_close(on_q, torch.tensor([-2.0, -e, -2.0, -1.0]).double())

    def test_clamped(self, target):
        """The clamp's first number limits the ratio's logarithm; beyond it the ratio has no gradient."""
        tokens = [(-1.0, -1.25, -2.0), (-1.0, -1.25, -1.25)]
        value, on_p, _ = call(target, tokens, torch.float64, "k1", weighted=True, clamp=0.5)
        wide, near = math.exp(0.5), math.exp(0.25)
        torch.testing.assert_close(value, torch.tensor([0.25 * wide, 0.25 * near]).double())
        torch.testing.assert_close(on_p, torch.tensor([wide, 1.25 * near]).double())

    def test_bad_caps(self):
        x = torch.zeros(2)
        for bad, error in (
            (0.0, ValueError),
            (-1.0, ValueError),
            (INF, ValueError),
            (NAN, ValueError),
            ("x", TypeError),
        ):
            with pytest.raises(error, match="ratio_cap: got"):
                rewardops.token_kl(x, x, old_logprob=x, ratio_cap=bad)
        with pytest.raises(ValueError, match=r"ratio_cap: got 2\.0 without old_logprob, want None"):
            rewardops.token_kl(x, x, ratio_cap=2.0)


class Test_token_kl_beta:
    @pytest.mark.parametrize("shape", [(), (4,), (4, 9)], ids=str)
    @pytest.mark.parametrize("subtracted", [False, True])
    def test_tensors(self, target, generator, shape, subtracted):
        """The product written out, in the gradients too; beta itself is constant."""
        p, q, r = (-torch.rand(4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
        mask = random_mask(4, 9, generator)
        beta = torch.rand(shape, generator=generator, dtype=torch.float64)
        wide = beta[:, None] if shape == (4,) else beta
        leaves = [x.clone().to(target.device).requires_grad_() for x in (p, q, r)]
        factor = beta.to(target.device).requires_grad_()
        out = rewardops.token_kl(
            *leaves[:2], estimator="k2", mask=mask.to(target.device), beta=factor,
            rewards=leaves[2] if subtracted else None,
        )  # fmt: skip
        k = wide * (p - q) ** 2 / 2
        torch.testing.assert_close(out.detach().cpu(), torch.where(mask, r - k if subtracted else k, 0))
        out.sum().backward()
        slope = torch.where(mask, wide * (p - q), 0) * (-1 if subtracted else 1)
        torch.testing.assert_close(leaves[0].grad.cpu(), slope)
        torch.testing.assert_close(leaves[1].grad.cpu(), -slope)
        assert factor.grad is None
        if subtracted:
            assert torch.equal(leaves[2].grad.cpu(), mask.double())

    @pytest.mark.parametrize("rewards", [False, True])
    def test_a_number_in_a_tensor_is_the_number(self, target, generator, rewards):
        p, q, r = (-torch.rand(3, 7, generator=generator).to(target.device) for _ in range(3))
        extra = {"rewards": r} if rewards else {}
        want = rewardops.token_kl(p, q, beta=0.3, **extra)
        for beta in (torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3), torch.full((3, 7), 0.3)):
            assert torch.equal(rewardops.token_kl(p, q, beta=beta.to(target.device), **extra), want)
        packed = rewardops.token_kl(p.view(-1), q.view(-1), beta=torch.full((21,), 0.3, device=target.device))
        assert torch.equal(packed.view(3, 7), rewardops.token_kl(p, q, beta=0.3))

    def test_masked_factors(self, target):
        mask = torch.tensor([[True, False], [False, False]], device=target.device)
        x = torch.tensor([[-1.0, -2.0]] * 2, device=target.device)
        for bad in (NAN, INF):
            for beta in (torch.tensor([1.0, bad]), torch.tensor([[1.0, bad], [bad, bad]])):
                p, r = x.clone().requires_grad_(), x.clone().requires_grad_()
                out = rewardops.token_kl(
                    p, x - 1, estimator="k1", mask=mask, beta=beta.to(target.device), rewards=r
                )
                out.sum().backward()
                assert out.tolist() == [[-2.0, 0.0], [0.0, 0.0]]
                assert p.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
                assert r.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]

    def test_bad_tensors(self):
        x = torch.zeros(2, 3)
        with pytest.raises(
            ValueError, match=r"beta: got shape \[3\], want \[\] \(for all\) or \[2, 3\] .* or \[2\]"
        ):
            rewardops.token_kl(x, x, beta=torch.zeros(3))
        with pytest.raises(ValueError, match=r"beta: got shape \[1\], want \[\] \(for all\) or \[6\]"):
            rewardops.token_kl(x.view(-1), x.view(-1), beta=torch.zeros(1))
        with pytest.raises(TypeError, match=r"beta: got dtype torch\.int64, want float32"):
            rewardops.token_kl(x, x, beta=torch.ones(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="beta: got device meta, want cpu"):
            rewardops.token_kl(x, x, beta=torch.zeros(2, device="meta"))
        mask = torch.tensor([[True] * 3, [False] * 3])
        rewardops.token_kl(x, x, beta=torch.tensor([1.0, -1.0]), mask=mask)
        for bad in (-1.0, NAN, INF):
            with pytest.raises(ValueError, match=r"beta: got .*, want finite values of at least 0"):
                rewardops.token_kl(x, x, beta=torch.tensor([bad, 1.0]), mask=mask)


class Test_implicit_rewards_limits:
    def test_clip_of_rto(self, target, generator):
        """RTO clips after the factor: the clamp is its clip divided by its factor."""
        p, q = (-torch.rand(5, 11, generator=generator, dtype=torch.float64) * 6 for _ in range(2))
        for scale, clip in ((0.05, 0.05), (0.1, 0.25)):
            got = rewardops.implicit_rewards(
                p.to(target.device), q.to(target.device), beta=scale, clamp=clip / scale
            )
            torch.testing.assert_close(got.cpu(), (scale * (p - q)).clamp(-clip, clip))

    def test_impossible_tokens(self, target):
        """0 where both exclude the token, finite under a clamp; a step's infinite sum stays in its step."""
        p = torch.tensor([[-1.0, -INF, -1.0, -INF, -1.0, -1.0]], device=target.device)
        q = torch.tensor([[-2.0, -1.0, -2.0, -INF, -INF, -3.0]], device=target.device)
        steps = torch.tensor([[0, 0, 1, 1, 2, 3]], device=target.device)
        dense = rewardops.implicit_rewards(p, q, beta=0.5)
        assert dense.tolist() == [[0.5, -INF, 0.5, 0.0, INF, 1.0]]
        sums = rewardops.implicit_rewards(p, q, beta=0.5, steps=steps)
        assert sums.tolist() == [[0.0, -INF, 0.0, 0.5, INF, 1.0]]
        p, q = p.requires_grad_(), q.requires_grad_()
        out = rewardops.implicit_rewards(p, q, beta=0.5, steps=steps, clamp=4.0)
        assert out.tolist() == [[0.0, -1.5, 0.0, 0.5, 2.0, 1.0]]
        grads = torch.autograd.grad(out.sum(), (p, q))
        assert grads[0].tolist() == [[0.5, 0.0, 0.5, 0.5, 0.0, 0.5]]
        assert grads[1].tolist() == (-grads[0]).tolist()
