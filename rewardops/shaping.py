"""Step shaping: rewards of steps from values, and outcomes distributed over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .advantages import group_advantages
from .core import checks
from .core.groups import GroupSize, Labels, group_ids
from .core.rows import Layout
from .core.settings import may_read
from .ops.segments import row_sums
from .ops.td import differences, last_tokens, step_ends
from .td import gae, scan

__all__ = [
    "budget_advantages", "budget_returns", "clip_delta_rewards", "potential_shaping", "redistribute_outcome",
    "step_progress",
]  # fmt: skip


def step_progress(
    values: Tensor,
    steps: Tensor | None = None,
    *,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A step's progress ``q_k - q_{k-1}``, at its end and 0 elsewhere.

    The gain of process advantage verifiers (2410.08146) and, with ``q`` the probability of the right answer after a
    turn, the information gain of IGPO (2510.14967). Over a row it sums to ``q`` of the last step less ``start``.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``: ``q``, read at step ends.
        steps: step ids or step-end flags, as in :func:`rewardops.min_returns`; None: every valid token is a step.
        start: ``[B]``, ``q`` before the first step; None for 0.

    Returns:
        The layout of ``values``; float32 (float64 for float64). Differentiable in ``values`` and ``start``.
    """
    rows, q, markers = _steps_of("values", values, steps, mask, cu_seqlens)
    if start is not None:
        checks.check_rows("start", start, rows.batch, values.device, "values")
    ends = _ends(markers, rows, values.device)
    out = differences(q, ends, rows.cu_seqlens)
    if start is None:
        return out
    first = differences(torch.ones_like(q), ends, rows.cu_seqlens) != 0
    return torch.where(first, out - rows.expand(start.to(q.dtype)), out)


