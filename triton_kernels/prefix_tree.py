"""Prefix values on the GPU, from the longest common prefixes of all pairs of a group.

Moved: the tokens of two rows up to their first difference for every pair (from the cache mostly), then one write
of values and counts per token; the common prefixes lie in a table of int32, a row of at most
``max_group_size`` entries for every row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import LABELS, next_member
from .launch import INTERPRETED, cdiv, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride

BLOCK = 128 if INTERPRETED else 1024


@triton.jit(do_not_specialize=["width", "total", "mask_stride"])
def spans_kernel(
    mask, cu, first, length_out, width, total, mask_stride,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the first valid token of row b, and the length up to its last one."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    begin = tl.zeros([], tl.int64)
    end = length
    if HAS_MASK:
        begin = length
        end = tl.zeros([], tl.int64)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, at < length, True)
            begin = tl.minimum(begin, tl.min(tl.where(valid, at, length), 0))
            end = tl.maximum(end, tl.max(tl.where(valid, at + 1, 0), 0).to(tl.int64))
    tl.store(first + b, begin)
    tl.store(length_out + b, tl.maximum(end - begin, 0))


@triton.jit(do_not_specialize=["batch", "width", "total", "tokens_stride", "most"])
def common_prefix_kernel(
    tokens, groups, cu, first, lengths, lcp, members, counts, batch, width, total, tokens_stride, most,
    PACKED: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: the common prefixes of row b with the members of its group, in row order."""
    b = tl.program_id(0)
    label = tl.load(groups + b)
    base, _ = row_bounds(cu, b, width, total, PACKED)
    mine = tokens + base + b.to(tl.int64) * tokens_stride + tl.load(first + b)
    length = tl.load(lengths + b)
    count = tl.zeros([], tl.int32)
    j = next_member(groups, label, b * 0 - 1, batch, LABELS)
    # A label with more rows than the table is wide would be a wrong max_group_size: the rest is left out.
    while (j < batch) & (length > 0) & (count < most):
        shorter = tl.minimum(length, tl.load(lengths + j))
        if shorter > 0:
            base_j, _ = row_bounds(cu, j, width, total, PACKED)
            theirs = tokens + base_j + j.to(tl.int64) * tokens_stride + tl.load(first + j)
            same = shorter
            start = shorter * 0
            while start < same:
                at = start + tl.arange(0, BLOCK)
                inside = at < shorter
                x = tl.load(mine + at, mask=inside, other=0)
                y = tl.load(theirs + at, mask=inside, other=0)
                same = tl.minimum(same, tl.min(tl.where(inside & (x != y), at, shorter), 0))
                start += BLOCK
            at_table = b.to(tl.int64) * most + count
            tl.store(lcp + at_table, same.to(tl.int32))
            tl.store(members + at_table, j.to(tl.int32))
            count += 1
        j = next_member(groups, label, j, batch, LABELS)
    tl.store(counts + b, count)


@triton.jit
def state_value(lcp, members, rewards, b, count, most, state, BLOCK: tl.constexpr):
    """Mean reward and number of the rows that share row b's prefix, for a block of states.

    Summed in row order with zeros for the rows that have left: rows that share a prefix get the same bits.
    """
    total = tl.zeros([BLOCK], rewards.dtype.element_ty)
    alive = tl.zeros([BLOCK], tl.int32)
    for k in range(0, count):
        at_table = b.to(tl.int64) * most + k
        shares = tl.load(lcp + at_table) >= state
        total += tl.where(shares, tl.load(rewards + tl.load(members + at_table)), 0.0)
        alive += shares.to(tl.int32)
    return total / tl.maximum(alive, 1).to(rewards.dtype.element_ty), alive


