"""Runs of a function, forward and backward, and what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.dispatch import use_backend
from .budgets import EXACT, Error, measure_error

Function = Callable[..., Any]


# ---- running -----------------------------------------------------------------------------------------------


class Outputs(list[Tensor]):
    """The tensors of a result; ``names`` has a name for each where the result is a named tuple."""

    def __init__(self, tensors: Iterable[Tensor], names: Sequence[str] = ()) -> None:
        super().__init__(tensors)
        self.names = tuple(names)


class Outcome(NamedTuple):
    """Outputs of a function and the gradients of its floating-point inputs."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def _tensors(result: Any) -> Outputs:
    """The tensors of a result, without what is None."""
    if isinstance(result, Tensor):
        return Outputs([result])
    names = [name for name in getattr(result, "_fields", ()) if getattr(result, name) is not None]
    return Outputs([r for r in result if r is not None], names)


def _upstream(outputs: list[Tensor]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(17)
    for o in outputs:
        up = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        # Numbers that every precision has, so that all runs are given the same.
        yield up.to(torch.bfloat16).to(torch.float64)


def evaluate(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    poison: Tensor | None = None,
) -> Outcome:
    """Run ``fn`` forward and backward, floating-point inputs as leaves.

    Args:
        backend: of this package, forced; None to leave the choice as it is.
        dtype: what the floating-point inputs are cast to; None to leave them.
        poison: a bool mask; outputs of its shape get a NaN upstream gradient where it is False.
    """
    leaves = []
    for x in inputs:
        x = x.detach().to(device)
        if x.is_floating_point():
            x = _owned(x if dtype is None else x.to(dtype)).requires_grad_()
        leaves.append(x)
    with nullcontext() if backend is None else use_backend(backend):
        outputs = _tensors(fn(*leaves))
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
        elif not any(o.numel() for o in outputs):
            gradients = [torch.zeros_like(x) for x in wanted]  # nothing depends on them, said or not
    return Outcome(Outputs([o.detach() for o in outputs], outputs.names), gradients)


def _owned(x: Tensor) -> Tensor:
    """A leaf: a copy, but of rows that lie where they do on purpose (:func:`far_rows`) a view."""
    spread = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach() if spread > 2**31 else x.clone()


# ---- comparing ---------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One output or gradient, held to its budget."""

    name: str
    error: Error
    is_gradient: bool = False


def compare(
    ours: Outcome, exact: Outcome, eager: Outcome, *, ulps: float = 8.0, times: float = 1.0
) -> list[Comparison]:
    """Every output and gradient of a run, held to those in float64 within eager's budget."""
    found = []
    names = getattr(ours.outputs, "names", ())
    scale = max((_largest(x) for x in [*exact.outputs, *exact.gradients]), default=0.0)
    for kind in ("output", "gradient"):
        sides = [getattr(run, f"{kind}s") for run in (ours, exact, eager)]
        if len({len(side) for side in sides}) != 1:
            fault = f"{kind}s: {len(sides[0])}, the reference has {len(sides[1])}"
            found.append(Comparison(f"{kind}s", Error(float("inf"), float("inf"), fault), kind == "gradient"))
            continue
        for k, triple in enumerate(zip(*sides, strict=True)):
            name = names[k] if names and kind == "output" else f"{kind} {k}"
            error = measure_error(*triple, ulps=ulps, times=times, scale=scale, name=name)
            found.append(Comparison(name, error, kind == "gradient"))
    return found


def _largest(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def same_bits(a: Outcome, b: Outcome) -> bool:
    """Whether two runs agree in every bit."""
    return all(
        x.shape == y.shape and torch.equal(_bytes(x), _bytes(y))
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def check_backend(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    backend: str,
    device: torch.device | str = "cpu",
    reference: Function | None = None,
    ulps: float = 8.0,
    times: float = 1.0,
    poison: Tensor | None = None,
) -> Outcome:
    """Hold a backend of this package to the specification in float64, forward and backward.

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
    for found in compare(ours, exact, eager, ulps=ulps, times=times):
        assert found.error.passes, found.error.fault
    return ours


# ---- kernels of others -------------------------------------------------------------------------------------


@dataclass
class Report:
    """What :func:`check_op` found: comparisons by case, and what failed."""

    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def worst(self, gradients: bool = False) -> Error:
        """The largest error of the outputs, or of the gradients, as a share of its budget."""
        errors = [c.error for found in self.comparisons.values() for c in found if c.is_gradient == gradients]
        return max(errors, key=lambda e: e.of_budget, default=EXACT)

    def __str__(self) -> str:
        value, gradient = self.worst(), self.worst(gradients=True)
        lines = [
            f"{len(self.comparisons)} cases; worst error {value.ulps:.3g} ulp ({value.of_budget:.2g} of its"
            f" budget), worst gradient {gradient.ulps:.3g} ulp ({gradient.of_budget:.2g} of its budget)"
        ]
        return "\n".join(lines + [f"  {fault}" for fault in self.faults])


Cases = Mapping[str, Sequence[Tensor]] | Iterable[tuple[str, Sequence[Tensor]]]


def check_op(
    fn: Function,
    reference: Function,
    cases: Cases,
    *,
    device: torch.device | str | None = None,
    ulps: float = 8.0,
    times: float = 2.0,
    repeats: int = 3,
    raises: bool = True,
) -> Report:
    """Hold any function of tensors to a plain one: values, gradients, and the same bits every time.

    For kernels of one's own; nothing of this package is involved. For each case ``reference`` runs in float64, for
    the truth, and in float32 (float64 for float64 inputs), for the budget; both on the inputs as rounded to their
    own dtype. ``fn`` must be within :func:`assert_within_budget` of the truth, its gradients too where its outputs
    have any, and give the same bits ``repeats`` times. A case on which ``fn`` raises has failed; the others go on.

    Args:
        fn: called with the tensors of a case; returns a tensor, or a sequence of tensors (None among them is
            skipped).
        reference: the same in plain PyTorch, right for float64.
        cases: names and inputs. :func:`logit_cases` and :func:`reward_cases` make some; floating-point inputs are
            those that may have gradients.
        device: where ``fn`` runs; None for where the inputs are. The reference runs where the inputs are.
        ulps, times: the budget, units in the last place and times eager's worst error. Twice, because of two
            computations in the same precision either may be the luckier.
        repeats: runs whose bits must agree.
        raises: raise on a fault; else it is in the report.

    Returns:
        :class:`Report`; printed, it says the worst errors.

    Raises:
        AssertionError: every fault, a line each, with its case.
    """
    report = Report()
    for name, inputs in cases.items() if isinstance(cases, Mapping) else cases:
        single = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
        here = inputs[0].device if inputs else torch.device("cpu")
        exact = evaluate(reference, inputs, device=here, dtype=torch.float64)
        eager = evaluate(reference, inputs, device=here, dtype=single)
        try:
            runs = [evaluate(fn, inputs, device=here if device is None else device) for _ in range(repeats)]
        except Exception as error:  # whatever a kernel raises is a finding
            report.comparisons[name] = []
            report.faults.append(f"{name}: raised {type(error).__name__}: {error}")
            continue
        if not runs[0].gradients:
            exact, eager = exact._replace(gradients=[]), eager._replace(gradients=[])
        found = report.comparisons[name] = compare(runs[0], exact, eager, ulps=ulps, times=times)
        report.faults += [f"{name}: {c.error.fault}" for c in found if c.error.fault is not None]
        if not all(same_bits(runs[0], run) for run in runs[1:]):
            report.faults.append(f"{name}: other bits in another run of the same inputs")
    if raises and report.faults:
        raise AssertionError("\n".join(report.faults))
    return report
