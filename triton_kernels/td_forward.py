"""Temporal differences on the GPU: discounts, values ahead, and the forward scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import Constant, unpair
from .rows import load_valid
from .scans import (
    AGGREGATES,
    WHOLE,
    at_row,
    last_of,
    latest,
    record_of,
    row_part,
    scan_block,
    scan_start,
    store_map,
    times,
)

# Representations of a discount.
NUMBER = Constant(0)
PER_ROW = Constant(1)
PER_TOKEN = Constant(2)


class Discount(NamedTuple):
    """A discount, gamma or lambda, of a row."""

    value: Any  # float64; meaningless where the discount is per token
    tokens: Any  # pointer to the row's discounts, read where it is per token


class Lookahead(NamedTuple):
    """The values that the tokens of a block look ahead to."""

    ahead: Any  # next values of the block, float64
    carry: Any  # the value that the latest token of the next block looks ahead to


@triton.jit
def load_discount(high, low, discounts, row, stride, KIND: tl.constexpr):
    value = unpair(high, low, tl.float64)
    if KIND == PER_ROW:
        value = tl.load(discounts + row.number)
    return Discount(value, at_row(discounts, row, stride))


@triton.jit
def load_factor(pointers, valid):
    """A factor per token; 1 where not valid."""
    return tl.load(pointers, mask=valid, other=1.0).to(tl.float64)


@triton.jit
def discount_at(discount, at, valid, KIND: tl.constexpr):
    """The discount of every token of a block; 1 where not valid."""
    if KIND == PER_TOKEN:
        return load_factor(discount.tokens + at, valid)
    else:
        return tl.where(valid, discount.value, 1.0)


@triton.jit
def end_of_steps(mask, length, DECAY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """One past the last token that is a step: with DECAY the last valid one, else the last of the row."""
    end = length
    if DECAY and HAS_MASK:
        end = length * 0
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(mask, at, at < length, HAS_MASK)
            end = tl.maximum(end, tl.max(tl.where(valid, at + 1, 0), 0).to(tl.int64))
    return end


@triton.jit
def value_after(
    values, mask, end, length, bootstrap,
    DECAY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The value that the token before ``end`` looks ahead to; ``length`` is the end of the row."""
    value = bootstrap
    done = end >= length
    start = end
    while (start < length) & (done == 0):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, at, at < length, HAS_MASK)
        first = tl.min(tl.where(valid, at, length), 0)
        if DECAY:
            value = tl.where(first == end, tl.load(values + end).to(tl.float64), 0.0)
            done = start >= start
        else:
            if first < length:
                value = tl.load(values + first).to(tl.float64)
                done = start >= start
        start += BLOCK
    return value


@triton.jit
def look_ahead(
    values, mask, v, at, valid, row, steps_end, bootstrap, carry,
    DECAY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `Lookahead` of a block in decreasing time with values ``v``."""
    later = at + 1
    later_valid = load_valid(mask, later, (at >= row.begin) & (later < row.end), HAS_MASK)
    later_v = tl.load(values + later, mask=later_valid, other=0.0).to(tl.float64)
    if DECAY:
        # Beyond the row it is the bootstrap value, beyond the chunk the carry.
        ahead = tl.where(later < steps_end, later_v, bootstrap)
        ahead = tl.where(later == row.end, carry, ahead)
    else:
        ahead, any_valid = tl.associative_scan((later_v, later_valid.to(tl.int32)), 0, latest)
        ahead = tl.where(any_valid != 0, ahead, carry)
        carry = last_of(v, BLOCK)
        if HAS_MASK:
            is_last = tl.arange(0, BLOCK) == BLOCK - 1
            last_valid = tl.sum(tl.where(is_last & valid, 1, 0), 0)
            carry = tl.where(last_valid != 0, carry, last_of(ahead, BLOCK))
    return Lookahead(ahead, carry)


@triton.jit(
    do_not_specialize=[
        "width", "total", "chunks", "rewards_stride", "values_stride", "mask_stride", "rho_stride", "trace_stride",
        "gammas_stride", "lambdas_stride", "out_stride",
    ]
)  # fmt: skip
def td_kernel(
    rewards, values, bootstrap, rho, trace, gammas, lambdas, mask, cu, out, returns, state, width, total, chunks,
    rewards_stride, values_stride, mask_stride, rho_stride, trace_stride, gammas_stride, lambdas_stride,
    out_stride, gamma_high, gamma_low, lam_high, lam_low,
    VALUES: tl.constexpr, BOOT: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, c): row b, or its chunk c. STAGE as in ``scans``; GAMMA, LAMBDA: representations of discounts."""
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, STAGE, CHUNK, PACKED)
    rewards = at_row(rewards, row, rewards_stride)
    values = at_row(values, row, values_stride)
    rho = at_row(rho, row, rho_stride)
    trace = at_row(trace, row, trace_stride)
    mask = at_row(mask, row, mask_stride)
    out = at_row(out, row, out_stride)
    returns = at_row(returns, row, out_stride)
    gamma = load_discount(gamma_high, gamma_low, gammas, row, gammas_stride, GAMMA)
    lam = load_discount(lam_high, lam_low, lambdas, row, lambdas_stride, LAMBDA)
    steps_end = end_of_steps(mask, row.length, DECAY, HAS_MASK, BLOCK)
    boot = tl.zeros([], tl.float64)
    if BOOT:
        boot = tl.load(bootstrap + b).to(tl.float64)
    ahead = boot
    if VALUES and STAGE != WHOLE:
        ahead = value_after(values, mask, row.end, steps_end, boot, DECAY, HAS_MASK, BLOCK)
    record = record_of(state, row, c, chunks)
    carry = scan_start(record, STAGE)
    for done in range(0, row.end - row.begin, BLOCK):
        at = row.end - 1 - done - tl.arange(0, BLOCK)
        inside = at >= row.begin
        valid = load_valid(mask, at, inside, HAS_MASK)
        x = tl.load(rewards + at, mask=valid, other=0.0).to(tl.float64)
        g = discount_at(gamma, at, valid, GAMMA)
        a = g * discount_at(lam, at, valid, LAMBDA)
        step = valid
        if DECAY:
            step = inside & (at < steps_end)
            g = tl.where(step & (valid == 0), gamma.value, g)
            a = tl.where(step & (valid == 0), gamma.value * lam.value, a)
        v = tl.zeros([BLOCK], tl.float64)
        if VALUES:
            v = tl.load(values + at, mask=valid, other=0.0).to(tl.float64)
            next_values, ahead = look_ahead(
                values, mask, v, at, valid, row, steps_end, boot, ahead, DECAY, HAS_MASK, BLOCK
            )
            x = x + times(g, next_values) - v
            if DECAY:
                x = tl.where(step, x, 0.0)
        if RHO:
            x = times(load_factor(rho + at, valid), x)
        if TRACE:
            a = a * load_factor(trace + at, valid)
        y, carry = scan_block(tl.where(step, a, 1.0), tl.where(step, x, 0.0), carry, STAGE, BLOCK)
        if STAGE != AGGREGATES:
            kind = out.dtype.element_ty
            tl.store(out + at, tl.where(valid, y, 0.0).to(kind), mask=inside)
            if VALUES:
                tl.store(returns + at, tl.where(valid, y + v, 0.0).to(kind), mask=inside)
    if STAGE == AGGREGATES:
        store_map(record, carry)
