"""Step shaping: rewards of steps from values, and outcomes distributed over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .core import checks
from .core.checks import Number
from .core.groups import GroupSize, Labels, group_ids
from .core.precision import wide, widest
from .core.rows import Layout
from .core.scalars import filled, listed
from .core.settings import may_read
from .ops.segments import row_sums, segment_broadcast, segment_reduce
from .ops.td import differences, last_tokens, prefix_scan, step_ends
from .segments import defined, row_tops
from .selection import scope_counts, scope_ids
from .td import factor, gae, scan

__all__ = [
    "budget_advantages", "budget_returns", "clip_delta_rewards", "potential_shaping", "redistribute_outcome",
    "step_progress",
]  # fmt: skip


def step_progress(
    values: Tensor,
    steps: Tensor | None = None,
    *,
    start: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A step's progress ``gamma * q_k - q_{k-1}``, at its end and 0 elsewhere.

    The gain of process advantage verifiers (2410.08146) and, with ``q`` the probability of the right answer
    after a turn, the information gain of IGPO (2510.14967). With gamma 1 it sums over a row to ``q`` of the
    last step less ``start``; with another one it is the reward of a potential ``q`` (Ng et al., 1999),
    discounted by step.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``: ``q``, read at step ends; float32, bfloat16,
            float16 or float64.
        steps: the shape of ``values``. bool: the tokens that end a step. Integer: step ids, non-decreasing
            along a row, negative for none. None: every valid token is a step.
        start: ``[B]``, ``q`` before the first step; None for 0.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        mask: the shape of ``values``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``values``; float32 (float64 for float64). Differentiable in ``values`` and ``start``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a discount out of its range, step ids that fall
            along a row.

    Example:
        >>> q = torch.tensor([[0.25, 0.5, 1.0]])
        >>> ro.step_progress(q, start=torch.tensor([0.125])).tolist()
        [[0.125, 0.25, 0.5]]
    """
    rows, q, markers = _steps_of("values", values, steps, mask, cu_seqlens)
    if start is not None:
        checks.check_rows("start", start, rows.batch, values.device, "values")
    discount, discounts = factor("gamma", gamma, rows, values.device, "values")
    ends = _ends(markers, rows, values.device)
    if discounts is None and not isinstance(discount, Tensor) and discount == 1:
        out = differences(q, ends, rows.cu_seqlens)
    else:
        less: float | Tensor = discount - 1
        if discounts is not None:
            per_token = discounts if discounts.shape == q.shape else rows.expand(discounts[:, 0])
            less = torch.where(ends, per_token - 1, 0)
        at_ends = wide(torch.where(ends, q, 0))
        out = (differences(at_ends, ends, rows.cu_seqlens) + less * at_ends).to(q.dtype)
    if start is None:
        return out
    first = differences(torch.ones_like(q), ends, rows.cu_seqlens) != 0
    return torch.where(first, out - rows.expand(start.to(q.dtype)), out)


