"""Adapters: rows, groups and numbers per row as frameworks have them, in the layouts that the ops take.

Two conventions need none: jagged ``values`` and ``offsets`` are packed rows with ``cu_seqlens=offsets``, and the
sizes of contiguous groups are ``group_size``. Nothing here makes the host wait for a device.
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


class Packed(NamedTuple):
    """Rows one after another, as the ops take them."""

    values: Tensor
    """``[N, ...]``"""
    cu_seqlens: Tensor
    """``[B + 1]``, int64."""
    mask: Tensor | None = None
    """``[N]``, bool: False for what lies between rows. None where nothing does."""


def pack(rows: Sequence[Tensor]) -> Packed:
    """A list of rows ``[T_b, ...]``, such as slime's samples, as packed rows; differentiable.

    The same lengths give the same ``cu_seqlens``, so one serves log-probabilities, values and masks.

    Raises:
        TypeError, ValueError: no rows, or rows that are not tensors of one dtype, device and shape but for ``T_b``.
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
    """The inverse of :func:`pack`: packed values ``[N, ...]`` as a list of rows, which share their memory."""
    checks.check_tensor("values", values)
    if not values.dim() or sum(lengths) != values.shape[0]:
        shape = checks.show(values.shape)
        raise ValueError(f"lengths: got a sum of {sum(lengths)}, want that of the rows of values {shape}")
    return list(values.split(list(lengths)))


def from_nested(rows: Tensor) -> Packed:
    """A nested tensor of jagged layout, its second dimension the ragged one, as packed rows; differentiable.

    Where it was narrowed, so that values lie between its rows, these are masked.
    """
    found: Any = checks.check_tensor("rows", rows)
    if not found.is_nested or found.layout is not torch.jagged:
        raise ValueError(f"rows: got layout {found.layout}, want a nested tensor of torch.jagged")
    if found._ragged_idx != 1:
        raise ValueError(f"rows: got dimension {found._ragged_idx} ragged, want 1")
    values, cu, lengths = found.values(), found.offsets(), found.lengths()
    if lengths is None:
        return Packed(values, cu)
    starts, count = cu[:-1], values.shape[0]
    if not len(starts):
        return Packed(values, torch.zeros_like(cu), values.new_zeros(count, dtype=torch.bool))
    # What lies between two rows is the end of the one before; what lies before the first, its own.
    cu = torch.nn.functional.pad(torch.nn.functional.pad(starts[1:], (1, 0)), (0, 1), value=count)
    spans = Layout(len(starts), (count,), None, cu)
    position = torch.arange(count, device=values.device)
    inside = (position >= spans.expand(starts)) & (position < spans.expand(starts + lengths))
    return Packed(values, cu, inside)


def to_nested(values: Tensor, like: Tensor) -> Tensor:
    """Packed values ``[N, ...]`` as a nested tensor with the rows of another, ``like``; differentiable."""
    rows: Any = like
    total = from_nested(like).values.shape[0]
    if checks.check_tensor("values", values).shape[:1] != (total,):
        raise ValueError(f"values: got shape {checks.show(values.shape)}, want [{total}, ...]")
    found: Tensor = torch.nested.nested_tensor_from_jagged(values, rows.offsets(), rows.lengths())
    return found


def prompt_groups(prompts: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Group labels of rows with the same prompt, found in its tokens (as NeMo-RL groups): exact, on the device.

    Args:
        prompts: ``[B, P]`` token ids, or ``[N]`` with ``cu_seqlens``.
        mask: the shape of ``prompts``: tokens that count, so that padding on either side does not. Without one
            padding is compared as well.

    Returns:
        ``[B]``, int64: the first row that has the prompt of the row. Rows without a token are one group.
    """
    rows = TokenRows.of(prompts, None, 1, mask, cu_seqlens, "skip")
    batch = rows.layout.batch
    one = torch.zeros(batch, dtype=torch.int64, device=prompts.device)
    forest = TokenRows(prompts, one, rows.layout, rows.masked).forest()
    order, _, _, length, shared = forest.rows
    sorted_length = length[order]
    before = sorted_length.roll(1)
    # In lexicographic order the same prompts follow one another, the earliest row first; empty ones at the end.
    same = (sorted_length == before) & ((shared == sorted_length) | (sorted_length == 0))
    place = torch.arange(batch, device=prompts.device)
    start = torch.where(same & (place > 0), 0, place).cummax(0).values
    return torch.empty_like(order).index_copy_(0, order, order[start])


def to_tokens(values: Tensor | Sequence[float], cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """A number per row, such as a temperature of its own, on each of the row's packed tokens ``[num_tokens]``.

    Padded rows need no such thing: ``temperature`` takes ``[B]`` there.
    """
    cu = checks.check_tensor("cu_seqlens", cu_seqlens)
    rows = checks.as_numbers("values", values, max(cu.shape[0] - 1, 0), "one per row")
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.float32).to(cu.device, non_blocking=True)
    checks.check_whole("num_tokens", num_tokens, 0)
    cu = checks.check_cu_seqlens(cu, rows.device, "values", num_tokens, "num_tokens")
    return Layout(len(rows), (num_tokens,), None, cu).expand(rows)
