"""Group-relative advantages, the specification (see :func:`rewardops.group_advantages`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.groups import same_group
from ..core.rows import from_rows, to_rows

BASELINES = (
    "mean", "leave_one_out", "median", "quantile", "max", "second_max", "length_weighted", "values", "none",
)  # fmt: skip
SCALES = ("std", "batch_std", "mean_abs", "range", "none")


class AdvantagesArgs(NamedTuple):
    """Arguments of ``group_advantages`` and its backward pass."""

    rewards: Tensor
    """``[B]``, float32 or float64."""
    groups: Tensor
    """``[B]`` int64 labels, in any order."""
    baseline_values: Tensor | None
    """``[B]``, the dtype of the rewards; for the baseline ``"values"`` alone."""
    lengths: Tensor | None
    """``[B]``, the dtype of the rewards; for the baseline ``"length_weighted"`` alone."""
    mask: Tensor | None
    """bool, ``[B, T]`` or ``[N]``. None without ``cu_seqlens``: advantages are per row."""
    cu_seqlens: Tensor | None
    """``[B + 1]``, int32 or int64, offsets of packed rows."""
    num_tokens: int
    """``N`` with ``cu_seqlens``, else -1."""
    baseline: str
    """One of ``BASELINES``."""
    quantile: float
    """0 to 1, for the baseline ``"quantile"``."""
    scale: str
    """One of ``SCALES``."""
    eps: float
    """Added to the scale."""
    ddof: int
    """0 or 1, for standard deviations."""
    raw: bool
    """True: the advantage of a group of one is its reward."""

    @property
    def token_shape(self) -> tuple[int, ...] | None:
        """The shape of the tokens; None where advantages are per row."""
        if self.mask is not None:
            return tuple(self.mask.shape)
        return None if self.cu_seqlens is None else (self.num_tokens,)


def live_rows(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``[B]`` bool: the rows that have a token; all rows where there are no tokens."""
    if mask is None and cu_seqlens is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    if mask is None:
        assert cu_seqlens is not None
        return cu_seqlens[1:] > cu_seqlens[:-1]
    return to_rows(mask, mask, cu_seqlens)[1].any(1)


class _Members(NamedTuple):
    """The live rows of each row's group ``[B, B]``, and their statistics."""

    same: Tensor
    rewards: Tensor  # [B, B], 0 outside the group
    count: Tensor  # type: ignore[assignment]
    low: Tensor
    high: Tensor
    differs: Tensor
    centred: Tensor  # the row's reward - mean; exactly 0 where the group's rewards are equal
    std: Tensor
    mean_abs: Tensor
    broken: Tensor  # True where any reward of the group is NaN

    @staticmethod
    def of(rewards: Tensor, same: Tensor, ddof: int) -> _Members:
        r = torch.where(same, rewards[None, :], 0)
        zero = torch.zeros_like(rewards)
        count = same.sum(1).to(rewards.dtype)
        some = rewards.numel() > 0
        # Centred on the smallest reward first: rewards near 1000 keep their differences, and equal rewards,
        # which have a std of rounding size, come out as exactly 0.
        low = torch.where(same, r, torch.inf).amin(1) if some else zero
        high = torch.where(same, r, -torch.inf).amax(1) if some else zero
        differs = (same & (r != low[:, None])).any(1)
        above = torch.where(same, r - low[:, None], 0)
        mean_above = above.sum(1) / count.clamp(min=1)
        centred = torch.where(differs & same.any(1), rewards - low - mean_above, 0)
        square = torch.where(same, above - mean_above[:, None], 0).square().sum(1)
        std = torch.where(differs, square / (count - ddof).clamp(min=1), 0).sqrt()
        mean_abs = r.abs().sum(1) / count.clamp(min=1)
        return _Members(same, r, count, low, high, differs, centred, std, mean_abs, r.isnan().any(1))

    def first(self, value: Tensor) -> Tensor:
        """``[B, B]``, 1 at the earliest member of the group with the reward ``value``."""
        hit = self.same & (self.rewards == value[:, None])
        return (hit & (hit.cumsum(1) == 1)).to(value.dtype)

    def ranked(self, rank: Tensor) -> Tensor:
        """The reward of rank ``rank`` in ascending order, from 0 to count - 1."""
        if not rank.numel():
            return self.low
        ordered = torch.where(self.same, self.rewards, torch.inf).sort(1).values
        return ordered.gather(1, rank.long().clamp(0, rank.shape[0] - 1)[:, None])[:, 0]


class _Statistics(NamedTuple):
    numerator: Tensor  # reward - baseline
    inv_scale: Tensor  # 1 / (scale + eps); 0 where the scale's rewards are equal; 1 for the scale "none"
    gain: Tensor  # d numerator / d rewards = diag(gain) - weights
    weights: Tensor  # [B, B], d baseline / d rewards, times the gain
    d_scale: Tensor  # [B, B], d scale / d rewards
    alone: Tensor  # rows whose advantage is their raw reward


