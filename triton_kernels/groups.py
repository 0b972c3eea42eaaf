"""Members of a group. Rows are sorted by label; then a group is a range of places, and a member is read once.

A few thousand rows find their places by counting the labels below their own, all of them in one launch with what
else is done per row. Beyond, a sort costs less. Rows whose groups are contiguous have their places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Constant, cdiv
from .rows import row_bounds

ROWS = Constant(8 if INTERPRETED else 16)  # rows that one program places
COUNTED = Constant(32 if INTERPRETED else 256)  # labels that it compares them with at once
LOOK = Constant(16 if INTERPRETED else 1024)  # tokens of a mask read at once


class SortedRows(NamedTuple):
    """Rows in the order of their labels; pointers and sizes."""

    rewards: Any  # [B], by row
    labels: Any  # [B], by place
    order: Any  # [B], the row at each place; not read where the places are the rows
    live: Any  # [parts, B] bytes: that part of the row has a valid token; not read where all rows are members
    batch: Any  # B
    parts: Any


class Group(NamedTuple):
    """A group, the places [begin, end) of the sorted rows."""

    sorted: Any
    begin: Any
    end: Any


class Members(NamedTuple):
    """A tile of rows of a group."""

    rows: Any
    inside: Any  # rows of the group
    chosen: Any  # its members: rows with a valid token
    reward: Any  # 0 where not chosen


class RowTokens(NamedTuple):
    """The tokens of rows; pointers and sizes."""

    mask: Any  # bytes
    cu: Any  # offsets of packed rows
    mask_stride: Any  # between padded rows; 0 for packed ones
    width: Any  # of a padded row
    total: Any  # tokens of all rows


@triton.jit
def place_rows(block, labels, order, sorted_labels, batch):
    """Sort: write the labels of a block of rows, and their numbers, to their places in the order of the labels.

    The place of a row, which is returned, is the number of smaller labels, and of equal ones of earlier rows.
    """
    LAST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    rows = block * ROWS + tl.arange(0, ROWS)
    own = tl.load(labels + rows, mask=rows < batch, other=LAST)
    counts = tl.zeros([ROWS, COUNTED], tl.int32)
    at = tl.arange(0, COUNTED)
    here = block * ROWS // COUNTED * COUNTED
    for start in range(0, here, COUNTED):
        other = tl.load(labels + start + at)
        counts += (other[None, :] <= own[:, None]).to(tl.int32)
    other = tl.load(labels + here + at, mask=here + at < batch, other=LAST)
    earlier = (other[None, :] == own[:, None]) & ((here + at)[None, :] < rows[:, None])
    counts += ((other[None, :] < own[:, None]) | earlier).to(tl.int32)
    for start in range(here + COUNTED, batch, COUNTED):
        other = tl.load(labels + start + at, mask=start + at < batch, other=LAST)
        counts += (other[None, :] < own[:, None]).to(tl.int32)
    place = tl.sum(counts, 1)
    tl.store(order + place, rows.to(tl.int64), mask=rows < batch)
    tl.store(sorted_labels + place, own, mask=rows < batch)
    return place


@triton.jit
def have_token(rows, exists, tokens, LOOK: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """Select the rows that have a valid token."""
    begin = rows.to(tl.int64) * tokens.mask_stride
    length = tl.where(exists, tokens.width, 0)
    if PACKED:
        begin, size = row_bounds(tokens.cu, tl.where(exists, rows, 0), tokens.width, tokens.total, PACKED)
        length = tl.where(exists, size, 0).to(tl.int32)
    live = length > 0
    if HAS_MASK:
        pending = live
        live = pending & (length < 0)
        start = 0
        while tl.max((pending & (length > start)).to(tl.int32), 0) > 0:
            at = start + tl.arange(0, LOOK)
            inside = pending[:, None] & (at[None, :] < length[:, None])
            valid = tl.load((tokens.mask + begin)[:, None] + at[None, :], mask=inside, other=0)
            found = tl.max(valid.to(tl.int32), 1) > 0
            live = live | found
            pending = pending & (found == 0)
            start += LOOK
    return live


@triton.jit
def load_members(group, start, ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, TILE: tl.constexpr):
    """The tile of a group that begins at place ``start``."""
    every = group.sorted
    place = start + tl.arange(0, TILE)
    inside = place < group.end
    rows = place
    if ORDERED:
        rows = tl.load(every.order + place, mask=inside, other=0).to(tl.int32)
    chosen = inside
    if HAS_LIVE:
        live = tl.load(every.live + rows, mask=inside, other=0)
        for part in range(1, every.parts):
            live = live | tl.load(every.live + part * every.batch.to(tl.int64) + rows, mask=inside, other=0)
        chosen = inside & (live != 0)
    reward = tl.load(every.rewards + rows, mask=inside, other=0.0)
    return Members(rows, inside, chosen, tl.where(chosen, reward, 0.0))


@triton.jit
def over_members(
    add: tl.constexpr, to, x, held, group,
    ORDERED: tl.constexpr, HAS_LIVE: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``add(to, members, x)`` over all tiles of a group; HELD: it is one tile, ``held``."""
    if HELD:
        to = add(to, held, x)
    else:
        for start in range(group.begin, group.end, TILE):
            to = add(to, load_members(group, start, ORDERED, HAS_LIVE, TILE), x)
    return to


