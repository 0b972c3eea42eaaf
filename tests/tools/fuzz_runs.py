"""A drawn call as a function of its floating-point tensors, and what it is compared with."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fuzz_arguments import FUNCTIONS, Call, Fresh
from torch import Tensor

import rewardops

# ---- a call as a function of its numbers -------------------------------------------------------------------


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, f.name) for f in dataclasses.fields(result)]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in flat(part)]
    return []


PLACES = ("dense", "rows apart", "columns first", "every other")


def placed(x: Tensor, how: str) -> Tensor:
    """The same values in another memory layout, with NaN in the gaps; differentiable."""
    if x.dim() == 0 or how == "dense":
        return x
    if how == "columns first":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    hole = torch.full_like(x, torch.nan)
    if how == "rows apart":
        return torch.cat([x, hole[..., :1]], -1)[..., : x.shape[-1]]
    return torch.stack([hole, x], -1)[..., 1]


Place = Callable[[list[Tensor]], list[Tensor]]


class Runner:
    """A call as a function of its floating-point tensors.

    Args:
        plain: select the computation for the budget. place: where the numbers are put in memory, by default each
            tensor at one of ``PLACES``.
    """

    def __init__(self, call: Call, plain: bool = False, place: Place | None = None) -> None:
        self.call, self.plain = call, plain
        self.names: list[tuple[str, str | None]] = []  # (argument, key in it)
        self.inputs: list[Tensor] = []
        for name, value in call.arguments.items():
            for key, x in value.items() if isinstance(value, dict) else [(None, value)]:
                if isinstance(x, Tensor) and x.is_floating_point() and name != "mask":
                    self.names.append((name, key))
                    self.inputs.append(x)
        # Seeded by the call alone, so that failures reproduce.
        self.seed = zlib.crc32(repr(call).encode())
        self.place = place or self._placed

    def _placed(self, leaves: list[Tensor]) -> list[Tensor]:
        return [placed(leaf, PLACES[(self.seed >> 2 * k) % len(PLACES)]) for k, leaf in enumerate(leaves)]

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        device = leaves[0].device if leaves else torch.device("cpu")
        arguments = {name: _on(value, device) for name, value in self.call.arguments.items()}
        for (name, key), x in zip(self.names, self.place(list(leaves)), strict=True):
            if key is None:
                arguments[name] = x
            else:
                arguments[name][key] = x
        torch.manual_seed(self.seed)  # for ops that draw random numbers
        return flat((PLAIN if self.plain else CHECKED)[self.call.name](**arguments))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Fresh):
        return torch.Generator().manual_seed(value.seed)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_on(v, device) for v in value]
    return value


# ---- what is checked of some functions, and what they are compared with ------------------------------------


def merged(**arguments: Any) -> Any:
    """Statistics merged from :func:`token_stats_partial`, as sums in records are relative to their maximum."""
    outputs = arguments.get("outputs", ("logprob", "entropy"))
    return rewardops.merge_token_stats(rewardops.token_stats_partial(**arguments)[None], outputs=outputs)


def of_the_part(
    *, tokens: Tensor, vocab_start: int = 0, vocab_size: int | None = None, **arguments: Any
) -> Any:
    """The reference for :func:`merged`: statistics of the columns of the part."""
    width = arguments["logits"].shape[-1]
    size = width if vocab_size is None else min(vocab_size - vocab_start, width)
    if size < 1:
        return merged(tokens=tokens, vocab_start=vocab_start, vocab_size=vocab_size, **arguments)
    ids = tokens.long() - vocab_start
    ids = torch.where((ids >= 0) & (ids < size), ids, -1).masked_fill(tokens == -100, -100)
    return rewardops.token_stats(tokens=ids, vocab_size=size, **arguments)


def _counts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens != -100 if mask is None else (tokens != -100) & (mask != 0)


def by_logits(
    *, hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None,
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    logit_scale: float = 1.0, chunk_tokens: int | None = None, chunk_vocab: int | None = None,
    num_tokens: int | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """The reference for :func:`linear_token_stats`, from all logits at once."""
    valid = _counts(tokens, arguments.get("mask"))[..., None]

    def logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(torch.where(valid, x, 0), w, b) * logit_scale

    if ref_hidden is not None and ref_weight is not None:
        arguments["ref_logits"] = logits(ref_hidden, ref_weight, ref_bias)
    stats = rewardops.token_stats if "vocab_start" not in arguments else of_the_part
    return stats(logits=logits(hidden, weight, bias), tokens=tokens, **arguments)


def loss_by_logits(
    *, coefficients: Mapping[str, Tensor], outputs: Sequence[str] = (), **arguments: Any
) -> Any:
    """The reference for :func:`linear_token_loss`, from all logits at once."""
    stats = by_logits(outputs=[*coefficients, *outputs], **arguments)
    valid = _counts(arguments["tokens"], arguments.get("mask"))
    terms = (torch.where(valid, c * getattr(stats, name), 0).sum() for name, c in coefficients.items())
    return sum(terms), [None if x is None else x.detach() for x in stats]


def linear_merged(**arguments: Any) -> Any:
    """Statistics merged from :func:`linear_token_stats_partial`."""
    outputs = arguments.get("outputs", ("logprob", "entropy"))
    return rewardops.merge_token_stats(
        rewardops.linear_token_stats_partial(**arguments)[None], outputs=outputs
    )


CHECKED = {**FUNCTIONS, "token_stats_partial": merged, "linear_token_stats_partial": linear_merged}
# References that compute in float64 for any input dtype: they give no budget for lower precision.
PLAIN = {
    **FUNCTIONS,
    "token_stats_partial": of_the_part,
    "linear_token_stats": by_logits,
    "linear_token_stats_partial": lambda **arguments: by_logits(**{"vocab_start": 0, **arguments}),
    "linear_token_loss": loss_by_logits,
}


# ---- kinds of functions ---

# Functions with results that are not per token, whatever their shape.
NOT_PER_TOKEN = {
    "budget_advantages", "budget_returns", "entropy_reward", "grpo_s_rewards", "merge_token_stats", "prefix_lcp",
    "row_mean", "row_sum", "segment_reduce", "tdpo_terms", "tree_advantages", "tree_values", "unlikeliness_rewards",
    "PrefixTree.from_tokens",
}  # fmt: skip


# Functions that draw random numbers, which differ between device and host.
RANDOM = {"clip_cov_mask"}
