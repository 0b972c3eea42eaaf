"""gtpo_rewards on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.core import dispatch
from rewardops.testing import check_backend, evaluate, pack, random_groups, random_mask


def gtpo(groups, mask=None, cu_seqlens=None, **options):
    def fn(rewards, entropy):
        to = [None if x is None else x.to(rewards.device) for x in (groups, mask, cu_seqlens)]
        return rewardops.gtpo_rewards(
            rewards, entropy, to[0], mask=to[1], cu_seqlens=to[2], entropy_grad=True, **options
        )

    return fn


def draw(batch, width, generator):
    rewards = (torch.rand(batch, generator=generator) > 0.5).float()
    return rewards, torch.rand(batch, width, generator=generator) * 2, random_groups(batch, generator)


def loop(rewards, entropy, groups, mask, alpha1, alpha2, floor):
    """The definition as a loop over tokens; differentiable."""
    out = torch.zeros_like(entropy)
    h = torch.where(rewards[:, None] > 0, entropy, entropy.clamp(min=floor))
    batch, width = entropy.shape
    for i in range(batch):
        for t in range(width):
            if not mask[i, t]:
                continue
            peers = [
                k
                for k in range(batch)
                if groups[k] == groups[i] and (rewards[k] > 0) == (rewards[i] > 0) and mask[k, t]
            ]
            if rewards[i] > 0:
                total = sum(h[k, t] for k in peers)
                share = len(peers) * h[i, t] / total if total > 0 else 1.0
                out[i, t] = alpha1 * rewards[i] + alpha2 * share
            else:
                share = len(peers) / h[i, t] / sum(1 / h[k, t] for k in peers)
                out[i, t] = -alpha1 - alpha2 * share
    return out


class Test_gtpo_rewards:
    def test_by_hand(self, target):
        entropy = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.3, 0.9]]).to(target.device)
        rewards = torch.tensor([1.0, 1.0, 0.0]).to(target.device)
        ours = rewardops.gtpo_rewards(rewards, entropy, group_size=3)
        want = torch.tensor([[1.05, 1.1], [1.15, 1.1], [-1.1, -1.1]])
        torch.testing.assert_close(ours.cpu(), want, rtol=1e-6, atol=1e-6)

    def test_matches_the_loop(self, target, generator):
        rewards, entropy, groups = draw(12, 9, generator)
        mask = random_mask(12, 9, generator)
        fn = gtpo(groups, mask, alpha1=0.8, alpha2=0.3, entropy_floor=0.05)
        ours = evaluate(fn, [rewards, entropy], backend=target.backend, device=target.device).outputs[0]
        want = loop(rewards.double(), entropy.double(), groups, mask, 0.8, 0.3, 0.05)
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_matches_float64(self, target, generator, dtype, masked):
        rewards, entropy, groups = draw(20, 70, generator)
        mask = random_mask(20, 70, generator) if masked else None
        check_backend(
            gtpo(groups, mask, positive=0.5),
            [rewards.to(dtype), entropy.to(dtype)],
            backend=target.backend,
            device=target.device,
        )

    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_equals_padded(self, target, generator, masked):
        rewards, entropy, groups = draw(14, 41, generator)
        lengths = torch.randint(0, 42, (14,), generator=generator)
        lengths[3] = 0
        inside = torch.arange(41) < lengths[:, None]
        mask = inside & random_mask(14, 41, generator) if masked else inside
        padded = evaluate(
            gtpo(groups, mask), [rewards, entropy], backend=target.backend, device=target.device
        ).outputs[0]
        packed, cu = pack(entropy, lengths)
        packed_mask = pack(mask, lengths)[0] if masked else None
        ours = check_backend(
            gtpo(groups, packed_mask, cu), [rewards, packed], backend=target.backend, device=target.device
        ).outputs[0]
        assert torch.equal(ours.cpu(), pack(padded.cpu(), lengths)[0])

    def test_masked_tokens_never_influence(self, target, generator):
        rewards, entropy, groups = draw(10, 12, generator)
        mask = random_mask(10, 12, generator)
        clean = evaluate(gtpo(groups, mask), [rewards, entropy], backend=target.backend, device=target.device)
        dirty = torch.where(mask, entropy, torch.nan)
        ours = evaluate(
            gtpo(groups, mask), [rewards, dirty], backend=target.backend, device=target.device, poison=mask
        )
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
        assert bool((ours.outputs[0].cpu()[~mask] == 0).all())
        assert bool((ours.gradients[1].cpu()[~mask] == 0).all())

    def test_only_the_inverse_is_floored(self, target):
        """Right rows by their entropies as they are; wrong rows with an entropy of at least the floor."""
        entropy = torch.tensor([[0.001, 0.002, 0.0], [0.5, 0.0, 0.0]] * 2).to(target.device)
        rewards = torch.tensor([1.0, 1.0, 0.0, 0.0]).to(target.device)
        right = torch.tensor([[2 * 0.001 / 0.501, 2.0, 1.0], [2 * 0.5 / 0.501, 0.0, 1.0]])
        for floor, wrong in (
            ({}, [[2 * 100 / 102, 1.0, 1.0], [2 * 2 / 102, 1.0, 1.0]]),
            (
                {"entropy_floor": 1e-8},
                [[2 * 1000 / 1002, 2 * 500 / (1e8 + 500), 1.0], [2 * 2 / 1002, 2 * 1e8 / (1e8 + 500), 1.0]],
            ),
        ):
            got = rewardops.gtpo_rewards(rewards, entropy, group_size=4, **floor).cpu()
            want = torch.cat([1 + 0.1 * right, -1 - 0.1 * torch.tensor(wrong)])
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_gradients_of_small_entropies(self, target, generator, dtype):
        """Zeros, and entropies below the floor, against the derivative of the definition."""
        rewards, entropy, groups = draw(9, 6, generator)
        entropy = torch.where(torch.rand(9, 6, generator=generator) > 0.5, entropy * 1e-3, entropy).to(dtype)
        mask = random_mask(9, 6, generator)
        some = torch.rand(9, 6, generator=generator) > 0.7
        entropy[some] = 0.0
        entropy[rewards > 0, 2] = 0.0  # a position at which all are
        up = torch.randn(9, 6, generator=generator)
        wide = entropy.double().requires_grad_()
        want = loop(rewards.double(), wide, groups, mask, 1.0, 0.1, 1e-2)
        (expected,) = torch.autograd.grad((want * up.double()).sum(), wide)
        leaf = entropy.to(target.device).requires_grad_()
        with dispatch.use_backend(target.backend):
            got = gtpo(groups, mask)(rewards.to(dtype).to(target.device), leaf)
            (grad,) = torch.autograd.grad((got * up.to(target.device)).sum(), leaf)
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.cpu().double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("where", ["entropy", "reward"])
    def test_what_is_not_finite_shows(self, target, generator, bad, where):
        """In its class at its position, in values and gradients, and nowhere else."""
        rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
        groups = torch.tensor([7, 7, 7, 7, 2, 2])
        entropy = torch.rand(6, 4, generator=generator) + 0.1
        mask = torch.ones(6, 4, dtype=torch.bool)
        mask[4, 3] = False
        entropy[4, 3] = bad  # masked
        broken = torch.zeros(6, 4, dtype=torch.bool)
        if where == "entropy":
            entropy[0, 1], entropy[2, 2] = bad, bad
            broken[:2, 1] = broken[2:4, 2] = True
        else:
            rewards[1] = torch.nan
            broken[1:4] = True
        inputs = [rewards, entropy]
        ours = evaluate(gtpo(groups, mask), inputs, backend=target.backend, device=target.device)
        assert torch.equal(ours.outputs[0].cpu().isnan(), broken)
        assert torch.equal(ours.gradients[1].cpu().isnan(), broken)

    @pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0]], ids=["all right", "all wrong"])
    def test_a_group_of_one_class(self, target, rewards):
        entropy = torch.tensor([[0.5, 0.0], [0.5, 0.0]]).to(target.device)
        ours = rewardops.gtpo_rewards(torch.tensor(rewards).to(target.device), entropy, group_size=2)
        sign = 1.0 if rewards[0] else -1.0
        torch.testing.assert_close(ours.cpu(), torch.full((2, 2), 1.1 * sign))

    def test_no_gradient_into_entropy_unless_asked(self, target):
        rewards = torch.tensor([1.0, 1.0], device=target.device, requires_grad=True)
        entropy = torch.rand(2, 3, device=target.device).requires_grad_()
        grads = torch.autograd.grad(
            rewardops.gtpo_rewards(rewards, entropy, group_size=2).square().sum(),
            [rewards, entropy],
            allow_unused=True,
        )
        assert grads[0] is not None
        assert grads[1] is None

    def test_strided_rows(self, target, generator):
        rewards, entropy, groups = draw(6, 20, generator)
        check_backend(
            lambda r, e: gtpo(groups)(r, e[:, 3:11]),
            [rewards, entropy],
            backend=target.backend,
            device=target.device,
        )

    def test_long_rows(self, target, generator):
        """Rows longer than a block of positions on every backend."""
        rewards, entropy, groups = draw(5, 2600, generator)
        check_backend(
            gtpo(groups, random_mask(5, 2600, generator)),
            [rewards, entropy],
            backend=target.backend,
            device=target.device,
        )

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_large_groups(self, target, generator, contiguous):
        """More rows than are loaded at once, and more labels than are read at once."""
        rewards, entropy, _ = draw(40, 70, generator)
        mask, groups = random_mask(40, 70, generator), torch.arange(40) % 3 // 2

        def by_size(rewards, entropy):
            return rewardops.gtpo_rewards(
                rewards, entropy, group_size=[1, 36, 3], mask=mask.to(entropy.device), entropy_grad=True
            )

        check_backend(
            by_size if contiguous else gtpo(groups, mask),
            [rewards, entropy],
            backend=target.backend,
            device=target.device,
        )

    @pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
    def test_empty(self, target, shape):
        ours = check_backend(
            gtpo(torch.zeros(shape[0]).long()),
            [torch.ones(shape[0]), torch.ones(shape)],
            backend=target.backend,
            device=target.device,
        )
        assert ours.outputs[0].shape == shape

    @given(seed=st.integers(0, 10**6), batch=st.integers(1, 8), width=st.integers(1, 12))
    def test_property_mass_is_conserved(self, seed, batch, width):
        """The mean over a class at a position is alpha1 + alpha2, whatever the entropies."""
        g = torch.Generator().manual_seed(seed)
        rewards, entropy, _ = draw(batch, width, g)
        mask = random_mask(batch, width, g)
        groups = torch.zeros(batch, dtype=torch.int64)
        out = rewardops.gtpo_rewards(rewards.double(), entropy.double(), groups, mask=mask, alpha1=0.9)
        for right, value in ((rewards > 0, 1.0), (rewards == 0, -1.0)):
            live = mask & right[:, None]
            mean = (out * live).sum(0)[live.any(0)] / live.sum(0)[live.any(0)]
            torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-9, atol=1e-9)
        order = torch.randperm(batch, generator=g)
        again = rewardops.gtpo_rewards(
            rewards[order].double(), entropy[order].double(), groups + 5, mask=mask[order], alpha1=0.9
        )
        torch.testing.assert_close(again, out[order], rtol=1e-12, atol=1e-12)


# ---- ops on given entropies ----------------------------------------------------------------------------------


class Test_grpo_s_rewards:
    def test_grpo_s_by_hand(self, target):
        """The paper's numbers: mean entropies 0.3 and 0.5 of two correct rows, and one wrong row."""
        entropy = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.3, 0.3]]).to(target.device)
        rewards = torch.tensor([1.0, 1.0, 0.0]).to(target.device)
        got = rewardops.grpo_s_rewards(rewards, entropy, group_size=3)
        torch.testing.assert_close(got.cpu(), torch.tensor([1.075, 1.125, -1.1]))
        mask = torch.tensor([[1, 0], [0, 0], [1, 1]]).bool().to(target.device)
        got = rewardops.grpo_s_rewards(rewards, entropy, group_size=3, mask=mask)
        torch.testing.assert_close(got.cpu(), torch.tensor([1.1, 0.0, -1.1]))

    def test_small_and_infinite_entropies(self, target):
        entropy = torch.tensor([[0.001, 0.001], [0.0, 0.006], [torch.inf, 0.2], [0.3, 0.3]]).to(target.device)
        rewards = torch.tensor([1.0, 1.0, 0.0, 0.0]).to(target.device).requires_grad_()
        leaf = entropy.requires_grad_()
        got = rewardops.grpo_s_rewards(rewards, leaf, group_size=4, entropy_grad=True)
        torch.testing.assert_close(got.detach().cpu()[:2], torch.tensor([1.05, 1.15]))
        assert got.isnan().tolist() == [False, False, True, True]
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert grad.isnan().any(1).tolist() == [False, False, True, True]


