"""Segments: reductions of tokens over their rows and steps, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .core.checks import (
    check_choice,
    check_device,
    check_float,
    check_whole,
    promote,
    show,
    step_markers,
    token_layout,
)
from .core.dispatch import define
from .core.rows import Layout, batch_of
from .core.settings import may_read
from .reference.segments import REDUCTIONS
from .returns import step_ends


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, mask, cu_seqlens = inputs
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.shape = values.shape


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    mask, cu_seqlens = ctx.saved_tensors
    up = Layout(grad.shape[0], tuple(ctx.shape), mask, cu_seqlens).expand(grad)
    return up if mask is None else torch.where(mask, up, 0), None, None


_row_sums = define(
    "segments",
    "row_sums(Tensor values, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda values, mask, cu_seqlens: values.new_empty(batch_of(values.shape, cu_seqlens)),
    setup_context=_setup,
    backward=_gradient,
)


_row_counts = define(
    "segments",
    "row_counts(Tensor mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda mask, cu_seqlens: mask.new_empty(batch_of(mask.shape, cu_seqlens), dtype=torch.float64),
)


def row_counts(rows: Layout, device: torch.device) -> Tensor:
    """``[B]``, how many tokens of each row are valid; float64."""
    if rows.mask is not None:
        out: Tensor = _row_counts(rows.mask, rows.cu_seqlens)
        return out
    if rows.cu_seqlens is not None:
        return (rows.cu_seqlens[1:] - rows.cu_seqlens[:-1]).double()
    return torch.full((rows.batch,), rows.shape[1], dtype=torch.float64, device=device)


def row_sums(values: Tensor, rows: Layout) -> Tensor:
    """``[B]``, the sum of each row's valid tokens, in the dtype of ``values`` (float32 or float64)."""
    out: Tensor = _row_sums(values, rows.mask, rows.cu_seqlens)
    return out


# ---- steps -------------------------------------------------------------------------------------------------


def _setup_reduce(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, ids, mask, cu_seqlens, _, ctx.op = inputs
    out, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(values, ids, out, kept, mask, cu_seqlens)


def _gradient_reduce(ctx, grad, _):  # type: ignore[no-untyped-def]
    return (_reduce_backward(grad, *ctx.saved_tensors, ctx.op), *[None] * 5)


_reduce_backward = define(
    "segments",
    "segment_reduce_backward(Tensor grad, Tensor values, Tensor ids, Tensor out, Tensor kept, Tensor? mask,"
    " Tensor? cu_seqlens, str op) -> Tensor",
    fake=lambda grad, values, *_: values.new_empty(values.shape),
)


def _fake_reduce(values, ids, mask, cu_seqlens, segments, op):  # type: ignore[no-untyped-def]
    shape = (batch_of(values.shape, cu_seqlens), segments)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.float64)


_reduce = define(
    "segments",
    "segment_reduce(Tensor values, Tensor ids, Tensor? mask, Tensor? cu_seqlens, SymInt segments, str op)"
    " -> (Tensor, Tensor)",
    fake=_fake_reduce,
    setup_context=_setup_reduce,
    backward=_gradient_reduce,
)


