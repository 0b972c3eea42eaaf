"""Group advantages of infinite, missing, huge and tiny rewards, on every backend."""

from __future__ import annotations

import pytest
import torch
from test_advantages import NAMED, RANKED, advantages, skip_slow

import rewardops
from rewardops.reference.advantages import SCALES
from rewardops.testing import evaluate, random_mask

CUDA = True  # the `target` fixture also runs the CUDA C++ kernels

INF, NAN = torch.inf, torch.nan
# Groups, each with its own kind of rewards; the last ones are finite, and one has equal rewards.
CASES = [
    [1.0, 2.0, INF, 0.5],
    [-INF, 1.0, 2.0, 0.5],
    [1.0, -INF, 0.5, INF],
    [INF, 1.0, 0.5, INF, -2.0],
    [INF, INF, INF],
    [-INF, -INF],
    [1.0, NAN, 2.0],
    [NAN, INF, 0.0],
    [INF],
    [-INF],
    [NAN],
    [0.25, -1.0, 3.0, 0.5],
    [0.7, 0.7],
    [-2.0],
]


def interpolated(r, q):
    """The quantile as ``below + part * (above - below)``."""
    at = torch.tensor(q, dtype=torch.float32) * (len(r) - 1)  # in the precision of the rewards
    below, part = int(at.floor()), float(at - at.floor())
    if bool(r.isnan().any()):
        return torch.tensor(NAN).double()
    x = r.sort().values
    return x[below] + part * (x[below + 1] - x[below]) if part > 0 else x[below]


