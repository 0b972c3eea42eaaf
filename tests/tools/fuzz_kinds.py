"""Kinds of arguments: strategies for valid values, and lists of invalid values.

A kind draws a value given the arguments drawn so far, and lists invalid values for a complete call. Tensors come
from :mod:`rewardops.testing.strategies`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rewardops.reference.logits import OUTPUTS, REF_OUTPUTS
from rewardops.testing import strategies as some

Bad = Iterator[tuple[str, Any]]

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sizes and layout shared by the arguments of a call."""

    rows: some.Rows
    labels: Tensor
    dtype: torch.dtype
    vocab: int

    @property
    def size(self) -> int:
        return self.rows.batch


class Call(Protocol):
    """A function and the arguments drawn so far."""

    batch: Batch
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """An argument, or ABSENT."""

    def setting(self, name: str) -> Any:
        """An argument of the call, or one that the preset fixes for its function, or ABSENT."""

    def takes(self, name: str) -> bool: ...

    def kind(self, name: str) -> Kind: ...


Make = Callable[[Call], "st.SearchStrategy[Any] | None"]
When = Callable[[Call], bool]


def always(call: Call) -> bool:
    return True


def never(call: Call) -> bool:
    return False


# ---- what no argument is -----------------------------------------------------------------------------------

STRANGERS = {
    "None": None,
    "a string": "x",
    "an object": object(),
    "a number": 0.5,
    "a whole number": 3,
    "a flag": True,
    "complex": 1j,
    "NaN": math.nan,
    "a list": [0.5],
    "a tensor": torch.full((3,), 0.5),
}


def strangers(*but: str) -> Bad:
    """Values of all types except some."""
    assert set(but) <= set(STRANGERS)
    return ((what, value) for what, value in STRANGERS.items() if what not in but)


def longer(x: Tensor, dim: int = 0) -> Tensor:
    """Append zeros of length 1 along a dimension."""
    return x.new_zeros([n + (k == dim % max(x.dim(), 1)) for k, n in enumerate(x.shape)] if x.dim() else 3)


def first_as(x: Tensor, number: float) -> Tensor:
    """A copy with the first element replaced."""
    copy = x.clone()
    copy.view(-1)[:1] = number
    return copy


class Kind:
    """A kind of argument."""

    per_token = False  # a value per token: NaN where masked, without gradient
    joined = True  # its shape follows from other arguments, not the reverse

    def draw(self, draw: some.Draw, call: Call, needed: bool) -> Any:
        """A valid value, or ABSENT."""
        raise NotImplementedError

    def wrong(self, call: Call, value: Any, needed: bool) -> Bad:
        """Pairs (name, value): values in place of ``value`` (which may be ABSENT) that make the call invalid."""
        raise NotImplementedError


class Made(Kind):
    """An argument by two functions: ``make`` draws it, or None to omit it; ``bad`` lists invalid values."""

    def __init__(self, make: Make, bad: Callable[[Call, Any], Bad], *, must: When = never) -> None:
        self.make, self.bad, self.must = make, bad, must

    def draw(self, draw, call, needed):
        strategy = self.make(call)
        if strategy is None or not (needed or self.must(call) or draw(st.booleans())):
            return ABSENT
        return draw(strategy)

    def wrong(self, call, value, needed):
        yield from self.bad(call, value)


# ---- tensors -----------------------------------------------------------------------------------------------


class Array(Made):
    """A tensor.

    Args:
        dtypes: "float", "integer", or "real" for either.
        joined: True if its shape follows from other arguments; else theirs follow from it.
        longer_in: the dimension that must not be longer.
        any_rank: True if any rank is valid when no other argument is joined to it.
        also: values of other types that are valid. must: True for calls that require it, if ``make`` returns one.
    """

    def __init__(
        self,
        make: Make,
        *,
        dtypes: str = "float",
        joined: bool = True,
        longer_in: int = 0,
        any_rank: bool = False,
        per_token: bool = False,
        also: Sequence[str] = (),
        must: When = never,
    ) -> None:
        super().__init__(make, lambda call, value: iter(()), must=must)
        self.dtypes, self.joined, self.longer_in = dtypes, joined, longer_in
        self.any_rank, self.per_token, self.also = any_rank, per_token, also

    def wrong(self, call, value, needed):
        yield from strangers(*self.also, *([] if needed or self.must(call) else ["None"]), "a tensor")
        if not isinstance(value, Tensor):
            return
        yield "of complex numbers", torch.zeros(value.shape, dtype=torch.complex64)
        if self.dtypes == "float":
            yield "of integers", torch.zeros(value.shape, dtype=torch.int64)
        elif self.dtypes == "integer":
            yield "of floats", value.float()
        if self.joined or self.is_joined_to(call):
            yield "one more", longer(value, self.longer_in)
            yield "another rank", value[None]
            yield "another device", value.to("meta")
        elif not self.any_rank:
            yield "no dimensions", value.new_zeros(())
            yield "five dimensions", value.new_zeros((1,) * 5)

    def is_joined_to(self, call: Call) -> bool:
        """True if the shape of another argument of the call follows from this one's."""
        kinds = (call.kind(k) for k, v in call.arguments.items() if isinstance(v, Tensor))
        return any(kind.joined for kind in kinds if isinstance(kind, (Array, Mask, Offsets, Labels)))


