"""Rows of a prefix tree in lexicographic order: where each begins and ends, and its place in its group.

Each row is compared with one row of its group, the leader, which is the first with its label. That decides the
order of two rows and their common prefix, but for rows that leave the leader's path at the same token on the same
side: these are compared from there on, all of a tile of members at once.

Memory traffic: masks from both ends up to a valid token, what a row shares with its leader, and a few tokens of
each pair that the leader leaves open.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .groups import end_of_group, place_rows
from .launch import INTERPRETED, Constant
from .rows import load_valid, row_bounds, to_boundary

WARPS = 4
THREADS = Constant(8 if INTERPRETED else 32 * WARPS)  # that search a mask or compare rows, 16 bytes each
AT_ONCE = Constant(4)  # loads of 16 bytes of a thread, in a comparison
MEMBERS = Constant(16 if INTERPRETED else 32)  # rows of a group that a row meets at once
NEXT = Constant(8 if INTERPRETED else 16)  # tokens of each that are then compared at once
NEAR = Constant(16 if INTERPRETED else 64)  # places in which most groups begin and end
FAR = Constant(64 if INTERPRETED else 1024)
LABELS = Constant(64 if INTERPRETED else 1024)  # labels read at once in search of the leader

# Stages: a row at once, or in parts, which first find where rows begin and end, then compare them.
WHOLE = Constant(0)
SPANS = Constant(1)
CODES = Constant(2)


class TokenArrays(NamedTuple):
    """Tokens of rows; pointers and sizes."""

    tokens: Any
    mask: Any  # bytes
    cu: Any  # offsets of packed rows
    tokens_stride: Any  # between padded rows; 0 for packed ones
    mask_stride: Any
    width: Any
    total: Any


class Span(NamedTuple):
    """The tokens of a row, int32."""

    first: Any  # its first valid token
    end: Any  # one past its last valid one; not above ``first`` where there is none


@triton.jit
def search_span(flags, low, high):
    """The first valid token of ``[low, high)``, and one past the last; ``high`` and ``low`` where there is none."""
    TILE: tl.constexpr = THREADS * 16
    line = flags + low
    size = high - low
    head = tl.minimum(to_boundary(line), size)
    stop = head + (size - head) // 16 * 16
    # Tokens before and behind the whole loads of 16 bytes.
    lane = tl.arange(0, 32)
    edge = tl.where(lane < 16, lane, stop + lane - 16)
    valid = load_valid(line, edge, tl.where(lane < 16, lane < head, edge < size), True)
    first = tl.min(tl.where(valid, edge, size), 0)
    end = tl.max(tl.where(valid, edge + 1, 0), 0)
    thread = tl.arange(0, THREADS)[:, None] * 16
    byte = tl.arange(0, 16)[None, :]
    start = head
    while (start < stop) & (first >= start):
        x = tl.load(tl.multiple_of(line + start, 16) + (thread + byte), mask=start + thread < stop, other=0)
        at = tl.where(x != 0, start + thread + byte, size)
        first = tl.minimum(first, tl.min(tl.min(at, 1), 0))
        start += TILE
    start = stop - TILE
    while (start + TILE > head) & (end <= start + TILE) & (first < start + TILE):
        inside = start + thread >= head
        x = tl.load(tl.multiple_of(line + start, 16) + (thread + byte), mask=inside, other=0)
        at = tl.where(x != 0, start + thread + byte + 1, 0)
        end = tl.maximum(end, tl.max(tl.max(at, 1), 0))
        start -= TILE
    return Span(low + first, low + end)


@triton.jit
def part_of(size, part, parts):
    """Begin and end of a part of ``size`` tokens."""
    each = tl.cdiv(size, parts)
    low = tl.minimum(part * each, size)
    return low, tl.minimum(low + each, size)


@triton.jit
def row_span(arrays, b, part, parts, PACKED: tl.constexpr, HAS_MASK: tl.constexpr):
    """The span of a part of row b."""
    base, size = row_bounds(arrays.cu, b, arrays.width, arrays.total, PACKED)
    low, high = part_of(size.to(tl.int32), part, parts)
    if HAS_MASK:
        return search_span(arrays.mask + base + b.to(tl.int64) * arrays.mask_stride, low, high)
    else:
        return Span(low, high)


@triton.jit
def merged_span(spans, b, batch, parts):
    """The span of row b from those of its parts, which lie ``[2, parts, B]``."""
    first = tl.load(spans + b)
    end = tl.load(spans + parts * batch + b)
    for part in range(1, parts):
        here = spans + part * batch + b
        low = tl.load(here)
        high = tl.load(here + parts * batch)
        first = tl.where((first >= end) & (low < high), low, first)
        end = tl.where(low < high, high, end)
    return Span(first, end)


@triton.jit
def first_token(arrays, b, first, PACKED: tl.constexpr):
    """Pointer to token ``first`` of row b."""
    base, _ = row_bounds(arrays.cu, b, arrays.width, arrays.total, PACKED)
    return arrays.tokens + base + b.to(tl.int64) * arrays.tokens_stride + first


@triton.jit
def first_difference(x, y, low, high, none):
    """The first place in ``[low, high)`` at which two rows differ; ``none`` if there is none."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = THREADS * AT_ONCE * VECTOR
    if low >= high:
        return none
    else:
        x += low
        y += low
        size = high - low
        head = tl.minimum(to_boundary(x), size)
        aligned = to_boundary(x) == to_boundary(y)
        stop = head + (size - head) // VECTOR * VECTOR
        # Tokens before and behind the whole vectors, fewer than VECTOR each.
        lane = tl.arange(0, 2 * VECTOR)
        edge = tl.where(lane < VECTOR, lane, stop + lane - VECTOR)
        exists = tl.where(lane < VECTOR, lane < head, edge < size)
        differ = tl.load(x + edge, mask=exists, other=0) != tl.load(y + edge, mask=exists, other=0)
        place = tl.min(tl.where(differ, edge, size), 0)
        vector = tl.arange(0, THREADS * AT_ONCE)[:, None] * VECTOR
        token = tl.arange(0, VECTOR)[None, :]
        start = head
        while (start < stop) & (place >= start):
            inside = start + vector < stop
            one = tl.load(tl.multiple_of(x + start, 16) + (vector + token), mask=inside, other=0)
            if aligned:
                other = tl.load(tl.multiple_of(y + start, 16) + (vector + token), mask=inside, other=0)
            else:
                other = tl.load(y + start + (vector + token), mask=inside, other=0)
            differs = tl.where(one != other, start + vector + token, size)
            place = tl.minimum(place, tl.min(tl.min(differs, 1), 0))
            start += TILE
        return tl.where(place < size, low + place, none)


