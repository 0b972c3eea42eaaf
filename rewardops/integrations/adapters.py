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
    """Concatenated rows, the packed layout of the ops.

    Attributes:
        values: ``[N, ...]``, the rows one after the other.
        cu_seqlens: ``[B + 1]``, int64, the offsets of the rows.
        mask: ``[N]``, bool: False for values between rows. None where there are none.
    """

    values: Tensor
    cu_seqlens: Tensor
    mask: Tensor | None = None


def pack(rows: Sequence[Tensor]) -> Packed:
    """Pack a list of rows ``[T_b, ...]``, such as slime's samples.

    Equal lengths give equal ``cu_seqlens``: one tensor serves logprobs, values and masks.

    Args:
        rows: at least one tensor ``[T_b, ...]``; alike in dtype, device and trailing shape.

    Returns:
        :class:`Packed`, of the dtype of the rows. Differentiable in the rows.

    Raises:
        TypeError: no rows, or rows that are no tensors.
        ValueError: rows that differ in dtype, device or trailing shape.

    Example:
        >>> from rewardops.integrations.adapters import pack
        >>> packed = pack([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
        >>> packed.values.tolist(), packed.cu_seqlens.tolist()
        ([1.0, 2.0, 3.0], [0, 2, 3])
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
    """Offsets ``cu_seqlens`` of rows of these lengths.

    Args:
        lengths: tokens of each row, whole numbers of at least 0.
        device: of the result; the copy there does not wait.

    Returns:
        ``[B + 1]``, int64.

    Raises:
        ValueError: a length that is no whole number of at least 0.

    Example:
        >>> from rewardops.integrations.adapters import offsets
        >>> offsets([2, 0, 3]).tolist()
        [0, 2, 2, 5]
    """
    for n in lengths:
        checks.check_whole("lengths", n, 0)
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return from_host(ends, torch.device(device))


def unpack(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Rows of packed values, the inverse of :func:`pack`.

    Args:
        values: ``[N, ...]``, any dtype.
        lengths: tokens of each row, whole numbers that sum to N.

    Returns:
        A list of views, one per row. Differentiable in ``values``.

    Raises:
        TypeError: values that are no tensor.
        ValueError: lengths that do not sum to N, or that are no whole numbers of at least 0.

    Example:
        >>> from rewardops.integrations.adapters import unpack
        >>> [row.tolist() for row in unpack(torch.tensor([1.0, 2.0, 3.0]), [2, 1])]
        [[1.0, 2.0], [3.0]]
    """
    checks.check_tensor("values", values)
    for n in lengths:
        checks.check_whole("lengths", n, 0)
    if not values.dim() or sum(lengths) != values.shape[0]:
        shape = checks.show(values.shape)
        raise ValueError(f"lengths: got a sum of {sum(lengths)}, want that of the rows of values {shape}")
    return list(values.split(list(lengths)))


def from_nested(rows: Tensor) -> Packed:
    """Pack a nested tensor of jagged layout whose second dimension is ragged.

    In a narrowed tensor, the values between its rows are masked.

    Args:
        rows: ``[B, j, ...]``, a nested tensor with ``layout=torch.jagged``.

    Returns:
        :class:`Packed`, without a copy. Differentiable in ``rows``.

    Raises:
        TypeError: rows that are no tensor.
        ValueError: another layout, or another ragged dimension.

    Example:
        >>> from rewardops.integrations.adapters import from_nested
        >>> rows = torch.nested.nested_tensor([torch.ones(2), torch.zeros(1)], layout=torch.jagged)
        >>> packed = from_nested(rows)
        >>> packed.values.tolist(), packed.cu_seqlens.tolist()
        ([1.0, 1.0, 0.0], [0, 2, 3])
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
    """Nested tensor of packed values, with the rows of another one.

    Args:
        values: ``[N, ...]``, packed as :func:`from_nested` packs ``like``; any dtype.
        like: a nested tensor with ``layout=torch.jagged``.

    Returns:
        A nested tensor with the rows of ``like``. Differentiable in ``values``.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: another layout, or another number of values.

    Example:
        >>> from rewardops.integrations.adapters import to_nested
        >>> like = torch.nested.nested_tensor([torch.ones(2), torch.zeros(1)], layout=torch.jagged)
        >>> [row.tolist() for row in to_nested(torch.tensor([1.0, 2.0, 3.0]), like).unbind()]
        [[1.0, 2.0], [3.0]]
    """
    rows: Any = like
    total = from_nested(like).values.shape[0]
    if checks.check_tensor("values", values).shape[:1] != (total,):
        raise ValueError(f"values: got shape {checks.show(values.shape)}, want [{total}, ...]")
    nested: Tensor = torch.nested.nested_tensor_from_jagged(values, rows.offsets(), rows.lengths())
    return nested


def prompt_groups(prompts: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Group rows by equal prompt tokens, as NeMo-RL does: exact, on the device.

    Args:
        prompts: ``[B, P]``, or ``[N]`` with ``cu_seqlens``; integer token ids.
        mask: the shape of ``prompts``: valid tokens, for padding on either side; bool, or integer or float of
            0 and 1. None: padding is compared as well.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        ``[B]``, int64, the index of the first row with the same prompt. Rows without a valid token form one
        group.

    Raises:
        TypeError: prompts that are no integer tensor, a mask or offsets of another type.
        ValueError: a shape or device that does not match.

    Example:
        >>> from rewardops.integrations.adapters import prompt_groups
        >>> prompt_groups(torch.tensor([[1, 2], [3, 4], [1, 2]])).tolist()
        [0, 1, 0]
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
    """Broadcast a number per row, such as a temperature, to the row's packed tokens.

    Not needed for padded rows, where ``temperature`` takes ``[B]``.

    Args:
        values: ``[B]``, a tensor, an array or a sequence of numbers.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of the packed rows.
        num_tokens: N, the number of packed tokens.

    Returns:
        ``[num_tokens]``, of the dtype of ``values``; float32 for a sequence. Differentiable in a tensor
        ``values``.

    Raises:
        TypeError: values that are no numbers, offsets that are no integer tensor.
        ValueError: another number of values than of rows, offsets that do not end at ``num_tokens``.

    Example:
        >>> from rewardops.integrations.adapters import to_tokens
        >>> to_tokens([0.5, 1.0], torch.tensor([0, 2, 3]), 3).tolist()
        [0.5, 0.5, 1.0]
    """
    cu = checks.check_tensor("cu_seqlens", cu_seqlens)
    rows = checks.as_numbers("values", values, max(cu.shape[0] - 1, 0), "one per row")
    if not isinstance(rows, Tensor):
        rows = torch.tensor(rows, dtype=torch.float32, device="cpu").to(cu.device, non_blocking=True)
    checks.check_whole("num_tokens", num_tokens, 0)
    cu = checks.check_cu_seqlens(cu, rows.device, "values", num_tokens, "num_tokens")
    return Layout(len(rows), (num_tokens,), None, cu).expand(rows)
