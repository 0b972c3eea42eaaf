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

# Rows up to which each looks at the labels of all, in one kernel: a sort takes a dozen.
COUNTED = 8192


def _by_label(groups: Tensor) -> tuple[Tensor, ...]:
    """As ``by_group``."""
    if len(groups) > COUNTED:
        return by_group(groups)
    found = groups.new_empty(3, len(groups))
    CUDA.module().rows_by_label(address(groups), len(groups), address(found), *CUDA.execution(groups))
    return found.unbind()


def _for_tree(groups: Tensor, ids: Tensor, skip: bool) -> Sequence[Tensor | None]:
    return *_by_label(groups), groups.new_empty(groups.shape), _moved(ids, skip)[0]


def _moved(tokens: Tensor, skip: bool) -> Sequence[Tensor | None]:
    """Room for the valid tokens of each row in front of it."""
    return (tokens.new_empty(tokens.shape) if skip else None,)


prefix_tree = partial(cpp.prefix_tree, via=CUDA, memory=_for_tree)
prefix_lcp = partial(cpp.prefix_lcp, via=CUDA, memory=_by_label)
nodes_to_tokens = partial(cpp.nodes_to_tokens, via=CUDA, memory=_moved)
nodes_to_tokens_backward = partial(cpp.nodes_to_tokens_backward, via=CUDA, memory=_moved)
