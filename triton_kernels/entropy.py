"""Entropy weighting on the GPU: sums over the rows of a group at each position.

Memory traffic, forward: entropies and mask once, one write. Backward: gradients too, and once more with the mask
for the sums of rows. All rows of a group but a few are read twice, the
second time from the cache.

Every row has a program; the programs of a group share the tiles of its positions, and read all of its rows there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference.entropy import GtpoArgs
from .advantages_tokens import NOTHING, SUMS, prepare_rows
from .arithmetic import Pair, fused
from .groups import SortedRows, group_around
from .launch import BITS, INTERPRETED, Constant, cdiv, pair, pointer, splits, unpair
from .rows import Rows, as_bytes, dense, load_valid, row_bounds, stride
from .scans import plus
from .tiles import empty_tokens, is_aligned, write_gaps

WARPS = 2
BLOCK = 64 if INTERPRETED else 4 * 32 * WARPS  # positions that a program takes at once, four a thread
FEW = Constant(16 if INTERPRETED else 64)  # labels read at once to find a group
# What stands for the entropy of a token that is not valid; one that is not finite counts as NaN.
MASKED = Constant(float("-inf"))


class Tokens(NamedTuple):
    """The tokens of rows; pointers, and strides between padded rows."""

    entropy: Any
    mask: Any
    grad: Any
    out: Any
    entropy_stride: Any
    mask_stride: Any
    grad_stride: Any
    out_stride: Any
    cu: Any
    width: Any
    total: Any


class Settings(NamedTuple):
    """Numbers, in the dtype of the entropies."""

    outcome: Any  # weight of the outcome
    share: Any  # weight of the entropy's share
    threshold: Any  # rows with a reward above it are right
    floor: Any


class Row(NamedTuple):
    """A row of a group, and where it lies."""

    number: Any  # int64
    offset: Any  # of its first token for packed rows, else 0
    length: Any  # int32; 0 beyond the group's last
    reward: Any
    right: Any


class Held(NamedTuple):
    """Tokens of a row at a tile of positions."""

    entropy: Any  # NaN if not finite, or if the row's class is not known; MASKED if not valid
    up: Any  # upstream gradient


class Sums(NamedTuple):
    """Sums over the rows of a class, at every position of a tile."""

    count: Any  # of valid tokens
    mass: Any  # their weights, a pair
    through: Any  # upstream gradients times weights, a pair


class Scale(NamedTuple):
    """What the tokens of a class are made with; where all weights are 0, the shares are equal."""

    base: Any
    gain: Any
    mass: Any  # 1 where all weights are 0
    slope: Any  # gain / mass
    mean: Any  # of the upstream gradients, weighted; a pair


@triton.jit
def weight_of(entropy, right, floor):
    """Weight of a token: in a right row its entropy, in a wrong row the inverse of that, at least ``floor``."""
    raised = tl.where(entropy < tl.where(right, 0.0, floor), tl.where(right, 0.0, floor), entropy)
    return tl.where(right, raised, 1.0 / raised)


@triton.jit
def row_at(
    place, group, tokens, settings, ORDERED: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr
):
    """The row at a place of the sorted rows."""
    exists = place < group.end
    number = tl.where(exists, place, group.begin).to(tl.int64)
    if ORDERED:
        number = tl.load(group.sorted.order + number)
    offset, length = row_bounds(tokens.cu, number, tokens.width, tokens.total, PACKED)
    length = tl.where(exists, length, 0).to(tl.int32)
    if ALIGNED:
        length = length // 16 * 16  # as it is; so the compiler knows
    reward = tl.load(group.sorted.rewards + number)
    return Row(number, offset, length, reward, reward > settings.threshold)


@triton.jit
def first_token(x, stride, row, PACKED: tl.constexpr):
    """Pointer to a row's first token."""
    if PACKED:
        return x + row.offset
    else:
        return x + row.number * stride