class Test_signed_group_normalize:
    @pytest.mark.parametrize("joint", [False, True])
    def test_signed_group_normalize(self, target, generator, joint):
        groups = torch.tensor([3, 3, 3, -9, -9, 5, 5, 5]).to(target.device)
        rewards = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1]).to(target.device)
        values = torch.randn(8, 13, generator=generator)
        mask = random_mask(8, 13, generator)
        want = torch.zeros(8, 13, dtype=torch.float64)
        for g in groups.unique():
            for right in (None,) if joint else (True, False):
                rows = (
                    groups.cpu() == g.cpu()
                    if right is None
                    else (groups.cpu() == g.cpu()) & ((rewards.cpu() > 0) == right)
                )
                chosen = rows[:, None] & mask
                x = values.double()[chosen]
                if len(x) > 1:
                    want[chosen] = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()
        dirty = values.masked_fill(~mask, torch.nan).to(target.device)
        got = rewardops.signed_group_normalize(
            dirty, rewards, groups, mask=mask.to(target.device), joint=joint
        )
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)
        same = torch.full((4, 5), 0.7).to(target.device)
        flat = rewardops.signed_group_normalize(same, rewards[:4], group_size=4, joint=joint)
        assert not flat.any()

    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("eps_at", ["variance", "std"])
    @pytest.mark.parametrize("joint", [False, True])
    def test_degrees_of_freedom_and_eps(self, target, generator, ddof, eps_at, joint):
        groups = torch.tensor([3, 3, 3, -9, -9, 5, 5, 5])
        rewards = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1])
        values, mask = torch.randn(8, 9, generator=generator) + 100, random_mask(8, 9, generator)
        mask[7] = torch.arange(9) == 4  # a class of one token

        def fn(x):
            to = [t.to(x.device) for t in (rewards, groups, mask)]
            return rewardops.signed_group_normalize(
                x, to[0], to[1], mask=to[2], ddof=ddof, eps=0.01, eps_at=eps_at, joint=joint
            )

        ours = check_backend(fn, [values], backend=target.backend, device=target.device).outputs[0]
        want = torch.zeros(8, 9, dtype=torch.float64)
        for g in groups.unique():
            for kind in (rewards > 0, rewards <= 0):
                chosen = ((groups == g) if joint else (groups == g) & kind)[:, None] & mask
                x = values.double()[chosen]
                if len(x) > 1:
                    var = x.var(correction=ddof)
                    scale = (var + 0.01).sqrt() if eps_at == "variance" else var.sqrt() + 0.01
                    want[chosen] = (x - x.mean()) / scale
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-4, atol=1e-4)
        flat = fn(torch.full((8, 9), 1000.7).to(target.device))
        assert not flat.any()

    def test_pooled_steps_of_a_group(self):
        """IGPO's z-scores: six steps of a group, by ``torch.std``; and what is refused."""
        gains = torch.tensor([[0.2, -0.1, 0.4], [0.0, 0.3, 0.9]])
        got = rewardops.signed_group_normalize(
            gains, torch.ones(2), group_size=2, ddof=1, eps=1e-6, eps_at="std", joint=True
        )
        torch.testing.assert_close(got, (gains - gains.mean()) / (gains.std() + 1e-6))
        with pytest.raises(ValueError, match="ddof: got 2"):
            rewardops.signed_group_normalize(gains, torch.ones(2), group_size=2, ddof=2)
        with pytest.raises(ValueError, match="eps_at: got 'root'"):
            rewardops.signed_group_normalize(gains, torch.ones(2), group_size=2, eps_at="root")

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("joint", [False, True])
    def test_what_is_not_finite_shows(self, target, generator, bad, joint):
        values, rewards = torch.randn(6, 5, generator=generator), torch.tensor([1.0, 1, 0, 0, 1, 0])
        mask = torch.ones(6, 5, dtype=torch.bool)
        values[0, 3], values[4, 2], mask[4, 2] = bad, bad, False
        leaf = values.to(target.device).requires_grad_()
        with dispatch.use_backend(target.backend):
            got = rewardops.signed_group_normalize(
                leaf, rewards.to(target.device), group_size=[4, 2], mask=mask.to(target.device), joint=joint
            )
            (grad,) = torch.autograd.grad(got.square().sum(), leaf)
        broken = torch.zeros(6, 5, dtype=torch.bool)
        broken[: 4 if joint else 2] = True
        assert torch.equal(got.isnan().cpu(), broken)
        assert torch.equal(grad.isnan().cpu(), broken)
        rewards[2] = torch.nan
        got = rewardops.signed_group_normalize(
            leaf, rewards.to(target.device), group_size=[4, 2], joint=joint
        )
        assert got[2].isnan().all()

    def test_signed_group_normalize_has_a_gradient(self, generator):
        values = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
        fn = lambda x: rewardops.signed_group_normalize(x, rewards, group_size=4, mask=mask)  # noqa: E731
        assert torch.autograd.gradcheck(fn, values)


