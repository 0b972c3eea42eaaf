"""Ops of the segments family."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import Flags, IdTokens, Offsets, RealTokens
from ..core.precision import wide, widest
from ..core.records import save_record, saved_record, schema_of
from ..core.rows import Layout, batch_of
from ..reference.segments import SegmentsArgs

_ARGS = schema_of(SegmentsArgs)


# ---- rows --------------------------------------------------------------------------------------------------


def _setup_sums(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, mask, cu_seqlens = inputs
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.shape = values.shape


def _gradient_sums(ctx, grad):  # type: ignore[no-untyped-def]
    mask, cu_seqlens = ctx.saved_tensors
    on_tokens = Layout(grad.shape[0], tuple(ctx.shape), mask, cu_seqlens).expand(grad)
    return {"values": on_tokens if mask is None else torch.where(mask, on_tokens, 0)}


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
    out, saved = output
    ctx.mark_non_differentiable(saved)
    save_record(ctx, *inputs, out, saved)


def _gradient_reduce(ctx, grad, _):  # type: ignore[no-untyped-def]
    args, (out, saved) = saved_record(ctx)
    return {"values": segment_reduce_backward(grad, out, saved, *args)}


segment_reduce_backward = define(
    "segments",
    f"segment_reduce_backward(Tensor grad, Tensor out, Tensor saved, {_ARGS}) -> Tensor",
    record=SegmentsArgs,
    tensors={
        "grad": Annotated[Tensor, "real", "B", "num_steps"],
        "out": Annotated[Tensor, "real", "B", "num_steps"],
        "saved": Annotated[Tensor, "float64", "B", "num_steps"],
    },
    fake=lambda grad, out, saved, args: args.values.new_empty(args.values.shape),
)


def _fake_reduce(args: SegmentsArgs) -> tuple[Tensor, Tensor]:
    shape = (batch_of(args.values.shape, args.cu_seqlens), args.num_steps)
    return args.values.new_empty(shape), args.values.new_empty(shape, dtype=widest(args.values.device))


segment_reduce = define(
    "segments",
    f"segment_reduce({_ARGS}) -> (Tensor, Tensor)",
    record=SegmentsArgs,
    fake=_fake_reduce,
    setup_context=_setup_reduce,
    backward=_gradient_reduce,
)


def _setup_broadcast(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    steps, *tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.num_steps = steps.shape[1]


def _gradient_broadcast(ctx, grad):  # type: ignore[no-untyped-def]
    return {"steps": segment_reduce(grad, *ctx.saved_tensors, ctx.num_steps, "sum")[0]}


segment_broadcast = define(
    "segments",
    "segment_broadcast(Tensor steps, Tensor ids, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    tensors={
        "steps": Annotated[Tensor, "real", "B", "S"],
        "ids": IdTokens,
        "mask": Flags,
        "cu_seqlens": Offsets,
    },
    fake=lambda steps, ids, *_: steps.new_empty(ids.shape),
    setup_context=_setup_broadcast,
    backward=_gradient_broadcast,
)
