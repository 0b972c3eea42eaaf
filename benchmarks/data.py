"""Data of the cases: random logits, rows of tokens in either layout, groups, rows that share prefixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .case import Case, Function, Missing, Sizes


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def full(x: Tensor) -> Tensor:
    """Cast half precision to float32, in which the formulas compute."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def copy(*tensors: Tensor) -> tuple[str, Callable[[], list[Tensor]]]:
    """A floor: every input read once and written once."""
    return "copy of the inputs", lambda: [x.clone() for x in tensors]


class Groups:
    """Group sums: over a view if groups have equal sizes, else by label."""

    def __init__(self, of: int | Tensor) -> None:
        self.size = of if isinstance(of, int) else 0
        self.labels = None if isinstance(of, int) else of
        self.number = 0 if isinstance(of, int) else int(of[-1]) + 1

    def split(self, x: Tensor) -> Tensor:
        """Reshape ``[B, ...]`` so that :meth:`total` broadcasts to it."""
        return x.view(-1, self.size, *x.shape[1:]) if self.labels is None else x

    def total(self, x: Tensor) -> Tensor:
        """Sums over the rows of each group, of a result of :meth:`split`."""
        if self.labels is None:
            return x.sum(1, keepdim=True)
        return x.new_zeros(self.number, *x.shape[1:]).index_add_(0, self.labels, x)[self.labels]


