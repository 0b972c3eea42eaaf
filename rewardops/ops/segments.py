"""Ops of the segments family."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import Flags, Markers, Offsets, RealTokens
from ..core.precision import wide, widest
from ..core.records import save_record, saved_record, schema_of
from ..core.rows import Layout, batch_of
from ..core.transforms import second_derivative
from ..reference.segments import KEEPING, SegmentsArgs

_ARGS = schema_of(SegmentsArgs)


# ---- rows --------------------------------------------------------------------------------------------------


def _setup_sums(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, mask, cu_seqlens = inputs
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.shape = values.shape


def _gradient_sums(ctx, grad):  # type: ignore[no-untyped-def]
    values, up = grad.new_empty(()).expand(ctx.shape), grad[:, None]
    kept = grad.new_empty((grad.shape[0], 0), dtype=widest(grad.device))
    mask, cu_seqlens = ctx.saved_tensors
    return {"values": segment_reduce_backward(up, up, kept, values, None, mask, cu_seqlens, 1, "sum")}


_row_sums = define(
    "segments",
    "row_sums(Tensor values, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    tensors={"values": RealTokens, "mask": Flags, "cu_seqlens": Offsets},
    fake=lambda values, mask, cu_seqlens: values.new_empty(batch_of(values.shape, cu_seqlens)),
    setup_context=_setup_sums,
    backward=_gradient_sums,
)

_row_counts = define(
    "segments",
    "row_counts(Tensor mask, Tensor? cu_seqlens) -> Tensor",
    tensors={"mask": Flags, "cu_seqlens": Offsets},
    fake=lambda mask, cu_seqlens: mask.new_empty(batch_of(mask.shape, cu_seqlens), dtype=widest(mask.device)),
)


def row_counts(rows: Layout, device: torch.device) -> Tensor:
    """``[B]`` float64, the number of valid tokens of each row."""
    if rows.mask is not None:
        out: Tensor = _row_counts(rows.mask, rows.cu_seqlens)
        return out
    if rows.cu_seqlens is not None:
        return wide(rows.cu_seqlens[1:] - rows.cu_seqlens[:-1])
    return torch.full((rows.batch,), rows.shape[1], dtype=widest(device), device=device)


def row_sums(values: Tensor, rows: Layout) -> Tensor:
    """``[B]``, the sum of each row's valid tokens, in the dtype of ``values`` (float32 or float64)."""
    out: Tensor = _row_sums(values, rows.mask, rows.cu_seqlens)
    return out


# ---- steps -------------------------------------------------------------------------------------------------


def _setup_reduce(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (args,), (out, kept) = inputs, output
    ctx.mark_non_differentiable(kept)
    if args.op != "prod":  # which alone reads the values again
        args = args._replace(values=args.values.new_empty(()).expand(args.values.shape))
    save_record(ctx, args, out, kept)


def _gradient_reduce(ctx, grad, _):  # type: ignore[no-untyped-def]
    args, (out, kept) = saved_record(ctx)
    return {"values": segment_reduce_backward(grad, out, kept, *args)}


def _setup_again(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *_, args = inputs
    save_record(ctx, args._replace(values=None))


def _gradient_again(ctx, grad):  # type: ignore[no-untyped-def]
    args, _ = saved_record(ctx)
    if args.op not in ("sum", "mean"):  # the others are not linear, or have no use for it
        raise RuntimeError(second_derivative("segment_reduce"))
    return {"grad": segment_reduce(*args._replace(values=grad))[0]}


def _check_kept(grad: Tensor, out: Tensor, kept: Tensor, args: SegmentsArgs) -> None:
    if args.op in KEEPING and kept.shape != grad.shape:
        raise ValueError(f"kept: got shape {list(kept.shape)}, want {list(grad.shape)}")


segment_reduce_backward = define(
    "segments",
    f"segment_reduce_backward(Tensor grad, Tensor out, Tensor kept, {_ARGS}) -> Tensor",
    record=SegmentsArgs,
    tensors={
        "grad": Annotated[Tensor, "real", "B", "num_steps"],
        "out": Annotated[Tensor, "real", "B", "num_steps"],
        "kept": Annotated[Tensor, "float64", "B", "num_steps", "or", "B", "0"],
    },
    check=_check_kept,
    fake=lambda grad, out, kept, args: args.values.new_empty(args.values.shape),
    setup_context=_setup_again,
    backward=_gradient_again,
)


def _fake_reduce(args: SegmentsArgs) -> tuple[Tensor, Tensor]:
    batch = batch_of(args.values.shape, args.cu_seqlens)
    kept = (batch, args.num_steps if args.op in KEEPING else 0)
    return (
        args.values.new_empty((batch, args.num_steps)),
        args.values.new_empty(kept, dtype=widest(args.values.device)),
    )


segment_reduce = define(
    "segments",
    f"segment_reduce({_ARGS}) -> (Tensor, Tensor)",
    record=SegmentsArgs,
    fake=_fake_reduce,
    setup_context=_setup_reduce,
    backward=_gradient_reduce,
)


def of_rows(values: Tensor, rows: Layout, op: str) -> Tensor:
    """``[B]``: the reduction of the valid tokens of each row; 0 for a row without one."""
    out: Tensor = segment_reduce(values, None, rows.mask, rows.cu_seqlens, 1, op)[0]
    return out[:, 0]


def _setup_tokens(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    step_values, steps, mask, cu_seqlens, at_ends = inputs
    _, ends = output
    ctx.mark_non_differentiable(ends)
    ctx.save_for_backward(steps, ends if at_ends else mask, cu_seqlens)
    ctx.num_steps = step_values.shape[1]


def _gradient_tokens(ctx, grad, _):  # type: ignore[no-untyped-def]
    return {"step_values": segment_reduce(grad, *ctx.saved_tensors, ctx.num_steps, "sum")[0]}


_steps_to_tokens = define(
    "segments",
    "steps_to_tokens(Tensor step_values, Tensor steps, Tensor? mask, Tensor? cu_seqlens, bool at_ends)"
    " -> (Tensor, Tensor)",
    tensors={
        "step_values": Annotated[Tensor, "real", "B", "S"],
        "steps": Markers,
        "mask": Flags,
        "cu_seqlens": Offsets,
    },
    fake=lambda step_values, steps, mask, cu_seqlens, at_ends: (
        step_values.new_empty(steps.shape),
        steps.new_empty(steps.shape if at_ends else 0, dtype=torch.bool),
    ),
    setup_context=_setup_tokens,
    backward=_gradient_tokens,
)


def segment_broadcast(
    step_values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, at_ends: bool = False
) -> Tensor:
    """Per token, the value of its step, or with ``at_ends`` that of the step that it ends; 0 elsewhere."""
    out: Tensor = _steps_to_tokens(step_values, steps, mask, cu_seqlens, at_ends)[0]
    return out
