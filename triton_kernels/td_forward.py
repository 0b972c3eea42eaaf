"""Temporal differences on the GPU: discounts, values ahead, and the forward scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair
from .launch import Constant, unpair
from .rows import load_valid
from .scans import (
    AGGREGATES,
    WHOLE,
    Map,
    advanced,
    at_row,
    either,
    handed_on,
    not_finite,
    paired,
    plus,
    product,
    record_of,
    rounded,
    row_part,
    scaled,
    scan_start,
    scan_threads,
    store_map,
    weighted,
    where_pair,
    widened,
)
from .tiles import (
    from_before,
    load_flags,
    load_tokens,
    of_first,
    store_tokens,
    tile_of,
    write_gaps,
)

# Representations of a discount.
NUMBER = Constant(0)
PER_ROW = Constant(1)
PER_TOKEN = Constant(2)


class Discounts(NamedTuple):
    """The discounts of a row in float64; those that are given per token are not used."""

    gamma: Any
    lam: Any


class Inputs(NamedTuple):
    """Pointers to a row's first tokens."""

    rewards: Any
    value: Any
    rho: Any
    trace: Any
    gammas: Any
    lambdas: Any
    mask: Any


class Outputs(NamedTuple):
    advantages: Any
    returns: Any


class Ahead(NamedTuple):
    """What the tokens before a part of a row look ahead to."""

    value: Any
    begun: Any  # int32: whether there is a valid token
    beyond: Any  # the value after the last step of the row


@triton.jit
def load_discount(high, low, discounts, row, KIND: tl.constexpr):
    value = unpair(high, low, tl.float64)
    if KIND == PER_ROW:
        value = tl.load(discounts + row.number)
    return value


@triton.jit
def load_factors(factors, tile, HAS: tl.constexpr, PER: tl.constexpr, ALIGNED: tl.constexpr):
    """Factors of tokens, if there are any."""
    if HAS:
        return load_tokens(factors, tile, PER, ALIGNED)
    else:
        return ()


@triton.jit
def factor_at(factors, k, valid, DECAY: tl.constexpr):
    """The factor of a token; a masked token that is a step has none."""
    if DECAY:
        return tl.where(valid, factors[k], 1.0)
    else:
        return factors[k]


@triton.jit
def discount_at(number, factors, k, valid, ACC: tl.constexpr, KIND: tl.constexpr, DECAY: tl.constexpr):
    """The discount of a token as a pair; a masked token that is a step has that of the row."""
    if KIND == PER_TOKEN:
        if DECAY:
            return where_pair(valid, paired(factors[k], ACC), number)
        else:
            return paired(factors[k], ACC)
    else:
        return number


