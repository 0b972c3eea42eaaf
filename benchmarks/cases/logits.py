"""Token statistics from logits."""

from __future__ import annotations

import torch
from torch import Tensor

import rewardops
from rewardops.reference.logits import RECORD

from .. import peers
from ..case import Case
from ..data import Data, full, size_of
from ..registry import register

AXES = ("tokens", "vocab", "density", "dtype")
DTYPES = (torch.float32, torch.bfloat16)
EVERY = ("logprob", "entropy", "logsumexp", "sum_p2", "sum_p2_logp", "mean_logit", "is_top1")


def _at(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(-1, tokens[:, None])[:, 0]


def plain_token_stats(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.log_softmax(-1)
    return _at(logp, tokens), -(logp.exp() * logp).sum(-1)


def plain_kl(logits: Tensor, tokens: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)
    return _at(logp, tokens), (logp.exp() * (logp - logq)).sum(-1)


def plain_jsd(logits: Tensor, tokens: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    log_m = ((p + q) / 2).log()
    return _at(logp, tokens), (p * (logp - log_m) + q * (logq - log_m)).sum(-1) / 2


def plain_every(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    logsumexp = logits.logsumexp(-1)
    logp = logits - logsumexp[:, None]
    p = logp.exp()
    squares = p.square()
    return (
        _at(logp, tokens), -(p * logp).sum(-1), logsumexp, squares.sum(-1), (squares * logp).sum(-1),
        logits.mean(-1), _at(logits, tokens) >= logits.amax(-1),
    )  # fmt: skip


def plain_shards(left: Tensor, right: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Vocabulary-parallel statistics: largest logit, sums and the token's logit of each shard, combined."""
    top = torch.maximum(left.amax(-1), right.amax(-1)).detach()
    total = weighted = logit = torch.zeros_like(top)
    for first, shard in ((0, left), (left.shape[1], right)):
        z = shard - top[:, None]
        e = z.exp()
        inside = (tokens >= first) & (tokens < first + shard.shape[1])
        total, weighted = total + e.sum(-1), weighted + (e * z).sum(-1)
        logit = logit + torch.where(inside, _at(z, torch.where(inside, tokens - first, 0)), 0)
    return logit - total.log(), total.log() - weighted / total


def plain_merge(records: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics from the records of :func:`rewardops.token_stats_partial`."""
    fields = ("shift", "total", "weighted", "token")
    shift, total, weighted, token = (records[..., RECORD.index(name)] for name in fields)
    top = shift.amax(0)
    factor = (shift - top).exp()
    whole = (total * factor).sum(0)
    mean = ((weighted + total * (shift - top)) * factor).sum(0) / whole
    return token.sum(0) - top - whole.log(), whole.log() - mean


def plain_and_grad(logits: Tensor, tokens: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
    """Forward pass and autograd."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        logprob, entropy = plain_token_stats(full(leaf), tokens)
        (grad,) = torch.autograd.grad((coefficients * (logprob + 0.01 * entropy)).sum(), leaf)
    return logprob.detach(), entropy.detach(), grad


def _stats_case(  # type: ignore[no-untyped-def]
    d: Data, plain, outputs: tuple[str, ...], others=None, *, ref: bool = False
) -> Case:
    n, v = d.sizes.tokens, d.sizes.vocab
    logits, tokens, mask = d.normal(n, v, scale=3), d.ids(v, n), d.counted
    sides = (logits, logits + d.normal(n, v, scale=0.3)) if ref else (logits,)

    def ours(logits: Tensor, tokens: Tensor, ref: Tensor | None = None) -> rewardops.TokenStats:
        return rewardops.token_stats(logits, tokens, ref_logits=ref, mask=mask, outputs=outputs)

    return d.case(
        ours, plain, (logits, tokens, *sides[1:]), sum(1 if o == "is_top1" else 4 for o in outputs) * n,
        gradients=1, unread=sum(size_of(x) - d.of_counted(x) for x in sides), peers=others,
    )  # fmt: skip


@register("backward", axes=AXES, dtypes=DTYPES)
def token_stats(d: Data) -> Case:
    return _stats_case(d, plain_token_stats, ("logprob", "entropy"), peers.token_stats(d))


@register("backward", op="token_stats", axes=AXES, dtypes=DTYPES)
def token_stats_kl(d: Data) -> Case:
    """The exact KL to a reference's logits; gradient in the policy's logits."""
    return _stats_case(d, plain_kl, ("logprob", "kl"), ref=True)


@register("backward", op="token_stats", axes=AXES, dtypes=DTYPES)
def token_stats_jsd(d: Data) -> Case:
    """The Jensen-Shannon divergence, which needs a second pass."""
    return _stats_case(d, plain_jsd, ("logprob", "jsd"), ref=True)


@register(op="token_stats", axes=AXES, dtypes=DTYPES)
def token_stats_every(d: Data) -> Case:
    """Every statistic of one model."""
    return _stats_case(d, plain_every, EVERY)


@register(axes=AXES, dtypes=DTYPES)
def token_stats_and_grad(d: Data) -> Case:
    n, v = d.sizes.tokens, d.sizes.vocab
    logits, tokens, mask = d.normal(n, v, scale=3), d.ids(v, n), d.counted
    coefficients = d.uniform(n, low=-1)

    def ours(logits: Tensor, tokens: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        stats, grad = rewardops.token_stats_and_grad(
            logits, tokens, {"logprob": c, "entropy": 0.01 * c}, mask=mask
        )
        return stats.logprob, stats.entropy, grad

    return d.case(
        ours, plain_and_grad, (logits, tokens, coefficients), 8 * n + size_of(logits),
        unread=size_of(logits) - d.of_counted(logits), own_precision=True,
        peers=peers.token_stats_and_grad(d),
    )  # fmt: skip


@register("backward", axes=AXES, dtypes=DTYPES)
def token_stats_partial(d: Data) -> Case:
    """Two shards of the vocabulary, with merged records."""
    n, v = d.sizes.tokens, d.sizes.vocab // 2
    left, right, tokens, mask = d.normal(n, v, scale=3), d.normal(n, v, scale=3), d.ids(2 * v, n), d.counted

    def ours(left: Tensor, right: Tensor, tokens: Tensor) -> rewardops.TokenStats:
        shards = ((0, left), (v, right))
        return rewardops.merge_token_stats(
            [rewardops.token_stats_partial(x, tokens, vocab_start=first, mask=mask) for first, x in shards]
        )

    unread = size_of(left, right) - d.of_counted(left) - d.of_counted(right)
    return d.case(ours, plain_shards, (left, right, tokens), 8 * n, gradients=2, unread=unread)


@register(axes=("tokens",))
def merge_token_stats(d: Data) -> Case:
    """Eight records per token, for as many tokens as the logits have."""
    n, parts = d.sizes.tokens * 64, 8
    logits, tokens = (
        torch.randn(parts, n, 64, generator=d.random, dtype=torch.float32, device=d.device),
        d.ids(parts * 64, n),
    )
    records = torch.stack(
        [rewardops.token_stats_partial(x, tokens, vocab_start=64 * k) for k, x in enumerate(logits)]
    )
    return d.case(
        rewardops.merge_token_stats, lambda r: tuple(x.float() for x in plain_merge(r)), (records,), 8 * n,
        exact=plain_merge,
    )  # fmt: skip
