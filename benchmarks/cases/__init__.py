"""Cases, a module per family: every op of the package, and its formula in plain PyTorch."""

import importlib

from rewardops.core.families import FAMILIES

from ..registry import axes, dtypes, families, make, names, op

__all__ = ["axes", "dtypes", "families", "make", "names", "op"]

for family in FAMILIES:  # the order of runs and reports
    importlib.import_module(f"{__name__}.{family}")
