"""Selection on the GPU: a radix select, with the state of every scope on the device.

Memory traffic: the values once for each 8 bits of a key, once to count ties, once to write. Counts are integers,
whose sum does not depend on the order of the atomic additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.selection import LargestArgs
from .launch import BITS, INTERPRETED, cdiv, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, row_bounds, stride

BLOCK = 256 if INTERPRETED else 512
DIGIT = 8  # bits per digit of a key


@triton.jit
def sort_key(x):
    """Unsigned integer keys in the order of the numbers, NaN the largest; 0 and -0 have the same key."""
    x = x + 0.0
    if x.dtype == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = tl.full([], 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
        sign = tl.full([], 1, tl.uint64) << 31
    key = tl.where(bits >= sign, (sign - 1) * 2 + 1 - bits, bits + sign)
    return tl.where(x != x, (sign - 1) * 2 + 1, key)


@triton.jit(do_not_specialize=["width", "total", "values_stride", "mask_stride", "shift", "parts"])
def digits_kernel(
    values, mask, cu, scopes, prefixes, counts, width, total, values_stride, mask_stride, shift, parts,
    FIRST: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): counts of the next digit of the keys of row b that begin with the scope's ``prefix``."""
    BINS: tl.constexpr = 1 << DIGIT
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    scope = tl.load(scopes + b)
    prefix = tl.load(prefixes + scope).to(tl.uint64, bitcast=True)
    bins = tl.arange(0, BINS)
    digit_counts = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(1) * BLOCK, length, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
        key = sort_key(tl.load(values + base + row * values_stride + at, mask=counted, other=0.0))
        moved = key >> shift.to(tl.uint64)
        if not FIRST:
            counted = counted & ((moved >> DIGIT) == prefix)
        digit = tl.where(counted, (moved & (BINS - 1)).to(tl.int32), 0)
        # Elements that are not counted go to bin 0.
        digit_counts += tl.histogram(digit, BINS)
        digit_counts -= tl.where(bins == 0, BLOCK - tl.sum(counted.to(tl.int32), 0), 0)
    tl.atomic_add(
        counts + scope * BINS + bins, digit_counts.to(tl.int64), mask=digit_counts != 0, sem="relaxed"
    )


@triton.jit(do_not_specialize=["width", "total", "values_stride", "mask_stride", "out_stride"])
def chosen_kernel(
    values, mask, cu, scopes, prefixes, wanted, before, out, width, total, values_stride, mask_stride, out_stride,
    WRITE: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the number of ties of row b with the least chosen key, to ``before``.

    With ``WRITE`` the mask of row b; ``before`` is then the number of ties in the scope's earlier rows.
    """
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    scope = tl.load(scopes + b)
    least = tl.load(prefixes + scope).to(tl.uint64, bitcast=True)
    room = tl.load(wanted + scope)
    ties = tl.zeros([], tl.int64)
    if WRITE:
        ties = tl.load(before + b)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
        key = sort_key(tl.load(values + base + row * values_stride + at, mask=valid, other=0.0))
        tie = (valid & (key == least)).to(tl.int32)
        if WRITE:
            early = ties + tl.cumsum(tie, 0) <= room
            chosen = valid & (room > 0) & ((key > least) | ((key == least) & early))
            tl.store(out + base + row * out_stride + at, chosen.to(tl.uint8), mask=inside)
        ties += tl.sum(tie, 0)
    if not WRITE:
        tl.store(before + b, ties)


def largest(a: LargestArgs) -> Tensor:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, mask = dense(a.values), as_bytes(a.mask)
    allocate = torch.zeros if rows.packed else torch.empty
    out = allocate(values.shape, dtype=torch.uint8, device=values.device)
    if not rows.batch or not values.numel():
        return out.view(torch.bool)
    scopes, wanted = a.scopes.contiguous(), a.wanted
    # Per scope: the least chosen key's digits so far, and the number of keys to choose among those that match.
    room, prefix = wanted.clone(), torch.zeros_like(wanted)
    inputs = (values, pointer(mask, values), rows.cu, scopes, prefix)
    sizes = (rows.width, rows.total, stride(values), stride(mask))
    flags = {"PACKED": rows.packed, "HAS_MASK": mask is not None, "BLOCK": BLOCK, "num_warps": 4}
    parts = splits(values, rows.batch, max(1, cdiv(rows.width, BLOCK)))
    bits = 64 if values.dtype is torch.float64 else 32
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros((rows.batch, 1 << DIGIT), dtype=torch.int64, device=values.device)
        digits_kernel[(rows.batch, parts)](
            *inputs, counts, *sizes, shift, parts, FIRST=shift == bits - DIGIT, DIGIT=DIGIT, **flags, **BITS
        )
        # The largest digit such that enough keys have it or a larger one; keys with a larger digit are all chosen.
        onward = counts.flip(1).cumsum(1).flip(1)
        digit = ((onward >= room[:, None]).sum(1) - 1).clamp(min=0)
        above = torch.nn.functional.pad(onward, (0, 1)).gather(1, digit[:, None] + 1)[:, 0]
        room -= above
        prefix.copy_(prefix << DIGIT | digit)
    before = torch.empty_like(scopes)
    arguments = (*inputs, torch.where(wanted > 0, room, 0), before, out, *sizes, stride(out))
    chosen_kernel[(rows.batch,)](*arguments, WRITE=False, **flags, **BITS)
    # The earliest ties are chosen: the number of ties in the scope's earlier rows, for each row.
    order = scopes.argsort(stable=True)
    sums = before[order].cumsum(0) - before[order]
    first = torch.cat([torch.ones_like(order[:1], dtype=torch.bool), scopes[order][1:] != scopes[order][:-1]])
    start = torch.where(first, sums, 0).cummax(0).values
    before.index_copy_(0, order, sums - start)
    chosen_kernel[(rows.batch,)](*arguments, WRITE=True, **flags, **BITS)
    return out.view(torch.bool)