def _statistics(a: AdvantagesArgs, live: Tensor) -> _Statistics:
    r = torch.where(live, a.rewards, 0)
    one, none = torch.ones_like(r), r.new_zeros((r.shape[0], r.shape[0]))
    same = same_group(a.groups, live)
    g = _Members.of(r, same, a.ddof)
    n = g.count.clamp(min=1)
    gain, weights = one, none
    if a.baseline == "none":
        numerator = r
    elif a.baseline == "values":
        assert a.baseline_values is not None
        numerator = r - torch.where(live, a.baseline_values, 0)
    elif a.baseline == "mean":
        numerator, weights = g.centred, same / n[:, None]
    elif a.baseline == "leave_one_out":
        gain = torch.where(g.count > 1, g.count / (g.count - 1).clamp(min=1), 0)
        numerator, weights = gain * g.centred, gain[:, None] * same / n[:, None]
    elif a.baseline == "length_weighted":
        assert a.lengths is not None
        share = torch.where(same, a.lengths.to(r.dtype)[None, :], 0)
        weights = share / torch.where(share.sum(1) > 0, share.sum(1), 1)[:, None]
        above = torch.where(same, g.rewards - g.low[:, None], 0)
        numerator = torch.where(g.differs, r - g.low - (weights * above).sum(1), 0)
        weights = torch.where(share.sum(1)[:, None] > 0, weights, 0)
    else:
        if a.baseline == "quantile":
            at = a.quantile * (g.count - 1).clamp(min=0)
            rank = at.floor()
            part = at - rank
        else:
            from_top = {"max": 1, "second_max": 2}.get(a.baseline)
            rank = ((g.count - 1) / 2).floor() if from_top is None else (g.count - from_top).clamp(min=0)
            part = torch.zeros_like(rank)
        below = g.ranked(rank)
        above = torch.where(part > 0, g.ranked(rank + 1), below)
        # Interpolated from the difference: equal neighbours give exactly their value.
        numerator = torch.where(g.differs, r - below - torch.where(part > 0, part * (above - below), 0), 0)
        weights = (1 - part)[:, None] * g.first(below) + part[:, None] * g.first(above)
        if a.baseline == "second_max":
            # Only the best row has a non-zero advantage.
            best = g.first(g.high).diagonal()
            numerator, gain, weights = numerator * best, gain * best, weights * best[:, None]

    everyone = _Members.of(r, live[:, None] & live[None, :], a.ddof) if a.scale == "batch_std" else g
    inv_scale, d_scale = one, none
    if a.scale != "none":
        size = {
            "std": g.std, "batch_std": everyone.std, "mean_abs": g.mean_abs, "range": g.high - g.low,
        }[a.scale]  # fmt: skip
        inv_scale = torch.where(everyone.differs, 1 / (size + a.eps), 0)
        if a.scale == "range":
            d_scale = g.first(g.high) - g.first(g.low)
        elif a.scale == "mean_abs":
            d_scale = same * r.sign()[None, :] / n[:, None]
        else:
            freedom = (everyone.count - a.ddof).clamp(min=1) * everyone.std
            d_scale = torch.where(
                freedom[:, None] > 0, everyone.same * everyone.centred[None, :] / freedom[:, None], 0
            )
    alone = live & (g.count == 1) if a.raw else torch.zeros_like(live)
    if a.raw:
        numerator, inv_scale = torch.where(alone, r, numerator), torch.where(alone, 1, inv_scale)
        gain = torch.where(alone, 1, gain)
        weights, d_scale = (torch.where(alone[:, None], 0, x) for x in (weights, d_scale))
    elif a.baseline not in ("none", "values"):
        numerator = torch.where(g.broken, torch.nan, torch.where(g.count > 1, numerator, 0))
    numerator, inv_scale = torch.where(live, numerator, 0), torch.where(live, inv_scale, 0)
    return _Statistics(numerator, inv_scale, gain, weights, d_scale, alone)


def group_advantages(a: AdvantagesArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, per row or per token; and per row ``1 / scale`` and ``reward - baseline``."""
    live = live_rows(a.rewards, a.mask, a.cu_seqlens)
    s = _statistics(a, live)
    # A degenerate group has inv_scale 0; an infinite reward in it must not give NaN.
    advantages = torch.where(s.inv_scale == 0, 0, s.numerator * s.inv_scale)
    if a.token_shape is not None:
        tokens = (
            torch.ones(a.token_shape, dtype=torch.bool, device=a.rewards.device) if a.mask is None else a.mask
        )
        _, valid = to_rows(tokens, a.mask, a.cu_seqlens)
        advantages = from_rows(torch.where(valid, advantages[:, None], 0), tokens.shape, a.cu_seqlens)
    return advantages, s.inv_scale, s.numerator.clone()


def group_advantages_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    a: AdvantagesArgs,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rewards, and of the baseline values (empty without such values)."""
    live = live_rows(a.rewards, a.mask, a.cu_seqlens)
    s = _statistics(a, live)
    if grad is None:
        up = torch.zeros_like(a.rewards)
    elif a.token_shape is None:
        up = grad
    else:
        up = to_rows(grad, a.mask, a.cu_seqlens)[0].sum(1)
    counts = s.inv_scale != 0
    up = torch.where(counts, up, 0)
    through = up * torch.where(counts, numerator, 0)
    if grad_inv_scale is not None:
        through = through + torch.where(counts, grad_inv_scale, 0)
    on_numerator = s.inv_scale * up
    out = s.gain * on_numerator - on_numerator @ s.weights - (through * s.inv_scale.square()) @ s.d_scale
    no_values = a.baseline_values is None
    on_values = a.rewards.new_empty(0) if no_values else torch.where(s.alone, 0, -on_numerator)
    return torch.where(live, out, 0), on_values
