"""Reductions over rows and steps on the GPU, and values of steps at their tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.segments import KEEPING, REDUCTIONS, SegmentsArgs
from .launch import BITS, cdiv, pointer
from .rows import Rows, as_bytes, dense, row_bounds, stride, to_boundary
from .scans import AGGREGATES, MAX_CHUNKS, RESUMED, WHOLE, chunk_of, new_state, scan_in_stages
from .segments_open import FIELDS
from .segments_reduce import segment_reduce_kernel
from .segments_tokens import steps_to_tokens_kernel
from .steps import FLAGS, ROW, as_pointer, kind_of
from .tiles import EACH, THREADS, WARPS, is_aligned

__all__ = ["row_counts", "row_sums", "segment_reduce", "segment_reduce_backward", "steps_to_tokens"]


# ---- rows --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["width", "total", "mask_stride"])
def row_counts_kernel(mask, cu, counts, width, total, mask_stride, PACKED: tl.constexpr, T: tl.constexpr):
    """Program b: the number of valid tokens of row b, 16 of them in a load."""
    b = tl.program_id(0)
    base, length = row_bounds(cu, b, width, total, PACKED)
    row = mask + base + b.to(tl.int64) * mask_stride
    before = tl.minimum(to_boundary(row), length)
    whole = (length - before) // 16
    behind = before + whole * 16
    byte = tl.arange(0, 16)
    count = (tl.load(row + byte, mask=byte < before, other=0) != 0).to(tl.int64)
    count += (tl.load(row + behind + byte, mask=behind + byte < length, other=0) != 0).to(tl.int64)
    words = tl.multiple_of((row + before).to(tl.pointer_type(tl.uint32)), 16)
    counts_here = tl.zeros([T, 4], tl.int32)
    thread = tl.arange(0, T)[:, None]
    for start in range(0, whole, T):
        at = (start + thread) * 4 + tl.arange(0, 4)[None, :]
        word = tl.load(words + at, mask=start + thread < whole, other=0)
        # The highest bit of every byte that is not 0.
        bits = (((word & 0x7F7F7F7F) + 0x7F7F7F7F) | word) & 0x80808080
        counts_here += (((bits >> 7) * 0x01010101) >> 24).to(tl.int32)
    valid = tl.sum(count, 0) + tl.sum(tl.sum(counts_here, 1), 0)
    tl.store(counts + b, valid.to(tl.float64))


def row_counts(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = Rows.of(mask.shape, cu_seqlens, mask)
    counts = mask.new_empty(rows.batch, dtype=torch.float64)
    flags = as_bytes(mask)
    if rows.batch:
        row_counts_kernel[(rows.batch,)](
            flags, rows.cu, counts, rows.width, rows.total, stride(flags), PACKED=rows.packed, T=THREADS,
            num_warps=WARPS, **BITS,
        )  # fmt: skip
    return counts


def row_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return segment_reduce(SegmentsArgs(values, None, mask, cu_seqlens, 1, "sum"))[0][:, 0]


# ---- steps -------------------------------------------------------------------------------------------------


def _kind(steps: Tensor | None) -> int:
    return ROW.value if steps is None else kind_of(steps)


def segment_reduce(a: SegmentsArgs) -> tuple[Tensor, Tensor]:
    rows = Rows.of(a.values.shape, a.cu_seqlens, a.values)
    values, steps, mask = dense(a.values), as_pointer(a.steps), as_bytes(a.mask)
    kind = _kind(a.steps)
    out = values.new_empty((rows.batch, a.num_steps))
    kept = values.new_empty((rows.batch, a.num_steps if a.op in KEEPING else 0), dtype=torch.float64)
    if not out.numel():
        return out, kept
    chunk = chunk_of(rows, values)
    chunks = max(1, cdiv(rows.width, max(chunk, 1)))
    state = new_state(rows.batch, chunks, values, FIELDS.value)

    def launch(stage: int) -> None:
        # Programs of a row that is one step are merged by the first of them.
        programs = 1 if kind == ROW.value and stage != AGGREGATES.value else chunks
        segment_reduce_kernel[(rows.batch, programs)](
            values, pointer(steps, values), pointer(mask, values), rows.cu, out, kept, state, rows.width,
            rows.total, chunks, chunk, a.num_steps, stride(values), stride(steps), stride(mask),
            OP=REDUCTIONS.index(a.op), KIND=kind, PACKED=rows.packed, HAS_MASK=mask is not None, STAGE=stage,
            ALIGNED=is_aligned(rows, values, steps, mask), MAX_CHUNKS=MAX_CHUNKS, PER=EACH, T=THREADS,
            num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out, kept


def _to_tokens(
    up: Tensor,
    a: SegmentsArgs,
    at_ends: bool = False,
    reduced: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of a reduction by its gradient ``up``: of a sum that is the value of the step at every token."""
    rows = Rows.of(a.values.shape, a.cu_seqlens, up)
    steps, mask = as_pointer(a.steps), as_bytes(a.mask)
    values = dense(a.values) if a.op == "prod" else None  # no other gradient reads them
    kind = _kind(a.steps)
    up = up.contiguous()
    reduced, kept = (None if x is None else x.contiguous() for x in (reduced, kept))
    make = up.new_empty if rows.batch and up.numel() else up.new_zeros
    out = make(a.values.shape)
    ends = make(a.values.shape if at_ends else 0, dtype=torch.bool)
    if not out.numel() or not rows.batch or not up.numel():
        return out, ends
    chunk = chunk_of(rows, up)
    chunks = cdiv(rows.width, chunk)
    state = new_state(rows.batch, chunks, up, 1)
    # The gradients by a position are one.
    op = a.op if a.op in ("sum", "mean", "prod") else "last"
    aligned = is_aligned(rows, values, steps, mask, out, as_bytes(ends) if at_ends else None)

    def launch(stage: int) -> None:
        steps_to_tokens_kernel[(rows.batch, chunks)](
            up, pointer(values, up), pointer(steps, up), pointer(mask, up), rows.cu, pointer(reduced, up),
            pointer(kept, up), out, ends.view(torch.uint8), state, rows.batch, rows.width, rows.total, chunks,
            chunk, up.shape[1], stride(values), stride(steps), stride(mask), stride(out),
            OP=REDUCTIONS.index(op), AT_ENDS=at_ends, KIND=kind, PACKED=rows.packed, HAS_MASK=mask is not None,
            STAGE=stage, ALIGNED=aligned, MAX_CHUNKS=MAX_CHUNKS, PER=EACH, T=THREADS, num_warps=WARPS, **BITS,
        )  # fmt: skip

    if kind == FLAGS.value:
        scan_in_stages(launch, chunks)
    else:
        launch((WHOLE if chunks == 1 else RESUMED).value)
    return out, ends


def segment_reduce_backward(grad: Tensor, out: Tensor, kept: Tensor, a: SegmentsArgs) -> Tensor:
    if a.op == "any":
        return grad.new_zeros(a.values.shape)
    return _to_tokens(grad, a, False, out, kept if a.op in KEEPING else None)[0]


def steps_to_tokens(
    step_values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, at_ends: bool
) -> tuple[Tensor, Tensor]:
    like = step_values.new_empty(()).expand(steps.shape)  # for its shape
    return _to_tokens(
        step_values, SegmentsArgs(like, steps, mask, cu_seqlens, step_values.shape[1], "sum"), at_ends
    )
