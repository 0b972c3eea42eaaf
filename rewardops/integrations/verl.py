"""verl: advantage estimators and policy losses for its registries, and drop-ins for its functions of logits.

Importing this module registers them. verl imports it by itself, as the plugin ``rewardops`` of its entry point
group ``verl.plugins``, so ``algorithm.adv_estimator=rewardops_grpo`` is the only setting. Its ``validate_config``,
the first thing that a training calls, then runs :func:`check_config` too. Written against verl 0.9.1.

verl passes an estimator token rewards, the mask, the uid of every row and the config. Estimators that need other
entries (``responses``, ``entropy``, ``values``, ``steps``) read those of :func:`provide`, which
:func:`compute_advantage` and :class:`AdvantageInputs` fill from the trainer's batch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils import config as verl_config
from verl.utils import torch_functional

import rewardops
from rewardops import advantages

from ..core import checks
from ..core.dispatch import use_backend
from .replacing import replace

__all__ = [
    "AdvantageInputs", "check_config", "compute_advantage", "entropy_from_logits",
    "entropy_from_logits_with_chunking", "kl_penalty", "logprobs_from_logits", "patch", "provide",
]  # fmt: skip

# ---- what an estimator reads -------------------------------------------------------------------------------

_provided: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("rewardops.integrations.verl", default=())


@contextmanager
def provide(*sources: Any, **entries: Any) -> Iterator[None]:
    """Provide entries to estimators called inside the context, in addition to the arguments that verl passes.

    Args:
        sources: mappings, anything with ``keys()`` and ``[]``: a dictionary, ``data.batch``,
            ``data.non_tensor_batch``.
        entries: single entries, which take precedence over the sources: ``responses=``, ``entropy=``, ``steps=``,
            ...
    """
    token = _provided.set((entries, *sources, *_provided.get()))
    try:
        yield
    finally:
        _provided.reset(token)


def _setting(config: Any, name: str) -> Any:
    """A setting of any config that verl accepts, by ``get`` or as an attribute; None where it has none."""
    get = getattr(config, "get", None)
    return get(name, None) if callable(get) else getattr(config, name, None)


def _as_mapping(options: Any) -> Mapping[str, Any]:
    if hasattr(options, "keys"):
        return {name: options[name] for name in options.keys()}  # noqa: SIM118 (any config)
    if not hasattr(options, "__dict__"):
        raise TypeError(f"algorithm.rewardops: got {type(options).__name__}, want options by name")
    return asdict(options) if is_dataclass(options) and not isinstance(options, type) else vars(options)


def _is_list(names: Any) -> bool:
    return hasattr(names, "__iter__") and not isinstance(names, str)


def _check_tokens(rewards: Tensor, mask: Tensor) -> None:
    checks.check_float("token_level_rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"token_level_rewards: got shape {checks.show(rewards.shape)}, want [B, T]")
    if checks.check_tensor("response_mask", mask).shape != rewards.shape:
        raise ValueError(
            f"response_mask: got shape {checks.show(mask.shape)}, want {checks.show(rewards.shape)}, as"
            " token_level_rewards"
        )


def _on_valid_tokens(rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards ``[B, T]`` in which every reward lies on a valid token; 0 elsewhere, and in rows without one.

    A reward on a masked token is added to that of the last valid token before it, or, where the row has none
    before it, of its first valid token.
    """
    valid = mask != 0
    # Sums from each token to the next valid one, which the token before it does not see.
    masked_next = torch.nn.functional.pad(~valid[:, 1:], (0, 1)) if valid.shape[1] else ~valid
    sums = rewardops.discounted_returns(rewards, gamma=masked_next.to(torch.float64))
    first = valid & (valid.cumsum(1) == 1)
    before = torch.where(first & ~valid[:, :1], sums[:, :1], 0)
    return torch.where(valid, sums + before, 0)


