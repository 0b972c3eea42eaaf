"""Runs of a function on a backend, and what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import use_backend
from .budgets import assert_within_budget

Function = Callable[..., Any]


class Outcome(NamedTuple):
    """Outputs of a function and the gradients of its floating-point inputs."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [r for r in result if r is not None]


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(17)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]


def evaluate(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    poison: Tensor | None = None,
) -> Outcome:
    """Run ``fn`` forward and backward on a backend, floating-point inputs as leaves.

    Args:
        dtype: what the floating-point inputs are cast to; None to leave them.
        poison: a bool mask; outputs of its shape get a NaN upstream gradient where it is False.
    """
    leaves = []
    for x in inputs:
        x = x.detach().to(device)
        if x.is_floating_point():
            x = (x if dtype is None else x.to(dtype)).clone().requires_grad_()
        leaves.append(x)
    with use_backend(backend):
        outputs = [o for o in _tensors(fn(*leaves))]
        smooth = [o for o in outputs if o.requires_grad]
        gradients: list[Tensor] = []
        wanted = [x for x in leaves if x.requires_grad]
        if smooth and wanted:
            ups = []
            for o, up in zip(smooth, _upstream(smooth), strict=True):
                if poison is not None and up.shape == poison.shape:
                    up = torch.where(poison.cpu(), up, torch.nan)
                ups.append(up.to(o.device, o.dtype))
            found = torch.autograd.grad(smooth, wanted, ups, allow_unused=True)
            gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    return Outcome([o.detach() for o in outputs], gradients)


def check_op(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    backend: str,
    device: torch.device | str = "cpu",
    reference: Function | None = None,
    ulps: float = 8.0,
    poison: Tensor | None = None,
) -> Outcome:
    """Hold a backend to the specification in float64, forward and backward, within eager's error budget.

    Args:
        fn: called with ``inputs`` on ``device`` under ``backend``.
        reference: the same on the CPU under the reference backend, where it differs from ``fn``.
        poison: as in :func:`evaluate`, for the backend under test only.

    Returns:
        The outcome of the backend, for further assertions.
    """
    plain = reference or fn
    # float64 sees the inputs as the kernel does: rounded to their own precision first.
    exact = evaluate(plain, inputs, backend="reference", dtype=torch.float64)
    eager = evaluate(plain, inputs, backend="reference")
    ours = evaluate(fn, inputs, backend=backend, device=device, poison=poison)
    assert len(ours.outputs) == len(exact.outputs)
    for k, triple in enumerate(zip(ours.outputs, exact.outputs, eager.outputs, strict=True)):
        assert_within_budget(*triple, ulps=ulps, name=f"output {k}")
    for k, triple in enumerate(zip(ours.gradients, exact.gradients, eager.gradients, strict=True)):
        assert_within_budget(*triple, ulps=ulps, name=f"gradient {k}")
    return ours
