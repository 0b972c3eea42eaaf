"""KL on log-probabilities, and quantities derived from log-ratios."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops

from .. import peers
from ..case import Case
from ..data import Data
from ..registry import register

AXES = ("rows", "length", "density", "ragged", "layout", "dtype")


def plain_token_kl(logprob: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    d = ref - logprob
    return torch.where(mask, d.exp() - d - 1, 0)


def plain_step_sums(x: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """Step sums at step ends: the tokens after the previous step end."""
    sums = torch.where(mask, x, 0).cumsum(1)
    at = torch.where(ends, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
    before = torch.nn.functional.pad(at[:, :-1], (1, 0), value=-1)
    earlier = torch.where(before >= 0, sums.gather(1, before.clamp(min=0)), 0)
    return torch.where(ends, sums - earlier, 0)


def plain_tdpo(logprob: Tensor, ref: Tensor, reverse_kl: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, logprob - ref, 0).sum(1), torch.where(mask, reverse_kl, 0).sum(1)


@register("backward", axes=AXES)
def token_kl(d: Data) -> Case:
    """The backward variant differentiates in the policy's log-probabilities; the reference has no gradient."""
    logprob, ref, mask = d.per_token(-2, 0), d.per_token(-2, 0), d.mask
    where = d.valid
    return d.case(
        lambda a, r: rewardops.token_kl(a, r, mask=where),
        lambda a, r: plain_token_kl(a, r, mask),
        (logprob, ref), 4 * d.numel, gradients=1, peers=peers.token_kl(d),
    )  # fmt: skip


@register("backward", axes=(*AXES, "steps"))
def implicit_rewards(d: Data) -> Case:
    """Implicit rewards summed over steps, as PRIME's process rewards."""
    logprob, ref, mask, ends = d.per_token(-3, 0), d.per_token(-3, 0), d.mask, d.ends
    where, steps = d.where, d.steps
    return d.case(
        lambda a, r: rewardops.implicit_rewards(a, r, beta=0.05, steps=steps, **where),
        lambda a, r: plain_step_sums(0.05 * (a - r), mask, ends),
        (logprob, ref), 4 * d.numel, gradients=1, again=(),
    )  # fmt: skip


@register("backward", axes=AXES)
def tdpo_terms(d: Data) -> Case:
    logprob, ref, reverse, mask, where = (
        d.per_token(-3, 0),
        d.per_token(-3, 0),
        d.per_token(),
        d.mask,
        d.where,
    )
    return d.case(
        lambda a, r, x: rewardops.tdpo_terms(a, r, x, **where),
        lambda a, r, x: plain_tdpo(a, r, x, mask),
        (logprob, ref, reverse), 8 * d.rows, gradients=3, again=(),
    )  # fmt: skip