@dataclass(frozen=True)
class _Call:
    """The arguments that verl passes to an estimator, and the provided entries.

    ``token_rewards`` has every reward on a valid token (:func:`_on_valid_tokens`).
    """

    estimator: str
    token_rewards: Tensor
    mask: Tensor
    index: Any
    config: Any
    sources: tuple[Mapping[str, Any], ...]

    @property
    def groups(self) -> Any:
        if self.index is None:
            raise ValueError(f"index: got None for {self.estimator}, want the uid of every row")
        self.check_rows("index", self.index, "uids")
        return self.index

    def check_rows(self, name: str, values: Any, what: str = "values") -> None:
        if len(values) != len(self.mask):
            raise ValueError(f"{name}: got {len(values)} {what}, want {len(self.mask)} (one per row)")

    def scores(self) -> Tensor:
        """Row rewards ``[B]``: verl's sums over all positions, 0 for a row without a valid token."""
        return self.token_rewards.sum(-1)

    def row_numbers(self, name: str) -> Tensor:
        """The entry of that name, one number per row; an array or a list becomes float32, None in it NaN."""
        entry = self.entry(name)
        self.check_rows(name, entry)
        if isinstance(entry, Tensor):
            return entry
        return torch.as_tensor(np.asarray(entry, dtype=np.float32), device=self.mask.device)

    def entry(self, *names: str, required: bool = True) -> Any:
        """The first of these names that is provided."""
        for source in self.sources:
            for name in names:
                if name in source.keys() and source[name] is not None:  # noqa: SIM118 (a TensorDict)
                    return source[name]
        if not required:
            return None
        wanted = " or ".join(repr(name) for name in names)
        raise ValueError(
            f"{names[0]}: got nothing for {self.estimator}, want {wanted}. verl passes it to no estimator: compute"
            " advantages through rewardops.integrations.verl.compute_advantage, a trainer with AdvantageInputs, or"
            f" inside provide({names[0]}=...)"
        )

    def setting(self, name: str, default: Any) -> Any:
        value = _setting(self.config, name)
        return default if value is None else value

    def options(self, accepted: tuple[str, ...]) -> dict[str, Any]:
        """The options in ``algorithm.rewardops``; an unknown option is an error."""
        options = _as_mapping(self.setting("rewardops", {}))
        for name in options:
            if name not in accepted:
                raise ValueError(
                    f"algorithm.rewardops.{name}: {self.estimator} has no such option, want one of {list(accepted)}"
                )
        return dict(options)

    def scale(self) -> dict[str, Any]:
        return {"scale": "std" if self.setting("norm_adv_by_std_in_grpo", True) else "none"}

    def of_groups(self, preset: Callable[..., Tensor], **options: Any) -> Tensor:
        """A preset of :mod:`rewardops.advantages` on tokens; a row without a valid token is in no group."""
        return preset(self.scores(), self.groups, mask=self.mask, **options)


# ---- advantage estimators ----------------------------------------------------------------------------------

_Computed = Tensor | tuple[Tensor, Tensor]
_Estimator = Callable[..., tuple[Tensor, Tensor]]


def _high_entropy(call: _Call, advantages: Tensor, fraction: float) -> Tensor:
    """Zero the advantages outside the tokens of highest entropy.

    A policy loss without KL is then 0 there, while its denominator still counts all valid tokens.
    """
    chosen = rewardops.high_entropy_mask(call.entry("entropy", "entropys"), call.mask, fraction=fraction)
    return torch.where(chosen, advantages, 0)


def _estimator(name: str, *accepted: str) -> Callable[[Callable[..., _Computed]], _Estimator]:
    """Register an estimator with verl, with the options it accepts in ``algorithm.rewardops``."""
    accepted = (*accepted, "high_entropy_fraction")

    def register(compute: Callable[..., _Computed]) -> _Estimator:
        @functools.wraps(compute)
        def estimator(
            token_level_rewards: Tensor,
            response_mask: Tensor,
            index: Any = None,
            config: Any = None,
            batch: Any = None,
            non_tensor_batch: Any = None,
            **extras: Any,
        ) -> tuple[Tensor, Tensor]:
            passed = [source for source in (batch, non_tensor_batch) if source is not None]
            sources = (extras, *passed, *_provided.get())
            _check_tokens(token_level_rewards, response_mask)
            with torch.no_grad():
                rewards = _on_valid_tokens(token_level_rewards, response_mask)
                call = _Call(name, rewards, response_mask, index, config, sources)
                options = call.options(accepted)
                fraction = options.pop("high_entropy_fraction", None)
                result = compute(call, **options)
                out, returns = result if isinstance(result, tuple) else (result, result)
                if fraction is not None:
                    out = _high_entropy(call, out, fraction)
            return out, returns

        # verl rejects a second function of one name. After a reload of this module the new one replaces the old
        # one.
        known = core_algos.ADV_ESTIMATOR_REGISTRY
        if getattr(known.get(name), "__module__", None) == __name__:
            del known[name]
        core_algos.register_adv_est(name)(estimator)
        return estimator

    return register


