"""rewardops: fused token-level reward ops for reinforcement learning of language models."""

from .advantages import advantages_to_tokens, group_advantages, whiten
from .dispatch import BackendUnavailable, show_config, use_backend
from .entropy import gtpo_rewards
from .kl import implicit_rewards, sequence_kl, tdpo_terms, token_kl
from .layout import debug
from .linear import linear_token_loss, linear_token_stats
from .logits import TokenStats, merge_token_stats, token_stats, token_stats_partial
from .prefix_tree import PrefixValues, prefix_values, tempo_advantages
from .returns import discounted_returns, min_returns, softmin_rewards

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "PrefixValues",
    "TokenStats",
    "advantages_to_tokens",
    "debug",
    "discounted_returns",
    "group_advantages",
    "gtpo_rewards",
    "implicit_rewards",
    "linear_token_loss",
    "linear_token_stats",
    "merge_token_stats",
    "min_returns",
    "prefix_values",
    "sequence_kl",
    "show_config",
    "softmin_rewards",
    "tdpo_terms",
    "tempo_advantages",
    "token_kl",
    "token_stats",
    "token_stats_partial",
    "use_backend",
    "whiten",
]
