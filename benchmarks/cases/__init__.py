"""A module for each family of ops: every op of the package, and its formula as people write it without."""

import importlib

FAMILIES = (
    "logits",
    "linear",
    "kl",
    "advantages",
    "entropy",
    "selection",
    "returns",
    "segments",
    "shaping",
    "prefix_tree",
    "tree",
)

for family in FAMILIES:  # in this order they are run, and reported
    importlib.import_module(f"{__name__}.{family}")
