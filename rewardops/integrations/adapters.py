"""Adapters: convert the rows, groups and per-row numbers of frameworks to the layouts of the ops.

Two conventions need no adapter: jagged ``values`` and ``offsets`` are packed rows with ``cu_seqlens=offsets``,
and the sizes of contiguous groups are ``group_size``. No adapter synchronises with a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.groups import from_host
from ..core.rows import Layout
from ..ops.forest import TokenRows

__all__ = ["Packed", "from_nested", "offsets", "pack", "prompt_groups", "to_nested", "to_tokens", "unpack"]


class Packed(NamedTuple):
    """Concatenated rows, the packed layout of the ops."""

    values: Tensor
    """``[N, ...]``"""
    cu_seqlens: Tensor
    """``[B + 1]``, int64."""
    mask: Tensor | None = None
    """``[N]``, bool: False for values between rows. None where there are none."""


def pack(rows: Sequence[Tensor]) -> Packed:
    """Pack a list of rows ``[T_b, ...]``, such as slime's samples; differentiable.

    Equal lengths give equal ``cu_seqlens``: one tensor serves log-probabilities, values and masks.

    Raises:
        TypeError, ValueError: no rows, or rows that differ in dtype, device or trailing shape.
    """
    if isinstance(rows, Tensor) or not isinstance(rows, Sequence) or not rows:
        got = "none" if isinstance(rows, Sequence) and not isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows: got {got}, want a sequence of at least one tensor")
    for row in rows:
        checks.check_tensor("rows", row)
        if not row.dim() or (row.shape[1:], row.dtype, row.device) != (
            rows[0].shape[1:],
            rows[0].dtype,
            rows[0].device,
        ):
            raise ValueError(
                f"rows: got {row.dtype}{checks.show(row.shape)} on {row.device} beside {rows[0].dtype}"
                f"{checks.show(rows[0].shape)} on {rows[0].device}, want them alike but for their lengths"
            )
    return Packed(torch.cat(list(rows)), offsets([len(row) for row in rows], rows[0].device))


def offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """``cu_seqlens`` ``[B + 1]`` of rows of these lengths, int64."""
    for n in lengths:
        checks.check_whole("lengths", n, 0)
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return from_host(ends, torch.device(device))


def unpack(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The inverse of :func:`pack`: packed values ``[N, ...]`` to a list of views, one per row."""
    checks.check_tensor("values", values)
    for n in lengths:
        checks.check_whole("lengths", n, 0)
    if not values.dim() or sum(lengths) != values.shape[0]:
        shape = checks.show(values.shape)
        raise ValueError(f"lengths: got a sum of {sum(lengths)}, want that of the rows of values {shape}")
    return list(values.split(list(lengths)))


def from_nested(rows: Tensor) -> Packed:
    """Pack a nested tensor of jagged layout whose second dimension is ragged; differentiable.

    In a narrowed tensor, the values between its rows are masked.
    """
    nested: Any = checks.check_tensor("rows", rows)
    if not nested.is_nested or nested.layout is not torch.jagged:
        raise ValueError(f"rows: got layout {nested.layout}, want a nested tensor of torch.jagged")
    if nested._ragged_idx != 1:
        raise ValueError(f"rows: got dimension {nested._ragged_idx} ragged, want 1")
    values, cu, lengths = nested.values(), nested.offsets(), nested.lengths()
    if lengths is None:
        return Packed(values, cu)
    starts, count = cu[:-1], values.shape[0]
    if not len(starts):
        return Packed(values, torch.zeros_like(cu), values.new_zeros(count, dtype=torch.bool))
    # Values between two rows belong to the earlier row; values before the first row belong to the first.
    cu = torch.nn.functional.pad(torch.nn.functional.pad(starts[1:], (1, 0)), (0, 1), value=count)
    spans = Layout(len(starts), (count,), None, cu)
    position = torch.arange(count, dtype=torch.int64, device=values.device)
    inside = (position >= spans.expand(starts)) & (position < spans.expand(starts + lengths))
    return Packed(values, cu, inside)


def to_nested(values: Tensor, like: Tensor) -> Tensor:
    """Packed values ``[N, ...]`` to a nested tensor with the rows of ``like``; differentiable."""
    rows: Any = like
    total = from_nested(like).values.shape[0]
    if checks.check_tensor("values", values).shape[:1] != (total,):
        raise ValueError(f"values: got shape {checks.show(values.shape)}, want [{total}, ...]")
    nested: Tensor = torch.nested.nested_tensor_from_jagged(values, rows.offsets(), rows.lengths())
    return nested


def prompt_groups(prompts: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Group rows by equal prompt tokens, as NeMo-RL does: exact, on the device.

    Args:
        prompts: ``[B, P]`` token ids, or ``[N]`` with ``cu_seqlens``.
        mask: the shape of ``prompts``: valid tokens, for padding on either side. Without a mask padding is
            compared as well.

    Returns:
        ``[B]``, int64: the index of the first row with the same prompt. Rows without a valid token form one
        group.
    """
    rows = TokenRows.of(prompts, None, 1, mask, cu_seqlens, "skip")
    batch = rows.layout.batch
    one = torch.zeros(batch, dtype=torch.int64, device=prompts.device)
    forest = TokenRows(prompts, one, rows.layout, rows.masked).forest()
    order, _, _, length, shared = forest.rows
    sorted_length = length[order]
    before = sorted_length.roll(1)
    # Lexicographic order puts equal prompts side by side, the earliest row first, and empty prompts last.
    same = (sorted_length == before) & ((shared == sorted_length) | (sorted_length == 0))
    place = torch.arange(batch, dtype=torch.int64, device=prompts.device)
    start = torch.where(same & (place > 0), 0, place).cummax(0).values
    return torch.empty_like(order).index_copy_(0, order, order[start])


def to_tokens(values: Tensor | Sequence[float], cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Broadcast a number per row, such as a temperature, to the row's packed tokens ``[num_tokens]``.

    Not needed for padded rows, where ``temperature`` takes ``[B]``.
    """
    cu = checks.check_tensor("cu_seqlens", cu_seqlens)
    rows = checks.as_numbers("values", values, max(cu.shape[0] - 1, 0), "one per row")
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.float32, device="cpu").to(cu.device, non_blocking=True)
    checks.check_whole("num_tokens", num_tokens, 0)
    cu = checks.check_cu_seqlens(cu, rows.device, "values", num_tokens, "num_tokens")
    return Layout(len(rows), (num_tokens,), None, cu).expand(rows)
