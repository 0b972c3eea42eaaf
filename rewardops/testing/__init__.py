"""Testing kit for kernels: error budgets against float64, and generators of awkward inputs.

Used by this package's tests, and by users for their kernels: see ``docs/testing.md``. Hypothesis strategies of
the same inputs are in :mod:`rewardops.testing.strategies`.
"""

from .budgets import Error, assert_within_budget, measure_error
from .checks import Comparison, Outcome, Report, check_backend, check_op, compare, evaluate, same_bits
from .inputs import (
    LOGITS,
    adversarial_logits,
    far_rows,
    logit_cases,
    pack,
    random_groups,
    random_mask,
    reward_cases,
    shared_prefix_tokens,
    unpack,
)

__all__ = [
    "LOGITS",
    "Comparison",
    "Error",
    "Outcome",
    "Report",
    "adversarial_logits",
    "assert_within_budget",
    "check_backend",
    "check_op",
    "compare",
    "evaluate",
    "far_rows",
    "logit_cases",
    "measure_error",
    "pack",
    "random_groups",
    "random_mask",
    "reward_cases",
    "same_bits",
    "shared_prefix_tokens",
    "unpack",
]
