"""Group-relative advantages, the specification (see :func:`rewardops.group_advantages`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.groups import group_sums, numbered
from ..core.kinds import Flags, IdRows, Offsets, RealRows
from ..core.rows import from_rows, to_rows

BASELINES = (
    "mean", "leave_one_out", "median", "quantile", "max", "second_max", "length_weighted", "values", "none",
)  # fmt: skip
SCALES = ("std", "batch_std", "mean_abs", "range", "none")


class AdvantagesArgs(NamedTuple):
    """Arguments of ``group_advantages`` and its backward pass."""

    rewards: RealRows
    """``[B]``, float32 or float64."""
    groups: IdRows
    """``[B]`` int64 labels, in any order."""
    baseline_values: RealRows | None
    """``[B]``, the dtype of the rewards; for the baseline ``"values"`` alone."""
    lengths: RealRows | None
    """``[B]``, the dtype of the rewards; for the baseline ``"length_weighted"`` alone."""
    mask: Flags | None
    """bool, ``[B, T]`` or ``[N]``. None without ``cu_seqlens``: advantages are per row."""
    cu_seqlens: Offsets | None
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
    contiguous: bool
    """True: the rows of every group are neighbours, as those of groups by size; nothing follows from False."""

    @property
    def token_shape(self) -> tuple[int, ...] | None:
        """The shape of the tokens; None where advantages are per row."""
        if self.mask is not None:
            return tuple(self.mask.shape)
        return None if self.cu_seqlens is None else (self.num_tokens,)


def check_backward(
    grad: Tensor | None,
    grad_inv_scale: Tensor | None,
    inv_scale: Tensor,
    numerator: Tensor,
    a: AdvantagesArgs,
) -> None:
    """Raise unless the gradient has the shape of the advantages."""
    want = tuple(a.rewards.shape if a.token_shape is None else a.token_shape)
    if grad is not None and tuple(grad.shape) != want:
        raise ValueError(f"grad: got shape {list(grad.shape)}, want {list(want)}")


def live_rows(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``[B]`` bool: the rows that have a token; all rows where there are no tokens."""
    if mask is None and cu_seqlens is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    if mask is None:
        assert cu_seqlens is not None
        return cu_seqlens[1:] > cu_seqlens[:-1]
    return to_rows(mask, mask, cu_seqlens)[1].any(1)


