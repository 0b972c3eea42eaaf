"""min_returns and softmin_rewards on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import assert_within_budget, check_op, evaluate, pack, random_mask

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
    """Step ends of random steps, told in one of the three ways."""
    if kind == "every_token":
        return None
    flags = torch.rand(batch, width, generator=generator) > 0.6
    if kind == "flags":
        return flags
    ids = flags.long().cumsum(1)
    return torch.where(torch.rand(batch, 1, generator=generator) > 0.7, ids - 2, ids)  # some start at -2


def ends(kind, steps, mask):
    """Which tokens end a step, row by row: the definition."""
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


@pytest.mark.parametrize("kind", KINDS)
def test_min_matches_the_loop(target, generator, kind):
    rewards = torch.randn(9, 31, generator=generator)
    mask = random_mask(9, 31, generator)
    steps = markers(kind, 9, 31, generator)
    ours = check_op(
        minimum(mask, None, steps), [rewards], backend=target.backend, device=target.device, ulps=4
    ).outputs[0]
    end = ends(kind, steps, mask)
    for b in range(9):
        for t in range(31):
            later = [rewards[b, u].item() for u in range(t, 31) if end[b, u]]
            want = min(later) if later and mask[b, t] else 0.0
            assert ours[b, t].item() == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [True, False])
def test_softmin_matches_float64(target, generator, kind, through):
    rewards = torch.randn(9, 31, generator=generator)
    mask = random_mask(9, 31, generator)
    steps = markers(kind, 9, 31, generator)
    fn = softmin(mask, None, steps, temperature=0.3)
    ours = check_op(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
    assert bool((ours[~ends(kind, steps, mask)] == 0).all())
    if not through:  # not a derivative: its own formula, weight times upstream
        fn = softmin(mask, None, steps, temperature=0.3, through_weights=False)
        got = evaluate(fn, [rewards], backend=target.backend, device=target.device).gradients[0].cpu()
        weight = torch.where(rewards != 0, ours / rewards, 0).double()
        up = torch.randn(9, 31, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        torch.testing.assert_close(got.double(), weight * up, rtol=1e-4, atol=1e-6)


def test_pure_by_hand(target):
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


def test_ties_go_to_the_earliest(target):
    rewards = torch.tensor([[1.0, 0.5, 2.0, 0.5, 0.5]], device=target.device, requires_grad=True)
    out = rewardops.min_returns(rewards)
    (grad,) = torch.autograd.grad(out.sum(), rewards)
    assert grad.tolist() == [[0.0, 2.0, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_padded(target, generator, kind, masked):
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
        padded = evaluate(make(mask, None, steps), [rewards], backend=target.backend, device=target.device)
        ours = check_op(
            make(packed_mask, cu, packed_steps), [packed], backend=target.backend, device=target.device
        )
        # The specification sums over the width of the tensor; Triton's blocks are counted from its end.
        ulps = 0 if target.backend == "cpp" else 4
        assert_within_budget(ours.outputs[0], pack(padded.outputs[0].cpu(), lengths)[0], ulps=ulps)


@pytest.mark.parametrize("make", [minimum, softmin])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_never_influence(target, generator, make, kind):
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
def test_rewards_off_step_ends_are_not_read(target, generator, make):
    rewards = torch.randn(5, 16, generator=generator)
    flags = markers("flags", 5, 16, generator)
    clean = evaluate(make(None, None, flags), [rewards], backend=target.backend, device=target.device)
    dirty = torch.where(flags, rewards, torch.nan)
    ours = evaluate(make(None, None, flags), [dirty], backend=target.backend, device=target.device)
    assert torch.equal(clean.outputs[0], ours.outputs[0])
    assert torch.equal(clean.gradients[0], ours.gradients[0])
    assert bool((ours.gradients[0].cpu()[~flags] == 0).all())


def test_nan_and_infinite_rewards(target):
    inf, nan = torch.inf, torch.nan
    rewards = torch.tensor([[1.0, nan, 2.0, 3.0], [inf, inf, inf, inf], [5.0, -inf, inf, 1.0]])
    out = rewardops.min_returns(rewards.to(target.device)).cpu()
    assert out[0].isnan().tolist() == [True, True, False, False]
    assert out[0, 2:].tolist() == [2.0, 3.0]
    assert out[1].tolist() == [inf] * 4
    assert out[2].tolist() == [-inf, -inf, 1.0, 1.0]
    # Positions that are no step count as +inf, but an infinite step is a step, and takes the gradient.
    flags = torch.tensor([[0, 1, 0, 0]]).bool().to(target.device)
    x = torch.tensor([[0.0, inf, 0.0, 0.0]], device=target.device, requires_grad=True)
    out = rewardops.min_returns(x, steps=flags)
    assert out.tolist() == [[inf, inf, 0.0, 0.0]]
    assert torch.autograd.grad(out, x, torch.ones_like(out))[0].tolist() == [[0.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize("make", [minimum, softmin])
def test_long_rows_and_other_dtypes(target, generator, make):
    """Rows longer than a block of the scan; narrow and wide inputs."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rewards = torch.randn(2, 2500, generator=generator).to(dtype)
        mask = random_mask(2, 2500, generator, empty_row=False)
        ids = torch.arange(2500).expand(2, -1) // 7
        check_op(make(mask, None, ids), [rewards], backend=target.backend, device=target.device)


