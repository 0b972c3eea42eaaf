"""Returns over the steps of a row: the smallest, largest or soft minimum of the step rewards still to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .core import checks, distributed, row_parts
from .core.precision import wide
from .core.rows import Layout, batch_of
from .ops import returns as ops
from .ops import td
from .reference.returns import ReturnsArgs
from .reference.td import TdArgs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["max_returns", "min_returns", "softmin_returns", "softmin_rewards"]


def min_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Min-form return: the smallest step reward still to come, ``G_k = min(r_k, G_{k+1})``.

    The credit assignment of PURE (arXiv 2504.15275, section 4), exact. Every valid token carries the return
    of the step it is in; where no step is left (the tokens after the last step end) it is 0. Rewards at
    positions that end no step are not read, so that they never act as a reward of 0 (a zero-filled minimum,
    as in one published version, loses every positive reward).

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step and hold its reward. Integer: step
            ids, non-decreasing along a row, negative for none; a step's reward is that at its last valid
            token. None: every valid token is a step.
        process_group: for sequence parallelism: each rank holds the next part of every row, see
            :func:`rewardops.discounted_returns`. Step ids are not supported then: the last step of a part may
            continue on the next rank. None for whole rows.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64), 0 where masked. Differentiable in
        ``rewards``: the gradient goes to the arg-min, among equal rewards to the earliest. A NaN reward makes
        its step's and every earlier return NaN.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, step ids with a process group.
        ValueError: a shape or device that does not match, step ids that fall along a row.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.0, 0.75]])
        >>> ends = torch.tensor([[False, True, False, True, False, True]])
        >>> ro.min_returns(rewards, steps=ends).tolist()
        [[0.25, 0.25, 0.25, 0.25, 0.75, 0.75]]
    """
    return _extreme_returns(rewards, mask, cu_seqlens, steps, process_group, False)


def max_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Max-form return: the largest step reward still to come, ``G_k = max(r_k, G_{k+1})``.

    Every valid token carries the return of the step it is in, as in :func:`min_returns`; where no step is
    left it is 0.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64. Read at
            step ends only.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step. Integer: step ids, non-decreasing
            along a row, negative for none. None: every valid token is a step.
        process_group: for sequence parallelism: each rank holds the next part of every row, see
            :func:`rewardops.discounted_returns`. Not with step ids. None for whole rows.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64), 0 where masked. Differentiable in
        ``rewards``: the gradient goes to the arg-max, among equal rewards to the earliest. A NaN reward makes
        its step's and every earlier return NaN.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, step ids with a process group.
        ValueError: a shape or device that does not match, step ids that fall along a row.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.5, 0.0, 0.75, 0.0, 0.25]])
        >>> ends = torch.tensor([[False, True, False, True, False, True]])
        >>> ro.max_returns(rewards, steps=ends).tolist()
        [[0.75, 0.75, 0.75, 0.75, 0.25, 0.25]]
    """
    return _extreme_returns(rewards, mask, cu_seqlens, steps, process_group, True)


def softmin_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    mean: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Soft minimum of the step rewards still to come, ``G_k = -T log sum_{j >= k} exp(-r_j / T)``.

    It tends to :func:`min_returns` as the temperature falls.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64. Read at
            step ends only.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step. Integer: step ids, non-decreasing
            along a row, negative for none. None: every valid token is a step.
        temperature: ``T``, above 0, in the unit of the rewards.
        mean: True divides the sum by the number of steps that are left, so that equal rewards have their own
            value as the return.
        process_group: for sequence parallelism: each rank holds the next part of every row, see
            :func:`rewardops.discounted_returns`. Not with step ids. None for whole rows.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64); 0 where masked, and where no step is left.
        Differentiable in ``rewards``, with the weights ``softmax(-r / T)`` over the steps that are left.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a ``mean`` that is no bool,
            step ids with a process group.
        ValueError: a shape or device that does not match, a temperature that is not above 0, step ids that
            fall along a row.

    Example:
        >>> rewards = torch.tensor([[0.75, 0.25, 0.75]])
        >>> [round(x, 3) for x in ro.softmin_returns(rewards, temperature=0.1)[0].tolist()]
        [0.249, 0.249, 0.75]
        >>> equal = torch.tensor([[0.5, 0.5]])
        >>> [round(x, 3) for x in ro.softmin_returns(equal, temperature=0.1, mean=True)[0].tolist()]
        [0.5, 0.5]
    """
    temperature = checks.check_positive("temperature", temperature)
    checks.check_flag("mean", mean)
    args = _prepare(rewards, mask, cu_seqlens, steps, process_group)
    if process_group is None:
        out: Tensor = ops.softmin_returns(*args, temperature, mean)[0]
        return out
    alone = ops.softmin_returns(*args, temperature, False)[0]

    def softer(part: Tensor, later: Tensor) -> Tensor:
        return -temperature * torch.logaddexp(-part / temperature, -later / temperature)

    out, number = _with_later_steps(process_group, alone, args, softer)
    if not mean:
        return out
    return torch.where(number > 0, out + temperature * number.clamp(min=1).log(), 0).to(out.dtype)