class _Members(NamedTuple):
    """Rows in groups, and the statistics of each row's group; floats are float64.

    Everything is a sort of the rows or a sum over them in sorted order: it takes O(B) memory, and the order of the
    rows shows in no bit.
    """

    rewards: Tensor
    number: Tensor  # [B], the number of the row's group; B for rows that are in none
    order: Tensor  # [B], rows by group, then by reward (NaN last), then as they come
    start: Tensor  # [B], the place in `order` of the first row of the row's group
    count: Tensor  # type: ignore[assignment]
    low: Tensor
    high: Tensor  # NaN if any reward of the group is NaN
    equal: Tensor  # True where the rewards of the group are equal, and numbers
    above: Tensor  # reward - low
    centred: Tensor  # reward - mean; exactly 0 where the group's rewards are equal
    std: Tensor
    mean_abs: Tensor

    @staticmethod
    def of(rewards: Tensor, number: Tensor, ddof: int) -> _Members:
        by_reward = (rewards + 0.0).argsort(stable=True)  # 0.0: one sort of zero
        order = by_reward.gather(0, number.gather(0, by_reward).argsort(stable=True))
        sizes = number.new_zeros(len(number) + 1).index_add_(0, number, torch.ones_like(number))
        start, count = (sizes.cumsum(0) - sizes).gather(0, number), sizes.gather(0, number).double()
        one = torch.ones_like(rewards)
        g = _Members(rewards, number, order, start, count, *[one] * 7)
        low, high = g.ranked(torch.zeros_like(one)), g.ranked(count - 1)
        # Centred on the smallest reward first, unless that is infinite: rewards near 1000 keep their differences,
        # and equal rewards, which have a std of rounding size, come out as exactly 0.
        above = rewards - torch.where(low.isfinite(), low, 0)
        centred = above - g.total(above) / count
        # In units of a power of two of which neither squares nor their sum leave the range of float64 (or float32).
        spread, power = high - low, 400.0 if rewards.dtype is torch.float64 else 50.0
        small, large = 2.0 ** (-1.5 * power), 2.0 ** (1.5 * power)
        unit = torch.where(spread > 2.0**power, small, torch.where(spread < 2.0**-power, large, one))
        square = g.total((centred * unit).square()) / (count - ddof).clamp(min=1)
        return g._replace(
            low=low,
            high=high,
            equal=(low == high) & low.isfinite(),
            above=above,
            centred=centred,
            std=square.sqrt() / unit,
            mean_abs=g.total(rewards.abs()) / count,
        )

    def total(self, x: Tensor) -> Tensor:
        """``[B]``, the sum of ``x`` over the row's group."""
        return group_sums(x, self.number, self.order)

    def _place(self, rank: Tensor) -> Tensor:
        return (self.start + rank.long()).clamp(max=len(self.order) - 1)

    def ranked(self, rank: Tensor) -> Tensor:
        """The reward of rank ``rank`` of the row's group in ascending order, from 0 to count - 1."""
        return self.rewards.gather(0, self.order.gather(0, self._place(rank)))

    def is_first(self, rank: Tensor) -> Tensor:
        """1.0 where the row is the earliest of its group with the reward of that rank, else 0.0."""
        r, number = (x.gather(0, self.order) for x in (self.rewards, self.number))
        fresh = torch.ones_like(number, dtype=torch.bool)
        fresh[1:] = (r[1:] != r[:-1]) | (number[1:] != number[:-1])
        places = torch.arange(len(r), device=r.device)
        earliest = torch.where(fresh, places, 0).cummax(0).values if len(r) else places
        return (self.order.gather(0, earliest.gather(0, self._place(rank))) == places).to(r.dtype)


class _Statistics(NamedTuple):
    """Per row, in float64: ``numerator = gain * (reward - baseline)``, and derivatives in the row's own reward."""

    group: _Members
    scaled: _Members  # the group, or the batch: those whose rewards the scale depends on
    numerator: Tensor
    inv_scale: Tensor  # 1 / (scale + eps); 0 where the scale's rewards are equal; 1 for the scale "none"
    gain: Tensor
    weight: Tensor  # d baseline / d reward
    slope: Tensor  # d scale / d reward
    alone: Tensor  # rows whose advantage is their raw reward


