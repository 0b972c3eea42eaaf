"""Generators of awkward inputs: ragged rows, holes, groups in any order, rows that share prefixes."""

from __future__ import annotations

import torch
from torch import Tensor


def random_mask(
    batch: int, width: int, generator: torch.Generator, *, holes: bool = True, empty_row: bool = True
) -> Tensor:
    """A bool mask of ragged rows, with holes, and with one row of no valid token."""
    length = torch.randint(0, width + 1, (batch,), generator=generator)
    mask = torch.arange(width) < length[:, None]
    if holes:
        mask &= torch.rand(batch, width, generator=generator) > 0.25
    if empty_row and batch > 1:
        mask[batch // 2] = False
    return mask


def random_groups(batch: int, generator: torch.Generator) -> Tensor:
    """Ragged groups in random order under labels of any size and sign; one of them a singleton."""
    labels = torch.tensor([7, -3, 2**40, 0, 5])
    groups = labels[torch.randint(0, len(labels), (batch,), generator=generator)]
    if batch:
        groups[torch.randint(0, batch, (), generator=generator)] = -(2**50)
    return groups


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``padded[b, :lengths[b]]`` one after another, and their ``cu_seqlens`` (int32)."""
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=padded.device)
    cu[1:] = lengths.cumsum(0)
    return padded[inside], cu


def unpack(packed: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The inverse of :func:`pack`, zeros beyond each row."""
    inside = torch.arange(width, device=packed.device) < lengths[:, None]
    out = packed.new_zeros((len(lengths), width))
    out[inside] = packed
    return out


def shared_prefix_tokens(groups: Tensor, width: int, generator: torch.Generator, *, vocab: int = 3) -> Tensor:
    """Tokens ``[B, width]`` whose rows branch off one another at random depths within their group."""
    tokens = torch.randint(0, vocab, (len(groups), width), generator=generator)
    for i in range(1, len(groups)):
        earlier = (groups[:i] == groups[i]).nonzero()[:, 0]
        if len(earlier):
            j = earlier[torch.randint(0, len(earlier), (), generator=generator)]
            depth = int(torch.randint(0, width + 1, (), generator=generator))
            tokens[i, :depth] = tokens[j, :depth]
    return tokens