@triton.jit
def code_of(x, y, length, leader_length, low, high):
    """A row's place relative to its leader from the tokens in ``[low, high)``: the least of several parts decides.

    Twice the length of their common prefix, plus one where the row comes after the leader; -1 for an empty row.
    Rows with different codes are ordered by code alone. The one with the shorter common prefix leaves the leader
    first, where the other still has the leader's tokens; with equal lengths one comes before the leader and one
    after.
    """
    shorter = tl.minimum(length, leader_length)
    common = first_difference(x, y, low, tl.minimum(high, shorter), shorter)
    differ = common < shorter
    less = tl.load(y + common, mask=differ, other=0) < tl.load(x + common, mask=differ, other=0)
    after = tl.where(differ, less, leader_length <= length)
    return tl.where(length > 0, 2 * common.to(tl.int64) + after.to(tl.int64), -1)


@triton.jit
def first_of(labels, label, batch):
    """The first row with a label that some row has."""
    first = batch
    start = batch * 0
    while first == batch:
        rows = start + tl.arange(0, LABELS)
        here = tl.load(labels + rows, mask=rows < batch, other=~label)
        first = tl.minimum(first, tl.min(tl.where(here == label, rows, batch), 0))
        start += LABELS
    return first


@triton.jit
def first_sorted(labels, label, batch):
    """The first place of a label among sorted ones that have it."""
    low = batch * 0
    high = batch
    while low < high:
        middle = (low + high) // 2
        below = tl.load(labels + middle) < label
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=[
    "batch", "ranked", "parts", "tokens_stride", "mask_stride", "width", "total",
])  # fmt: skip
def rows_kernel(
    tokens, mask, cu, labels, by_label, sorted_labels, spans, codes, first_out, length_out,
    batch, ranked, parts, tokens_stride, mask_stride, width, total,
    STAGE: tl.constexpr, SORTED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The first ``ranked`` programs sort rows by label; the others find spans of rows, and compare with leaders."""
    p = tl.program_id(0)
    part = tl.program_id(1)
    if p < ranked:
        if part == 0:
            place_rows(p, labels, by_label, sorted_labels, batch)
    else:
        b = p - ranked
        arrays = TokenArrays(tokens, mask, cu, tokens_stride, mask_stride, width, total)
        if STAGE == SPANS:
            span = row_span(arrays, b, part, parts, PACKED, HAS_MASK)
            here = spans + part * batch + b
            tl.store(here, span.first)
            tl.store(here + parts * batch, span.end)
        else:
            label = tl.load(labels + b)
            if SORTED:
                leader = tl.load(by_label + first_sorted(sorted_labels, label, batch)).to(tl.int32)
            else:
                leader = first_of(labels, label, batch)
            if STAGE == CODES:
                own = merged_span(spans, b, batch, parts)
                theirs = merged_span(spans, leader, batch, parts)
            else:
                own = row_span(arrays, b, 0, 1, PACKED, HAS_MASK)
                theirs = own
                if leader != b:
                    theirs = row_span(arrays, leader, 0, 1, PACKED, HAS_MASK)
            length = tl.maximum(own.end - own.first, 0)
            first = tl.where(length > 0, own.first, 0)
            others = tl.maximum(theirs.end - theirs.first, 0)
            low, high = part_of(tl.where(leader == b, 0, tl.minimum(length, others)), part, parts)
            x = first_token(arrays, b, first, PACKED)
            y = first_token(arrays, leader, tl.where(others > 0, theirs.first, 0), PACKED)
            tl.store(codes + part * batch + b, code_of(x, y, length, others, low, high))
            if part == 0:
                tl.store(first_out + b, first.to(tl.int64))
                tl.store(length_out + b, length.to(tl.int64))


@triton.jit
def load_codes(codes, rows, inside, batch, parts):
    """Codes of rows; -1 where not inside."""
    code = tl.load(codes + rows, mask=inside, other=-1)
    for part in range(1, parts):
        code = tl.minimum(code, tl.load(codes + part * batch + rows, mask=inside, other=-1))
    return code


@triton.jit
def compare_on(x, others, same, limit):
    """Common prefixes up to ``limit`` of a row with others, which have ``same`` tokens in common with it."""
    ahead = tl.arange(0, NEXT)[None, :]
    left = same < limit
    while tl.max(left.to(tl.int32), 0) > 0:
        at = same[:, None] + ahead
        inside = left[:, None] & (at < limit[:, None])
        differ = tl.load(x + at, mask=inside, other=0) != tl.load(others[:, None] + at, mask=inside, other=0)
        place = tl.min(tl.where(differ, at, limit[:, None]), 1)
        stop = tl.minimum(same + NEXT, limit)
        same = tl.where(left, tl.minimum(place, stop), same)
        left = left & (place >= stop) & (same < limit)
    return same


@triton.jit(do_not_specialize=["batch", "parts", "tokens_stride", "width", "total"])
def places_kernel(
    tokens, cu, by_label, sorted_labels, codes, first, lengths, order, shared,
    batch, parts, tokens_stride, width, total, PACKED: tl.constexpr,
):  # fmt: skip
    """Program p: the place among all rows of the row at p by label, and its common prefix with the row before it.

    Among all rows before it in lexicographic order, the last one has the longest common prefix with it.
    """
    p = tl.program_id(0)
    arrays = TokenArrays(tokens, tokens, cu, tokens_stride, 0, width, total)
    label = tl.load(sorted_labels + p)
    begin = end_of_group(sorted_labels, p, label, batch, NEAR, FAR, -1) + 1
    end = end_of_group(sorted_labels, p, label, batch, NEAR, FAR)
    b = tl.load(by_label + p)
    code = load_codes(codes, b, True, batch, parts)
    length = tl.load(lengths + b).to(tl.int32)
    x = first_token(arrays, b, tl.load(first + b), PACKED)
    before = tl.zeros([MEMBERS], tl.int32)
    most = tl.full([MEMBERS], -1, tl.int32)
    for start in range(begin, end, MEMBERS):
        at = start + tl.arange(0, MEMBERS)
        j = tl.load(by_label + at, mask=at < end, other=0)
        other = (at < end) & (j != b)
        theirs = load_codes(codes, j, other, batch, parts)
        if code < 0:
            # Empty rows come last, in the order of their numbers.
            before += (other & ((theirs >= 0) | (j < b))).to(tl.int32)
        else:
            first_leaves = theirs >> 1 <= code >> 1
            same = tl.where(first_leaves, theirs, code).to(tl.int32) >> 1
            ahead = tl.where(first_leaves, (theirs & 1) == 0, (code & 1) != 0)
            pair = theirs == code
            if tl.max(pair.to(tl.int32), 0) > 0:
                other_length = tl.load(lengths + j, mask=pair, other=0).to(tl.int32)
                y = first_token(arrays, j, tl.load(first + j, mask=pair, other=0), PACKED)
                shorter = tl.where(pair, tl.minimum(length, other_length), 0)
                longer = compare_on(x, y, tl.where(pair, same, 0), shorter)
                differ = longer < shorter
                less = tl.load(y + longer, mask=differ, other=0) < tl.load(x + longer, mask=differ, other=0)
                ends_first = (other_length < length) | ((other_length == length) & (j < b))
                same = tl.where(pair, longer, same)
                ahead = tl.where(pair, tl.where(differ, less, ends_first), ahead)
            ahead = ahead & (theirs >= 0)
            before += ahead.to(tl.int32)
            most = tl.maximum(most, tl.where(ahead, same, -1))
    place = begin + tl.sum(before, 0)
    tl.store(order + place, b)
    tl.store(shared + place, tl.max(most, 0).to(tl.int64))
