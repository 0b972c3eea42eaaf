"""Selection on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import selection as spec
from ..reference.selection import LargestArgs
from .memory import RowShape, address, as_bytes, function, rows_dense, strided, threads
from .segments import row_counts


def largest(a: LargestArgs) -> Tensor:
    rows = RowShape(a.values.shape, a.cu_seqlens)
    values, mask = rows_dense(a.values), as_bytes(spec.eligible(a))
    scopes = spec.scopes_of(a, rows.batch).contiguous()
    wanted = spec.wanted(a, scopes, row_counts)
    create = torch.empty if a.cu_seqlens is None else torch.zeros
    out = create(values.shape, dtype=torch.uint8)
    function("largest", values)(
        rows.tuple, strided(mask), strided(values), address(scopes), address(wanted), strided(out), threads()
    )
    return out.view(torch.bool)