@triton.jit(do_not_specialize=["width", "total", "mask_stride", "out_stride", "most", "splits"])
def prefix_values_kernel(
    rewards, mask, cu, first, lengths, lcp, members, counts, before, after, count_out,
    width, total, mask_stride, out_stride, most, splits,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the blocks k, k + splits, ... of row b."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    begin = tl.load(first + b)
    count = tl.load(counts + b)
    span = tl.load(lengths + b)
    for start in range(tl.program_id(1) * BLOCK, length, splits * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        state = at - begin
        valid = load_valid(mask, base + b.to(tl.int64) * mask_stride + at, inside, HAS_MASK)
        valid = valid & (state >= 0) & (state < span)
        here, _ = state_value(lcp, members, rewards, b, count, most, state, BLOCK)
        there, alive = state_value(lcp, members, rewards, b, count, most, state + 1, BLOCK)
        where = base + b.to(tl.int64) * out_stride + at
        tl.store(before + where, tl.where(valid, here, 0.0), mask=inside)
        tl.store(after + where, tl.where(valid, there, 0.0), mask=inside)
        tl.store(count_out + where, tl.where(valid, alive, 0), mask=inside)


@triton.jit(do_not_specialize=["width", "total", "mask_stride", "before_stride", "after_stride", "most"])
def prefix_sums_kernel(
    grad_before, grad_after, mask, cu, first, lengths, lcp, counts, sums,
    width, total, mask_stride, before_stride, after_stride, most,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: over row b's states, the running sum of what each sends to every row that shares its prefix.

    In float64: a row's share is a value of this sum, and the sum may be far larger.
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    b = tl.program_id(0)
    row = b.to(tl.int64)
    base, _ = row_bounds(cu, b, width, total, PACKED)
    begin = tl.load(first + b)
    count = tl.load(counts + b)
    span = tl.load(lengths + b)
    # A row of n tokens has n + 1 states; packed rows are laid out with one place more each.
    target = sums + base + row * (1 if PACKED else width + 1)
    carry = tl.zeros([], ACC)
    for start in range(0, span + 1, BLOCK):
        state = start + tl.arange(0, BLOCK)
        alive = tl.zeros([BLOCK], tl.int32)
        for k in range(0, count):
            alive += (tl.load(lcp + row * most + k) >= state).to(tl.int32)
        up = tl.zeros([BLOCK], ACC)
        if HAS_BEFORE:
            at = begin + state
            valid = load_valid(mask, base + row * mask_stride + at, state < span, HAS_MASK)
            up += tl.load(grad_before + base + row * before_stride + at, mask=valid, other=0.0).to(ACC)
        if HAS_AFTER:
            at = begin + state - 1
            valid = load_valid(mask, base + row * mask_stride + at, (state > 0) & (state <= span), HAS_MASK)
            up += tl.load(grad_after + base + row * after_stride + at, mask=valid, other=0.0).to(ACC)
        running = tl.cumsum(up / tl.maximum(alive, 1).to(ACC), 0) + carry
        tl.store(target + state, running, mask=state <= span)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, running, 0.0), 0)


@triton.jit(do_not_specialize=["width", "total", "most"])
def prefix_backward_kernel(cu, lcp, members, counts, sums, out, width, total, most, PACKED: tl.constexpr):
    """Program b: what the states of its group's rows send to row b, in row order."""
    b = tl.program_id(0)
    count = tl.load(counts + b)
    grad = tl.zeros([], tl.float64)
    for k in range(0, count):
        at_table = b.to(tl.int64) * most + k
        i = tl.load(members + at_table)
        base, _ = row_bounds(cu, i, width, total, PACKED)
        source = sums + base + i.to(tl.int64) * (1 if PACKED else width + 1)
        grad += tl.load(source + tl.load(lcp + at_table))
    tl.store(out + b, grad.to(out.dtype.element_ty))


# ---- launch ------------------------------------------------------------------------------------------------


class _Prefixes:
    """Spans of the rows and common prefixes of all pairs: two launches that both passes begin with."""

    def __init__(
        self, tokens: Tensor, groups: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, most: int
    ) -> None:
        groups = groups.contiguous()
        self.rows = rows = Rows.of(tokens.shape, cu_seqlens, groups)
        self.mask = mask = as_bytes(mask)
        self.most = most
        tokens = dense(tokens)
        self.first, self.lengths = (groups.new_empty(rows.batch) for _ in range(2))
        self.lcp, self.members = (groups.new_empty((rows.batch, most), dtype=torch.int32) for _ in range(2))
        self.counts = groups.new_empty(rows.batch, dtype=torch.int32)
        grid = (rows.batch,)
        spans_kernel[grid](
            pointer(mask, groups), rows.cu, self.first, self.lengths, rows.width, rows.total, stride(mask),
            PACKED=rows.packed, HAS_MASK=mask is not None, BLOCK=BLOCK,
        )  # fmt: skip
        common_prefix_kernel[grid](
            tokens, groups, rows.cu, self.first, self.lengths, self.lcp, self.members, self.counts,
            rows.batch, rows.width, rows.total, stride(tokens), most,
            PACKED=rows.packed, LABELS=LABELS, BLOCK=BLOCK,
        )  # fmt: skip


def prefix_values(
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    packed, batch = cu_seqlens is not None, rewards.shape[0]
    before, after = (output(rewards, tokens.shape, packed) for _ in range(2))
    count = output(rewards, tokens.shape, packed, torch.int32)
    if before.numel() == 0 or batch == 0:
        return before, after, count
    p = _Prefixes(tokens, groups, mask, cu_seqlens, max_group_size)
    parts = splits(rewards, batch, max(1, cdiv(p.rows.width, BLOCK)))
    prefix_values_kernel[(batch, parts)](
        rewards.contiguous(), pointer(p.mask, rewards), p.rows.cu, p.first, p.lengths, p.lcp, p.members,
        p.counts, before, after, count, p.rows.width, p.rows.total, stride(p.mask), stride(before), p.most,
        parts, PACKED=packed, HAS_MASK=p.mask is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return before, after, count


def prefix_values_backward(
    grad_before: Tensor | None,
    grad_after: Tensor | None,
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> Tensor:
    batch = rewards.shape[0]
    if tokens.numel() == 0 or batch == 0:
        return rewards.new_zeros(rewards.shape)
    p = _Prefixes(tokens, groups, mask, cu_seqlens, max_group_size)
    ups = [None if g is None else dense(g) for g in (grad_before, grad_after)]
    packed = p.rows.packed
    sums = rewards.new_empty(tokens.numel() + batch, dtype=torch.float64)
    prefix_sums_kernel[(batch,)](
        *(pointer(g, rewards) for g in ups), pointer(p.mask, rewards), p.rows.cu, p.first, p.lengths, p.lcp,
        p.counts, sums, p.rows.width, p.rows.total, stride(p.mask), stride(ups[0]), stride(ups[1]), p.most,
        PACKED=packed, HAS_MASK=p.mask is not None, HAS_BEFORE=ups[0] is not None,
        HAS_AFTER=ups[1] is not None, BLOCK=BLOCK,
    )  # fmt: skip
    out = rewards.new_empty(rewards.shape)
    prefix_backward_kernel[(batch,)](
        p.rows.cu, p.lcp, p.members, p.counts, sums, out, p.rows.width, p.rows.total, p.most, PACKED=packed
    )
    return out