class Test_entropy_bonus:
    def test_entropy_bonus(self, generator):
        a, h = torch.tensor([1.0, -1.0, 0.1]), torch.tensor([2.0, 2.0, 2.0])
        torch.testing.assert_close(rewardops.entropy_bonus(a, h), torch.tensor([1.5, -0.5, 0.15]))
        mask = torch.tensor([True, False, True])
        dirty = torch.tensor([1.0, torch.nan, 0.1])
        assert rewardops.entropy_bonus(dirty, h, mask)[1] == 0
        leaf = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
        ent = torch.rand(5, dtype=torch.float64, generator=generator)
        assert torch.autograd.gradcheck(lambda x: rewardops.entropy_bonus(x, ent), leaf)

    def test_entropies_that_are_not_finite_show(self):
        leaf = torch.tensor([1.0, -1.0, 0.5, 0.2]).requires_grad_()
        h = torch.tensor([torch.inf, torch.nan, -torch.inf, torch.nan])
        got = rewardops.entropy_bonus(leaf, h, torch.tensor([1, 1, 1, 0]))
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert got.isnan().tolist() == [True, True, True, False]
        assert grad.isnan().tolist() == [True, True, True, False]


class Test_unlikeliness_rewards:
    def test_unlikeliness_rewards(self):
        lp = torch.tensor([-0.3, -1.2, -0.7, -0.1])
        got = rewardops.unlikeliness_rewards(torch.ones(4), lp, group_size=4)
        torch.testing.assert_close(got, torch.tensor([0.875, 1.0, 0.9375, 0.8125]))
        groups = torch.tensor([5, 1, 5, 1])
        got = rewardops.unlikeliness_rewards(torch.tensor([1.0, 1.0, 0.0, 2.0]), lp, groups, beta=0.5)
        torch.testing.assert_close(got, torch.tensor([0.75, 1.0, 0.0, 1.5]))

    def test_ties_and_what_is_no_number(self):
        lp = torch.tensor([-1.0, -1.0, -1.0, torch.nan, -2.0])
        got = rewardops.unlikeliness_rewards(torch.ones(5), lp, group_size=[3, 2])
        torch.testing.assert_close(got[:3], 1 - 0.25 * torch.tensor([2 / 3, 1 / 3, 0.0]))
        assert got.isnan().tolist() == [False, False, False, True, True]


