"""Token statistics on the GPU: one read of the logits forward, one read and one write backward.

A row of V logits of e bytes moves V * e bytes forward and 2 * V * e backward; what is written per row, and the
partial statistics of a row that is split over programs, are nothing beside that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, cdiv, multiprocessors, pair, pointer, splits

WARPS = 8
MOST_SPLITS = 64


def _block(logits: Tensor) -> int:
    """Elements a program reads at once: 32 bytes a thread, two loads of the widest kind in flight."""
    return 1024 if INTERPRETED else 32 * 32 * WARPS // logits.element_size()


@triton.jit
def row_offset(n, inner, stride_outer, stride_inner):
    """Where row n of [N, V] or of [B, T, V] starts: 64-bit, and a multiple of 16 where the strides are."""
    return (n // inner).to(tl.int64) * stride_outer + (n % inner).to(tl.int64) * stride_inner


@triton.jit
def distance(x, shift, inv_high, inv_low):
    """(x - shift) / temperature. The difference is clamped: -inf becomes a distance that is as good."""
    y = x - shift
    y = tl.where(y < -1e20, -1e20, y)
    return y * inv_high + y * inv_low


@triton.jit
def rescale(total, weighted, old, new, inv_high, inv_low):
    """Sums of e^d and e^d d with d relative to ``old``, relative to ``new``."""
    d = distance(tl.where(old == new, 0.0, old), tl.where(old == new, 0.0, new), inv_high, inv_low)
    d = d.to(tl.float64)
    scale = tl.exp(d)
    return total * scale, tl.where(total == 0, 0.0, scale * (weighted + total * d))


@triton.jit
def accumulate(x, shift, total, weighted, inv_high, inv_low, ENTROPY: tl.constexpr):
    """Take a block of logits into the running maximum and sums; the sums are float64 scalars."""
    top = tl.max(x, 0)
    if top > shift:
        total, weighted = rescale(total, weighted, shift, top, inv_high, inv_low)
        shift = top
    # While all logits have been -inf there is nothing to shift by, and every term is e^-inf.
    d = distance(x, tl.where(shift == float("-inf"), 0.0, shift), inv_high, inv_low)
    e = tl.exp(d)
    if ENTROPY:
        weighted += tl.sum(e * d, 0).to(tl.float64)
    if (top == shift) & (top > float("-inf")):
        # The terms of the largest logit are exactly 1. Summed apart from the rest they do not swallow the
        # digits of a peaked row's tail, which are all that its entropy is made of.
        largest = x == shift
        total += tl.sum(largest.to(tl.float32), 0).to(tl.float64)
        e = tl.where(largest, 0.0, e)
    total += tl.sum(e, 0).to(tl.float64)
    return shift, total, weighted


@triton.jit
def finish(
    n, row, shift, total, weighted, tokens, logprob, entropy, shift_out, log_sum_out, vocab, inv_high, inv_low,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Write a row's results from its maximum and sums."""
    ACC: tl.constexpr = logprob.dtype.element_ty
    nothing = shift == float("-inf")  # no column has any mass
    log_sum = tl.where(nothing, float("nan"), tl.log(total))  # float64, as the sums are
    token = tl.load(tokens + n)
    in_range = (token >= 0) & (token < vocab)
    at_token = tl.load(row + tl.where(in_range, token, 0)).to(ACC)
    d = distance(at_token, shift, inv_high, inv_low).to(tl.float64)
    value = tl.where(at_token == float("-inf"), float("-inf"), d) - log_sum
    tl.store(logprob + n, tl.where(in_range, value, float("nan")).to(ACC))
    tl.store(shift_out + n, shift.to(ACC))
    tl.store(log_sum_out + n, log_sum.to(ACC))
    if ENTROPY:
        tl.store(entropy + n, (log_sum - weighted / total).to(ACC))


@triton.jit
def write_masked(n, logprob, entropy, shift, log_sum, ENTROPY: tl.constexpr):
    tl.store(logprob + n, 0.0)
    tl.store(shift + n, 0.0)
    tl.store(log_sum + n, 0.0)
    if ENTROPY:
        tl.store(entropy + n, 0.0)


