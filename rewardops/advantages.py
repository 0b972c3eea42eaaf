"""Advantages: group-relative advantages, per row or spread over tokens in the same launch."""

from __future__ import annotations

from torch import Tensor

from . import layout
from .dispatch import define

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none")


def _fake(rewards, groups, mask, cu_seqlens, num_tokens, baseline, scale, eps, ddof):  # type: ignore[no-untyped-def]
    if mask is not None:
        shape = mask.shape
    elif cu_seqlens is not None:
        shape = (num_tokens,)
    else:
        shape = rewards.shape
    return rewards.new_empty(shape), rewards.new_empty(rewards.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rewards, groups, mask, cu_seqlens, _, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rewards, groups, mask, cu_seqlens)
    ctx.options = options


def _gradient(ctx, grad, grad_inv_scale):  # type: ignore[no-untyped-def]
    out = _backward(grad, grad_inv_scale, *ctx.saved_tensors, *ctx.options)
    return (out, *[None] * 8)


_backward = define(
    "advantages",
    "group_advantages_backward(Tensor? grad, Tensor? grad_inv_scale, Tensor rewards, Tensor groups,"
    " Tensor? mask, Tensor? cu_seqlens, str baseline, str scale, float eps, int ddof) -> Tensor",
    fake=lambda grad, grad_inv_scale, rewards, *_: rewards.new_empty(rewards.shape),
)

# inv_scale, per row, is what prefix-tree advantages divide by; it is differentiable too.
forward = define(
    "advantages",
    "group_advantages(Tensor rewards, Tensor groups, Tensor? mask, Tensor? cu_seqlens, SymInt num_tokens,"
    " str baseline, str scale, float eps, int ddof) -> (Tensor advantages, Tensor inv_scale)",
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def check_rewards(rewards: Tensor) -> None:
    layout.check_float("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards: got shape {layout.show(rewards.shape)}, want [B] (one per row)")


def check_scale(scale: str, eps: float, ddof: int) -> None:
    layout.check_choice("scale", scale, SCALES)
    layout.check_non_negative("eps", eps)
    if ddof not in (0, 1):
        raise ValueError(f"ddof: got {ddof!r}, want 0 or 1")


def group_advantages(
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    group_size: int | None = None,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Advantage of every row relative to its group: ``(reward - baseline) / (std + eps)``.

    The defaults are GRPO (arXiv 2402.03300). ``scale="none"`` is Dr. GRPO (2503.20783),
    ``baseline="leave_one_out", scale="none"`` is RLOO (2402.14740): there the baseline of a row is the mean
    of the others, ``reward - baseline = n / (n - 1) * (reward - mean)``.

    Exact on the hard inputs: equal rewards give 0 whatever their value (not the quotient of two rounding
    errors), rewards near 1000 keep their differences, a group of one has advantage 0 under any baseline but
    ``"none"``, and 0 under any scale but ``"none"``.

    Args:
        rewards: ``[B]``, one per row; float32, bfloat16, float16 or float64.
        groups: ``[B]``, integer labels of any value in any order; groups may be ragged.
        group_size: instead of ``groups``: contiguous groups of this many rows.
        baseline: ``"mean"``, ``"leave_one_out"`` or ``"none"``.
        scale: ``"std"`` or ``"none"``.
        eps: added to the std.
        ddof: 1 for the unbiased std, 0 for the population's.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``): the advantage is written to every valid token
            and 0 to the others. A row without a valid token does not count in its group.
        cu_seqlens: ``[B + 1]``, int32 or int64: the advantage is written to packed tokens ``[N]``.
        num_tokens: ``N``, where ``cu_seqlens`` lies on a device (or a graph is traced) and there is no mask
            to tell it.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` where a mask or cu_seqlens is given; float32 (float64 for float64
        rewards). Differentiable in ``rewards``, through the baseline and the std; the gradient of a group
        of equal rewards under ``scale="std"``, where the std has none, is 0.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, a group
            size that does not divide the rows, an unknown baseline or scale.
    """
    check_rewards(rewards)
    groups = layout.group_ids(groups, group_size, rewards.shape[0], rewards.device, "rewards")
    layout.check_choice("baseline", baseline, BASELINES)
    check_scale(scale, eps, ddof)
    rows = layout.row_layout(rewards, mask, cu_seqlens, num_tokens)
    (rewards,) = layout.promote(rewards)
    out: Tensor = forward(
        rewards,
        groups,
        None if rows is None else rows.mask,
        None if rows is None else rows.cu_seqlens,
        -1 if rows is None or rows.cu_seqlens is None else rows.shape[0],
        baseline,
        scale,
        float(eps),
        ddof,
    )[0]
    return out
