"""Token statistics from hidden states: products by the vendor library, rows of logits by the Triton kernels."""

from __future__ import annotations

from ..core import chunked
from . import logits

(
    linear_token_stats,
    linear_token_stats_backward,
    linear_token_loss,
    linear_token_stats_partial,
    linear_token_stats_partial_backward,
) = chunked.bound(logits)