@triton.jit
def end_of_group(
    labels, begin, label, batch, FIRST: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr = 1
):
    """One past the last place of the group of place ``begin``; most groups end within FIRST places.

    With a STEP of -1 one before its first place.
    """
    count = count_same(labels, begin, label, batch, STEP, FIRST)
    end = begin + count * STEP
    more = count == FIRST
    while more:
        count = count_same(labels, end, label, batch, STEP, TILE)
        end += count * STEP
        more = count == TILE
    return end


@triton.jit
def count_same(labels, begin, label, batch, STEP: tl.constexpr, TILE: tl.constexpr):
    """The places of a group among TILE places from ``begin`` on."""
    place = begin + tl.arange(0, TILE) * STEP
    exists = (place >= 0) & (place < batch)
    same = (tl.load(labels + place, mask=exists, other=0) == label) & exists
    return tl.sum(same.to(tl.int32), 0)


@triton.jit
def begins_group(labels, place, label):
    """Whether the group of that label begins at the place."""
    return label != tl.load(labels + place - 1, mask=place > 0, other=~label)


@triton.jit
def group_from(rows, begin, label, FIRST: tl.constexpr, TILE: tl.constexpr):
    """The group that begins at a place of the sorted rows."""
    return Group(rows, begin, end_of_group(rows.labels, begin, label, rows.batch, FIRST, TILE))


@triton.jit
def group_around(rows, place, FIRST: tl.constexpr, TILE: tl.constexpr):
    """The group of a place of the sorted rows."""
    label = tl.load(rows.labels + place)
    before = end_of_group(rows.labels, place, label, rows.batch, FIRST, TILE, -1)
    return Group(rows, before + 1, end_of_group(rows.labels, place, label, rows.batch, FIRST, TILE))


# ---- launch ------------------------------------------------------------------------------------------------

# Rows from which on a sort costs less than placing each among all.
SORTED = 100 if INTERPRETED else 8192


class ByLabel(NamedTuple):
    """Rows in the order of their labels: sorted, or memory that ``place_rows`` fills by so many programs."""

    rows: Tensor
    labels: Tensor
    programs: int


def by_label(labels: Tensor) -> ByLabel:
    if len(labels) > SORTED:
        in_order, rows = labels.sort(stable=True)
        return ByLabel(rows, in_order, 0)
    return ByLabel(torch.empty_like(labels), torch.empty_like(labels), cdiv(len(labels), ROWS.value))
