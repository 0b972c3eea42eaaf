"""Ops that reduce the tokens of a scope and map them by what was found."""

from __future__ import annotations

from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import Flags, Offsets, RealTokens
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..core.rows import batch_of
from ..reference.scopes import (
    STATISTICS,
    BonusArgs,
    FlagGrid,
    RealGrid,
    StandardizedArgs,
    Statistics,
    WeightsArgs,
    scope_count,
)

_ARGS, _WEIGHTS = schema_of(StandardizedArgs), schema_of(WeightsArgs)


def _fake(args: StandardizedArgs | WeightsArgs) -> tuple[Tensor, Tensor]:
    x = args.values
    scopes = scope_count(args.groups, batch_of(x.shape, args.cu_seqlens))
    return x.new_empty(x.shape), x.new_empty((scopes, STATISTICS), dtype=widest(x.device))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    save_record(ctx, *inputs, output[1])


def _check_table(grad: Tensor, statistics: Tensor, args: StandardizedArgs | WeightsArgs) -> None:
    """Raise unless there are the statistics of every scope."""
    want = scope_count(args.groups, batch_of(args.values.shape, args.cu_seqlens))
    if statistics.shape[0] != want:
        raise ValueError(f"statistics: got shape {list(statistics.shape)}, want [{want}, {STATISTICS}]")


def _gradient(ctx, grad, _):  # type: ignore[no-untyped-def]
    args, (statistics,) = saved_record(ctx)
    return {"values": standardized_backward(grad, statistics, *args)}


standardized_backward = define(
    "scopes",
    f"standardized_backward(Tensor grad, Tensor statistics, {_ARGS}) -> Tensor",
    record=StandardizedArgs,
    tensors={"grad": RealTokens, "statistics": Statistics},
    check=_check_table,
    fake=lambda grad, statistics, args: args.values.new_empty(args.values.shape),
)

standardized = define(
    "scopes",
    f"standardized({_ARGS}) -> (Tensor, Tensor)",
    record=StandardizedArgs,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def _gradient_weights(ctx, grad, _):  # type: ignore[no-untyped-def]
    args, (statistics,) = saved_record(ctx)
    return {"values": scope_weights_backward(grad, statistics, *args)}


scope_weights_backward = define(
    "scopes",
    f"scope_weights_backward(Tensor grad, Tensor statistics, {_WEIGHTS}) -> Tensor",
    record=WeightsArgs,
    tensors={"grad": RealTokens, "statistics": Statistics},
    check=_check_table,
    fake=lambda grad, statistics, args: args.values.new_empty(args.values.shape),
)

scope_weights = define(
    "scopes",
    f"scope_weights({_WEIGHTS}) -> (Tensor, Tensor)",
    record=WeightsArgs,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient_weights,
)


def _setup_without_gradient(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output)


covariance_terms = define(
    "scopes",
    "covariance_terms(Tensor values, Tensor others, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    tensors={"values": RealTokens, "others": RealTokens, "mask": Flags, "cu_seqlens": Offsets},
    fake=lambda values, others, mask, cu_seqlens: values.new_empty(values.shape),
    setup_context=_setup_without_gradient,
    backward=lambda ctx, grad: {},
)


def _setup_bonus(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    save_record(ctx, *inputs)


def _gradient_bonus(ctx, grad):  # type: ignore[no-untyped-def]
    args, _ = saved_record(ctx)
    return {"values": capped_bonus_backward(grad, *args)}


capped_bonus_backward = define(
    "scopes",
    f"capped_bonus_backward(Tensor grad, {schema_of(BonusArgs)}) -> Tensor",
    record=BonusArgs,
    tensors={"grad": RealGrid},
    fake=lambda grad, args: args.values.new_empty(args.values.shape),
)

capped_bonus = define(
    "scopes",
    f"capped_bonus({schema_of(BonusArgs)}) -> Tensor",
    record=BonusArgs,
    fake=lambda args: args.values.new_empty(args.values.shape),
    setup_context=_setup_bonus,
    backward=_gradient_bonus,
)

steered = define(
    "scopes",
    "steered(Tensor values, Tensor? mask, str form, float low, float high) -> Tensor",
    tensors={"values": RealGrid, "mask": FlagGrid},
    fake=lambda values, *_: values.new_empty(values.shape),
    setup_context=_setup_without_gradient,
    backward=lambda ctx, grad: {},
)


def as_rows(tokens: Tensor | None) -> Tensor | None:
    """A tensor of any shape as ``[B, T]``."""
    if tokens is None or tokens.dim() == 2:
        return tokens
    return tokens.reshape(-1, tokens.shape[-1]) if tokens.dim() > 1 else tokens.reshape(1, -1)