def per_token(*kinds: str, **options: Any) -> Array:
    """Per-token numbers of some kinds, NaN where masked."""

    def make(call):
        rows = call.batch.rows
        plain = some.numbers(rows.shape, kinds or some.REWARDS, dtype=call.batch.dtype)
        return plain.map(lambda x: torch.where(rows.valid, x, torch.nan))

    return Array(make, per_token=True, **options)


def per_row(*kinds: str, **options: Any) -> Array:
    """Per-row numbers of some kinds, NaN for rows without a token."""

    def make(call):
        plain = some.numbers((call.batch.size,), kinds or some.REWARDS, dtype=call.batch.dtype)
        return plain.map(lambda x: dead_as_nan(call, x))

    return Array(make, **options)


def dead_as_nan(call: Call, x: Tensor) -> Tensor:
    rows = call.batch.rows
    if not call.takes("mask") or (rows.mask is None and rows.cu_seqlens is None):
        return x
    return torch.where(rows.live.view(-1, *[1] * (x.dim() - 1)), x, torch.nan)


class Rewards(Array):
    """One per row, or several; ``channels`` is "never", "maybe" or "always"."""

    def __init__(self, channels: str = "never", joined: bool = True) -> None:
        super().__init__(self._rewards, joined=joined)
        self.channels = channels

    def _rewards(self, call: Call) -> st.SearchStrategy[Tensor]:
        several = st.integers(0, 3)
        channels = {"never": st.none(), "maybe": st.none() | several, "always": several}[self.channels]
        strategy = channels.flatmap(
            lambda c: some.rewards(call.batch.size, channels=c, dtype=call.batch.dtype)
        )
        return strategy.map(lambda x: dead_as_nan(call, x))

    def wrong(self, call, value, needed):
        for what, bad in super().wrong(call, value, needed):
            if what == "another rank" and self.channels != "never":
                bad = bad[..., None, None]
            yield what, bad


# ---- layouts and groups ------------------------------------------------------------------------------------


class Mask(Kind):
    """``mask``; with ``one_of_two`` the function requires a mask or offsets."""

    def __init__(self, one_of_two: bool = False) -> None:
        self.one_of_two = one_of_two

    def draw(self, draw, call, needed):
        rows = call.batch.rows
        if rows.mask is not None:
            return draw(some.mask_forms(rows.mask))
        return rows.valid if self.one_of_two and rows.cu_seqlens is None else ABSENT

    def wrong(self, call, value, needed):
        needed = self.one_of_two and call["cu_seqlens"] is ABSENT
        yield from strangers("a tensor", *([] if needed else ["None"]))
        if isinstance(value, Tensor):
            yield "of complex numbers", value.to(torch.complex64)
            yield "one more", longer(value)
            yield "another rank", value[None]
            yield "another device", value.to("meta")


class Offsets(Kind):
    """``cu_seqlens``"""

    def draw(self, draw, call, needed):
        offsets = call.batch.rows.cu_seqlens
        return ABSENT if offsets is None else offsets

    def wrong(self, call, value, needed):
        yield from strangers("None", "a tensor")
        if value is ABSENT:
            yield "for padded rows", torch.zeros(call.batch.size + 7, dtype=torch.int32)
            return
        yield "of floats", value.float()
        yield "of int16", value.to(torch.int16)
        yield "of two dimensions", value[None]
        yield "no entry", value[:0]
        yield "another device", value.to("meta")
        yield "a first entry of 1", first_as(value, 1)
        if call["mask"] is ABSENT and call["num_tokens"] is ABSENT and call.takes("num_tokens"):
            return  # only the offsets determine the number of tokens
        last, total = torch.tensor(len(value) - 1), int(value[-1])
        yield "a last entry too many", value.index_fill(0, last, total + 1)
        if len(value) > 2:
            yield "falling", value.index_fill(0, torch.tensor(1), total + 3)