def numerator(r, baseline, lengths=None):
    """``reward - baseline`` of one group, in the arithmetic of float64."""
    n = len(r)
    if baseline == "mean":
        return r - r.mean()
    if baseline == "leave_one_out":
        return (n / (n - 1) if n > 1 else 0.0) * (r - r.mean())
    if baseline == "length_weighted":
        return r - (lengths * r).sum() / lengths.sum()
    if baseline == "none":
        return r
    if baseline == "second_max":
        best = torch.zeros(n, dtype=r.dtype)
        best[r.argmax()] = 1  # the earliest; of NaN first
        return best * (r - (r.sort().values[max(n - 2, 0)] if not bool(r.isnan().any()) else NAN))
    return r - interpolated(r, {"median": (n - 1) // 2 / max(n - 1, 1), "max": 1.0}.get(baseline, baseline))


def by_hand(r, baseline, scale, lengths=None, values=None):
    """The advantages of one group: equal finite rewards give 0 under a scale, and by a baseline of the group."""
    equal = bool((r == r[0]).all() and r[0].isfinite())
    if equal and (scale != "none" or (values is None and baseline != "none")):
        return r * 0
    top = r - values if values is not None else numerator(r, baseline, lengths)
    if scale == "std":
        return top / (r.std() + 1e-3) if len(r) > 1 else top * NAN
    size = {"mean_abs": r.abs().mean(), "range": r.max() - r.min(), "none": torch.tensor(1 - 1e-3)}[scale]
    return top / (size + 1e-3)


def batch(baseline):
    """All groups of CASES in shuffled rows: rewards, labels and further arguments."""
    g = torch.Generator().manual_seed(5)
    rewards = torch.tensor([r for case in CASES for r in case])
    labels = torch.tensor([7 * k - 20 for k, case in enumerate(CASES) for _ in case])
    order = torch.randperm(len(rewards), generator=g)
    extra = {}
    if baseline == "length_weighted":
        extra["lengths"] = torch.randint(1, 9, rewards.shape, generator=g)[order]
    if baseline == "values":
        extra["baseline"] = torch.randn(rewards.shape, generator=g)[order]
    return rewards[order], labels[order], extra


class Test_group_advantages_of_infinite_rewards:
    @pytest.mark.parametrize("baseline", NAMED)
    @pytest.mark.parametrize("scale", [s for s in SCALES if s != "batch_std"])
    def test_values_and_gradients_are_those_of_the_formula(self, target, baseline, scale):
        skip_slow(target, baseline, scale, ranked=("none",))
        rewards, labels, extra = batch(baseline)
        options = {"baseline": baseline, "scale": scale, "eps": 1e-3, **extra}
        ours = evaluate(
            advantages(labels, **options), [rewards], backend=target.backend, device=target.device
        )
        got, grad = (x.cpu().double() for x in (ours.outputs[0], ours.gradients[0]))
        want = torch.empty_like(got)
        for label in labels.unique():
            rows = labels == label
            per_row = [extra[k][rows].double() if k in extra else None for k in ("lengths", "baseline")]
            want[rows] = by_hand(rewards[rows].double(), baseline, scale, *per_row)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        broken = torch.stack([(~rewards[labels == x].isfinite()).any() for x in labels])
        missing = torch.stack([rewards[labels == x].isnan().any() for x in labels])
        if scale != "none":
            assert torch.equal(grad.isnan(), broken)
        elif baseline in RANKED or baseline == "max":
            assert torch.equal(grad.isnan(), missing)  # a NaN has no rank
        else:
            # The derivative of a linear function does not depend on where it is taken.
            finite = evaluate(advantages(labels, **options), [torch.ones_like(rewards)], backend="reference")
            torch.testing.assert_close(grad, finite.gradients[0].double(), rtol=1e-5, atol=1e-6)
        assert grad[~broken].isfinite().all()

    @pytest.mark.parametrize("baseline", ["mean", "none", "values", "max"])
    @pytest.mark.parametrize("reward", [INF, -INF, NAN])
    def test_the_scale_of_a_batch(self, target, generator, baseline, reward):
        """One reward that is not finite leaves no std of the batch."""
        rewards, labels = torch.randn(9, generator=generator), torch.arange(9) % 4
        rewards[6] = reward
        if baseline == "values":
            baseline = torch.randn(9, generator=generator)
        fn = advantages(labels, baseline=baseline, scale="batch_std")
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        assert ours.outputs[0].isnan().all()
        assert ours.gradients[0].isnan().all()

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("baseline", ["mean", "length_weighted", "second_max"])
    def test_order_does_not_matter(self, target, generator, baseline, scale):
        skip_slow(target, baseline, scale, ranked=())
        rewards, labels, extra = batch(baseline)
        if scale == "batch_std":
            rewards = torch.where(rewards.isnan(), 2.0, rewards)
        orders = [torch.arange(len(rewards)), torch.randperm(len(rewards), generator=generator)]
        results = []
        for order in orders:
            there = {name: x[order] for name, x in extra.items()}
            fn = advantages(labels[order], scale=scale, **{"baseline": baseline, **there})
            ours = evaluate(fn, [rewards[order]], backend=target.backend, device=target.device)
            back = order.argsort()
            results.append((ours.outputs[0].cpu()[back], ours.gradients[0].cpu()[back]))
        (first, first_grad), (second, second_grad) = results
        # Which of two infinite rewards is the best row is a matter of order; both have no finite margin.
        torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert torch.equal(second_grad.isnan(), first_grad.isnan())

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("packed", [False, True])
    def test_rows_without_a_token_do_not_count(self, target, generator, scale, packed):
        rewards, labels = torch.randn(8, generator=generator), torch.arange(8) % 2
        where = {"mask": torch.arange(8)[:, None] % 4 != 1}  # rows 1 and 5, of one group
        if packed:
            where = {"cu_seqlens": where["mask"][:, 0].cumsum(0), "num_tokens": 6}
            where["cu_seqlens"] = torch.nn.functional.pad(where["cu_seqlens"], (1, 0))
        fn = advantages(labels, scale=scale, **where)
        clean = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        rewards = rewards.clone()
        rewards[1], rewards[5] = INF, NAN
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        assert torch.equal(clean.outputs[0], ours.outputs[0])
        assert torch.equal(clean.gradients[0], ours.gradients[0])

    @pytest.mark.parametrize("value", [INF, NAN])
    def test_baselines_that_are_not_finite(self, target, value):
        """They show in their own rows, in a group of equal rewards as well."""
        rewards, values = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([value, 0.0, value, 0.0])
        fn = advantages(group_size=2, baseline=values, scale="range", eps=0.0)
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
        assert ours[[1, 3]].tolist() == [2.0, 0.0]
        assert not ours[[0, 2]].isfinite().any()


class Test_group_advantages_of_any_magnitude:
    @pytest.mark.parametrize("unit", [1e20, 1e-30, 3e37])
    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted", "max"])
    @pytest.mark.parametrize("scale", ["std", "batch_std", "mean_abs", "range"])
    def test_float32(self, target, generator, unit, baseline, scale):
        """Their squares are beyond float32: the results are float64's, rounded."""
        rewards = (torch.randn(12, generator=generator).double() * unit).float()
        lengths = torch.randint(1, 9, (12,), generator=generator)
        extra = {"lengths": lengths} if baseline == "length_weighted" else {}
        fn = advantages(group_size=4, baseline=baseline, scale=scale, eps=0.0, **extra)
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        want = []
        for r, n in zip(rewards.double().split(4), lengths.double().split(4), strict=True):
            of = rewards.double() if scale == "batch_std" else r
            size = {"mean_abs": r.abs().mean(), "range": r.max() - r.min()}.get(scale, of.std())
            want.append(numerator(r, baseline, n) / size)
        torch.testing.assert_close(
            ours.outputs[0].cpu().double(), torch.cat(want), rtol=5e-7, atol=1e-7 if unit > 1 else 0
        )
        exact = evaluate(fn, [rewards / unit], backend="reference", dtype=torch.float64).gradients[0] / unit
        if unit < 1e37:  # else the gradients have few digits in float32
            error = (ours.gradients[0].cpu().double() - exact).abs().max()
            assert error <= 2e-5 * exact.abs().max()

    @pytest.mark.parametrize("unit", [1e200, 1e-200])
    @pytest.mark.parametrize("scale", ["std", "batch_std"])
    def test_float64(self, target, generator, unit, scale):
        """Squares are beyond float64, too."""
        rewards = torch.randn(8, generator=generator, dtype=torch.float64)
        fn = advantages(group_size=4, scale=scale, eps=0.0)
        want = evaluate(fn, [rewards], backend="reference")
        ours = evaluate(fn, [rewards * unit], backend=target.backend, device=target.device)
        torch.testing.assert_close(ours.outputs[0].cpu(), want.outputs[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.gradients[0].cpu() * unit, want.gradients[0], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("unit", [1e-16, 1e-30, 1e-200, 1e30, 1e200])
    def test_lengths(self, target, generator, unit):
        """Only their ratios matter."""
        rewards = torch.randn(9, generator=generator)
        lengths = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
        dtype = torch.float32 if 1e-38 < unit < 1e38 else torch.float64
        fn = advantages(
            group_size=3, baseline="length_weighted", scale="none", lengths=(lengths * unit).to(dtype)
        )
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        r, share = rewards.double().view(3, 3), lengths.view(3, 3)
        want = r - (share * r).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        assert ours.outputs[0].dtype is torch.float32
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want.flatten(), rtol=1e-6, atol=1e-6)

    def test_lengths_of_zero(self, target, generator):
        """A row of length 0 does not weigh; where all have length 0, they weigh the same."""
        rewards, lengths = torch.randn(6, generator=generator), torch.tensor([0, 2, 3, 0, 0, 0])
        fn = advantages(group_size=3, baseline="length_weighted", scale="none", lengths=lengths)
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        r = rewards.double()
        means = torch.stack([(2 * r[1] + 3 * r[2]) / 5, r[3:].mean()]).repeat_interleave(3)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), r - means, rtol=1e-6, atol=1e-6)
        equal = evaluate(
            advantages(
                group_size=3,
                baseline="length_weighted",
                scale="none",
                lengths=lengths + (lengths.cumsum(0) > 4),
            ),
            [rewards],
            backend="reference",
        )
        torch.testing.assert_close(ours.gradients[0][3:].cpu(), equal.gradients[0][3:], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bad", [-1.0, NAN, INF])
    def test_bad_lengths(self, bad):
        """Refused, except in rows without a token."""
        rewards, lengths = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, bad, 3.0])
        options = {"group_size": 2, "baseline": "length_weighted", "scale": "none"}
        with pytest.raises(
            ValueError, match=rf"lengths: got {bad} at row 2, want finite numbers of at least 0"
        ):
            rewardops.group_advantages(rewards, lengths=lengths, **options)
        with pytest.raises(ValueError, match="lengths: got"):
            rewardops.advantages.opo(rewards, group_size=2, lengths=lengths)
        mask = torch.tensor([True, True, False, True])[:, None]
        got = rewardops.group_advantages(rewards, lengths=lengths, mask=mask, **options)
        assert got.flatten().tolist() == [0.5, -0.5, 0.0, 0.0]


