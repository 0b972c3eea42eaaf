"""Cases: an op with its data, the formula in plain PyTorch, and the versions of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


# ---- sizes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Sizes: N tokens over a vocabulary of V; B rows of T tokens in groups of K; hidden states of width D.

    Prefix trees have separate rows, in groups of K and in large groups. Each row branches off an earlier row of
    its group after ``shared`` tokens on average.
    """

    tokens: int
    vocab: int
    rows: int
    length: int
    group: int = 8
    hidden: int = 1024
    hidden_tokens: int = 1024
    tree_rows: int = 4096
    tree_length: int = 2048
    large_group: int = 128
    shared: int = 204
    steps: int = 16
    """Mean number of tokens per step."""
    density: float = 1.0
    """Share of valid tokens inside the rows: below 1 there are holes."""
    ragged: bool = True
    """True for rows of any length up to T."""
    ragged_groups: bool = False
    """True for groups of any size up to 2 K - 1."""
    layout: str = "padded"
    """``"padded"`` or ``"packed"``."""


TINY = Sizes(tokens=4, vocab=300, rows=8, length=24, group=4, hidden=16, hidden_tokens=6,
             tree_rows=8, tree_length=12, large_group=8, shared=2, steps=4)  # fmt: skip
QUICK = Sizes(tokens=64, vocab=32768, rows=256, length=1024, hidden=256, hidden_tokens=128,
              tree_rows=256, tree_length=512, large_group=64, shared=51)  # fmt: skip
CPU = Sizes(tokens=512, vocab=151936, rows=1024, length=4096)
FULL = Sizes(tokens=8192, vocab=151936, rows=1024, length=8192, hidden=4096, hidden_tokens=8192)


@dataclass(frozen=True)
class Axis:
    """A field of :class:`Sizes`, or the dtype, and its values in a sweep."""

    quick: tuple[Any, ...]
    long: tuple[Any, ...]


AXES = {
    "tokens": Axis((16, 64, 256), (16, 64, 256, 1024, 4096)),
    "vocab": Axis((1000, 8000, 32768), (1000, 8000, 32000, 128256, 151936, 262144)),
    "hidden": Axis((64, 256), (512, 1024, 2048, 4096)),
    "hidden_tokens": Axis((32, 128), (64, 256, 1024, 4096)),
    "rows": Axis((64, 256, 1024), (16, 64, 256, 1024, 4096)),
    "length": Axis((128, 512, 2048), (128, 512, 2048, 8192, 32768)),
    "group": Axis((2, 8, 64), (2, 8, 32, 128)),
    "tree_rows": Axis((64, 256), (64, 256, 1024, 4096)),
    "tree_length": Axis((128, 512), (128, 512, 2048, 8192)),
    "shared": Axis((0, 32, 512), (0, 16, 64, 128, 256, 512, 1024, 2048)),
    "steps": Axis((2, 64), (2, 16, 128)),
    "density": Axis((1.0, 0.5), (1.0, 0.9, 0.5, 0.1)),
    "ragged": Axis((False, True), (False, True)),
    "ragged_groups": Axis((False, True), (False, True)),
    "layout": Axis(("padded", "packed"), ("padded", "packed")),
    "dtype": Axis((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)),
}


# ---- cases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """A version that cannot run here, with the reason."""

    why: str


@dataclass(frozen=True)
class Case:
    """One case: ``ours(*inputs)``, ``plain(*inputs)`` and the peers return the same tensors.

    ``bytes_moved`` is the least memory traffic: every input and every output once, and again in the backward
    pass.
    """

    name: str
    op: str
    """The public name of the op."""
    ours: Function
    plain: Function
    inputs: tuple[Tensor, ...]
    bytes_moved: int
    differentiable: int = 0
    """Number of leading inputs that get a gradient; 0 for forward only."""
    peers: dict[str, Function | Missing] = field(default_factory=dict)
    floor: tuple[str, Callable[[], Any]] | None = None
    """Work that no implementation can avoid, such as a matmul; timed, not compared."""
    compiled: bool = True
    """False if compiling ``plain`` does not finish."""
    exact: Function | None = None
    """The float64 computation, if ``plain`` on float64 copies of the inputs is not suitable."""
    compared: bool = True
    """False if the variants compute different numbers, such as random draws."""

    def call(
        self, fn: Function, inputs: tuple[Tensor, ...] | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """The timed call of ``fn``: forward, or forward and backward, which returns the gradients.

        Upstream gradients are random, and the same for every variant and precision.
        """
        inputs = self.inputs if inputs is None else inputs
        if not self.differentiable:
            return lambda: as_tuple(fn(*inputs))
        leaves = [x.detach().requires_grad_() for x in inputs[: self.differentiable]]
        upstream: list[Tensor] = []

        def step() -> tuple[Tensor, ...]:
            outs = as_tuple(fn(*leaves, *inputs[self.differentiable :]))
            if not upstream:
                g = torch.Generator(leaves[0].device).manual_seed(1)
                upstream.extend(
                    torch.randn(o.shape, generator=g, dtype=torch.float32, device=o.device).to(o.dtype)
                    for o in outs
                )
            return torch.autograd.grad(outs, leaves, upstream)

        return step


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    return (out,) if isinstance(out, Tensor) else tuple(x for x in out if x is not None)