def clip_delta_rewards(
    rewards: Tensor,
    steps: Tensor | None = None,
    *,
    eta: float | Tensor | None = 0.0,
    delta: bool = True,
    last: str = "zero",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Process rewards that cannot be farmed (2410.15115): clipped, then the difference of each and the next.

    Clip: ``min(r_k - eta, 0)``, so that more steps never pay. Delta, of K steps: ``r_k - r_{k+1}`` for k
    below K - 1, ``r_{K-1}`` at K - 1 and 0 at K, where the reward of success stands. The return from a step
    on is then that step's own reward, and the last step has none.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, read at step ends; float32, bfloat16, float16 or
            float64.
        steps: the shape of ``rewards``. bool: the tokens that end a step. Integer: step ids, non-decreasing
            along a row, negative for none. None: every valid token is a step.
        eta: the threshold of the clip, in the unit of the rewards; None for no clipping.
        delta: False for no differences.
        last: what Delta leaves at the last step of a row: ``"zero"``, as published (its reward is not read),
            or ``"own"``, its own reward, and ``r_{K-1} - r_K`` before it. Of no effect with ``delta=False``.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``rewards``, at step ends and 0 elsewhere; float32 (float64 for float64). Differentiable
        in ``rewards``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a ``delta`` that is no bool.
        ValueError: a shape or device that does not match, an eta that is not finite, an unknown ``last``,
            step ids that fall along a row.

    Example:
        >>> rewards = torch.tensor([[-0.5, 0.25, -1.0, 0.75]])
        >>> ro.clip_delta_rewards(rewards, delta=False).tolist()
        [[-0.5, 0.0, -1.0, 0.0]]
        >>> ro.clip_delta_rewards(rewards, eta=None, last="own").tolist()
        [[-0.75, 1.25, -1.75, 0.75]]
    """
    rows, r, markers = _steps_of("rewards", rewards, steps, mask, cu_seqlens)
    if eta is not None:
        eta = checks.check_finite("eta", eta)
    checks.check_flag("delta", delta)
    checks.check_choice("last", last, ("zero", "own"))
    ends = _ends(markers, rows, rewards.device)
    counted = ends
    if delta and last == "zero":
        counted = ends & ~last_tokens(rows._replace(mask=ends), rewards.device)
    r = torch.where(counted, r, 0)
    if eta is not None:
        r = torch.where(counted, (r - eta).clamp(max=0), 0)
    if not delta:
        return r
    ahead = gae(torch.zeros_like(r), r, lam=0.0, mask=ends, cu_seqlens=rows.cu_seqlens)
    return -ahead.advantages


def redistribute_outcome(
    outcome: Tensor,
    weights: Tensor,
    *,
    share: float | Tensor = 1.0,
    signed: bool = False,
    norm: str = "sum",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Distribute a row's outcome over its tokens by weights, such as attention or attributions.

    ``share * outcome * w[t] / sum w``, and the rest on the last valid token (Attention-Based Credit,
    2402.00782). The sum over a row is its outcome, however small the weights are. Where all weights are 0 the
    last token has the whole outcome.

    Args:
        outcome: ``[B]``, one per row; float32, bfloat16, float16 or float64.
        weights: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        share: the part of the outcome that is distributed, from 0 to 1.
        signed: False: weights below 0 count as 0. True: they count, as additive attributions do (SHAP, LIME),
            and shares may be negative. Where they cancel up to their own rounding,
            ``|sum w| <= eps * sum |w|`` with the eps of float32 (of float64 for float64), the last token has
            the whole outcome.
        norm: what a weight is divided by: ``"sum"`` of the row; ``"max"``, its largest absolute weight
            (attributions on a scale, as of Sotopia-RL, 2508.03905; the sum over a row is then not its
            outcome); ``"none"``, 1. Or ``"softmax"``: the share is the softmax of the row's weights, whatever
            their sign.
        mask: the shape of ``weights``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``weights``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``outcome`` and ``weights``. A weight that is not finite makes its row NaN, in values and gradients
        (its token, with ``norm="none"``); only under ``"softmax"`` ``-inf`` is a share of 0.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a ``signed`` that is no bool.
        ValueError: a shape or device that does not match, a share out of its range, an unknown norm.

    Example:
        >>> outcome, attention = torch.tensor([1.0]), torch.tensor([[1.0, 3.0, 4.0]])
        >>> ro.redistribute_outcome(outcome, attention).tolist()
        [[0.125, 0.375, 0.5]]
        >>> ro.redistribute_outcome(outcome, attention, share=0.5).tolist()
        [[0.0625, 0.1875, 0.75]]
    """
    checks.check_float("weights", weights)
    rows = checks.token_layout("weights", weights, mask, cu_seqlens)
    checks.check_rows("outcome", outcome, rows.batch, weights.device, "weights")
    share = checks.check_fraction("share", share)
    checks.check_flag("signed", signed)
    checks.check_choice("norm", norm, ("sum", "max", "none", "softmax"))
    total_outcome, w = checks.promote(outcome, weights)
    w = w if rows.mask is None else torch.where(rows.mask, w, 0)
    shares, some = _softmax_shares(w, rows) if norm == "softmax" else _shares(w, rows, signed, norm)
    rest = torch.where(some, (1 - share) * total_outcome, total_outcome)
    last = last_tokens(rows, weights.device)
    out = shares * rows.expand(share * total_outcome) + torch.where(last, rows.expand(rest), 0)
    return out if rows.mask is None else torch.where(rows.mask, out, 0)


def _shares(w: Tensor, rows: Layout, signed: bool, norm: str) -> tuple[Tensor, Tensor]:
    """Weights (0 where masked) divided by their norm, 0 in rows without one; ``[B]``: whether a row has one."""
    w = w * defined(w)
    w = w if signed else w.clamp(min=0)
    if norm == "none":
        return w, torch.ones((rows.batch,), dtype=torch.bool, device=w.device)
    size = row_tops(w.abs() if norm == "max" else w.detach().abs(), rows)
    some = ~(size <= 0)
    # By the largest first: sums, and in the gradient their squares, are about 1, however small the weights.
    w = w / rows.expand(torch.where(some, size, 1))
    if norm == "max":
        return w, some
    total = row_sums(w, rows)
    if signed:
        some = some & ~(total.abs() <= torch.finfo(w.dtype).eps * row_sums(w.detach().abs(), rows))
    divided = w / rows.expand(torch.where(some, total, 1))
    return torch.where(rows.expand(some), divided, 0), some


def _softmax_shares(w: Tensor, rows: Layout) -> tuple[Tensor, Tensor]:
    """The softmax of each row's weights, 0 in rows without one; ``[B]``: whether a row has one."""
    score = w if rows.mask is None else torch.where(rows.mask, w, -torch.inf)
    top = row_tops(score.detach(), rows)
    size = (score - rows.expand(torch.where(top == -torch.inf, 0, top))).exp()
    total = row_sums(size, rows)
    some = total != 0
    return size / rows.expand(torch.where(some, total, 1)), some


def potential_shaping(
    rewards: Tensor,
    potential: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    final: float | Tensor = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Potential-based shaping, ``r[t] + gamma * potential[t+1] - potential[t]`` (Ng et al., 1999).

    With ``final`` after the last token. The sum telescopes: with gamma 1 a return changes by ``final`` less
    the potential at its start; with a final potential of 0 no policy's rank changes.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        potential: the shape of ``rewards``, the potential before each token; float32, bfloat16, float16 or
            float64.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        final: the potential after the last token, of a row that was cut off for example: a number, or
            ``[B]``.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens inside a row are skipped.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        The layout of ``rewards``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards``, ``potential`` and a ``final`` of ``[B]``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a discount out of its range, a final potential that
            is not finite.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
        >>> potential = torch.tensor([[0.25, 0.5, 0.75]])
        >>> ro.potential_shaping(rewards, potential).tolist()
        [[0.25, 0.25, 0.25]]
    """
    checks.check_tensor("potential", potential)
    beyond = None
    if isinstance(final, Tensor) and final.dim():
        checks.check_float("rewards", rewards)
        rows = checks.token_layout("rewards", rewards, mask, cu_seqlens)
        checks.check_rows("final", final, rows.batch, rewards.device, "rewards")
        beyond = final
    else:
        number = checks.check_finite("final", final)
        if isinstance(number, Tensor) or number != 0:
            checks.check_float("rewards", rewards)
            rows = checks.token_layout("rewards", rewards, mask, cu_seqlens)
            beyond = filled(checks.promote(rewards)[0], number).expand(rows.batch)
    options = (beyond, gamma, 0.0, mask, cu_seqlens, "skip")
    out: Tensor = scan(rewards, potential, *options, names=("rewards", "potential"))[1][0]
    return out


# ---- budgets -------------------------------------------------------------------------------------------------

BUDGET_BASELINES = ("brpo", "history", "group", "none")


def budget_returns(scores: Tensor, probs: Tensor | Sequence[float] | None = None) -> Tensor:
    """Return of a row from each thinking budget on: ``R_j = sum over i >= j of P_i scores[i]``.

    AnytimeReasoner (2505.13438): a row is stopped at one of several budgets, with probability ``P``, and
    scored.

    Args:
        scores: ``[B, S]``, a row's score at each of S budgets, from the smallest; float32, bfloat16, float16
            or float64.
        probs: ``[S]``, a tensor or a sequence of numbers of at least 0, normalised here; None for equal
            probabilities.

    Returns:
        ``[B, S]``, float32 (float64 for float64). Differentiable in ``scores``.

    Raises:
        TypeError: scores that are no tensor, a dtype that is not accepted, probabilities of another type.
        ValueError: a shape that does not match, probabilities that are negative or all 0.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 1.0]])
        >>> ro.budget_returns(scores, (0.5, 0.25, 0.25)).tolist()
        [[0.5, 0.5, 0.25]]
    """
    s, p = _budgets(scores, probs)
    return _still_to_come(wide(s), p).to(s.dtype)


def _still_to_come(scores: Tensor, probs: Tensor) -> Tensor:
    return (scores * probs).flip(1).cumsum(1).flip(1)


def budget_advantages(
    scores: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    probs: Tensor | Sequence[float] | None = None,
    baseline: str = "brpo",
    growth: float | Tensor = 2.0,
) -> Tensor:
    """Budget-relative advantages (BRPO, 2505.13438): :func:`budget_returns` less a baseline.

    Computed in float64, for any number of budgets and any ``growth``.

    Args:
        scores: ``[B, S]``, a row's score at each of S budgets, from the smallest; float32, bfloat16, float16
            or float64.
        groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable; not
            needed for ``"none"``.
        group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
            ``[G]``, integer).
        probs: ``[S]``, the probabilities of the budgets, numbers of at least 0, normalised here; None for
            equal ones.
        baseline: ``"history"``: the row's own earlier scores, averaged with weights ``growth^i``, times the
            remaining probability. ``"group"``: the mean return of the group from that budget on (the row's
            own included, as in the authors' code; 0 for a row alone in its group). ``"brpo"``: ``j / S`` of
            the former and ``(S - j) / S`` of the latter at budget ``j`` from 0. ``"none"``: 0.
        growth: base of the weights of earlier scores, above 0; above 1 the later ones weigh more.

    Returns:
        ``[B, S]``, float32 (float64 for float64). Differentiable in ``scores``.

    Raises:
        TypeError: scores that are no tensor, a dtype that is not accepted, labels that cannot be hashed.
        ValueError: a shape or device that does not match, an unknown baseline, both or neither of ``groups``
            and ``group_size``, probabilities that are negative or all 0, a growth that is not above 0.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> ro.budget_advantages(scores, group_size=2).tolist()
        [[-0.25, 0.25], [0.25, 0.0]]
        >>> ro.budget_advantages(scores, group_size=2, baseline="group").tolist()
        [[-0.25, 0.0], [0.25, 0.0]]
    """
    checks.check_choice("baseline", baseline, BUDGET_BASELINES)
    growth = checks.check_positive("growth", growth)
    s, p = _budgets(scores, probs)
    batch, count = s.shape
    ids = None
    if baseline != "none" or groups is not None or group_size is not None:
        ids = group_ids(groups, group_size, batch, s.device, "scores")
    exact = wide(s)
    returns = _still_to_come(exact, p)
    if baseline == "none" or ids is None or not s.numel():
        return returns.to(s.dtype)
    if baseline == "group":
        return (returns - _means_of_groups(returns, ids)).to(s.dtype)
    remaining = p.flip(0).cumsum(0).flip(0)
    history = _earlier_means(exact, growth) * remaining
    if baseline == "history":
        return (returns - history).to(s.dtype)
    j = torch.arange(count, dtype=exact.dtype, device=s.device)
    mixed = (j * history + (count - j) * _means_of_groups(returns, ids)) / count
    return (returns - mixed).to(s.dtype)


def _means_of_groups(x: Tensor, ids: Tensor) -> Tensor:
    """``[B, S]``: the means of the columns over the row's group; 0 for a row alone in its group."""
    batch = x.shape[0]
    place = scope_ids("group", ids, batch, ids.device)
    alone = scope_counts(torch.ones_like(place), place)[place] == 1
    order = place.argsort(stable=True)
    # The rows of a group as a step of a column.
    steps = place[order].expand(x.shape[1], batch).contiguous()
    sums, _ = segment_reduce(x.t()[:, order], steps, None, None, batch, "mean")
    means = segment_broadcast(sums, steps, None, None)[:, order.argsort()].t()
    return torch.where(alone[:, None], 0, means)


def _earlier_means(x: Tensor, growth: Number) -> Tensor:
    """``[B, S]``: the mean of the columns before each, with weights ``growth^i``; 0 at the first."""
    rate = 1 / filled(x, growth)
    power = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    # The weights up to a column over that of the column itself: the mean moves by the inverse of it. Where they
    # overflow, it does not move.
    mass = (rate**power).cumsum(0)
    moves = 1 / mass
    near_zero = torch.cat([torch.zeros_like(mass[:1]), rate * mass[:-1] / mass[1:]])
    stays = torch.where(rate < 1, near_zero, 1 - moves)  # each in full precision where it is small
    # A column is carried on by what the next one leaves of it.
    carried = torch.cat([stays[1:], torch.ones_like(stays[:1])]).expand(x.shape).contiguous()
    means = prefix_scan(x * moves, carried, None, None)
    return torch.cat([torch.zeros_like(means[:, :1]), means[:, :-1]], 1)


# ---- arguments ---------------------------------------------------------------------------------------------


def _steps_of(
    name: str, values: Tensor, steps: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Layout, Tensor, Tensor | None]:
    """The layout, the values in full precision, and the step markers, all validated. Launches nothing."""
    checks.check_float(name, values)
    rows = checks.token_layout(name, values, mask, cu_seqlens)
    markers = checks.step_markers(steps, values, rows, name)
    checks.check_values(name, values, rows.mask)
    (wide,) = checks.promote(values)
    return rows, wide, markers


def _ends(markers: Tensor | None, rows: Layout, device: torch.device) -> Tensor:
    """Flags of the tokens that end a step; without steps all valid tokens."""
    return rows.valid(device) if markers is None else step_ends(markers, rows)


def _budgets(scores: Tensor, probs: Tensor | Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """The scores in full precision, and the probabilities in the widest."""
    checks.check_float("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores: got shape {checks.show(scores.shape)}, want [B, budgets]")
    (s,) = checks.promote(scores)
    count = s.shape[1]
    if probs is None:
        return s, torch.full((count,), 1 / max(count, 1), dtype=widest(s.device), device=s.device)
    numbers = checks.as_numbers("probs", probs, count, "the columns of scores")
    p = listed(numbers, widest(s.device), s.device)
    if may_read(p) and count and not (bool((p >= 0).all()) and 0 < float(p.sum()) < math.inf):
        raise ValueError("probs: got no distribution, want no negative number, and not only zeros")
    return s, p / p.sum()