class Test_reference_of_many_rows:
    def test_memory_grows_with_the_rows(self, generator):
        """100,000 rows, of which a table of all pairs would take 10 GB, in one group and in groups of 8."""
        rewards = torch.randn(100_000, generator=generator)
        for groups in (
            torch.zeros(100_000, dtype=torch.int64),
            torch.randperm(100_000, generator=generator) // 8,
        ):
            fn = advantages(groups, baseline="median", scale="range")
            with rewardops.use_backend("reference"):
                got = fn(rewards)
                shaped = rewardops.gtpo_rewards(rewards, rewards[:, None].abs(), groups)
            assert got.isfinite().all()
            assert shaped.isfinite().all()


class Test_missing_rewards:
    """NaN among several rewards per row: the row does not have that reward."""

    @staticmethod
    def rewards(generator):
        rewards = torch.randn(12, 3, generator=generator)
        rewards[0, 1] = rewards[1, 1] = rewards[4, 0] = rewards[5, 2] = NAN
        rewards[8:12, 2] = NAN  # no row of a group
        rewards[6] = NAN  # a row without any reward
        rewards[8:11, 0] = NAN  # one row alone has it
        return rewards

    @staticmethod
    def by_hand(rewards, weights, live=None):
        out = torch.zeros(len(rewards), dtype=torch.float64)
        for column, weight in zip(rewards.double().unbind(1), weights, strict=True):
            for group in torch.arange(len(rewards)).split(4):
                has = group[~column[group].isnan()]
                has = has if live is None else has[live[has]]
                if len(has) > 1:
                    x = column[has]
                    out[has] += weight * (x - x.mean()) / (x.std() + 1e-6)
        return out

    def test_group_advantages(self, target, generator):
        rewards, weights = self.rewards(generator), [1.0, 0.5, 2.0]
        fn = advantages(group_size=4, weights=weights)
        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        want = self.by_hand(rewards, weights)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-5, atol=1e-6)
        assert ours.outputs[0][6] == 0
        # The gradient is that of each column among the rows that have it.
        assert ours.gradients[0].isfinite().all()
        assert not ours.gradients[0].cpu()[rewards.isnan()].any()
        mask = random_mask(12, 5, generator)
        mask[2] = False
        got = advantages(group_size=4, weights=weights, mask=mask)(rewards.to(target.device)).cpu().double()
        want = torch.where(mask, self.by_hand(rewards, weights, mask.any(1))[:, None], 0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("whitening", ["rows", "tokens", "none"])
    @pytest.mark.parametrize("layout", ["rows", "padded", "packed"])
    def test_gdpo(self, target, generator, whitening, layout):
        rewards, mask = self.rewards(generator), random_mask(12, 5, generator, empty_row=False)
        mask[:, 0], mask[3] = True, False
        live = torch.ones(12).bool() if layout == "rows" else mask.any(1)
        where = {"padded": {"mask": mask}, "rows": {}}.get(layout)
        if where is None:
            cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
            where = {"cu_seqlens": cu, "num_tokens": int(cu[-1])}
        want = self.by_hand(rewards, [1.0] * 3, live)
        counted = live & ~rewards.isnan().all(1)
        repeats = torch.ones(12, dtype=torch.int64)
        if whitening == "tokens" and layout != "rows":
            repeats = mask.sum(1)
        if whitening != "none":
            each = want[counted].repeat_interleave(repeats[counted])
            want = torch.where(counted, (want - each.mean()) / (each.var() + 1e-8).sqrt(), 0)
        if layout == "padded":
            want = torch.where(mask, want[:, None], 0)
        if layout == "packed":
            want = want.repeat_interleave(mask.sum(1))

        def fn(r):
            there = {k: v.to(r.device) if isinstance(v, torch.Tensor) else v for k, v in where.items()}
            return rewardops.advantages.gdpo(r, group_size=4, whitening=whitening, **there)

        ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-4, atol=1e-5)
        assert ours.gradients[0].isfinite().all()
        assert not ours.gradients[0].cpu()[rewards.isnan()].any()

    def test_infinite_rewards_show(self, target):
        rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [0.5, INF], [0.25, 1.0]]).to(target.device)
        got = rewardops.group_advantages(rewards, group_size=4, weights=[1, 1], scale="none").cpu()
        assert got[0] == 1 - 0.4375
        assert got[1:].tolist()[0] == got[1:].tolist()[2] == -INF
        assert got[2].isnan()
        assert rewardops.advantages.gdpo(rewards, group_size=4).isnan().all()

    def test_compiled_and_debugged(self, generator):
        rewards = self.rewards(generator)

        def fn(r):
            return rewardops.advantages.gdpo(r, group_size=4, weights=[1.0, 0.5, 2.0])

        got = torch.compile(fn, fullgraph=True, backend="aot_eager")(rewards)
        torch.testing.assert_close(got, fn(rewards))
        with rewardops.debug():
            assert torch.equal(fn(rewards), fn(rewards))
            rewards[0, 2] = INF
            with pytest.raises(ValueError, match=r"rewards: got inf at \[0, 2\], want finite"):
                fn(rewards)