def test_strided_rows(target, generator):
    wide = torch.randn(4, 40, generator=generator)
    for make in (minimum, softmin):
        check_op(
            lambda x, make=make: make()(x[:, 5:24]), [wide], backend=target.backend, device=target.device
        )


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("make", [minimum, softmin])
def test_empty(target, shape, make):
    ours = check_op(make(), [torch.ones(shape)], backend=target.backend, device=target.device)
    assert ours.outputs[0].shape == shape
    packed = torch.ones(0)
    cu = torch.zeros(shape[0] + 1, dtype=torch.int32)
    check_op(make(None, cu), [packed], backend=target.backend, device=target.device)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 20))
def test_property_monotone_and_limits(seed, width):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, width, generator=g, dtype=torch.float64)
    out = rewardops.min_returns(rewards)
    assert bool((out[:, 1:] >= out[:, :-1]).all())
    torch.testing.assert_close(out[:, 0], rewards.amin(1))
    # As the temperature falls, the sum of the soft-min rewards falls to the smallest step reward.
    low = rewardops.softmin_rewards(rewards, temperature=1e-3).sum(1)
    mean = rewardops.softmin_rewards(rewards, temperature=1e6).sum(1)
    gap = rewards.sort(1).values
    clear = torch.ones(3, dtype=torch.bool) if width == 1 else gap[:, 1] - gap[:, 0] > 0.05
    torch.testing.assert_close(low[clear], rewards.amin(1)[clear], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, rewards.mean(1), rtol=1e-4, atol=1e-4)
    assert math.isfinite(float(low.sum()))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns(generator, gamma):
    """Against the loop; masked tokens are skipped and do not discount."""
    rewards = torch.randn(5, 23, generator=generator, dtype=torch.float64)
    mask = random_mask(5, 23, generator)
    want = torch.zeros_like(rewards)
    for b in range(5):
        running = 0.0
        for t in reversed(range(23)):
            if mask[b, t]:
                running = rewards[b, t] + gamma * running
                want[b, t] = running
    dirty = rewards.masked_fill(~mask, torch.nan)
    got = rewardops.discounted_returns(dirty, gamma=gamma, mask=mask)
    torch.testing.assert_close(got, want)
    lengths = torch.full((5,), 23)
    packed = rewardops.discounted_returns(
        pack(dirty, lengths)[0], gamma=gamma, mask=pack(mask, lengths)[0], cu_seqlens=pack(mask, lengths)[1]
    )
    torch.testing.assert_close(packed, pack(want, lengths)[0])
    leaf = rewards[:2, :6].clone().requires_grad_()
    fn = lambda x: rewardops.discounted_returns(x, gamma=gamma, mask=mask[:2, :6])  # noqa: E731
    assert torch.autograd.gradcheck(fn, leaf)
    assert rewardops.discounted_returns(torch.ones(0, 4)).shape == (0, 4)
    assert rewardops.discounted_returns(torch.ones(4, 0)).shape == (4, 0)
    with pytest.raises(ValueError, match=r"gamma: got 1\.5, want a number from 0 to 1"):
        rewardops.discounted_returns(rewards, gamma=1.5)
