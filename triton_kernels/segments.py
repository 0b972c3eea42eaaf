"""Reductions over rows and steps on the GPU, and values of steps at their tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.rows import batch_of
from ..reference.segments import KEEPING, REDUCTIONS, SegmentsArgs
from .launch import BITS, cdiv, pointer
from .rows import Rows, as_bytes, dense, stride
from .scans import AGGREGATES, MAX_CHUNKS, WHOLE, chunk_of, new_state, scan_in_stages
from .segments_reduce import FIELDS, segment_reduce_kernel
from .steps import ROW, as_pointer, kind_of
from .tiles import EACH, THREADS, WARPS, is_aligned


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
            values, pointer(steps, values), pointer(mask, values), rows.cu, out, kept, state, rows.width, rows.total,
            chunks, chunk, a.num_steps, stride(values), stride(steps), stride(mask), OP=REDUCTIONS.index(a.op),
            KIND=kind, PACKED=rows.packed, HAS_MASK=mask is not None, STAGE=stage,
            ALIGNED=is_aligned(rows, values, steps, mask), MAX_CHUNKS=MAX_CHUNKS, PER=EACH, T=THREADS,
            num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out, kept