def _setup_broadcast(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    steps, *tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.segments = steps.shape[1]


_broadcast = define(
    "segments",
    "segment_broadcast(Tensor steps, Tensor ids, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda steps, ids, *_: steps.new_empty(ids.shape),
    setup_context=_setup_broadcast,
    backward=lambda ctx, grad: (_reduce(grad, *ctx.saved_tensors, ctx.segments, "sum")[0], None, None, None),
)


def _step_ids(markers: Tensor, rows: Layout) -> Tensor:
    """Step ids from ids or from flags, of which the k-th ends step k; what follows the last flag is of no step."""
    if markers.dtype is not torch.bool:
        return markers
    flags = (markers if rows.mask is None else markers & rows.mask).to(torch.int64)
    if rows.cu_seqlens is None:
        before, total = flags.cumsum(1) - flags, flags.sum(1)
    else:
        through = torch.nn.functional.pad(flags.cumsum(0), (1, 0))  # flags before each place
        bounds = through[rows.cu_seqlens.to(torch.int64)]
        before, total = through[:-1] - rows.expand(bounds[:-1]), bounds[1:] - bounds[:-1]
    return torch.where(before < rows.expand(total), before, -1)


def _prepare(
    name: str, values: Tensor, segments: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Tensor]:
    """The layout and the steps, checked."""
    rows = token_layout(name, values, mask, cu_seqlens)
    markers = step_markers(segments, values, rows, name, "segments")
    if markers is None:
        raise TypeError("segments: got None, want step ids or step-end flags")
    return rows, markers


def segment_reduce(
    values: Tensor,
    segments: Tensor,
    op: str = "sum",
    *,
    num_segments: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A number for every step of a row, from those of its valid tokens: ``[B, num_segments]``.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        segments: the shape of ``values``. Integer: step ids, non-decreasing along a row, negative for none. bool:
            the tokens that end a step, of which the first ends step 0; what follows the last is of no step.
        op: ``"sum"``, ``"mean"``, ``"min"``, ``"max"``, ``"prod"``, ``"first"``, ``"last"`` or ``"any"`` (1 where a
            value is not 0).
        num_segments: of the longest row; needed where the tokens lie on a device, as reading it there would be a
            synchronisation. Steps from it on are left out.

    Returns:
        float32 (float64 for float64), 0 for a step without a valid token. Differentiable in ``values`` (not
        ``"any"``): of the extremes the earliest of equals has the gradient.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an unknown op,
            no ``num_segments`` where it cannot be read.
    """
    check_float("values", values)
    check_choice("op", op, REDUCTIONS)
    rows, markers = _prepare("values", values, segments, mask, cu_seqlens)
    if num_segments is not None:
        check_whole("num_segments", num_segments, 0)
    ids = _step_ids(markers, rows)
    if num_segments is None:
        if not may_read(ids):
            raise ValueError("num_segments: got None, want the number of steps of the longest row")
        kept = ids if rows.mask is None else ids[rows.mask]
        num_segments = max(int(kept.max()) + 1, 0) if kept.numel() else 0
    (wide,) = promote(values)
    out: Tensor = _reduce(wide, ids, rows.mask, rows.cu_seqlens, num_segments, op)[0]
    return out


def _spread(
    steps: Tensor, segments: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Tensor, Tensor]:
    check_float("step_values", steps)
    if not isinstance(segments, Tensor):
        raise TypeError(f"segments: got {type(segments).__name__}, want a tensor")
    rows, markers = _prepare("segments", segments, segments, mask, cu_seqlens)
    if steps.dim() != 2 or steps.shape[0] != rows.batch:
        want = f"[{rows.batch}, steps] (a row per row of segments)"
        raise ValueError(f"step_values: got shape {show(steps.shape)}, want {want}")
    check_device("step_values", steps, segments.device, "segments")
    (wide,) = promote(steps)
    ids = _step_ids(markers, rows)
    return rows, ids, _broadcast(wide, ids, rows.mask, rows.cu_seqlens)


def segment_broadcast(
    step_values: Tensor, segments: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The number of its step ``[B, steps]`` on every valid token; 0 on those of none.

    Args:
        segments: as in :func:`segment_reduce`, ``[B, T]``, or ``[N]`` with ``cu_seqlens``.

    Returns:
        The layout of ``segments``. Differentiable in ``step_values``.
    """
    return _spread(step_values, segments, mask, cu_seqlens)[2]


def place_at_step_end(
    step_values: Tensor, segments: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The number of each step ``[B, steps]`` on its last valid token, 0 elsewhere; as :func:`segment_broadcast`."""
    rows, ids, out = _spread(step_values, segments, mask, cu_seqlens)
    ends = step_ends(ids, rows)
    return torch.where(ends, out, 0)
