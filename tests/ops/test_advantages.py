"""group_advantages on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.reference.advantages import BASELINES, SCALES
from rewardops.testing import check_backend, evaluate, pack, random_groups, random_mask

CUDA = True  # the `target` fixture also runs the CUDA C++ kernels


def advantages(groups=None, **options):
    def fn(rewards):
        def there(x):
            return x.to(rewards.device) if isinstance(x, torch.Tensor) else x

        return rewardops.group_advantages(
            rewards, there(groups), **{key: there(value) for key, value in options.items()}
        )

    return fn


# The baseline "values" stands for a tensor, see `extras`.
NAMED = [b if b != "quantile" else 0.3 for b in BASELINES]


def extras(baseline, rewards, generator):
    """The further arguments of a baseline."""
    if baseline == "values":
        return {"baseline": torch.randn(rewards.shape, generator=generator)}
    if baseline == "length_weighted":
        return {"lengths": torch.randint(0, 9, rewards.shape, generator=generator)}
    return {}


RANKED = ("median", 0.3, "second_max")


def skip_slow(target, baseline, scale, ddof=1, ranked=("none", "batch_std")):
    """Skip interpreted bisection, which takes seconds, except with the scales ``ranked``; and unused ``ddof``."""
    if not (target.interpreted and target.backend == "triton"):
        return
    if baseline in RANKED and (scale not in ranked or ddof == 0):
        pytest.skip("covered by the other scales")
    if ddof == 0 and scale not in ("std", "batch_std"):
        pytest.skip("covered by ddof = 1")


def loop(rewards, groups, baseline, scale, eps, ddof, lengths=None):
    """The definition as a differentiable loop over groups."""
    out = torch.zeros_like(rewards)
    for g in groups.unique():
        rows = (groups == g).nonzero()[:, 0]
        r = rewards[rows]
        n = len(rows)
        alike = n == 1 or bool((r == r[0]).all())
        if baseline == "mean":
            a = r - r.mean()
        elif baseline == "leave_one_out":
            a = r - (r.sum() - r) / (n - 1) if n > 1 else r * 0
        elif baseline == "median":
            a = r - r.median()
        elif baseline == "max":
            a = r - r.max()
        elif baseline == "second_max":
            a = torch.zeros_like(r)
            if n > 1:
                best = r.argmax()
                a[best] = r[best] - r.sort(descending=True).values[1]
        elif baseline == "length_weighted":
            share = lengths[rows].to(r.dtype)
            a = r - (share * r).sum() / share.sum() if share.sum() > 0 else r - r.min()
        elif isinstance(baseline, torch.Tensor):
            a = r - baseline[rows].to(r.dtype)
        elif baseline == "none":
            a = r.clone()
        else:
            a = r - r.quantile(baseline)
        if not isinstance(baseline, torch.Tensor) and baseline != "none" and alike:
            a = a * 0
        over = rewards if scale == "batch_std" else r
        if scale != "none" and bool((over == over[0]).all()):
            a = a * 0
        elif scale in ("std", "batch_std"):
            a = a / (over.std(correction=ddof) + eps)
        elif scale == "mean_abs":
            a = a / (r.abs().mean() + eps)
        elif scale == "range":
            a = a / (r.max() - r.min() + eps)
        out[rows] = a
    return out


def by_cuda(device, fn, rewards, up=None):
    """Advantages and the gradient of the rewards, by CUDA C++."""
    leaf = rewards.to(device).requires_grad_()
    with rewardops.use_backend("cuda"):
        out = fn(leaf)
        if up is None:
            return out.detach().cpu()
        (grad,) = torch.autograd.grad(out, leaf, up.to(device))
    return out.detach().cpu(), grad.cpu()


class Test_group_advantages:
    @pytest.mark.parametrize("baseline", NAMED)
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_matches_float64_and_the_loop(self, target, generator, baseline, scale, ddof):
        skip_slow(target, baseline, scale, ddof)
        rows = 16 if target.interpreted else 60
        groups = random_groups(rows, generator)
        rewards = torch.rand(rows, generator=generator).round(decimals=2) - 0.3
        options = {
            "baseline": baseline,
            "scale": scale,
            "ddof": ddof,
            "eps": 1e-4,
            **extras(baseline, rewards, generator),
        }
        ours = check_backend(
            advantages(groups, **options), [rewards], backend=target.backend, device=target.device
        ).outputs[0]
        want = loop(rewards.double(), groups, **options)
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("baseline", NAMED)
    @pytest.mark.parametrize("scale", SCALES)
    def test_gradient_is_the_loops(self, target, generator, baseline, scale):
        """For distinct rewards, where order statistics have a unique gradient."""
        skip_slow(target, baseline, scale, ranked=("batch_std",))
        rows = 16 if target.interpreted else 24
        groups = random_groups(rows, generator)
        rewards = (torch.randperm(rows, generator=generator) / 7.0 - 1.1).float()
        options = {
            "baseline": baseline,
            "scale": scale,
            "ddof": 1,
            "eps": 1e-4,
            **extras(baseline, rewards, generator),
        }
        up = torch.randn(rows, generator=generator, dtype=torch.float64)
        exact = rewards.double().requires_grad_()
        (want,) = torch.autograd.grad(loop(exact, groups, **options), exact, up)
        leaf = rewards.to(target.device).requires_grad_()
        (got,) = torch.autograd.grad(advantages(groups, **options)(leaf), leaf, up.float().to(target.device))
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-4, atol=2e-5)

    def test_gradient_of_given_baselines(self, target, generator):
        rewards, values = torch.randn(2, 12, generator=generator)
        values = values.to(target.device).requires_grad_()
        out = rewardops.group_advantages(
            rewards.to(target.device), group_size=4, baseline=values, scale="range"
        )
        up = torch.randn(12, generator=generator)
        (got,) = torch.autograd.grad(out, values, up.to(target.device))
        spread = rewards.view(3, 4).amax(1) - rewards.view(3, 4).amin(1)
        torch.testing.assert_close(
            got.cpu(), -up / (spread.repeat_interleave(4) + 1e-6), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted", "values", "median"])
    def test_a_group_of_one_kept_raw(self, target, generator, baseline):
        rewards = torch.tensor([2.5, 1.0, 0.0, -3.0])
        groups = torch.tensor([7, 1, 1, 4])
        options = {"baseline": baseline, "singleton": "raw", **extras(baseline, rewards, generator)}
        ours = check_backend(
            advantages(groups, **options), [rewards], backend=target.backend, device=target.device
        )
        assert ours.outputs[0][[0, 3]].tolist() == [2.5, -3.0]

    def test_order_statistics_of_odd_rewards(self, target):
        """Ties, negative zero, infinities and a wide range of magnitudes have one order."""
        r = torch.tensor([0.0, -0.0, 1e-38, -1e30, torch.inf, 3.0, 3.0, -torch.inf])
        for baseline, want in (("median", 0.0), ("max", torch.inf), (0.75, 3.0), (0.0, -torch.inf)):
            got = advantages(group_size=8, baseline=baseline, scale="none")(r.to(target.device)).cpu()
            torch.testing.assert_close(got, torch.where(r == want, got, r - want), equal_nan=True)

    def test_vector_rewards(self, target, generator):
        rewards = torch.randn(12, 3, generator=generator)
        mask = random_mask(12, 5, generator)
        mask[3] = False
        weights = [1.0, 0.5, 0.0]
        got = rewardops.group_advantages(
            rewards.to(target.device), group_size=4, weights=weights, mask=mask.to(target.device)
        ).cpu()
        parts = [advantages(group_size=4, mask=mask)(rewards[:, k].to(target.device)).cpu() for k in range(3)]
        torch.testing.assert_close(
            got, sum(w * p for w, p in zip(weights, parts, strict=True)), rtol=1e-5, atol=1e-6
        )

    def test_groups_of_any_kind(self, target):
        rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0]).to(target.device)
        want = rewardops.group_advantages(rewards, torch.tensor([0, 0, 1, 1, 1]).to(target.device))
        for groups in (
            np.array(["a", "a", "b", "b", "b"]),
            ["x", "x", (1, 2), (1, 2), (1, 2)],
            np.array([9, 9, 3, 3, 3]),
        ):
            assert torch.equal(rewardops.group_advantages(rewards, groups), want)
        assert torch.equal(rewardops.group_advantages(rewards, group_size=[2, 3]), want)
        assert torch.equal(rewardops.group_advantages(rewards, group_size=[2, 0, 3]), want)
        with pytest.raises(ValueError, match="groups: got 4 labels, want 5"):
            rewardops.group_advantages(rewards, ["a"] * 4)
        with pytest.raises(
            ValueError, match=r"group_size: got sizes \[2, 2\], want sizes that sum to the 5 rows"
        ):
            rewardops.group_advantages(rewards, group_size=[2, 2])
        with pytest.raises(TypeError, match="groups: got str"):
            rewardops.group_advantages(rewards, "abcde")

    def test_bad_choices(self):
        rewards = torch.ones(4)
        with pytest.raises(ValueError, match="baseline: got 'values', want one of"):
            rewardops.group_advantages(rewards, group_size=2, baseline="values")
        with pytest.raises(ValueError, match=r"baseline: got shape \[3\], want \[4\]"):
            rewardops.group_advantages(rewards, group_size=2, baseline=rewards[:3])
        with pytest.raises(ValueError, match="lengths: got None without a mask"):
            rewardops.group_advantages(rewards, group_size=2, baseline="length_weighted")
        with pytest.raises(ValueError, match=r"baseline: got 1\.5, want a quantile from 0 to 1"):
            rewardops.group_advantages(rewards, group_size=2, baseline=1.5)
        with pytest.raises(ValueError, match="singleton: got 'raw' with scale='batch_std'"):
            rewardops.group_advantages(rewards, group_size=2, scale="batch_std", singleton="raw")
        with pytest.raises(ValueError, match="weights: got a value for rewards"):
            rewardops.group_advantages(rewards, group_size=2, weights=[1.0])
        with pytest.raises(ValueError, match="weights: got 1, want 2"):
            rewardops.group_advantages(torch.ones(4, 2), group_size=2, weights=[1.0])
        with pytest.raises(ValueError, match=r"lengths: got shape \[3\], want \[4\]"):
            rewardops.group_advantages(
                rewards, group_size=2, baseline="length_weighted", lengths=torch.ones(3)
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes(self, target, generator, dtype):
        groups = random_groups(40, generator)
        rewards = torch.randn(40, generator=generator).to(dtype)
        ours = check_backend(advantages(groups), [rewards], backend=target.backend, device=target.device)
        assert ours.outputs[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert ours.gradients[0].dtype is dtype

    @pytest.mark.parametrize("baseline", NAMED)
    @pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
    def test_to_tokens(self, target, generator, baseline, scale):
        skip_slow(target, baseline, scale, ranked=("none",))
        rows = 12 if target.interpreted else 24
        groups = random_groups(rows, generator)
        rewards = torch.randn(rows, generator=generator)
        mask = random_mask(rows, 33, generator)
        options = {"baseline": baseline, "scale": scale, **extras(baseline, rewards, generator)}
        if baseline == "length_weighted":
            options["lengths"] = None  # the number of valid tokens
        fn = advantages(groups, mask=mask, **options)
        ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
        live = mask.any(1)
        options = {k: v[live] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        if baseline == "length_weighted":
            options["lengths"] = mask.sum(1)[live]
        want = torch.zeros(rows, dtype=torch.float64)
        want[live] = loop(rewards[live].double(), groups[live], eps=1e-6, ddof=1, **options)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want[:, None] * mask, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_equals_padded(self, target, generator, masked):
        groups, rewards = random_groups(20, generator), torch.randn(20, generator=generator)
        lengths = torch.randint(0, 40, (20,), generator=generator)
        lengths[4] = 0
        mask = random_mask(20, 40, generator, empty_row=False) if masked else torch.ones(20, 40).bool()
        mask &= torch.arange(40) < lengths[:, None]
        packed_mask, cu = pack(mask, lengths)
        padded = evaluate(
            advantages(groups, mask=mask), [rewards], backend=target.backend, device=target.device
        ).outputs[0]
        for offsets in (cu, cu.long()):
            options = {"mask": packed_mask} if masked else {"num_tokens": int(cu[-1])}
            ours = check_backend(
                advantages(groups, cu_seqlens=offsets, **options),
                [rewards],
                backend=target.backend,
                device=target.device,
            )
            want = pack(padded.cpu(), lengths)[0]
            assert torch.equal(ours.outputs[0].cpu(), want)

    def test_a_masked_row_does_not_count_even_with_a_nan_reward(self, target, generator):
        groups = torch.zeros(6, dtype=torch.int64)
        rewards = torch.rand(6, generator=generator)
        mask = torch.ones(6, 8).bool()
        mask[2] = False
        clean = evaluate(
            advantages(groups, mask=mask), [rewards], backend=target.backend, device=target.device
        )
        rewards = rewards.clone()
        rewards[2] = torch.nan
        ours = evaluate(
            advantages(groups, mask=mask),
            [rewards],
            backend=target.backend,
            device=target.device,
            poison=mask,
        )
        assert torch.equal(clean.outputs[0], ours.outputs[0])
        assert torch.equal(clean.gradients[0], ours.gradients[0])
        assert ours.gradients[0][2].item() == 0

    @pytest.mark.parametrize("value", [0.7, 1e8, -3.3e-5, 0.0])
    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
    @pytest.mark.parametrize("scale", SCALES)
    def test_equal_rewards_give_exactly_zero(self, target, value, baseline, scale):
        # More rows than a step of the join takes; fewer in the interpreter.
        rows = (150 if (scale, value) == ("std", 0.7) else 30) if target.interpreted else 1020
        groups = torch.arange(rows) % 3
        groups[-20:] = 9
        ours = evaluate(
            advantages(groups, baseline=baseline, scale=scale, eps=0.0),
            [torch.full((rows,), value)],
            backend=target.backend,
            device=target.device,
        )
        assert bool((ours.outputs[0] == 0).all())
        assert ours.gradients[0].isfinite().all()

    def test_a_group_of_one(self, target):
        rewards = torch.tensor([3.0, 5.0])
        for baseline in NAMED:
            for scale in SCALES:
                if baseline == "values" or (baseline, scale) == ("none", "batch_std"):
                    continue
                options = {"lengths": torch.ones(2)} if baseline == "length_weighted" else {}
                fn = advantages(torch.tensor([1, 2]), baseline=baseline, scale=scale, **options)
                ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
                want = rewards if (baseline, scale) == ("none", "none") else torch.zeros(2)
                assert torch.equal(ours.outputs[0].cpu(), want)

    def test_rewards_near_1000_keep_their_differences(self, target):
        rewards = 1000 + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.05])
        exact = rewards.double()
        want = (exact - exact.mean()) / (exact.std() + 1e-6)
        ours = evaluate(advantages(group_size=8), [rewards], backend=target.backend, device=target.device)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("scale", ["std", "range", "none"])
    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "median", 0.3, 0.9, "max", "second_max"])
    def test_a_nan_reward_breaks_its_group_and_no_other(self, target, baseline, scale):
        """A NaN at any position, of either sign, or alone in its group: the whole group gets NaN."""
        skip_slow(target, baseline, scale, ranked=("none",))
        fn = advantages(group_size=[4, 1, 3], baseline=baseline, scale=scale)
        whole = [0.5, 0.25, 2.0, 1.0, 7.0, 1.0, 2.0, 3.0]
        want = evaluate(fn, [torch.tensor(whole)], backend=target.backend, device=target.device).outputs[0]
        for at, nan in ((0, torch.nan), (2, -torch.nan), (3, torch.nan), (4, torch.nan)):
            rewards = torch.tensor(whole)
            rewards[at] = nan
            broken = torch.tensor([at < 4] * 4 + [at == 4] + [False] * 3)
            ours = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0]
            assert torch.equal(ours.isnan().cpu(), broken)
            assert torch.equal(ours.cpu()[~broken], want.cpu()[~broken])

    def test_many_rows(self, target, generator):
        """More rows than a block of the equality join."""
        rows = 150 if target.interpreted else 2500
        groups = torch.randint(0, 40, (rows,), generator=generator)
        rewards = torch.randn(rows, generator=generator)
        check_backend(advantages(groups), [rewards], backend=target.backend, device=target.device)

    def test_65536_rows_in_shuffled_groups(self, target, generator):
        if target.interpreted:
            pytest.skip("a program a row, by the interpreter")
        rewards = torch.randn(65536, generator=generator) + 1000
        order = torch.randperm(65536, generator=generator)
        got = advantages(torch.arange(65536)[order] // 16 * 7919 - 3)(rewards[order].to(target.device)).cpu()
        grouped = rewards.double().view(-1, 16)
        want = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
        torch.testing.assert_close(got.double(), want.flatten()[order], rtol=1e-5, atol=1e-5)

    def test_gradient_of_the_scale_alone(self, target, generator):
        """Packed rows without a mask and without a token gradient, which would give the number of tokens."""
        rewards, groups = torch.randn(7, generator=generator), torch.tensor([1, 1, 2, 2, 1, 2, 1])
        cu = torch.tensor([0, 3, 3, 5, 9, 10, 12, 12])  # rows 1 and 6 are empty

        def fn(rewards):
            there = (x.to(rewards.device) for x in (groups, cu))
            options = ("mean", 0.0, "std", 1e-6, 1, False, False)
            return rewardops.ops.advantages.group_advantages(
                rewards, next(there), None, None, None, next(there), 12, *options
            )[1]

        check_backend(fn, [rewards], backend=target.backend, device=target.device)

    @pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
    def test_empty(self, target, shape):
        rewards, mask = torch.ones(shape[0]), torch.ones(shape).bool()
        ours = check_backend(
            advantages(torch.zeros(shape[0]).long(), mask=mask),
            [rewards],
            backend=target.backend,
            device=target.device,
        )
        assert ours.outputs[0].shape == shape

    @given(
        seed=st.integers(0, 10**6),
        size=st.integers(1, 12),
        baseline=st.sampled_from(["mean", "leave_one_out", "median", 0.3, "max", "second_max", "none"]),
        scale=st.sampled_from(SCALES),
    )
    def test_property_order_and_names_do_not_matter(self, seed, size, baseline, scale):
        g = torch.Generator().manual_seed(seed)
        groups = torch.randint(0, 3, (size,), generator=g)
        rewards = torch.randn(size, generator=g)
        options = {"baseline": baseline, "scale": scale}
        here = rewardops.group_advantages(rewards, groups, **options)
        order = torch.randperm(size, generator=g)
        there = rewardops.group_advantages(rewards[order], 17 - 5 * groups[order], **options)
        torch.testing.assert_close(there, here[order], rtol=3e-7, atol=1e-9)
        if (baseline, scale) != ("mean", "std"):
            return
        sums = torch.zeros(3).index_add(0, groups, here)
        torch.testing.assert_close(sums, torch.zeros(3), rtol=0, atol=2e-6 * size)

    # ---- CUDA C++: blocks of several rows, lists of members, vectors of tokens ----------------------------

    @pytest.mark.parametrize(
        ("groups", "masked", "baseline", "scale"),
        [
            (42, True, "mean", "std"), (42, False, 0.3, "range"), (2, True, "median", "batch_std"),
            (2, False, "second_max", "mean_abs"), (2, True, "length_weighted", "std"), (2, True, "none", "none"),
        ],
    )  # fmt: skip
    def test_lists_of_members(self, target_cuda, generator, groups, masked, baseline, scale):
        """More members than a block has space for, in all its groups together or in one group, listed in parts."""
        rows = 2100  # 64 rows per block
        groups = torch.arange(rows) % groups * 3 - 5
        if len(groups.unique()) == 2:
            groups = torch.where(torch.rand(rows, generator=generator) < 0.01, groups, 7)
        rewards = (torch.randperm(rows, generator=generator) / 97.0 - 3.1).float()
        live = torch.rand(rows, generator=generator) > (0.1 if masked else 0)
        options = {"baseline": baseline, "scale": scale, "ddof": 1, "eps": 1e-4}
        options |= extras(baseline, rewards, generator)
        there = {"mask": live[:, None]} if masked else {}
        up = torch.randn(rows, generator=generator) * live
        got, grad = by_cuda(
            target_cuda, advantages(groups, **options, **there), rewards, up[:, None] if masked else up
        )
        exact = rewards[live].double().requires_grad_()
        options = {k: v[live] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        want = loop(exact, groups[live], **options)
        (want_grad,) = torch.autograd.grad(want, exact, up[live].double())
        torch.testing.assert_close(got.flatten()[live].double(), want.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad[live].double(), want_grad, rtol=1e-4, atol=1e-4)
        assert not got.flatten()[~live].any()
        assert not grad[~live].any()

    @pytest.mark.parametrize("baseline", ["mean", "median", "second_max"])
    def test_bits_are_of_the_members_alone(self, target_cuda, generator, baseline):
        """The distribution of rows to blocks does not change a group's bits."""
        fn, rewards = advantages, torch.randn(12, generator=generator)
        groups = torch.tensor([4, 1, 1, 4, 4, 1, 4, 4, 1, 4, 1, 1])
        want = by_cuda(target_cuda, fn(groups, baseline=baseline), rewards)
        places = torch.randperm(500, generator=generator)[:12].sort().values
        more, labels = torch.randn(500, generator=generator), torch.arange(500) // 5 + 10
        more[places], labels[places] = rewards, groups
        assert torch.equal(by_cuda(target_cuda, fn(labels, baseline=baseline), more)[places], want)

    def test_parts_of_long_rows(self, target_cuda, generator):
        """Several blocks per row, forward and backward."""
        mask = torch.rand(3, 9001, generator=generator) > 0.5
        mask[1] = False
        rewards, up = torch.tensor([1.5, 9.0, -0.25]), torch.randn(3, 9001, generator=generator)
        got, grad = by_cuda(
            target_cuda, advantages(torch.zeros(3).long(), mask=mask, scale="none"), rewards, up
        )
        want = torch.tensor([0.875, 0, -0.875])
        assert torch.equal(got, torch.where(mask, want[:, None], 0))
        sums = torch.where(mask, up, 0).double().sum(1)
        exact = torch.stack([sums[0] - (sums[0] + sums[2]) / 2, sums[1], sums[2] - (sums[0] + sums[2]) / 2])
        torch.testing.assert_close(grad.double(), exact, rtol=1e-6, atol=1e-6)

    def test_rows_whose_first_valid_token_is_late(self, target_cuda):
        """The first valid token in the first load, in the aligned search, or at its end."""
        late = [0, 7, 8, 9, 30, 39, 40, 41, 55, 56, 57, 72, 551, 552, 580, 1063, 1199]
        for width in (1200, 1213):
            mask = torch.zeros(len(late) + 1, width).bool()
            for row, t in enumerate(late):
                mask[row, t] = True
            rewards = torch.arange(len(late) + 1.0)
            got = by_cuda(
                target_cuda, advantages(torch.zeros(len(rewards)).long(), mask=mask, scale="none"), rewards
            )
            want = torch.where(mask, (rewards - rewards[:-1].mean())[:, None], 0)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


