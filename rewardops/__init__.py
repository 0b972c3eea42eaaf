"""rewardops: fused token-level reward ops for reinforcement learning of language models."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from .advantages import advantages_to_tokens, group_advantages, whiten
from .core.dispatch import BackendUnavailable, show_config, use_backend
from .core.families import FAMILIES as _FAMILIES
from .core.settings import debug
from .entropy import (
    advantage_logprob_cov,
    entropy_bonus,
    entropy_change,
    entropy_reward,
    entropy_weights,
    grpo_s_rewards,
    gtpo_rewards,
    signed_group_normalize,
    steer_metric,
    steer_weights,
    unlikeliness_rewards,
)
from .kl import implicit_rewards, tdpo_terms, token_kl
from .linear import linear_token_loss, linear_token_stats, linear_token_stats_partial
from .logits import TokenStats, merge_token_stats, token_stats, token_stats_and_grad, token_stats_partial
from .prefix_tree import (
    PrefixLcp,
    PrefixValues,
    prefix_lcp,
    prefix_std,
    prefix_values,
    shared_prefix_weights,
    sibling_advantages,
    tempo_advantages,
    tree_rl_advantages,
    tvm_targets,
)
from .returns import max_returns, min_returns, softmin_returns, softmin_rewards
from .segments import (
    place_at_step_end,
    row_mean,
    row_sum,
    running_mean,
    running_sum,
    segment_broadcast,
    segment_reduce,
)
from .selection import clip_cov_mask, high_entropy_mask, kl_cov_mask
from .shaping import (
    budget_advantages,
    budget_returns,
    clip_delta_rewards,
    potential_shaping,
    redistribute_outcome,
    step_progress,
)
from .td import discounted_returns, gae, lambda_returns, vtrace
from .tree import tree_advantages, tree_values
from .viz import DedupStats, PrefixTree

__version__ = "0.1.0"

# Imported when first asked for: they stand above these names, and some bring other packages.
_LAZY = {
    "adapters": "rewardops.integrations.adapters",
    "integrations": "rewardops.integrations",
    "recipes": "rewardops.recipes",
    "testing": "rewardops.testing",
}

if TYPE_CHECKING:
    from . import integrations as integrations
    from . import recipes as recipes
    from . import testing as testing
    from .integrations import adapters as adapters
else:  # a type checker would take any name for a module

    def __getattr__(name):
        if name in _LAZY:
            return _import_module(_LAZY[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *_FAMILIES, *_LAZY, *dunders})


__all__ = [
    "BackendUnavailable",
    "DedupStats",
    "PrefixLcp",
    "PrefixTree",
    "PrefixValues",
    "TokenStats",
    "advantage_logprob_cov",
    "advantages_to_tokens",
    "budget_advantages",
    "budget_returns",
    "clip_cov_mask",
    "clip_delta_rewards",
    "debug",
    "discounted_returns",
    "entropy_bonus",
    "entropy_change",
    "entropy_reward",
    "entropy_weights",
    "gae",
    "group_advantages",
    "grpo_s_rewards",
    "gtpo_rewards",
    "high_entropy_mask",
    "implicit_rewards",
    "kl_cov_mask",
    "lambda_returns",
    "linear_token_loss",
    "linear_token_stats",
    "linear_token_stats_partial",
    "max_returns",
    "merge_token_stats",
    "min_returns",
    "place_at_step_end",
    "potential_shaping",
    "prefix_lcp",
    "prefix_std",
    "prefix_values",
    "redistribute_outcome",
    "row_mean",
    "row_sum",
    "running_mean",
    "running_sum",
    "segment_broadcast",
    "segment_reduce",
    "shared_prefix_weights",
    "show_config",
    "sibling_advantages",
    "signed_group_normalize",
    "softmin_returns",
    "softmin_rewards",
    "steer_metric",
    "steer_weights",
    "step_progress",
    "tdpo_terms",
    "tempo_advantages",
    "token_kl",
    "token_stats",
    "token_stats_and_grad",
    "token_stats_partial",
    "tree_advantages",
    "tree_rl_advantages",
    "tree_values",
    "tvm_targets",
    "unlikeliness_rewards",
    "use_backend",
    "vtrace",
    "whiten",
]
