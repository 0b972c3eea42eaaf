"""Selection: masks of exactly a fraction of the tokens of a batch, a row or a group, without a sort."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .core import checks, distributed
from .core.checks import Number
from .core.groups import GroupSize, Labels, group_ids, numbered
from .core.rows import Layout
from .ops import selection as ops
from .segments import TokenValues

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["clip_cov_mask", "high_entropy_mask", "kl_cov_mask"]

SCOPES = ("batch", "row", "group")


def high_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | Tensor = 0.2,
    scope: str = "batch",
    groups: Labels = None,
    group_size: GroupSize = None,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    max_per_rank: int | None = None,
) -> Tensor:
    """The tokens of highest entropy ("80/20", 2506.01939): exactly a fraction of the valid ones.

    ``round(fraction * count)`` tokens, at least one, of the batch, of every row, or of every group; among equal
    entropies the earliest. The papers' codes threshold at a quantile, which keeps all ties and fails beyond 2^24
    tokens. There the loss's denominator remains all valid tokens, and a KL term covers all tokens.

    Args:
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64, in nats.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        fraction: 0 to 1.
        scope: ``"batch"``, ``"row"`` or ``"group"`` (with ``groups`` or ``group_size``).
        groups: ``[B]``: labels of the rows' groups, as in :func:`rewardops.group_advantages`; for
            ``scope="group"`` alone.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        process_group: batch and groups span the tokens of all its ranks; each rank gets the mask of its own
            tokens; among equal entropies the earliest, by rank. Labels as in
            :func:`rewardops.group_advantages`; not with ``group_size``. One collective, of the entropies. None
            for this process alone.
        max_per_rank: with a process group, an upper bound of the tokens per rank (padding included). Without it
            the ranks exchange their numbers of tokens first, and the host reads them.

    Returns:
        bool, the layout of ``entropy``. Nothing is read back from the device. Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown scope, groups that are missing or not
            asked for, a fraction out of its range, more tokens than ``max_per_rank``.

    Example:
        >>> entropy, mask = torch.tensor([[0.1, 2.0, 0.3, 9.0], [1.5, 0.2, 0.4, 0.5]]), torch.ones(2, 4)
        >>> mask[0, 3] = 0
        >>> ro.high_entropy_mask(entropy, mask, fraction=0.25).int().tolist()  # 2 of 7
        [[0, 1, 0, 0], [1, 0, 0, 0]]
    """
    tokens = TokenValues.of("entropy", entropy, mask, cu_seqlens)
    fraction = checks.check_fraction("fraction", fraction)
    ranks = distributed.Ranks.of(process_group, max_per_rank)
    if ranks is not None and group_size is not None:
        raise ValueError(f"group_size: got {group_size!r} with process_group, want groups")
    if ranks is not None and scope != "row":
        check_scope(scope, groups, None, "scope")
        return _high_entropy_over_ranks(tokens, fraction, scope, groups, ranks)
    check_scope(scope, groups, group_size, "scope")
    one = scope == "batch"
    ids = None if one else scope_of_rows(scope, groups, group_size, tokens.rows.batch, entropy.device)
    return largest(tokens.values, tokens.rows, ids, fraction)


def clip_cov_mask(
    cov: Tensor,
    mask: Tensor | None = None,
    *,
    low: float | Tensor = 1.0,
    high: float | Tensor = 5.0,
    fraction: float | Tensor = 2e-4,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Clip-Cov (2505.22617): a random ``fraction`` of the valid tokens, out of those with ``low < cov < high``.

    At least one, if there are any. The caller drops their gradient. ``mask`` may leave out tokens that PPO has
    clipped already, as the authors do.

    Args:
        cov: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, as from :func:`rewardops.advantage_logprob_cov`;
            float32, bfloat16, float16 or float64.
        mask: the shape of ``cov``; bool, integer or float 0/1. None for all tokens.
        low: tokens at or below it are not chosen.
        high: tokens at or above it are not chosen.
        fraction: 0 to 1, of the valid tokens.
        generator: on the device of ``cov``; None for torch's default.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        bool, the layout of ``cov``. Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a number out of its range.

    Example:
        >>> cov = torch.tensor([[0.5, 2.0, 7.0, 3.0]])
        >>> ro.clip_cov_mask(cov, fraction=0.5).int().tolist()  # 2 of 4 tokens, of those from 1 to 5
        [[0, 1, 0, 1]]
    """
    tokens = TokenValues.of("cov", cov, mask, cu_seqlens)
    low = checks.check_number("low", low)
    high = checks.check_number("high", high)
    fraction = checks.check_fraction("fraction", fraction)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, want a torch.Generator")
    draw = torch.rand(cov.shape, generator=generator, dtype=torch.float32, device=cov.device)
    draw = draw.to(tokens.values.dtype)
    return largest(draw, tokens.rows, None, fraction, nearest=False, band=tokens.values, low=low, high=high)