@triton.jit
def value_after(
    values, mask, end, length, bootstrap,
    VALUES: tl.constexpr, DECAY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the token before ``end`` looks ahead to; ``length`` is the end of the row."""
    value = bootstrap
    start = end
    begun = tl.zeros([], tl.int32)
    while (start < length) & (begun == 0):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, at, at < length, HAS_MASK)
        first = tl.min(tl.where(valid, at, length), 0)
        if first < length:
            begun += 1
            if VALUES:
                value = tl.load(values + first).to(value.dtype)
                if DECAY:
                    value = tl.where(first == end, value, 0.0)
        start += BLOCK
    return Ahead(value, begun, bootstrap)


@triton.jit
def look_ahead(ahead, valid, v, tile, ACC: tl.constexpr, DECAY: tl.constexpr):
    """What every thread's last token looks ahead to, and the first thread's in the next tile; ``v`` may be empty.

    Skipped tokens hand on the value after them. Masked tokens that are steps are worth 0.
    """
    PER: tl.constexpr = len(valid)
    some = tl.zeros(tile.start.shape, tl.int32)
    value = tl.zeros(tile.start.shape, ACC)
    for at in tl.static_range(PER - 1, -1, -1):
        some |= valid[at].to(tl.int32)
        if len(v) > 0:
            if not DECAY:
                value = tl.where(valid[at], v[at].to(ACC), value)
            elif at == 0:
                value = tl.where(valid[at], v[at].to(ACC), 0.0)
    if DECAY:
        some |= tl.where(tile.first, ahead.begun, 0)
        some = from_before(tl.associative_scan(some, 0, either), tile)
        value = from_before(value, tile)
        value = tl.where(some != 0, value, ahead.beyond)
        begin = Ahead(
            tl.where(tile.first, ahead.value, value), tl.where(tile.first, ahead.begun, some), ahead.beyond
        )
        return begin, Ahead(value, some, ahead.beyond)
    else:
        value, following = handed_on(value, some, ahead.value, tile)
        return Ahead(value, ahead.begun, ahead.beyond), Ahead(following, ahead.begun, ahead.beyond)


@triton.jit
def scan_row(
    p, out, d, row, start, ahead,
    VALUES: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr, LAMBDA: tl.constexpr,
    DECAY: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scan a row or its part, PER tokens a thread in ACC, and write the results; the part's map."""
    gamma = paired(d.gamma, ACC)
    lam = paired(d.lam, ACC)
    both = paired(d.gamma * d.lam, ACC)
    zero = tl.zeros([T], ACC)
    carry = Map(tl.full([T], 1.0, tl.float64), tl.zeros([T], tl.float64) + start)
    ahead = Ahead(zero + ahead.value.to(ACC), tl.zeros([T], tl.int32) + ahead.begun, ahead.beyond.to(ACC))
    for turn in range(0, tl.cdiv(row.end - row.begin, T * PER)):
        tile = tile_of(row.begin, row.end, turn, PER, T, True)
        valid = load_flags(p.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(p.rewards, tile, PER, ALIGNED)
        v = load_factors(p.value, tile, VALUES, PER, ALIGNED)
        rho = load_factors(p.rho, tile, RHO, PER, ALIGNED)
        trace = load_factors(p.trace, tile, TRACE, PER, ALIGNED)
        gammas = load_factors(p.gammas, tile, GAMMA == PER_TOKEN, PER, ALIGNED)
        lambdas = load_factors(p.lambdas, tile, LAMBDA == PER_TOKEN, PER, ALIGNED)
        begin = ahead
        if VALUES or DECAY:
            begin, ahead = look_ahead(ahead, valid, v, tile, ACC, DECAY)
        following = begin.value
        begun = begin.begun != 0
        # The tokens' maps, from the last one on, and their composition.
        slope = Pair(zero + 1.0, zero)
        y = Pair(zero, zero)
        steps = ()
        slopes = ()
        shifts = ()
        for at in tl.static_range(PER - 1, -1, -1):
            step = valid[at]
            reward = x[at].to(ACC)
            if DECAY:
                begun = begun | step
                step = begun
                reward = tl.where(valid[at], reward, 0.0)
            g = discount_at(gamma, gammas, at, valid[at], ACC, GAMMA, DECAY)
            a = both
            if GAMMA == PER_TOKEN or LAMBDA == PER_TOKEN:
                a = product(g, discount_at(lam, lambdas, at, valid[at], ACC, LAMBDA, DECAY))
            if TRACE:
                a = scaled(a, factor_at(trace, at, valid[at], DECAY).to(ACC))
            shift = Pair(reward, zero)
            if VALUES:
                value = v[at].to(ACC)
                if DECAY:
                    value = tl.where(valid[at], value, 0.0)
                shift = plus(plus(scaled(g, following), reward), -value)
                following = tl.where(step, value, following)
            if RHO:
                shift = weighted(shift, factor_at(rho, at, valid[at], DECAY).to(ACC))
            y = where_pair(step, advanced(y, a, shift), y)
            slope = where_pair(step, product(slope, a), slope)
            steps = steps + (step,)  # noqa: RUF005 (the compiler knows no stars)
            slopes = slopes + (a,)  # noqa: RUF005
            shifts = shifts + (shift,)  # noqa: RUF005
        own = Map(widened(slope), widened(y))
        begin, carry = scan_threads(own, carry, tile, ACC)
        if STAGE != AGGREGATES:
            y = paired(begin, ACC)
            advantages = ()
            returns = ()
            for at in tl.static_range(PER - 1, -1, -1):
                y = where_pair(
                    steps[PER - 1 - at], advanced(y, slopes[PER - 1 - at], shifts[PER - 1 - at]), y
                )
                advantages = (tl.where(valid[at], y.sum + y.rest, 0.0),) + advantages  # noqa: RUF005
                if VALUES:
                    returns = (tl.where(valid[at], rounded(y, v[at].to(ACC)), 0.0),) + returns  # noqa: RUF005
            store_tokens(out.advantages, tile, advantages, PER, ALIGNED)
            if VALUES:
                store_tokens(out.returns, tile, returns, PER, ALIGNED)
    return Map(of_first(carry.slope, T), of_first(carry.shift, T))


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "chunks", "chunk", "rewards_stride", "values_stride", "mask_stride",
        "rho_stride", "trace_stride", "gammas_stride", "lambdas_stride", "out_stride",
    ]
)  # fmt: skip
def td_kernel(
    rewards, values, bootstrap, rho, trace, gammas, lambdas, mask, cu, out, returns, state,
    batch, width, total, chunks, chunk,
    rewards_stride, values_stride, mask_stride, rho_stride, trace_stride, gammas_stride, lambdas_stride,
    out_stride, gamma_high, gamma_low, lam_high, lam_low,
    VALUES: tl.constexpr, BOOT: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, STAGE: tl.constexpr,
    ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c): row b, or its chunk c. STAGE as in ``scans``; GAMMA, LAMBDA: representations of discounts."""
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, chunk, STAGE, PACKED)
    if STAGE != AGGREGATES and c == 0:
        write_gaps(out, cu, b, batch, total, T, PACKED)
        if VALUES:
            write_gaps(returns, cu, b, batch, total, T, PACKED)
    if row.end > row.begin:
        p = Inputs(
            at_row(rewards, row, rewards_stride), at_row(values, row, values_stride), at_row(rho, row, rho_stride),
            at_row(trace, row, trace_stride), at_row(gammas, row, gammas_stride),
            at_row(lambdas, row, lambdas_stride), at_row(mask, row, mask_stride),
        )  # fmt: skip
        results = Outputs(at_row(out, row, out_stride), at_row(returns, row, out_stride))
        d = Discounts(
            load_discount(gamma_high, gamma_low, gammas, row, GAMMA),
            load_discount(lam_high, lam_low, lambdas, row, LAMBDA),
        )
        boot = tl.zeros([], out.dtype.element_ty)
        if BOOT:
            boot = tl.load(bootstrap + b)
        ahead = Ahead(boot, tl.zeros([], tl.int32), boot)
        if (VALUES or DECAY) and STAGE != WHOLE:
            ahead = value_after(p.value, p.mask, row.end, row.length, boot, VALUES, DECAY, HAS_MASK, T)
        start = scan_start(state, row, c, chunks, chunk, STAGE, MAX_CHUNKS, True)
        part = scan_row(
            p, results, d, row, start, ahead,
            VALUES, RHO, TRACE, GAMMA, LAMBDA, DECAY, HAS_MASK, STAGE, ALIGNED, boot.dtype, PER, T,
        )  # fmt: skip
        if boot.dtype == tl.float32:  # noqa: SIM102 (known when compiled; the map is not)
            if not_finite(part):
                part = scan_row(
                    p, results, d, row, start, ahead,
                    VALUES, RHO, TRACE, GAMMA, LAMBDA, DECAY, HAS_MASK, STAGE, False, tl.float64, 1, T,
                )  # fmt: skip
        if STAGE == AGGREGATES:
            store_map(record_of(state, row, c, chunks), part)
