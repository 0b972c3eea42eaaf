"""Selection on the GPU: a radix select, with the state of every scope on the device.

Memory traffic: the values once for each 8 bits of a key, once to count ties, once to write. Counts are integers,
whose sum does not depend on the order of the atomic additions. Each pass begins where the one before it ended: its
programs read that one's counts and find the next digit themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.selection import LargestArgs
from .launch import BITS, INTERPRETED, Constant, bits_of, cdiv, from_bits, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride
from .tiles import is_aligned

BLOCK = 256 if INTERPRETED else 512
DIGIT = Constant(8)  # bits per digit of a key
BINS = Constant(256)


@triton.jit
def sort_key(x):
    """Unsigned integer keys in the order of the numbers, NaN the largest; 0 and -0 have the same key."""
    x = x + 0.0
    SIGNED: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    KEY: tl.constexpr = tl.uint64 if x.dtype == tl.float64 else tl.uint32
    bits = x.to(SIGNED, bitcast=True)
    last: tl.constexpr = SIGNED.primitive_bitwidth - 1
    # All bits of negative numbers are turned, the sign of others.
    key = bits ^ ((bits >> last) | (tl.full([], 1, SIGNED) << last))
    return tl.where(x != x, -1, key).to(KEY, bitcast=True)


@triton.jit
def share_of(fraction, count, NEAREST: tl.constexpr):
    """``fraction * count``, rounded, at least one."""
    exact = count.to(tl.float64) * fraction
    down = tl.floor(exact)
    share = down.to(tl.int64)
    if NEAREST:
        share += (exact >= down + 0.5).to(tl.int64)
    return tl.maximum(share, 1)


class Search(NamedTuple):
    """What is known of a scope's least chosen key."""

    prefix: Any  # its first digits, an int64
    room: Any  # the number of keys to choose of those that begin with them


class State(NamedTuple):
    """What the passes leave for each other; step s counts digit s."""

    counts: Any  # [steps, B, BINS], by scope and digit: keys that begin with the scope's prefix
    valid: Any  # [B], by scope: valid tokens, where not all of them are eligible
    searches: Any  # [steps + 1, B, 2]
    fraction: Any


@triton.jit
def search_of(scope, state, count, step, HAS_BAND: tl.constexpr, NEAREST: tl.constexpr):
    """The search of a scope after ``step`` digits, which is stored for the next step.

    All programs of a scope store the same.
    """
    bins = tl.arange(0, BINS)
    before = (step - 1).to(tl.int64) * count + scope
    by_digit = tl.load(state.counts + before * BINS + bins).to(tl.int64)
    if step == 1:
        prefix = tl.zeros([], tl.int64)
        room = tl.sum(by_digit, 0)
        valid = room
        if HAS_BAND:
            valid = tl.load(state.valid + scope).to(tl.int64)
        room = tl.minimum(share_of(state.fraction, valid, NEAREST), room)
    else:
        prefix = tl.load(state.searches + before * 2)
        room = tl.load(state.searches + before * 2 + 1)
    # The largest digit such that enough keys have it or a larger one; keys with a larger digit are all chosen.
    onward = tl.cumsum(by_digit, 0, reverse=True)
    digit = tl.maximum(tl.sum((onward >= room).to(tl.int32), 0) - 1, 0)
    found = Search((prefix << DIGIT) | digit, room - tl.sum(tl.where(bins > digit, by_digit, 0), 0))
    here = state.searches + (before + count) * 2
    tl.store(here, found.prefix)
    tl.store(here + 1, found.room)
    return found


@triton.jit
def scope_of(scopes, b, HAS_SCOPES: tl.constexpr):
    if HAS_SCOPES:
        return tl.load(scopes + b)
    else:
        return tl.zeros([], tl.int64)


class Line(NamedTuple):
    """The tokens of a row: pointers, and the band's ends in float64."""

    numbers: Any
    mask: Any
    band: Any
    low: Any
    high: Any


@triton.jit
def line_of(
    values, mask, band, base, row, values_stride, mask_stride, band_stride, low, high, ALIGNED: tl.constexpr
):
    line = Line(
        values + base + row * values_stride, mask + base + row * mask_stride, band + base + row * band_stride,
        from_bits(low), from_bits(high),
    )  # fmt: skip
    if ALIGNED:
        return Line(
            tl.multiple_of(line.numbers, 16), tl.multiple_of(line.mask, 16), tl.multiple_of(line.band, 16),
            line.low, line.high,
        )  # fmt: skip
    else:
        return line