def clip_delta_rewards(
    rewards: Tensor,
    steps: Tensor | None = None,
    *,
    eta: float | None = 0.0,
    delta: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Process rewards that cannot be farmed (2410.15115): clipped, then the difference of each and the next.

    Clip: ``min(r_k - eta, 0)``, so that more steps never pay. Delta: ``r_k - r_{k+1}``, and the last unchanged, so
    that the return from a step on is that step's own reward.

    Args:
        rewards, steps, mask, cu_seqlens: as in :func:`step_progress`.
        eta: None for no clipping. delta: False for no differences.

    Returns:
        The layout of ``rewards``, at step ends and 0 elsewhere. Differentiable in ``rewards``.
    """
    rows, r, markers = _steps_of("rewards", rewards, steps, mask, cu_seqlens)
    if eta is not None:
        checks.check_finite("eta", eta)
    checks.check_flag("delta", delta)
    ends = _ends(markers, rows, rewards.device)
    r = torch.where(ends, r, 0)
    if eta is not None:
        r = torch.where(ends, (r - eta).clamp(max=0), 0)
    if not delta:
        return r
    ahead = gae(torch.zeros_like(r), r, lam=0.0, mask=ends, cu_seqlens=rows.cu_seqlens)
    return -ahead.advantages


def redistribute_outcome(
    outcome: Tensor,
    weights: Tensor,
    *,
    share: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Distribute a row's outcome over its tokens by non-negative weights, such as the last token's attention.

    ``share * outcome * w[t] / sum w``, and the rest on the last valid token (Attention-Based Credit, 2402.00782).
    The sum over a row is its outcome. Where all weights are 0 the last token has the whole outcome.

    Args:
        outcome: ``[B]``. share: 0 to 1.
        weights: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; values below 0 count as 0.

    Returns:
        The layout of ``weights``, 0 where masked. Differentiable in ``outcome`` and ``weights``.
    """
    checks.check_float("weights", weights)
    rows = checks.token_layout("weights", weights, mask, cu_seqlens)
    checks.check_rows("outcome", outcome, rows.batch, weights.device, "weights")
    checks.check_fraction("share", share)
    total_outcome, w = checks.promote(outcome, weights)
    w = w.clamp(min=0) if rows.mask is None else torch.where(rows.mask, w, 0).clamp(min=0)
    total = row_sums(w, rows)
    some = total > 0
    per_weight = torch.where(some, share * total_outcome / torch.where(some, total, 1), 0)
    rest = torch.where(some, (1 - share) * total_outcome, total_outcome)
    last = last_tokens(rows, weights.device)
    out = w * rows.expand(per_weight) + torch.where(last, rows.expand(rest), 0)
    return out if rows.mask is None else torch.where(rows.mask, out, 0)


def potential_shaping(
    rewards: Tensor,
    potential: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``r[t] + gamma * potential[t+1] - potential[t]``, the potential after the last token 0 (Ng et al., 1999).

    The sum telescopes: with gamma 1 a return changes by the potential at its start alone; no policy's rank changes.

    Args:
        rewards, potential: ``[B, T]``, or ``[N]`` with ``cu_seqlens``. gamma: as in :func:`rewardops.gae`.

    Returns:
        The layout of ``rewards``, 0 where masked. Differentiable in both.
    """
    checks.check_tensor("potential", potential)
    options = (None, gamma, 0.0, mask, cu_seqlens, "skip")
    out: Tensor = scan(rewards, potential, *options, names=("rewards", "potential"))[1][0]
    return out


# ---- budgets -------------------------------------------------------------------------------------------------

BUDGET_BASELINES = ("brpo", "history", "group", "none")


def budget_returns(scores: Tensor, probs: Tensor | Sequence[float] | None = None) -> Tensor:
    """Return of a row from each thinking budget on: ``R_j = sum over i >= j of P_i scores[i]``.

    AnytimeReasoner (2505.13438): a row is stopped at one of several budgets, with probability ``P``, and scored.

    Args:
        scores: ``[B, S]``, at each budget. probs: ``[S]``, normalised here; None for equal probabilities.

    Returns:
        ``[B, S]``. Differentiable in ``scores``.
    """
    return _still_to_come(*_budgets(scores, probs))


def _still_to_come(scores: Tensor, probs: Tensor) -> Tensor:
    return (scores * probs).flip(1).cumsum(1).flip(1)


def budget_advantages(
    scores: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    probs: Tensor | Sequence[float] | None = None,
    baseline: str = "brpo",
    growth: float = 2.0,
) -> Tensor:
    """Budget-relative advantages (BRPO, 2505.13438): :func:`budget_returns` less a baseline.

    ``"history"``: the row's own earlier scores, averaged with weights ``growth^i``, times the remaining
    probability. ``"group"``: the mean return of the group from that budget on (the row's own included, as in the
    authors' code; 0 for a row alone in its group). ``"brpo"``: ``j / S`` of the former and ``(S - j) / S`` of the
    latter at budget ``j`` from 0.

    Returns:
        ``[B, S]``. Differentiable in ``scores``.
    """
    checks.check_choice("baseline", baseline, BUDGET_BASELINES)
    checks.check_positive("growth", growth)
    s, p = _budgets(scores, probs)
    batch, count = s.shape
    ids = None
    if baseline != "none" or groups is not None or group_size is not None:
        ids = group_ids(groups, group_size, batch, s.device, "scores")
    returns = _still_to_come(s, p)
    if baseline == "none" or ids is None or not s.numel():
        return returns
    above = [group_advantages(returns[:, j], ids, baseline="mean", scale="none") for j in range(count)]
    alone = (ids[:, None] == ids[None, :]).sum(1) == 1
    group = torch.where(alone[:, None], 0, returns - torch.stack(above, 1))
    w = growth ** torch.arange(count, dtype=s.dtype, device=s.device)
    remaining = p.flip(0).cumsum(0).flip(0)
    before = (s * w).cumsum(1) - s * w
    history = before / (w.cumsum(0) - w).clamp(min=torch.finfo(s.dtype).tiny) * remaining
    history = torch.cat([torch.zeros_like(history[:, :1]), history[:, 1:]], 1)
    if baseline == "group":
        return returns - group
    if baseline == "history":
        return returns - history
    j = torch.arange(count, dtype=s.dtype, device=s.device)
    return returns - (j * history + (count - j) * group) / count


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
    checks.check_float("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores: got shape {checks.show(scores.shape)}, want [B, budgets]")
    (s,) = checks.promote(scores)
    count = s.shape[1]
    if probs is None:
        return s, torch.full((count,), 1 / max(count, 1), dtype=s.dtype, device=s.device)
    numbers = checks.as_numbers("probs", probs, count, "the columns of scores")
    p = torch.as_tensor(numbers, dtype=s.dtype, device=s.device).detach()
    if may_read(p) and count and not (bool((p >= 0).all()) and 0 < float(p.sum()) < math.inf):
        raise ValueError("probs: got no distribution, want no negative number, and not only zeros")
    return s, p / p.sum()
