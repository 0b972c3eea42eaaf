"""Hypothesis strategies for the inputs of the ops: ragged rows, rewards, groups, steps, tokens, logits.

Sizes, kinds and a seed are drawn; tensors follow from them on the CPU. A failing example therefore shrinks to few
rows, few tokens and the plainest kind. Masked values are NaN, infinite or arbitrary, as they must not matter.
Only this module needs hypothesis, so ``import`` it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .inputs import LOGITS, adversarial_logits, pack, random_groups, random_mask, shared_prefix_tokens

__all__ = [
    "Rows", "dtypes", "generators", "groups", "logits", "mask_forms", "masks", "numbers", "rewards", "rows",
    "sizes", "steps", "tokens",
]  # fmt: skip

Draw = Callable[[st.SearchStrategy[Any]], Any]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16)


def generators() -> st.SearchStrategy[torch.Generator]:
    """Random generators on the CPU, drawn by seed.

    Returns:
        A strategy of ``torch.Generator``.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.generators(), lambda generator: True).initial_seed()
        0
    """
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator("cpu").manual_seed(seed))


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Floating-point dtypes: float32 first, then bfloat16, float16 and float64.

    Returns:
        A strategy of ``torch.dtype``.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.dtypes(), lambda dtype: dtype.itemsize == 2)
        torch.bfloat16
    """
    return st.sampled_from(FLOATS)


def sizes(most: int) -> st.SearchStrategy[int]:
    """Sizes from 0 to a bound: small ones, and neighbours of register and block widths.

    Args:
        most: the largest size.

    Returns:
        A strategy of int.

    Raises:
        hypothesis.errors.InvalidArgument: a negative bound, as an example is drawn.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.sizes(40), lambda n: n > 20)
        31
    """
    edges = [n for p in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) for n in (p - 1, p, p + 1)]
    near = [n for n in edges if 9 <= n <= most]
    small = st.integers(0, min(9, most))
    return small | st.sampled_from(near) if near else small


# ---- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, padded to ``[B, width]`` or packed to ``[N]``, with a mask or without.

    Attributes:
        lengths: ``[B]`` int64; all equal to ``width`` for padded rows.
        width: tokens of the longest row that was possible.
        mask: bool, ``[B, width]`` or ``[N]``; it may have holes, and rows without a valid token. None: every
            token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64; None for padded rows.
    """

    lengths: Tensor
    width: int
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def batch(self) -> int:
        """Number of rows, B."""
        return len(self.lengths)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a per-token tensor."""
        return (self.batch, self.width) if self.cu_seqlens is None else (int(self.lengths.sum()),)

    @property
    def valid(self) -> Tensor:
        """The mask, all True if there is none."""
        return torch.ones(self.shape, dtype=torch.bool, device="cpu") if self.mask is None else self.mask

    @property
    def live(self) -> Tensor:
        """``[B]``, True for rows with a valid token."""
        if self.cu_seqlens is None:
            return self.valid.any(1)
        row = torch.repeat_interleave(self.lengths)
        return torch.bincount(row, self.valid.double(), minlength=self.batch) > 0

    def take(self, padded: Tensor) -> Tensor:
        """Values ``[B, width, ...]`` in the layout of these rows.

        Args:
            padded: ``[B, width, ...]``, any dtype.

        Returns:
            ``padded``, or its rows packed to ``[N, ...]``.

        Example:
            >>> from rewardops.testing.strategies import Rows
            >>> rows = Rows(torch.tensor([2, 1]), 2, None, torch.tensor([0, 2, 3]))
            >>> rows.take(torch.tensor([[1, 2], [3, 0]])).tolist()
            [1, 2, 3]
        """
        return padded if self.cu_seqlens is None else pack(padded, self.lengths)[0]


MASKS = ("all", "ragged", "holes", "left-padded", "one token a row", "none")


def masks(batch: int, width: int) -> st.SearchStrategy[Tensor]:
    """Bool masks: ragged at either end, with holes, with empty rows, all or none valid.

    Args:
        batch: B, rows.
        width: T, tokens of a row.

    Returns:
        A strategy of masks ``[batch, width]``, bool.

    Raises:
        RuntimeError: a negative size, as an example is drawn.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.masks(2, 3), lambda mask: not mask.any()).tolist()
        [[False, False, False], [False, False, False]]
    """
    return st.builds(_mask, st.sampled_from(MASKS), st.just(batch), st.just(width), generators())


