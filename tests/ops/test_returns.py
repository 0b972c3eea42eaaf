"""Returns over steps on every backend: extremes, soft minima, and PURE's transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.core import dispatch
from rewardops.testing import assert_within_budget, check_backend, evaluate, pack, random_mask

CUDA = True  # the `target` fixture runs the kernels in CUDA C++ as well
KINDS = ("every_token", "flags", "ids")


def there(device, *tensors):
    return [None if x is None else x.to(device) for x in tensors]


def minimum(mask=None, cu_seqlens=None, steps=None):
    def fn(rewards):
        m, cu, s = there(rewards.device, mask, cu_seqlens, steps)
        return rewardops.min_returns(rewards, mask=m, cu_seqlens=cu, steps=s)

    return fn


def softmin(mask=None, cu_seqlens=None, steps=None, **options):
    def fn(rewards):
        m, cu, s = there(rewards.device, mask, cu_seqlens, steps)
        return rewardops.softmin_rewards(rewards, mask=m, cu_seqlens=cu, steps=s, **options)

    return fn


def markers(kind, batch, width, generator):
    """Random steps in one of the three forms of the argument."""
    if kind == "every_token":
        return None
    flags = torch.rand(batch, width, generator=generator) > 0.6
    if kind == "flags":
        return flags
    ids = flags.long().cumsum(1)
    return torch.where(torch.rand(batch, 1, generator=generator) > 0.7, ids - 2, ids)  # some start at -2


def ends(kind, steps, mask):
    """The definition of step ends, as a loop over rows."""
    out = torch.zeros_like(mask)
    for b in range(mask.shape[0]):
        valid = mask[b].nonzero()[:, 0].tolist()
        for here, following in zip(valid, [*valid[1:], None], strict=False):
            if kind == "every_token":
                out[b, here] = True
            elif kind == "flags":
                out[b, here] = steps[b, here]
            else:
                out[b, here] = steps[b, here] >= 0 and (
                    following is None or steps[b, following] != steps[b, here]
                )
    return out


class Test_min_returns:
    @pytest.mark.parametrize("kind", KINDS)
    def test_min_matches_the_loop(self, target, generator, kind):
        rewards = torch.randn(9, 31, generator=generator)
        mask = random_mask(9, 31, generator)
        steps = markers(kind, 9, 31, generator)
        ours = check_backend(
            minimum(mask, None, steps), [rewards], backend=target.backend, device=target.device, ulps=4
        ).outputs[0]
        end = ends(kind, steps, mask)
        for b in range(9):
            for t in range(31):
                later = [rewards[b, u].item() for u in range(t, 31) if end[b, u]]
                want = min(later) if later and mask[b, t] else 0.0
                assert ours[b, t].item() == want

    def test_ties_go_to_the_earliest(self, target):
        rewards = torch.tensor([[1.0, 0.5, 2.0, 0.5, 0.5]], device=target.device, requires_grad=True)
        out = rewardops.min_returns(rewards)
        (grad,) = torch.autograd.grad(out.sum(), rewards)
        assert grad.tolist() == [[0.0, 2.0, 0.0, 2.0, 1.0]]

    def test_nan_and_infinite_rewards(self, target):
        inf, nan = torch.inf, torch.nan
        rewards = torch.tensor([[1.0, nan, 2.0, 3.0], [inf, inf, inf, inf], [5.0, -inf, inf, 1.0]])
        out = rewardops.min_returns(rewards.to(target.device)).cpu()
        assert out[0].isnan().tolist() == [True, True, False, False]
        assert out[0, 2:].tolist() == [2.0, 3.0]
        assert out[1].tolist() == [inf] * 4
        assert out[2].tolist() == [-inf, -inf, 1.0, 1.0]
        # Positions that end no step count as +inf, but a step of infinite reward can still take the gradient.
        flags = torch.tensor([[0, 1, 0, 0]]).bool().to(target.device)
        x = torch.tensor([[0.0, inf, 0.0, 0.0]], device=target.device, requires_grad=True)
        out = rewardops.min_returns(x, steps=flags)
        assert out.tolist() == [[inf, inf, 0.0, 0.0]]
        assert torch.autograd.grad(out, x, torch.ones_like(out))[0].tolist() == [[0.0, 2.0, 0.0, 0.0]]


class Test_softmin_rewards:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("through", [True, False])
    def test_softmin_matches_float64(self, target, generator, kind, through):
        rewards = torch.randn(9, 31, generator=generator)
        mask = random_mask(9, 31, generator)
        steps = markers(kind, 9, 31, generator)
        fn = softmin(mask, None, steps, temperature=0.3)
        ours = check_backend(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
        assert bool((ours[~ends(kind, steps, mask)] == 0).all())
        if not through:  # not a derivative: the formula is weight times upstream
            fn = softmin(mask, None, steps, temperature=0.3, through_weights=False)
            got = evaluate(fn, [rewards], backend=target.backend, device=target.device).gradients[0].cpu()
            weight = torch.where(rewards != 0, ours / rewards, 0).double()
            up = torch.randn(9, 31, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
            up = up.bfloat16().double()
            torch.testing.assert_close(got.double(), weight * up, rtol=1e-4, atol=1e-6)


class Test_min_returns_softmin_rewards:
    def test_pure_by_hand(self, target):
        """The worked case of PURE: steps of reward .8, -.5, .6, each at the end of two tokens."""
        rewards = torch.tensor([[0.0, 0.8, 0.0, -0.5, 0.0, 0.6, 0.0, 0.0]])
        flags = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 0]]).bool()
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
        ours = minimum(mask, None, flags)(rewards.to(target.device)).cpu()
        assert ours.tolist() == [[-0.5, -0.5, -0.5, -0.5, pytest.approx(0.6), pytest.approx(0.6), 0.0, 0.0]]
        soft = softmin(mask, None, flags)(rewards.to(target.device)).cpu()
        want = torch.tensor([[0, 1.8e-6, 0, -0.49999, 0, 1.0e-5, 0, 0]])
        torch.testing.assert_close(soft, want, rtol=1e-2, atol=1e-5)
        assert soft.sum().item() == pytest.approx(-0.4999786901049805, abs=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_equals_padded(self, target, generator, kind, masked):
        rewards = torch.randn(11, 29, generator=generator)
        lengths = torch.randint(0, 30, (11,), generator=generator)
        lengths[2] = 0
        inside = torch.arange(29) < lengths[:, None]
        mask = inside & random_mask(11, 29, generator) if masked else inside
        steps = markers(kind, 11, 29, generator)
        packed, cu = pack(rewards, lengths)
        packed_mask = pack(mask, lengths)[0] if masked else None
        packed_steps = None if steps is None else pack(steps, lengths)[0]
        for make in (minimum, softmin):
            padded = evaluate(
                make(mask, None, steps), [rewards], backend=target.backend, device=target.device
            )
            ours = check_backend(
                make(packed_mask, cu, packed_steps), [packed], backend=target.backend, device=target.device
            )
            # The specification sums over the width of the tensor; Triton's blocks are counted from its end.
            ulps = 0 if target.backend == "cpp" else 4
            assert_within_budget(ours.outputs[0], pack(padded.outputs[0].cpu(), lengths)[0], ulps=ulps)

    @pytest.mark.parametrize("make", [minimum, softmin])
    @pytest.mark.parametrize("kind", KINDS)
    def test_masked_tokens_never_influence(self, target, generator, make, kind):
        rewards = torch.randn(8, 21, generator=generator)
        mask = random_mask(8, 21, generator)
        steps = markers(kind, 8, 21, generator)
        clean = evaluate(make(mask, None, steps), [rewards], backend=target.backend, device=target.device)
        dirty = torch.where(mask, rewards, torch.nan)
        ours = evaluate(
            make(mask, None, steps), [dirty], backend=target.backend, device=target.device, poison=mask
        )
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
            assert bool((b.cpu()[~mask] == 0).all())

    @pytest.mark.parametrize("make", [minimum, softmin])
    def test_rewards_off_step_ends_are_not_read(self, target, generator, make):
        rewards = torch.randn(5, 16, generator=generator)
        flags = markers("flags", 5, 16, generator)
        clean = evaluate(make(None, None, flags), [rewards], backend=target.backend, device=target.device)
        dirty = torch.where(flags, rewards, torch.nan)
        ours = evaluate(make(None, None, flags), [dirty], backend=target.backend, device=target.device)
        assert torch.equal(clean.outputs[0], ours.outputs[0])
        assert torch.equal(clean.gradients[0], ours.gradients[0])
        assert bool((ours.gradients[0].cpu()[~flags] == 0).all())

    @pytest.mark.parametrize("make", [minimum, softmin])
    def test_long_rows_and_other_dtypes(self, target, generator, make):
        """Rows longer than a block of the scan; narrow and wide inputs."""
        n = 2500 if target.backend.startswith(("cpp", "cuda")) or not target.interpreted else 600
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            rewards = torch.randn(2, n, generator=generator).to(dtype)
            mask = random_mask(2, n, generator, empty_row=False)
            ids = torch.arange(n).expand(2, -1) // 7
            check_backend(make(mask, None, ids), [rewards], backend=target.backend, device=target.device)

    def test_strided_rows(self, target, generator):
        wide = torch.randn(4, 40, generator=generator)
        for make in (minimum, softmin):
            check_backend(
                lambda x, make=make: make()(x[:, 5:24]), [wide], backend=target.backend, device=target.device
            )

    @pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
    @pytest.mark.parametrize("make", [minimum, softmin])
    def test_empty(self, target, shape, make):
        ours = check_backend(make(), [torch.ones(shape)], backend=target.backend, device=target.device)
        assert ours.outputs[0].shape == shape
        packed = torch.ones(0)
        cu = torch.zeros(shape[0] + 1, dtype=torch.int32)
        check_backend(make(None, cu), [packed], backend=target.backend, device=target.device)

    @given(seed=st.integers(0, 10**6), width=st.integers(1, 20))
    def test_property_monotone_and_limits(self, seed, width):
        g = torch.Generator().manual_seed(seed)
        rewards = torch.randn(3, width, generator=g, dtype=torch.float64)
        out = rewardops.min_returns(rewards)
        assert bool((out[:, 1:] >= out[:, :-1]).all())
        torch.testing.assert_close(out[:, 0], rewards.amin(1))
        # As the temperature falls, the sum of the soft-min rewards approaches the smallest step reward.
        low = rewardops.softmin_rewards(rewards, temperature=1e-3).sum(1)
        mean = rewardops.softmin_rewards(rewards, temperature=1e6).sum(1)
        gap = rewards.sort(1).values
        clear = torch.ones(3, dtype=torch.bool) if width == 1 else gap[:, 1] - gap[:, 0] > 0.05
        torch.testing.assert_close(low[clear], rewards.amin(1)[clear], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mean, rewards.mean(1), rtol=1e-4, atol=1e-4)
        assert math.isfinite(float(low.sum()))


def maximum(mask=None, cu_seqlens=None, steps=None):
    def fn(rewards):
        m, cu, s = there(rewards.device, mask, cu_seqlens, steps)
        return rewardops.max_returns(rewards, mask=m, cu_seqlens=cu, steps=s)

    return fn


def soft_minimum(mask=None, cu_seqlens=None, steps=None, **options):
    def fn(rewards):
        m, cu, s = there(rewards.device, mask, cu_seqlens, steps)
        return rewardops.softmin_returns(rewards, mask=m, cu_seqlens=cu, steps=s, **options)

    return fn


class Test_min_returns_max_returns:
    def test_steps_where_blocks_and_chunks_end(self, target, generator):
        """Masked tokens after a block's last token, for a step that ends there and for one that continues."""
        width = 2304 if target.interpreted else 66_560  # in chunks
        if target.backend == "reference":
            width = 640  # a loop over time
        t = torch.arange(width)
        border, place = (t + 4) // 64, (t + 4) % 64  # 4 tokens on both sides: one step
        ends_here = border % 3 == 1
        mask = ~((place == 4) | (place == 5) | (ends_here & ((place == 6) | (place == 7))))
        ids = 2 * border + (place >= 8)
        end = torch.where(ends_here, place == 3, place == 7) | (place == 63) | (t == width - 1)
        # Rewards rise along the row: the minimum is the next step's; tokens that end no step have smaller values.
        rewards = torch.where(end, t, -100).float()
        following = torch.where(end, t, width).flip(0).cummin(0).values.flip(0)
        up = torch.randint(-3, 4, (width,), generator=generator)
        sums = torch.where(mask, up, 0).cumsum(0)[end]
        grad = torch.zeros(width).masked_scatter(end, sums.diff(prepend=sums.new_zeros(1)).float())
        for sign, make in ((1, minimum), (-1, maximum)):
            leaf = (sign * rewards[None]).to(target.device).requires_grad_()
            out = make(mask[None], None, ids[None])(leaf)
            assert torch.equal(out[0].detach().cpu(), torch.where(mask, sign * following, 0).float())
            (got,) = torch.autograd.grad(out, leaf, up[None].to(leaf))
            assert torch.equal(got[0].cpu(), grad)

    @pytest.mark.parametrize("make", [minimum, maximum])
    def test_few_long_rows_are_cut(self, target, generator, make):
        if target.backend == "reference":
            pytest.skip("a loop over time")
        n = 700 if target.interpreted else 120_000
        rewards = torch.randn(1, n, generator=generator).mul(100).round()
        mask = torch.rand(1, n, generator=generator) > 0.2
        mask[0, -n // 3 :] = False
        for kind in KINDS:
            steps = markers(kind, 1, n, generator)
            many = {"cpp": 40, "triton": 5}.get(target.backend, 9)
            got = []
            for copies in (1, many):
                spread = [None if x is None else x.expand(copies, -1) for x in (mask, steps)]
                leaf = rewards.expand(copies, -1).clone().to(target.device).requires_grad_()
                with dispatch.use_backend(target.backend):
                    out = make(spread[0], None, spread[1])(leaf)
                    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
                got.append((out[0].detach(), grad[0]))
            for a, b in zip(*got, strict=True):
                assert torch.equal(a, b)


# ---- the largest, and the soft minimum of what is left -------------------------------------------------------


class Test_max_returns:
    @pytest.mark.parametrize("kind", KINDS)
    def test_max_is_the_mirror_of_min(self, target, generator, kind):
        rewards = torch.randn(7, 150, generator=generator).mul(2).round()  # with ties
        mask = random_mask(7, 150, generator)
        steps = markers(kind, 7, 150, generator)
        where = {"backend": target.backend, "device": target.device}
        ours = check_backend(maximum(mask, None, steps), [rewards], **where)
        mirror = evaluate(minimum(mask, None, steps), [-rewards], **where)
        assert torch.equal(ours.outputs[0], -mirror.outputs[0])
        assert torch.equal(ours.gradients[0], mirror.gradients[0])


class Test_softmin_returns:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("mean", [False, True])
    def test_softmin_returns(self, target, generator, kind, mean):
        rewards = torch.randn(7, 90, generator=generator)
        mask = random_mask(7, 90, generator)
        steps = markers(kind, 7, 90, generator)
        where = {"backend": target.backend, "device": target.device}
        fn = soft_minimum(mask, None, steps, temperature=0.3, mean=mean)
        ours = check_backend(fn, [rewards], ulps=32, **where).outputs[0].cpu()
        end = ends(kind, steps, mask)
        for b in range(7):
            for t in range(90):
                left = rewards[b, t:][end[b, t:]].double()
                want = 0.0
                if len(left) and mask[b, t]:
                    want = -0.3 * ((-left / 0.3).logsumexp(0) - (math.log(len(left)) if mean else 0))
                assert ours[b, t].item() == pytest.approx(float(want), rel=2e-6, abs=2e-6)
        # Autograd through the definition.
        leaf = rewards[:2, :12].double().requires_grad_()
        result = soft_minimum(temperature=0.3, mean=mean)(leaf)
        plain = -0.3 * ((-leaf / 0.3).flip(1).logcumsumexp(1).flip(1))
        if mean:
            plain = plain + 0.3 * torch.arange(12, 0, -1).log()
        up = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad(x, leaf, up) for x in (result, plain)), strict=True):
            torch.testing.assert_close(a, b)
        packed = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        again = soft_minimum(None, packed, None if steps is None else steps[mask], temperature=0.3, mean=mean)
        got = evaluate(again, [rewards[mask]], **where).outputs[0].cpu()
        torch.testing.assert_close(got, ours[mask], rtol=1e-6, atol=1e-6)

    def test_softmin_returns_at_the_edges(self, target):
        inf = torch.inf
        rewards = torch.tensor([[1.0, inf, 2.0, 1000.0, -1000.0, 5.0], [-inf, 1.0, -inf, 3.0, inf, inf]])
        out = rewardops.softmin_returns(rewards.to(target.device), temperature=0.1).cpu()
        torch.testing.assert_close(out[0], torch.tensor([-1000.0] * 5 + [5.0]))
        assert out[1].tolist() == [-inf, -inf, -inf, 3.0, inf, inf]
        leaf = rewards.to(target.device).requires_grad_()
        (grad,) = torch.autograd.grad(rewardops.softmin_returns(leaf).nan_to_num(0, 0, 0).sum(), leaf)
        assert not grad.isnan().any()
        assert grad[0].tolist() == [0.0, 0.0, 0.0, 0.0, 5.0, 1.0]

    @given(seed=st.integers(0, 10**6), width=st.integers(1, 20))
    def test_property_soft_minimum_tends_to_the_minimum(self, seed, width):
        g = torch.Generator().manual_seed(seed)
        rewards = torch.randn(3, width, generator=g, dtype=torch.float64)
        low = rewardops.min_returns(rewards)
        for temperature in (0.1, 0.01):
            soft = rewardops.softmin_returns(rewards, temperature=temperature)
            even = rewardops.softmin_returns(rewards, temperature=temperature, mean=True)
            slack = temperature * math.log(width) + 1e-12
            assert bool(((soft <= low + 1e-12) & (soft >= low - slack)).all())
            assert bool(((even >= low - 1e-12) & (even <= low + slack)).all())
        split = int(torch.randint(0, width + 1, (), generator=g))
        left, right = rewardops.min_returns(rewards[:, :split]), low[:, split:]
        if 0 < split < width:  # rows split and merged
            torch.testing.assert_close(torch.minimum(left, right[:, :1]), low[:, :split])