class Test_entropy_reward:
    def test_entropy_reward(self, generator):
        h = torch.rand(3, 5, generator=generator)
        mask = random_mask(3, 5, generator)
        torch.testing.assert_close(rewardops.entropy_reward(h, mask, per="token"), -torch.where(mask, h, 0))
        want = -torch.where(mask, h, 0).sum(1) / mask.sum(1).clamp(min=1)
        torch.testing.assert_close(rewardops.entropy_reward(h, mask), want)
        want = -torch.where(mask, h, 0).sum(1)
        torch.testing.assert_close(rewardops.entropy_reward(h, mask, reduce="sum"), want)
        lengths = torch.full((3,), 5)
        packed = {"mask": pack(mask, lengths)[0], "cu_seqlens": pack(h, lengths)[1], "reduce": "sum"}
        torch.testing.assert_close(rewardops.entropy_reward(pack(h, lengths)[0], **packed), want)
        with pytest.raises(ValueError, match="reduce: got 'max'"):
            rewardops.entropy_reward(h, reduce="max")


class Test_entropy_weights:
    @pytest.mark.parametrize("mode", rewardops.entropy.MODES)
    @pytest.mark.parametrize("normalize", ["batch", "row", "group"])
    @pytest.mark.parametrize("inverse", [False, True])
    def test_entropy_weights(self, target, generator, mode, normalize, inverse):
        entropy = torch.rand(7, 19, generator=generator) * 3
        entropy[2] += 200  # tokens of another scope must not be absorbed by these in a sum
        mask = random_mask(7, 19, generator)
        groups = torch.tensor([4, 4, -3, 4, 4, -3, 0]) if normalize == "group" else None
        options = {
            "mode": mode,
            "normalize": normalize,
            "inverse": inverse,
            "temperature": 0.7,
            "fraction": 0.3,
        }
        got = rewardops.entropy_weights(
            entropy.masked_fill(~mask, torch.nan).to(target.device), mask.to(target.device),
            groups=None if groups is None else groups.to(target.device), **options,
        ).cpu()  # fmt: skip
        parts = {"batch": [torch.arange(7)], "row": list(torch.arange(7)[:, None])}.get(normalize)
        if parts is None:
            parts = [(groups == g).nonzero()[:, 0] for g in groups.unique()]
        assert not got[~mask].any()
        for rows in parts:
            m = mask[rows]
            h = entropy[rows][m].double()
            n = len(h)
            if n == 0:
                continue
            sign = -1 if inverse else 1
            if mode == "linear":
                raw = 1 / h.clamp(min=1e-2) if inverse else h
            elif mode == "softmax":
                raw = (sign * h / 0.7 - (sign * h / 0.7).max()).exp()
            elif mode == "rank":
                raw = (sign * h).argsort(stable=True).argsort().double() + 1
            else:
                raw = torch.zeros_like(h)
                raw[(sign * h).argsort(descending=True, stable=True)[: max(int(0.3 * n + 0.5), 1)]] = 1
            torch.testing.assert_close(got[rows][m].double(), raw / raw.mean(), rtol=1e-4, atol=1e-5)
            assert abs(float(got[rows][m].double().mean()) - 1) < 1e-5

    @pytest.mark.parametrize("mode", rewardops.entropy.MODES)
    @pytest.mark.parametrize("normalize", ["batch", "row", "group"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_shows(self, generator, mode, normalize, bad):
        entropy = torch.rand(6, 5, generator=generator) + 0.1
        mask = torch.ones(6, 5, dtype=torch.bool)
        entropy[1, 2], entropy[4, 4], mask[4, 4] = bad, bad, False
        groups = {"group_size": 3} if normalize == "group" else {}
        for inverse in (False, True):
            leaf = entropy.clone().requires_grad_()
            got = rewardops.entropy_weights(
                leaf, mask, mode=mode, normalize=normalize, inverse=inverse, entropy_grad=True, **groups
            )
            broken = torch.zeros(6, 5, dtype=torch.bool)
            broken[{"batch": slice(0, 6), "row": slice(1, 2), "group": slice(0, 3)}[normalize]] = True
            assert torch.equal(got.isnan(), broken & mask)
            if mode in ("linear", "softmax"):
                (grad,) = torch.autograd.grad(got.square().sum(), leaf)
                assert torch.equal(grad.isnan(), broken & mask)

    def test_entropy_weights_edges(self, generator):
        assert torch.equal(rewardops.entropy_weights(torch.zeros(2, 3)), torch.ones(2, 3))
        assert rewardops.entropy_weights(torch.ones(0, 3), mode="softmax").shape == (0, 3)
        assert not rewardops.entropy_weights(torch.ones(2, 3), torch.zeros(2, 3), mode="rank").any()
        leaf = torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for mode in ("linear", "softmax"):
            fn = lambda x, mode=mode: rewardops.entropy_weights(  # noqa: E731
                x, mode=mode, normalize="row", entropy_grad=True
            )
            assert torch.autograd.gradcheck(fn, leaf)
        assert not rewardops.entropy_weights(leaf).requires_grad
        with pytest.raises(ValueError, match="mode: got 'square'"):
            rewardops.entropy_weights(leaf, mode="square")


class Test_steer_metric_steer_weights:
    def test_steer(self, generator):
        p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
        entropy = -(p * p.log()).sum()
        got = rewardops.steer_metric(torch.ones(1).double(), p[1].log()[None], entropy[None])
        torch.testing.assert_close(got, torch.tensor([0.6460954879126105], dtype=torch.float64))
        x = torch.tensor([0.0, 0.5, 1.0, torch.nan])
        mask = torch.tensor([True, True, True, False])
        torch.testing.assert_close(rewardops.steer_weights(x, mask), torch.tensor([1.2, 1.0, 0.8, 0.0]))
        torch.testing.assert_close(
            rewardops.steer_weights(x, mask, mode="exp"), torch.tensor([1.0, 0.8**0.5, 0.8, 0.0])
        )
        # No spread: the middle, as in the authors' code, for one token, all equal, or none that counts.
        torch.testing.assert_close(rewardops.steer_weights(torch.full((3,), 0.3)), torch.ones(3))
        one = rewardops.steer_weights(x, torch.tensor([False, True, False, False]), low=0.5, high=1.0)
        torch.testing.assert_close(one, torch.tensor([0.0, 0.75, 0.0, 0.0]))
        assert not rewardops.steer_weights(x, torch.zeros(4)).any()
        for mode in ("linear", "exp"):
            for bad in (torch.nan, torch.inf):
                got = rewardops.steer_weights(torch.tensor([0.1, bad, 0.3, torch.nan]), mask, mode=mode)
                assert got[1].isnan()
                assert got[3] == 0
            assert rewardops.steer_weights(torch.full((2,), torch.inf), mode=mode).isnan().all()
        old = torch.tensor([-1.0, -1.0])
        got = rewardops.steer_metric(
            torch.ones(2), torch.tensor([-torch.inf, -0.5]), torch.tensor([0.7, torch.nan]), old_logprob=old
        )
        assert got[0] == 0
        assert got[1].isnan()
        with pytest.raises(ValueError, match=r"high: got 0\.5, want at least low"):
            rewardops.steer_weights(x, high=0.5)


# ---- the entropy's change, and presets ---------------------------------------------------------------------

CHANGE = ("logprob", "entropy", "sum_p2", "sum_p2_logp")


class Test_entropy_change:
    def test_entropy_change(self, target):
        p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
        stats = rewardops.token_stats(
            p.log().to(target.device), torch.tensor([1]).to(target.device), outputs=CHANGE
        )
        got = rewardops.entropy_change(
            torch.ones(1, dtype=torch.float64), *[getattr(stats, n).cpu() for n in CHANGE]
        )
        torch.testing.assert_close(got, torch.tensor([0.3323318], dtype=torch.float64), rtol=0, atol=5e-8)

    def test_entropy_change_is_the_first_order_change(self, generator):
        logits = torch.randn(6, 40, generator=generator, dtype=torch.float64) * 2
        tokens = torch.randint(0, 40, (6,), generator=generator)
        advantages = torch.randn(6, generator=generator, dtype=torch.float64)
        mask = torch.tensor([1, 1, 0, 1, 1, 1])
        stats = rewardops.token_stats(logits, tokens, outputs=CHANGE)
        values = [getattr(stats, n) for n in CHANGE]
        got = rewardops.entropy_change(advantages.masked_fill(mask == 0, torch.nan), *values, mask)
        step = advantages[:, None] * (torch.nn.functional.one_hot(tokens, 40) - logits.softmax(-1))
        size = 1e-5
        after, before = (
            rewardops.token_stats(logits + sign * size * step, tokens).entropy for sign in (1, -1)
        )
        torch.testing.assert_close(
            got, ((after - before) / (2 * size)).where(mask > 0, 0), rtol=1e-6, atol=1e-9
        )
        impossible = rewardops.token_stats(
            torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([2]), outputs=CHANGE
        )
        got = rewardops.entropy_change(torch.ones(1), *[getattr(impossible, n) for n in CHANGE])
        torch.testing.assert_close(got, torch.zeros(1), rtol=0, atol=1e-7)
        with pytest.raises(ValueError, match=r"sum_p2: got shape \[3\], want \[6\]"):
            rewardops.entropy_change(advantages, values[0], values[1], values[2][:3], values[3])


class Test_gtpo_grpo_s:
    def test_presets(self, target, generator):
        entropy = torch.rand(8, 9, generator=generator).to(target.device) + 0.1
        mask = random_mask(8, 9, generator).to(target.device)
        rewards = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 1]).to(target.device)
        where = {"group_size": 4, "mask": mask}
        shaped = rewardops.gtpo_rewards(rewards, entropy, **where)
        want = rewardops.signed_group_normalize(shaped, rewards, **where)
        assert torch.equal(rewardops.advantages.gtpo(rewards, entropy, **where), want)
        rows = rewardops.grpo_s_rewards(rewards, entropy, **where)
        want = rewardops.group_advantages(rows, group_size=4, mask=mask, eps=1e-8)
        assert torch.equal(rewardops.advantages.grpo_s(rewards, entropy, **where), want)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        got = rewardops.advantages.grpo_s(rewards, entropy[mask], group_size=4, cu_seqlens=cu)
        torch.testing.assert_close(got, want[mask])
        full = rewardops.advantages.grpo_s(rewards, entropy, group_size=4)
        assert torch.equal(full, full[:, :1].expand(8, 9))


