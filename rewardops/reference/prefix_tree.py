"""Prefix values, the specification (see :func:`rewardops.prefix_values`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import from_rows, same_group, to_rows


class _Spans(NamedTuple):
    tokens: Tensor  # [B, T], every row's first valid token in column 0
    valid: Tensor  # [B, T], in the caller's columns
    first: Tensor  # [B]
    length: Tensor  # [B]: up to and including the last valid token, holes included; 0 for an empty row


def _spans(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Spans:
    x, inside = to_rows(tokens, None, cu_seqlens)
    valid = inside if mask is None else to_rows(mask, mask, cu_seqlens)[1]
    width = x.shape[1]
    column = torch.arange(width, device=x.device)
    if width == 0:
        nothing = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return _Spans(x, valid, nothing, nothing)
    first = torch.where(valid, column, width).amin(1)
    length = (torch.where(valid, column + 1, 0).amax(1) - first).clamp(min=0)
    index = (first[:, None] + column).clamp(max=width - 1)
    return _Spans(x.gather(1, index), valid, first, length)


def longest_common_prefixes(spans: _Spans, groups: Tensor) -> Tensor:
    """``[B, B]``: equal leading tokens of two rows; -1 where they share no group or one is empty."""
    batch, width = spans.tokens.shape
    same = same_group(groups, spans.length > 0)
    column = torch.arange(width, device=spans.tokens.device)
    lcp = torch.zeros(batch, batch, dtype=torch.int64, device=spans.tokens.device)
    for i in range(batch):
        shorter = torch.minimum(spans.length, spans.length[i])
        equal = (spans.tokens == spans.tokens[i]) & (column < shorter[:, None])
        lcp[i] = equal.to(torch.int64).cumprod(1).sum(1)
    return torch.where(same, lcp, -1)


def _alive(spans: _Spans, groups: Tensor, row: int, lcp: Tensor) -> Tensor:
    """``[T, B]``: whether each row of the batch still shares row ``row``'s prefix, before token t."""
    emitted = torch.arange(spans.tokens.shape[1] + 1, device=lcp.device)
    return lcp[row] >= emitted[:, None]


def prefix_values(
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    spans = _spans(tokens, mask, cu_seqlens)
    lcp = longest_common_prefixes(spans, groups)
    before = rewards.new_zeros(spans.tokens.shape)
    after, count = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.int32)
    r = torch.where(spans.length > 0, rewards, 0)
    for i in range(spans.tokens.shape[0]):
        alive = _alive(spans, groups, i, lcp)
        n = alive.sum(1)
        value = torch.where(alive, r, 0).sum(1) / n.clamp(min=1)
        start, stop = int(spans.first[i]), int(spans.first[i] + spans.length[i])
        before[i, start:stop] = value[: stop - start]
        after[i, start:stop] = value[1 : stop - start + 1]
        count[i, start:stop] = n[1 : stop - start + 1].to(torch.int32)
    out = (torch.where(spans.valid, x, 0) for x in (before, after, count))
    before, after, count = (from_rows(x, tokens.shape, cu_seqlens) for x in out)
    return before, after, count


def prefix_values_backward(
    grad_before: Tensor | None,
    grad_after: Tensor | None,
    tokens: Tensor,
    rewards: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_group_size: int,
) -> Tensor:
    spans = _spans(tokens, mask, cu_seqlens)
    lcp = longest_common_prefixes(spans, groups)
    ups = []
    for grad in (grad_before, grad_after):
        rows = None if grad is None else to_rows(grad, None, cu_seqlens)[0]
        ups.append(None if rows is None else torch.where(spans.valid, rows, 0))
    out = torch.zeros_like(rewards)
    width = spans.tokens.shape[1]
    for i in range(spans.tokens.shape[0]):
        alive = _alive(spans, groups, i, lcp)
        start, length = int(spans.first[i]), int(spans.length[i])
        up = rewards.new_zeros(width + 1)
        for offset, rows in enumerate(ups):
            if rows is not None:
                up[offset : offset + length] += rows[i, start : start + length]
        out += torch.where(alive, (up / alive.sum(1).clamp(min=1))[:, None], 0).sum(0)
    return out
