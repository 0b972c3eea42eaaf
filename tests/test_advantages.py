"""group_advantages on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.advantages import BASELINES, SCALES
from rewardops.testing import check_op, evaluate, pack, random_groups, random_mask


def advantages(groups=None, **options):
    def fn(rewards):
        def there(x):
            return x.to(rewards.device) if isinstance(x, torch.Tensor) else x

        return rewardops.group_advantages(
            rewards, there(groups), **{key: there(value) for key, value in options.items()}
        )

    return fn


def loop(rewards, groups, baseline, scale, eps, ddof):
    """The definition, group by group."""
    out = torch.zeros_like(rewards)
    for g in groups.unique():
        rows = (groups == g).nonzero()[:, 0]
        r = rewards[rows]
        n = len(rows)
        if baseline == "mean":
            a = r - r.mean()
        elif baseline == "leave_one_out":
            a = r - (r.sum() - r) / (n - 1) if n > 1 else r * 0
        else:
            a = r.clone()
        if scale == "std":
            a = a / (r.std(correction=ddof) + eps) if n > 1 and (r != r[0]).any() else a * 0
        out[rows] = a
    return out


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_matches_float64_and_the_loop(target, generator, baseline, scale, ddof):
    groups = random_groups(60, generator)
    rewards = torch.rand(60, generator=generator).round(decimals=2)
    options = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": 1e-4}
    ours = check_op(
        advantages(groups, **options), [rewards], backend=target.backend, device=target.device
    ).outputs[0]
    want = loop(rewards.double(), groups, baseline, scale, 1e-4, ddof)
    torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(target, generator, dtype):
    groups = random_groups(40, generator)
    rewards = torch.randn(40, generator=generator).to(dtype)
    ours = check_op(advantages(groups), [rewards], backend=target.backend, device=target.device)
    assert ours.outputs[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert ours.gradients[0].dtype is dtype


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_to_tokens(target, generator, baseline, scale):
    groups = random_groups(24, generator)
    rewards = torch.randn(24, generator=generator)
    mask = random_mask(24, 33, generator)
    options = {"baseline": baseline, "scale": scale, "mask": mask}
    ours = check_op(advantages(groups, **options), [rewards], backend=target.backend, device=target.device)
    live = mask.any(1)
    want = loop(rewards[live].double(), groups[live], baseline, scale, 1e-6, 1)
    rows = torch.zeros(24, dtype=torch.float64)
    rows[live] = want
    torch.testing.assert_close(ours.outputs[0].cpu().double(), rows[:, None] * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_padded(target, generator, masked):
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
        ours = check_op(
            advantages(groups, cu_seqlens=offsets, **options),
            [rewards],
            backend=target.backend,
            device=target.device,
        )
        want = pack(padded.cpu(), lengths)[0]
        assert torch.equal(ours.outputs[0].cpu(), want)


def test_a_masked_row_does_not_count_even_with_a_nan_reward(target, generator):
    groups = torch.zeros(6, dtype=torch.int64)
    rewards = torch.rand(6, generator=generator)
    mask = torch.ones(6, 8).bool()
    mask[2] = False
    clean = evaluate(advantages(groups, mask=mask), [rewards], backend=target.backend, device=target.device)
    rewards = rewards.clone()
    rewards[2] = torch.nan
    ours = evaluate(
        advantages(groups, mask=mask), [rewards], backend=target.backend, device=target.device, poison=mask
    )
    assert torch.equal(clean.outputs[0], ours.outputs[0])
    assert torch.equal(clean.gradients[0], ours.gradients[0])
    assert ours.gradients[0][2].item() == 0


@pytest.mark.parametrize("value", [0.7, 1e8, -3.3e-5, 0.0])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero(target, value, baseline, scale):
    rows = 150 if target.interpreted else 1020
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


def test_a_group_of_one(target):
    rewards = torch.tensor([3.0, 5.0])
    for baseline in BASELINES:
        for scale in SCALES:
            fn = advantages(torch.tensor([1, 2]), baseline=baseline, scale=scale)
            ours = evaluate(fn, [rewards], backend=target.backend, device=target.device)
            want = rewards if (baseline, scale) == ("none", "none") else torch.zeros(2)
            assert torch.equal(ours.outputs[0].cpu(), want)


def test_rewards_near_1000_keep_their_differences(target):
    rewards = 1000 + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.05])
    exact = rewards.double()
    want = (exact - exact.mean()) / (exact.std() + 1e-6)
    ours = evaluate(advantages(group_size=8), [rewards], backend=target.backend, device=target.device)
    torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=2e-6, atol=1e-7)


def test_a_nan_reward_stays_in_its_group(target):
    rewards = torch.tensor([0.5, torch.nan, 0.5, 1.0, 2.0, 3.0])
    ours = evaluate(advantages(group_size=3), [rewards], backend=target.backend, device=target.device)
    assert ours.outputs[0].isnan().tolist() == [True, True, True, False, False, False]


def test_many_rows(target, generator):
    """More rows than a block of the equality join."""
    rows = 300 if target.interpreted else 2500
    groups = torch.randint(0, 40, (rows,), generator=generator)
    rewards = torch.randn(rows, generator=generator)
    check_op(advantages(groups), [rewards], backend=target.backend, device=target.device)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(target, shape):
    rewards, mask = torch.ones(shape[0]), torch.ones(shape).bool()
    ours = check_op(
        advantages(torch.zeros(shape[0]).long(), mask=mask),
        [rewards],
        backend=target.backend,
        device=target.device,
    )
    assert ours.outputs[0].shape == shape


@pytest.mark.parametrize("name", ["uniform", "ragged", "holes"])
def test_recorded_pairs(target, shared, name):
    d = np.load(shared / "golden" / f"verl_advantages_{name}.npz")
    mask = torch.tensor(d["response_mask"])
    rewards = torch.tensor(d["token_level_rewards"]).sum(1)
    groups = torch.tensor(d["index"])
    sizes = torch.bincount(groups)[groups]
    kept = sizes > 1  # verl's loop returns the raw reward for a group of one
    cases = {
        "grpo": {},
        "grpo_no_std": {"scale": "none"},
        "rloo": {"baseline": "leave_one_out", "scale": "none"},
    }
    for key, options in cases.items():
        fn = advantages(groups, mask=mask, **options)
        ours = fn(rewards.to(target.device)).cpu()
        torch.testing.assert_close(ours[kept], torch.tensor(d[key])[kept], rtol=2e-5, atol=2e-5)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 12))
def test_property_order_and_names_do_not_matter(seed, size):
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 3, (size,), generator=g)
    rewards = torch.randn(size, generator=g)
    here = rewardops.group_advantages(rewards, groups)
    order = torch.randperm(size, generator=g)
    there = rewardops.group_advantages(rewards[order], 17 - 5 * groups[order])
    torch.testing.assert_close(there, here[order], rtol=3e-7, atol=1e-9)
    sums = torch.zeros(3).index_add(0, groups, here)
    torch.testing.assert_close(sums, torch.zeros(3), rtol=0, atol=2e-6 * size)