@triton.jit(do_not_specialize=["inner", "vocab", "blocks", "splits"])
def token_stats_kernel(
    logits, tokens, mask, logprob, entropy, shift_out, log_sum_out, partial,
    inner, stride_outer, stride_inner, vocab, blocks, splits, inv_high, inv_low,
    HAS_MASK: tl.constexpr, ENTROPY: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n."""
    ACC: tl.constexpr = logprob.dtype.element_ty
    n = tl.program_id(0)
    part = tl.program_id(1)
    inv_high = tl.full([], inv_high, ACC)
    inv_low = tl.full([], inv_low, ACC)
    if HAS_MASK and tl.load(mask + n) == 0:
        if part == 0:
            write_masked(n, logprob, entropy, shift_out, log_sum_out, ENTROPY)
    else:
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        columns = tl.arange(0, BLOCK)
        begin = part * blocks * BLOCK
        end = tl.minimum(begin + blocks * BLOCK, vocab)
        # The tail is peeled: without a mask the loads of the main loop are 16 bytes wide.
        full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
        shift = tl.full([], float("-inf"), ACC)
        total = tl.zeros([], tl.float64)
        weighted = tl.zeros([], tl.float64)
        for start in range(begin, full, BLOCK):
            x = tl.load(row + start + columns).to(ACC)
            shift, total, weighted = accumulate(x, shift, total, weighted, inv_high, inv_low, ENTROPY)
        if full < end:
            x = tl.load(row + full + columns, mask=full + columns < end, other=float("-inf")).to(ACC)
            shift, total, weighted = accumulate(x, shift, total, weighted, inv_high, inv_low, ENTROPY)
        if SPLIT:
            at = partial + (n.to(tl.int64) * splits + part) * 3
            tl.store(at, shift.to(tl.float64))
            tl.store(at + 1, total)
            tl.store(at + 2, weighted)
        else:
            finish(
                n, row, shift, total, weighted, tokens, logprob, entropy, shift_out, log_sum_out, vocab,
                inv_high, inv_low, ENTROPY,
            )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "vocab", "splits"])
def token_stats_combine(
    logits, tokens, mask, logprob, entropy, shift_out, log_sum_out, partial,
    inner, stride_outer, stride_inner, vocab, splits, inv_high, inv_low,
    HAS_MASK: tl.constexpr, ENTROPY: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program n: the partial statistics of row n."""
    ACC: tl.constexpr = logprob.dtype.element_ty
    n = tl.program_id(0)
    inv_high = tl.full([], inv_high, ACC)
    inv_low = tl.full([], inv_low, ACC)
    if HAS_MASK and tl.load(mask + n) == 0:
        return  # written by the first pass
    part = tl.arange(0, MOST)
    at = partial + (n.to(tl.int64) * splits + part) * 3
    shifts = tl.load(at, mask=part < splits, other=float("-inf"))
    totals = tl.load(at + 1, mask=part < splits, other=0.0)
    weights = tl.load(at + 2, mask=part < splits, other=0.0)
    shift = tl.max(shifts, 0)
    totals, weights = rescale(totals, weights, shifts, shift, inv_high, inv_low)
    shift = shift.to(ACC)
    row = logits + row_offset(n, inner, stride_outer, stride_inner)
    finish(
        n, row, shift, tl.sum(totals, 0), tl.sum(weights, 0), tokens, logprob, entropy, shift_out,
        log_sum_out, vocab, inv_high, inv_low, ENTROPY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "vocab", "blocks"])
