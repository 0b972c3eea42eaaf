"""The gradient of temporal differences on the GPU: a scan with time, and a pass for the values."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
from .td_forward import discount_at, end_of_steps, load_discount, load_factor


class Upstream(NamedTuple):
    """Pointers to a row's incoming gradients."""

    advantages: Any
    returns: Any


@triton.jit
def load_upstream(upstream, at, valid, GRAD: tl.constexpr, THROUGH: tl.constexpr, BLOCK: tl.constexpr):
    """The upstream gradient of the scan's result, which is the advantage, and a term of the return."""
    up = tl.zeros([BLOCK], tl.float64)
    if GRAD:
        up += tl.load(upstream.advantages + at, mask=valid, other=0.0).to(tl.float64)
    if THROUGH:
        up += tl.load(upstream.returns + at, mask=valid, other=0.0).to(tl.float64)
    return up


@triton.jit(
    do_not_specialize=[
        "width", "total", "chunks", "mask_stride", "rho_stride", "trace_stride", "gammas_stride", "lambdas_stride",
        "grad_stride", "through_stride", "out_stride",
    ]
)  # fmt: skip
def td_backward_kernel(
    grad, grad_returns, rho, trace, gammas, lambdas, mask, cu, out, passed, state, width, total, chunks,
    mask_stride, rho_stride, trace_stride, gammas_stride, lambdas_stride, grad_stride, through_stride, out_stride,
    gamma_high, gamma_low, lam_high, lam_low,
    GRAD: tl.constexpr, THROUGH: tl.constexpr, RHO: tl.constexpr, TRACE: tl.constexpr, GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr, DECAY: tl.constexpr, PASS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    STAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, c), options as in ``td_kernel``: ``u[t] = g[t] + s[t-]`` with ``s = factor (g + s[t-])``.

    The scan over s runs one token behind. ``passed`` is rho u in float64 at all tokens, masked ones included, for
    the values' gradient.
    """
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = row_part(cu, b, c, width, total, STAGE, CHUNK, PACKED)
    upstream = Upstream(at_row(grad, row, grad_stride), at_row(grad_returns, row, through_stride))
    rho = at_row(rho, row, rho_stride)
    trace = at_row(trace, row, trace_stride)
    mask = at_row(mask, row, mask_stride)
    out = at_row(out, row, out_stride)
    passed = at_row(passed, row, out_stride)
    gamma = load_discount(gamma_high, gamma_low, gammas, row, gammas_stride, GAMMA)
    lam = load_discount(lam_high, lam_low, lambdas, row, lambdas_stride, LAMBDA)
    steps_end = end_of_steps(mask, row.length, DECAY, HAS_MASK, BLOCK)
    record = record_of(state, row, c, chunks)
    carry = scan_start(record, STAGE)
    for start in range(row.begin, row.end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # The token whose map is scanned at this position: the one before, or for an aggregate the token itself.
        t = at if STAGE == AGGREGATES else at - 1
        inside = (t >= row.begin) & (t < row.end)
        valid = load_valid(mask, t, inside, HAS_MASK)
        up = load_upstream(upstream, t, valid, GRAD, THROUGH, BLOCK)
        a = discount_at(gamma, t, valid, GAMMA)
        a = a * discount_at(lam, t, valid, LAMBDA)
        if TRACE:
            a = a * load_factor(trace + t, valid)
        step = valid
        if DECAY:
            step = inside & (t < steps_end)
            a = tl.where(step & (valid == 0), gamma.value * lam.value, a)
        a = tl.where(step, a, 1.0)
        s, carry = scan_block(a, tl.where(step, times(a, up), 0.0), carry, STAGE, BLOCK)
        if STAGE != AGGREGATES:
            inside = at < row.end
            valid = load_valid(mask, at, inside, HAS_MASK)
            u = s + load_upstream(upstream, at, valid, GRAD, THROUGH, BLOCK)
            if RHO:
                u = times(load_factor(rho + at, valid), u)
            tl.store(out + at, tl.where(valid, u, 0.0).to(out.dtype.element_ty), mask=inside)
            if PASS:
                tl.store(passed + at, u, mask=inside)
    if STAGE == AGGREGATES:
        store_map(record, carry)


@triton.jit(
    do_not_specialize=["width", "total", "mask_stride", "gammas_stride", "through_stride", "out_stride"]
)
def td_values_kernel(
    passed, grad_returns, gammas, mask, cu, out, on_bootstrap, width, total, mask_stride, gammas_stride,
    through_stride, out_stride, gamma_high, gamma_low,
    THROUGH: tl.constexpr, VALUES: tl.constexpr, BOOT: tl.constexpr, GAMMA: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: gamma rho u of the token before, minus the token's own rho u, plus the gradient of its return."""
    b = tl.program_id(0)
    row = row_part(cu, b, b, width, total, WHOLE, 0, PACKED)
    passed = at_row(passed, row, out_stride)
    grad_returns = at_row(grad_returns, row, through_stride)
    mask = at_row(mask, row, mask_stride)
    out = at_row(out, row, out_stride)
    gamma = load_discount(gamma_high, gamma_low, gammas, row, gammas_stride, GAMMA)
    steps_end = end_of_steps(mask, row.length, DECAY, HAS_MASK, BLOCK)
    carry = tl.zeros([], tl.float64)
    # One position beyond the last token: the bootstrap value after the row.
    for start in range(0, row.length + 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, at, at < row.length, HAS_MASK)
        has_before = (at > 0) & (at <= row.length)
        before = load_valid(mask, at - 1, has_before, HAS_MASK)
        g = discount_at(gamma, at - 1, before, GAMMA)
        if DECAY:
            before = has_before & (at <= steps_end)
            g = gamma.value
        from_before = times(g, tl.load(passed + at - 1, mask=before, other=0.0))
        value, any_before = tl.associative_scan((from_before, before.to(tl.int32)), 0, latest)
        value = tl.where(any_before != 0, value, carry)
        carry = last_of(value, BLOCK)
        if VALUES:
            value = value - tl.load(passed + at, mask=valid, other=0.0)
            if THROUGH:
                value += tl.load(grad_returns + at, mask=valid, other=0.0).to(tl.float64)
            tl.store(out + at, tl.where(valid, value, 0.0).to(out.dtype.element_ty), mask=at < row.length)
    if BOOT:
        tl.store(on_bootstrap + b, carry.to(on_bootstrap.dtype.element_ty))
