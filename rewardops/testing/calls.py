"""Calls of every public op, with the options that change the computation, on one batch of rollouts.

The tests of properties common to all ops, ``rewardops verify`` and the checks on a GPU use this list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import rewardops as ro

from ..core.families import FAMILIES
from ..core.precision import wide
from .inputs import adversarial_logits, random_groups, random_mask, shared_prefix_tokens

LAYOUTS = ("padded", "packed")


class Batch(NamedTuple):
    """One batch of rollouts in one layout; ``[tokens]`` stands for ``[B, T]`` if padded, ``[N]`` if packed."""

    mask: Tensor  # [tokens], with holes
    cu_seqlens: Tensor | None  # [B + 1] if packed
    groups: Tensor  # [B]
    rewards: Tensor  # [B]
    scores: Tensor  # [B, 2], above 0
    parent: Tensor  # [B], of a tree with a node per row
    tokens: Tensor  # [tokens]
    steps: Tensor  # [tokens], flags of step ends
    values: Tensor  # [tokens], from .1 to 1.1
    critic: Tensor  # [tokens], from .1 to 1.1
    logits: Tensor  # [tokens, V]
    ref_logits: Tensor  # [tokens, V]
    hidden: Tensor  # [tokens, 3]
    weight: Tensor  # [V, 3]

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def rows(self) -> dict[str, Any]:
        """The layout arguments of most ops."""
        return {"mask": self.mask, "cu_seqlens": self.cu_seqlens}

    def to(self, device: torch.device | str) -> Batch:
        moved: Any = (None if x is None else x.to(device) for x in self)
        return Batch(*moved)


def make_batch(
    rows: int = 6,
    width: int = 7,
    vocab: int = 11,
    *,
    layout: str = "padded",
    dtype: torch.dtype = torch.float64,
    logits: str = "normal",
    ref_logits: str = "normal",
    full: bool = False,
    poison: bool = False,
    seed: int = 3,
) -> Batch:
    """A batch on the CPU.

    Rows are ragged, with holes and one of them empty, unless ``full``; the first row is whole. The packed layout
    concatenates the rows of the padded one, holes included. Groups come in any order; one has a single row.

    Args:
        logits, ref_logits: one of the kinds ``LOGITS``.
        poison: put NaN in every float, and ids outside any vocabulary, at masked tokens.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    here: Any = {"generator": g, "dtype": torch.float32, "device": "cpu"}
    mask = torch.ones(rows, width, dtype=torch.bool, device="cpu") if full else random_mask(rows, width, g)
    mask[:1] = True
    groups = random_groups(rows, g)
    groups[: rows // 2] = 4
    above = [-1, *(int(torch.randint(0, i, (), generator=g, device="cpu")) for i in range(1, rows))]
    parent = torch.tensor(above[:rows], dtype=torch.int64, device="cpu")
    tokens = shared_prefix_tokens(groups, width, g).clamp(max=vocab - 1)
    scores, rewards = torch.rand(rows, 2, **here) + 0.1, torch.randn(rows, **here).round(decimals=2)
    steps, values, critic = torch.rand(3, rows, width, **here)
    tensors: dict[str, Tensor] = {
        "mask": mask,
        "tokens": tokens,
        "steps": steps > 0.5,
        "values": values + 0.1,
        "critic": critic + 0.1,
        "hidden": torch.randn(rows, width, 3, **here),
    }
    for name, kind in (("logits", logits), ("ref_logits", ref_logits)):
        tensors[name] = adversarial_logits(kind, rows * width, vocab, g).view(rows, width, vocab)
    weight = torch.randn(vocab, 3, **here)
    if poison:
        for name in ("values", "critic", "logits", "ref_logits", "hidden"):
            tensors[name][~mask] = torch.nan
        tensors["tokens"] = torch.where(mask, tokens, -(10**9))
    cu = None
    if layout == "packed":
        length = (
            (mask * torch.arange(1, width + 1, device="cpu")).amax(1)
            if width
            else torch.zeros(rows, dtype=torch.long, device="cpu")
        )
        cu = torch.zeros(rows + 1, dtype=torch.int32, device="cpu")
        cu[1:] = length.cumsum(0)
        inside = torch.arange(width, device="cpu") < length[:, None]
        tensors = {name: x[inside] for name, x in tensors.items()}
    tensors.update(groups=groups, rewards=rewards, scores=scores, parent=parent, weight=weight)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    return Batch(cu_seqlens=cu, **cast)


class Call(NamedTuple):
    """A call of ``op`` as ``fn(*inputs)``; ``inputs`` are the differentiated arguments."""

    name: str
    op: str
    fn: Callable[..., Any]
    inputs: list[Tensor]
    differentiable: bool


class KnownLoss(torch.autograd.Function):
    """A loss of one model's logits whose gradient is computed with its value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, tokens: Tensor, mask: Tensor, coefficient: Tensor, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        coefficients = {name: coefficient for name in ro.logits.OUTPUTS[:6]}
        stats, grad = ro.token_stats_and_grad(
            logits.clone() if inplace else logits,
            tokens,
            coefficients,
            outputs=("is_top1",),
            mask=mask,
            temperature=0.7,
            softcap=2.0,
            vocab_size=max(1, logits.shape[-1] - 2),
            inplace=inplace,
        )
        # Terms cancel: summed in float64, the loss does not depend on the order of summation.
        terms = [torch.where(mask, coefficient * getattr(stats, name), 0) for name in coefficients]
        return wide(torch.stack(terms)).sum().to(coefficient.dtype), grad

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return up * grad, None, None, None, None


def _smooth(outputs: Any) -> list[Tensor]:
    """The floating-point outputs of a named tuple."""
    return [o for o in outputs if o is not None and o.is_floating_point()]


def _merged(
    record: Callable[[int, int], Tensor], vocab: int, outputs: Sequence[str], dtype: torch.dtype
) -> list[Tensor]:
    """Statistics merged from two parts of a vocabulary; the sums of a record are relative to its largest logit."""
    part = max(1, vocab // 3)
    records = [record(first, last) for first, last in ((0, part), (part, vocab)) if first < last]
    return _smooth(ro.merge_token_stats(records, outputs=outputs, dtype=dtype))


Entry = tuple[Callable[..., Any], list[Tensor]]


def _logits(b: Batch) -> Mapping[str, Entry]:
    y, x, other = b.tokens, b.logits, b.ref_logits
    wide, outputs = torch.promote_types(x.dtype, torch.float32), ro.logits.PARTIAL_OUTPUTS

    def in_parts(x: Tensor, r: Tensor) -> list[Tensor]:
        def record(first: int, last: int) -> Tensor:
            return ro.token_stats_partial(
                x[..., first:last],
                y,
                vocab_start=first,
                ref_logits=r[..., first:last],
                mask=b.mask,
                outputs=outputs,
            )

        return _merged(record, b.vocab, outputs, wide)

    return {
        "token_stats": (
            lambda x: ro.token_stats(
                x, y, temperature=0.7, mask=b.mask, outputs=("logprob", "entropy", "logsumexp")
            )[:3],
            [x],
        ),
        "token_stats of two models": (
            lambda x, r: _smooth(
                ro.token_stats(
                    x,
                    y,
                    ref_logits=r,
                    mask=b.mask,
                    outputs=ro.logits.OUTPUTS,
                    temperature=b.values + 0.5,
                    softcap=2.0,
                    vocab_size=max(1, b.vocab - 2),
                    beta=0.3,
                )
            ),
            [x, other],
        ),
        "token_stats_partial": (
            lambda x, r: ro.token_stats_partial(
                x, y, ref_logits=r, mask=b.mask, outputs=ro.logits.PARTIAL_OUTPUTS
            ).to(wide),
            [x, other],
        ),
        "merge_token_stats": (in_parts, [x, other]),
        "token_stats_and_grad": (lambda x: KnownLoss.apply(x, y, b.mask, b.values, False)[0], [x]),
        "token_stats_and_grad in place": (lambda x: KnownLoss.apply(x, y, b.mask, b.values, True)[0], [x]),
    }


def _linear(b: Batch) -> Mapping[str, Entry]:
    y, h, w = b.tokens, b.hidden, b.weight
    chunks: dict[str, Any] = {"chunk_tokens": 5, "num_tokens": y.numel()}
    wide, outputs = torch.promote_types(h.dtype, torch.float32), ro.logits.OUTPUTS[:7]

    def in_parts(h: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        def record(first: int, last: int) -> Tensor:
            return ro.linear_token_stats_partial(
                h,
                w[first:last],
                y,
                vocab_start=first,
                bias=bias[first:last],
                mask=b.mask,
                outputs=outputs,
                **chunks,
            )

        return _merged(record, b.vocab, outputs, wide)

    return {
        "linear_token_stats": (
            lambda h, w, bias: _smooth(
                ro.linear_token_stats(
                    h,
                    w,
                    y,
                    bias=bias,
                    mask=b.mask,
                    temperature=0.7,
                    chunk_vocab=4,
                    outputs=ro.logits.OUTPUTS[:7],
                    **chunks,
                )
            ),
            [h, w, w[:, 0]],
        ),
        "linear_token_stats of two models": (
            lambda h, w, r, v: _smooth(
                ro.linear_token_stats(
                    h,
                    w,
                    y,
                    ref_hidden=r,
                    ref_weight=v,
                    mask=b.mask,
                    logit_scale=0.5,
                    outputs=ro.logits.OUTPUTS,
                    **chunks,
                )
            ),
            [h, w, h[..., :2], w[:, 1:].flip(0)],
        ),
        "linear_token_stats_partial": (in_parts, [h, w, w[:, 0]]),
        "linear_token_loss": (
            lambda h, w: ro.linear_token_loss(
                h, w, y, {"logprob": b.values, "entropy": b.values * 0.1}, mask=b.mask, **chunks
            )[0],
            [h, w],
        ),
    }


def _kl(b: Batch) -> Mapping[str, Entry]:
    p, q = b.values, b.values * 1.3 - 0.2
    return {
        "token_kl k1": (lambda p, q: ro.token_kl(p, q, mask=b.mask, estimator="k1"), [p, q]),
        "token_kl k2": (lambda p, q: ro.token_kl(p, q, mask=b.mask, estimator="k2"), [p, q]),
        "token_kl k3": (lambda p, q: ro.token_kl(p, q, mask=b.mask), [p, q]),
        "token_kl binary": (
            lambda p, q: ro.token_kl(p, q, mask=b.mask, estimator="binary_kl"),
            [-p, -p * 1.3 - 0.1],
        ),
        "token_kl weighted": (
            lambda p, q, r: ro.token_kl(
                p, q, mask=b.mask, old_logprob=b.values * 0.9, beta=0.3, rewards=r, clamp=(20, 10)
            ),
            [p, q, p + 1],
        ),
        "implicit_rewards": (
            lambda p, q: ro.implicit_rewards(p, q, beta=0.1, steps=b.steps, **b.rows),
            [p, b.critic],
        ),
        "tdpo_terms": (lambda p, q, kl: ro.tdpo_terms(p, q, kl, **b.rows), [p, q, p + 0.3]),
    }


def _advantages(b: Batch) -> Mapping[str, Entry]:
    a, r, baseline = ro.advantages, b.rewards, b.rewards.flip(0) + 0.3
    size = {"num_tokens": b.tokens.numel()} if b.cu_seqlens is not None else {}
    return {
        "group_advantages": (lambda r: ro.group_advantages(r, b.groups), [r]),
        "group_advantages rloo": (
            lambda r: ro.group_advantages(r, b.groups, baseline="leave_one_out", scale="none"),
            [r],
        ),
        "group_advantages given": (
            lambda r, v: ro.group_advantages(r, b.groups, baseline=v, scale="batch_std", **b.rows),
            [r, baseline],
        ),
        "group_advantages by length": (
            lambda r: ro.group_advantages(
                r, b.groups, baseline="length_weighted", scale="mean_abs", **b.rows
            ),
            [r],
        ),
        "group_advantages of several": (
            lambda r: ro.group_advantages(r, b.groups, weights=(0.3, 0.7), **b.rows),
            [b.scores],
        ),
        "group_advantages on tokens": (
            lambda r: ro.group_advantages(r, b.groups, baseline="none", **b.rows),
            [r],
        ),
        "advantages_to_tokens": (
            lambda r: ro.advantages_to_tokens(
                r, cu_seqlens=b.cu_seqlens, mask=None if size else b.mask, **size
            ),
            [r],
        ),
        "whiten": (lambda v: ro.whiten(v, b.mask), [b.values]),
        "advantages.gdpo": (lambda r: a.gdpo(r, b.groups, whitening="tokens", **b.rows), [b.scores]),
        "advantages.gpg": (lambda r: a.gpg(r, b.groups, **b.rows), [r]),
        "advantages.pass_at_k": (lambda r: a.pass_at_k(r, b.groups, **b.rows), [r]),
        "advantages.remax": (lambda r, v: a.remax(r, v, **b.rows), [b.values, baseline]),
        "advantages.reinforce_plus_plus": (
            lambda r: a.reinforce_plus_plus(r, gamma=0.9, **b.rows),
            [b.values],
        ),
        "advantages.reinforce_plus_plus_baseline": (
            lambda r: a.reinforce_plus_plus_baseline(r, b.groups, **b.rows),
            [r],
        ),
        "advantages.gtpo": (
            lambda h: a.gtpo(b.rewards, h, b.groups, entropy_grad=True, **b.rows),
            [b.values],
        ),
        "advantages.grpo_s": (
            lambda h: a.grpo_s(b.rewards, h, b.groups, entropy_grad=True, **b.rows),
            [b.values],
        ),
        "advantages.pure": (
            lambda r, o, k: a.pure(r, b.steps, b.groups, outcome=o, kl=k, beta=0.2, **b.rows),
            [b.values, b.rewards, b.critic],
        ),
    }


def _entropy(b: Batch) -> Mapping[str, Entry]:
    h, logprob = b.values, -b.values * 1.2
    return {
        "gtpo_rewards": (
            lambda r, h: ro.gtpo_rewards(r, h, b.groups, entropy_grad=True, **b.rows),
            [b.rewards, h],
        ),
        "grpo_s_rewards": (
            lambda r, h: ro.grpo_s_rewards(r, h, b.groups, entropy_grad=True, **b.rows),
            [b.rewards, h],
        ),
        "signed_group_normalize": (
            lambda v: ro.signed_group_normalize(v, b.rewards, b.groups, **b.rows),
            [h],
        ),
        "signed_group_normalize joint": (
            lambda v: ro.signed_group_normalize(
                v, b.rewards, b.groups, ddof=1, eps_at="std", joint=True, **b.rows
            ),
            [h],
        ),
        "entropy_weights": (
            lambda h: ro.entropy_weights(
                h * ro.high_entropy_mask(h, fraction=0.4, **b.rows),
                normalize="row",
                entropy_grad=True,
                **b.rows,
            ),
            [h],
        ),
        "entropy_weights inverse": (
            lambda h: ro.entropy_weights(
                h,
                mode="softmax",
                inverse=True,
                normalize="group",
                groups=b.groups,
                entropy_grad=True,
                **b.rows,
            ),
            [h],
        ),
        "advantage_logprob_cov": (lambda a, p: ro.advantage_logprob_cov(a, p, **b.rows), [b.critic, logprob]),
        "entropy_bonus": (lambda a: ro.entropy_bonus(a, h.detach(), b.mask), [b.critic]),
        "unlikeliness_rewards": (lambda r: ro.unlikeliness_rewards(r, b.scores[:, 1], b.groups), [b.rewards]),
        "entropy_reward": (lambda h: ro.entropy_reward(h, **b.rows), [h]),
        "entropy_reward sum": (lambda h: ro.entropy_reward(h, reduce="sum", **b.rows), [h]),
        "entropy_change": (
            lambda a: ro.entropy_change(a, logprob, h, h * 0.3, -h * 0.2, b.mask),
            [b.critic],
        ),
        "steer_metric": (lambda a, p: ro.steer_metric(a, p, h, b.mask), [b.critic, logprob]),
        "steer_weights": (lambda m: ro.steer_weights(m - 0.5, b.mask, mode="exp"), [h]),
    }


def _selection(b: Batch) -> Mapping[str, Entry]:
    h = b.values
    return {
        "high_entropy_mask": (lambda h: ro.high_entropy_mask(h, fraction=0.4, **b.rows), [h]),
        "kl_cov_mask": (lambda c: ro.kl_cov_mask(c, fraction=0.3, **b.rows), [h]),
        "clip_cov_mask": (
            lambda c: ro.clip_cov_mask(
                c,
                fraction=0.3,
                low=0.2,
                high=0.9,
                generator=torch.Generator(c.device).manual_seed(1),
                **b.rows,
            ),
            [h],
        ),
    }


def _returns(b: Batch) -> Mapping[str, Entry]:
    r = b.values
    return {
        "min_returns": (lambda r: ro.min_returns(r, steps=b.steps, **b.rows), [r]),
        "max_returns": (lambda r: ro.max_returns(r, steps=b.steps.cumsum(-1), **b.rows), [r]),
        "softmin_returns": (lambda r: ro.softmin_returns(r, steps=b.steps, temperature=0.5, **b.rows), [r]),
        "softmin_returns of step ids": (
            lambda r: ro.softmin_returns(r, steps=b.steps.cumsum(-1), temperature=0.5, mean=True, **b.rows),
            [r],
        ),
        "softmin_rewards": (lambda r: ro.softmin_rewards(r, steps=b.steps, temperature=0.5, **b.rows), [r]),
    }


def _td(b: Batch) -> Mapping[str, Entry]:
    r, v, boot = b.values, b.critic, b.rewards
    return {
        "discounted_returns": (
            lambda r, boot: ro.discounted_returns(r, gamma=0.9, bootstrap=boot, **b.rows),
            [r, boot],
        ),
        "gae": (
            lambda r, v, boot: ro.gae(r, v, gamma=0.9, lam=0.8, bootstrap=boot, **b.rows),
            [r, v, boot],
        ),
        "gae decay": (
            lambda r, v, boot: ro.gae(r, v, gamma=0.9, lam=0.8, bootstrap=boot, masked="step", **b.rows),
            [r, v, boot],
        ),
        "lambda_returns": (lambda r, v: ro.lambda_returns(r, v, gamma=0.9, lam=0.8, **b.rows), [r, v]),
        "vtrace": (
            lambda r, v: ro.vtrace(r, v, b.values - 0.4, lam=b.values * 0.8, gamma=0.9, **b.rows),
            [r, v],
        ),
    }


def _segments(b: Batch) -> Mapping[str, Entry]:
    steps = b.tokens.shape[-1] if b.cu_seqlens is None else 8

    def reduced(v: Tensor, how: str) -> Tensor:
        return ro.segment_reduce(v, b.steps, how, num_steps=steps, **b.rows)

    return {
        "row_sum": (lambda v: ro.row_sum(v, **b.rows), [b.values]),
        "row_mean": (lambda v: ro.row_mean(v, **b.rows), [b.values]),
        "running_sum": (lambda v: ro.running_sum(v, **b.rows), [b.values]),
        "running_mean": (lambda v: ro.running_mean(v, **b.rows), [b.values]),
        "segment_reduce": (lambda v: reduced(v, "sum"), [b.values]),
        "segment_reduce product": (lambda v: reduced(v, "prod"), [b.values]),
        "segment_broadcast": (
            lambda v: ro.segment_broadcast(reduced(v, "mean"), b.steps, **b.rows),
            [b.values],
        ),
        "place_at_step_end": (
            lambda v: ro.place_at_step_end(reduced(v, "max"), b.steps, **b.rows),
            [b.values],
        ),
    }


def _shaping(b: Batch) -> Mapping[str, Entry]:
    return {
        "step_progress": (lambda q: ro.step_progress(q, b.steps, **b.rows), [b.values]),
        "step_progress discounted": (
            lambda q, s: ro.step_progress(q, b.steps, start=s, gamma=b.rewards.abs().clamp(max=1), **b.rows),
            [b.values, b.rewards],
        ),
        "clip_delta_rewards": (lambda q: ro.clip_delta_rewards(q, b.steps, eta=0.5, **b.rows), [b.values]),
        "redistribute_outcome": (
            lambda r, w: ro.redistribute_outcome(r, w, share=0.7, **b.rows),
            [b.rewards, b.values],
        ),
        "redistribute_outcome signed": (
            lambda r, w: ro.redistribute_outcome(r, w, share=0.7, signed=True, **b.rows),
            [b.rewards, b.values - 0.2],
        ),
        "redistribute_outcome softmax": (
            lambda r, w: ro.redistribute_outcome(r, w, norm="softmax", **b.rows),
            [b.rewards, b.values],
        ),
        "potential_shaping": (
            lambda r, v, f: ro.potential_shaping(r, v, gamma=0.9, final=f, **b.rows),
            [b.values, b.critic, b.rewards],
        ),
        "budget_returns": (lambda s: ro.budget_returns(s, (0.3, 0.7)), [b.scores]),
        "budget_advantages": (lambda s: ro.budget_advantages(s, b.groups), [b.scores]),
    }


def _prefix_tree(b: Batch) -> Mapping[str, Entry]:
    y, r, w = b.tokens, b.rewards, b.scores[:, 0]
    return {
        "prefix_lcp": (lambda w: ro.prefix_lcp(y, b.groups, max_group_size=len(r) or 1, **b.rows), [w]),
        "prefix_values": (lambda r: ro.prefix_values(y, r, b.groups, **b.rows)[:2], [r]),
        "prefix_values without holes": (
            lambda r: ro.prefix_values(y, r, b.groups, masked="skip", gamma=0.9, **b.rows)[:2],
            [r],
        ),
        "prefix_values of the others, weighed": (
            lambda r, w: ro.prefix_values(
                y, r, b.groups, weights=w, gamma=0.9, min_count=2, leave_one_out=True, **b.rows
            )[:2],
            [b.scores, w],
        ),
        "prefix_std": (lambda r, w: ro.prefix_std(y, r, b.groups, weights=w, **b.rows), [r, w]),
        "tvm_targets": (lambda r: ro.tvm_targets(y, r, b.groups, gamma=0.9, **b.rows), [r]),
        "shared_prefix_weights": (lambda w: ro.shared_prefix_weights(y, b.groups, **b.rows), [w]),
        "sibling_advantages": (lambda r: ro.sibling_advantages(y, r, b.groups, eps=0.1, **b.rows), [r]),
        "tempo_advantages": (lambda r: ro.tempo_advantages(y, r, b.groups, **b.rows), [r]),
        "tree_rl_advantages": (
            lambda r: ro.tree_rl_advantages(y, r, b.groups, form="released", **b.rows),
            [r],
        ),
    }


def _tree(b: Batch) -> Mapping[str, Entry]:
    depth = max(1, len(b.parent))
    return {
        "tree_values": (lambda r: ro.tree_values(b.parent, r, max_depth=depth), [b.rewards]),
        "tree_advantages": (
            lambda r: ro.tree_advantages(b.parent, r, reduce="softmax", max_depth=depth),
            [b.rewards],
        ),
    }


CALLS: Mapping[str, Callable[[Batch], Mapping[str, Entry]]] = {
    "logits": _logits,
    "linear": _linear,
    "kl": _kl,
    "advantages": _advantages,
    "entropy": _entropy,
    "selection": _selection,
    "returns": _returns,
    "td": _td,
    "segments": _segments,
    "shaping": _shaping,
    "prefix_tree": _prefix_tree,
    "tree": _tree,
}
# Integers, flags, constants by definition; and records, whose gradient flows through the merged statistics.
NOT_DIFFERENTIABLE = (
    "token_stats_partial",
    "high_entropy_mask",
    "advantage_logprob_cov",
    "kl_cov_mask",
    "clip_cov_mask",
    "entropy_reward",
    "entropy_reward sum",
    "entropy_change",
    "steer_metric",
    "steer_weights",
    "prefix_lcp",
    "shared_prefix_weights",
)


def calls(batch: Batch, family: str | None = None) -> list[Call]:
    """All calls on a batch, of one family or of all."""
    return [
        Call(name, name.partition(" ")[0], fn, inputs, name not in NOT_DIFFERENTIABLE)
        for entries in (CALLS[f](batch) for f in ([family] if family else FAMILIES))
        for name, (fn, inputs) in entries.items()
    ]
