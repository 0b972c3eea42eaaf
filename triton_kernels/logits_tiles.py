"""Columns of a row of logits: whole tiles, 16 bytes at a time, and columns one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits_rows import capped


class Models(NamedTuple):
    """A row's logits, and the reference's."""

    row: Any  # pointer
    ref_row: Any
    cap: Any


@triton.jit
def words(row, ALIGN: tl.constexpr):
    """A pointer to bfloat16 as one to pairs of them: a pair is widened in two instructions, its members in four."""
    if row.dtype.element_ty == tl.bfloat16 and ALIGN >= 4:
        return row.to(tl.pointer_type(tl.uint32))
    else:
        return row


@triton.jit
def load_two(row, at, mask, STEP: tl.constexpr):
    """Places at and at + STEP of each of [H, T] lanes, one by one: a tile [H, T, 2]."""
    return tl.join(tl.load(row + at, mask=mask, other=0), tl.load(row + at + STEP, mask=mask, other=0))


@triton.jit
def load_four(row, at, mask, STEP: tl.constexpr):
    return tl.join(load_two(row, at, mask, 2 * STEP), load_two(row, at + STEP, mask, 2 * STEP))


@triton.jit
def load_places(row, at, mask, COUNT: tl.constexpr):
    """A tile [H, T, 2, ..., 2] from COUNT places from ``at`` on of each of [H, T] lanes, one by one."""
    if COUNT == 2:
        return load_two(row, at, mask, 1)
    elif COUNT == 4:
        return load_four(row, at, mask, 1)
    else:
        return tl.join(load_four(row, at, mask, 2), load_four(row, at + 1, mask, 2))


@triton.jit
def load_tile(row, start, exists, H: tl.constexpr, T: tl.constexpr, E: tl.constexpr, ALIGN: tl.constexpr):
    """A whole tile from column ``start``, as it is stored; 16 bytes at a time if rows begin at multiples of that.

    A lane has the same columns wherever rows begin, so that a row's bits do not depend on that.
    """
    here = tl.multiple_of(words(row + start, ALIGN), ALIGN)
    PER: tl.constexpr = here.dtype.element_ty.primitive_bitwidth // row.dtype.element_ty.primitive_bitwidth
    W: tl.constexpr = E // PER
    at = tl.arange(0, H)[:, None] * (T * W) + tl.arange(0, T)[None, :] * W
    if ALIGN == 16:
        at = at[:, :, None] + tl.arange(0, W)[None, None, :]
        tile = tl.load(here + at, mask=tl.full(at.shape, True, tl.int1) & exists, other=0)
        if W == 2:
            return tile
        elif W == 4:
            return tl.reshape(tile, [H, T, 2, 2])
        else:
            return tl.reshape(tile, [H, T, 2, 2, 2])
    else:
        return load_places(here, at, tl.full(at.shape, True, tl.int1) & exists, W)


@triton.jit
def widened(tile, ACC: tl.constexpr):
    """A tile of logits from what :func:`load_tile` has loaded."""
    if tile.dtype == tl.uint32:
        first = (tile << 16).to(tl.float32, bitcast=True)
        second = (tile & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(first, second)
    else:
        return tile.to(ACC)


@triton.jit
def load_columns(
    models, column, inside, ACC: tl.constexpr, HAS_REF: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Logits of both models, -inf where they are not inside."""
    z = capped(tl.load(models.row + column, mask=inside, other=0.0).to(ACC), models.cap, CAPPED)
    z = tl.where(inside, z, float("-inf"))
    x = z
    if HAS_REF:
        x = capped(tl.load(models.ref_row + column, mask=inside, other=0.0).to(ACC), models.cap, CAPPED)
        x = tl.where(inside, x, float("-inf"))
    return z, x
