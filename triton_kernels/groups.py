"""Members of a group, by an equality join: every row whose label equals the group's, among the labels of all rows.

A batch has thousands of rows and a label is eight bytes, so each program reads all labels, from the cache after the
first program. There is no sort, no hash table and no atomic operation, and the host need not know the groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED, Constant

LABELS = 64 if INTERPRETED else 1024  # labels read at once
LOOK = Constant(16)  # tokens of a mask read at once: one read finds a valid token in nearly every row


class GroupRows(NamedTuple):
    """The label of a group, and the pointers and sizes by which its members are read."""

    label: Any  # label of the group
    rewards: Any  # pointer, [B]
    labels: Any  # pointer, [B]
    batch: Any  # B, the number of rows
    mask: Any  # pointer to bytes, [tokens]
    mask_stride: Any  # stride between padded rows; 0 for packed ones
    cu: Any  # pointer to the offsets of packed rows, [B + 1]
    width: Any  # tokens of a padded row
    total: Any  # tokens of all rows


@triton.jit
def next_member(groups, label, after, batch, BLOCK: tl.constexpr):
    """The first row after row ``after`` with that label; ``batch`` where there is none."""
    start = (after + 1) // BLOCK * BLOCK
    member = start * 0 + batch
    while (start < batch) & (member == batch):
        rows = start + tl.arange(0, BLOCK)
        labels = tl.load(groups + rows, mask=rows < batch, other=0)
        hit = (rows < batch) & (rows > after) & (labels == label)
        member = tl.min(tl.where(hit, rows, batch), 0)
        start += BLOCK
    return member


@triton.jit
def with_valid_token(
    rows, chosen, group, TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """Select the chosen rows that have a valid token. Masks of other rows are not read."""
    selected = chosen
    if TOKENS:
        if PACKED:
            begin = tl.load(group.cu + rows, mask=chosen, other=0).to(tl.int64)
            end = tl.load(group.cu + rows + 1, mask=chosen, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), group.total)
            length = tl.maximum(tl.minimum(end, group.total) - begin, 0)
        else:
            begin = rows.to(tl.int64) * group.mask_stride
            length = tl.where(chosen, group.width, 0).to(tl.int64)
        selected = chosen & (length > 0)
        if HAS_MASK:
            pending = selected
            selected = pending & (length < 0)
            start = 0
            while tl.max((pending & (length > start)).to(tl.int32), 0) > 0:
                at = start + tl.arange(0, LOOK)
                inside = pending[:, None] & (at[None, :] < length[:, None])
                valid = tl.load(group.mask + begin[:, None] + at[None, :], mask=inside, other=0)
                any_valid = tl.max(valid.to(tl.int32), 1) > 0
                selected = selected | any_valid
                pending = pending & (any_valid == 0)
                start += LOOK
    return selected


@triton.jit
def members(
    start, group, EVERYONE: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    """The indices of a block of rows, and flags of the members: rows of the group (``EVERYONE``: of the batch) that
    have a valid token."""
    rows = start + tl.arange(0, JOIN)
    chosen = rows < group.batch
    if not EVERYONE:
        chosen = chosen & (tl.load(group.labels + rows, mask=rows < group.batch, other=0) == group.label)
    return rows, with_valid_token(rows, chosen, group, TOKENS, PACKED, HAS_MASK)
