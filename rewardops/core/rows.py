"""Rows of tokens: padded ``[B, T]`` and packed ``[N]`` behind one description, and moves between the two.

Padded rows are ``[B, T]`` with an optional mask. Packed rows are ``[N]``, the rows one after another, with
``cu_seqlens`` (``[B + 1]``, row ``b`` is ``cu_seqlens[b]:cu_seqlens[b + 1]``) and an optional ``[N]`` mask.
A mask may have holes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The rows of a per-token tensor and the tokens of them that count."""

    batch: int
    shape: tuple[int, ...]
    mask: Tensor | None
    cu_seqlens: Tensor | None

    def valid(self, device: torch.device) -> Tensor:
        """bool, the shape of the tokens: True where a token counts."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.shape, dtype=torch.bool, device=device)

    def expand(self, rows: Tensor) -> Tensor:
        """Broadcast per-row values ``[B]`` to every token, masked tokens included."""
        if self.cu_seqlens is None:
            return rows[:, None].expand(self.shape)
        if self.batch == 0:
            return rows.new_zeros(self.shape)
        position = torch.arange(self.shape[0], device=rows.device, dtype=self.cu_seqlens.dtype)
        row = torch.searchsorted(self.cu_seqlens[1:].contiguous(), position, right=True)
        return rows[row.clamp(max=self.batch - 1)]


def batch_of(shape: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None) -> int:
    """Number of rows of per-token tensors of this shape."""
    return shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


# ---- packed rows as padded ones, and back ------------------------------------------------------------------


def _packed_index(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    cu = cu_seqlens.to(torch.int64)
    lengths = cu[1:] - cu[:-1]
    width = int(lengths.max()) if lengths.numel() else 0
    position = torch.arange(width, device=cu.device)
    return cu[:-1, None] + position, position < lengths[:, None]


def to_rows(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and validity as ``[B, T]``; what is not valid reads as 0, whatever it held."""
    if cu_seqlens is None:
        valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    else:
        index, valid = _packed_index(cu_seqlens)
        index = index.clamp(max=max(values.shape[0] - 1, 0))
        if values.shape[0] == 0:
            values = values.new_zeros(index.shape)
        else:
            values, mask = values[index], None if mask is None else mask[index]
            valid = valid if mask is None else valid & mask
    return torch.where(valid, values, torch.zeros_like(values)), valid


def from_rows(rows: Tensor, like: torch.Size | tuple[int, ...], cu_seqlens: Tensor | None) -> Tensor:
    """The inverse of :func:`to_rows`: ``[B, T]`` back to the layout of the caller."""
    if cu_seqlens is None:
        return rows
    index, inside = _packed_index(cu_seqlens)
    out = rows.new_zeros(like)
    out[index[inside]] = rows[inside]
    return out


def places_without_holes(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Target index of each valid token when the valid tokens of a row move to its front; arbitrary where masked."""
    counted = mask.cumsum(-1)
    if cu_seqlens is not None and len(mask):
        # The count includes the valid tokens of earlier rows, which lie closer together than the rows do.
        cu = cu_seqlens.to(torch.int64)
        position = torch.arange(len(mask), device=mask.device)
        row = torch.searchsorted(cu[1:].contiguous(), position, right=True).clamp(max=len(cu) - 2)
        start = cu[row].clamp(0, len(mask))
        total = torch.cat([counted.new_zeros(1), counted])
        counted = counted - total[start] + start
    return (counted - 1).clamp(min=0)


def move(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Valid tokens moved to ``places``, in the last dimension or two; 0 after them."""
    width = values.shape[-1]
    index = torch.where(mask, places, width).expand(values.shape)
    moved = values.new_zeros((*values.shape[:-1], width + 1)).scatter(-1, index, values)
    return moved[..., :-1]


def move_back(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """The inverse of :func:`move`, 0 where masked."""
    return torch.where(mask, values.gather(-1, places.expand(values.shape)), 0)