def softmin_rewards(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    through_weights: bool = True,
) -> Tensor:
    """PURE's transform of step rewards: ``r*_k = w_k r_k`` with ``w = softmax(-r / temperature)``.

    The softmax runs over the steps of a row. The plain sum of ``r*`` over a row tends to its smallest step
    reward as the temperature goes to 0 (arXiv 2504.15275, section 4; the authors train with 0.1).

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64. Read at
            step ends only.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step. Integer: step ids, non-decreasing
            along a row, negative for none. None: every valid token is a step.
        temperature: above 0, in the unit of the rewards.
        through_weights: True if the gradient flows through ``w`` as well.

    Returns:
        The layout of ``rewards``, ``r*`` at step ends and 0 elsewhere; float32 (float64 for float64).
        Differentiable in ``rewards``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a ``through_weights`` that is
            no bool.
        ValueError: a shape or device that does not match, a temperature that is not above 0, step ids that
            fall along a row.

    Example:
        >>> rewards = torch.tensor([[0.75, 0.25, 0.75]])
        >>> shaped = ro.softmin_rewards(rewards, temperature=0.1)
        >>> [round(x, 3) for x in shaped[0].tolist()]  # nearly all weight on the smallest
        [0.005, 0.247, 0.005]
    """
    temperature = checks.check_positive("temperature", temperature)
    checks.check_flag("through_weights", through_weights)
    args = _prepare(rewards, mask, cu_seqlens, steps)
    out: Tensor = ops.softmin_rewards(*args, temperature, through_weights)
    return out


# ---- arguments ---------------------------------------------------------------------------------------------


def _prepare(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    process_group: ProcessGroup | None = None,
) -> ReturnsArgs:
    """Validated arguments of the family's ops."""
    checks.check_float("rewards", rewards)
    tokens = checks.token_layout("rewards", rewards, mask, cu_seqlens)
    markers = checks.step_markers(steps, rewards, tokens, "rewards")
    if process_group is not None:
        distributed.check(process_group)
        if markers is not None and markers.dtype is not torch.bool:
            raise TypeError(f"steps: got dtype {markers.dtype} with process_group, want bool (step ends)")
    checks.check_values("rewards", rewards, tokens.mask)
    (rewards,) = checks.promote(rewards)
    return ReturnsArgs(rewards, tokens.mask, tokens.cu_seqlens, markers)


# ---- extremes, and parts of rows ---------------------------------------------------------------------------


def _extreme_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    process_group: ProcessGroup | None,
    largest: bool,
) -> Tensor:
    args = _prepare(rewards, mask, cu_seqlens, steps, process_group)
    out: Tensor = ops.extreme_returns(*args, largest)
    if process_group is None:
        return out

    def earliest(part: Tensor, later: Tensor) -> Tensor:
        further = later > part if largest else later < part
        return torch.where(later.isnan() | further, later, part)

    return _with_later_steps(process_group, out, args, earliest)[0]


def _with_later_steps(
    process_group: ProcessGroup,
    returns: Tensor,
    args: ReturnsArgs,
    join: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Join the returns of this rank's parts with those of later ranks; and the number of steps left, float64."""
    rows = Layout(batch_of(returns.shape, args.cu_seqlens), tuple(returns.shape), args.mask, args.cu_seqlens)
    valid = rows.valid(returns.device)
    ends = valid if args.steps is None else args.steps & valid
    number = td.td_scan(*TdArgs(wide(ends), mask=args.mask, cu_seqlens=args.cu_seqlens))[0]
    first = td.first_tokens(rows, returns.device)
    part = row_parts.StepsPart(*(td.at_marked(x, first, rows) for x in (number, wide(returns))))
    later = row_parts.join_later(process_group, part, join)
    left, after = rows.expand(later.number), rows.expand(later.result).to(returns.dtype)
    out = torch.where(number > 0, torch.where(left > 0, join(returns, after), returns), after)
    return torch.where(valid, out, 0), torch.where(valid, number + left, 0)