class Test_rewards_per_token:
    """Rewards [B, T] in place of [B] are refused, not taken for T separate rewards."""

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(
        "name",
        [
            "grpo",
            "dr_grpo",
            "rloo",
            "lite_ppo",
            "opo",
            "pass_at_k",
            "max_rl",
            "gpg",
            "reinforce_plus_plus_baseline",
        ],
    )
    def test_presets(self, name, masked):
        rewards, mask = torch.randn(4, 7), torch.ones(4, 7).bool()
        options = {"mask": mask} if masked or name == "reinforce_plus_plus_baseline" else {}
        sums = r"rewards: got shape \[4, 7\], want \[B\]: sum per-token rewards over each row first"
        with pytest.raises(ValueError, match=sums):
            getattr(rewardops.advantages, name)(rewards, group_size=2, **options)
        got = getattr(rewardops.advantages, name)(rewards.sum(1), group_size=2, mask=mask)
        assert got.shape == (4, 7)

    def test_group_advantages(self):
        rewards, mask = torch.randn(4, 7), torch.ones(4, 7).bool()
        with pytest.raises(ValueError, match=r"for R separate rewards \[B, R\] pass weights="):
            rewardops.group_advantages(rewards, group_size=2, mask=mask)
        both = rewardops.group_advantages(rewards, group_size=2, weights=[1] * 7)
        parts = [rewardops.group_advantages(rewards[:, t], group_size=2) for t in range(7)]
        torch.testing.assert_close(both, sum(parts))

    def test_gdpo(self):
        rewards, mask = torch.randn(4, 7), torch.ones(4, 7).bool()
        with pytest.raises(ValueError, match=r"rewards: got shape \[4, 7\], that of the mask"):
            rewardops.advantages.gdpo(rewards, group_size=2, mask=mask)
        named = rewardops.advantages.gdpo(rewards, group_size=2, mask=mask, weights=[1] * 7)
        torch.testing.assert_close(named[:, 0], rewardops.advantages.gdpo(rewards, group_size=2))