class Data:
    """The data of one case, generated on first use."""

    def __init__(
        self, name: str, op: str, variant: str, sizes: Sizes, device: torch.device, dtype: torch.dtype
    ) -> None:
        if variant == "long":  # a few long rows
            sizes = replace(sizes, rows=4, length=32 * sizes.length)
        if variant == "large":  # a few large groups
            sizes = replace(sizes, group=sizes.large_group)
        self.name, self.op, self.backward = name, op, variant == "backward"
        self.variant, self.sizes, self.device, self.dtype = variant, sizes, device, dtype
        self.random = torch.Generator(device).manual_seed(0)
        self.known: dict[str, Tensor] = {}  # arguments of the op besides its inputs

    # ---- numbers ---------------------------------------------------------------------------------------------

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (
            torch.rand(shape, generator=self.random, dtype=torch.float32, device=self.device) * (high - low)
            + low
        )

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers in the dtype of the case."""
        return torch.randn(shape, generator=self.random, device=self.device, dtype=self.dtype) * scale

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.random, device=self.device)

    @cached_property
    def counted(self) -> Tensor | None:
        """``[N]``, True for valid tokens of the logits; None for all."""
        if not self.holes:
            return None
        self.known["counted"] = self.uniform(self.sizes.tokens) < self.sizes.density
        return self.known["counted"]

    def of_counted(self, x: Tensor) -> int:
        """Bytes of the valid rows of ``[N, ...]``: the others need not be read."""
        if self.counted is None:
            return size_of(x)
        return size_of(x) // len(x) * int(self.counted.sum())

    # ---- rows of tokens --------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> int:
        """B, a multiple of K."""
        return -(-self.sizes.rows // self.sizes.group) * self.sizes.group

    @cached_property
    def lengths(self) -> Tensor:
        """``[B, 1]``"""
        t = self.sizes.length
        return self.ids(t, self.rows, 1) + 1 if self.sizes.ragged else self.ids(1, self.rows, 1) + t

    @cached_property
    def mask(self) -> Tensor:
        """``[B, T]``, True for valid tokens: for the formulas, and for the properties below."""
        inside = torch.arange(self.sizes.length, device=self.device) < self.lengths
        if self.holes:
            inside &= self.uniform(self.rows, self.sizes.length) < self.sizes.density
            inside[:, 0] = True  # every row has a token
        return inside

    @property
    def holes(self) -> bool:
        return self.sizes.density < 1

    @property
    def packed(self) -> bool:
        return self.sizes.layout == "packed"

    @cached_property
    def _packed_at(self) -> Tensor:
        """``[N]``, the index in ``[B * T]`` of each packed token."""
        inside = torch.arange(self.sizes.length, device=self.device) < self.lengths
        return inside.flatten().nonzero()[:, 0]

    @cached_property
    def valid(self) -> Tensor | None:
        """The mask in the layout of the case; None for packed rows without holes."""
        if not self.packed or self.holes:
            self.known["mask"] = self.pack(self.mask)
        return self.known.get("mask")

    @cached_property
    def where(self) -> dict[str, Tensor]:
        """The layout arguments of an op: ``mask`` and ``cu_seqlens``."""
        layout = {} if self.valid is None else {"mask": self.valid}
        if self.packed:
            ends = self.lengths[:, 0].cumsum(0)
            layout["cu_seqlens"] = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        self.known.update(layout)
        return layout

    @cached_property
    def steps(self) -> Tensor:
        """:attr:`ends` in the layout of the case."""
        self.known["steps"] = self.pack(self.ends)
        return self.known["steps"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of per-token tensors in the layout of the case."""
        return tuple(self._packed_at.shape) if self.packed else (self.rows, self.sizes.length)

    @property
    def numel(self) -> int:
        return self._packed_at.numel() if self.packed else self.rows * self.sizes.length

    def pack(self, dense: Tensor) -> Tensor:
        """Convert ``[B, T]`` to the layout of the case."""
        return dense.flatten()[self._packed_at] if self.packed else dense

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pack`: ``[B, T]``, zeros at tokens that were not packed."""
        if not self.packed:
            return x
        out = x.new_zeros(self.rows * self.sizes.length)
        out[self._packed_at] = x
        return out.view(self.rows, self.sizes.length)

    def per_token(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A random number per token, in the layout and dtype of the case."""
        return self.pack(self.uniform(self.rows, self.sizes.length, low=low, high=high)).to(self.dtype)

    def per_row(self) -> Tensor:
        """``[B]``, rewards."""
        return self.uniform(self.rows)

    def outcomes(self) -> Tensor:
        """``[B]``, 0 or 1."""
        return self.ids(2, self.rows).float()

    @cached_property
    def ends(self) -> Tensor:
        """``[B, T]`` bool, True at the last token of a step."""
        ends = (self.uniform(self.rows, self.sizes.length) < 1 / self.sizes.steps) & self.mask
        place = torch.arange(self.sizes.length, device=self.device)
        last = torch.where(self.mask, place, 0).amax(1, keepdim=True)  # the last token of a row ends a step
        return ends | (place == last)

    @cached_property
    def labels(self) -> Tensor:
        """``[B]``, the group of each row."""
        if not self.sizes.ragged_groups:
            return torch.arange(self.rows, device=self.device) // self.sizes.group
        # No groups of one row: conventions differ for them.
        sizes = torch.randint(2, 2 * self.sizes.group - 1, (self.rows,), generator=self.on_host())
        labels = torch.arange(self.rows).repeat_interleave(sizes)[: self.rows]
        labels[-1] = labels[-2]
        return labels.to(self.device)

    @staticmethod
    def on_host() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    @cached_property
    def by(self) -> dict[str, Any]:
        """The group arguments of an op."""
        if not self.sizes.ragged_groups:
            return {"group_size": self.sizes.group}
        self.known["groups"] = self.labels
        return {"groups": self.labels}

    @cached_property
    def groups(self) -> Groups:
        return Groups(self.labels if self.sizes.ragged_groups else self.sizes.group)

    # ---- rows that share prefixes ----------------------------------------------------------------------------

    def shared_prefixes(self) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T]`` and outcomes; afterwards :attr:`mask` and the row properties describe these rows."""
        s = self.sizes
        self.sizes = replace(s, rows=s.tree_rows, length=s.tree_length, density=1.0, ragged_groups=False)
        tokens, self.mask, rewards = shared_prefixes(
            self.rows, s.tree_length, s.group, s.shared, s.vocab, self.random, self.device
        )
        self.lengths = self.mask.sum(1, keepdim=True)
        return tokens, rewards

    # ---- the case --------------------------------------------------------------------------------------------

    def case(
        self,
        ours: Function,
        plain: Function,
        inputs: tuple[Tensor, ...],
        out: int,
        *,
        gradients: int = 0,
        again: tuple[Tensor, ...] | None = None,
        unread: int = 0,
        peers: Mapping[str, Function | Missing] | None = None,
        floor: tuple[str, Callable[[], Any]] | None = None,
        own_precision: bool = False,
        **rest: Any,
    ) -> Case:
        """Make a case from a plain formula and peers for padded rows, unmasked logits and float32 only.

        Args:
            out: bytes of the results.
            gradients: number of leading inputs that the backward variant differentiates.
            again: the inputs that a backward pass must read; all by default.
            unread: bytes of masked inputs, which neither pass needs to read.
            own_precision: ``plain`` accepts half precision.
        """
        known = self.known.values()
        moved = size_of(*inputs, *known) - unread + out
        if self.backward:
            read = size_of(*(inputs if again is None else again)) - unread
            moved += read + size_of(*known) + out + size_of(*inputs[:gradients])
        return Case(
            name=self.name,
            op=self.op,
            ours=ours,
            plain=self._adapted(plain if own_precision else _wide(plain)),
            inputs=inputs,
            bytes_moved=moved,
            differentiable=gradients if self.backward else 0,
            peers={k: v if isinstance(v, Missing) else self._adapted(v) for k, v in (peers or {}).items()},
            floor=floor,
            **rest,
        )

    def _adapted(self, fn: Function) -> Function:
        """``fn`` with conversions: packed rows are padded and packed again, masked logits removed."""
        if self.packed and "lengths" in self.__dict__:
            dense = (self.rows, self.sizes.length)

            def padded(*inputs: Tensor) -> Any:
                result = fn(*(self.unpack(x) if x.shape == self.shape else x for x in inputs))
                return _each(result, lambda x: self.pack(x) if x.shape == dense else x)

            return padded
        valid = self.__dict__.get("counted")
        if valid is None:
            return fn

        def selected(*inputs: Tensor) -> Any:
            result = fn(*(x[valid] if len(x) == len(valid) else x for x in inputs))
            return _each(
                result,
                lambda x: x.new_zeros(len(valid), *x.shape[1:]).index_put((valid,), x) if x.dim() else x,
            )

        return selected


def _each(result: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    return fn(result) if isinstance(result, Tensor) else tuple(fn(x) for x in result)


def _wide(plain: Function) -> Function:
    return lambda *inputs: plain(*(full(x) for x in inputs))


def shared_prefixes(
    rows: int, length: int, group: int, shared: int, vocab: int, g: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and outcomes of ragged rows that branch off an earlier row of their group.

    The depth of a branch is exponential with mean ``shared``: most rows branch early, as samples do.
    """
    tokens = torch.randint(0, vocab, (rows, length), generator=g, device=device)
    place = torch.arange(rows, device=device) % group
    earlier = (
        torch.rand(rows, generator=g, dtype=torch.float32, device=device) * place
    ).long()  # an earlier row of the group
    depth = -shared * torch.rand(rows, generator=g, dtype=torch.float32, device=device).clamp(min=1e-9).log()
    column = torch.arange(length, device=device)
    for k in range(1, group):
        later = (place == k).nonzero()[:, 0]
        there = tokens[later - place[later] + earlier[later]]
        tokens[later] = torch.where(column < depth[later, None], there, tokens[later])
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=g, device=device)
    rewards = torch.randint(0, 2, (rows,), generator=g, device=device).float()
    return tokens, column < lengths[:, None], rewards
