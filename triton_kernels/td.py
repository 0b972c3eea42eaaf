"""Discounted sums and temporal differences on the GPU: linear scans in float64, a block at a time with a carry.

Moved forward: rewards, values and mask once, and two writes; backward: the gradients and mask once, one write, and
one more read and write for the values. Blocks are read in decreasing time, so that every reverse scan is a forward
one. A few long rows are cut into chunks: a pass for their aggregates, one program a row for the carries, a pass to
write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, cdiv, multiprocessors, pair, pointer
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

BLOCK = 64 if INTERPRETED else 256
CHUNK = 256 if INTERPRETED else 16384


@triton.jit
def times(factor, value):
    """0 where the factor is, whatever the value."""
    return factor * tl.where(factor == 0.0, 0.0, value)


@triton.jit
def compose(a, x, b, y):
    """The map ``v -> x + a v``, then ``v -> y + b v``."""
    return a * b, y + times(b, x)


@triton.jit
def last_of(x, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


@triton.jit
def latest(a, a_seen, b, b_seen):
    """Of two neighbouring stretches what was seen last, if anything was."""
    return tl.where(b_seen != 0, b, a), a_seen | b_seen


@triton.jit
def number(high, low, per_row, b, ROW: tl.constexpr):
    if ROW:
        return tl.load(per_row + b)
    else:
        return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def load_or(value, pointers, valid, GIVEN: tl.constexpr):
    """A factor per token where it is given, else the number; 1 where not valid."""
    if GIVEN:
        return tl.load(pointers, mask=valid, other=1.0).to(tl.float64)
    else:
        return tl.where(valid, value, 1.0)


@triton.jit
def live_tokens(mask, mask_base, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """One past the last valid token."""
    live = length
    if HAS_MASK:
        live = length * 0
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(mask, mask_base + at, at < length, HAS_MASK)
            live = tl.maximum(live, tl.max(tl.where(valid, at + 1, 0), 0).to(tl.int64))
    return live


@triton.jit
def chunk_bounds(c, length, STAGE: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of chunk c of a row; in STAGE 0 all of them."""
    begin = length * 0
    end = length
    if STAGE > 0:
        begin = tl.minimum(length, c.to(tl.int64) * CHUNK)
        end = tl.minimum(length, begin + CHUNK)
    return begin, end


