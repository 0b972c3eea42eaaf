"""The lines of docs/frameworks/others.md, for conventions that are no option of an op, against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import rewardops
from rewardops import advantages

GAMMA, LAM = 0.9, 0.8


@pytest.fixture
def batch(generator):
    """Rewards and values of ragged rows with holes; the first token of each row is valid."""
    rewards, values = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 11, generator=generator) > 0.35
    mask[:, 0] = True
    return rewards, values, mask


def whitened(x, mask):
    valid = x[mask]
    return torch.where(mask, (x - valid.mean()) / (valid.var() + 1e-8).sqrt(), 0)


def test_skyrl_gae_without_the_mask_then_whitened(batch):
    rewards, values, mask = batch
    want = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        carried, ahead = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            carried = rewards[b, t] + GAMMA * ahead - values[b, t] + GAMMA * LAM * carried
            want[b, t], ahead = carried, values[b, t]
    estimate = rewardops.gae(rewards, values, gamma=GAMMA, lam=LAM)
    found = rewardops.whiten(estimate.advantages, mask)
    torch.testing.assert_close(found, whitened(want, mask))
    torch.testing.assert_close(estimate.returns, want + values)


def test_skyrl_reinforce_plus_plus_restarts_at_a_masked_token(batch):
    rewards, _, mask = batch
    want = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        carried = 0.0
        for t in reversed(range(rewards.shape[1])):
            want[b, t] = carried = rewards[b, t] + GAMMA * carried
            carried = carried if mask[b, t] else 0.0
    ahead = functional.pad(mask[:, 1:], (0, 1)).double()
    returns = rewardops.discounted_returns(rewards, gamma=GAMMA * ahead)
    torch.testing.assert_close(returns, want)
    torch.testing.assert_close(rewardops.whiten(returns, mask), whitened(want, mask))


def test_areal_holds_the_advantage_at_masked_tokens(batch):
    rewards, values, mask = batch
    bootstrap = torch.tensor([0.5, 0, -1, 0, 2], dtype=torch.float64)
    want = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        carried, ahead = 0.0, bootstrap[b]
        for t in reversed(range(rewards.shape[1])):
            if mask[b, t]:
                carried = rewards[b, t] + GAMMA * ahead - values[b, t] + GAMMA * LAM * carried
                ahead = values[b, t]
            want[b, t] = carried
    found = rewardops.gae(rewards, values, gamma=GAMMA, lam=LAM, bootstrap=bootstrap, mask=mask).advantages
    torch.testing.assert_close(found, torch.where(mask, want, 0))
    held = rewardops.discounted_returns(found, gamma=(~mask).double())
    torch.testing.assert_close(held, want)


def test_nemo_rl_gives_a_masked_row_a_baseline(generator):
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]).bool()
    want = torch.zeros_like(rewards)
    for b in range(9):
        others = [c for c in range(9) if groups[c] == groups[b] and c != b and valid[c]]
        among = sum(1 for c in range(9) if groups[c] == groups[b] and valid[c])
        want[b] = sum(rewards[c] for c in others) / (among - 1)
    relative = advantages.rloo(rewards, groups, mask=valid[:, None])[:, 0]
    torch.testing.assert_close(relative, torch.where(valid, rewards - want, 0))
    among = (groups[:, None] == groups) & valid
    baseline = torch.where(valid, rewards - relative, (among * rewards).sum(1) / (among.sum(1) - 1))
    torch.testing.assert_close(baseline, want)
