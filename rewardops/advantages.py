"""Advantages: group-relative advantages, per row or written to tokens in the same launch, and their presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import entropy as entropy_family
from .core import checks, distributed
from .core.checks import Number
from .core.groups import GroupSize, Labels, group_ids
from .core.precision import wide, widest
from .core.scalars import listed
from .ops.group_spec import (
    AllOptions,
    BaselineOptions,
    FixedOptions,
    GroupOptions,
    GroupSpec,
    GrpoSOptions,
    GtpoOptions,
    ReinforceOptions,
)
from .ops.scopes import as_rows, standardized
from .ops.segments import row_counts, row_sums
from .ops.td import last_tokens, step_ends, sums_between
from .returns import softmin_rewards
from .selection import scope_counts, scope_ids
from .td import discounted_returns, factor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "advantages_to_tokens", "dr_grpo", "gdpo", "gpg", "group_advantages", "grpo", "grpo_s", "gtpo", "lite_ppo",
    "max_rl", "opo", "pass_at_k", "pure", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo",
    "whiten",
]  # fmt: skip


def group_advantages(
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    baseline: str | float | Tensor = "mean",
    scale: str = "std",
    eps: float | Tensor = 1e-6,
    ddof: int = 1,
    singleton: str = "zero",
    lengths: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
    process_group: ProcessGroup | None = None,
    max_per_rank: int | None = None,
) -> Tensor:
    """Advantage of every row relative to its group: ``(reward - baseline) / (scale + eps)``.

    The defaults are GRPO (arXiv 2402.03300); the presets of :mod:`rewardops.advantages` name the others.

    ======================  ======================================================================================
    baseline                of a group of n
    ======================  ======================================================================================
    ``"mean"``              GRPO, Dr. GRPO
    ``"leave_one_out"``     mean of the others (RLOO): ``reward - baseline = n / (n - 1) * (reward - mean)``
    ``"median"``            the lower of two middle rewards, as ``torch.median``
    a number q              the quantile q, interpolated linearly, as ``torch.quantile``
    ``"max"``               the largest
    ``"second_max"``        pass@k: the best row has ``largest - second largest``, every other row 0
    ``"length_weighted"``   ``sum length * reward / sum length`` (OPO)
    a tensor ``[B]``        its values, one per row (ReMax, a critic); differentiable in it
    ``"none"``              0
    ======================  ======================================================================================

    ``scale``: ``"std"`` of the group; ``"batch_std"`` of all rewards of the batch (Lite PPO); ``"mean_abs"``, the
    mean of the group's absolute rewards (MaxRL, for rewards of at least 0); ``"range"``, largest less smallest;
    ``"none"``, 1.

    Exact on the hard inputs: equal finite rewards give 0 whatever their value (not the quotient of two rounding
    errors), rewards near 1000 keep their differences, rewards of any magnitude have the std of the formula, a
    group of one has advantage 0 under any baseline but ``"none"`` and a tensor, and 0 under any scale but
    ``"none"`` and ``"batch_std"``. A NaN reward makes every advantage of its group NaN (of the batch under
    ``"batch_std"``), as none of them is defined without it. With neither a scale nor a baseline of the group, only
    the advantage of its own row is NaN.

    Infinite rewards show as well, by the arithmetic of floating-point numbers. The mean of a group with one is
    infinite: its own row has ``inf - inf``, NaN, the others ``-inf``. Every std is then NaN; a ``"mean_abs"`` or
    ``"range"`` is infinite, and ``x / inf`` is 0 for a finite ``x`` and NaN for an infinite one. Under a scale the
    gradients of a group (of the batch) with a reward that is NaN or infinite are NaN.

    Args:
        rewards: ``[B]``, one per row; float32, bfloat16, float16 or float64. With ``weights``: ``[B, R]``, R
            rewards, normalised separately and then summed (GDPO, MO-GRPO). There a NaN is a reward that the row
            does not have: the row is left out of the column's groups, and the column adds 0 to its advantage
            and has gradient 0 there; a row of NaN alone has advantage 0.
        groups: ``[B]``: integer labels of any value in any order, groups may be ragged; or a numpy array or a
            sequence of strings or other objects, such as prompt ids (compared on the host). None with
            ``group_size``.
        group_size: instead of ``groups``: contiguous groups of this many rows, or of these sizes, a
            list or an integer tensor ``[G]``; sizes may be 0.
        baseline: what is subtracted: a name, a number or a tensor of the table.
        scale: what is divided by, a name of the list above.
        eps: added to the scale; at least 0.
        ddof: 1 for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"``, or ``"raw"`` for its reward, as in verl's GRPO
            (not with ``scale="batch_std"``).
        lengths: ``[B]``, finite numbers of at least 0, for ``"length_weighted"``; None for the number of valid
            tokens. Only their ratios matter; in a group whose lengths are all 0 rows weigh the same.
        weights: ``[R]``, which asks for rewards ``[B, R]``; ``[1] * R`` for their plain sum. None for rewards
            ``[B]``.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: the advantage is
            written to every valid token and 0 to the others. A row without a valid token does not count in its
            group. None for all tokens of ``cu_seqlens``, or without them for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: the advantage is written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: ``N``; needed where ``cu_seqlens`` lies on a device (or a graph is traced) and there is no
            mask.
        process_group: groups, and the batch of ``"batch_std"``, span the rows of all its ranks; each rank gets
            the advantages of its own rows. A label denotes the same group on every rank (labels outside tensors
            are str, bytes or int); ``group_size`` counts on from rank to rank. One collective, of a few numbers
            per row. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank. Without it the ranks exchange
            their numbers of rows first, and the host reads them.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64 rewards).
        Differentiable in ``rewards``, through baseline and scale, and in a tensor ``baseline``; a statistic
        that selects a reward (median, quantile, largest, range) has its gradient at the earliest row with that
        reward; a group of equal rewards under a scale, where a std has no gradient, has gradient 0.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, rewards ``[B, R]`` without weights (they could be per
            token), neither or both of ``groups`` and ``group_size``, sizes that do not add up to the rows, an
            unknown baseline, scale or singleton, lengths that are missing, negative or not finite (values are
            read on a CPU, elsewhere under :func:`rewardops.debug`), a number out of its range, no
            ``num_tokens`` where it is needed, more rows than ``max_per_rank``.

    Example:
        >>> rewards, prompts = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), ["a", "b", "a", "b", "b"]
        >>> [round(x, 3) for x in ro.group_advantages(rewards, prompts).tolist()]
        [0.707, -1.155, -0.707, 0.577, 0.577]
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> ro.group_advantages(torch.tensor([1.0, 0.0]), group_size=2, scale="none", mask=mask).tolist()
        [[0.5, 0.5, 0.0], [-0.5, -0.5, -0.5]]
    """
    _check_channels(rewards, weights, "; for R separate rewards [B, R] pass weights=")
    options: dict[str, Any] = {
        "group_size": group_size, "baseline": baseline, "scale": scale, "eps": eps, "ddof": ddof,
        "singleton": singleton, "lengths": lengths, "mask": mask, "cu_seqlens": cu_seqlens,
        "num_tokens": num_tokens,
    }  # fmt: skip
    ranks = distributed.Ranks.of(process_group, max_per_rank)
    if ranks is not None or rewards.dim() == 2:
        spec, total = _by_row(ranks, rewards, groups, weights, **options)
        return spec.to_tokens(total)
    return GroupSpec.of(rewards, groups, **options).advantages(rewards)


def advantages_to_tokens(
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Per-row values written to the valid tokens of their rows, 0 elsewhere.

    Args:
        advantages: ``[B]``; float32, bfloat16, float16 or float64.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1. None for all tokens of
            ``cu_seqlens``.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed tokens ``[N]``. None for padded ones, with
            ``mask``.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.

    Returns:
        ``[B, T]`` or ``[N]``; float32 (float64 for float64). Differentiable in ``advantages``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither ``mask`` nor ``cu_seqlens``, no
            ``num_tokens`` where it is needed.

    Example:
        >>> ro.advantages_to_tokens(torch.tensor([1.0, -2.0]), cu_seqlens=torch.tensor([0, 1, 3])).tolist()
        [1.0, -2.0, -2.0]
    """
    if mask is None and cu_seqlens is None:
        raise ValueError("mask: got None without cu_seqlens, want one of the two")
    spec = GroupSpec.of(
        advantages, None, group_size=1, baseline="none", scale="none", mask=mask, cu_seqlens=cu_seqlens,
        num_tokens=num_tokens, name="advantages",
    )  # fmt: skip
    return spec.advantages(advantages)


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float | Tensor = 1e-8,
    shift_mean: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``(values - mean) / sqrt(var + eps)`` over all valid elements, 0 where masked.

    With ``ddof=1`` and ``eps=1e-8`` verl's ``masked_whiten``, with ``ddof=0`` OpenRLHF's and NeMo's. Fewer than two
    valid elements, or equal ones, give 0 (``shift_mean=False`` adds the mean back).

    Args:
        values: any shape, padded or packed; float32, bfloat16, float16 or float64.
        mask: the same shape. Floats other than 0 and 1 are weights of the elements in mean and variance; their
            sum is the number of elements. None for all elements.
        ddof: 1 for the unbiased variance, 0 for the population's.
        eps: added to the variance; at least 0.
        shift_mean: True for a mean of 0; False adds the mean back.
        process_group: mean and variance are over the elements of all its ranks, any number on each. One
            collective, of four numbers. None for this process alone.

    Returns:
        The shape of ``values``, float32 (float64 for float64). Differentiable, through mean and variance.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a weight below 0 or not finite, a number out of its
            range.

    Example:
        >>> out = ro.whiten(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
        >>> [[round(x, 3) for x in row] for row in out.tolist()]
        [[-1.0, 0.0], [1.0, 0.0]]
    """
    checks.check_float("values", values)
    eps = checks.check_eps_ddof(eps, ddof)
    checks.check_flag("shift_mean", shift_mean)
    if process_group is not None:
        distributed.check(process_group)
    valid, weight = checks.as_weights(mask, values.shape, values.device, "values")
    if process_group is not None:
        return _whiten_over_ranks(values, valid, weight, ddof, eps, shift_mean, process_group)
    x, *weights = checks.promote(*([values] if weight is None else [values, weight]))

    out = x
    if x.numel():
        tokens = [as_rows(t) for t in (x, weights[0] if weights else None, valid)]
        out = standardized(*tokens, None, None, None, 0.0, eps, ddof, True, False, shift_mean)[0]
    return out.reshape(values.shape).to(checks.promote(values)[0].dtype)


def _whiten_over_ranks(
    values: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    ddof: int,
    eps: Number,
    shift_mean: bool,
    process_group: ProcessGroup,
) -> Tensor:
    """:func:`whiten` over the elements of all ranks: their moments are merged."""
    (x,) = checks.promote(values)
    valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
    x = torch.where(valid, x, 0)
    weight = None if weight is None else wide(weight)

    def summed(x: Tensor) -> Tensor:
        """The sum of what is 0 where masked, weighed."""
        return x.sum(dtype=widest(x.device)) if weight is None else (torch.where(valid, weight, 0) * x).sum()

    count = summed(valid)
    # Subtract some element first: large values keep their differences, and equal values give exactly 0.
    first = torch.where(valid, x, torch.inf).detach().amin() if x.numel() else x.new_zeros(())
    first = torch.where(first.isfinite(), first, 0)
    above = torch.where(valid, x - first, 0)
    mean = summed(above) / torch.where(count > 0, count, 1)
    squares = summed(wide(torch.where(valid, above - mean, 0)).square())
    base, count, mean, squares = _merged_moments(process_group, count, first, mean, squares)
    centred = torch.where(valid, above + ((first - base) - mean), 0)
    var = squares / torch.where(count > ddof, count - ddof, torch.where(count > 0, count, 1))
    varies = var + eps > 0
    out = centred * torch.where(varies, torch.where(varies, var + eps, 1).rsqrt(), 0)
    if not shift_mean:
        out = out + mean + base
    # Masked last, so that the backward pass drops the gradients of masked tokens first.
    return torch.where(valid, out, 0).to(x.dtype)


# ---- presets -----------------------------------------------------------------------------------------------


def grpo(rewards: Tensor, groups: Labels = None, **options: Unpack[AllOptions]) -> Tensor:
    """GRPO (2402.03300): ``(r - mean) / (std + eps)``, the defaults of :func:`group_advantages`.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 1e-6 by default.
        ddof: 1 (by default) for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        scale: what is divided by, ``"std"`` by default; ``"batch_std"``, ``"mean_abs"``, ``"range"`` or
            ``"none"``.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline and scale.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown baseline, scale or singleton, a number out of its
            range, no ``num_tokens`` where it is needed.

    Example:
        >>> out = ro.advantages.grpo(torch.tensor([1.0, 0.0, 0.0, 1.0]), group_size=2)
        >>> [round(x, 3) for x in out.tolist()]
        [0.707, -0.707, -0.707, 0.707]
    """
    return group_advantages(rewards, groups, **options)


def dr_grpo(rewards: Tensor, groups: Labels = None, **options: Unpack[BaselineOptions]) -> Tensor:
    """Dr. GRPO (2503.20783): ``r - mean``. The loss is then divided by a constant length, not the response's.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: no effect, as there is no scale.
        ddof: no effect, as there is no std.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through the baseline.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown baseline or singleton, a number out of its range, no
            ``num_tokens`` where it is needed.

    Example:
        >>> ro.advantages.dr_grpo(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4).tolist()
        [0.75, -0.25, -0.25, -0.25]
    """
    return group_advantages(rewards, groups, scale="none", **options)


def rloo(rewards: Tensor, groups: Labels = None, **options: Unpack[FixedOptions]) -> Tensor:
    """RLOO (2402.14740): reward less the mean of the others.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: no effect, as there is no scale.
        ddof: no effect, as there is no std.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through the baseline.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown singleton, a number out of its range, no
            ``num_tokens`` where it is needed.

    Example:
        >>> ro.advantages.rloo(torch.tensor([1.0, 0.0, 0.5]), group_size=3).tolist()
        [0.75, -0.75, 0.0]
    """
    return group_advantages(rewards, groups, baseline="leave_one_out", scale="none", **options)


def lite_ppo(rewards: Tensor, groups: Labels = None, **options: Unpack[BaselineOptions]) -> Tensor:
    """Lite PPO (2508.08221): group mean, std of the rewards of the batch (as TRL's ``scale_rewards="batch"``).

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 1e-6 by default.
        ddof: 1 (by default) for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"``; ``"raw"`` is not accepted.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups and batch span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline and scale.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown baseline or singleton, a number out of its range, no
            ``num_tokens`` where it is needed.

    Example:
        >>> out = ro.advantages.lite_ppo(torch.tensor([1.0, 0.0, 4.0, 0.0]), group_size=2)
        >>> [round(x, 3) for x in out.tolist()]  # the std of all four is 1.893
        [0.264, -0.264, 1.057, -1.057]
    """
    return group_advantages(rewards, groups, scale="batch_std", **options)


def opo(
    rewards: Tensor,
    groups: Labels = None,
    *,
    lengths: Tensor | None = None,
    **options: Unpack[FixedOptions],
) -> Tensor:
    """OPO (2505.23585): reward less the group's length-weighted mean reward.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        lengths: ``[B]``, integer or float, finite and at least 0; None for the rows' numbers of valid tokens.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: no effect, as there is no scale.
        ddof: no effect, as there is no std.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through the baseline.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown singleton, neither lengths nor tokens, a number out
            of its range, no ``num_tokens`` where it is needed.

    Example:
        >>> rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([1, 3])
        >>> ro.advantages.opo(rewards, group_size=2, lengths=lengths).tolist()  # the baseline is 1 / 4
        [0.75, -0.25]
    """
    return group_advantages(
        rewards, groups, baseline="length_weighted", scale="none", lengths=lengths, **options
    )


def pass_at_k(
    rewards: Tensor, groups: Labels = None, *, scale: str = "none", **options: Unpack[FixedOptions]
) -> Tensor:
    """Pass@k with k = n (2503.19595): the best row has the margin to the second, the others 0.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        scale: what is divided by: ``"none"``, ``"std"``, ``"batch_std"``, ``"mean_abs"`` or ``"range"``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 1e-6 by default.
        ddof: 1 (by default) for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline and scale.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown scale or singleton, a number out of its range, no
            ``num_tokens`` where it is needed.

    Example:
        >>> ro.advantages.pass_at_k(torch.tensor([0.25, 1.0, 0.5]), group_size=3).tolist()
        [0.0, 0.5, 0.0]
    """
    return group_advantages(rewards, groups, baseline="second_max", scale=scale, **options)


def max_rl(rewards: Tensor, groups: Labels = None, **options: Unpack[BaselineOptions]) -> Tensor:
    """MaxRL: ``(r - mean) / (mean + eps)`` for rewards of at least 0; the mean of absolute rewards otherwise.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 1e-6 by default.
        ddof: no effect, as there is no std.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        weights: ``[R]``, of R rewards per row, normalised separately and summed; None for one reward per row.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline and scale.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards ``[B, R]`` without weights, an unknown baseline or singleton, a number out of its range, no
            ``num_tokens`` where it is needed.

    Example:
        >>> out = ro.advantages.max_rl(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4)
        >>> [round(x, 3) for x in out.tolist()]
        [3.0, -1.0, -1.0, -1.0]
    """
    return group_advantages(rewards, groups, scale="mean_abs", **options)


def gpg(
    rewards: Tensor,
    groups: Labels = None,
    *,
    alpha: str = "informative",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
    process_group: ProcessGroup | None = None,
    max_per_rank: int | None = None,
    **options: Unpack[GroupOptions],
) -> Tensor:
    """GPG (2504.02546): ``alpha (r - mean)``, with alpha the number of rows over that of rows with a signal.

    Args:
        rewards: ``[B]``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        alpha: which rows have a signal: ``"informative"``, those whose reward is not their group's mean, or
            ``"rewards"``, those whose reward is not 0, as verl does. Alpha is a constant to the gradient.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups, and the rows that alpha counts, span all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 0 by default.
        ddof: 1 (by default) for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        scale: what is divided by, ``"none"`` by default; ``"std"``, ``"batch_std"``, ``"mean_abs"`` or
            ``"range"``.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline and scale.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, an
            unknown alpha, baseline, scale or singleton, a number out of its range, no ``num_tokens`` where it
            is needed.

    Example:
        >>> ro.advantages.gpg(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2).tolist()  # alpha is 4 / 2
        [1.0, -1.0, 0.0, 0.0]
    """
    checks.check_choice("alpha", alpha, ("informative", "rewards"))
    settings: dict[str, Any] = {"scale": "none", "eps": 0.0, **options}
    where: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "num_tokens": num_tokens}
    ranks = distributed.Ranks.of(process_group, max_per_rank)
    _check_channels(rewards, None)
    checks.check_rewards(rewards)
    spec, advantages = _by_row(ranks, rewards, groups, None, **where, **settings)
    # A row without a valid token counts in neither number, as in no group.
    live = spec.live()
    signal = (((advantages if alpha == "informative" else rewards).detach() != 0) & live).sum()
    count = live.sum()
    if ranks is not None:
        signal, count = distributed.exchange(torch.stack([signal, count]), ranks.process_group).sum(0)
    return spec.to_tokens(advantages * (count / signal.clamp(min=1)))


def gdpo(
    rewards: Tensor,
    groups: Labels = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    whitening: str = "rows",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
    process_group: ProcessGroup | None = None,
    max_per_rank: int | None = None,
    **options: Unpack[GroupOptions],
) -> Tensor:
    """GDPO: GRPO per reward of ``[B, R]``, their weighted sum, whitened over the batch.

    A NaN is a reward that the row does not have, as in :func:`group_advantages`: per reward the z-score over the
    rows that have it, 0 for the others. A row of NaN alone has 0, and is left out of the whitening.

    Args:
        rewards: ``[B, R]``, R rewards per row; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones. None with
            ``group_size``.
        weights: ``[R]``, None for 1 each; needed where ``mask`` has the shape of the rewards, which could then
            be per token.
        whitening: over ``"rows"`` (the authors' code, TRL), ``"tokens"`` (verl: long rows weigh more), or
            ``"none"`` (MO-GRPO, 2509.22047).
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1: advantages are written
            to the valid tokens. None for advantages per row.
        cu_seqlens: ``[B + 1]``, int32 or int64: advantages are written to packed tokens ``[N]``. None for
            padded ones.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        process_group: groups and whitening span the rows of all its ranks. None for this process alone.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        eps: added to the scale; at least 0, 1e-6 by default.
        ddof: 1 (by default) for the unbiased std, 0 for the population's.
        singleton: the advantage of a group of one: ``"zero"`` (by default), or ``"raw"`` for its reward.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        scale: what is divided by, ``"std"`` by default; ``"batch_std"``, ``"mean_abs"``, ``"range"`` or
            ``"none"``.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.

    Returns:
        ``[B]``, or ``[B, T]`` or ``[N]`` with a mask or cu_seqlens; float32 (float64 for float64), 0 where
        masked. Differentiable in ``rewards``, through baseline, scale and whitening.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``,
            rewards that could be per token, an unknown whitening, baseline, scale or singleton, a number out of
            its range, no ``num_tokens`` where it is needed.

    Example:
        >>> rewards = torch.tensor([[1.0, 3.0], [0.0, 1.0], [0.0, 9.0], [1.0, 1.0]])
        >>> out = ro.advantages.gdpo(rewards, group_size=2, weights=[1.0, 0.5])
        >>> [round(x, 3) for x in out.tolist()]
        [1.162, -1.162, -0.387, 0.387]
    """
    checks.check_choice("whitening", whitening, ("rows", "tokens", "none"))
    checks.check_float("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: got shape {checks.show(rewards.shape)}, want [B, R]")
    if weights is None:
        if cu_seqlens is None and isinstance(mask, Tensor) and mask.shape == rewards.shape:
            raise ValueError(
                f"rewards: got shape {checks.show(rewards.shape)}, that of the mask, want [B, R]: sum per-token"
                " rewards over each row first; if these are R separate rewards, pass weights="
            )
        weights = [1.0] * rewards.shape[1]
    where: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "num_tokens": num_tokens}
    ranks = distributed.Ranks.of(process_group, max_per_rank)
    spec, total = _by_row(ranks, rewards, groups, weights, **where, **options)
    rewarded = spec.live() & ~rewards.detach().isnan().all(1)
    if whitening == "rows" or (whitening == "tokens" and spec.rows is None):
        return spec.to_tokens(whiten(total, rewarded, process_group=process_group))
    out = spec.to_tokens(total)
    if whitening == "none":
        return out
    assert spec.rows is not None
    tokens = spec.rows.valid(rewards.device) & spec.rows.expand(rewarded)
    return whiten(out, tokens, process_group=process_group)


def gtpo(
    rewards: Tensor,
    entropy: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positive: float | Tensor | None = None,
    eps: float | Tensor = 1e-8,
    joint: bool = False,
    **options: Unpack[GtpoOptions],
) -> Tensor:
    """GTPO (2508.04349): :func:`gtpo_rewards`, then :func:`signed_group_normalize`.

    Args:
        rewards: ``[B]``, the outcome of each row; float32, bfloat16, float16 or float64.
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, in nats.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        positive: rows with a reward above this are right, the others wrong; None for 0.
        eps: added to the variance; at least 0.
        joint: normalise right and wrong rows together.
        alpha1: weight of the outcome, 1 by default.
        alpha2: weight of the entropy's share, 0.1 by default.
        entropy_floor: in wrong rows, entropies below it are raised to it; above 0, by default 0.01 nats.
        entropy_grad: let the gradient flow into ``entropy`` too; False by default.

    Returns:
        The layout of ``entropy``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards``, and in ``entropy`` with ``entropy_grad``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, a
            number out of its range.

    Example:
        >>> entropy = torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]])
        >>> out = ro.advantages.gtpo(torch.tensor([1.0, 1.0, 0.0]), entropy, group_size=3)
        >>> [[round(x, 2) for x in row] for row in out.tolist()]  # a wrong row of equal charges has 0
        [[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]
    """
    eps = checks.check_non_negative("eps", eps)
    checks.check_flag("joint", joint)
    where: dict[str, Any] = {"group_size": group_size, "mask": mask, "cu_seqlens": cu_seqlens}
    shaped = entropy_family.gtpo_rewards(rewards, entropy, groups, positive=positive, **where, **options)
    return entropy_family.signed_group_normalize(
        shaped, rewards, groups, positive=positive, eps=eps, joint=joint, **where
    )


def grpo_s(
    rewards: Tensor,
    entropy: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float | Tensor = 1e-8,
    **options: Unpack[GrpoSOptions],
) -> Tensor:
    """GRPO-S (2508.04349): GRPO on :func:`grpo_s_rewards`, written to all tokens of a row.

    Args:
        rewards: ``[B]``, the outcome of each row; float32, bfloat16, float16 or float64.
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, in nats.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        eps: added to the std; at least 0.
        beta1: weight of the outcome, 1 by default.
        beta2: weight of the entropy's share, 0.1 by default.
        positive: rows with a reward above this are right, the others wrong; None for 0.
        entropy_floor: in wrong rows, mean entropies below it are raised to it; above 0, by default 0.01 nats.
        entropy_grad: let the gradient flow into ``entropy`` too; False by default.

    Returns:
        The layout of ``entropy``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards``, and in ``entropy`` with ``entropy_grad``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, a
            number out of its range.

    Example:
        >>> entropy = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])
        >>> out = ro.advantages.grpo_s(torch.tensor([1.0, 1.0, 0.0]), entropy, group_size=3)
        >>> [[round(x, 2) for x in row] for row in out.tolist()]
        [[0.54, 0.54], [0.62, 0.62], [-1.15, -1.15]]
    """
    eps = checks.check_non_negative("eps", eps)
    where: dict[str, Any] = {"group_size": group_size, "mask": mask, "cu_seqlens": cu_seqlens}
    shaped = entropy_family.grpo_s_rewards(rewards, entropy, groups, **where, **options)
    if cu_seqlens is not None:
        where["num_tokens"] = entropy.shape[0]
    elif mask is None:
        where["mask"] = torch.ones_like(entropy, dtype=torch.bool)
    return group_advantages(shaped, groups, eps=eps, **where)


def pure(
    process_rewards: Tensor,
    steps: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    outcome: Tensor | None = None,
    outcome_weight: float | Tensor = 1.0,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    temperature: float | Tensor = 0.1,
    baseline: str = "token",
    gamma: float | Tensor = 1.0,
    separators: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """PURE (2504.15275): soft-min process rewards, leave-one-out baselines and the outcome, as discounted returns.

    The order of the authors' main branch: :func:`softmin_rewards` at step ends; less the baseline; the outcome,
    less its mean over the other rows, on the last token; the KL penalty off every token; discounted sums; and 0 on
    the tokens that end a step. A row alone in its group has no baseline, a row without a step no process reward.

    Args:
        process_rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64; read
            at step ends.
        steps: the shape of ``process_rewards``: step-end flags (bool) or step ids (integer), as in
            :func:`rewardops.min_returns`.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        outcome: ``[B]``, the reward of a verifier (0 for right and -1 for wrong in the authors' code). None for
            no outcome.
        outcome_weight: factor of the outcome.
        kl: the shape of ``process_rewards``, KL to the reference per token, as from :func:`rewardops.token_kl`:
            ``beta * kl`` is subtracted from the rewards before the sums, and has no baseline. None for no
            penalty.
        beta: factor of ``kl``.
        temperature: of the soft minimum, above 0.
        baseline: ``"token"`` (the authors' scripts): ``b`` is the others' reward per token, step ends counted,
            and a step pays ``b`` for each of its tokens but its end. ``"step"``: each step pays the mean over
            the others of their reward per step. ``"none"``.
        gamma: 0 to 1: a number, or a tensor with one per row ``[B]`` or per token; no gradient flows into it.
        separators: keep the advantages on tokens that end a step.
        mask: the shape of ``process_rewards``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        The layout of ``process_rewards``, float32 (float64 for float64), 0 where masked. Differentiable in both
        rewards and ``kl``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, an
            unknown baseline, step ids that fall along a row, a number out of its range.

    Example:
        >>> rewards = torch.tensor([[0.0, 1.0, 0.0, 0.5]])
        >>> steps = torch.tensor([[False, True, False, True]])
        >>> out = ro.advantages.pure(rewards, steps, group_size=1, temperature=1.0, separators=True)
        >>> [[round(x, 3) for x in row] for row in out.tolist()]
        [[0.689, 0.689, 0.311, 0.311]]
    """
    checks.check_float("process_rewards", process_rewards)
    checks.check_choice("baseline", baseline, ("token", "step", "none"))
    rows = checks.token_layout("process_rewards", process_rewards, mask, cu_seqlens)
    markers = checks.step_markers(steps, process_rewards, rows, "process_rewards")
    if markers is None:
        raise TypeError("steps: got None, want step-end flags or step ids")
    device = process_rewards.device
    ids = group_ids(groups, group_size, rows.batch, device, "process_rewards")
    if outcome is not None:
        checks.check_rows("outcome", outcome, rows.batch, device, "process_rewards")
    outcome_weight = checks.check_finite("outcome_weight", outcome_weight)
    if kl is not None:
        checks.check_like("kl", kl, process_rewards, "process_rewards")
    beta = checks.check_finite("beta", beta)
    temperature = checks.check_positive("temperature", temperature)
    factor("gamma", gamma, rows, device, "process_rewards")
    checks.check_flag("separators", separators)
    where: dict[str, Any] = {"mask": rows.mask, "cu_seqlens": rows.cu_seqlens}
    ends = step_ends(markers, rows)
    r = softmin_rewards(process_rewards, steps=steps, temperature=temperature, **where)
    lengths = row_counts(rows, r.device).to(r.dtype)
    live = lengths > 0
    if baseline != "none":
        total = row_sums(r, rows)
        if baseline == "step":
            number = row_sums(ends.to(r.dtype), rows)
            summed, count = _others(torch.where(number > 0, total / number.clamp(min=1), 0), ids, live)
            per_step = rows.expand(torch.where(count > 0, summed / count.clamp(min=1), 0))
        else:
            summed, _ = _others(total, ids, live)
            tokens, _ = _others(lengths, ids, live)
            per_token = torch.where(tokens > 0, summed / torch.where(tokens > 0, tokens, 1), 0)
            counted = rows.valid(r.device)
            if markers.dtype is not torch.bool:
                counted = counted & (markers >= 0)
            sizes = sums_between(counted.to(r.dtype), ends, rows)
            per_step = rows.expand(per_token) * (sizes - 1)
        r = torch.where(ends, r - per_step, 0)
    if outcome is not None:
        verdict = outcome.to(r.dtype)
        summed, count = _others(verdict, ids, live)
        verdict = outcome_weight * (verdict - torch.where(count > 0, summed / count.clamp(min=1), 0))
        last = last_tokens(rows, r.device)
        r = r + torch.where(last, rows.expand(verdict), 0)
    if kl is not None:
        penalty = beta * kl.to(r.dtype)
        r = r - (penalty if rows.mask is None else torch.where(rows.mask, penalty, 0))
    out = discounted_returns(r, gamma=gamma, **where)
    return out if separators else torch.where(ends, 0, out)


def remax(
    token_rewards: Tensor, baseline: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """ReMax (2310.10505): the sum of rewards from a token on, less the reward of the greedy response.

    Args:
        token_rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        baseline: ``[B]``, the reward of the greedy response to each row's prompt.
        mask: the shape of ``token_rewards``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        The layout of ``token_rewards``, float32 (float64 for float64), 0 where masked. Differentiable in both.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> ro.advantages.remax(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0.25])).tolist()
        [[0.75, 0.75, 0.75]]
    """
    checks.check_float("token_rewards", token_rewards)
    rows = checks.token_layout("token_rewards", token_rewards, mask, cu_seqlens)
    checks.check_rows("baseline", baseline, rows.batch, token_rewards.device, "token_rewards")
    returns = discounted_returns(token_rewards, mask=mask, cu_seqlens=cu_seqlens)
    out = returns - rows.expand(baseline.to(returns.dtype))
    return out if rows.mask is None else torch.where(rows.mask, out, 0)


def reinforce_plus_plus(
    token_rewards: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    eps: float | Tensor = 1e-8,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """REINFORCE++ (2501.03262): discounted returns, whitened over all valid tokens of the batch.

    Args:
        token_rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        gamma: 0 to 1: a number, or a tensor with one per row ``[B]`` or per token; no gradient flows into it.
        mask: the shape of ``token_rewards``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        ddof: 1 for the unbiased variance, 0 for the population's.
        eps: added to the variance; at least 0.
        process_group: whitening spans the tokens of all its ranks. None for this process alone.

    Returns:
        The layout of ``token_rewards``, float32 (float64 for float64), 0 where masked. Differentiable in
        ``token_rewards``, through mean and variance.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a number out of its range.

    Example:
        >>> rewards, mask = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> out = ro.advantages.reinforce_plus_plus(rewards, mask=mask)
        >>> [[round(x, 3) for x in row] for row in out.tolist()]
        [[0.577, 0.577], [-1.155, 0.0]]
    """
    checks.check_float("token_rewards", token_rewards)
    checks.token_layout("token_rewards", token_rewards, mask, cu_seqlens)
    eps = checks.check_eps_ddof(eps, ddof)
    if process_group is not None:
        distributed.check(process_group)
    returns = discounted_returns(token_rewards, gamma=gamma, mask=mask, cu_seqlens=cu_seqlens)
    return whiten(returns, mask, ddof=ddof, eps=eps, process_group=process_group)


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    groups: Labels = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
    ddof: int = 1,
    eps: float | Tensor = 1e-8,
    process_group: ProcessGroup | None = None,
    **options: Unpack[ReinforceOptions],
) -> Tensor:
    """REINFORCE++-baseline: reward less group mean on every token, whitened over all valid tokens.

    Args:
        rewards: ``[B]``, or ``[B, R]`` with ``weights``; float32, bfloat16, float16 or float64.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        mask: ``[B, T]`` (or ``[N]`` beside ``cu_seqlens``); bool, integer or float 0/1. None for all tokens of
            ``cu_seqlens``.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed tokens ``[N]``. None for padded ones, with
            ``mask``.
        num_tokens: N; needed with ``cu_seqlens`` on a device (or in a graph) and no mask.
        ddof: 1 for the unbiased variance of the whitening, 0 for the population's.
        eps: added to the variance of the whitening; at least 0.
        process_group: groups and whitening span all its ranks. None for this process alone.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        singleton: the value of a group of one before whitening: ``"zero"`` (by default), or ``"raw"`` for its
            reward.
        baseline: what is subtracted, ``"mean"`` by default: a name, a quantile or a tensor ``[B]``, as in the
            table of :func:`group_advantages`.
        lengths: ``[B]``, what rows weigh in ``baseline="length_weighted"``; None for their numbers of valid
            tokens.
        weights: ``[R]``, of R rewards per row, summed; None for one reward per row.
        max_per_rank: with a process group, an upper bound of the rows per rank; None to exchange the numbers of
            rows.

    Returns:
        ``[B, T]`` or ``[N]``; float32 (float64 for float64), 0 where masked. Differentiable in ``rewards``,
        through baseline, mean and variance.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither ``mask`` nor ``cu_seqlens``, neither or both
            of ``groups`` and ``group_size``, rewards ``[B, R]`` without weights, an unknown baseline or
            singleton, a number out of its range, no ``num_tokens`` where it is needed.

    Example:
        >>> rewards, mask = torch.tensor([1.0, 0.0]), torch.tensor([[1, 1], [1, 0]])
        >>> out = ro.advantages.reinforce_plus_plus_baseline(rewards, group_size=2, mask=mask)
        >>> [[round(x, 3) for x in row] for row in out.tolist()]
        [[0.577, 0.577], [-1.155, 0.0]]
    """
    tokens: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "num_tokens": num_tokens}
    if mask is None and cu_seqlens is None:
        raise ValueError(
            "mask: got None without cu_seqlens, want one of the two (it is whitened over tokens)"
        )
    eps = checks.check_eps_ddof(eps, ddof)
    advantages = dr_grpo(rewards, groups, **tokens, process_group=process_group, **options)
    return whiten(advantages, mask, ddof=ddof, eps=eps, process_group=process_group)


def _others(x: Tensor, ids: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of ``x`` over the other live rows of the group, and the number of these rows."""
    place = scope_ids("group", ids, ids.shape[0], ids.device)
    count = scope_counts(live, place)[place]
    above = group_advantages(x, ids, baseline="mean", scale="none", mask=live[:, None])[:, 0]
    x = torch.where(live, x, 0)
    return (x - above) * count - x, count - 1