# ---- properties of the family ------------------------------------------------------------------------------

PER_TOKEN = {
    "gtpo_rewards": lambda r, h, g, **at: rewardops.gtpo_rewards(r, h, g, **at),
    "gtpo": lambda r, h, g, **at: rewardops.advantages.gtpo(r, h, g, **at),
    "grpo_s": lambda r, h, g, **at: rewardops.advantages.grpo_s(r, h, g, **at),
    "signed_group_normalize": lambda r, h, g, **at: rewardops.signed_group_normalize(h, r, g, **at),
    "high_entropy_mask": lambda r, h, g, **at: rewardops.high_entropy_mask(h, scope="group", groups=g, **at),
    "entropy_weights": lambda r, h, g, **at: rewardops.entropy_weights(h, normalize="group", groups=g, **at),
    "softmax_weights": lambda r, h, g, **at: rewardops.entropy_weights(h, mode="softmax", **at),
    "rank_weights": lambda r, h, g, **at: rewardops.entropy_weights(h, mode="rank", normalize="row", **at),
    "entropy_reward": lambda r, h, g, **at: rewardops.entropy_reward(h, per="token", **at),
    "advantage_logprob_cov": lambda r, h, g, **at: rewardops.advantage_logprob_cov(h - 1, -h, **at),
    "kl_cov_mask": lambda r, h, g, **at: rewardops.kl_cov_mask(h, fraction=0.1, **at),
}


@pytest.mark.parametrize("name", PER_TOKEN)
@given(seed=st.integers(0, 10**6))
def test_property_layouts_rows_and_labels(name, seed):
    """Results do not change with packing, the order of rows (values are distinct) or labels."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = 7, 11
    fn = PER_TOKEN[name]
    h = torch.rand(batch, width, generator=generator, dtype=torch.float64) + 0.05
    rewards = (torch.rand(batch, generator=generator) > 0.5).double()
    groups = random_groups(batch, generator)
    lengths = torch.randint(1, width + 1, (batch,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]  # without holes: packing keeps positions
    want = fn(rewards, h, groups, mask=mask)

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    packed, cu = pack(h, lengths)
    same(fn(rewards, packed, groups, cu_seqlens=cu), want[mask])
    same(fn(rewards, h, groups * 17 - 3, mask=mask), want)
    order = torch.randperm(batch, generator=generator)
    same(fn(rewards[order], h[order], groups[order], mask=mask[order]), want[order])
