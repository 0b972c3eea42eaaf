"""Ops of the entropy family."""

from __future__ import annotations

from ..core.dispatch import define
from ..core.kinds import RealTokens
from ..core.records import save_record, saved_record, schema_of
from ..reference.entropy import GtpoArgs

_ARGS = schema_of(GtpoArgs)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    args, _ = saved_record(ctx)
    (needs,) = ctx.needs_input_grad
    on_rewards, on_entropy = gtpo_rewards_backward(grad, *args)
    return {
        "rewards": on_rewards if needs.rewards else None,
        "entropy": on_entropy if needs.entropy else None,
    }


gtpo_rewards_backward = define(
    "entropy",
    f"gtpo_rewards_backward(Tensor grad, {_ARGS}) -> (Tensor grad_rewards, Tensor grad_entropy)",
    record=GtpoArgs,
    tensors={"grad": RealTokens},
    fake=lambda grad, args: (
        args.rewards.new_empty(args.rewards.shape),
        args.entropy.new_empty(args.entropy.shape),
    ),
)

gtpo_rewards = define(
    "entropy",
    f"gtpo_rewards({_ARGS}) -> Tensor",
    record=GtpoArgs,
    fake=lambda args: args.entropy.new_empty(args.entropy.shape),
    setup_context=lambda ctx, inputs, output: save_record(ctx, *inputs),
    backward=_gradient,
)
