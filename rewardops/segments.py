"""Segments: reductions of tokens over their rows and steps, and broadcasts of step values to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .core import checks
from .core.precision import wide
from .core.rows import Layout
from .core.settings import may_read
from .ops import segments as ops
from .ops.td import prefix_scan
from .reference.segments import REDUCTIONS

__all__ = [
    "place_at_step_end", "row_mean", "row_sum", "running_mean", "running_sum", "segment_broadcast",
    "segment_reduce",
]  # fmt: skip


# ---- rows --------------------------------------------------------------------------------------------------


def row_sum(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum of each row's valid tokens.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64. The sum of
            per-token KL is the sequence KL.
        mask: the shape of ``values``; bool, integer of 0 and 1, or float: floats other than 0 and 1 are
            weights of the tokens, of at least 0. None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        ``[B]``, float32 (float64 for float64), summed in float64; 0 for a row without a valid token.
        Differentiable in ``values``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a weight that is negative or not finite.

    Example:
        >>> kl = torch.tensor([[0.5, 0.25, 9.0], [1.0, 2.0, 3.0]])
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> ro.row_sum(kl, mask=mask).tolist()
        [0.75, 6.0]
    """
    tokens, weight = _weighed(values, mask, cu_seqlens)
    return ops.row_sums(tokens.values if weight is None else tokens.values * weight, tokens.rows)