@triton.jit
def load_keys(line, at, inside, HAS_MASK: tl.constexpr, HAS_BAND: tl.constexpr):
    """Flags of the valid tokens at these places, flags of those that can be chosen, and the keys of the latter."""
    # Masked numbers are loaded too: loads that depend on the mask would wait for it, a number each.
    keys = sort_key(tl.load(line.numbers + at, mask=inside, other=0.0))
    valid = load_valid(line.mask, at, inside, HAS_MASK)
    eligible = valid
    if HAS_BAND:
        x = tl.load(line.band + at, mask=inside, other=0.0)
        eligible = valid & (x > line.low.to(x.dtype)) & (x < line.high.to(x.dtype))
    return valid, eligible, keys


@triton.jit(
    do_not_specialize=[
        "width", "total", "values_stride", "mask_stride", "band_stride", "fraction", "low", "high",
        "batch", "parts", "step",
    ]
)  # fmt: skip
def digits_kernel(
    values, mask, band, cu, scopes, counts, valid_counts, searches,
    width, total, values_stride, mask_stride, band_stride, fraction, low, high, batch, parts, step,
    FIRST: tl.constexpr, NEAREST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BAND: tl.constexpr, HAS_SCOPES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): counts of digit ``step`` of the keys of row b that begin with the scope's prefix."""
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    length = length.to(counts.dtype.element_ty)  # which holds the number of all tokens
    if ALIGNED:
        length = length // 16 * 16
    scope = scope_of(scopes, b, HAS_SCOPES)
    state = State(counts, valid_counts, searches, from_bits(fraction))
    prefix = tl.zeros([], tl.int64)
    if not FIRST:
        prefix = search_of(scope, state, batch, step, HAS_BAND, NEAREST).prefix
    line = line_of(values, mask, band, base, row, values_stride, mask_stride, band_stride, low, high, ALIGNED)
    bins = tl.arange(0, BINS)
    digit_counts = tl.zeros([BINS], tl.int32)
    valid_here = tl.zeros([BLOCK], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(1) * BLOCK, length, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid, counted, key = load_keys(line, at, at < length, HAS_MASK, HAS_BAND)
        valid_here += valid.to(tl.int32)
        moved = key >> (key.dtype.primitive_bitwidth - (step + 1) * DIGIT).to(key.dtype)
        if not FIRST:
            counted = counted & ((moved >> DIGIT) == prefix.to(key.dtype))
        # Elements that are not counted go to bin 0.
        digit_counts += tl.histogram(tl.where(counted, (moved & (BINS - 1)).to(tl.int32), 0), BINS)
        others += (counted == 0).to(tl.int32)
    digit_counts -= tl.where(bins == 0, tl.sum(others, 0), 0)
    here = counts + (step.to(tl.int64) * batch + scope) * BINS + bins
    added = digit_counts.to(counts.dtype.element_ty)
    tl.atomic_add(here, added, mask=digit_counts != 0, sem="relaxed")
    if FIRST and HAS_BAND:
        tl.atomic_add(valid_counts + scope, tl.sum(valid_here, 0).to(counts.dtype.element_ty), sem="relaxed")


@triton.jit
def earlier_ties(ties, scopes, scope, place, parts, HAS_SCOPES: tl.constexpr, BLOCK: tl.constexpr):
    """The number of ties of a scope in the parts of rows before ``place``."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, place, BLOCK):
        at = start + tl.arange(0, BLOCK)
        alike = at < place
        if HAS_SCOPES:
            alike = tl.load(scopes + at // parts, mask=alike, other=-1) == scope
        found += tl.load(ties + at, mask=alike, other=0)
    return tl.sum(found, 0)


@triton.jit(
    do_not_specialize=[
        "width", "total", "values_stride", "mask_stride", "band_stride", "fraction", "low", "high", "out_stride",
        "batch", "parts", "step",
    ]
)  # fmt: skip
def chosen_kernel(
    values, mask, band, cu, scopes, counts, valid_counts, searches, ties, out,
    width, total, values_stride, mask_stride, band_stride, fraction, low, high, out_stride, batch, parts, step,
    WRITE: tl.constexpr, NEAREST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BAND: tl.constexpr, HAS_SCOPES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the ties of part k of row b with the least chosen key; with ``WRITE`` the mask of that part.

    The earliest ties are chosen. ``ties`` is ``[B, parts]``.
    """
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    length = length.to(counts.dtype.element_ty)  # which holds the number of all tokens
    if ALIGNED:
        length = length // 16 * 16
    scope = scope_of(scopes, b, HAS_SCOPES)
    state = State(counts, valid_counts, searches, from_bits(fraction))
    prefix, room = search_of(scope, state, batch, step, HAS_BAND, NEAREST)
    line = line_of(values, mask, band, base, row, values_stride, mask_stride, band_stride, low, high, ALIGNED)
    place = row * parts + tl.program_id(1)
    here = tl.zeros([], tl.int64)
    some = room > 0
    if WRITE:
        here = tl.load(ties + place)
        if here > 0:
            room -= earlier_ties(ties, scopes, scope, place, parts, HAS_SCOPES, BLOCK)
    seen = tl.zeros([], tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    share = (length + parts * 16 - 1) // (parts * 16) * 16
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, length)
    out_row = out + base + row * out_stride
    if ALIGNED:
        out_row = tl.multiple_of(out_row, 16)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        _, valid, key = load_keys(line, at, inside, HAS_MASK, HAS_BAND)
        least = prefix.to(key.dtype)
        tie = valid & (key == least)
        if WRITE:
            early = tie & (room > 0)
            if (room > 0) & (room < here):  # the ties of one part of a scope, at most, are divided
                early = tie & (seen + tl.cumsum(tie.to(tl.int32), 0) <= room)
                seen += tl.sum(tie.to(tl.int32), 0)
            chosen = (valid & (key > least) & some) | early
            tl.store(out_row + at, chosen.to(tl.uint8), mask=inside)
        else:
            found += tie.to(tl.int32)
    if not WRITE:
        tl.store(ties + place, tl.sum(found, 0).to(tl.int64))


def largest(a: LargestArgs) -> Tensor:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, mask = dense(a.values), as_bytes(a.mask)
    band = None if a.band is None else dense(a.band)
    out = output(values, values.shape, rows.packed, torch.uint8)
    if not rows.batch or not values.numel():
        return out.view(torch.bool)
    steps, scopes = values.element_size() * 8 // DIGIT.value, 1 if a.scopes is None else rows.batch
    kind = torch.int32 if values.numel() < 2**31 else torch.int64
    counts = torch.zeros(scopes * (steps * BINS.value + 1), dtype=kind, device=values.device)
    valid_counts = counts[scopes * steps * BINS.value :]
    parts = splits(values, rows.batch, max(1, cdiv(rows.width, BLOCK)))
    split = 2 * scopes * (steps + 1)
    searches = torch.empty(split + rows.batch * parts, dtype=torch.int64, device=values.device)
    ties = searches[split:]
    ids = None if a.scopes is None else a.scopes.contiguous()
    inputs = (
        values, pointer(mask, values), pointer(band, values), rows.cu, pointer(ids, searches),
        counts, valid_counts, searches,
    )  # fmt: skip
    sizes = (
        rows.width, rows.total, stride(values), stride(mask), stride(band),
        bits_of(a.fraction), bits_of(a.low), bits_of(a.high),
    )  # fmt: skip
    flags = {
        "NEAREST": a.nearest, "PACKED": rows.packed, "HAS_MASK": mask is not None, "HAS_BAND": band is not None,
        "HAS_SCOPES": ids is not None, "ALIGNED": is_aligned(rows, values, mask, band, out), "BLOCK": BLOCK,
        "num_warps": 4,
    }  # fmt: skip
    grid = (rows.batch, parts)
    for step in range(steps):
        digits_kernel[grid](*inputs, *sizes, scopes, parts, step, FIRST=step == 0, **flags, **BITS)
    for write in (False, True):
        chosen_kernel[grid](
            *inputs, ties, out, *sizes, stride(out), scopes, parts, steps, WRITE=write, **flags, **BITS
        )
    return out.view(torch.bool)