_GROUP = ("eps", "ddof", "singleton")
_TREE = ("masked",)


@_estimator("rewardops_grpo", "baseline", "scale", *_GROUP)
def _grpo(call: _Call, **options: Any) -> Tensor:
    settings = {"singleton": "raw", **call.scale(), **options}
    return call.of_groups(advantages.grpo, **settings)


@_estimator("rewardops_dr_grpo", "singleton")
def _dr_grpo(call: _Call, *, singleton: str = "raw") -> Tensor:
    return _less_mean(call, singleton)


def _less_mean(call: _Call, singleton: str) -> Tensor:
    return call.of_groups(advantages.dr_grpo, singleton=singleton)


@_estimator("rewardops_rloo", "singleton")
def _rloo(call: _Call, *, singleton: str = "raw") -> Tensor:
    return call.of_groups(advantages.rloo, singleton=singleton)


@_estimator("rewardops_opo", "singleton")
def _opo(call: _Call, *, singleton: str = "raw") -> Tensor:
    return call.of_groups(advantages.opo, singleton=singleton)


@_estimator("rewardops_grpo_passk", "scale", *_GROUP)
def _grpo_passk(call: _Call, **options: Any) -> Tensor:
    return call.of_groups(advantages.pass_at_k, **{**call.scale(), **options})


@_estimator("rewardops_gpg", "alpha", "singleton")
def _gpg(call: _Call, *, alpha: str = "rewards", singleton: str = "raw") -> Tensor:
    return call.of_groups(advantages.gpg, alpha=alpha, singleton=singleton)


@_estimator("rewardops_gdpo", *_GROUP)
def _gdpo(call: _Call, **options: Any) -> Tensor:
    """GDPO of the entries in ``algorithm.gdpo_reward_keys``, weighted by ``gdpo_reward_weights``."""
    keys = call.setting("gdpo_reward_keys", None)
    if not keys or not _is_list(keys):
        got = repr(keys) if keys else "none"
        raise ValueError(f"algorithm.gdpo_reward_keys: got {got}, want the names of the rewards")
    rewards = torch.stack([call.row_numbers(key) for key in keys], 1)
    weights = call.setting("gdpo_reward_weights", None)
    weights = [1.0] * len(keys) if weights is None else list(weights)
    if len(weights) != len(keys):
        raise ValueError(
            f"algorithm.gdpo_reward_weights: got {len(weights)}, want {len(keys)} (one per gdpo_reward_keys)"
        )
    settings = {"singleton": "raw", **call.scale(), **options}
    return advantages.gdpo(
        rewards, call.groups, weights=weights, whitening="tokens", mask=call.mask, **settings
    )


@_estimator("rewardops_reinforce_plus_plus")
def _reinforce_plus_plus(call: _Call) -> tuple[Tensor, Tensor]:
    gamma = call.setting("gamma", 1.0)
    returns = rewardops.discounted_returns(call.token_rewards, gamma=gamma, mask=call.mask)
    return rewardops.whiten(returns, call.mask), returns


@_estimator("rewardops_reinforce_plus_plus_baseline", "singleton")
def _reinforce_plus_plus_baseline(call: _Call, *, singleton: str = "raw") -> Tensor:
    return rewardops.whiten(_less_mean(call, singleton), call.mask)


@_estimator("rewardops_remax")
def _remax(call: _Call) -> tuple[Tensor, Tensor]:
    """ReMax with ``reward_baselines``, of greedy responses, which verl samples only for its own ``remax``."""
    baselines = call.row_numbers("reward_baselines")
    return (
        advantages.remax(call.token_rewards, baselines, mask=call.mask),
        rewardops.discounted_returns(call.token_rewards, mask=call.mask),
    )


@_estimator("rewardops_gae")
def _gae(call: _Call) -> tuple[Tensor, Tensor]:
    """GAE; needs ``critic.enable=True``: by default verl has a critic only for its own ``gae``."""
    gamma, lam = call.setting("gamma", 1.0), call.setting("lam", 1.0)
    estimate = rewardops.gae(call.token_rewards, call.entry("values"), gamma=gamma, lam=lam, mask=call.mask)
    return rewardops.whiten(estimate.advantages, call.mask), estimate.returns


