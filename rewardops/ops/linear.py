"""Ops of the linear family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.inplace import backward_may_overwrite
from ..core.kinds import Coefficients, RealTokens, Records
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..core.transforms import may_overwrite_saved, second_derivative
from ..reference import linear as spec
from ..reference.linear import LinearArgs, precision
from ..reference.logits import RECORD

_ARGS = schema_of(LinearArgs)
_SIDES = LinearArgs._fields[:6]  # the tensors with a gradient


def _wide(args: LinearArgs) -> torch.dtype:
    return precision(args.hidden, args.weight, args.ref_hidden, args.ref_weight)


def _fake_record(args: LinearArgs) -> Tensor:
    return args.hidden.new_empty((*args.tokens.shape, len(RECORD)), dtype=widest(args.hidden.device))


def _fake_outputs(args: LinearArgs) -> list[Tensor]:
    dtypes = (torch.bool if name == "is_top1" else _wide(args) for name in args.outputs)
    return [args.hidden.new_empty(args.tokens.shape, dtype=dtype) for dtype in dtypes]


def _fake_gradients(args: LinearArgs, needs: Sequence[bool]) -> list[Tensor]:
    return [
        args.hidden.new_empty(0)
        if t is None or not need
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(args[:6], needs, strict=False)
    ]


def _sides_needed(args: LinearArgs, needs: Any) -> list[bool]:
    return [t is not None and need for t, need in zip(args[:6], needs[:6], strict=True)]


def _by_side(grads: Sequence[Tensor], needs: Sequence[bool]) -> dict[str, Tensor]:
    return {name: g for name, g, need in zip(_SIDES, grads, needs, strict=False) if need}


# ---- linear_token_stats ------------------------------------------------------------------------------------


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    save_record(ctx, *inputs, output[0])


def _gradient(ctx, grads):  # type: ignore[no-untyped-def]
    args, (saved,) = saved_record(ctx)
    needs = _sides_needed(args, *ctx.needs_input_grad)
    if all(g is None for g in grads[1:]):
        return {}
    return _by_side(linear_token_stats_backward(grads[1:], saved, *args, needs), needs)


linear_token_stats_backward = define(
    "linear",
    f"linear_token_stats_backward(Tensor?[] grads, Tensor saved, {_ARGS}, bool[] needs) -> Tensor[]",
    record=LinearArgs,
    tensors={"grads": RealTokens, "saved": Records},
    check=spec.check_backward,
    fake=lambda grads, saved, args, needs: _fake_gradients(args, needs),
)

linear_token_stats = define(
    "linear",
    f"linear_token_stats({_ARGS}) -> Tensor[]",
    record=LinearArgs,
    check=spec.check_args,
    fake=lambda args: [_fake_record(args), *_fake_outputs(args)],
    setup_context=_setup,
    backward=_gradient,
)


# ---- a loss that is known at the call ----------------------------------------------------------------------


def _fake_loss(coefficients: Any, terms: Any, needs: Sequence[bool], args: LinearArgs) -> list[Tensor]:
    loss = args.hidden.new_empty((), dtype=precision(*args[:6]))
    return [loss, *_fake_gradients(args, needs), *_fake_outputs(args)]


def _setup_loss(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:4])
    ctx.needs = inputs[2]
    ctx.inplace = may_overwrite_saved()


def _gradient_loss(ctx, grads):  # type: ignore[no-untyped-def]
    if any(g is not None for g in grads[1:4]):
        raise RuntimeError(second_derivative("linear_token_loss"))
    upstream = grads[0]
    if upstream is None:
        return {}
    # In place, as the weight's gradient is large: a second backward pass sees its changed version, and raises.
    scaled = Tensor.mul_ if ctx.inplace and backward_may_overwrite(upstream) else Tensor.mul
    sides = zip(_SIDES, ctx.saved_tensors, ctx.needs, strict=False)
    return {name: scaled(g, upstream.to(g.dtype)) for name, g, need in sides if need}


linear_token_loss = define(
    "linear",
    f"linear_token_loss(Tensor[] coefficients, str[] terms, bool[] needs, {_ARGS}) -> Tensor[]",
    record=LinearArgs,
    tensors={"coefficients": Coefficients},
    check=spec.check_loss,
    fake=_fake_loss,
    setup_context=_setup_loss,
    backward=_gradient_loss,
)


# ---- parts of the vocabulary -------------------------------------------------------------------------------


def _gradient_partial(ctx, grad):  # type: ignore[no-untyped-def]
    args, (record,) = saved_record(ctx)
    needs = _sides_needed(args, *ctx.needs_input_grad)
    return _by_side(linear_token_stats_partial_backward(grad, record, *args, needs), needs)


linear_token_stats_partial_backward = define(
    "linear",
    f"linear_token_stats_partial_backward(Tensor grad_record, Tensor record, {_ARGS}, bool[] needs) -> Tensor[]",
    record=LinearArgs,
    tensors={"grad_record": Records, "record": Records},
    check=spec.check_partial_backward,
    fake=lambda grad_record, record, args, needs: _fake_gradients(args, needs),
)

linear_token_stats_partial = define(
    "linear",
    f"linear_token_stats_partial({_ARGS}) -> Tensor",
    record=LinearArgs,
    check=spec.check_args,
    fake=_fake_record,
    setup_context=lambda ctx, inputs, output: save_record(ctx, *inputs, output),
    backward=_gradient_partial,
)