# ---- per row, on one rank or several -----------------------------------------------------------------------


def _check_channels(rewards: Tensor, weights: object, otherwise: str = "") -> None:
    """Rewards ``[B, R]`` where weights ask for them, and only there: ``[B, T]`` are not R rewards."""
    checks.check_float("rewards", rewards)
    if weights is None and rewards.dim() == 2:
        raise ValueError(
            f"rewards: got shape {checks.show(rewards.shape)}, want [B]: sum per-token rewards over each row first"
            f" ((rewards * mask).sum(1), or rewardops.row_sum(rewards, mask=mask)){otherwise}"
        )
    if weights is not None and rewards.dim() != 2:
        shape = checks.show(rewards.shape)
        raise ValueError(f"weights: got a value for rewards {shape}, want rewards [B, R]")


def _by_row(
    ranks: distributed.Ranks | None,
    rewards: Tensor,
    groups: Labels,
    weights: Sequence[float] | Tensor | None,
    **options: Any,
) -> tuple[GroupSpec, Tensor]:
    """Advantages per row ``[B]``, not yet on tokens; for rewards ``[B]`` or ``[B, R]``, on one rank or several."""
    if ranks is not None:
        return _over_ranks(ranks, rewards, groups, weights, **options)
    if rewards.dim() == 2:
        return _summed(rewards, groups, weights, **options)
    spec = GroupSpec.of(rewards, groups, **options)
    return spec, spec.by_row().advantages(rewards)[:, 0]


