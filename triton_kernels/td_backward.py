"""The gradient of temporal differences on the GPU: one scan with time."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import Pair
from .launch import Constant
from .scans import (
    AGGREGATES,
    RESUMED,
    SHIFT,
    SLOPE,
    Map,
    at_row,
    compose_any,
    handed_on,
    last_of,
    not_finite,
    paired,
    plus,
    product,
    row_part,
    scaled,
    scan_threads,
    weighted,
    where_pair,
    widened,
)
from .td_forward import (
    PER_TOKEN,
    Discounts,
    discount_at,
    factor_at,
    load_discount,
    load_factors,
)
from .tiles import from_before, load_flags, of_first, store_tokens, tile_of, write_gaps

# Further fields of a chunk's record: what it passes to the values after it, as a map of what it starts with.
PASSED = Constant(2)
PASSED_SLOPE = Constant(3)
ANY = Constant(4)  # 1 if it passes anything, else 0
FIELDS = Constant(5)


class Upstream(NamedTuple):
    """Pointers to a row's first tokens."""

    advantages: Any
    returns: Any
    rho: Any
    trace: Any
    gammas: Any
    lambdas: Any
    mask: Any


class Gradients(NamedTuple):
    rewards: Any
    critic: Any


class Carry(NamedTuple):
    """What is carried from a part of a row to the next: ``s``, and what a token passes to the value after it."""

    map: Any  # of s
    passed: Any  # float64
    passed_slope: Any  # its derivative with respect to the s that the part starts with
    any: Any  # int32, whether anything is passed
    beyond: Any  # what the latest valid token passes, float64
    odd: Any  # NaN if a gradient is not finite, else 0


@triton.jit
def with_upstream(s, grads, throughs, k, valid, DECAY: tl.constexpr):
    """The gradient of a token's advantage: what is carried to it, and the upstream gradients."""
    if len(grads) > 0:
        s = plus(s, upstream_at(grads, k, valid, s.sum.dtype, DECAY))
    if len(throughs) > 0:
        s = plus(s, upstream_at(throughs, k, valid, s.sum.dtype, DECAY))
    return s


@triton.jit
def upstream_at(grads, k, valid, ACC: tl.constexpr, DECAY: tl.constexpr):
    """The upstream gradient of a token; a masked token that is a step has none."""
    if DECAY:
        return tl.where(valid, grads[k].to(ACC), 0.0)
    else:
        return grads[k].to(ACC)


@triton.jit
def passed_on(value, some, carried, tile, DECAY: tl.constexpr):
    """What is passed to every thread's first token, and the first thread's in the next tile."""
    if DECAY:
        value = from_before(value, tile)
        return tl.where(tile.first, carried, value), value
    else:
        return handed_on(value, some, carried, tile)


