"""TRL's GRPOTrainer on rewardops: per-token statistics, exact KL, and any advantage estimator."""

from __future__ import annotations

import contextlib
import inspect
import operator
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer as Stock
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as stock_utils

from .. import advantages
from ..core import checks
from ..core.dispatch import use_backend
from ..linear import linear_token_stats
from ..logits import token_stats
from ..prefix_tree import tempo_advantages

__all__ = ["GRPOTrainer", "Rollouts"]

# ---- what an estimator sees --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """The completions of a generation step, of all processes, with their rewards.

    Rows are in TRL's order: contiguous groups of ``group_size``. Estimators of rewardops take them with
    ``group_size=rollouts.group_size``.

    Attributes:
        rewards: ``[B]``, float32: the weighted sum over reward functions; 0 where none returned a reward.
        rewards_per_func: ``[B, R]``, float32, unweighted; NaN where a function returned None.
        reward_weights: ``[R]``.
        scorable: ``[B]``, bool: rows with a reward from at least one function. The others get advantage 0.
        completion_ids: ``[B, T]``, padded on the right.
        mask: ``[B, T]``, bool: tokens sampled by the policy, in scorable rows; neither padding nor tool output.
            Truncated completions are included, as TRL counts them in their group too
            (``mask_truncated_completions`` removes them from the loss).
        group_size: rows of a group.
        process_rewards: ``[B, T]``, float32: the reward of a step at the token that ends it, 0 elsewhere; None
            without a ``process_reward_func``.
        step_ends: ``[B, T]``, bool: those tokens.
    """

    rewards: Tensor
    rewards_per_func: Tensor
    reward_weights: Tensor
    scorable: Tensor
    completion_ids: Tensor
    mask: Tensor
    group_size: int
    process_rewards: Tensor | None
    step_ends: Tensor | None
    _entropies: Callable[[], Tensor] = field(repr=False)

    def entropies(self) -> Tensor:
        """Entropies ``[B, T]`` of the behaviour policy, in nats: a forward pass, to be called on every process."""
        return self._entropies()


Estimator = Callable[[Rollouts], Tensor]

# TRL's eps, added to the standard deviation.
_EPS = 1e-4
_SCALES = {"group": "std", "batch": "batch_std", "none": "none"}


def _grpo(rollouts: Rollouts, **options: Any) -> Tensor:
    where: dict[str, Any] = {"group_size": rollouts.group_size, "mask": rollouts.scorable[:, None]}
    return advantages.grpo(rollouts.rewards, **where, **options)[:, 0]


def _rloo(rollouts: Rollouts, **options: Any) -> Tensor:
    where: dict[str, Any] = {"group_size": rollouts.group_size, "mask": rollouts.scorable[:, None]}
    return advantages.rloo(rollouts.rewards, **where, **options)[:, 0]


def _gdpo(rollouts: Rollouts, *, eps: float) -> Tensor:
    """TRL's ``normalize_then_sum``: missing rewards of a function are left out of their groups."""
    total = advantages.gdpo(
        rollouts.rewards_per_func, group_size=rollouts.group_size, weights=rollouts.reward_weights,
        whitening="none", eps=eps,
    )  # fmt: skip
    # TRL adds eps to the standard deviation of the batch, `whiten` to the variance.
    return advantages.grpo(total, group_size=len(total), mask=rollouts.scorable[:, None], eps=eps)[:, 0]


def _gtpo(rollouts: Rollouts, **options: Any) -> Tensor:
    return advantages.gtpo(
        rollouts.rewards, rollouts.entropies(), group_size=rollouts.group_size, mask=rollouts.mask, **options
    )


def _pure(rollouts: Rollouts, **options: Any) -> Tensor:
    assert rollouts.process_rewards is not None
    assert rollouts.step_ends is not None
    return advantages.pure(
        rollouts.process_rewards, rollouts.step_ends, group_size=rollouts.group_size, outcome=rollouts.rewards,
        mask=rollouts.mask, **options,
    )  # fmt: skip


