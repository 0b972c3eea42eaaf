"""The families of ops: one name each, the same on every floor of the package."""

from __future__ import annotations

# In the order in which they are listed, tested and reported.
FAMILIES = (
    "logits",
    "linear",
    "kl",
    "advantages",
    "entropy",
    "selection",
    "returns",
    "td",
    "segments",
    "shaping",
    "prefix_tree",
    "tree",
)
