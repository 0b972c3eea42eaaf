"""What kernels are held to: error budgets against float64, and generators of awkward inputs.

For this package's tests, and for users with kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import use_backend

Function = Callable[..., Any]


# ---- error budgets -----------------------------------------------------------------------------------------


def assert_within_budget(
    ours: Tensor, exact: Tensor, eager: Tensor | None = None, *, ulps: float = 8.0, name: str = "result"
) -> None:
    """Assert that ``ours`` is no further from float64 than eager code is, plus a few units in the last place.

    The budget of an element is ``max |eager - exact|`` over the tensor (elements on which eager happens to
    be exact are no standard) plus ``ulps`` units in the last place of its own value, in the dtype of
    ``ours``. Where the float64 result is not finite, ours must be the same infinity or NaN. A float64
    ``ours`` is given 1e-12 of the largest value on top.

    Args:
        ours: what is tested. exact: the float64 result, the same shape. eager: the plain computation on the
            same inputs in the precision of ``ours``; None for no allowance.
    """
    ours, exact = ours.detach().cpu(), exact.detach().cpu()
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
    if not ours.dtype.is_floating_point:
        assert torch.equal(ours.to(torch.int64), exact.to(torch.int64)), f"{name}: integers differ"
        return
    if ours.numel() == 0:
        return
    value, exact = ours.to(torch.float64), exact.to(torch.float64)
    finite = exact.isfinite()
    odd = ~finite & ~((value == exact) | (value.isnan() & exact.isnan()))
    assert not odd.any(), (
        f"{name}: {value[odd][0].item()} where float64 has {exact[odd][0].item()}, "
        f"at {odd.nonzero()[0].tolist()}"
    )
    allowed = torch.zeros((), dtype=torch.float64)
    if eager is not None:
        off = torch.where(finite, eager.detach().cpu().to(torch.float64) - exact, 0).abs()
        allowed = torch.where(off.isfinite(), off, 0).max()
    info = torch.finfo(ours.dtype)
    budget = allowed + ulps * (info.eps * exact.abs() + info.tiny)
    if ours.dtype is torch.float64:
        # The yardstick has no more digits than what it measures: allow both the rounding of a long sum.
        budget = budget + 1e-12 * torch.where(finite, exact, 0).abs().max()
    error = torch.where(finite, (value - exact).abs(), 0)
    error = torch.where(finite & ~value.isfinite(), torch.inf, error)
    worst = (error - torch.where(finite, budget, 0)).argmax()
    assert bool((error <= torch.where(finite, budget, 0)).all()), (
        f"{name}: {value.flatten()[worst].item():.9g} where float64 has {exact.flatten()[worst].item():.9g}: "
        f"off by {error.flatten()[worst].item():.3g}, the budget is {budget.flatten()[worst].item():.3g} "
        f"(eager's worst error is {allowed.item():.3g})"
    )


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


# ---- input generators --------------------------------------------------------------------------------------


def random_mask(
    batch: int, width: int, generator: torch.Generator, *, holes: bool = True, empty_row: bool = True
) -> Tensor:
    """A bool mask of ragged rows, with holes, and with one row of no valid token."""
    length = torch.randint(0, width + 1, (batch,), generator=generator)
    mask = torch.arange(width) < length[:, None]
    if holes:
        mask &= torch.rand(batch, width, generator=generator) > 0.25
    if empty_row and batch > 1:
        mask[batch // 2] = False
    return mask


def random_groups(batch: int, generator: torch.Generator) -> Tensor:
    """Ragged groups in random order under labels of any size and sign; one of them a singleton."""
    labels = torch.tensor([7, -3, 2**40, 0, 5])
    groups = labels[torch.randint(0, len(labels), (batch,), generator=generator)]
    if batch:
        groups[torch.randint(0, batch, (), generator=generator)] = -(2**50)
    return groups


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``padded[b, :lengths[b]]`` one after another, and their ``cu_seqlens`` (int32)."""
    inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=padded.device)
    cu[1:] = lengths.cumsum(0)
    return padded[inside], cu


def unpack(packed: Tensor, lengths: Tensor, width: int) -> Tensor:
    """The inverse of :func:`pack`, zeros beyond each row."""
    inside = torch.arange(width, device=packed.device) < lengths[:, None]
    out = packed.new_zeros((len(lengths), width))
    out[inside] = packed
    return out


def shared_prefix_tokens(groups: Tensor, width: int, generator: torch.Generator, *, vocab: int = 3) -> Tensor:
    """Tokens ``[B, width]`` whose rows branch off one another at random depths within their group."""
    tokens = torch.randint(0, vocab, (len(groups), width), generator=generator)
    for i in range(1, len(groups)):
        earlier = (groups[:i] == groups[i]).nonzero()[:, 0]
        if len(earlier):
            j = earlier[torch.randint(0, len(earlier), (), generator=generator)]
            depth = int(torch.randint(0, width + 1, (), generator=generator))
            tokens[i, :depth] = tokens[j, :depth]
    return tokens
