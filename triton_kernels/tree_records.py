"""Records of a prefix tree, on the host and inside kernels, and discounts along its paths.

The arrays are specified in ``reference.prefix_tree``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED, pair

PLACES = 64 if INTERPRETED else 256  # positions read at once


class TreeRows(NamedTuple):
    """The rows of a forest: tensors ``[B]``, or pointers to them."""

    order: Any  # the row at each position
    leaf: Any  # a row's deepest node, -1 for an empty row
    first: Any  # column of a row's first valid token
    length: Any  # tokens of a row, from its first valid one to its last
    shared: Any  # tokens that the row at a position shares with the one before it, -1 at the first of a group


class TreeNodes(NamedTuple):
    """The nodes of a forest: tensors ``[2 B]``, pointers to them, or the fields of one node."""

    begin: Any  # the first position of the rows that share it
    end: Any  # one past the last position of these rows
    depth: Any  # depth of its last state, -1 where there is no node
    parent: Any  # parent node; -1 at a root


@triton.jit
def power(log2_gamma, exponent):
    """``gamma ** exponent``, 1 for an exponent below 0."""
    exponent = tl.maximum(exponent, 0)
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent.to(tl.float64) * log2_gamma))


def log2_pair(gamma: float) -> tuple[float, float]:
    # For gamma = 0 a finite number: exp2 of every multiple of it is 0, and 0 times it is 0.
    return pair(math.log2(gamma) if gamma > 0 else -1e5)
