"""Ops of the selection family."""

from __future__ import annotations

import torch

from ..core.dispatch import define
from ..core.records import schema_of
from ..reference.selection import LargestArgs

largest = define(
    "selection",
    f"largest({schema_of(LargestArgs)}) -> Tensor",
    record=LargestArgs,
    fake=lambda args: args.values.new_empty(args.values.shape, dtype=torch.bool),
)