@triton.jit
def load_row(
    row, at, tokens,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    inside = at < row.length
    entropy = first_token(tokens.entropy, tokens.entropy_stride, row, PACKED)
    mask = first_token(tokens.mask, tokens.mask_stride, row, PACKED)
    grad = first_token(tokens.grad, tokens.grad_stride, row, PACKED)
    if ALIGNED:
        entropy, mask, grad = tl.multiple_of(entropy, 16), tl.multiple_of(mask, 16), tl.multiple_of(grad, 16)
    h = tl.load(entropy + at, mask=inside, other=0.0)
    valid = load_valid(mask, at, inside, HAS_MASK)
    up = h
    if BACKWARD:
        up = tl.load(grad + at, mask=inside, other=0.0)
    h = tl.where(tl.abs(h) < float("inf"), h, float("nan"))
    h = tl.where(row.reward == row.reward, h, float("nan"))
    return Held(tl.where(valid, h, MASKED), up)


@triton.jit
def add_row(rights, wrongs, row, held, settings, BACKWARD: tl.constexpr):
    """The sums of both classes with a row more."""
    valid = held.entropy != MASKED
    weight = tl.where(valid, weight_of(held.entropy, row.right, settings.floor), 0.0)
    up = tl.where(valid, held.up, 0.0)
    if row.right:
        rights = add_weight(rights, valid, weight, up, BACKWARD)
    else:
        wrongs = add_weight(wrongs, valid, weight, up, BACKWARD)
    return rights, wrongs


@triton.jit
def add_weight(sums, valid, weight, up, BACKWARD: tl.constexpr):
    through = sums.through
    if BACKWARD:
        high = fused(up, weight, 0.0)  # by itself, so that it is rounded
        through = plus(through, high)
        through = Pair(through.sum, through.rest + fused(up, weight, -high))
    return Sums(sums.count + valid.to(weight.dtype), plus(sums.mass, weight), through)


@triton.jit
def scale_of(sums, sign, settings):
    mass = sums.mass.sum + sums.mass.rest
    even = mass == 0.0
    safe = tl.where(even, 1.0, mass)
    # The mean in two parts, so that its difference from a gradient like it has digits.
    mean = (sums.through.sum + sums.through.rest) / safe
    left = fused(-mean, sums.mass.sum, sums.through.sum) + (sums.through.rest - mean * sums.mass.rest)
    gain = tl.where(even, 0.0, sign * settings.share * sums.count)
    return Scale(tl.where(even, sign * settings.share, 0.0), gain, safe, gain / safe, Pair(mean, left / safe))


@triton.jit
def write_row(
    row, held, scale, at, tokens, settings,
    RIGHT: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The results of a row of a class."""
    weight = weight_of(held.entropy, RIGHT, settings.floor)
    if BACKWARD:
        value = scale.slope * ((held.up - scale.mean.sum) - scale.mean.rest)
        if RIGHT:
            constant = held.entropy < 0.0
        else:
            # The derivative of a weight is -1 / H^2.
            value = -value * weight * weight
            constant = held.entropy <= settings.floor
        value = tl.where(constant, 0.0, value)
    else:
        base = -settings.outcome
        if RIGHT:
            base = settings.outcome * row.reward
        value = (base + scale.base) + scale.gain * (weight / scale.mass)
    out = first_token(tokens.out, tokens.out_stride, row, PACKED)
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    tl.store(out + at, tl.where(held.entropy == MASKED, 0.0, value), mask=at < row.length)


@triton.jit
def load_rows(
    place, at, group, tokens, settings, COUNT: tl.constexpr,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The tokens of COUNT rows from a place on."""
    every = ()
    for i in tl.static_range(COUNT):
        row = row_at(place + i, group, tokens, settings, ORDERED, PACKED, ALIGNED)
        every = every + (load_row(row, at, tokens, PACKED, HAS_MASK, BACKWARD, ALIGNED),)  # noqa: RUF005 (no stars)
    return every


@triton.jit
def add_rows(
    rights, wrongs, place, held, group, tokens, settings,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(held)):
        row = row_at(place + i, group, tokens, settings, ORDERED, PACKED, ALIGNED)
        rights, wrongs = add_row(rights, wrongs, row, held[i], settings, BACKWARD)
    return rights, wrongs


@triton.jit
def write_rows(
    place, held, of_right, of_wrong, at, group, tokens, settings,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(held)):
        row = row_at(place + i, group, tokens, settings, ORDERED, PACKED, ALIGNED)
        if row.right:
            write_row(row, held[i], of_right, at, tokens, settings, True, PACKED, BACKWARD, ALIGNED)
        else:
            write_row(row, held[i], of_wrong, at, tokens, settings, False, PACKED, BACKWARD, ALIGNED)


@triton.jit
def longest_of(group, tokens, ORDERED: tl.constexpr, PACKED: tl.constexpr):
    """Tokens of the group's longest row."""
    longest = tokens.width
    if PACKED:
        longest = tl.zeros([], tl.int64)
        for start in range(group.begin, group.end, FEW):
            place = start + tl.arange(0, FEW)
            inside = place < group.end
            number = tl.where(inside, place, group.begin)
            if ORDERED:
                number = tl.load(group.sorted.order + number)
            _, length = row_bounds(tokens.cu, number, tokens.width, tokens.total, PACKED)
            longest = tl.maximum(longest, tl.max(length, 0))
    return longest.to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "entropy_stride", "mask_stride", "grad_stride", "out_stride", "parts",
        "sum_parts",
    ]
)  # fmt: skip
def gtpo_kernel(
    rewards, entropy, labels, order, mask, cu, grad, row_sums, out, grad_rewards, batch, width, total,
    entropy_stride, mask_stride, grad_stride, out_stride, parts, sum_parts,
    alpha1_high, alpha1_low, alpha2_high, alpha2_low, threshold_high, threshold_low, floor_high, floor_low,
    ORDERED: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, k): of the group at place p those tiles that fall to its row, and of these k, k + parts, ..."""
    ACC: tl.constexpr = entropy.dtype.element_ty
    # Rows that are loaded together; the first stay in registers.
    AT_ONCE: tl.constexpr = 2 if BACKWARD else 4
    p = tl.program_id(0)
    k = tl.program_id(1)
    settings = Settings(
        unpair(alpha1_high, alpha1_low, ACC), unpair(alpha2_high, alpha2_low, ACC),
        unpair(threshold_high, threshold_low, rewards.dtype.element_ty), unpair(floor_high, floor_low, ACC),
    )  # fmt: skip
    tokens = Tokens(
        entropy, mask, grad, out, entropy_stride, mask_stride, grad_stride, out_stride, cu, width, total
    )
    group = group_around(SortedRows(rewards, labels, order, mask, batch, 1), p, FEW, FEW)
    if k == 0:
        write_gaps(out, cu, p, batch, total, BLOCK, PACKED)
        if BACKWARD:
            row = row_at(p, group, tokens, settings, ORDERED, PACKED, False)
            summed = tl.zeros([], tl.float64)
            for part in range(sum_parts):
                summed += tl.load(row_sums + part * batch.to(tl.int64) + row.number)
            weight = unpair(alpha1_high, alpha1_low, tl.float64)
            tl.store(
                grad_rewards + row.number,
                tl.where(row.right, weight * summed, 0.0).to(rewards.dtype.element_ty),
            )
    size = group.end - group.begin
    longest = longest_of(group, tokens, ORDERED, PACKED)
    first = (k * size + (p - group.begin)) * BLOCK
    for start in range(first, longest, parts * size * BLOCK):
        at = start + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], ACC)
        rights = Sums(zero, Pair(zero, zero), Pair(zero, zero))
        wrongs = Sums(zero, Pair(zero, zero), Pair(zero, zero))
        held = load_rows(
            group.begin, at, group, tokens, settings, AT_ONCE, ORDERED, PACKED, HAS_MASK, BACKWARD, ALIGNED
        )
        rights, wrongs = add_rows(
            rights, wrongs, group.begin, held, group, tokens, settings, ORDERED, PACKED, HAS_MASK, BACKWARD,
            ALIGNED,
        )  # fmt: skip
        for place in range(group.begin + AT_ONCE, group.end, AT_ONCE):
            more = load_rows(
                place, at, group, tokens, settings, AT_ONCE, ORDERED, PACKED, HAS_MASK, BACKWARD, ALIGNED
            )
            rights, wrongs = add_rows(
                rights, wrongs, place, more, group, tokens, settings, ORDERED, PACKED, HAS_MASK, BACKWARD,
                ALIGNED,
            )  # fmt: skip
        of_right = scale_of(rights, 1.0, settings)
        of_wrong = scale_of(wrongs, -1.0, settings)
        write_rows(
            group.begin, held, of_right, of_wrong, at, group, tokens, settings, ORDERED, PACKED, HAS_MASK,
            BACKWARD, ALIGNED,
        )  # fmt: skip
        for place in range(group.begin + AT_ONCE, group.end, AT_ONCE):
            more = load_rows(
                place, at, group, tokens, settings, AT_ONCE, ORDERED, PACKED, HAS_MASK, BACKWARD, ALIGNED
            )
            write_rows(
                place, more, of_right, of_wrong, at, group, tokens, settings, ORDERED, PACKED, HAS_MASK,
                BACKWARD, ALIGNED,
            )  # fmt: skip


# ---- launch ------------------------------------------------------------------------------------------------


def _launch(grad: Tensor | None, a: GtpoArgs) -> tuple[Tensor, Tensor]:
    """Rewards of the tokens, or with ``grad`` the gradients of the entropies and of the rewards."""
    rewards = a.rewards.contiguous()
    rows = Rows.of(a.entropy.shape, a.cu_seqlens, rewards)
    entropy, mask = dense(a.entropy), as_bytes(a.mask)
    out = empty_tokens(entropy, rows)
    grad_rewards = rewards.new_empty(0 if grad is None else rows.batch)
    if rows.batch == 0:
        return out, grad_rewards
    p = prepare_rows(
        a.groups, rewards, rows, grad, mask, sort=not a.contiguous, kind=NOTHING if grad is None else SUMS
    )
    parts = splits(entropy, rows.batch, max(1, cdiv(rows.width, BLOCK)), 8)
    gtpo_kernel[(rows.batch, parts)](
        rewards, entropy, p.labels, pointer(p.order, p.labels), pointer(mask, rewards), rows.cu,
        pointer(grad, entropy), pointer(p.sums, rewards), out, grad_rewards, rows.batch, rows.width, rows.total,
        stride(entropy), stride(mask), stride(grad), stride(out), parts, p.parts,
        *pair(a.alpha1), *pair(a.alpha2), *pair(a.threshold), *pair(a.floor),
        ORDERED=p.order is not None, PACKED=rows.packed, HAS_MASK=mask is not None, BACKWARD=grad is not None,
        ALIGNED=is_aligned(rows, entropy, mask, grad, out), BLOCK=BLOCK, num_warps=WARPS, **BITS,
    )  # fmt: skip
    return out, grad_rewards


def gtpo_rewards(a: GtpoArgs) -> Tensor:
    return _launch(None, a)[0]


def gtpo_rewards_backward(grad: Tensor, a: GtpoArgs) -> tuple[Tensor, Tensor]:
    on_entropy, on_rewards = _launch(dense(grad), a)
    return on_rewards, on_entropy