class Test_whiten:
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_whiten(self, generator, ddof, dtype):
        x = (torch.randn(7, 9, generator=generator) + 1000).to(dtype)
        mask = random_mask(7, 9, generator)
        got = rewardops.whiten(x.masked_fill(~mask, torch.nan), mask, ddof=ddof)
        exact = x.double()[mask]
        want = (exact - exact.mean()) / (exact.var(correction=ddof) + 1e-8).sqrt()
        torch.testing.assert_close(got[mask].double(), want, rtol=2e-6, atol=1e-6)
        assert got.dtype is dtype
        assert not got[~mask].any()
        assert not rewardops.whiten(torch.full((3, 4), 0.7)).any()
        assert rewardops.whiten(torch.ones(0, 3)).shape == (0, 3)
        shifted = rewardops.whiten(x, mask, ddof=ddof, shift_mean=False)
        torch.testing.assert_close(shifted[mask].double(), want + exact.mean(), rtol=2e-6, atol=1e-6)
        leaf = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: rewardops.whiten(v, mask[:3, :4], ddof=ddof), leaf)


class Test_advantages_to_tokens:
    def test_advantages_to_tokens(self, target, generator):
        values = torch.randn(5, generator=generator)
        mask = random_mask(5, 6, generator)
        got = rewardops.advantages_to_tokens(values.to(target.device), mask=mask.to(target.device)).cpu()
        assert torch.equal(got, torch.where(mask, values[:, None], 0))
        cu = torch.tensor([0, 2, 2, 5, 6, 9])
        got = rewardops.advantages_to_tokens(
            values.to(target.device), cu_seqlens=cu.to(target.device), num_tokens=9
        ).cpu()
        assert torch.equal(got, values.repeat_interleave(cu.diff()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("packed", [False, True])
    def test_tokens_at_every_alignment(self, target_cuda, generator, dtype, packed):
        """Rows and masks at any alignment; vectors, chunks of vectors, remainders; NaN at masked tokens."""
        for width, first in (
            (1, 0),
            (2, 1),
            (3, 3),
            (5, 2),
            (8, 1),
            (131, 3),
            (516, 0),
            (1031, 1),
            (1032, 5),
        ):
            mask = (torch.rand(5, width + 7, generator=generator) > 0.3)[:, first : first + width]
            rewards = torch.randn(5, generator=generator).to(dtype)
            up = torch.randn(5, width, generator=generator).to(dtype).masked_fill(~mask, torch.nan)
            want = torch.where(mask, rewards[:, None], 0)
            want_grad = torch.where(mask, up, 0).double().sum(1)
            tokens = {"mask": mask}
            if packed:
                lengths = torch.tensor([width, 0, max(width - 1, 0), 3 % (width + 1), width])
                inside = torch.arange(width) < lengths[:, None]
                want_grad = torch.where(mask & inside, up, 0).double().sum(1)
                tokens = dict(zip(("mask", "cu_seqlens"), pack(mask, lengths), strict=True))
                up, want = pack(up, lengths)[0], pack(want, lengths)[0]

            def fn(r, tokens=tokens):
                there = {k: v.to(r.device) for k, v in tokens.items()}
                return rewardops.advantages_to_tokens(r, **there)

            got, grad = by_cuda(target_cuda, fn, rewards, up)
            assert torch.equal(got, want)
            torch.testing.assert_close(grad.double(), want_grad, rtol=3e-7, atol=1e-6)
