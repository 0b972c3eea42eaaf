"""Entropy: from a token's entropy to its share of the credit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import layout
from .advantages import check_rewards
from .dispatch import define


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, alpha1, alpha2, threshold, floor = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (alpha1, alpha2, threshold, floor)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    grad_rewards, grad_entropy = _backward(grad, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad
    return (grad_rewards if needs[0] else None, grad_entropy if needs[1] else None, *[None] * 7)


_backward = define(
    "entropy",
    "gtpo_rewards_backward(Tensor grad, Tensor rewards, Tensor entropy, Tensor groups, Tensor? mask,"
    " Tensor? cu_seqlens, float alpha1, float alpha2, float threshold, float floor)"
    " -> (Tensor grad_rewards, Tensor grad_entropy)",
    fake=lambda grad, rewards, entropy, *_: (
        rewards.new_empty(rewards.shape),
        entropy.new_empty(entropy.shape),
    ),
)

_forward = define(
    "entropy",
    "gtpo_rewards(Tensor rewards, Tensor entropy, Tensor groups, Tensor? mask, Tensor? cu_seqlens,"
    " float alpha1, float alpha2, float threshold, float floor) -> Tensor",
    fake=lambda rewards, entropy, *_: entropy.new_empty(entropy.shape),
    setup_context=_setup,
    backward=_gradient,
)


def gtpo_rewards(
    rewards: Tensor,
    entropy: Tensor,
    groups: layout.Labels = None,
    *,
    group_size: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    positive: float | None = None,
    entropy_floor: float = 1e-2,
    entropy_grad: bool = False,
) -> Tensor:
    """Token rewards of GTPO: a row's reward, shaped by each token's share of its class's entropy.

    Within a group, at each position ``t`` (counted from the row's start, masked tokens too), let P be the
    right rows and N the wrong rows with a valid token there (arXiv 2508.04349, eq. 3 and 5):

    - right row i: ``alpha1 * rewards[i] + alpha2 * |P| * H[i, t] / sum over P of H[k, t]``
    - wrong row j: ``-alpha1 - alpha2 * |N| * (1 / H[j, t]) / sum over N of (1 / H[k, t])``

    so right rows are paid more where they were uncertain, wrong rows are charged more where they were sure.
    The mean over a class at a position does not depend on the entropies: mass is conserved. The entropy is
    floored first; without a floor one token of near-zero entropy takes the whole charge of its position
    (the paper's text has no floor, its clamp to [0.2, 0.28] is optional).

    Args:
        rewards: ``[B]``, the outcome of each row.
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``: the entropy of the behaviour policy at each
            token, in nats, as :func:`rewardops.token_stats` returns it.
        groups: ``[B]``, integer labels in any order; or ``group_size`` for contiguous groups.
        mask: the shape of ``entropy``; bool, integer or float 0/1; may have holes.
        cu_seqlens: ``[B + 1]`` for packed rows.
        alpha1: weight of the outcome. alpha2: weight of the entropy's share.
        positive: rows with a reward above this are right, the others wrong; None for 0.
        entropy_floor: entropies below it are raised to it; above 0.
        entropy_grad: let the gradient flow into ``entropy`` too. Off by default: a gradient through the
            weights is a hidden entropy term in the loss.

    Returns:
        The layout of ``entropy``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards`` (right rows), and in ``entropy`` where asked.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
    """
    check_rewards(rewards)
    layout.check_float("entropy", entropy)
    tokens = layout.token_layout("entropy", entropy, mask, cu_seqlens)
    layout.check_shape("rewards", rewards, (tokens.batch,), "one per row of entropy")
    layout.check_device("entropy", entropy, rewards.device, "rewards")
    groups = layout.group_ids(groups, group_size, tokens.batch, rewards.device, "rewards")
    layout.check_positive("entropy_floor", entropy_floor)
    rewards, entropy = layout.promote(rewards, entropy if entropy_grad else entropy.detach())
    out: Tensor = _forward(
        rewards,
        entropy,
        groups,
        tokens.mask,
        tokens.cu_seqlens,
        float(alpha1),
        float(alpha2),
        0.0 if positive is None else float(positive),
        float(entropy_floor),
    )
    return out
