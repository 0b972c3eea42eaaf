"""Ops of the logits family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.inplace import backward_may_overwrite, obstacle
from ..core.kinds import Coefficients, RealTokens, Records
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..core.transforms import may_overwrite_saved
from ..reference import logits as spec
from ..reference.logits import RECORD, TokenStatsArgs, accumulator, read_beside, saved_rows

_ARGS = schema_of(TokenStatsArgs)
_ARGS_OVERWRITTEN = _ARGS.replace("Tensor logits", "Tensor(a!) logits")


def _fake_gradients(args: TokenStatsArgs, to_logits: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    like = args.logits if args.ref_logits is None else args.ref_logits
    return args.logits.new_empty(args.logits.shape if to_logits else 0), like.new_empty(
        like.shape if to_ref else 0
    )


# ---- token_stats -------------------------------------------------------------------------------------------


def _fake(args: TokenStatsArgs, inplace: bool) -> list[Tensor]:
    shape, acc = args.tokens.shape, accumulator(args.logits)
    saved = args.logits.new_empty(
        (saved_rows(args.ref_logits is not None), *shape), dtype=widest(args.logits.device)
    )
    dtypes = (torch.bool if name == "is_top1" else acc for name in args.outputs)
    return [saved, *(args.logits.new_empty(shape, dtype=dtype) for dtype in dtypes)]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    args, inplace = inputs
    ctx.set_materialize_grads(False)
    save_record(ctx, args, output[0])
    ctx.inplace = inplace and may_overwrite_saved()


def _overwritable(args: TokenStatsArgs, grads: Sequence[Tensor | None]) -> bool:
    """True if the gradient can be written over the logits; elsewhere it gets memory of its own."""
    if not backward_may_overwrite(args.logits, *grads):
        return False
    return obstacle(args.logits, "logits", read_beside(args, "grads", args.outputs, grads)) is None


def _gradient(ctx, grads):  # type: ignore[no-untyped-def]
    args, (saved,) = saved_record(ctx)
    needs, _ = ctx.needs_input_grad
    to_ref = args.ref_logits is not None and needs.ref_logits
    if all(g is None for g in grads[1:]):
        return {}
    if ctx.inplace and needs.logits and _overwritable(args, grads[1:]):
        grad = args.logits.detach()
        ref = token_stats_backward_(grads[1:], saved, *args._replace(logits=grad), True, to_ref)
        # The logits are overwritten: a second backward pass sees their changed version, and raises.
        torch.autograd.graph.increment_version(args.logits)
    else:
        grad, ref = token_stats_backward(grads[1:], saved, *args, needs.logits, to_ref)
    return {"logits": grad if needs.logits else None, "ref_logits": ref if to_ref else None}


_UPSTREAM = {"grads": RealTokens, "saved": Annotated[Tensor, "float64", "S", "..."]}

token_stats_backward = define(
    "logits",
    f"token_stats_backward(Tensor?[] grads, Tensor saved, {_ARGS}, bool to_logits, bool to_ref)"
    " -> (Tensor, Tensor)",
    record=TokenStatsArgs,
    tensors=_UPSTREAM,
    check=spec.check_backward,
    fake=lambda grads, saved, args, *wanted: _fake_gradients(args, *wanted),
)

token_stats_backward_ = define(
    "logits",
    f"token_stats_backward_(Tensor?[] grads, Tensor saved, {_ARGS_OVERWRITTEN}, bool to_logits, bool to_ref)"
    " -> Tensor",
    record=TokenStatsArgs,
    tensors=_UPSTREAM,
    check=spec.check_backward_,
    fake=lambda grads, saved, args, to_logits, to_ref: _fake_gradients(args, False, to_ref)[1],
)

token_stats = define(
    "logits",
    f"token_stats({_ARGS}, bool inplace) -> Tensor[]",
    record=TokenStatsArgs,
    check=lambda args, inplace: spec.check_args(args),
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


# ---- a loss that is known at the call ----------------------------------------------------------------------

# Statistics are stacked, in the order of the outputs and is_top1 as 0 or 1: functionalisation, which brings the op
# that overwrites the logits into a compiled graph, does not support lists.
_KNOWN = "Tensor[] coefficients, str[] terms"


def _fake_stacked(coefficients: list[Tensor], terms: list[str], args: TokenStatsArgs) -> Tensor:
    return args.logits.new_empty((len(args.outputs), *args.tokens.shape), dtype=accumulator(args.logits))


token_stats_and_grad = define(
    "logits",
    f"token_stats_and_grad({_KNOWN}, {_ARGS}) -> (Tensor, Tensor)",
    record=TokenStatsArgs,
    tensors={"coefficients": Coefficients},
    check=spec.check_loss,
    fake=lambda *args: (_fake_stacked(*args), args[-1].logits.new_empty(args[-1].logits.shape)),
)

token_stats_and_grad_ = define(
    "logits",
    f"token_stats_and_grad_({_KNOWN}, {_ARGS_OVERWRITTEN}) -> Tensor",
    record=TokenStatsArgs,
    tensors={"coefficients": Coefficients},
    check=spec.check_loss_,
    fake=_fake_stacked,
)


# ---- parts of the vocabulary -------------------------------------------------------------------------------


def _gradient_partial(ctx, grad):  # type: ignore[no-untyped-def]
    args, (record,) = saved_record(ctx)
    (needs,) = ctx.needs_input_grad
    to_ref = args.ref_logits is not None and needs.ref_logits
    on_logits, on_ref = token_stats_partial_backward(grad, record, *args, needs.logits, to_ref)
    return {"logits": on_logits if needs.logits else None, "ref_logits": on_ref if to_ref else None}


token_stats_partial_backward = define(
    "logits",
    f"token_stats_partial_backward(Tensor grad_record, Tensor record, {_ARGS}, bool to_logits, bool to_ref)"
    " -> (Tensor, Tensor)",
    record=TokenStatsArgs,
    tensors={"grad_record": Records, "record": Records},
    check=lambda grad_record, record, args, *wanted: spec.check_args(args),
    fake=lambda grad_record, record, args, *wanted: _fake_gradients(args, *wanted),
)

token_stats_partial = define(
    "logits",
    f"token_stats_partial({_ARGS}) -> Tensor",
    record=TokenStatsArgs,
    check=spec.check_args,
    fake=lambda args: args.logits.new_empty(
        (*args.tokens.shape, len(RECORD)), dtype=widest(args.logits.device)
    ),
    setup_context=lambda ctx, inputs, output: save_record(ctx, *inputs, output),
    backward=_gradient_partial,
)