def _tempo(rollouts: Rollouts, **options: Any) -> Tensor:
    return tempo_advantages(
        rollouts.completion_ids,
        rollouts.rewards,
        group_size=rollouts.group_size,
        mask=rollouts.mask,
        **options,
    )


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "gtpo": _gtpo,
    "pure": _pure,
    "tempo": _tempo,
}
_OPTIONS = {
    "grpo": ("baseline", "scale", "eps", "ddof", "singleton"),
    "rloo": ("singleton",),
    "gtpo": ("alpha1", "alpha2", "positive", "entropy_floor", "eps", "joint"),
    "pure": ("temperature", "baseline", "gamma", "outcome_weight", "separators"),
    "tempo": ("td_scale", "scale", "eps", "ddof", "masked"),
}
_PER_TOKEN = ("gtpo", "pure", "tempo")


def _check_call(name: str, function: object, want: str, *args: Any, **kwargs: Any) -> None:
    """Check that a function, by its signature, can be called with these arguments, and more."""
    if not callable(function):
        raise TypeError(f"{name}: got {type(function).__name__}, want {want}")
    if stock_utils.is_async_callable(function):
        raise TypeError(f"{name}: got an async function, want {want}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return
    try:
        signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: got a function of {signature} ({error}), want {want}") from None


def _check_estimator(
    estimator: object, options: object, process_reward_func: ProcessRewardFunc | None
) -> dict[str, Any]:
    """Check the arguments of the trainer that say how advantages are computed; return the options."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"advantage_options: got {type(options).__name__}, want a mapping")
    if process_reward_func is not None:
        given = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
        want = f"a function that takes {', '.join(given)} and the columns of the data set (**kwargs)"
        _check_call("process_reward_func", process_reward_func, want, **dict.fromkeys(given))
    if callable(estimator):
        _check_call("advantage_estimator", estimator, "a function of one argument, Rollouts", None)
        if options:
            raise ValueError("advantage_options: got a value beside a function, want functools.partial")
        return {}
    checks.check_choice("advantage_estimator", estimator, tuple(ESTIMATORS))
    assert isinstance(estimator, str)
    if estimator == "pure" and process_reward_func is None:
        raise ValueError("process_reward_func: got None with advantage_estimator='pure', want a function")
    _check_names(estimator, options, _OPTIONS[estimator])
    return dict(options)


def _check_names(estimator: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for name in options:
        if name not in accepted:
            raise ValueError(
                f"advantage_options: got {name!r} for {estimator!r}, want some of"
                f" {', '.join(repr(a) for a in accepted)}"
            )


# ---- statistics from hidden states -------------------------------------------------------------------------


class _Head:
    """Replacement of TRL's ``ChunkedLogProbFunction``: token statistics from hidden states and a head.

    One instance per model. For the exact KL the reference model's instance records its inputs in ``note``. The
    policy's instance reads them as ``reference`` and stores the result in ``kl``.
    """

    def __init__(self) -> None:
        self.note: list[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self.reference: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.kl: Tensor | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        _chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        if self.note is not None:
            self.note.append((hidden, weight, bias))
            return hidden.new_zeros(tokens.shape, dtype=torch.float32), None, None, None, None
        names = {"log_probs": "logprob", "entropy": "entropy"}
        requested = [names[name] for name in outputs]
        other: dict[str, Any] = {}
        if self.reference is not None:
            other = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), self.reference, strict=True))
            requested.append("kl")
        stats = linear_token_stats(
            hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            outputs=requested, num_tokens=tokens.shape[0], **other,
        )  # fmt: skip
        self.kl = stats.kl
        assert stats.logprob is not None
        return stats.logprob, stats.entropy, None, None, None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _add_head(model: nn.Module, head: _Head, **options: Any) -> None:
    """Call TRL's ``add_fused_lm_head`` with this module's head.

    The same code runs with two replaced globals, for this model alone. TRL's knowledge of models (backbones,
    softcaps, scales, tied and sharded heads, auxiliary losses) is reused, and other trainers are unaffected.
    Tokens without a label are removed before the head on every device.
    """
    stock = stock_utils.add_fused_lm_head
    swapped = {"_ChunkedLogProbFunction": head, "_use_triton": lambda device: True}
    if missing := set(swapped) - set(_names(stock.__code__)):
        raise ImportError(
            f"rewardops.integrations.trl: TRL's add_fused_lm_head no longer uses {', '.join(sorted(missing))};"
            " want TRL 1.16, or token_stats_from='logits'"
        )
    ours = types.FunctionType(
        stock.__code__,
        {**vars(stock_utils), **swapped},
        stock.__name__,
        stock.__defaults__,
        stock.__closure__,
    )
    ours(model, **options)


class _BesideReference:
    """The policy and the reference model behind one call; ``kl`` collects KL(policy || reference)."""

    def __init__(self, model: nn.Module, head: _Head, ref_model: nn.Module, ref_head: _Head) -> None:
        self.model, self.head, self.ref_model, self.ref_head = model, head, ref_model, ref_head
        self.kl: list[Tensor] = []

    def __call__(self, **inputs: Any) -> Any:
        self.ref_head.note = []
        try:
            with torch.no_grad():
                self.ref_model(**inputs)
            (self.head.reference,) = self.ref_head.note
            out = self.model(**inputs)
        finally:
            self.ref_head.note = self.head.reference = None
        kl, self.head.kl = self.head.kl, None
        assert kl is not None
        self.kl.append(kl.new_zeros(out.label_mask.shape).masked_scatter(out.label_mask, kl))
        return out


# ---- statistics from logits --------------------------------------------------------------------------------


class _FromLogits:
    """A model with the signature that TRL calls; its statistics come from the logits that the model returns."""

    def __init__(
        self, model: nn.Module, keep: dict[str, int], temperature: float, ref_model: nn.Module | None
    ) -> None:
        self.model, self.keep, self.temperature, self.ref_model = model, keep, temperature, ref_model
        self.kl: list[Tensor] = []

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        inputs = {**inputs, **self.keep, "use_cache": False}
        ref_logits = None
        if self.ref_model is not None:
            with torch.no_grad():
                ref_logits = self.ref_model(**inputs).logits
        out = self.model(**inputs)
        # The last position predicts no sampled token. It is masked instead of sliced off: a slice would pad its
        # gradient.
        tokens = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[:, -out.logits.shape[1] :]
        stats = token_stats(
            out.logits,
            tokens.to(out.logits.device),
            temperature=self.temperature,
            ref_logits=ref_logits,
            outputs=("logprob", "entropy") if ref_logits is None else ("logprob", "entropy", "kl"),
            inplace_backward=True,
        )
        assert stats.logprob is not None
        assert stats.entropy is not None
        if stats.kl is not None:
            self.kl.append(stats.kl[:, :-1])
        return types.SimpleNamespace(
            log_probs=stats.logprob[:, :-1],
            entropy=stats.entropy[:, :-1],
            aux_loss=getattr(out, "aux_loss", None),
        )


# ---- the trainer -------------------------------------------------------------------------------------------

ProcessRewardFunc = Callable[..., Sequence[Sequence[tuple[int, float]] | None]]


class GRPOTrainer(Stock):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` with per-token statistics and advantages from rewardops; a drop-in replacement.

    Args:
        advantage_estimator: ``"grpo"``, TRL's arithmetic (``scale_rewards`` and ``multi_objective_aggregation``
            of the config apply); ``"rloo"``, :func:`rewardops.advantages.rloo`; or, with an advantage per token,
            ``"tempo"``, :func:`rewardops.tempo_advantages` on the prefix tree of a group's completions (scaled by
            ``scale_rewards``), ``"gtpo"``, :func:`rewardops.advantages.gtpo` (one more forward pass per
            generation, for the entropies), and ``"pure"``, :func:`rewardops.advantages.pure` with the process
            rewards of ``process_reward_func`` and the weighted sum of ``reward_funcs`` as the outcome. Or a
            function from :class:`Rollouts` to advantages, ``[B]`` or ``[B, T]``.
        advantage_options: keywords for the named function, over TRL's conventions (``eps=1e-4``); checked here, on
            a group of zeros.
        process_reward_func: called as a reward function is (``prompts``, ``completions``, ``completion_ids``, the
            data set's columns); returns for each completion the ``(end, reward)`` of its steps, ``end`` the
            position of the step's last token in the completion; None for a completion without steps.
        token_stats_from: ``"hidden"``, through :func:`rewardops.linear_token_stats`, which never holds
            ``[tokens, vocabulary]``; or ``"logits"``, through :func:`rewardops.token_stats` of the logits that
            the model returns, for models whose logits are not a plain product of hidden states and a head.
        kl_estimator: ``"k3"``, TRL's, of the sampled tokens; or ``"exact"``, KL(policy || reference) of each
            token's distributions, from the pass that gives the log-probabilities. The reference model then runs
            in every step, beside the policy. ``use_bias_correction_kl`` is ignored: it corrects the expected
            gradient of k3 to that of the exact KL.
        Others: as in TRL's ``GRPOTrainer``.

    Raises:
        ValueError: an unknown name, an option that the estimator does not have or a value that it does not take,
            options without a named estimator, ``"pure"`` without a ``process_reward_func``,
            ``"normalize_then_sum"`` with a named estimator other than ``"grpo"``, ``kl_estimator="exact"`` without
            a separate reference model (``beta=0``, PEFT) or with a sharded one (FSDP, ZeRO-3).
        TypeError: a function that is asynchronous, or whose signature does not take what it will be called with.
    """

    beta: float

    def __init__(
        self,
        *args: Any,
        advantage_estimator: str | Estimator = "grpo",
        advantage_options: Mapping[str, Any] | None = None,
        process_reward_func: ProcessRewardFunc | None = None,
        token_stats_from: str = "hidden",
        kl_estimator: str = "k3",
        **kwargs: Any,
    ) -> None:
        checks.check_choice("token_stats_from", token_stats_from, ("hidden", "logits"))
        checks.check_choice("kl_estimator", kl_estimator, ("k3", "exact"))
        options = _check_estimator(advantage_estimator, advantage_options, process_reward_func)
        super().__init__(*args, **kwargs)
        self.token_stats_from, self.kl_estimator = token_stats_from, kl_estimator
        self.process_reward_func = process_reward_func
        self._estimator = self._estimator_of(advantage_estimator, options)
        if kl_estimator == "exact":
            self._check_exact()
        self._heads = (_Head(), _Head())
        self._comparing = False
        self._step_kl: Tensor | None = None
        if token_stats_from == "hidden":
            self._add_heads()

    def _estimator_of(self, estimator: str | Estimator, options: dict[str, Any]) -> Estimator:
        if callable(estimator):
            return estimator
        if estimator in _PER_TOKEN and self.importance_sampling_level == "sequence":
            warnings.warn(
                f"advantage_estimator={estimator!r} gives each token its own advantage, but with"
                " importance_sampling_level='sequence' a completion has one ratio, whose gradient only sees their"
                " mean; want 'token'",
                stacklevel=3,
            )
        named = ESTIMATORS[estimator]
        if self.multi_objective_aggregation == "normalize_then_sum":
            if estimator != "grpo":
                raise ValueError(
                    f"multi_objective_aggregation: got 'normalize_then_sum' with"
                    f" advantage_estimator={estimator!r}, want 'sum_then_normalize'"
                )
            _check_names("grpo", options, ("eps",))
            named, options = _gdpo, {"eps": _EPS, **options}
        elif estimator in ("grpo", "tempo"):
            options = {"scale": _SCALES[self.scale_rewards], "eps": _EPS, **options}
        self._check_values(named, options)
        return lambda rollouts: named(rollouts, **options)

    def _check_values(self, named: Callable[..., Tensor], options: dict[str, Any]) -> None:
        """Call a named estimator on a group of zeros, so that a wrong option raises before any generation."""
        rows, device = self.num_generations, self.accelerator.device
        zeros = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        functions = len(self.reward_weights)
        group = Rollouts(
            rewards=zeros[:, 0],
            rewards_per_func=zeros.expand(rows, functions).contiguous(),
            reward_weights=self.reward_weights.to(device),
            scorable=zeros[:, 0] == 0,
            completion_ids=zeros.long(),
            mask=zeros == 0,
            group_size=rows,
            process_rewards=zeros,
            step_ends=zeros == 0,
            _entropies=lambda: zeros,
        )
        try:
            with use_backend("reference"):
                named(group, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"advantage_options.{error}") from None

    # ---- per-token statistics

    def _add_heads(self) -> None:
        if is_deepspeed_zero3_enabled():
            # ZeRO-3 gathers the head for TRL's backward pass only; in any other it is empty.
            warnings.warn(
                "DeepSpeed ZeRO-3: log-probabilities and entropies come from TRL's fused head, not from"
                " rewardops; token_stats_from='logits' works",
                stacklevel=3,
            )
            return
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        shared = {"temperature": self.temperature, "cast_lm_head_to_fp32": self.args.cast_lm_head_to_fp32}
        _add_head(model, self._heads[0], outputs=("log_probs", "entropy"), **shared)
        if self.ref_model is not None:
            _add_head(self.accelerator.unwrap_model(self.ref_model), self._heads[1], **shared)

    def _from_logits(self, model: nn.Module, logits_to_keep: int, ref_model: nn.Module | None) -> _FromLogits:
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if is_peft_model(inner) else inner
        accepts = "logits_to_keep" in inspect.signature(inner.forward).parameters
        keep = {"logits_to_keep": logits_to_keep + 1} if accepts else {}
        return _FromLogits(model, keep, self.temperature, ref_model)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ref_model = self.ref_model if self._comparing else None
        scored: Any = model
        if self.token_stats_from == "logits":
            scored = self._from_logits(model, logits_to_keep, ref_model)
        elif ref_model is not None:
            scored = _BesideReference(model, self._heads[0], ref_model, self._heads[1])
        stats = super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if ref_model is not None:
            self._step_kl = torch.cat(scored.kl)[:, -logits_to_keep:]
        return stats

    # ---- exact KL

    def _check_exact(self) -> None:
        why = None
        if self.beta == 0.0:
            why = "beta=0"
        elif self.ref_model is None:
            why = "a PEFT model, whose reference is the model itself"
        elif self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            why = "a sharded reference model"
        if why is not None:
            raise ValueError(f"kl_estimator: got 'exact' with {why}, want 'k3'")

    @contextlib.contextmanager
    def _without_stock_kl(self) -> Iterator[None]:
        """Run TRL's code as with ``beta=0``: without reference log-probabilities and k3."""
        beta = self.beta
        if self.kl_estimator == "exact":
            self.beta = 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _share_in_loss(self, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Weights ``[B, T]`` by which TRL's ``loss_type`` multiplies token losses before the sum."""
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1.0
        weights = mask.float()
        if self.loss_type in ("grpo", "sapo"):
            return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) / len(mask) / steps
        if self.loss_type == "bnpo":
            return weights / weights.sum().clamp(min=1.0) / steps
        if self.loss_type == "dr_grpo":
            return weights / (len(mask) * self.max_completion_length) / steps
        if self.loss_type == "luspo":
            return weights / len(mask) / steps
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return weights / (tokens * steps / self.args.steps_per_generation if training else tokens)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.kl_estimator == "k3":
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        self._comparing = True
        try:
            with self._without_stock_kl():
                loss = super()._compute_loss(model, inputs)
        finally:
            self._comparing = False
        kl, self._step_kl = self._step_kl, None
        assert kl is not None
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        sums = self.accelerator.reduce(torch.stack([(kl.detach() * mask).sum(), mask.sum().float()]), "sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl"].append((sums[0] / sums[1].clamp(min=1.0)).item())
        return loss + self.beta * (kl * self._share_in_loss(mask, inputs)).sum()

    # ---- advantages

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        steps = None
        if self.process_reward_func is not None:
            columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
            steps = self.process_reward_func(
                prompts=prompts, completions=completions, completion_ids=completion_ids_list,
                **{key: [example[key] for example in inputs] for key in columns},
                trainer_state=self.state, log_extra=self._log_completion_extra, log_metric=self._log_metric,
                **({} if self.environments is None else {"environments": self.environments}),
            )  # fmt: skip
            results = len(steps) if hasattr(steps, "__len__") else type(steps).__name__
            if results != len(prompts):
                raise ValueError(
                    f"process_reward_func: got {results} results, want {len(prompts)} (one per completion)"
                )
        self._scored = (rewards, [len(ids) for ids in completion_ids_list], steps)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._without_stock_kl():
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["advantages"] = self._advantages(output)
        return output

    def _advantages(self, output: Mapping[str, Any]) -> Tensor:
        """Advantages ``[B]`` or ``[B, T]`` of this process's rows, computed from the rollouts of all processes."""
        rewards, lengths, steps = self._scored
        del self._scored
        ids = output["completion_ids"]
        rows, width = ids.shape
        length = torch.tensor(lengths, dtype=torch.int64, device=ids.device)
        inside = torch.arange(width, dtype=torch.int64, device=ids.device) < length[:, None]
        written = inside
        if "tool_mask" in output:
            # TRL masks truncated completions too: their tokens of the policy and of tools are not distinguishable
            # here.
            truncated = (output["completion_mask"] == 0).all(1)
            written = inside & (output["tool_mask"].bool() | truncated[:, None])
        scorable = ~rewards.isnan().all(1)
        weights = self.reward_weights.to(rewards.device)
        process = None if steps is None else _place(steps, written)
        ends = None if process is None else self._gather(~process.isnan())
        rollouts = Rollouts(
            rewards=(rewards * weights).nansum(1),
            rewards_per_func=rewards,
            reward_weights=weights,
            scorable=scorable,
            completion_ids=self._gather(ids, self._tokenizer.pad_token_id),
            mask=self._gather(written) & scorable[:, None],
            group_size=self.num_generations if self.model.training else self.num_generations_eval,
            process_rewards=None if process is None else self._gather(process.nan_to_num(nan=0.0)),
            step_ends=ends,
            _entropies=lambda: self._gather(self._behaviour_entropies(output, inside)),
        )
        advantages = self._estimator(rollouts)
        if not isinstance(advantages, Tensor) or advantages.shape not in (
            scorable.shape,
            rollouts.mask.shape,
        ):
            is_tensor = isinstance(advantages, Tensor)
            got = f"shape {checks.show(advantages.shape)}" if is_tensor else type(advantages).__name__
            want = f"[{len(scorable)}] or {checks.show(rollouts.mask.shape)}"
            raise ValueError(f"advantage_estimator: got {got}, want {want}")
        advantages = advantages.detach().float()
        counted = scorable if advantages.dim() == 1 else rollouts.mask
        if not bool(advantages[counted].isfinite().all()):
            raise ValueError("advantage_estimator: got NaN or infinite advantages, want finite ones")
        advantages = torch.where(counted, advantages, 0)
        self._log_advantages(advantages, rollouts.mask)
        first = self.accelerator.process_index * rows
        advantages = advantages[first : first + rows]
        return advantages if advantages.dim() == 1 else advantages[:, :width]

    def _gather(self, values: Tensor, pad: int = 0) -> Tensor:
        """Gather the rows of all processes, padded to the widest."""
        plain = values.int() if values.dtype is torch.bool else values
        wide = self.accelerator.pad_across_processes(plain, dim=1, pad_index=pad)
        gathered: Tensor = self.accelerator.gather(wide)
        return gathered.bool() if values.dtype is torch.bool else gathered

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Replace TRL's advantages in the completions table, by the mean over tokens where they are per token."""
        if advantages.dim() == 2:
            advantages = advantages.sum(1) / mask.sum(1).clamp(min=1)
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _behaviour_entropies(self, output: Mapping[str, Any], inside: Tensor) -> Tensor:
        """Entropies ``[B, T]``, also of truncated completions, which TRL has masked by now."""
        size = self.args.per_device_train_batch_size if self.model.training else len(inside)
        about_images = (
            "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
            "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
        )  # fmt: skip
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([output["prompt_mask"], inside.to(output["prompt_mask"].dtype)], 1),
                inside.shape[1],
                batch_size=size,
                compute_entropy=True,
                **{key: output[key] for key in about_images if key in output},
            )
        found: Tensor = entropies
        return found


def _place(steps: Sequence[Sequence[tuple[int, float]] | None], written: Tensor) -> Tensor:
    """Step rewards ``[B, T]``, float32, at the last token of each step, NaN elsewhere."""
    out = torch.full(written.shape, torch.nan, dtype=torch.float32, device="cpu")
    allowed = written.tolist()
    for row, pairs in enumerate(steps):
        before = -1
        for pair in pairs or ():
            try:
                end, reward = pair
                end = operator.index(end)
            except (TypeError, ValueError):
                raise ValueError(
                    f"process_reward_func: got {pair!r} in completion {row}, want (end, reward), with end a"
                    " whole number"
                ) from None
            if not before < end < written.shape[1] or not allowed[row][end]:
                raise ValueError(
                    f"process_reward_func: got a step that ends at token {end} after one at {before} in completion"
                    f" {row}, want rising positions of tokens that the policy wrote"
                )
            checks.check_finite("process_reward_func", reward)
            out[row, end] = reward
            before = end
    return out.to(written.device)
