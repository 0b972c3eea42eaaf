"""The equality join: a group is the rows with the same label, found by reading the labels of all rows.

Rows are thousands and a label is eight bytes, so a program reads them all from the cache; no sort, no hash, no
atomics, and nothing about the groups has to be known on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

LABELS = 64 if INTERPRETED else 1024  # labels read at once


@triton.jit
def next_member(groups, label, after, batch, BLOCK: tl.constexpr):
    """The first row behind ``after`` with that label; ``batch`` where there is none."""
    start = (after + 1) // BLOCK * BLOCK
    found = start * 0 + batch
    while (start < batch) & (found == batch):
        rows = start + tl.arange(0, BLOCK)
        labels = tl.load(groups + rows, mask=rows < batch, other=0)
        hit = (rows < batch) & (rows > after) & (labels == label)
        found = tl.min(tl.where(hit, rows, batch), 0)
        start += BLOCK
    return found
