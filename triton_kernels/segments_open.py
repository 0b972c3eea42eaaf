"""Open steps on the GPU: what adjacent tokens leave of a segmented reduction, and how it meets that of others."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.segments import REDUCTIONS
from .launch import Constant
from .scans import RESUMED

# Indices of the reductions in the table of the specification.
SUM, MEAN, MIN, MAX, PROD, FIRST, LAST, ANY = (
    Constant(REDUCTIONS.index(op)) for op in ("sum", "mean", "min", "max", "prod", "first", "last", "any")
)

# Fields of a chunk's record: its open steps, and its number of flags.
FIELDS = Constant(5)
NOWHERE = Constant(2**52)  # a position behind every token


class Part(NamedTuple):
    """The reduction of adjacent tokens of one step."""

    value: Any  # what is summed, multiplied or the least; within a thread a pair
    more: Any  # a mean's count, a product's zeros, the position of the least value


class Open(NamedTuple):
    """What adjacent tokens leave open."""

    first: Any  # int32, the first step that has a token among them, -1 without one
    last: Any  # the last one
    part: Any  # of the tokens of the last one


@triton.jit
def continues(a_last, b_first, b_last):
    """Whether the open step of tokens is that of the tokens before them."""
    return (b_last < 0) | ((b_first == b_last) & (a_last == b_last))


@triton.jit
def summed(a_first, a_last, a, b_first, b_last, b):
    """Associative combine of open steps, and of their sums."""
    on = continues(a_last, b_first, b_last)
    return (
        tl.where(a_first < 0, b_first, a_first),
        tl.where(b_last < 0, a_last, b_last),
        b + tl.where(on, a, 0.0),
    )


@triton.jit
def added(a_first, a_last, a, a_more, b_first, b_last, b, b_more):
    """The same with counts."""
    on = continues(a_last, b_first, b_last)
    return (
        tl.where(a_first < 0, b_first, a_first),
        tl.where(b_last < 0, a_last, b_last),
        b + tl.where(on, a, 0.0),
        b_more + tl.where(on, a_more, 0),
    )


@triton.jit
def multiplied(a_first, a_last, a, a_more, b_first, b_last, b, b_more):
    """The same of products, and of the numbers of zeros that they leave out."""
    on = continues(a_last, b_first, b_last)
    return (
        tl.where(a_first < 0, b_first, a_first),
        tl.where(b_last < 0, a_last, b_last),
        b * tl.where(on, a, 1.0),
        b_more + tl.where(on, a_more, 0),
    )


@triton.jit
def least(a_first, a_last, a, a_more, b_first, b_last, b, b_more):
    """The same of the least values, and their positions: a NaN is the least, and of equal ones the earliest."""
    on = continues(a_last, b_first, b_last)
    tie = (a == b) | ((a != a) & (b != b))
    b_less = (b < a) | ((b != b) & (a == a)) | (tie & (b_more < a_more))
    take = b_less | (on == 0)
    return (
        tl.where(a_first < 0, b_first, a_first),
        tl.where(b_last < 0, a_last, b_last),
        tl.where(take, b, a),
        tl.where(take, b_more, a_more),
    )


@triton.jit
def merged(a, b, OP: tl.constexpr):
    """The open steps of tokens, and of those after them."""
    if OP == SUM or OP == ANY:
        first, last, value = summed(a.first, a.last, a.part.value, b.first, b.last, b.part.value)
        more = b.part.more
    elif OP == MEAN:
        first, last, value, more = added(
            a.first, a.last, a.part.value, a.part.more, b.first, b.last, b.part.value, b.part.more
        )
    elif OP == PROD:
        first, last, value, more = multiplied(
            a.first, a.last, a.part.value, a.part.more, b.first, b.last, b.part.value, b.part.more
        )
    else:
        first, last, value, more = least(
            a.first, a.last, a.part.value, a.part.more, b.first, b.last, b.part.value, b.part.more
        )
    return Open(first, last, Part(value, more))


@triton.jit
def scanned(x, OP: tl.constexpr):
    """The open steps of all elements up to each."""
    along = (x.first, x.last, x.part.value, x.part.more)
    if OP == SUM or OP == ANY:
        first, last, value = tl.associative_scan((x.first, x.last, x.part.value), 0, summed)
        more = x.part.more
    elif OP == MEAN:
        first, last, value, more = tl.associative_scan(along, 0, added)
    elif OP == PROD:
        first, last, value, more = tl.associative_scan(along, 0, multiplied)
    else:
        first, last, value, more = tl.associative_scan(along, 0, least)
    return Open(first, last, Part(value, more))


@triton.jit
def where_open(flag, a, b):
    return Open(
        tl.where(flag, a.first, b.first),
        tl.where(flag, a.last, b.last),
        Part(tl.where(flag, a.part.value, b.part.value), tl.where(flag, a.part.more, b.part.more)),
    )


@triton.jit
def nothing(SIZE: tl.constexpr, OP: tl.constexpr, WIDE: tl.constexpr):
    """The open steps of no tokens."""
    none = tl.full([SIZE], -1, tl.int32)
    value = tl.zeros([SIZE], WIDE)
    more = tl.zeros([SIZE], tl.int64)
    if OP == PROD:
        value += 1.0
    elif OP == MIN or OP == MAX or OP == FIRST or OP == LAST:
        value += float("inf")
        more += NOWHERE
    return Open(none, none, Part(value, more))


# ---- chunks of a row ------------------------------------------------------------------------------------------


@triton.jit
def start_of_part(
    state, part, c, chunks,
    OP: tl.constexpr, WIDE: tl.constexpr, STAGE: tl.constexpr, MAX_CHUNKS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What the chunks before chunk c leave open, in the first thread, and their number of flags."""
    start = nothing(T, OP, WIDE)
    flags = tl.zeros([T], tl.int32)
    if STAGE == RESUMED:
        lane = tl.arange(0, MAX_CHUNKS)
        before = lane < c
        record = state + (part.number * chunks + lane) * FIELDS
        count = tl.load(record + 4, mask=before, other=0.0).to(tl.int32)
        shift = tl.cumsum(count, 0) - count
        first = tl.load(record, mask=before, other=-1.0).to(tl.int32)
        last = tl.load(record + 1, mask=before, other=-1.0).to(tl.int32)
        none = nothing(MAX_CHUNKS, OP, WIDE)
        value = tl.load(record + 2, mask=before, other=0.0).to(WIDE)
        more = tl.load(record + 3, mask=before, other=0.0).to(tl.int64)
        opened = where_open(
            before,
            Open(
                tl.where(first < 0, first, first + shift),
                tl.where(last < 0, last, last + shift),
                Part(value, more),
            ),
            none,
        )
        opened = of_lane(scanned(opened, OP), MAX_CHUNKS - 1)
        start = where_open(tl.arange(0, T) == 0, opened, start)
        flags += tl.sum(count, 0)
    return start, flags


@triton.jit
def of_lane(x, lane):
    """The open steps of one element."""
    here = tl.arange(0, x.first.shape[0]) == lane
    return Open(
        tl.sum(tl.where(here, x.first, 0), 0), tl.sum(tl.where(here, x.last, 0), 0),
        Part(tl.sum(tl.where(here, x.part.value, 0.0), 0), tl.sum(tl.where(here, x.part.more, 0), 0)),
    )  # fmt: skip


@triton.jit
def store_record(record, opened, flags):
    tl.store(record, opened.first.to(tl.float64))
    tl.store(record + 1, opened.last.to(tl.float64))
    tl.store(record + 2, opened.part.value.to(tl.float64))
    tl.store(record + 3, opened.part.more.to(tl.float64))
    tl.store(record + 4, flags.to(tl.float64))