@triton.jit
def value_after(
    values, values_base, mask, mask_base, end, length, boot,
    DECAY: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The value that the token before ``end`` looks ahead to; ``length`` is where the row ends."""
    value = boot
    found = end >= length
    start = end
    while (start < length) & (found == 0):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, mask_base + at, at < length, HAS_MASK)
        first = tl.min(tl.where(valid, at, length), 0)
        if DECAY:
            value = tl.where(first == end, tl.load(values + values_base + end).to(tl.float64), 0.0)
            found = start >= start
        else:
            if first < length:
                value = tl.load(values + values_base + first).to(tl.float64)
                found = start >= start
        start += BLOCK
    return value


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
    """Program (b, c): row b, or its chunk c. STAGE 0: the whole row; 1: aggregates only; 2: from given carries.

    GAMMA and LAMBDA: 0 a number, 1 per row, 2 per token.
    """
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    mask_base = base + row * mask_stride
    live = length
    if DECAY:
        live = live_tokens(mask, mask_base, length, HAS_MASK, BLOCK)
    begin, end = chunk_bounds(c, length, STAGE, CHUNK)
    gamma = number(gamma_high, gamma_low, gammas, b, GAMMA == 1)
    lam = number(lam_high, lam_low, lambdas, b, LAMBDA == 1)
    boot = tl.zeros([], tl.float64)
    if BOOT:
        boot = tl.load(bootstrap + b).to(tl.float64)
    values_base = base + row * values_stride
    carry = tl.zeros([], tl.float64)
    product = tl.full([], 1.0, tl.float64)
    if STAGE == 2:
        carry = tl.load(state + (row * chunks + c) * 2)
    ahead = boot
    if VALUES and STAGE > 0:
        ahead = value_after(values, values_base, mask, mask_base, end, live, boot, DECAY, HAS_MASK, BLOCK)
    for done in range(0, end - begin, BLOCK):
        at = end - 1 - done - tl.arange(0, BLOCK)
        inside = at >= begin
        valid = load_valid(mask, mask_base + at, inside, HAS_MASK)
        x = tl.load(rewards + base + row * rewards_stride + at, mask=valid, other=0.0).to(tl.float64)
        g = load_or(gamma, gammas + base + row * gammas_stride + at, valid, GAMMA == 2)
        a = g * load_or(lam, lambdas + base + row * lambdas_stride + at, valid, LAMBDA == 2)
        if DECAY:
            step = inside & (at < live)
            g = tl.where(step & (valid == 0), gamma, g)
            a = tl.where(step & (valid == 0), gamma * lam, a)
        else:
            step = valid
        v = tl.zeros([BLOCK], tl.float64)
        if VALUES:
            v = tl.load(values + values_base + at, mask=valid, other=0.0).to(tl.float64)
            later = at + 1
            there = inside & (later < end)
            later_valid = load_valid(mask, mask_base + later, there, HAS_MASK)
            w = tl.load(values + values_base + later, mask=later_valid, other=0.0).to(tl.float64)
            if DECAY:
                # What lies beyond the row, or in the next chunk, is `ahead`.
                first = tl.where(later < live, w, boot)
                first = tl.where(later == end, ahead, first)
                x = x + times(g, first) - v
                x = tl.where(step, x, 0.0)
            else:
                near, seen = tl.associative_scan((w, later_valid.to(tl.int32)), 0, latest)
                near = tl.where(seen != 0, near, ahead)
                x = x + times(g, near) - v
                # What the next block looks ahead to: past the last token read.
                ahead = last_of(near, BLOCK)
                if HAS_MASK:
                    is_last = tl.arange(0, BLOCK) == BLOCK - 1
                    mine = tl.sum(tl.where(is_last & valid, 1, 0), 0)
                    ahead = tl.where(mine != 0, last_of(v, BLOCK), ahead)
                else:
                    ahead = last_of(v, BLOCK)
        if RHO:
            x = times(load_or(1.0, rho + base + row * rho_stride + at, valid, True), x)
        if TRACE:
            a = a * load_or(1.0, trace + base + row * trace_stride + at, valid, True)
        x = tl.where(step, x, 0.0)
        a = tl.where(step, a, 1.0)
        through, y = tl.associative_scan((a, x), 0, compose)
        y = y + times(through, carry)
        if STAGE == 1:
            product *= last_of(through, BLOCK)
        else:
            where = base + row * out_stride + at
            kind = out.dtype.element_ty
            tl.store(out + where, tl.where(valid, y, 0.0).to(kind), mask=inside)
            if VALUES:
                tl.store(returns + where, tl.where(valid, y + v, 0.0).to(kind), mask=inside)
        carry = last_of(y, BLOCK)
    if STAGE == 1:
        tl.store(state + (row * chunks + c) * 2, carry)
        tl.store(state + (row * chunks + c) * 2 + 1, product)


@triton.jit(do_not_specialize=["chunks"])
def linear_carries_kernel(state, chunks, REVERSE: tl.constexpr):
    """Program b: from the aggregate of every chunk of a row to the carry that each starts with."""
    at = state + tl.program_id(0).to(tl.int64) * chunks * 2
    carry = tl.zeros([], tl.float64)
    for k in range(0, chunks):
        c = k
        if REVERSE:
            c = chunks - 1 - k
        value = tl.load(at + 2 * c)
        product = tl.load(at + 2 * c + 1)
        tl.store(at + 2 * c, carry)
        carry = value + times(product, carry)


@triton.jit
def upstream(grad, grad_returns, at, valid, GRAD: tl.constexpr, THROUGH: tl.constexpr, BLOCK: tl.constexpr):
    up = tl.zeros([BLOCK], tl.float64)
    if GRAD:
        up += tl.load(grad + at, mask=valid, other=0.0).to(tl.float64)
    if THROUGH:
        up += tl.load(grad_returns + at, mask=valid, other=0.0).to(tl.float64)
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
    """Program (b, c), stages as in :func:`td_kernel`: ``u[t] = g[t] + s[t-]`` with ``s = factor (g + s[t-])``.

    The scan over s runs one token behind. ``passed`` is rho u in float64, holes and all, for the values' gradient.
    """
    b = tl.program_id(0)
    c = tl.program_id(1)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    mask_base = base + row * mask_stride
    live = length
    if DECAY:
        live = live_tokens(mask, mask_base, length, HAS_MASK, BLOCK)
    begin, end = chunk_bounds(c, length, STAGE, CHUNK)
    gamma = number(gamma_high, gamma_low, gammas, b, GAMMA == 1)
    lam = number(lam_high, lam_low, lambdas, b, LAMBDA == 1)
    carry = tl.zeros([], tl.float64)
    product = tl.full([], 1.0, tl.float64)
    if STAGE == 2:
        carry = tl.load(state + (row * chunks + c) * 2)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        # Of the token whose map this place holds: the one before, or in an aggregate the token itself.
        t = at if STAGE == 1 else at - 1
        there = (t >= begin) & (t < end)
        valid = load_valid(mask, mask_base + t, there, HAS_MASK)
        up = upstream(
            grad + base + row * grad_stride, grad_returns + base + row * through_stride, t, valid, GRAD, THROUGH,
            BLOCK,
        )  # fmt: skip
        a = load_or(gamma, gammas + base + row * gammas_stride + t, valid, GAMMA == 2)
        a = a * load_or(lam, lambdas + base + row * lambdas_stride + t, valid, LAMBDA == 2)
        if TRACE:
            a = a * load_or(1.0, trace + base + row * trace_stride + t, valid, True)
        step = valid
        if DECAY:
            step = there & (t < live)
            a = tl.where(step & (valid == 0), gamma * lam, a)
        a = tl.where(step, a, 1.0)
        through, s = tl.associative_scan((a, tl.where(step, times(a, up), 0.0)), 0, compose)
        s = s + times(through, carry)
        carry = last_of(s, BLOCK)
        if STAGE == 1:
            product *= last_of(through, BLOCK)
        else:
            valid = load_valid(mask, mask_base + at, inside, HAS_MASK)
            u = s + upstream(
                grad + base + row * grad_stride, grad_returns + base + row * through_stride, at, valid, GRAD,
                THROUGH, BLOCK,
            )  # fmt: skip
            if RHO:
                u = times(load_or(1.0, rho + base + row * rho_stride + at, valid, True), u)
            where = base + row * out_stride + at
            tl.store(out + where, tl.where(valid, u, 0.0).to(out.dtype.element_ty), mask=inside)
            if PASS:
                tl.store(passed + where, u, mask=inside)
    if STAGE == 1:
        tl.store(state + (row * chunks + c) * 2, carry)
        tl.store(state + (row * chunks + c) * 2 + 1, product)


@triton.jit(
    do_not_specialize=["width", "total", "mask_stride", "gammas_stride", "through_stride", "out_stride"]
)
def td_values_kernel(
    passed, grad_returns, gammas, mask, cu, out, on_bootstrap, width, total, mask_stride, gammas_stride,
    through_stride, out_stride, gamma_high, gamma_low,
    THROUGH: tl.constexpr, VALUES: tl.constexpr, BOOT: tl.constexpr, GAMMA: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: gamma rho u of the token before, less the token's own rho u, plus the gradient of its return."""
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, length = row_bounds(cu, b, width, total, PACKED)
    mask_base = base + row * mask_stride
    where = base + row * out_stride
    gamma = number(gamma_high, gamma_low, gammas, b, GAMMA == 1)
    live = length
    if DECAY:
        live = live_tokens(mask, mask_base, length, HAS_MASK, BLOCK)
    held = tl.zeros([], tl.float64)
    # One place more than there are tokens: what follows the row.
    for start in range(0, length + 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = load_valid(mask, mask_base + at, at < length, HAS_MASK)
        there = (at > 0) & (at <= length)
        before = load_valid(mask, mask_base + at - 1, there, HAS_MASK)
        g = load_or(gamma, gammas + base + row * gammas_stride + at - 1, before, GAMMA == 2)
        if DECAY:
            before = there & (at <= live)
            g = gamma
        handed = times(g, tl.load(passed + where + at - 1, mask=before, other=0.0))
        near, seen = tl.associative_scan((handed, before.to(tl.int32)), 0, latest)
        near = tl.where(seen != 0, near, held)
        if VALUES:
            value = near - tl.load(passed + where + at, mask=valid, other=0.0)
            if THROUGH:
                through = grad_returns + base + row * through_stride + at
                value += tl.load(through, mask=valid, other=0.0).to(tl.float64)
            kind = out.dtype.element_ty
            tl.store(out + where + at, tl.where(valid, value, 0.0).to(kind), mask=at < length)
        held = last_of(near, BLOCK)
    if BOOT:
        tl.store(on_bootstrap + b, held.to(on_bootstrap.dtype.element_ty))


# ---- launch ------------------------------------------------------------------------------------------------


def _kind(factors: Tensor | None) -> int:
    if factors is None:
        return 0
    return 1 if factors.dim() == 2 and factors.shape[1] == 1 else 2


def _token_stride(factors: Tensor | None) -> int:
    return stride(factors) if _kind(factors) == 2 else 0


def chunks_of(rows: Rows, like: Tensor) -> int:
    """How many chunks each row is scanned in: several where rows alone do not fill the device."""
    if rows.batch >= multiprocessors(like) or rows.width < 2 * CHUNK:
        return 1
    return cdiv(rows.width, CHUNK)


def _factors(given: Tensor | None) -> Tensor | None:
    if given is None:
        return None
    return given.contiguous() if _kind(given) == 1 else dense(given)


def td_scan(
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
) -> tuple[Tensor, Tensor]:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    rewards, mask = dense(rewards), as_bytes(mask)
    values, rho, trace = (None if x is None else dense(x) for x in (values, rho, trace))
    gammas, lambdas = _factors(gammas), _factors(lambdas)
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    out = output(rewards, rewards.shape, rows.packed)
    returns = rewards.new_empty(0) if values is None else output(rewards, rewards.shape, rows.packed)
    if not out.numel() or not rows.batch:
        return out, returns
    chunks = chunks_of(rows, rewards)
    state = torch.empty((rows.batch, chunks, 2), dtype=torch.float64, device=rewards.device)
    given = (values, bootstrap, rho, trace, gammas, lambdas, mask)
    tokens = (rewards, *(pointer(x, rewards) for x in given), rows.cu, out, returns, state)
    strides = (stride(rewards), *(stride(x) for x in (values, mask, rho, trace)), _token_stride(gammas),
               _token_stride(lambdas), stride(out))  # fmt: skip

    def run(stage: int) -> None:
        td_kernel[(rows.batch, chunks)](
            *tokens, rows.width, rows.total, chunks, *strides, *pair(gamma), *pair(lam),
            VALUES=values is not None, BOOT=bootstrap is not None, RHO=rho is not None, TRACE=trace is not None,
            GAMMA=_kind(gammas), LAMBDA=_kind(lambdas), DECAY=decay and mask is not None, PACKED=rows.packed,
            HAS_MASK=mask is not None, STAGE=stage, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    _in_stages(run, state, rows.batch, chunks, True)
    return out, returns


def _in_stages(run, state: Tensor, batch: int, chunks: int, reverse: bool) -> None:  # type: ignore[no-untyped-def]
    if chunks == 1:
        run(0)
        return
    run(1)
    linear_carries_kernel[(batch,)](state, chunks, REVERSE=reverse, num_warps=1)
    run(2)


def td_scan_backward(
    grad: Tensor | None,
    grad_returns: Tensor | None,
    rewards: Tensor,
    rho: Tensor | None,
    trace: Tensor | None,
    gammas: Tensor | None,
    lambdas: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay: bool,
    has_values: bool,
    has_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows.of(rewards.shape, cu_seqlens, rewards)
    grad, grad_returns, rho, trace = (
        None if x is None else dense(x) for x in (grad, grad_returns, rho, trace)
    )
    gammas, lambdas, mask = _factors(gammas), _factors(lambdas), as_bytes(mask)
    decay = decay and mask is not None
    out = output(rewards, rewards.shape, rows.packed)
    on_values = output(rewards, rewards.shape, rows.packed) if has_values else rewards.new_empty(0)
    on_bootstrap = rewards.new_zeros(rows.batch if has_bootstrap else 0)
    if not out.numel() or not rows.batch:
        return out, on_values, on_bootstrap
    passes = has_values or has_bootstrap
    passed = rewards.new_empty(rewards.shape if passes else 0, dtype=torch.float64)
    chunks = chunks_of(rows, rewards)
    state = torch.empty((rows.batch, chunks, 2), dtype=torch.float64, device=rewards.device)
    given = (grad, grad_returns, rho, trace, gammas, lambdas, mask)
    tokens = (*(pointer(x, rewards) for x in given), rows.cu, out, passed, state)
    strides = (stride(mask), stride(rho), stride(trace), _token_stride(gammas), _token_stride(lambdas),
               stride(grad), stride(grad_returns), stride(out))  # fmt: skip
    flags = {
        "PACKED": rows.packed,
        "HAS_MASK": mask is not None,
        "DECAY": decay,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }

    def run(stage: int) -> None:
        td_backward_kernel[(rows.batch, chunks)](
            *tokens, rows.width, rows.total, chunks, *strides, *pair(gamma), *pair(lam), GRAD=grad is not None,
            THROUGH=grad_returns is not None, RHO=rho is not None, TRACE=trace is not None, GAMMA=_kind(gammas),
            LAMBDA=_kind(lambdas), PASS=passes, STAGE=stage, CHUNK=CHUNK, **flags,
        )  # fmt: skip

    _in_stages(run, state, rows.batch, chunks, False)
    if passes:
        td_values_kernel[(rows.batch,)](
            passed, pointer(grad_returns, rewards), pointer(gammas, rewards), pointer(mask, rewards), rows.cu,
            on_values, on_bootstrap, rows.width, rows.total, stride(mask), _token_stride(gammas),
            stride(grad_returns), stride(out), *pair(gamma), THROUGH=grad_returns is not None, VALUES=has_values,
            BOOT=has_bootstrap, GAMMA=_kind(gammas), **flags,
        )  # fmt: skip
    return out, on_values, on_bootstrap
