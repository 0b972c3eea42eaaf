"""Packed rows as padded ones and back, so that every specification is written once, over ``[B, T]``."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Where each valid token goes when those of a row move to the row's front; anything where masked."""
    counted = mask.cumsum(-1)
    if cu_seqlens is not None and len(mask):
        # Valid tokens ahead of a token's row are counted in, the gaps there are not.
        cu = cu_seqlens.to(torch.int64)
        position = torch.arange(len(mask), device=mask.device)
        row = torch.searchsorted(cu[1:].contiguous(), position, right=True).clamp(max=len(cu) - 2)
        start = cu[row].clamp(0, len(mask))
        total = torch.cat([counted.new_zeros(1), counted])
        counted = counted - total[start] + start
    return (counted - 1).clamp(min=0)


def move(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Valid tokens at their places (the last dimension or two are the tokens'); 0 behind them."""
    width = values.shape[-1]
    index = torch.where(mask, places, width).expand(values.shape)
    moved = values.new_zeros((*values.shape[:-1], width + 1)).scatter(-1, index, values)
    return moved[..., :-1]


def move_back(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """The inverse of :func:`move`, 0 where masked."""
    return torch.where(mask, values.gather(-1, places.expand(values.shape)), 0)


def same_group(groups: Tensor, live: Tensor | None = None) -> Tensor:
    """``[B, B]``: whether two rows are of one group (and both live)."""
    same = groups[:, None] == groups[None, :]
    return same if live is None else same & live[:, None] & live[None, :]