def _statistics(a: AdvantagesArgs, live: Tensor) -> _Statistics:
    r = torch.where(live, a.rewards, 0).double()
    one, none = torch.ones_like(r), torch.zeros_like(r)
    nowhere = len(r)
    g = _Members.of(r, torch.where(live, numbered(a.groups), nowhere), a.ddof)
    gain, weight = one, none
    if a.baseline == "none":
        numerator = r
    elif a.baseline == "values":
        assert a.baseline_values is not None
        numerator = r - torch.where(live, a.baseline_values, 0)
    elif a.baseline in ("mean", "leave_one_out"):
        if a.baseline == "leave_one_out":
            gain = torch.where(g.count > 1, g.count / (g.count - 1), 0)
        numerator, weight = gain * g.centred, 1 / g.count
    elif a.baseline == "length_weighted":
        assert a.lengths is not None
        length = torch.where(live, a.lengths, 0).double()
        length = torch.where(g.total(length) == 0, 1, length)
        weight = length / g.total(length)
        numerator = g.above - g.total(weight * g.above)
    else:
        if a.baseline == "quantile":
            # In the precision of the rewards, as in torch.quantile.
            at = a.quantile * (g.count - 1).to(a.rewards.dtype)
            rank = at.floor()
            part = (at - rank).double()
        else:
            from_top = {"max": 1, "second_max": 2}.get(a.baseline)
            rank = ((g.count - 1) / 2).floor() if from_top is None else (g.count - from_top).clamp(min=0)
            part = none
        below = torch.where(g.high.isnan(), torch.nan, g.ranked(rank))
        above = torch.where(part > 0, g.ranked(rank + 1), below)
        # Interpolated from the difference: equal neighbours give exactly their value.
        numerator = r - below - torch.where(part > 0, part * (above - below), 0)
        weight = (1 - part) * g.is_first(rank) + part * g.is_first(rank + 1)
        weight = torch.where(g.high.isnan(), torch.nan, weight)  # a NaN has no rank
        if a.baseline == "second_max":
            # Only the best row has a non-zero advantage.
            gain = g.is_first(g.count - 1)
            numerator = gain * numerator

    scaled = _Members.of(r, torch.where(live, 0, nowhere), a.ddof) if a.scale == "batch_std" else g
    inv_scale, slope = one, none
    if a.scale != "none":
        size = {
            "std": g.std, "batch_std": scaled.std, "mean_abs": g.mean_abs, "range": g.high - g.low,
        }[a.scale]  # fmt: skip
        inv_scale = torch.where(scaled.equal, 0, 1 / (size + a.eps))
        if a.scale == "range":
            slope = g.is_first(g.count - 1) - g.is_first(none)
        elif a.scale == "mean_abs":
            slope = r.sign() / g.count
        else:
            freedom = (scaled.count - a.ddof).clamp(min=1)
            slope = torch.where(scaled.std == 0, 0, scaled.centred / (freedom * scaled.std))
    alone = live & (g.count == 1) if a.raw else torch.zeros_like(live)
    numerator = torch.where(alone, r, numerator)
    inv_scale, gain = (torch.where(alone, 1, x) for x in (inv_scale, gain))
    weight, slope = (torch.where(alone, 0, x) for x in (weight, slope))
    numerator, inv_scale = (torch.where(live, x, 0) for x in (numerator, inv_scale))
    return _Statistics(g, scaled, numerator, inv_scale, gain, weight, slope, alone)


def group_advantages(a: AdvantagesArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, per row or per token; and per row ``1 / scale`` and ``reward - baseline``."""
    s = _statistics(a, live_rows(a.rewards, a.mask, a.cu_seqlens))
    # Infinite rewards show: an infinite scale makes 0 of finite numerators only. 0.0: no negative zeros.
    advantages, inv_scale, numerator = (
        x.to(a.rewards.dtype) for x in (s.numerator * s.inv_scale + 0.0, s.inv_scale, s.numerator.clone())
    )
    if a.token_shape is not None:
        tokens = (
            torch.ones(a.token_shape, dtype=torch.bool, device=a.rewards.device) if a.mask is None else a.mask
        )
        _, valid = to_rows(tokens, a.mask, a.cu_seqlens)
        advantages = from_rows(torch.where(valid, advantages[:, None], 0), tokens.shape, a.cu_seqlens)
    return advantages, inv_scale, numerator


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
        up = torch.zeros_like(s.numerator)
    elif a.token_shape is None:
        up = grad.double()
    else:
        up = to_rows(grad, a.mask, a.cu_seqlens)[0].double().sum(1)
    on_inv_scale = up * numerator.double()
    if grad_inv_scale is not None:
        on_inv_scale = on_inv_scale + torch.where(live, grad_inv_scale, 0)
    on_scale = -(on_inv_scale * s.inv_scale) * s.inv_scale
    on_numerator = s.gain * (s.inv_scale * up)
    out = on_numerator - s.weight * s.group.total(on_numerator)
    if a.scale != "none":
        out = out + s.slope * s.scaled.total(torch.where(s.alone, 0, on_scale))
    out = torch.where(live, out, 0).to(a.rewards.dtype)
    if a.baseline_values is None:
        return out, out.new_empty(0)
    return out, torch.where(s.alone, 0, -s.inv_scale * up).to(a.rewards.dtype)
