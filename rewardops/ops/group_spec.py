"""Groups, baseline, scale and token layout of group advantages, validated; and the op called with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..core import checks
from ..core.checks import Number
from ..core.groups import GroupSize, Labels, group_ids
from ..core.rows import Layout
from ..core.settings import may_read
from ..reference.advantages import BASELINES, SCALES, AdvantagesArgs, live_rows
from .advantages import group_advantages
from .segments import row_counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupSpec(NamedTuple):
    """Validated arguments of :func:`group_advantages`: groups, baseline, scale, token layout. Launches nothing."""

    ids: Tensor
    rows: Layout | None
    baseline: str
    quantile: Number
    scale: str
    eps: Number
    ddof: int
    raw: bool
    lengths: Tensor | None
    baseline_values: Tensor | None
    contiguous: bool

    @staticmethod
    def of(
        rewards: Tensor,
        groups: Labels,
        *,
        group_size: object = None,
        baseline: str | float | Tensor = "mean",
        scale: str = "std",
        eps: float | Tensor = 1e-6,
        ddof: int = 1,
        singleton: str = "zero",
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_tokens: int | None = None,
        name: str = "rewards",
    ) -> GroupSpec:
        """Validate the arguments of a call with ``rewards`` ``[B]``, which errors name ``name``."""
        checks.check_rewards(rewards, name)
        ids = group_ids(groups, group_size, rewards.shape[0], rewards.device, name)
        kind, quantile, values = _baseline(baseline, rewards)
        added = check_group_scale(scale, eps, ddof)
        checks.check_choice("singleton", singleton, ("zero", "raw"))
        if singleton == "raw" and scale == "batch_std":
            raise ValueError("singleton: got 'raw' with scale='batch_std', want 'zero'")
        rows = checks.row_layout(rewards, mask, cu_seqlens, num_tokens, name)
        if kind == "length_weighted":
            _check_lengths(lengths, rows, ids, rewards)
        elif lengths is not None:
            raise ValueError(f"lengths: got a value with baseline={baseline!r}, want 'length_weighted'")
        return GroupSpec(
            ids, rows, kind, quantile, scale, added, ddof, singleton == "raw", lengths, values, groups is None
        )

    def weights(self) -> Tensor | None:
        """``[B]``, the lengths that weigh rewards in the baseline; None for other baselines."""
        if self.baseline != "length_weighted":
            return None
        if self.lengths is not None:
            return self.lengths.detach()
        assert self.rows is not None
        return row_counts(self.rows, self.ids.device)

    def live(self) -> Tensor:
        """``[B]``, rows that have a token; all rows where there are no tokens."""
        if self.rows is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return row_counts(self.rows, self.ids.device) > 0

    def by_row(self) -> GroupSpec:
        """These arguments for rows of one token, ``[B, 1]``, masked where the row has no token."""
        live = self.live()[:, None]
        rows = Layout(live.shape[0], tuple(live.shape), live, None)
        return self._replace(rows=rows, lengths=self.weights())

    def among(self, rows: Tensor) -> GroupSpec:
        """These arguments, :meth:`by_row`, with no row in any group but those of the mask ``rows`` ``[B]``."""
        assert self.rows is not None
        assert self.rows.mask is not None
        return self._replace(rows=self.rows._replace(mask=self.rows.mask & rows[:, None]))

    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages ``[B]``, or written to the tokens."""
        values = () if self.baseline_values is None else (self.baseline_values,)
        rewards, *values_wide = checks.promote(rewards, *values)
        dtype, weights, rows = rewards.dtype, self.weights(), self.rows
        if self.lengths is not None and self.lengths.dtype is torch.float64:
            # Lengths of any magnitude: in float32 small ones would be 0.
            rewards, *values_wide = (x.double() for x in (rewards, *values_wide))
        args = AdvantagesArgs(
            rewards,
            self.ids,
            values_wide[0] if values_wide else None,
            None if weights is None else weights.to(rewards.dtype),
            None if rows is None else rows.mask,
            None if rows is None else rows.cu_seqlens,
            -1 if rows is None or rows.cu_seqlens is None else rows.shape[0],
            self.baseline,
            self.quantile,
            self.scale,
            self.eps,
            self.ddof,
            self.raw,
            self.contiguous,
        )
        out: Tensor = group_advantages(*args)[0]
        return out if out.dtype is dtype else out.to(dtype)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Per-row values ``[B]`` unchanged, or written to the tokens of their rows."""
        if self.rows is None:
            return values
        # Every row is a group of its own: the kernel writes the tokens in its only pass.
        alone = torch.arange(values.shape[0], device=values.device)
        return self._replace(
            ids=alone, baseline="none", scale="none", raw=False, lengths=None, baseline_values=None,
            contiguous=True,
        ).advantages(values)  # fmt: skip


# ---- arguments ---------------------------------------------------------------------------------------------


def check_group_scale(scale: str, eps: float | Tensor, ddof: int) -> Number:
    """The validated eps."""
    checks.check_choice("scale", scale, SCALES)
    return checks.check_eps_ddof(eps, ddof)


def _baseline(baseline: str | float | Tensor, rewards: Tensor) -> tuple[str, Number, Tensor | None]:
    """Validate a baseline: its name, quantile and values."""
    if isinstance(baseline, Tensor) and baseline.dim():
        checks.check_float("baseline", _per_row("baseline", baseline, rewards))
        return "values", 0.0, baseline
    if isinstance(baseline, (int, float, Tensor)) and not isinstance(baseline, bool):
        want = "a quantile from 0 to 1, a name or a tensor"
        quantile = checks.check_number("baseline", baseline, want)
        if not (isinstance(quantile, Tensor) or 0 <= quantile <= 1):
            raise ValueError(f"baseline: got {baseline}, want {want}")
        return "quantile", quantile, None
    checks.check_choice("baseline", baseline, [b for b in BASELINES if b not in ("quantile", "values")])
    return str(baseline), 0.0, None


def _per_row(name: str, value: object, rewards: Tensor) -> Tensor:
    tensor = checks.check_tensor(name, value)
    checks.check_shape(name, tensor, rewards.shape, "one per row of rewards")
    checks.check_device(name, tensor, rewards.device, "rewards")
    return tensor


def _check_lengths(lengths: Tensor | None, rows: Layout | None, ids: Tensor, rewards: Tensor) -> None:
    if lengths is None:
        if rows is None:
            raise ValueError("lengths: got None without a mask or cu_seqlens, want the length of every row")
        return
    lengths = _per_row("lengths", lengths, rewards)
    if lengths.dtype not in (*checks.INTEGERS, *checks.FLOATS):
        raise TypeError(f"lengths: got dtype {lengths.dtype}, want integer or float")
    if not may_read(lengths):
        return
    bad = ~((lengths >= 0) & (lengths < torch.inf))
    if rows is not None and bool(bad.any()):
        # Not by an op: none runs before all arguments are checked.
        bad = bad & live_rows(ids, rows.mask, rows.cu_seqlens)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"lengths: got {lengths[row].item()} at row {row}, want finite numbers of at least 0"
        )


# ---- options of the presets --------------------------------------------------------------------------------


class RowOptions(TypedDict, total=False):
    """Options of :func:`group_advantages` that every preset takes."""

    group_size: GroupSize
    eps: float | Tensor
    ddof: int
    singleton: str


class GroupOptions(RowOptions, total=False):
    """Options of :func:`group_advantages` for the baseline and the scale."""

    baseline: str | float | Tensor
    scale: str
    lengths: Tensor | None


class PlaceOptions(TypedDict, total=False):
    """Options of :func:`group_advantages` for weights, the layout of the tokens, and ranks."""

    weights: Sequence[float] | Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    num_tokens: int | None
    process_group: ProcessGroup | None
    max_per_rank: int | None


class FixedOptions(RowOptions, PlaceOptions, total=False):
    """Options of presets that fix both the baseline and the scale."""


class BaselineOptions(FixedOptions, total=False):
    """Options of presets that fix the scale."""

    baseline: str | float | Tensor
    lengths: Tensor | None


class AllOptions(GroupOptions, PlaceOptions, total=False):
    """All options of :func:`group_advantages`."""


class ReinforceOptions(TypedDict, total=False):
    """Options of :func:`dr_grpo` that REINFORCE++-baseline passes on."""

    group_size: GroupSize
    singleton: str
    baseline: str | float | Tensor
    lengths: Tensor | None
    weights: Sequence[float] | Tensor | None
    max_per_rank: int | None


class EntropyOptions(TypedDict, total=False):
    """Options that GTPO and GRPO-S share."""

    entropy_floor: float
    entropy_grad: bool


class GtpoOptions(EntropyOptions, total=False):
    """Options of GTPO."""

    alpha1: float
    alpha2: float


class GrpoSOptions(EntropyOptions, total=False):
    """Options of GRPO-S."""

    beta1: float
    beta2: float
    positive: float | None