class Test_min_returns_softmin_returns:
    @pytest.mark.parametrize("make", [minimum, soft_minimum])
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_that_start_anywhere(self, target, generator, make, kind):
        """Vector loads, and rows whose arrays have no common alignment."""
        if target.interpreted and target.backend == "triton":
            pytest.skip("Triton's compiler sees to that")
        where = {"backend": target.backend, "device": target.device}
        n = 40 if target.backend == "reference" else 307
        wide = torch.randn(9, n + 8, generator=generator).mul(4).round()
        mask = torch.rand(9, n + 8, generator=generator) > 0.2
        mask[:, n // 3 : n - 30] &= torch.arange(9)[:, None] != 4  # a run of holes longer than a block
        steps = markers(kind, 9, n + 8, generator)
        for shift, other, end in ((0, 0, 0), (3, 3, 3), (2, 1, 2)):
            part = [None if x is None else x[:, other : n - end + other - shift] for x in (mask, steps)]
            fn = make(part[0], None, part[1])
            check_backend(fn, [wide[:, shift : n - end]], ulps=32, **where)
        lengths = torch.full((9,), n // 2) - torch.arange(9)
        packed = [None if x is None else pack(x[:, :n], lengths)[0] for x in (wide, mask, steps)]
        cu = pack(wide[:, :n], lengths)[1]
        check_backend(make(packed[1], cu, packed[2]), packed[:1], ulps=32, **where)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_of_a_long_row(self, target, generator, kind):
        """A row that is cut, and begins with a run of masked tokens longer than a part of it."""
        rewards, mask = (
            torch.rand(1, 700, generator=generator) * 2,
            torch.rand(1, 700, generator=generator) > 0.2,
        )
        mask[0, :290] = False
        where = {"backend": target.backend, "device": target.device}
        check_backend(soft_minimum(mask, None, markers(kind, 1, 700, generator)), [rewards], ulps=32, **where)

    @pytest.mark.parametrize("make", [minimum, soft_minimum])
    @pytest.mark.parametrize("kind", KINDS)
    def test_upstream_gradients_that_are_not_finite(self, target, generator, make, kind):
        """They reach what the specification says, and nothing else."""
        rewards = torch.rand(4, 90, generator=generator).mul(8).round() * 20
        mask, steps = random_mask(4, 90, generator), markers(kind, 4, 90, generator)
        up = torch.randn(4, 90, generator=generator)
        up[0, 10], up[1, 30], up[2, 50], up[3, 5], up[3, 40] = torch.inf, -torch.inf, torch.nan, 3e38, 3e38
        grads = []
        for backend, device in (("reference", "cpu"), (target.backend, target.device)):
            leaf = rewards.to(device).requires_grad_()
            with dispatch.use_backend(backend):
                out = make(mask, None, steps)(leaf)
                grads.append(torch.autograd.grad(out, leaf, up.to(device))[0].cpu())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4, equal_nan=True)


class Test_softmin_returns_min_returns:
    def test_bits_do_not_depend_on_where_rows_lie(self, target, generator):
        """Rows in wide loads, rows that begin anywhere, and packed rows behind others."""
        if not target.backend.startswith("triton"):
            pytest.skip("of Triton's tiles")
        r = torch.randn(6, 81, generator=generator)
        mask = torch.rand(6, 81, generator=generator) > 0.2

        def run(r, mask, cu=None):
            tensors = [x.contiguous() if cu is not None else x for x in (r, mask)]
            r, mask = (x.to(target.device) for x in tensors)
            where = {"mask": mask, "cu_seqlens": cu}
            with dispatch.use_backend(target.backend):
                return [rewardops.min_returns(r, **where), rewardops.softmin_returns(r, **where)]

        inner = [x[:, 1:] for x in (r, mask)]
        want = run(*(x.contiguous() for x in inner))
        packed = [torch.cat([x[0, :3], x[:, 1:].flatten()]) for x in (r, mask)]
        cu = torch.tensor([0, 3, *range(83, 484, 80)], device=target.device)
        for a, b, c in zip(want, run(*inner), run(*packed, cu), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c[3:].view_as(a))

    def test_tokens_of_no_row_are_zeros(self):
        """Before the first packed row and behind the last, where nobody has looked at the offsets."""
        pytest.importorskip("triton")
        from rewardops.triton_kernels import returns, td

        from rewardops.reference.returns import ReturnsArgs
        from rewardops.reference.td import TdArgs

        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.rand(90, device=device) + 0.5
        cu = torch.tensor([7, 20, 20, 60], device=device)
        a, b = TdArgs(x, x, cu_seqlens=cu), ReturnsArgs(x, None, cu, None)
        results = [
            *td.td_scan(a),
            *td.td_scan_backward(x, x, a, True, False)[:2],
            returns.extreme_returns(b, False),
            *returns.softmin_returns(b, 0.1, False),
            returns.softmin_rewards(b, 0.1, True),
        ]
        for result in results:
            assert not result[:7].any() | result[60:].any()
            assert result[7:60].any()
