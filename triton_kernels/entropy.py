"""Entropy weighting on the GPU: sums over the rows of a group at each position.

Memory traffic: the entropies twice (the second time from the cache), masks, one write per token. The programs of a
group's first row visit all members for a block of positions, once to sum and once to write. The programs of the
other rows return immediately.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference.entropy import GtpoArgs
from .groups import LABELS, next_member
from .launch import BITS, INTERPRETED, cdiv, pair, pointer, splits
from .rows import Rows, as_bytes, dense, load_valid, output, row_bounds, stride
from .segments import row_sums

BLOCK = 256 if INTERPRETED else 512


@triton.jit
def weight_of(entropy, floor, reward, right):
    """Weight of a token: in a right row its entropy, in a wrong row the inverse of that, at least ``floor``.

    NaN for an entropy that is not finite, or a row whose class is not known.
    """
    inverse = 1.0 / tl.where(entropy < floor, floor, entropy)
    weight = tl.where(right, tl.where(entropy < 0.0, 0.0, entropy), inverse)
    weight = tl.where(tl.abs(entropy) < float("inf"), weight, float("nan"))
    return tl.where(reward == reward, weight, float("nan"))


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "entropy_stride", "mask_stride", "grad_stride", "out_stride", "splits",
    ]
)  # fmt: skip
def gtpo_kernel(
    rewards, entropy, groups, mask, cu, grad, out, batch, width, total,
    entropy_stride, mask_stride, grad_stride, out_stride, splits,
    alpha1_high, alpha1_low, alpha2_high, alpha2_low, threshold_high, threshold_low, floor_high, floor_low,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr, LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, k), b the first row of its group: the blocks k, k + splits, ... of positions."""
    ACC: tl.constexpr = tl.float64
    REWARD: tl.constexpr = rewards.dtype.element_ty
    b = tl.program_id(0)
    label = tl.load(groups + b)
    first = next_member(groups, label, b * 0 - 1, batch, LABELS)
    if first == b:
        alpha1 = tl.full([], alpha1_high, ACC) + tl.full([], alpha1_low, ACC)
        alpha2 = tl.full([], alpha2_high, ACC) + tl.full([], alpha2_low, ACC)
        threshold = tl.full([], threshold_high, REWARD) + tl.full([], threshold_low, REWARD)
        floor = tl.full([], floor_high, ACC) + tl.full([], floor_low, ACC)
        longest = tl.zeros([], tl.int64)
        member = b
        while member < batch:
            _, length = row_bounds(cu, member, width, total, PACKED)
            longest = tl.maximum(longest, length)
            member = next_member(groups, label, member, batch, LABELS)
        for start in range(tl.program_id(1) * BLOCK, longest, splits * BLOCK):
            at = start + tl.arange(0, BLOCK)
            right_count = tl.zeros([BLOCK], ACC)
            right_weight = tl.zeros([BLOCK], ACC)
            right_grad = tl.zeros([BLOCK], ACC)
            wrong_count = tl.zeros([BLOCK], ACC)
            wrong_weight = tl.zeros([BLOCK], ACC)
            wrong_grad = tl.zeros([BLOCK], ACC)
            member = b
            while member < batch:
                base, length = row_bounds(cu, member, width, total, PACKED)
                row = member.to(tl.int64)
                valid = load_valid(mask, base + row * mask_stride + at, at < length, HAS_MASK)
                h = tl.load(entropy + base + row * entropy_stride + at, mask=valid, other=1.0).to(ACC)
                reward = tl.load(rewards + member)
                right = reward > threshold
                weight = tl.where(valid, weight_of(h, floor, reward, right), 0.0)
                one = valid.to(ACC)
                right_count += tl.where(right, one, 0.0)
                wrong_count += tl.where(right, 0.0, one)
                right_weight += tl.where(right, weight, 0.0)
                wrong_weight += tl.where(right, 0.0, weight)
                if BACKWARD:
                    up = tl.load(grad + base + row * grad_stride + at, mask=valid, other=0.0).to(ACC)
                    right_grad += tl.where(right, up * weight, 0.0)
                    wrong_grad += tl.where(right, 0.0, up * weight)
                member = next_member(groups, label, member, batch, LABELS)
            member = b
            while member < batch:
                base, length = row_bounds(cu, member, width, total, PACKED)
                row = member.to(tl.int64)
                inside = at < length
                valid = load_valid(mask, base + row * mask_stride + at, inside, HAS_MASK)
                h = tl.load(entropy + base + row * entropy_stride + at, mask=valid, other=1.0).to(ACC)
                reward = tl.load(rewards + member)
                right = reward > threshold
                weight = weight_of(h, floor, reward, right)
                count = tl.where(right, right_count, wrong_count)
                mass = tl.where(valid, tl.where(right, right_weight, wrong_weight), 1.0)
                even = mass == 0.0  # every entropy of the class is 0: all have the same share
                mass = tl.where(even, 1.0, mass)
                if BACKWARD:
                    up = tl.load(grad + base + row * grad_stride + at, mask=valid, other=0.0).to(ACC)
                    weighted_grad = tl.where(right, right_grad, wrong_grad)
                    value = alpha2 * count * (up - weighted_grad / mass) / mass
                    # d weight / d H is 1, or -1 / H^2 against the minus sign of a wrong row's share.
                    value = tl.where(right, value, value * weight * weight)
                    # Below these the weight is constant, unless it is NaN.
                    varies = tl.where(right, h >= 0.0, h > floor) | (weight != weight)
                    value = tl.where(even, 0.0, tl.where(varies, value, 0.0))
                else:
                    share = alpha2 * tl.where(even, 1.0, count * weight / mass)
                    value = tl.where(right, alpha1 * reward + share, -alpha1 - share)
                tl.store(out + base + row * out_stride + at, tl.where(valid, value, 0.0), mask=inside)
                member = next_member(groups, label, member, batch, LABELS)


# ---- launch ------------------------------------------------------------------------------------------------


def _launch(grad: Tensor | None, a: GtpoArgs) -> Tensor:
    """Rewards of the tokens, or with ``grad`` the gradient of the entropies."""
    rewards, groups = a.rewards.contiguous(), a.groups.contiguous()
    rows = Rows.of(a.entropy.shape, a.cu_seqlens, rewards)
    entropy, mask = dense(a.entropy), as_bytes(a.mask)
    out = output(entropy, entropy.shape, rows.packed)
    if out.numel() == 0 or rows.batch == 0:
        return out
    parts = splits(entropy, max(1, rows.batch // 8), max(1, cdiv(rows.width, BLOCK)))
    gtpo_kernel[(rows.batch, parts)](
        rewards, entropy, groups, pointer(mask, rewards), rows.cu, pointer(grad, entropy), out,
        rows.batch, rows.width, rows.total, stride(entropy), stride(mask), stride(grad), stride(out), parts,
        *pair(a.alpha1), *pair(a.alpha2), *pair(a.threshold), *pair(a.floor),
        PACKED=rows.packed, HAS_MASK=mask is not None, BACKWARD=grad is not None, LABELS=LABELS,
        BLOCK=BLOCK, num_warps=4, **BITS,
    )  # fmt: skip
    return out


def gtpo_rewards(a: GtpoArgs) -> Tensor:
    return _launch(None, a)


def gtpo_rewards_backward(grad: Tensor, a: GtpoArgs) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    sums = row_sums(grad, a.mask, a.cu_seqlens)
    return (sums * a.alpha1).masked_fill(~(a.rewards > a.threshold), 0.0), _launch(grad, a)