TOKENS = torch.arange(15).view(5, 3)
OF_GROUPS = {
    "group_advantages": lambda x, **g: rewardops.group_advantages(x, **g),
    "gdpo": lambda x, **g: rewardops.advantages.gdpo(x[:, None], **g),
    "gpg": lambda x, **g: rewardops.advantages.gpg(x, **g),
    "gtpo_rewards": lambda x, **g: rewardops.gtpo_rewards(x, torch.ones(5, 3), **g),
    "grpo_s_rewards": lambda x, **g: rewardops.grpo_s_rewards(x, torch.ones(5, 3), **g),
    "signed_group_normalize": lambda x, **g: rewardops.signed_group_normalize(torch.ones(5, 3), x, **g),
    "unlikeliness_rewards": lambda x, **g: rewardops.unlikeliness_rewards(x, -x, **g),
    "budget_advantages": lambda x, **g: rewardops.budget_advantages(x[:, None], **g),
    "high_entropy_mask": lambda x, **g: rewardops.high_entropy_mask(
        torch.ones(5, 3), fraction=0.5, scope="group", **g
    ),
    "prefix_values": lambda x, **g: rewardops.prefix_values(TOKENS, x, **g),
    "tempo_advantages": lambda x, **g: rewardops.tempo_advantages(TOKENS, x, **g),
}


