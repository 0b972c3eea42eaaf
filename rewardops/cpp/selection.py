"""Selection on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Shape, address, as_bytes, function, rows_dense, strided, threads


def largest(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scopes: Tensor, wanted: Tensor
) -> Tensor:
    rows = Shape(values.shape, cu_seqlens)
    values, mask = rows_dense(values), as_bytes(mask)
    scopes, wanted = scopes.contiguous(), wanted.contiguous()
    make = torch.empty if cu_seqlens is None else torch.zeros
    out = make(values.shape, dtype=torch.uint8)
    function("largest", values)(
        rows.tuple, strided(mask), strided(values), address(scopes), address(wanted), strided(out), threads()
    )
    return out.view(torch.bool)