class Labels(Kind):
    """``groups``; without them the call has a ``group_size``.

    Args:
        when: True for calls with groups. spare: True for calls that may omit them.
    """

    def __init__(self, when: When = always, spare: When = never) -> None:
        self.when, self.spare = when, spare

    def draw(self, draw, call, needed):
        if not self.when(call):
            return ABSENT
        labels = call.batch.labels
        form = draw(st.sampled_from(("tensor", "strings", "array", "sizes")))
        if form == "strings":
            return [f"prompt {k}" for k in labels.tolist()]
        return {"tensor": labels, "array": labels.numpy(), "sizes": ABSENT}[form]

    def wrong(self, call, value, needed):
        labels, size = call.batch.labels, call.batch.size
        if value is ABSENT:
            yield ("beside sizes" if self.when(call) else "where there are none"), labels
            return
        yield from strangers("a list", "a tensor", *(["None"] if self.spare(call) else []))
        yield "a list of too many", [0] * (size + 1)
        yield "an array of too many", np.zeros(size + 1, dtype=np.int64)
        if size:
            yield "what cannot be hashed", [[k] for k in range(size)]
        yield "of floats", labels.float()
        yield "of complex numbers", labels.to(torch.complex64)
        yield "one more", longer(labels)
        yield "another rank", labels[None]
        yield "another device", labels.to("meta")


class GroupSize(Kind):
    """``group_size`` of contiguous groups, for calls without labels."""

    def draw(self, draw, call, needed):
        if call["groups"] is not ABSENT or not call.kind("groups").when(call):
            return ABSENT
        batch = call.batch.size
        if draw(st.booleans()):
            return draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0] or [1, 4]))
        cuts = sorted(draw(st.lists(st.integers(0, batch), max_size=3)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, batch], strict=True)]
        return torch.tensor(sizes) if draw(st.booleans()) and not call.takes("max_group_size") else sizes

    def wrong(self, call, value, needed):
        size = call.batch.size
        if value is ABSENT:
            yield "beside groups, or where there are none", 1
            return
        spare = call.kind("groups").spare(call)
        yield from strangers("a whole number", *(["None"] if spare else []))
        yield from (("zero", 0), ("negative", -1), ("sizes of too many", [size + 1]))
        yield from (("a negative size", [size + 1, -1]), ("a size that is not whole", [float(size)]))
        yield "a tensor of sizes of too many", torch.tensor([size + 1])
        yield "a tensor of two dimensions", torch.tensor([[size]])
        if size:
            yield "no divisor", size + 1


# ---- numbers, names and flags ------------------------------------------------------------------------------


class Number(Kind):
    """A number within bounds.

    Args:
        values: values to draw from. none: None is valid. infinite: infinities are valid. least, most: inclusive
            bounds; above, below: exclusive bounds. given: always passed. when: True for calls that check it.
            also: values of other types that are valid.
    """

    def __init__(
        self,
        *values: float,
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
        below: float | None = None,
        infinite: bool = False,
        none: bool = False,
        given: bool = False,
        when: When = always,
        also: Sequence[str] = (),
    ) -> None:
        self.given, self.values = given, (*values, None) if none else values
        self.bounds = ((least, -1, True), (above, -1, False), (most, 1, True), (below, 1, False))
        self.infinite, self.none, self.when, self.also = infinite, none, when, also

    def draw(self, draw, call, needed):
        needed = needed or self.given or draw(st.booleans())
        return draw(st.sampled_from(self.values)) if needed else ABSENT

    def wrong(self, call, value, needed):
        if not self.when(call):
            return
        yield from strangers("a number", "a whole number", *self.also, *(["None"] if self.none else []))
        if not self.infinite:
            yield from (("infinite", math.inf), ("minus infinite", -math.inf))
        for bound, outside, belongs in self.bounds:
            if bound is not None:
                yield "beyond a bound", bound + outside * 0.25
                yield "far beyond a bound", bound + outside * 1e6
                if not belongs:
                    yield "at a bound", float(bound)