def _over_ranks(
    ranks: distributed.Ranks,
    rewards: Tensor,
    groups: Labels,
    weights: Sequence[float] | Tensor | None,
    *,
    group_size: GroupSize = None,
    baseline: str | float | Tensor = "mean",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens: int | None = None,
    **options: Any,
) -> tuple[GroupSpec, Tensor]:
    """Advantages ``[B]`` of this rank's rows among the rows of all ranks; every rank computes all of them."""
    if rewards.dim() == 2 and not rewards.shape[1]:
        raise ValueError(
            f"rewards: got shape {checks.show(rewards.shape)}, want [B] or [B, R] with R of at least 1"
        )
    column = rewards if rewards.dim() != 2 else torch.where(rewards.isnan(), 0, rewards)[:, 0]
    where: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "num_tokens": num_tokens}
    labels = distributed.own_labels(groups, group_size, column.shape[0], rewards.device, "rewards")
    spec = GroupSpec.of(column, labels, baseline=baseline, lengths=lengths, **where, **options)
    options["baseline"] = baseline
    per_row = {"baseline": spec.baseline_values, "lengths": spec.weights()}
    extra = {name: value for name, value in per_row.items() if value is not None}
    gathered = distributed.gather(
        [rewards, labels, spec.live(), *extra.values()], ranks.process_group, ranks.max_per_rank
    )
    all_rewards, all_labels, live, *gathered_extra = gathered.tensors
    options |= dict(zip(extra, gathered_extra, strict=True))
    ids = distributed.labels(gathered, all_labels, group_size)
    total = group_advantages(all_rewards, ids, weights=weights, mask=live[:, None], **options)
    return spec, gathered.own(total[:, 0])


