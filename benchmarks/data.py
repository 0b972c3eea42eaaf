"""The data of cases: random logits, rows of tokens in either layout, groups, rows that share prefixes."""

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
    """In the precision that formulas compute in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def copy(*tensors: Tensor) -> tuple[str, Callable[[], list[Tensor]]]:
    """A floor: every input read once and written once."""
    return "copy of the inputs", lambda: [x.clone() for x in tensors]


class Groups:
    """Rows of groups: a view where they are of one size, sums by label where they are not."""

    def __init__(self, of: int | Tensor) -> None:
        self.size = of if isinstance(of, int) else 0
        self.labels = None if isinstance(of, int) else of
        self.number = 0 if isinstance(of, int) else int(of[-1]) + 1

    def split(self, x: Tensor) -> Tensor:
        """``[B, ...]`` so that :meth:`total` broadcasts to it."""
        return x.view(-1, self.size, *x.shape[1:]) if self.labels is None else x

    def total(self, x: Tensor) -> Tensor:
        """Sums over the rows of a group, of something split."""
        if self.labels is None:
            return x.sum(1, keepdim=True)
        return x.new_zeros(self.number, *x.shape[1:]).index_add_(0, self.labels, x)[self.labels]


class Data:
    """The data of one case, drawn on first use, and the case built from it."""

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
        self.known: dict[str, Tensor] = {}  # the arguments of the op besides its inputs

    # ---- numbers ---------------------------------------------------------------------------------------------

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device) * (high - low) + low

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """In the dtype of the case."""
        return torch.randn(shape, generator=self.random, device=self.device, dtype=self.dtype) * scale

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.random, device=self.device)

    @cached_property
    def counted(self) -> Tensor | None:
        """``[N]``, which tokens of the logits count; None for all."""
        if not self.holes:
            return None
        self.known["counted"] = self.uniform(self.sizes.tokens) < self.sizes.density
        return self.known["counted"]

    def of_counted(self, x: Tensor) -> int:
        """Bytes of those rows of ``[N, ...]`` that count: the others need not be read."""
        if self.counted is None:
            return size_of(x)
        return size_of(x) // len(x) * int(self.counted.sum())

    # ---- rows of tokens --------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> int:
        """B, whole groups of K."""
        return -(-self.sizes.rows // self.sizes.group) * self.sizes.group

    @cached_property
    def lengths(self) -> Tensor:
        """``[B, 1]``"""
        t = self.sizes.length
        return self.ids(t, self.rows, 1) + 1 if self.sizes.ragged else self.ids(1, self.rows, 1) + t

    @cached_property
    def mask(self) -> Tensor:
        """``[B, T]``, which tokens count: for the formulas, and for the properties below."""
        inside = torch.arange(self.sizes.length, device=self.device) < self.lengths
        if self.holes:
            inside &= self.uniform(self.rows, self.sizes.length) < self.sizes.density
            inside[:, 0] = True  # no row without a token
        return inside

    @property
    def holes(self) -> bool:
        return self.sizes.density < 1

    @property
    def packed(self) -> bool:
        return self.sizes.layout == "packed"

    @cached_property
    def _packed_at(self) -> Tensor:
        """``[N]``, where in ``[B * T]`` the packed tokens lie."""
        inside = torch.arange(self.sizes.length, device=self.device) < self.lengths
        return inside.flatten().nonzero()[:, 0]

    @cached_property
    def valid(self) -> Tensor | None:
        """The mask in the layout of the case; None where packed rows have no holes."""
        if not self.packed or self.holes:
            self.known["mask"] = self.pack(self.mask)
        return self.known.get("mask")

    @cached_property
    def where(self) -> dict[str, Tensor]:
        """What tells an op which tokens are of which row, and count."""
        found = {} if self.valid is None else {"mask": self.valid}
        if self.packed:
            ends = self.lengths[:, 0].cumsum(0)
            found["cu_seqlens"] = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        self.known.update(found)
        return found

    @cached_property
    def steps(self) -> Tensor:
        """:attr:`ends` in the layout of the case."""
        self.known["steps"] = self.pack(self.ends)
        return self.known["steps"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of per-token tensors, in the layout of the case."""
        return tuple(self._packed_at.shape) if self.packed else (self.rows, self.sizes.length)

    @property
    def numel(self) -> int:
        return self._packed_at.numel() if self.packed else self.rows * self.sizes.length

    def pack(self, dense: Tensor) -> Tensor:
        """``[B, T]`` in the layout of the case."""
        return dense.flatten()[self._packed_at] if self.packed else dense

    def unpack(self, x: Tensor) -> Tensor:
        """``[B, T]``, zeros where nothing was packed."""
        if not self.packed:
            return x
        out = x.new_zeros(self.rows * self.sizes.length)
        out[self._packed_at] = x
        return out.view(self.rows, self.sizes.length)

    def per_token(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A number for each token, in the layout and the dtype of the case."""
        return self.pack(self.uniform(self.rows, self.sizes.length, low=low, high=high)).to(self.dtype)

    def per_row(self) -> Tensor:
        """``[B]``, rewards."""
        return self.uniform(self.rows)

    def outcomes(self) -> Tensor:
        """``[B]``, 0 or 1."""
        return self.ids(2, self.rows).float()

    @cached_property
    def ends(self) -> Tensor:
        """``[B, T]`` bool, the tokens that end a step."""
        ends = (self.uniform(self.rows, self.sizes.length) < 1 / self.sizes.steps) & self.mask
        place = torch.arange(self.sizes.length, device=self.device)
        last = torch.where(self.mask, place, 0).amax(1, keepdim=True)  # a row's last token ends its last step
        return ends | (place == last)

    @cached_property
    def labels(self) -> Tensor:
        """``[B]``, the group of each row."""
        if not self.sizes.ragged_groups:
            return torch.arange(self.rows, device=self.device) // self.sizes.group
        # None of one row: conventions differ there.
        sizes = torch.randint(2, 2 * self.sizes.group - 1, (self.rows,), generator=self.on_host())
        labels = torch.arange(self.rows).repeat_interleave(sizes)[: self.rows]
        labels[-1] = labels[-2]
        return labels.to(self.device)

    @staticmethod
    def on_host() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    @cached_property
    def by(self) -> dict[str, Any]:
        """What tells an op the groups."""
        if not self.sizes.ragged_groups:
            return {"group_size": self.sizes.group}
        self.known["groups"] = self.labels
        return {"groups": self.labels}

    @cached_property
    def groups(self) -> Groups:
        return Groups(self.labels if self.sizes.ragged_groups else self.sizes.group)

    # ---- rows that share prefixes ----------------------------------------------------------------------------

    def shared_prefixes(self) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T]``, and outcomes; :attr:`mask` and what else there is of rows is theirs from then on."""
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
        """A case whose plain formula and peers know neither packed rows nor masked logits nor half precision.

        Args:
            out: bytes of the results.
            gradients: of how many inputs, first to last, the backward variant takes the gradient.
            again: the inputs that a backward pass cannot do without; all by default.
            unread: bytes of masked inputs, which either pass leaves alone.
            own_precision: ``plain`` knows what to do with half precision.
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
        """``fn`` with what one does around it: packed rows padded and packed again, masked logits left out."""
        if self.packed and "lengths" in self.__dict__:
            dense = (self.rows, self.sizes.length)

            def padded(*inputs: Tensor) -> Any:
                found = fn(*(self.unpack(x) if x.shape == self.shape else x for x in inputs))
                return _each(found, lambda x: self.pack(x) if x.shape == dense else x)

            return padded
        valid = self.__dict__.get("counted")
        if valid is None:
            return fn

        def selected(*inputs: Tensor) -> Any:
            found = fn(*(x[valid] if len(x) == len(valid) else x for x in inputs))
            return _each(
                found,
                lambda x: x.new_zeros(len(valid), *x.shape[1:]).index_put((valid,), x) if x.dim() else x,
            )

        return selected


def _each(found: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    return fn(found) if isinstance(found, Tensor) else tuple(fn(x) for x in found)


def _wide(plain: Function) -> Function:
    return lambda *inputs: plain(*(full(x) for x in inputs))


def shared_prefixes(
    rows: int, length: int, group: int, shared: int, vocab: int, g: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and outcomes of ragged rows that branch off an earlier one of their group.

    The depth of a branch is exponential with mean ``shared``: most rows part early, as samples do.
    """
    tokens = torch.randint(0, vocab, (rows, length), generator=g, device=device)
    place = torch.arange(rows, device=device) % group
    own = (torch.rand(rows, generator=g, device=device) * place).long()  # an earlier row of the group
    depth = -shared * torch.rand(rows, generator=g, device=device).clamp(min=1e-9).log()
    column = torch.arange(length, device=device)
    for k in range(1, group):
        later = (place == k).nonzero()[:, 0]
        there = tokens[later - place[later] + own[later]]
        tokens[later] = torch.where(column < depth[later, None], there, tokens[later])
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=g, device=device)
    rewards = torch.randint(0, 2, (rows,), generator=g, device=device).float()
    return tokens, column < lengths[:, None], rewards