def _mask(kind: str, batch: int, width: int, generator: torch.Generator) -> Tensor:
    if kind in ("all", "none"):
        return torch.full((batch, width), kind == "all", dtype=torch.bool, device="cpu")
    if kind == "one token a row":
        mask = torch.zeros(batch, width, dtype=torch.bool, device="cpu")
        one = (batch, min(width, 1))
        return mask.scatter_(1, torch.randint(0, max(width, 1), one, generator=generator, device="cpu"), True)
    mask = random_mask(batch, width, generator, holes=kind == "holes")
    return mask.flip(1) if kind == "left-padded" else mask


@st.composite
def rows(
    draw: Draw,
    *,
    max_batch: int = 6,
    max_width: int = 17,
    packed: bool | None = None,
    masked: bool | None = None,
) -> Rows:
    """Rows in either layout, with or without a mask; also no rows, and rows without tokens.

    Args:
        max_batch: the most rows.
        max_width: the most tokens of a row.
        packed: True or False for one layout; None draws either.
        masked: True or False for a mask or none; None draws either.

    Returns:
        A strategy of :class:`Rows`.

    Raises:
        hypothesis.errors.InvalidArgument: a negative bound, as an example is drawn.

    Example:
        >>> from hypothesis import given
        >>> from rewardops.testing import strategies as some
        >>> @given(some.rows())
        ... def sums_have_a_number_per_row(rows):
        ...     out = ro.row_sum(torch.ones(rows.shape), mask=rows.mask, cu_seqlens=rows.cu_seqlens)
        ...     assert out.shape == (rows.batch,)
        >>> sums_have_a_number_per_row()
    """
    batch, width = draw(st.integers(0, max_batch)), draw(sizes(max_width))
    packed = draw(st.booleans()) if packed is None else packed
    masked = draw(st.booleans()) if masked is None else masked
    mask = draw(masks(batch, width)) if masked else None
    lengths = torch.full((batch,), width, dtype=torch.int64, device="cpu")
    if not packed:
        return Rows(lengths, width, mask, None)
    if draw(st.booleans()):
        # Ragged rows, some empty.
        lengths = draw(
            generators().map(
                lambda g: torch.randint(-1, width + 1, (batch,), generator=g, device="cpu").clamp(min=0)
            )
        )
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    cu = offsets.to(draw(st.sampled_from((torch.int32, torch.int64))))
    return Rows(lengths, width, None if mask is None else pack(mask, lengths)[0], cu)


def mask_forms(mask: Tensor) -> st.SearchStrategy[Tensor]:
    """The same mask as bool, integers or floats.

    Args:
        mask: bool, any shape.

    Returns:
        A strategy of masks of that shape, of bool, int64, uint8, float32 or bfloat16.

    Raises:
        AttributeError: a mask that is no tensor.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> mask = torch.tensor([[True, False]])
        >>> find(some.mask_forms(mask), lambda mask: mask.is_floating_point()).tolist()
        [[1.0, 0.0]]
    """
    forms = (torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16)
    return st.sampled_from(forms).map(mask.to)


# ---- what rows hold ----------------------------------------------------------------------------------------

REWARDS = ("normal", "zero or one", "equal", "quarters", "far from zero", "outlier", "tiny", "zero")


def rewards(
    batch: int, *, channels: int | None = None, dtype: torch.dtype = torch.float32
) -> st.SearchStrategy[Tensor]:
    """Rewards: with ties, all equal, close together far from 0, with an outlier.

    Args:
        batch: B, rows.
        channels: R for rewards ``[batch, R]``; None for ``[batch]``.
        dtype: of the rewards.

    Returns:
        A strategy of rewards, of the kinds ``REWARDS``.

    Raises:
        RuntimeError: a negative size, as an example is drawn.

    Example:
        >>> from hypothesis import given
        >>> from rewardops.testing import strategies as some
        >>> @given(some.rewards(4))
        ... def advantages_have_no_mean(rewards):
        ...     assert ro.group_advantages(rewards, group_size=4).mean().abs() < 1e-3
        >>> advantages_have_no_mean()
    """
    shape = (batch,) if channels is None else (batch, channels)
    return numbers(shape, REWARDS, dtype=dtype)


