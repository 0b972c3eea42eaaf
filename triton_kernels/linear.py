"""Token statistics from hidden states: products by the vendor library, rows of logits by the Triton kernels."""

from __future__ import annotations

from functools import partial

from ..core import chunked
from . import logits

linear_token_stats = partial(chunked.linear_token_stats, logits)
linear_token_stats_backward = partial(chunked.linear_token_stats_backward, logits)
linear_token_loss = partial(chunked.linear_token_loss, logits)
linear_token_stats_partial = partial(chunked.linear_token_stats_partial, logits)
linear_token_stats_partial_backward = partial(chunked.linear_token_stats_partial_backward, logits)