@pytest.mark.parametrize("name", OF_GROUPS)
class Test_labels:
    """Labels and sizes are read alike by every function of groups."""

    def test_wrong_numbers(self, name):
        fn, rewards = OF_GROUPS[name], torch.randn(5)
        for groups in (torch.zeros(4).long(), torch.zeros(6).long(), torch.zeros(5, 1).long()):
            with pytest.raises(ValueError, match=r"groups: got shape \[.*\], want \[5\]"):
                fn(rewards, groups=groups)
        for groups in (["a"] * 4, ["a"] * 6, []):
            with pytest.raises(ValueError, match=r"groups: got \d labels, want 5"):
                fn(rewards, groups=groups)
        for sizes in ([2, 2], [2, 4], [-1, 6], [5, -1, 1], [], [True] * 5):
            with pytest.raises(ValueError, match=r"group_size: got sizes \["):
                fn(rewards, group_size=sizes)
            if sizes[:1] == [True]:
                with pytest.raises(TypeError, match=r"group_size: got dtype torch\.bool"):
                    fn(rewards, group_size=torch.tensor(sizes))
                continue
            with pytest.raises(ValueError, match=r"group_size: got sizes \["):
                fn(rewards, group_size=torch.tensor(sizes, dtype=torch.int64))
        for size in (True, 2.5, "2"):
            with pytest.raises(TypeError, match="group_size: got "):
                fn(rewards, group_size=size)
        for size in (0, -5, 2):
            with pytest.raises(ValueError, match=f"group_size: got {size}, want a divisor of the 5 rows"):
                fn(rewards, group_size=size)

    def test_empty_groups(self, name):
        """Sizes of 0 are groups without rows, in a list as in a tensor."""
        fn, rewards = OF_GROUPS[name], torch.randn(5, generator=torch.Generator().manual_seed(1))
        want = fn(rewards, groups=[9, 9, 9, 4, 4])
        for sizes in ([3, 0, 2], [0, 3, 2, 0], (3, 2)):
            for form in (sizes, torch.tensor(sizes), torch.tensor(sizes, dtype=torch.int32)):
                got = fn(rewards, group_size=form)
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
