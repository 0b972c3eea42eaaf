"""Credit assignment: from the rewards of a batch of rollouts to an advantage per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rewardops


@dataclass(frozen=True)
class Rollouts:
    """A batch of responses, ``[B, T]``; fields that a recipe does not need may be None."""

    tokens: Tensor
    mask: Tensor
    groups: Tensor
    rewards: Tensor
    """``[B]``: the outcome of each response."""
    step_rewards: Tensor | None = None
    """``[B, T]``: rewards at the tokens that end a step."""
    step_ends: Tensor | None = None
    """``[B, T]``, bool."""
    entropy: Tensor | None = None
    """``[B, T]``: entropy of the behaviour policy, in nats."""


def grpo(r: Rollouts) -> Tensor:
    """The outcome minus the group's mean, divided by its std."""
    return rewardops.group_advantages(r.rewards, r.groups, mask=r.mask)


def gtpo(r: Rollouts) -> Tensor:
    """Outcomes shaped by entropy, then normalised over the tokens of the group.

    The paper normalises correct and wrong rows separately; here they are normalised jointly. Separately, half of
    the tokens of a correct response get a negative advantage, and the sign of the outcome is lost.
    """
    assert r.entropy is not None
    shaped = rewardops.gtpo_rewards(r.rewards, r.entropy, r.groups, mask=r.mask)
    same = (r.groups[:, None] == r.groups[None, :]).to(shaped.dtype)
    count = (same @ r.mask.to(shaped.dtype).sum(1)).clamp(min=1)
    mean = (same @ shaped.sum(1)) / count
    centred = torch.where(r.mask, shaped - mean[:, None], 0)
    std = ((same @ centred.square().sum(1)) / count).sqrt()
    # In a group with a single outcome only entropy would set the advantages: they are 0 instead.
    mixed = (same @ (r.rewards > 0).to(shaped.dtype)) * (same @ (r.rewards <= 0).to(shaped.dtype)) > 0
    return torch.where(mixed[:, None], centred / (std[:, None] + 1e-6), 0)


def pure(r: Rollouts) -> Tensor:
    """Min-form returns of the step rewards, plus the outcome, each minus the mean of the other rows of the group."""
    assert r.step_rewards is not None
    returns = rewardops.min_returns(r.step_rewards, mask=r.mask, steps=r.step_ends)
    length = r.mask.sum(1).clamp(min=1)
    mean = returns.sum(1) / length
    options = {"baseline": "leave_one_out", "scale": "none"}
    others = mean - rewardops.group_advantages(mean, r.groups, **options)  # type: ignore[arg-type]
    outcome = rewardops.group_advantages(r.rewards, r.groups, mask=r.mask, **options)  # type: ignore[arg-type]
    return torch.where(r.mask, returns - others[:, None], 0) + outcome


def tempo(r: Rollouts) -> Tensor:
    """GRPO, plus a temporal difference where the group's prefix tree branches."""
    return rewardops.tempo_advantages(r.tokens, r.rewards, r.groups, mask=r.mask)


RECIPES: dict[str, Callable[[Rollouts], Tensor]] = {"grpo": grpo, "gtpo": gtpo, "pure": pure, "tempo": tempo}
