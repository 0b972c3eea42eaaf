"""gtpo_rewards on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import check_op, evaluate, pack, random_groups, random_mask


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
    """The definition, token by token."""
    out = torch.zeros_like(entropy)
    h = entropy.clamp(min=floor)
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
                share = len(peers) * h[i, t] / sum(h[k, t] for k in peers)
                out[i, t] = alpha1 * rewards[i] + alpha2 * share
            else:
                share = len(peers) / h[i, t] / sum(1 / h[k, t] for k in peers)
                out[i, t] = -alpha1 - alpha2 * share
    return out


def test_by_hand(target):
    entropy = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.3, 0.9]]).to(target.device)
    rewards = torch.tensor([1.0, 1.0, 0.0]).to(target.device)
    ours = rewardops.gtpo_rewards(rewards, entropy, group_size=3)
    want = torch.tensor([[1.05, 1.1], [1.15, 1.1], [-1.1, -1.1]])
    torch.testing.assert_close(ours.cpu(), want, rtol=1e-6, atol=1e-6)


def test_matches_the_loop(target, generator):
    rewards, entropy, groups = draw(12, 9, generator)
    mask = random_mask(12, 9, generator)
    fn = gtpo(groups, mask, alpha1=0.8, alpha2=0.3, entropy_floor=0.05)
    ours = evaluate(fn, [rewards, entropy], backend=target.backend, device=target.device).outputs[0]
    want = loop(rewards.double(), entropy.double(), groups, mask, 0.8, 0.3, 0.05)
    torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64(target, generator, dtype, masked):
    rewards, entropy, groups = draw(20, 70, generator)
    mask = random_mask(20, 70, generator) if masked else None
    check_op(
        gtpo(groups, mask, positive=0.5),
        [rewards.to(dtype), entropy.to(dtype)],
        backend=target.backend,
        device=target.device,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_padded(target, generator, masked):
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
    ours = check_op(
        gtpo(groups, packed_mask, cu), [rewards, packed], backend=target.backend, device=target.device
    ).outputs[0]
    assert torch.equal(ours.cpu(), pack(padded.cpu(), lengths)[0])


def test_masked_tokens_never_influence(target, generator):
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


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0]], ids=["all right", "all wrong"])
def test_a_group_of_one_class(target, rewards):
    entropy = torch.tensor([[0.5, 0.0], [0.5, 0.0]]).to(target.device)
    ours = rewardops.gtpo_rewards(torch.tensor(rewards).to(target.device), entropy, group_size=2)
    sign = 1.0 if rewards[0] else -1.0
    torch.testing.assert_close(ours.cpu(), torch.full((2, 2), 1.1 * sign))


def test_no_gradient_into_entropy_unless_asked(target):
    rewards = torch.tensor([1.0, 1.0], device=target.device, requires_grad=True)
    entropy = torch.rand(2, 3, device=target.device).requires_grad_()
    grads = torch.autograd.grad(
        rewardops.gtpo_rewards(rewards, entropy, group_size=2).square().sum(),
        [rewards, entropy],
        allow_unused=True,
    )
    assert grads[0] is not None
    assert grads[1] is None


def test_strided_rows(target, generator):
    rewards, entropy, groups = draw(6, 20, generator)
    check_op(
        lambda r, e: gtpo(groups)(r, e[:, 3:11]),
        [rewards, entropy],
        backend=target.backend,
        device=target.device,
    )


def test_long_rows(target, generator):
    """Longer than a block of positions on every backend."""
    rewards, entropy, groups = draw(5, 2600, generator)
    check_op(
        gtpo(groups, random_mask(5, 2600, generator)),
        [rewards, entropy],
        backend=target.backend,
        device=target.device,
    )


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(target, shape):
    ours = check_op(
        gtpo(torch.zeros(shape[0]).long()),
        [torch.ones(shape[0]), torch.ones(shape)],
        backend=target.backend,
        device=target.device,
    )
    assert ours.outputs[0].shape == shape


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 8), width=st.integers(1, 12))
def test_property_mass_is_conserved(seed, batch, width):
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
