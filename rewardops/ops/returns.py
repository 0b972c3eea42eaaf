"""Ops of the returns family."""

from __future__ import annotations

from ..core.dispatch import define
from ..core.kinds import RealTokens, WideTokens
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..reference.returns import ReturnsArgs

_ARGS = schema_of(ReturnsArgs)


# ---- extremes ----------------------------------------------------------------------------------------------


def _setup_extremes(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    args, ctx.largest = inputs
    save_record(ctx, args, output)


def _gradient_extremes(ctx, grad):  # type: ignore[no-untyped-def]
    args, (returns,) = saved_record(ctx)
    return {"rewards": extreme_returns_backward(grad, returns, *args, ctx.largest)}


extreme_returns_backward = define(
    "returns",
    f"extreme_returns_backward(Tensor grad, Tensor returns, {_ARGS}, bool largest) -> Tensor",
    record=ReturnsArgs,
    tensors={"grad": RealTokens, "returns": RealTokens},
    fake=lambda grad, returns, args, *_: args.rewards.new_empty(args.rewards.shape),
)

extreme_returns = define(
    "returns",
    f"extreme_returns({_ARGS}, bool largest) -> Tensor",
    record=ReturnsArgs,
    fake=lambda args, *_: args.rewards.new_empty(args.rewards.shape),
    setup_context=_setup_extremes,
    backward=_gradient_extremes,
)


# ---- soft minima -------------------------------------------------------------------------------------------


def _setup_rewards(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    args, *ctx.options = inputs
    save_record(ctx, args)


def _gradient_rewards(ctx, grad):  # type: ignore[no-untyped-def]
    args, _ = saved_record(ctx)
    return {"rewards": softmin_rewards_backward(grad, *args, *ctx.options)}


softmin_rewards_backward = define(
    "returns",
    f"softmin_rewards_backward(Tensor grad, {_ARGS}, float temperature, bool through_weights) -> Tensor",
    record=ReturnsArgs,
    tensors={"grad": RealTokens},
    fake=lambda grad, args, *_: args.rewards.new_empty(args.rewards.shape),
)

softmin_rewards = define(
    "returns",
    f"softmin_rewards({_ARGS}, float temperature, bool through_weights) -> Tensor",
    record=ReturnsArgs,
    fake=lambda args, *_: args.rewards.new_empty(args.rewards.shape),
    setup_context=_setup_rewards,
    backward=_gradient_rewards,
)


def _setup_returns(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    args, ctx.temperature, _ = inputs
    _, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    save_record(ctx, args, log_sums)


def _gradient_returns(ctx, grad, _):  # type: ignore[no-untyped-def]
    args, (log_sums,) = saved_record(ctx)
    return {"rewards": softmin_returns_backward(grad, log_sums, *args, ctx.temperature)}


softmin_returns_backward = define(
    "returns",
    f"softmin_returns_backward(Tensor grad, Tensor log_sums, {_ARGS}, float temperature) -> Tensor",
    record=ReturnsArgs,
    tensors={"grad": RealTokens, "log_sums": WideTokens},
    fake=lambda grad, log_sums, args, *_: args.rewards.new_empty(args.rewards.shape),
)

softmin_returns = define(
    "returns",
    f"softmin_returns({_ARGS}, float temperature, bool mean) -> (Tensor returns, Tensor log_sums)",
    record=ReturnsArgs,
    fake=lambda args, *_: (
        args.rewards.new_empty(args.rewards.shape),
        args.rewards.new_empty(args.rewards.shape, dtype=widest(args.rewards.device)),
    ),
    setup_context=_setup_returns,
    backward=_gradient_returns,
)