class Whole(Made):
    """An int of at least ``least`` and at most ``most``."""

    def __init__(
        self, make: Make, least: int, most: Callable[[Call], int] | None = None, **options: Any
    ) -> None:
        super().__init__(make, self._bad, **options)
        self.least, self.most = least, most

    def _bad(self, call: Call, value: Any) -> Bad:
        yield from strangers("None", "a whole number")
        yield from (("too few", self.least - 1), ("negative", -7), ("a float", 2.0))
        if self.most is not None:
            yield "too many", self.most(call) + 1


class Choice(Kind):
    """One of some names. ``also``: values of other types that are valid."""

    def __init__(
        self, names: Callable[[Call], Sequence[str]] | Sequence[str], also: Sequence[str] = ()
    ) -> None:
        self.names, self.also = names, also

    def draw(self, draw, call, needed):
        names = self.names(call) if callable(self.names) else self.names
        return draw(st.sampled_from(names)) if needed or draw(st.booleans()) else ABSENT

    def wrong(self, call, value, needed):
        yield from strangers(*self.also)
        yield from (
            ("no such name", "nonsense"),
            ("no name", ""),
            ("a list of names", ["mean"]),
            ("bytes", b"mean"),
        )


class Flag(Kind):
    def draw(self, draw, call, needed):
        return draw(st.booleans()) if needed or draw(st.booleans()) else ABSENT

    def wrong(self, call, value, needed):
        return strangers("a flag")


class Either(Kind):
    """A number, or a tensor of numbers. ``outside``: an invalid number; ``read``: the tokens that read it."""

    def __init__(self, number: Number, array: Array, outside: float, read: Callable[[Call], Tensor]) -> None:
        self.number, self.array, self.outside, self.read = number, array, outside, read

    def draw(self, draw, call, needed):
        return (self.array if draw(st.booleans()) else self.number).draw(draw, call, needed)

    def wrong(self, call, value, needed):
        yield from self.number.wrong(call, ABSENT, needed)
        if not isinstance(value, Tensor):
            return
        for what, bad in self.array.wrong(call, value, True):
            # A longer tensor, or one of higher rank, may be valid in another meaning.
            if what.startswith("of ") or what == "another device":
                yield what, bad
        yield "too long", value.new_ones((*value.shape[:-1], 1000 + call.batch.size)) * 0.5
        yield "too deep", value[None, None, None]
        if self.read(call).any():
            yield "out of range", torch.full_like(value, self.outside)
            yield "of NaN", torch.full_like(value, math.nan)


# ---- statistics of logits ----------------------------------------------------------------------------------


class Outputs(Kind):
    """Names of statistics; those of two models only if ``ref``, the second, is in the call."""

    def __init__(self, ref: str = "ref_logits", but: Sequence[str] = (), empty: bool = False) -> None:
        self.ref, self.but, self.empty = ref, but, empty

    def _single(self, call: Call) -> bool:
        return call[self.ref] is ABSENT and call.takes(self.ref)

    def draw(self, draw, call, needed):
        if not needed and not draw(st.booleans()):
            return ABSENT
        names = [n for n in OUTPUTS if n not in self.but and not (self._single(call) and n in REF_OUTPUTS)]
        drawn = draw(st.lists(st.sampled_from(names), min_size=0 if self.empty else 1, max_size=4))
        return draw(st.sampled_from((tuple, list)))(drawn)

    def wrong(self, call, value, needed):
        yield from strangers()
        yield from (("a name", "logprob"), ("no such name", ["nonsense"]), ("lists", [["logprob"]]))
        yield "not only names", ["logprob", 3]
        if not self.empty:
            yield "none", []
        if self._single(call):
            yield "of two models", ["kl"]


class Coefficients(Kind):
    """A tensor per name of a statistic."""

    def __init__(self, ref: str) -> None:
        self.ref = ref

    def draw(self, draw, call, needed):
        single = call[self.ref] is ABSENT
        names = [n for n in OUTPUTS if n != "is_top1" and not (single and n in REF_OUTPUTS)]
        drawn = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        values = per_token("normal").make(call)
        return {n: draw(values) for n in drawn}

    def wrong(self, call, value, needed):
        yield from strangers()
        yield "nothing", {}
        name, first = next(iter(value.items()))
        yield "no such name", {"nonsense": first}
        yield "a name without a gradient", {"is_top1": first}
        yield "a number", {name: 1.0}
        yield "integers", {name: torch.zeros(first.shape, dtype=torch.int64)}
        yield "one more", {name: longer(first)}
        yield "another device", {name: first.to("meta")}
