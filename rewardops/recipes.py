"""Recipes by name: from a batch of rollouts to an advantage per token, by the public ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import advantages
from .core import checks
from .prefix_tree import tempo_advantages
from .returns import min_returns
from .segments import row_mean

__all__ = ["RECIPES", "Rollouts", "get", "grpo", "gtpo", "names", "pure", "tempo"]


@dataclass(frozen=True)
class Rollouts:
    """A batch of responses in padded rows; fields that a recipe does not need may be None.

    Attributes:
        tokens: ``[B, T]``, integer token ids of the responses.
        mask: ``[B, T]``, bool: True at the tokens of a response.
        groups: ``[B]``, integer labels: rows of one prompt have one label.
        rewards: ``[B]``, the outcome of each response; above 0 for a right one.
        step_rewards: ``[B, T]``, rewards at the tokens that end a step; for ``"pure"``.
        step_ends: ``[B, T]``, bool: the tokens that end a step; None with ``step_rewards``: every token is a
            step.
        entropy: ``[B, T]``, entropy of the behaviour policy, in nats; for ``"gtpo"``.
    """

    tokens: Tensor
    mask: Tensor
    groups: Tensor
    rewards: Tensor
    step_rewards: Tensor | None = None
    step_ends: Tensor | None = None
    entropy: Tensor | None = None


def grpo(rollouts: Rollouts) -> Tensor:
    """GRPO (arXiv 2402.03300): the outcome less the group's mean, divided by its std.

    Args:
        rollouts: the batch; reads ``rewards``, ``groups`` and ``mask``.

    Returns:
        Advantages ``[B, T]``; float32 (float64 for float64 rewards), 0 where masked. Differentiable in
        ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> from rewardops.recipes import Rollouts, grpo
        >>> tokens = torch.tensor([[5, 6], [5, 7]])
        >>> batch = Rollouts(tokens, tokens > 0, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        >>> [[round(x, 3) for x in row] for row in grpo(batch).tolist()]
        [[0.707, 0.707], [-0.707, -0.707]]
    """
    r = rollouts
    return advantages.grpo(r.rewards, r.groups, mask=r.mask)


def gtpo(rollouts: Rollouts) -> Tensor:
    """GTPO (arXiv 2508.04349): outcomes shaped by entropy, then normalised over the tokens of the group.

    The paper normalises right and wrong rows separately; here they are normalised jointly. Separately, half
    of the tokens of a right response get a negative advantage, and the sign of the outcome is lost. In a
    group with a single outcome only entropy would set the advantages: they are 0 instead.

    Args:
        rollouts: the batch; reads ``rewards``, ``entropy``, ``groups`` and ``mask``.

    Returns:
        Advantages ``[B, T]``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards``, not in ``entropy``.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: no entropy, a shape or device that does not match.

    Example:
        >>> from rewardops.recipes import Rollouts, gtpo
        >>> tokens, entropy = torch.tensor([[5, 6], [5, 7]]), torch.tensor([[0.5, 1.0], [0.5, 1.0]])
        >>> groups, rewards = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
        >>> batch = Rollouts(tokens, tokens > 0, groups, rewards, entropy=entropy)
        >>> [[round(x, 3) for x in row] for row in gtpo(batch).tolist()]
        [[1.0, 1.0], [-1.0, -1.0]]
    """
    r = rollouts
    entropy = _needed("entropy", r.entropy)
    out = advantages.gtpo(r.rewards, entropy, r.groups, mask=r.mask, joint=True)
    right = (r.rewards > 0).to(out.dtype)
    mixed = advantages.dr_grpo(right, r.groups, mask=r.mask) != 0
    return torch.where(mixed, out, 0)


def pure(rollouts: Rollouts) -> Tensor:
    """PURE (arXiv 2504.15275): min-form returns of the step rewards plus the outcome, each less a baseline.

    The baselines are means over the other rows of the group. The minimum is exact, and every token carries
    the return of its step; :func:`rewardops.advantages.pure` has the authors' soft minimum and their other
    options.

    Args:
        rollouts: the batch; reads ``rewards``, ``step_rewards``, ``step_ends``, ``groups`` and ``mask``.

    Returns:
        Advantages ``[B, T]``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards`` and ``step_rewards``.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: no step rewards, a shape or device that does not match.

    Example:
        >>> from rewardops.recipes import Rollouts, pure
        >>> tokens, steps = torch.tensor([[5, 6], [5, 7]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> groups, rewards = torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
        >>> pure(Rollouts(tokens, tokens > 0, groups, rewards, step_rewards=steps)).tolist()
        [[1.0, 1.0], [-1.5, -0.5]]
    """
    r = rollouts
    returns = min_returns(_needed("step_rewards", r.step_rewards), mask=r.mask, steps=r.step_ends)
    mean = row_mean(returns, mask=r.mask)
    within = torch.where(r.mask, returns - mean[:, None], 0)
    return within + advantages.rloo(mean + r.rewards, r.groups, mask=r.mask)


def tempo(rollouts: Rollouts) -> Tensor:
    """TEMPO (arXiv 2509.18314): GRPO, plus a temporal difference where the group's prefix tree branches.

    Args:
        rollouts: the batch; reads ``tokens``, ``rewards``, ``groups`` and ``mask``.

    Returns:
        Advantages ``[B, T]``; float32 (float64 for float64 rewards), 0 where masked. Differentiable in
        ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> from rewardops.recipes import Rollouts, tempo
        >>> tokens = torch.tensor([[5, 6], [5, 7]])
        >>> batch = Rollouts(tokens, tokens > 0, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        >>> [[round(x, 3) for x in row] for row in tempo(batch).tolist()]
        [[0.707, 1.414], [-0.707, -1.414]]
    """
    r = rollouts
    return tempo_advantages(r.tokens, r.rewards, r.groups, mask=r.mask)


def _needed(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: got None, want a tensor [B, T]")
    return value


RECIPES: dict[str, Callable[[Rollouts], Tensor]] = {"grpo": grpo, "gtpo": gtpo, "pure": pure, "tempo": tempo}
"""The recipes by name."""


def names() -> list[str]:
    """Names of the recipes.

    Returns:
        The names, in the order of ``RECIPES``.

    Example:
        >>> ro.recipes.names()
        ['grpo', 'gtpo', 'pure', 'tempo']
    """
    return list(RECIPES)


def get(name: str) -> Callable[[Rollouts], Tensor]:
    """Recipe of a name, a function from :class:`Rollouts` to advantages ``[B, T]``.

    Args:
        name: one of :func:`names`.

    Returns:
        The function.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> ro.recipes.get("grpo") is ro.recipes.grpo
        True
        >>> ro.recipes.get("ppo")
        Traceback (most recent call last):
        ValueError: recipe: got 'ppo', want one of 'grpo', 'gtpo', 'pure', 'tempo'
    """
    checks.check_choice("recipe", name, names())
    return RECIPES[name]