@_estimator("rewardops_tempo", "td_scale", "scale", "eps", "ddof", *_TREE)
def _tempo(call: _Call, **options: Any) -> Tensor:
    tokens, settings = call.entry("responses"), {**call.scale(), **options}
    return rewardops.tempo_advantages(tokens, call.scores(), call.groups, mask=call.mask, **settings)


@_estimator("rewardops_tree_rl", "form", *_TREE)
def _tree_rl(call: _Call, **options: Any) -> Tensor:
    tokens = call.entry("responses")
    return rewardops.tree_rl_advantages(tokens, call.scores(), call.groups, mask=call.mask, **options)


@_estimator("rewardops_tree_siblings", "scale", "eps", "ddof", *_TREE)
def _tree_siblings(call: _Call, **options: Any) -> Tensor:
    tokens, settings = call.entry("responses"), {**call.scale(), **options}
    return rewardops.sibling_advantages(tokens, call.scores(), call.groups, mask=call.mask, **settings)


@_estimator("rewardops_gtpo", "alpha1", "alpha2", "positive", "entropy_floor", "eps", "joint")
def _gtpo(call: _Call, **options: Any) -> Tensor:
    entropy = call.entry("entropy", "entropys")
    return advantages.gtpo(call.scores(), entropy, call.groups, mask=call.mask, **options)


@_estimator("rewardops_grpo_s", "beta1", "beta2", "positive", "entropy_floor", "eps")
def _grpo_s(call: _Call, **options: Any) -> Tensor:
    entropy = call.entry("entropy", "entropys")
    return advantages.grpo_s(call.scores(), entropy, call.groups, mask=call.mask, **options)


@_estimator("rewardops_pure", "temperature", "baseline", "outcome_weight", "separators")
def _pure(call: _Call, **options: Any) -> Tensor:
    """PURE: ``token_level_rewards`` are process rewards, read at step ends; ``outcome`` is the verifier's."""
    steps, outcome = call.entry("steps"), call.entry("outcome", required=False)
    outcome = None if outcome is None else call.row_numbers("outcome")
    if isinstance(steps, Tensor) and steps.dtype is torch.bool and steps.shape == call.mask.shape:
        # A step that ends on a masked token ends where its reward counts.
        steps = _on_valid_tokens(steps.float(), call.mask) > 0
    gamma = call.setting("gamma", 1.0)
    where = {"outcome": outcome, "gamma": gamma, "mask": call.mask}
    return advantages.pure(call.token_rewards, steps, call.groups, **where, **options)


# ---- where the entries come from ---------------------------------------------------------------------------


def compute_advantage(data: Any, *args: Any, **kwargs: Any) -> Any:
    """verl's ``compute_advantage``, with all of ``data`` provided to the estimators."""
    from verl.trainer.ppo import ray_trainer

    verls = _originals.get("compute_advantage", ray_trainer.compute_advantage)
    with provide(data.batch, data.non_tensor_batch):
        return verls(data, *args, **kwargs)


class AdvantageInputs:
    """Mixin for trainers of ``verl.trainer.ppo.v1``, before the base class: provides queue fields to estimators.

    The trainer's batch has neither token ids nor entropies. With ``trainer.v1.trainer_mode=rewardops``::

        @register_trainer("rewardops")
        class Trainer(AdvantageInputs, PPOTrainerSync):
            pass
    """

    advantage_fields: tuple[str, ...] = ("responses", "entropy", "values")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config", args[0] if args else None)
        fields = list(self.advantage_fields)
        # verl passes reward baselines itself, and has had two names for entropies.
        passed = {*fields, "reward_baselines", *(("entropy",) if "entropys" in fields else ())}
        if missing := sorted(check_config(config) - passed):
            name = _inside(config, "algorithm", "adv_estimator")
            raise ValueError(f"advantage_fields: got {fields}, want {missing} too, which {name} reads")
        super().__init__(*args, **kwargs)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        queue = importlib.import_module("transfer_queue")
        fields = list(self.advantage_fields)
        entries = queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        with provide(entries.to_padded_tensor()):
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]


# ---- policy losses -----------------------------------------------------------------------------------------


def _check_config(config: Any, loss: str) -> None:
    if config is None or getattr(config, "policy_loss", None) is None:
        got = "None" if config is None else "one without policy_loss"
        raise ValueError(f"config: got {got} for {loss}, want the actor's")


def _coefficient(config: Any, name: str, default: float) -> float:
    value = _setting(config.policy_loss, name)
    return default if value is None else value