@triton.jit
def scan_row_backward(
    p, out, d, row, start, passed,
    GRAD: tl.constexpr, THROUGH: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr, DECAY: tl.constexpr, PASS: tl.constexpr, VALUES: tl.constexpr, HAS_MASK: tl.constexpr,
    STAGE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scan a row or its part, PER tokens a thread in ACC, and write the results; what the part carries on."""
    gamma = paired(d.gamma, ACC)
    lam = paired(d.lam, ACC)
    both = paired(d.gamma * d.lam, ACC)
    zero = tl.zeros([T], ACC)
    wide = tl.zeros([T], tl.float64)
    none = tl.zeros([T], tl.int32)
    carry = Carry(Map(wide + 1.0, wide + start), wide + passed, wide, none, wide + passed, zero)
    for turn in range(0, tl.cdiv(row.end - row.begin, T * PER)):
        tile = tile_of(row.begin, row.end, turn, PER, T, False)
        valid = load_flags(p.mask, tile, HAS_MASK, PER, ALIGNED)
        grads = load_factors(p.advantages, tile, GRAD, PER, ALIGNED)
        throughs = load_factors(p.returns, tile, THROUGH, PER, ALIGNED)
        rho = load_factors(p.rho, tile, RHO, PER, ALIGNED)
        trace = load_factors(p.trace, tile, TRACE, PER, ALIGNED)
        gammas = load_factors(p.gammas, tile, GAMMA == PER_TOKEN, PER, ALIGNED)
        lambdas = load_factors(p.lambdas, tile, LAMBDA == PER_TOKEN, PER, ALIGNED)
        slope = Pair(zero + 1.0, zero)
        s = Pair(zero, zero)
        steps = ()
        slopes = ()
        for k in tl.static_range(PER):
            step = valid[k]
            if DECAY:
                step = tile.start + k < tile.left
            a = both
            if GAMMA == PER_TOKEN or LAMBDA == PER_TOKEN:
                a = product(
                    discount_at(gamma, gammas, k, valid[k], ACC, GAMMA, DECAY),
                    discount_at(lam, lambdas, k, valid[k], ACC, LAMBDA, DECAY),
                )
            if TRACE:
                a = scaled(a, factor_at(trace, k, valid[k], DECAY).to(ACC))
            s = where_pair(step, product(a, with_upstream(s, grads, throughs, k, valid[k], DECAY)), s)
            slope = where_pair(step, product(slope, a), slope)
            steps = steps + (step,)  # noqa: RUF005 (the compiler knows no stars)
            slopes = slopes + (a,)  # noqa: RUF005
        begin, scanned = scan_threads(Map(widened(slope), widened(s)), carry.map, tile, ACC)
        s = paired(begin, ACC)
        slope = paired(tl.where(tile.first, carry.map.slope, scanned.slope), ACC)
        odd = carry.odd
        some = none != 0
        p_own = Pair(zero, zero)  # what the latest step has passed
        p_slope = Pair(zero, zero)
        p_valid = Pair(zero, zero)
        first = Pair(
            zero, zero
        )  # the gradient of the value of the first valid token, but for what is passed to it
        at_first = ()
        on_rewards = ()
        on_values = ()
        for k in tl.static_range(PER):
            u = with_upstream(s, grads, throughs, k, valid[k], DECAY)
            ru = u
            if RHO:
                weight = factor_at(rho, k, valid[k], DECAY).to(ACC)
                ru = weighted(u, weight)
                odd = tl.where(valid[k], odd + ru.sum * 0.0, odd)
            on_rewards = on_rewards + (tl.where(valid[k], ru.sum + ru.rest, 0.0),)  # noqa: RUF005
            if PASS:
                value = plus(p_own, -ru.sum)
                value = Pair(value.sum, value.rest - ru.rest)
                if THROUGH:
                    value = plus(value, throughs[k].to(ACC))
                if DECAY:  # noqa: SIM108 (the compiler knows it)
                    is_first = valid[k] & (k == 0)
                else:
                    is_first = valid[k] & (some == 0)
                first = where_pair(is_first, value, first)
                at_first = at_first + (is_first,)  # noqa: RUF005
                on_values = on_values + (tl.where(valid[k], value.sum + value.rest, 0.0),)  # noqa: RUF005
                g = discount_at(gamma, gammas, k, valid[k], ACC, GAMMA, DECAY)
                p_own = where_pair(steps[k], product(g, ru), p_own)
                if DECAY:
                    p_valid = where_pair(valid[k], p_own, p_valid)
                if STAGE == AGGREGATES:
                    further = slope
                    if RHO:
                        further = weighted(slope, weight)
                    p_slope = where_pair(steps[k], product(g, further), p_slope)
                    slope = where_pair(steps[k], product(slope, slopes[k]), slope)
                some = some | valid[k]
            s = where_pair(steps[k], product(slopes[k], u), s)
        if STAGE != AGGREGATES:
            store_tokens(out.rewards, tile, on_rewards, PER, ALIGNED)
        on = carry.passed
        passed_slope = carry.passed_slope
        beyond = carry.beyond
        handed = carry.any
        if PASS:
            into, on = passed_on(widened(p_own), some.to(tl.int32), carry.passed, tile, DECAY)
            if STAGE == AGGREGATES:
                _, passed_slope = passed_on(
                    widened(p_slope), some.to(tl.int32), carry.passed_slope, tile, DECAY
                )
                handed = handed | tl.max(some.to(tl.int32), 0)
                if DECAY:
                    handed = none + 1
            beyond = on
            if DECAY:
                _, beyond = passed_on(widened(p_valid), some.to(tl.int32), carry.beyond, tile, False)
            if VALUES and STAGE != AGGREGATES:
                into = paired(into, ACC)
                first = plus(first, into.sum)
                of_first_token = first.sum + (first.rest + into.rest)
                results = ()
                for k in tl.static_range(PER):
                    results = results + (tl.where(at_first[k], of_first_token, on_values[k]),)  # noqa: RUF005
                store_tokens(out.critic, tile, results, PER, ALIGNED)
        carry = Carry(scanned, on, passed_slope, handed, beyond, odd)
    return Carry(
        Map(of_first(carry.map.slope, T), of_first(carry.map.shift, T)),
        of_first(carry.passed, T), of_first(carry.passed_slope, T), tl.max(carry.any, 0),
        of_first(carry.beyond, T), tl.sum(carry.odd, 0).to(tl.float64),
    )  # fmt: skip


@triton.jit
def start_of_chunk(state, row, c, chunks, STAGE: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """What the chunks before chunk c carry on to it."""
    s = tl.zeros([], tl.float64)
    passed = tl.zeros([], tl.float64)
    if STAGE == RESUMED:
        lane = tl.arange(0, MAX_CHUNKS)
        record = state + (row.number * chunks + lane) * FIELDS
        slope = tl.load(record + SLOPE, mask=lane < c, other=1.0)
        shift = tl.load(record + SHIFT, mask=lane < c, other=0.0)
        _, after = tl.associative_scan((slope, shift), 0, compose_any)
        s = last_of(after, MAX_CHUNKS)
        start = tl.where(lane == 0, 0.0, tl.gather(after, tl.maximum(lane - 1, 0), 0))
        some = tl.load(record + ANY, mask=lane < c, other=0.0) != 0
        by_start = tl.load(record + PASSED_SLOPE, mask=lane < c, other=0.0)
        by_start = tl.where(by_start == 0.0, 0.0, by_start * start)
        value = tl.load(record + PASSED, mask=lane < c, other=0.0) + by_start
        last = tl.max(tl.where(some, lane, -1), 0)
        passed = tl.sum(tl.where(lane == last, value, 0.0), 0)
    return s, passed


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "chunks", "chunk", "mask_stride", "rho_stride", "trace_stride", "gammas_stride",
        "lambdas_stride", "grad_stride", "through_stride", "out_stride",
    ]
)  # fmt: skip
def td_backward_kernel(
    grad, grad_returns, rho, trace, gammas, lambdas, mask, cu, out, on_values, on_bootstrap, state,
    batch, width, total, chunks, chunk,
    mask_stride, rho_stride, trace_stride, gammas_stride, lambdas_stride, grad_stride, through_stride, out_stride,
    gamma_high, gamma_low, lam_high, lam_low,
    GRAD: tl.constexpr, THROUGH: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr, DECAY: tl.constexpr, VALUES: tl.constexpr, BOOT: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, STAGE: tl.constexpr, ALIGNED: tl.constexpr, MAX_CHUNKS: tl.constexpr,
    PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, c), options as in ``td_kernel``: ``u[t] = g[t] + s[t-]`` with ``s = factor (g + s[t-])``.

    A reward has rho u, a value what the token before passes to it, gamma rho u, minus its own rho u, plus the
    gradient of its return.
    """
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, chunk, STAGE, PACKED)
    PASS: tl.constexpr = VALUES or BOOT
    if STAGE != AGGREGATES and c == 0:
        write_gaps(out, cu, b, batch, total, T, PACKED)
        if VALUES:
            write_gaps(on_values, cu, b, batch, total, T, PACKED)
        if BOOT:  # noqa: SIM102 (known when compiled; the length is not)
            if row.length == 0:
                tl.store(on_bootstrap + b, 0.0)
    if row.end > row.begin:
        p = Upstream(
            at_row(grad, row, grad_stride), at_row(grad_returns, row, through_stride),
            at_row(rho, row, rho_stride), at_row(trace, row, trace_stride), at_row(gammas, row, gammas_stride),
            at_row(lambdas, row, lambdas_stride), at_row(mask, row, mask_stride),
        )  # fmt: skip
        results = Gradients(at_row(out, row, out_stride), at_row(on_values, row, out_stride))
        d = Discounts(
            load_discount(gamma_high, gamma_low, gammas, row, GAMMA),
            load_discount(lam_high, lam_low, lambdas, row, LAMBDA),
        )
        ACC: tl.constexpr = out.dtype.element_ty
        start, passed = start_of_chunk(state, row, c, chunks, STAGE, MAX_CHUNKS)
        part = scan_row_backward(
            p, results, d, row, start, passed, GRAD, THROUGH, RHO, TRACE, GAMMA, LAMBDA, DECAY, PASS, VALUES,
            HAS_MASK, STAGE, ALIGNED, ACC, PER, T,
        )  # fmt: skip
        if tl.float32 == ACC:  # noqa: SIM102 (known when compiled; the map is not)
            if not_finite(Map(part.map.slope + part.odd, part.map.shift)):
                part = scan_row_backward(
                    p, results, d, row, start, passed, GRAD, THROUGH, RHO, TRACE, GAMMA, LAMBDA, DECAY, PASS,
                    VALUES, HAS_MASK, STAGE, False, tl.float64, 1, T,
                )  # fmt: skip
        if STAGE == AGGREGATES:
            record = state + (row.number * chunks + c) * FIELDS
            tl.store(record + SHIFT, part.map.shift)
            tl.store(record + SLOPE, part.map.slope)
            tl.store(record + PASSED, part.passed)
            tl.store(record + PASSED_SLOPE, part.passed_slope)
            tl.store(record + ANY, part.any.to(tl.float64))
        elif BOOT:  # noqa: SIM102 (known when compiled; the end is not)
            if row.end == row.length:
                tl.store(on_bootstrap + b, part.beyond.to(on_bootstrap.dtype.element_ty))