def _summed(
    rewards: Tensor, groups: Labels, weights: Sequence[float] | Tensor | None, **options: Any
) -> tuple[GroupSpec, Tensor]:
    """Per row the weighted sum of advantages by each column of rewards ``[B, R]``, among the rows that have it."""
    missing = rewards.detach().isnan()
    rewards = torch.where(missing, 0, rewards)
    checks.check_values("rewards", rewards)
    columns = rewards.unbind(1)
    spec = GroupSpec.of(columns[0] if columns else rewards.sum(1), groups, **options)
    count = len(columns)
    numbers = checks.as_numbers(
        "weights", [1.0] * count if weights is None else weights, count, "the columns of rewards"
    )
    by_row = spec.by_row()
    total = checks.promote(rewards)[0].new_zeros(rewards.shape[0])
    shares = listed(numbers, total.dtype, total.device)
    for share, column, absent in zip(shares.unbind(), columns, missing.unbind(1), strict=True):
        total = total + share * by_row.among(~absent).advantages(column)[:, 0]
    return spec, total


# ---- whitening over ranks ----------------------------------------------------------------------------------


def _merged_moments(
    process_group: ProcessGroup, count: Tensor, first: Tensor, mean: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the moments of all ranks.

    Each rank contributes the count of its elements, one element, the mean relative to that element, and the sum of
    squares about that mean. The result is an element that all ranks subtract, and count, mean and squares of all.
    """
    record = torch.stack([wide(x) for x in (count, first, mean, squares)])
    (records,) = distributed.gather([record[None]], process_group, 1).tensors
    counts, firsts, means, parts = records.unbind(1)
    base = torch.where(counts > 0, firsts.detach(), torch.inf).amin()
    base = torch.where(base.isfinite(), base, 0)
    total = counts.sum()
    means = torch.where(counts > 0, means + (firsts - base), 0)
    whole = (counts * means).sum() / total.clamp(min=1)
    return base, total, whole, parts.sum() + (counts * (means - whole).square()).sum()