def _aggregated(losses: Tensor, mask: Tensor, mode: str, config: Any, weights: Tensor | None) -> Tensor:
    if weights is not None:
        losses = losses * weights
    return core_algos.agg_loss(
        loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **config.global_batch_info
    )


def _clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's ``clip_cov`` with :func:`rewardops.clip_cov_mask`: no loss at a few randomly drawn tokens.

    The number of tokens and the candidates are those of verl; the random draw differs.
    """
    _check_config(config, "rewardops_clip_cov")
    low = 1 - (config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low)
    high = 1 + (config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high)
    band = _coefficient(config, "clip_cov_lb", 1.0), _coefficient(config, "clip_cov_ub", 5.0)
    difference = log_prob - old_log_prob
    ratio = difference.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    cov = rewardops.advantage_logprob_cov(advantages, log_prob, response_mask)
    # Tokens that PPO clips are never drawn, but count in the total that the fraction refers to.
    cov = torch.where(clipped > plain, band[0], cov)
    drawn = rewardops.clip_cov_mask(
        cov,
        response_mask,
        low=band[0],
        high=band[1],
        fraction=_coefficient(config, "clip_cov_ratio", 2e-4),
    )
    losses = torch.where(drawn, 0, torch.maximum(plain, clipped))
    loss = _aggregated(losses, response_mask, loss_agg_mode, config, rollout_is_weights)
    mean = torch_functional.masked_mean
    return loss, {
        "actor/pg_clipfrac": mean(drawn.float(), response_mask).item(),
        "actor/ppo_kl": mean(-difference.detach(), response_mask).item(),
    }


def _kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's ``kl_cov`` with :func:`rewardops.kl_cov_mask`: a KL term at the tokens of largest covariance."""
    _check_config(config, "rewardops_kl_cov")
    difference = log_prob - old_log_prob
    apart = difference.abs()
    chosen = rewardops.kl_cov_mask(
        rewardops.advantage_logprob_cov(advantages, log_prob, response_mask),
        response_mask,
        fraction=_coefficient(config, "kl_cov_ratio", 2e-4),
    )
    penalty = _coefficient(config, "ppo_kl_coef", 1.0) * torch.where(chosen, apart, 0)
    losses = penalty - advantages * difference.exp()
    loss = _aggregated(losses, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, {"actor/ppo_kl": torch_functional.masked_mean(apart.detach(), response_mask).item()}


core_algos.register_policy_loss("rewardops_clip_cov")(_clip_cov)
core_algos.register_policy_loss("rewardops_kl_cov")(_kl_cov)


# ---- checks before a training ------------------------------------------------------------------------------

_STOCK_TRAINERS = ("sync", "colocate_async", "separate_async")


class _Noted(dict[str, Any]):
    """Entries for an estimator, and the names of those that it has read."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def check_config(config: Any) -> set[str]:
    """Check the settings of an estimator or a policy loss of this module, before anything is generated.

    The estimator is called once, with the config and a few made-up rows, so its options are checked by what reads
    them. verl's ``validate_config`` and the constructor of :class:`AdvantageInputs` call this function.

    Args:
        config: verl's config, with ``algorithm``; ``critic``, ``actor_rollout_ref`` and ``trainer`` are read where
            it has them.

    Returns:
        The entries that the estimator reads and verl does not pass, such as ``responses``; empty for estimators
        that are not of this module.

    Raises:
        ValueError: an estimator or loss ``rewardops_...`` that does not exist, an option that it does not have or
            a value that it does not take, ``rewardops_gae`` without ``critic.enable``, one response per prompt
            where that makes every advantage 0.
        TypeError: an option of another type.
    """
    _check_policy_loss(_inside(config, "actor_rollout_ref", "actor", "policy_loss"))
    algorithm = _inside(config, "algorithm")
    name = _setting(algorithm, "adv_estimator")
    if not isinstance(name, str) or not name.startswith("rewardops_"):
        return set()
    known = [known for known in core_algos.ADV_ESTIMATOR_REGISTRY if known.startswith("rewardops_")]
    checks.check_choice("algorithm.adv_estimator", name, known)
    critic = _inside(config, "critic")
    if name == "rewardops_gae" and critic is not None and not _setting(critic, "enable"):
        raise ValueError(f"critic.enable: got {_setting(critic, 'enable')}, want True with {name}")
    rollouts = _setting(_inside(config, "actor_rollout_ref", "rollout"), "n") or 2
    advantages, read = _tried(name, algorithm, rollouts)
    if rollouts == 1 and not advantages.any():
        raise ValueError(
            f"actor_rollout_ref.rollout.n: got 1, with which every advantage of {name} is 0, want 2 or more"
        )
    return read


def _inside(config: Any, *names: str) -> Any:
    """A part of a config; None where it has no such part."""
    for name in names:
        config = None if config is None else _setting(config, name)
    return config


def _tried(name: str, algorithm: Any, rollouts: int) -> tuple[Tensor, set[str]]:
    """Advantages of an estimator for two made-up groups of ``rollouts`` rows, and the entries that it has read."""
    rows, tokens = 2 * rollouts, 3
    numbers = torch.arange(rows * tokens, dtype=torch.float32, device="cpu").reshape(rows, tokens) / rows
    keys = _setting(algorithm, "gdpo_reward_keys")
    entries = _Noted({
        **dict.fromkeys(keys if _is_list(keys) else (), numbers[:, 0]),
        "responses": numbers.long(), "entropy": numbers, "values": numbers, "reward_baselines": numbers[:, 0],
        "steps": numbers >= 0,
    })  # fmt: skip
    uids = np.repeat(np.array(["a", "b"], dtype=object), rollouts)
    estimator = core_algos.get_adv_estimator_fn(name)
    try:
        with use_backend("reference"):
            advantages, _ = estimator(numbers, numbers >= 0, index=uids, config=algorithm, batch=entries)
    except (TypeError, ValueError) as error:
        argument, *fault = str(error).partition(":")
        raise type(error)("".join([_setting_of(argument, algorithm), *fault])) from None
    return advantages, entries.read


def _setting_of(argument: str, algorithm: Any) -> str:
    """The setting that an estimator passes to the argument of an op."""
    settings = {"gamma": "gamma", "lam": "lam", "weights": "gdpo_reward_weights"}
    options = _setting(algorithm, "rewardops")
    names = {} if options is None else {name: f"rewardops.{name}" for name in _as_mapping(options)}
    names["fraction"] = "rewardops.high_entropy_fraction"
    setting = {**settings, **names}.get(argument)
    return argument if setting is None else f"algorithm.{setting}"


_LIMITS = {
    "rewardops_clip_cov": {
        "clip_cov_lb": checks.check_number,
        "clip_cov_ub": checks.check_number,
        "clip_cov_ratio": checks.check_fraction,
    },
    "rewardops_kl_cov": {"kl_cov_ratio": checks.check_fraction, "ppo_kl_coef": checks.check_finite},
}


def _check_policy_loss(policy_loss: Any) -> None:
    where, loss = "actor_rollout_ref.actor.policy_loss", _inside(policy_loss, "loss_mode")
    if isinstance(loss, str) and loss.startswith("rewardops_"):
        checks.check_choice(f"{where}.loss_mode", loss, tuple(_LIMITS))
        for name, check in _LIMITS[loss].items():
            value = _setting(policy_loss, name)
            if value is not None:
                check(f"{where}.{name}", value)


def _check_trainer(config: Any, read: set[str]) -> None:
    """Refuse verl's own v1 trainers for an estimator that reads entries which they do not fetch."""
    trainer = _inside(config, "trainer")
    mode = _inside(trainer, "v1", "trainer_mode")
    missing = sorted(read - {"values", "reward_baselines"})
    if missing and _setting(trainer, "use_v1") and mode in _STOCK_TRAINERS:
        raise ValueError(
            f"trainer.v1.trainer_mode: got {mode!r}, whose trainer does not fetch {missing}, want one with"
            f" rewardops.integrations.verl.AdvantageInputs, for {config.algorithm.adv_estimator}"
        )


def _validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
    """verl's ``validate_config``, after :func:`check_config`."""
    _check_trainer(config, check_config(config))
    _verls_validate_config(config, *args, **kwargs)


# After a reload of this module, the function that the earlier one has replaced.
_verls_validate_config = getattr(verl_config.validate_config, "verls", verl_config.validate_config)
_validate_config.verls = _verls_validate_config  # type: ignore[attr-defined]
replace("verl", {"validate_config": (verl_config.validate_config, _validate_config)})


# ---- drop-ins for verl's functions -------------------------------------------------------------------------

_KL = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl's ``kl_penalty`` by :func:`rewardops.token_kl`: the same names, ``+`` for the gradient of k2.

    Args:
        logprob, ref_logprob: the same shape; float32, bfloat16, float16 or float64.
        kl_penalty: ``kl``, ``k1``, ``abs``, ``mse``, ``k2``, ``low_var_kl`` or ``k3``, which clamp as verl does.

    Returns:
        The shape of ``logprob``; float32 (float64 where an input is). Differentiable in both. Where verl's
        difference of two infinities is NaN, the estimate stands, without gradient.

    Raises:
        ValueError: another name; a shape that does not match.
    """
    name, plus = kl_penalty.removesuffix("+"), kl_penalty.endswith("+")
    if name not in _KL:
        raise ValueError(f"kl_penalty: got {kl_penalty!r}, want one of {list(_KL)}, or one of them and '+'")
    estimator = _KL[name]
    clamp = (20.0, 10.0) if estimator == "k3" else None
    if not plus or estimator == "k2":
        return rewardops.token_kl(logprob, ref_logprob, estimator=estimator, clamp=clamp)
    value = rewardops.token_kl(logprob.detach(), ref_logprob.detach(), estimator=estimator, clamp=clamp)
    # Not "k3_plus", whose gradient is 0 beyond the clamps: verl clamps the value of k3, never the gradient of k2.
    through = rewardops.token_kl(logprob, ref_logprob, estimator="k2")
    return torch.where(through.isinf(), value, through - through.detach() + value)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's ``logprobs_from_logits`` by :func:`rewardops.token_stats`.

    Args:
        logits: ``[..., V]``. labels: ``[...]``; -100 has log-probability 0 and no gradient.
        inplace_backward: write the gradient over the logits, as verl does where flash-attn is installed.

    Returns:
        ``[...]``, float32 (float64 for float64).

    Raises:
        ValueError: labels that are not one per row of logits.
    """
    shape = checks.check_tensor("labels", labels).shape
    checks.check_shape(
        "labels", labels, checks.check_tensor("logits", logits).shape[:-1], "one per distribution"
    )
    stats = rewardops.token_stats(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        outputs=("logprob",),
        inplace_backward=inplace_backward,
    )
    assert stats.logprob is not None
    return stats.logprob.reshape(shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl's ``entropy_from_logits`` by :func:`rewardops.token_stats`: ``[..., V]`` to ``[...]``, float32."""
    flat = logits.reshape(-1, logits.shape[-1])
    unused = torch.zeros(flat.shape[:1], dtype=torch.int64, device=flat.device)
    stats = rewardops.token_stats(flat, unused, outputs=("entropy",))
    assert stats.entropy is not None
    return stats.entropy.reshape(logits.shape[:-1])


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """:func:`entropy_from_logits`, which needs no chunks: it makes no copy of the logits."""
    return entropy_from_logits(logits)


_DROP_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    "logprobs_from_logits": ("verl.utils.torch_functional", logprobs_from_logits),
    "entropy_from_logits": ("verl.utils.torch_functional", entropy_from_logits),
    "entropy_from_logits_with_chunking": (
        "verl.utils.torch_functional",
        entropy_from_logits_with_chunking,
    ),
    "kl_penalty": ("verl.trainer.ppo.core_algos", kl_penalty),
    "compute_advantage": ("verl.trainer.ppo.ray_trainer", compute_advantage),
}


_originals: dict[str, Callable[..., Any]] = {}


def patch(*names: str) -> Callable[[], None]:
    """Replace verl's functions by these drop-ins, in every module that has imported or will import them.

    Call it before the workers build their engines: functions compiled or bound by then remain verl's.

    Args:
        names: some of ``logprobs_from_logits``, ``entropy_from_logits``, ``entropy_from_logits_with_chunking``,
            ``kl_penalty`` (the default) and ``compute_advantage`` (of the legacy trainer).

    Returns:
        A function that undoes it.
    """
    chosen = names or tuple(name for name in _DROP_INS if name != "compute_advantage")
    for name in chosen:
        if name not in _DROP_INS:
            raise ValueError(f"names: got {name!r}, want some of {list(_DROP_INS)}")
    functions = {}
    for name in chosen:
        home, ours = _DROP_INS[name]
        theirs = getattr(importlib.import_module(home), name)
        if theirs is not ours:
            _originals[name] = theirs
            functions[name] = (theirs, ours)
    return replace("verl", functions)
