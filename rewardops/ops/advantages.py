"""Ops of the advantages family."""

from __future__ import annotations

from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import Real, RealRows
from ..core.records import save_record, saved_record, schema_of
from ..reference.advantages import AdvantagesArgs, check_backward

_ARGS = schema_of(AdvantagesArgs)


def _fake(args: AdvantagesArgs) -> tuple[Tensor, Tensor, Tensor]:
    rewards = args.rewards
    shape = rewards.shape if args.token_shape is None else args.token_shape
    return rewards.new_empty(shape), rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    save_record(ctx, *inputs, *output[1:])


def _gradient(ctx, grad, grad_inv_scale, _):  # type: ignore[no-untyped-def]
    args, (inv_scale, numerator) = saved_record(ctx)
    (needs,) = ctx.needs_input_grad
    on_rewards, on_baseline = group_advantages_backward(grad, grad_inv_scale, inv_scale, numerator, *args)
    return {
        "rewards": on_rewards if needs.rewards else None,
        "baseline_values": on_baseline if needs.baseline_values else None,
    }


def _fake_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    args: AdvantagesArgs,
) -> tuple[Tensor, Tensor]:
    rewards, baselines = args.rewards, args.baseline_values
    return rewards.new_empty(rewards.shape), rewards.new_empty(0 if baselines is None else baselines.shape)


group_advantages_backward = define(
    "advantages",
    "group_advantages_backward(Tensor? grad, Tensor? grad_inv_scale, Tensor inv_scale, Tensor numerator,"
    f" {_ARGS}) -> (Tensor, Tensor)",
    record=AdvantagesArgs,
    tensors={
        "grad": Real,  # of tokens, or of rows where there are none
        "grad_inv_scale": RealRows,
        "inv_scale": RealRows,
        "numerator": RealRows,
    },
    check=check_backward,
    fake=_fake_backward,
)

# Further outputs per row: 1 / scale, a factor of prefix-tree advantages and differentiable as well; and
# reward - baseline, for the backward pass.
group_advantages = define(
    "advantages",
    f"group_advantages({_ARGS}) -> (Tensor advantages, Tensor inv_scale, Tensor numerator)",
    record=AdvantagesArgs,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)