def kl_cov_mask(
    cov: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float | Tensor = 2e-4,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """KL-Cov (2505.22617): the ``fraction`` of the valid tokens with the largest ``cov``, at least one.

    The caller adds a KL penalty towards the sampling policy there; it has no gradient at the on-policy point.

    Args:
        cov: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, as from :func:`rewardops.advantage_logprob_cov`;
            float32, bfloat16, float16 or float64.
        mask: the shape of ``cov``; bool, integer or float 0/1. None for all tokens.
        fraction: 0 to 1, of the valid tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        bool, the layout of ``cov``. Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a fraction out of its range.

    Example:
        >>> ro.kl_cov_mask(torch.tensor([[0.5, 2.0, 7.0, 3.0]]), fraction=0.5).int().tolist()
        [[0, 0, 1, 1]]
    """
    tokens = TokenValues.of("cov", cov, mask, cu_seqlens)
    fraction = checks.check_fraction("fraction", fraction)
    return largest(tokens.values, tokens.rows, None, fraction, nearest=False)


# ---- scopes ------------------------------------------------------------------------------------------------


def check_scope(scope: str, groups: Labels, group_size: GroupSize, name: str) -> None:
    checks.check_choice(name, scope, SCOPES)
    if scope != "group" and (groups is not None or group_size is not None):
        argument = "group_size" if groups is None else "groups"
        raise ValueError(f"{argument}: got a value with {name}={scope!r}, want {name}='group'")


def scope_of_rows(
    scope: str,
    groups: Labels,
    group_size: GroupSize,
    batch: int,
    device: torch.device,
    name: str = "scope",
) -> Tensor:
    check_scope(scope, groups, group_size, name)
    labels = None
    if scope == "group":
        labels = group_ids(groups, group_size, batch, device, "entropy")
    return scope_ids(scope, labels, batch, device)


def scope_ids(scope: str, groups: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """``[B]``, the index of each row's scope, in 0 .. B - 1."""
    if scope == "row":
        return torch.arange(batch, dtype=torch.int64, device=device)
    if scope == "batch":
        return torch.zeros(batch, dtype=torch.int64, device=device)
    assert groups is not None
    return numbered(groups)


def scope_counts(counts: Tensor, ids: Tensor) -> Tensor:
    """``[B]`` int64, at the index of each scope: the sum of its rows' counts."""
    return ids.new_zeros(ids.shape).index_add(0, ids, counts.to(torch.int64))


# ---- the selection -----------------------------------------------------------------------------------------


def largest(
    values: Tensor,
    rows: Layout,
    ids: Tensor | None,
    fraction: Number,
    nearest: bool = True,
    band: Tensor | None = None,
    low: Number = 0.0,
    high: Number = 0.0,
) -> Tensor:
    """A mask of a fraction of the valid tokens of each scope: the largest; among equal values the earliest.

    By selection over the bit patterns of the numbers: integers throughout, so exact, deterministic, of any size,
    and nothing is read back. The arguments are those of :class:`.reference.selection.LargestArgs`.
    """
    out: Tensor = ops.largest(
        values.detach(), rows.mask, band, rows.cu_seqlens, ids, fraction, nearest, low, high
    )
    return out


def _high_entropy_over_ranks(
    tokens: TokenValues,
    fraction: Number,
    scope: str,
    groups: Labels,
    ranks: distributed.Ranks,
) -> Tensor:
    """Batch or group scope across ranks: gathered tokens are treated as rows of length 1."""
    rows, device = tokens.rows, tokens.values.device
    parts = [tokens.values.reshape(-1), tokens.valid().reshape(-1)]
    if scope == "group":
        ids = distributed.own_labels(groups, None, rows.batch, device, "entropy")
        parts.append(rows.expand(ids).reshape(-1))
    gathered = distributed.gather(parts, ranks.process_group, ranks.max_per_rank)
    values, valid, *labels = gathered.tensors
    count = values.shape[0]
    if labels:
        everything = Layout(count, (count, 1), valid[:, None], None)
        scopes: Tensor | None = scope_ids("group", labels[0], count, device)
    else:
        everything = Layout(1, (1, count), valid[None, :], None)
        scopes = None
    chosen = largest(values.view(everything.shape), everything, scopes, fraction)
    return gathered.own(chosen.view(-1)).view(rows.shape)
