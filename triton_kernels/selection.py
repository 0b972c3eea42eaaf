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
from .launch import BITS, INTERPRETED, Constant, cdiv, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

BLOCK = 256 if INTERPRETED else 512
DIGIT = Constant(8)  # bits per digit of a key
BINS = Constant(256)


@triton.jit
def sort_key(x):
    """Unsigned integer keys in the order of the numbers, NaN the largest; 0 and -0 have the same key."""
    x = x + 0.0
    KEY: tl.constexpr = tl.uint64 if x.dtype == tl.float64 else tl.uint32
    bits = x.to(KEY, bitcast=True)
    sign = tl.full([], 1, KEY) << (KEY.primitive_bitwidth - 1)
    most = sign - 1 + sign
    return tl.where(x != x, most, tl.where(bits >= sign, most - bits, bits + sign))


class Search(NamedTuple):
    """What is known of a scope's least chosen key."""

    prefix: Any  # its first digits, an int64
    room: Any  # the number of keys to choose of those that begin with them


@triton.jit
def search_of(scope, wanted, searches, counts, count, step):
    """The search of a scope after ``step`` digits, which is stored for the next step.

    ``searches`` is ``[steps, count, 2]``, ``counts`` ``[steps, count, BINS]``, both of the steps before. All programs
    of a scope store the same.
    """
    bins = tl.arange(0, BINS)
    if step == 0:
        found = Search(tl.zeros([], tl.int64), tl.load(wanted + scope))
    else:
        before = (step - 1).to(tl.int64) * count + scope
        prefix, room = tl.load(searches + before * 2), tl.load(searches + before * 2 + 1)
        by_digit = tl.load(counts + before * BINS + bins).to(tl.int64)
        # The largest digit such that enough keys have it or a larger one; keys with a larger digit are all chosen.
        onward = tl.cumsum(by_digit, 0, reverse=True)
        digit = tl.maximum(tl.sum((onward >= room).to(tl.int32), 0) - 1, 0)
        above = tl.sum(tl.where(bins > digit, by_digit, 0), 0)
        found = Search((prefix << DIGIT) | digit, room - above)
    here = searches + (step.to(tl.int64) * count + scope) * 2
    tl.store(here, found.prefix)
    tl.store(here + 1, found.room)
    return found


@triton.jit(do_not_specialize=["width", "total", "values_stride", "mask_stride", "batch", "step", "parts"])
def digits_kernel(
    values, mask, cu, scopes, wanted, searches, counts,
    width, total, values_stride, mask_stride, batch, parts, step,
    FIRST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): counts of digit ``step`` of the keys of row b that begin with the scope's prefix."""
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    scope = tl.load(scopes + b)
    prefix = search_of(scope, wanted, searches, counts, batch, step).prefix
    bins = tl.arange(0, BINS)
    digit_counts = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(1) * BLOCK, length, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
        key = sort_key(tl.load(values + base + row * values_stride + at, mask=counted, other=0.0))
        moved = key >> (key.dtype.primitive_bitwidth - (step + 1) * DIGIT).to(key.dtype)
        if not FIRST:
            counted = counted & ((moved >> DIGIT) == prefix.to(key.dtype))
        digit = tl.where(counted, (moved & (BINS - 1)).to(tl.int32), 0)
        # Elements that are not counted go to bin 0.
        digit_counts += tl.histogram(digit, BINS)
        digit_counts -= tl.where(bins == 0, BLOCK - tl.sum(counted.to(tl.int32), 0), 0)
    here = counts + (step.to(tl.int64) * batch + scope) * BINS + bins
    added = digit_counts.to(counts.dtype.element_ty)
    tl.atomic_add(here, added, mask=digit_counts != 0, sem="relaxed")


@triton.jit
def earlier_ties(ties, scopes, scope, place, parts, BLOCK: tl.constexpr):
    """The number of ties of a scope in the parts of rows before ``place``."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, place, BLOCK):
        at = start + tl.arange(0, BLOCK)
        alike = tl.load(scopes + at // parts, mask=at < place, other=-1) == scope
        found += tl.load(ties + at, mask=alike, other=0)
    return tl.sum(found, 0)


@triton.jit(
    do_not_specialize=[
        "width",
        "total",
        "values_stride",
        "mask_stride",
        "out_stride",
        "batch",
        "step",
        "parts",
    ]
)
def chosen_kernel(
    values, mask, cu, scopes, wanted, searches, counts, ties, out,
    width, total, values_stride, mask_stride, out_stride, batch, parts, step,
    WRITE: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the ties of part k of row b with the least chosen key; with ``WRITE`` the mask of that part.

    The earliest ties are chosen. ``ties`` is ``[B, parts]``.
    """
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    scope = tl.load(scopes + b)
    prefix, room = search_of(scope, wanted, searches, counts, batch, step)
    place = row * parts + tl.program_id(1)
    seen = tl.zeros([], tl.int64)
    if WRITE:  # noqa: SIM102 (known when compiled; the ties are not)
        if tl.load(ties + place) > 0:
            seen = earlier_ties(ties, scopes, scope, place, parts, BLOCK)
    share = (length + parts - 1) // parts
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, length)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
        key = sort_key(tl.load(values + base + row * values_stride + at, mask=valid, other=0.0))
        least = prefix.to(key.dtype)
        tie = (valid & (key == least)).to(tl.int32)
        if WRITE:
            early = seen + tl.cumsum(tie, 0) <= room
            chosen = valid & (room > 0) & ((key > least) | ((key == least) & early))
            tl.store(out + base + row * out_stride + at, chosen.to(tl.uint8), mask=inside)
        seen += tl.sum(tie, 0)
    if not WRITE:
        tl.store(ties + place, seen)


def largest(a: LargestArgs) -> Tensor:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, mask = dense(a.values), as_bytes(a.mask)
    out = output(values, values.shape, rows.packed, torch.uint8)
    if not rows.batch or not values.numel():
        return out.view(torch.bool)
    steps = values.element_size() * 8 // DIGIT.value
    kind = torch.int32 if values.numel() < 2**31 else torch.int64
    counts = torch.zeros((steps, rows.batch, BINS.value), dtype=kind, device=values.device)
    parts = splits(values, rows.batch, max(1, cdiv(rows.width, BLOCK)))
    searches, ties = a.scopes.new_empty((steps + 1, rows.batch, 2)), a.scopes.new_empty((rows.batch, parts))
    inputs = (
        values,
        pointer(mask, values),
        rows.cu,
        a.scopes.contiguous(),
        a.wanted.contiguous(),
        searches,
        counts,
    )
    sizes = (rows.width, rows.total, stride(values), stride(mask))
    flags = {"PACKED": rows.packed, "HAS_MASK": mask is not None, "BLOCK": BLOCK, "num_warps": 4}
    grid = (rows.batch, parts)
    for step in range(steps):
        digits_kernel[grid](*inputs, *sizes, rows.batch, parts, step, FIRST=step == 0, **flags, **BITS)
    for write in (False, True):
        chosen_kernel[grid](
            *inputs, ties, out, *sizes, stride(out), rows.batch, parts, steps, WRITE=write, **flags, **BITS
        )
    return out.view(torch.bool)
