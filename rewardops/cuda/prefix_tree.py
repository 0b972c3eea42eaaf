"""Prefix trees by CUDA C++ kernels; sums over subtrees are Triton's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..cpp import prefix_tree as cpp
from ..cpp.memory import address
from ..reference.prefix_tree import by_group
from .memory import CUDA

__all__ = ["nodes_to_tokens", "nodes_to_tokens_backward", "prefix_lcp", "prefix_tree"]

# Up to this many rows one kernel compares all pairs of labels: a sort takes a dozen kernels.
COUNTED = 8192


def _by_label(groups: Tensor) -> tuple[Tensor, ...]:
    """The result of ``by_group``, from one kernel where there are few rows."""
    if len(groups) > COUNTED:
        return by_group(groups)
    out = groups.new_empty(3, len(groups))
    CUDA.module().rows_by_label(address(groups), len(groups), address(out), *CUDA.execution(groups))
    return out.unbind()


def _for_tree(groups: Tensor, ids: Tensor, skip: bool) -> Sequence[Tensor | None]:
    return *_by_label(groups), groups.new_empty(groups.shape), _moved(ids, skip)[0]


def _moved(tokens: Tensor, skip: bool) -> Sequence[Tensor | None]:
    """Scratch memory for the tokens of each row with the valid ones moved to the front."""
    return (tokens.new_empty(tokens.shape) if skip else None,)


prefix_tree = partial(cpp.prefix_tree, launcher=CUDA, scratch=_for_tree)
prefix_lcp = partial(cpp.prefix_lcp, launcher=CUDA, scratch=_by_label)
nodes_to_tokens = partial(cpp.nodes_to_tokens, launcher=CUDA, scratch=_moved)
nodes_to_tokens_backward = partial(cpp.nodes_to_tokens_backward, launcher=CUDA, scratch=_moved)