def numbers(
    shape: Sequence[int], kinds: Sequence[str] = REWARDS, *, dtype: torch.dtype = torch.float32
) -> st.SearchStrategy[Tensor]:
    """Numbers of any shape, of kinds that are difficult for sums and quotients.

    Args:
        shape: of the numbers.
        kinds: out of ``REWARDS`` and ``("positive", "fraction", "log-probability")``; one is drawn for all
            numbers.
        dtype: of the numbers.

    Returns:
        A strategy of tensors ``[*shape]``.

    Raises:
        ValueError: an unknown kind, as an example is drawn.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.numbers((2, 2), kinds=["equal", "zero"]), lambda x: bool((x == 0).all())).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    return st.builds(_numbers, st.sampled_from(kinds), st.just(tuple(shape)), st.just(dtype), generators())


def _numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if kind == "zero or one":
        x = (x > 0).float()
    elif kind == "equal":
        x = torch.full(shape, 0.7, dtype=torch.float32, device="cpu")
    elif kind == "zero":
        x = torch.zeros(shape, dtype=torch.float32, device="cpu")
    elif kind == "quarters":  # ties, and sums that are exact
        x = (x * 4).round() / 4
    elif kind == "far from zero":
        x = x + 1e3
    elif kind == "outlier":
        x.view(-1)[:1] = 1e4
    elif kind == "tiny":
        x = x * (1e-3 if dtype is torch.float16 else 1e-6)
    elif kind == "positive":
        x = x.abs() + 2**-6
    elif kind == "fraction":
        x = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    elif kind == "log-probability":
        x = -(x.square())
    elif kind != "normal":
        raise ValueError(
            f"kinds: got {kind!r}, want one of {REWARDS}, 'positive', 'fraction', 'log-probability'"
        )
    return x.to(dtype)


GROUPS = ("random", "contiguous", "one", "alone")


def groups(batch: int) -> st.SearchStrategy[Tensor]:
    """Group labels: ragged and in any order, one group, or as many as rows.

    Args:
        batch: B, rows.

    Returns:
        A strategy of labels ``[batch]``, int64, int32 or int16.

    Raises:
        RuntimeError: a negative size, as an example is drawn.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> one_group = find(some.groups(4), lambda labels: len(labels.unique()) == 1)
        >>> one_group.shape
        torch.Size([4])
    """
    return st.builds(
        _groups, st.sampled_from(GROUPS), st.just(batch), st.sampled_from(INTEGERS), generators()
    )


def _groups(kind: str, batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if kind == "random":
        # int64 keeps labels beyond 32 bits, which a narrower comparison would confuse.
        labels = random_groups(batch, generator)
        return labels if dtype is torch.int64 else (labels % 9973).to(dtype)
    if kind == "alone":
        return torch.randperm(batch, generator=generator, device="cpu").to(dtype)
    return (
        torch.arange(batch, dtype=torch.int64, device="cpu")
        .div(batch if kind == "one" else 3, rounding_mode="floor")
        .to(dtype)
    )


STEPS = ("flags", "every token", "no flag", "ids", "ids with gaps", "one step", "of no step")


def steps(layout: Rows, *, kinds: Sequence[str] = STEPS) -> st.SearchStrategy[Tensor]:
    """Steps of rows: flags of step ends (bool), or step ids.

    Step ids are integers that do not decrease along a row, negative for no step.

    Args:
        layout: the rows.
        kinds: out of ``STEPS``; one is drawn for all rows.

    Returns:
        A strategy of tensors of the shape of the rows' tokens.

    Raises:
        AttributeError: a layout that is no :class:`Rows`.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> layout = some.Rows(torch.tensor([3]), 3, None, None)
        >>> find(some.steps(layout, kinds=["every token", "no flag"]), lambda ends: True).tolist()
        [[True, True, True]]
    """
    return st.builds(_steps, st.sampled_from(kinds), st.just(layout), st.sampled_from(INTEGERS), generators())


def _steps(kind: str, layout: Rows, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = (layout.batch, layout.width)
    ends = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.3
    if kind in ("flags", "every token", "no flag"):
        flags = (
            ends
            if kind == "flags"
            else torch.full(shape, kind == "every token", dtype=torch.bool, device="cpu")
        )
        return layout.take(flags)
    ids = (ends.cumsum(1) - ends.long()).clamp(max=1000)
    if kind == "ids with gaps":
        ids = torch.where(
            torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.2, -1, 3 * ids
        )
    elif kind == "one step":
        ids = torch.zeros(shape, dtype=torch.int64, device="cpu")
    elif kind == "of no step":
        ids = torch.full(shape, -1, dtype=torch.int64, device="cpu")
    values = layout.take(ids).to(dtype)
    anything = torch.randint(-9, 9, layout.shape, generator=generator, device="cpu").to(dtype)
    return torch.where(layout.valid, values, anything)


TOKENS = ("shared prefixes", "equal", "different")


def tokens(layout: Rows, labels: Tensor, *, vocab: int = 3) -> st.SearchStrategy[Tensor]:
    """Token ids whose rows branch off one another at random depths within their group.

    Or all equal, or none.

    Args:
        layout: the rows.
        labels: ``[B]``, integer, the group of each row.
        vocab: ids of branching rows run from 0 to ``vocab - 1``.

    Returns:
        A strategy of tensors of the shape of the rows' tokens, int64, int32 or int16.

    Raises:
        AttributeError: a layout that is no :class:`Rows`.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> layout = some.Rows(torch.tensor([2, 2]), 2, None, None)
        >>> find(some.tokens(layout, torch.tensor([0, 0])), lambda ids: int(ids.max()) == 3).tolist()
        [[0, 1], [2, 3]]
    """
    return st.builds(
        _tokens,
        st.sampled_from(TOKENS),
        st.just(layout),
        st.just(labels),
        st.just(vocab),
        st.sampled_from(INTEGERS),
        generators(),
    )


def _tokens(
    kind: str, layout: Rows, labels: Tensor, vocab: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if kind == "shared prefixes":
        padded = shared_prefix_tokens(labels, layout.width, generator, vocab=vocab)
    elif kind == "equal":
        padded = torch.zeros((layout.batch, layout.width), dtype=torch.int64, device="cpu")
    else:
        padded = torch.arange(layout.batch * layout.width, dtype=torch.int64, device="cpu").reshape(
            layout.batch, layout.width
        )
    return layout.take(padded).to(dtype)


# ---- logits ------------------------------------------------------------------------------------------------

LOGIT_KINDS = (*LOGITS, "denormal", "mixed")


def logits(
    shape: Sequence[int], vocab: int, *, dtype: torch.dtype = torch.float32
) -> st.SearchStrategy[Tensor]:
    """Logits of a kind of ``LOGITS``, denormal, or of a different kind per row.

    Every row has a finite logit; no logit is NaN.

    Args:
        shape: of the tokens.
        vocab: V, columns, at least 1.
        dtype: of the logits.

    Returns:
        A strategy of logits ``[*shape, vocab]``.

    Raises:
        RuntimeError: no column, as an example is drawn.

    Example:
        >>> from hypothesis import find
        >>> from rewardops.testing import strategies as some
        >>> find(some.logits((2,), 5), lambda x: bool(x.isinf().any())).isfinite().any(-1).tolist()
        [True, True]
    """
    return st.builds(
        _logits,
        st.sampled_from(LOGIT_KINDS),
        st.just(tuple(shape)),
        st.just(vocab),
        st.just(dtype),
        generators(),
    )


def _logits(
    kind: str, shape: tuple[int, ...], vocab: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    count = int(torch.Size(shape).numel())
    if kind == "denormal":
        least = torch.finfo(torch.float16 if dtype is torch.float16 else torch.float32).tiny / 10
        x = torch.randn(count, vocab, generator=generator, dtype=torch.float64, device="cpu") * least
    elif kind == "mixed":
        each = [adversarial_logits(k, count, vocab, generator) for k in LOGITS]
        x = torch.stack([each[i % len(each)][i] for i in range(count)]) if count else each[0]
    else:
        x = adversarial_logits(kind, count, vocab, generator)
    return x.reshape(*shape, vocab).to(dtype)
