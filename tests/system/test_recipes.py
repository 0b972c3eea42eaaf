"""Recipes by name: their formulas by loops over groups, and what they ask for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import rewardops
from rewardops import recipes
from rewardops.testing import assert_within_budget, random_mask


@pytest.fixture
def batch() -> recipes.Rollouts:
    """Groups of mixed outcomes, one of right rows only, and a row alone; ragged rows, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([7, 7, 7, 7, -1, -1, -1, -1, 3, 3, 0])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    mask = random_mask(len(groups), 13, generator, holes=False)
    tokens = torch.randint(0, 3, mask.shape, generator=generator)
    steps, ends, entropy = torch.rand(3, *mask.shape, generator=generator)
    return recipes.Rollouts(tokens, mask, groups, rewards, steps, ends > 0.6, entropy)


def others(x: torch.Tensor, batch: recipes.Rollouts, b: int) -> torch.Tensor:
    """The mean over the other rows of the group that have a token; the row's own where there is none."""
    rows = (batch.groups == batch.groups[b]) & batch.mask.any(1)
    rows[b] = False
    return x[rows].mean(0) if rows.any() else x[b]


def test_gtpo_normalises_over_the_tokens_of_a_group_of_mixed_outcomes(batch):
    shaped = rewardops.gtpo_rewards(batch.rewards, batch.entropy, batch.groups, mask=batch.mask).double()
    want = torch.zeros_like(shaped)
    for label in (7, -1):
        tokens = (batch.groups == label)[:, None] & batch.mask
        x = shaped[tokens]
        want[tokens] = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()
    assert_within_budget(recipes.get("gtpo")(batch), want, scale=1.0, ulps=16)


def pure_by_loops(batch: recipes.Rollouts, dtype: torch.dtype) -> torch.Tensor:
    returns = rewardops.min_returns(batch.step_rewards, mask=batch.mask, steps=batch.step_ends).to(dtype)
    mean = rewardops.row_mean(returns, mask=batch.mask)
    want = torch.zeros_like(returns)
    for b in range(len(want)):
        outcome = batch.rewards[b] - others(batch.rewards, batch, b)
        want[b] = torch.where(batch.mask[b], returns[b] - others(mean, batch, b) + outcome, 0)
    return want


def test_pure_is_the_return_and_the_outcome_less_the_others(batch):
    exact, eager = (pure_by_loops(batch, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(recipes.get("pure")(batch), exact, eager, scale=2.0)


def test_grpo_and_tempo_are_the_ops(batch):
    assert torch.equal(
        recipes.grpo(batch), rewardops.group_advantages(batch.rewards, batch.groups, mask=batch.mask)
    )
    want = rewardops.tempo_advantages(batch.tokens, batch.rewards, batch.groups, mask=batch.mask)
    assert torch.equal(recipes.tempo(batch), want)


@pytest.mark.parametrize("name", recipes.names())
def test_masked_tokens_never_matter(batch, name):
    spoiled = {"tokens": batch.tokens.masked_fill(~batch.mask, -9)}
    for field in ("step_rewards", "entropy"):
        spoiled[field] = getattr(batch, field).masked_fill(~batch.mask, torch.nan)
    out = recipes.get(name)(dataclasses.replace(batch, **spoiled))
    assert torch.equal(out, recipes.get(name)(batch))
    assert bool((out[~batch.mask] == 0).all())


def test_errors(batch):
    with pytest.raises(ValueError, match="recipe: got 'ppo', want one of 'grpo', 'gtpo', 'pure', 'tempo'"):
        recipes.get("ppo")
    for name, field in (("gtpo", "entropy"), ("pure", "step_rewards")):
        with pytest.raises(ValueError, match=f"{field}: got None"):
            recipes.get(name)(dataclasses.replace(batch, **{field: None}))
