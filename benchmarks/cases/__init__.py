"""A module for each family of ops: every op of the package, and its formula as people write it without."""

import importlib

from rewardops.core.families import FAMILIES

from ..registry import axes, dtypes, families, make, names, op

__all__ = ["axes", "dtypes", "families", "make", "names", "op"]

for family in FAMILIES:  # in this order they are run, and reported
    importlib.import_module(f"{__name__}.{family}")
