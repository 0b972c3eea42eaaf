"""Token statistics from hidden states and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import rewardops

from .. import peers
from ..case import Case
from ..data import Data, full, size_of
from ..registry import register
from .logits import plain_jsd, plain_token_stats

AXES = ("hidden_tokens", "hidden", "vocab", "density", "dtype")
DTYPES = (torch.float32, torch.bfloat16)


def plain_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return plain_token_stats(full(hidden @ weight.T), tokens)


def plain_logprob(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(full(hidden @ weight.T), tokens, reduction="none")


def plain_loss(hidden: Tensor, weight: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
    return (coefficients * plain_logprob(hidden, weight, tokens)).sum()


def plain_jsd_loss(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor
) -> Tensor:
    _, jsd = plain_jsd(full(hidden @ weight.T), tokens, full(ref_hidden @ ref_weight.T))
    return jsd.mean()


def products(count: int, hidden: Tensor, weight: Tensor) -> tuple[str, Callable[[], None]]:
    """A floor: the first ``count`` matmuls of a head: logits, gradients of hidden and weight, logits again."""
    logits, grad_hidden, grad_weight = (hidden.new_empty(0) for _ in range(3))

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)
        if count > 3:
            torch.mm(hidden, weight.T, out=logits)

    return f"{count} product{'s' * (count > 1)}", call


def _inputs(d: Data) -> tuple[Tensor, Tensor, Tensor]:
    n, width, v = d.sizes.hidden_tokens, d.sizes.hidden, d.sizes.vocab
    d.sizes = replace(d.sizes, tokens=n)
    return d.normal(n, width), d.normal(v, width, scale=2 / width**0.5), d.ids(v, n)


def _stats_case(d: Data, plain, outputs: tuple[str, ...], others) -> Case:  # type: ignore[no-untyped-def]
    inputs = hidden, weight, _ = _inputs(d)
    mask = d.counted

    def ours(hidden: Tensor, weight: Tensor, tokens: Tensor) -> rewardops.TokenStats:
        return rewardops.linear_token_stats(hidden, weight, tokens, mask=mask, outputs=outputs)

    return d.case(
        ours, plain, inputs, 4 * len(outputs) * len(hidden), gradients=2, own_precision=True, peers=others,
        unread=size_of(hidden) - d.of_counted(hidden), floor=products(4 if d.backward else 1, hidden, weight),
    )  # fmt: skip


@register("backward", axes=AXES, dtypes=DTYPES)
def linear_token_stats(d: Data) -> Case:
    return _stats_case(d, plain_linear, ("logprob", "entropy"), peers.linear_token_stats(d))


@register("backward", op="linear_token_stats", axes=AXES, dtypes=DTYPES)
def linear_token_logprob(d: Data) -> Case:
    """Log-probability only, as in cross-entropy kernels."""
    return _stats_case(d, plain_logprob, ("logprob",), peers.linear_logprob(d))


@register("backward", axes=AXES, dtypes=DTYPES)
def linear_token_stats_partial(d: Data) -> Case:
    """Two shards of the head, with merged records."""
    hidden, weight, tokens = _inputs(d)
    mask, half = d.counted, len(weight) // 2

    def ours(hidden: Tensor, weight: Tensor, tokens: Tensor) -> rewardops.TokenStats:
        return rewardops.merge_token_stats(
            [
                rewardops.linear_token_stats_partial(hidden, part, tokens, vocab_start=first, mask=mask)
                for first, part in ((0, weight[:half]), (half, weight[half:]))
            ]
        )

    return d.case(
        ours, plain_linear, (hidden, weight, tokens), 8 * len(hidden), gradients=2, own_precision=True,
        unread=size_of(hidden) - d.of_counted(hidden), floor=products(4 if d.backward else 1, hidden, weight),
    )  # fmt: skip


@register(axes=AXES, dtypes=DTYPES)
def linear_token_loss(d: Data) -> Case:
    """A policy-gradient loss, forward and backward."""
    hidden, weight, tokens = _inputs(d)
    mask, advantages = d.counted, d.uniform(len(hidden), low=-1)
    d.backward = True

    def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, c: Tensor) -> Tensor:
        return rewardops.linear_token_loss(hidden, weight, tokens, {"logprob": c}, mask=mask)[0]

    return d.case(
        ours, plain_loss, (hidden, weight, tokens, advantages), 4, gradients=2, again=(), own_precision=True,
        unread=size_of(hidden) - d.of_counted(hidden), peers=peers.linear_loss(d),
        floor=products(3, hidden, weight),
    )  # fmt: skip


@register(op="linear_token_loss", axes=AXES, dtypes=DTYPES)
def linear_token_loss_jsd(d: Data) -> Case:
    """Distillation by the Jensen-Shannon divergence, forward and backward in the student."""
    hidden, weight, tokens = _inputs(d)
    ref_hidden, ref_weight = (
        d.normal(*hidden.shape),
        d.normal(*weight.shape, scale=2 / hidden.shape[1] ** 0.5),
    )
    mask, count = d.counted, len(hidden) if d.counted is None else int(d.counted.sum())
    each = torch.full((len(hidden),), 1 / count, dtype=torch.float32, device=d.device)
    d.backward = True

    def ours(
        hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor
    ) -> Tensor:
        return rewardops.linear_token_loss(
            hidden, weight, tokens, {"jsd": each}, ref_hidden=ref_hidden, ref_weight=ref_weight, mask=mask
        )[0]

    return d.case(
        ours, plain_jsd_loss, (hidden, weight, ref_hidden, ref_weight, tokens), 4, gradients=2, again=(),
        own_precision=True, unread=2 * (size_of(hidden) - d.of_counted(hidden)),
        peers=peers.linear_jsd(d), floor=products(3, hidden, weight),
    )  # fmt: skip