def token_stats_backward_kernel(
    grad_logprob, grad_entropy, grad_log_sum, logits, tokens, mask, entropy, shifts, log_sums, out,
    inner, stride_outer, stride_inner, vocab, out_stride, blocks, inv_high, inv_low,
    HAS_MASK: tl.constexpr, HAS_LOGPROB: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LOG_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, k): blocks [k * blocks, (k + 1) * blocks) of row n."""
    ACC: tl.constexpr = shifts.dtype.element_ty
    n = tl.program_id(0)
    begin = tl.program_id(1) * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, vocab)
    full = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK)
    target = out + n.to(tl.int64) * out_stride
    if HAS_MASK and tl.load(mask + n) == 0:
        nothing = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(begin, full, BLOCK):
            tl.store(target + start + columns, nothing)
        if full < end:
            tl.store(target + full + columns, nothing, mask=full + columns < end)
    else:
        row = logits + row_offset(n, inner, stride_outer, stride_inner)
        inv_high = tl.full([], inv_high, ACC)
        inv_low = tl.full([], inv_low, ACC)
        shift = tl.load(shifts + n)
        log_sum = tl.load(log_sums + n)
        zero = tl.zeros([], ACC)
        on_token = tl.load(grad_logprob + n) if HAS_LOGPROB else zero
        on_p = (tl.load(grad_log_sum + n) if HAS_LOG_SUM else zero) - on_token
        on_entropy = tl.load(grad_entropy + n) if HAS_ENTROPY else zero
        h = tl.load(entropy + n) if HAS_ENTROPY else zero
        token = tl.load(tokens + n)
        in_range = (token >= 0) & (token < vocab)
        on_token = tl.where(in_range, on_token, float("nan"))  # as its logprob is
        token = tl.where(in_range, token, 0)
        for start in range(begin, full, BLOCK):
            x = tl.load(row + start + columns).to(ACC)
            g = gradient(
                x, start + columns, token, on_token, on_p, on_entropy, h, shift, log_sum, inv_high, inv_low,
                HAS_ENTROPY,
            )  # fmt: skip
            tl.store(target + start + columns, g.to(out.dtype.element_ty))
        if full < end:
            inside = full + columns < end
            x = tl.load(row + full + columns, mask=inside, other=0.0).to(ACC)
            g = gradient(
                x, full + columns, token, on_token, on_p, on_entropy, h, shift, log_sum, inv_high, inv_low,
                HAS_ENTROPY,
            )  # fmt: skip
            tl.store(target + full + columns, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient(
    x, column, token, on_token, on_p, on_entropy, h, shift, log_sum, inv_high, inv_low, ENTROPY: tl.constexpr
):  # fmt: skip
    """The gradient of the logits, all upstream gradients folded in."""
    logp = distance(x, shift, inv_high, inv_low) - log_sum
    p = tl.exp(logp)
    g = on_p * p
    if ENTROPY:
        g -= on_entropy * p * (logp + h)
    return (g + tl.where(column == token, on_token, 0.0)) * (inv_high + inv_low)


# ---- launch ------------------------------------------------------------------------------------------------


def _rows(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """The logits, and their rows as (inner rows, outer stride, inner stride)."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 2:
        return logits, max(logits.shape[0], 1), 0, logits.stride(0)
    return logits, max(logits.shape[1], 1), logits.stride(0), logits.stride(1)


def _mask(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.uint8)


def token_stats(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, inner, outer_stride, inner_stride = _rows(logits)
    tokens = tokens.contiguous()
    acc = torch.float64 if logits.dtype is torch.float64 else torch.float32
    logprob, shift, log_sum = (logits.new_empty(tokens.shape, dtype=acc) for _ in range(3))
    entropy = logits.new_empty(tokens.shape if with_entropy else 0, dtype=acc)
    n, vocab = tokens.numel(), logits.shape[-1]
    if n == 0:
        return logprob, entropy, shift, log_sum
    block = _block(logits)
    blocks = cdiv(vocab, block)
    # A row a program; where rows are fewer than two to a multiprocessor, several programs a row.
    few = n < 2 * multiprocessors(logits)
    parts = min(MOST_SPLITS, splits(logits, n, blocks, 2)) if few else 1
    per_part = cdiv(blocks, parts)
    parts = cdiv(blocks, per_part)
    partial = logits.new_empty((n, parts, 3), dtype=torch.float64) if parts > 1 else logprob
    arguments = (
        logits, tokens, _mask(mask, tokens), logprob, pointer(entropy if with_entropy else None, logprob),
        shift, log_sum, partial, inner, outer_stride, inner_stride, vocab,
    )  # fmt: skip
    inverse = pair(1.0 / temperature)
    flags = {"HAS_MASK": mask is not None, "ENTROPY": with_entropy}
    token_stats_kernel[(n, parts)](
        *arguments, per_part, parts, *inverse, **flags, SPLIT=parts > 1, BLOCK=block, num_warps=WARPS
    )
    if parts > 1:
        token_stats_combine[(n,)](*arguments, parts, *inverse, **flags, MOST=MOST_SPLITS, num_warps=1)
    return logprob, entropy, shift, log_sum


def token_stats_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    logits, inner, outer_stride, inner_stride = _rows(logits)
    tokens, shift, log_sum = tokens.contiguous(), shift.contiguous(), log_sum.contiguous()
    ups = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy, grad_log_sum)]
    out = logits.new_empty(logits.shape)
    n, vocab = tokens.numel(), logits.shape[-1]
    if n == 0:
        return out
    block = _block(logits)
    blocks = cdiv(vocab, block)
    parts = splits(logits, n, blocks)
    per_part = cdiv(blocks, parts)
    token_stats_backward_kernel[(n, cdiv(blocks, per_part))](
        *(pointer(g, shift) for g in ups), logits, tokens, _mask(mask, tokens),
        pointer(entropy.contiguous() if entropy.numel() else None, shift), shift, log_sum, out,
        inner, outer_stride, inner_stride, vocab, vocab, per_part, *pair(1.0 / temperature),
        HAS_MASK=mask is not None, HAS_LOGPROB=ups[0] is not None, HAS_ENTROPY=ups[1] is not None,
        HAS_LOG_SUM=ups[2] is not None, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return out