def row_mean(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """(Weighted) mean of each row's valid tokens.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``values``; bool, integer of 0 and 1, or float: floats other than 0 and 1 are
            weights of the tokens, of at least 0. None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        ``[B]``, float32 (float64 for float64), summed in float64; 0 for a row without a valid token.
        Differentiable in ``values``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a weight that is negative or not finite.

    Example:
        >>> entropy = torch.tensor([0.5, 1.5, 3.0])  # packed: rows of 2 tokens and of 1
        >>> ro.row_mean(entropy, cu_seqlens=torch.tensor([0, 2, 3])).tolist()
        [1.0, 3.0]
    """
    tokens, weight = _weighed(values, mask, cu_seqlens)
    if weight is None:
        return ops.of_rows(tokens.values, tokens.rows, "mean")
    total = ops.row_sums(weight, tokens.rows)
    return ops.row_sums(tokens.values * weight, tokens.rows) / torch.where(total > 0, total, 1)


def _weighed(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[TokenValues, Tensor | None]:
    """The validated values, and the weights of a mask that is not of 0 and 1."""
    checks.check_float("values", values)
    valid, weight = checks.as_weights(mask, values.shape, values.device, "values")
    tokens = TokenValues.of("values", values, valid, cu_seqlens, grad=True)
    return tokens, None if weight is None else torch.where(tokens.valid(), weight, 0).to(tokens.values.dtype)


def running_sum(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """At each valid token the sum of its row's valid tokens up to it, itself included.

    A ``cumsum`` over packed rows subtracts what came before a row, and in float32 loses its digits on the
    way; here every row is summed on its own, in float64. The sum before a token is
    ``running_sum(values) - values``.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``values``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``values``, float32 (float64 for float64), 0 where masked. Differentiable in ``values``.
        A value that is not finite shows at its token and at those after it.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a mask of other numbers than 0 and 1.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 4.0, 8.0])  # packed: two rows of 2 tokens
        >>> ro.running_sum(values, cu_seqlens=torch.tensor([0, 2, 4])).tolist()
        [1.0, 3.0, 4.0, 12.0]
    """
    tokens = TokenValues.of("values", values, mask, cu_seqlens, grad=True)
    return prefix_scan(tokens.values, None, tokens.rows.mask, tokens.rows.cu_seqlens)


def running_mean(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """At each valid token the mean of its row's valid tokens up to it, itself included.

    OREAL (arXiv 2502.06781) weights a token by the running mean of its scores.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``values``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``values``, float32 (float64 for float64), 0 where masked. Differentiable in ``values``.
        A value that is not finite shows at its token and at those after it.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a mask of other numbers than 0 and 1.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0, 9.0, 0.5]])
        >>> mask = torch.tensor([[True, True, False, True]])
        >>> ro.running_mean(scores, mask=mask).tolist()
        [[1.0, 0.5, 0.0, 0.5]]
    """
    tokens = TokenValues.of("values", values, mask, cu_seqlens, grad=True)
    number = tokens.running_sums(torch.ones_like(tokens.values))
    return (tokens.running_sums(tokens.values) / number.clamp(min=1)).to(tokens.values.dtype)


# ---- steps -------------------------------------------------------------------------------------------------


def segment_reduce(
    values: Tensor,
    steps: Tensor,
    op: str = "sum",
    *,
    num_steps: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Reduce the valid tokens of every step of a row to a number.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        steps: the shape of ``values``. Integer: step ids, non-decreasing along a row, negative for none.
            bool: the tokens that end a step, of which the first ends step 0; tokens after the last belong to
            no step.
        op: ``"sum"``, ``"mean"``, ``"min"``, ``"max"``, ``"prod"``, ``"first"``, ``"last"`` or ``"any"`` (1
            where a value is not 0).
        num_steps: the number of steps of the longest row; needed where the tokens lie on a device, as reading
            it there would be a synchronisation. Steps from this number on are left out. None reads it, on the
            CPU.
        mask: the shape of ``values``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        ``[B, num_steps]``, float32 (float64 for float64), 0 for a step without a valid token. Differentiable
        in ``values`` (not ``"any"``): among equal extremes the earliest has the gradient.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown op, step ids that fall along a row, no
            ``num_steps`` where it cannot be read.

    Example:
        >>> values = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
        >>> ends = torch.tensor([[False, True, True, False]])
        >>> ro.segment_reduce(values, ends, "mean").tolist()  # the last token belongs to no step
        [[2.0, 5.0]]
    """
    checks.check_float("values", values)
    checks.check_choice("op", op, REDUCTIONS)
    rows, markers = _prepare("values", values, steps, mask, cu_seqlens)
    if num_steps is not None:
        checks.check_whole("num_steps", num_steps, 0)
    if num_steps is None:
        if not may_read(markers):
            raise ValueError("num_steps: got None, want the number of steps of the longest row")
        num_steps = _number_of_steps(markers, rows)
    (wide,) = checks.promote(values)
    out: Tensor = ops.segment_reduce(wide, markers, rows.mask, rows.cu_seqlens, num_steps, op)[0]
    return out


def segment_broadcast(
    step_values: Tensor, steps: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Value of its step on every valid token, 0 on tokens of no step.

    Args:
        step_values: ``[B, S]``, a value for each step; float32, bfloat16, float16 or float64. Steps from
            ``S`` on have 0.
        steps: ``[B, T]``, or ``[N]`` with ``cu_seqlens``. Integer: step ids, non-decreasing along a row,
            negative for none. bool: the tokens that end a step, of which the first ends step 0.
        mask: the shape of ``steps``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``steps``, float32 (float64 for float64), 0 where masked. Differentiable in
        ``step_values``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, step ids that fall along a row.

    Example:
        >>> step_ids = torch.tensor([[0, 0, 1, -1]])
        >>> ro.segment_broadcast(torch.tensor([[0.5, 2.0]]), step_ids).tolist()
        [[0.5, 0.5, 2.0, 0.0]]
    """
    return _to_tokens(step_values, steps, mask, cu_seqlens, at_ends=False)


def place_at_step_end(
    step_values: Tensor, steps: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Value of each step on its last valid token, 0 elsewhere.

    Args:
        step_values: ``[B, S]``, a value for each step; float32, bfloat16, float16 or float64. Steps from
            ``S`` on have 0.
        steps: ``[B, T]``, or ``[N]`` with ``cu_seqlens``. Integer: step ids, non-decreasing along a row,
            negative for none. bool: the tokens that end a step, of which the first ends step 0.
        mask: the shape of ``steps``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``steps``, float32 (float64 for float64), 0 where masked. Differentiable in
        ``step_values``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, step ids that fall along a row.

    Example:
        >>> step_ids = torch.tensor([[0, 0, 1, -1]])
        >>> ro.place_at_step_end(torch.tensor([[0.5, 2.0]]), step_ids).tolist()
        [[0.0, 0.5, 2.0, 0.0]]
    """
    return _to_tokens(step_values, steps, mask, cu_seqlens, at_ends=True)


# ---- arguments ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenValues:
    """Validated per-token values in full precision, and their layout. Launches nothing."""

    rows: Layout
    values: Tensor

    @staticmethod
    def of(
        name: str, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, grad: bool = False
    ) -> TokenValues:
        checks.check_float(name, values)
        rows = checks.token_layout(name, values, mask, cu_seqlens)
        (wide,) = checks.promote(values if grad else values.detach())
        return TokenValues(rows, wide)

    def counts(self) -> Tensor:
        """``[B]`` float64, the number of valid tokens."""
        return ops.row_counts(self.rows, self.values.device)

    def valid(self) -> Tensor:
        return self.rows.valid(self.values.device)

    def zeroed(self) -> Tensor:
        """The values, 0 where masked."""
        return self.values if self.rows.mask is None else torch.where(self.rows.mask, self.values, 0)

    def means(self, x: Tensor, counts: Tensor) -> Tensor:
        """``[B]``, the mean of ``x`` over the valid tokens of each row; 0 for a row without one."""
        return ops.row_sums(x, self.rows) / counts.clamp(min=1).to(x.dtype)

    def running_sums(self, x: Tensor) -> Tensor:
        """float64, per token: the sum of ``x`` over the row's valid tokens up to it; 0 where masked."""
        return prefix_scan(wide(x), None, self.rows.mask, self.rows.cu_seqlens)


def defined(x: Tensor) -> Tensor:
    """1 where a number is finite, else NaN: as a factor, what is not finite shows in values and gradients."""
    x = x.detach()
    return torch.where(x.isfinite(), torch.ones_like(x), torch.nan)


def row_tops(x: Tensor, rows: Layout) -> Tensor:
    """``[B]``, the largest valid ``x`` of each row, NaN if there is one; 0 for a row without a valid token."""
    return ops.of_rows(x, rows, "max")


def _prepare(
    name: str, values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Tensor]:
    """The validated layout and step markers."""
    rows = checks.token_layout(name, values, mask, cu_seqlens)
    markers = checks.step_markers(steps, values, rows, name)
    if markers is None:
        raise TypeError("steps: got None, want step ids or step-end flags")
    return rows, markers


def _number_of_steps(markers: Tensor, rows: Layout) -> int:
    """The number of steps of the longest row; reads the markers."""
    if markers.dtype is torch.bool:
        flags = markers if rows.mask is None else markers & rows.mask
        counts = ops.row_counts(rows._replace(mask=flags), markers.device)
        return int(counts.max()) if rows.batch else 0
    valid_ids = markers if rows.mask is None else markers[rows.mask]
    return max(int(valid_ids.max()) + 1, 0) if valid_ids.numel() else 0


def _to_tokens(
    step_values: Tensor, steps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, at_ends: bool
) -> Tensor:
    """The values of steps at their tokens, or at their ends."""
    checks.check_float("step_values", step_values)
    if not isinstance(steps, Tensor):
        raise TypeError(f"steps: got {type(steps).__name__}, want a tensor")
    rows, markers = _prepare("steps", steps, steps, mask, cu_seqlens)
    if step_values.dim() != 2 or step_values.shape[0] != rows.batch:
        want = f"[{rows.batch}, steps] (a row per row of steps)"
        raise ValueError(f"step_values: got shape {checks.show(step_values.shape)}, want {want}")
    checks.check_device("step_values", step_values, steps.device, "steps")
    (wide,) = checks.promote(step_values)
    return ops.segment_broadcast(wide, markers, rows.mask, rows.cu_seqlens, at_ends)
