"""What kernels are held to: error budgets against float64, and generators of awkward inputs.

For this package's tests, and for users with kernels of their own.
"""

from .budgets import assert_within_budget
from .checks import Outcome, check_op, evaluate
from .inputs import pack, random_groups, random_mask, shared_prefix_tokens, unpack

__all__ = [
    "Outcome",
    "assert_within_budget",
    "check_op",
    "evaluate",
    "pack",
    "random_groups",
    "random_mask",
    "shared_prefix_tokens",
    "unpack",
]
