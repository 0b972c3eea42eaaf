"""Run a function forward and backward, and compare with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.dispatch import use_backend
from .budgets import Error, measure_error

Function = Callable[..., Any]


# ---- running -----------------------------------------------------------------------------------------------


class Outputs(list[Tensor]):
    """The tensors of a result; ``names`` holds their names if the result is a named tuple."""

    def __init__(self, tensors: Iterable[Tensor], names: Sequence[str] = ()) -> None:
        super().__init__(tensors)
        self.names = tuple(names)


class Outcome(NamedTuple):
    """Outputs of a function and the gradients of its floating-point inputs.

    Attributes:
        outputs: the tensors that it returned, without those that are None.
        gradients: one for each floating-point input, its shape and dtype; empty if no output has a gradient.
    """

    outputs: list[Tensor]
    gradients: list[Tensor]


def _tensors(result: Any) -> Outputs:
    """The tensors of a result, without those that are None."""
    if isinstance(result, Tensor):
        return Outputs([result])
    names = [name for name in getattr(result, "_fields", ()) if getattr(result, name) is not None]
    return Outputs([r for r in result if r is not None], names)


def _upstream(outputs: list[Tensor]) -> Iterator[Tensor]:
    generator = torch.Generator("cpu").manual_seed(17)
    for o in outputs:
        up = torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu")
        # Numbers that are exact in every precision, so that all runs get the same.
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
    """Run a function forward and backward, with its floating-point inputs as leaves.

    The upstream gradients are the same random numbers in every run, exact in every precision.

    Args:
        fn: called with the inputs; returns a tensor or a sequence of tensors (None among them is skipped).
        inputs: tensors of any shape and dtype; copies of them are differentiated.
        backend: the backend of this package to force; None for the default.
        device: where the inputs are moved to.
        dtype: cast floating-point inputs to it; None for no cast.
        poison: a bool mask; outputs of its shape get a NaN upstream gradient where it is False. None for
            none.

    Returns:
        :class:`Outcome`, detached.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: an op that the backend cannot serve on the device.

    Example:
        >>> from rewardops.testing import evaluate
        >>> run = evaluate(lambda r: ro.row_sum(r), [torch.tensor([[1.0, 2.0]])])
        >>> run.outputs[0].tolist(), run.gradients[0].shape
        ([3.0], torch.Size([1, 2]))
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
            grads = torch.autograd.grad(smooth, wanted, ups, allow_unused=True)
            gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
        elif not any(o.numel() for o in outputs):
            gradients = [torch.zeros_like(x) for x in wanted]  # empty outputs depend on no input
    return Outcome(Outputs([o.detach() for o in outputs], outputs.names), gradients)


def _owned(x: Tensor) -> Tensor:
    """A leaf: a copy, or a view where the memory layout is the point of the test (:func:`far_rows`)."""
    spread = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach() if spread > 2**31 else x.clone()


# ---- comparing ---------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One output or gradient, measured against its budget.

    Attributes:
        name: of the output, or ``"output k"`` and ``"gradient k"``.
        error: its error.
        is_gradient: True for a gradient.
    """

    name: str
    error: Error
    is_gradient: bool = False


def compare(
    ours: Outcome, exact: Outcome, eager: Outcome, *, ulps: float = 8.0, times: float = 1.0
) -> list[Comparison]:
    """Compare every output and gradient of a run with float64, within eager's budget.

    Args:
        ours: the run under test.
        exact: the run in float64.
        eager: the plain run in the precision of ``ours``.
        ulps: the budget's units in the last place.
        times: the budget's multiples of eager's worst error.

    Returns:
        A :class:`Comparison` for each output and gradient. Another number of them than in ``exact`` or
        ``eager`` is a fault.

    Raises:
        AttributeError: a run that is no :class:`Outcome`.

    Example:
        >>> from rewardops.testing import compare, evaluate
        >>> x = [torch.tensor([1.0, 2.0])]
        >>> ours, exact = evaluate(torch.exp, x), evaluate(torch.exp, x, dtype=torch.float64)
        >>> [(c.name, c.error.passes) for c in compare(ours, exact, ours)]
        [('output 0', True), ('gradient 0', True)]
    """
    comparisons = []
    names = getattr(ours.outputs, "names", ())
    scale = max((_largest(x) for x in [*exact.outputs, *exact.gradients]), default=0.0)
    for kind in ("output", "gradient"):
        sides = [getattr(run, f"{kind}s") for run in (ours, exact, eager)]
        if len({len(side) for side in sides}) != 1:
            fault = f"{kind}s: {len(sides[0])}, the reference has {len(sides[1])}"
            comparisons.append(
                Comparison(f"{kind}s", Error(float("inf"), float("inf"), fault), kind == "gradient")
            )
            continue
        for k, triple in enumerate(zip(*sides, strict=True)):
            name = names[k] if names and kind == "output" else f"{kind} {k}"
            error = measure_error(*triple, ulps=ulps, times=times, scale=scale, name=name)
            comparisons.append(Comparison(name, error, kind == "gradient"))
    return comparisons


def _largest(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def same_bits(a: Outcome, b: Outcome) -> bool:
    """Tell whether two runs agree in every bit, and in the number of outputs and gradients.

    Args:
        a: one run.
        b: another run.

    Returns:
        True if shapes, dtypes and bits are the same; NaN equals NaN of the same bits.

    Raises:
        AttributeError: a run that holds something else than tensors.

    Example:
        >>> from rewardops.testing import evaluate, same_bits
        >>> x = [torch.tensor([1.0, 2.0])]
        >>> same_bits(evaluate(torch.exp, x), evaluate(torch.exp, x))
        True
    """
    if any(len(one) != len(other) for one, other in zip(a, b, strict=True)):
        return False
    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y))
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)  # empty ones too


@contextmanager
def served_by() -> Iterator[set[str]]:
    """The backends that serve an op while the context is open, on any thread."""
    served: set[str] = set()
    choose = dispatch.backend_for

    def noted(device_type: str, family: str | None = None, op: str | None = None) -> str:
        name = choose(device_type, family, op)
        if op is not None:
            served.add(name)
        return name

    dispatch.backend_for = noted
    try:
        yield served
    finally:
        dispatch.backend_for = choose


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
    allow_fallback: bool = False,
) -> Outcome:
    """Check a backend of this package against the specification in float64, forward and backward.

    Args:
        fn: called with ``inputs`` on ``device`` under ``backend``.
        inputs: tensors of any shape and dtype; gradients of the floating-point ones are compared.
        backend: its name; or several, as in :func:`rewardops.use_backend`, of which each may serve.
        device: where ``fn`` runs.
        reference: the function for the reference backend on the CPU; None for ``fn``.
        ulps: the budget's units in the last place.
        times: the budget's multiples of eager's worst error.
        poison: a bool mask, for the backend under test only: outputs of its shape get a NaN upstream gradient
            where it is False. None for none.
        allow_fallback: accept a function that calls no op, of which torch computes all on every backend.

    Returns:
        :class:`Outcome` of the backend, detached, for further assertions.

    Raises:
        AssertionError: a result outside its budget, or a backend that served nothing.
        BackendUnavailable: an op that the backend cannot serve on the device.
        ValueError: no backend, or an unknown one.

    Example:
        >>> from rewardops.testing import check_backend
        >>> rewards = torch.tensor([[0.5, 0.25, 0.75]])
        >>> run = check_backend(lambda r: ro.min_returns(r), [rewards], backend="reference")
        >>> run.outputs[0].tolist()
        [[0.25, 0.25, 0.75]]
    """
    names = [name.strip() for name in backend.split(",")]
    for name in names:
        checks.check_choice("backend", name, dispatch.BACKENDS)
    plain = reference or fn
    # float64 gets the same inputs as the kernel: rounded to their precision first.
    exact = evaluate(plain, inputs, backend="reference", dtype=torch.float64)
    eager = evaluate(plain, inputs, backend="reference")
    with served_by() as served:
        ours = evaluate(fn, inputs, backend=backend, device=device, poison=poison)
    for comparison in compare(ours, exact, eager, ulps=ulps, times=times):
        assert comparison.error.passes, comparison.error.fault
    if not allow_fallback and not served & set(names):
        raise AssertionError(
            f"backend: got {backend!r}, which served no op of this function, want allow_fallback=True to compare it"
            " all the same"
        )
    return ours


# ---- kernels of others -------------------------------------------------------------------------------------


def _none_compared(what: str) -> Error:
    return Error(float("nan"), float("nan"), f"no {what} was compared")


@dataclass
class Report:
    """The result of :func:`check_op`: comparisons by case, and failures. As text it has the worst errors.

    Attributes:
        comparisons: by the name of the case, in the order of the cases.
        faults: a line for each failure, which names its case.
    """

    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def _errors(self, gradients: bool) -> list[Error]:
        each = chain.from_iterable(self.comparisons.values())
        return [c.error for c in each if c.is_gradient == gradients]

    def compared(self, gradients: bool = False) -> int:
        """Count the numbers that were compared and say something (:class:`Error`).

        Args:
            gradients: True counts those of gradients, False those of outputs.

        Returns:
            The count over all cases.

        Example:
            >>> from rewardops.testing import check_op
            >>> check_op(torch.sin, torch.sin, {"one": [torch.tensor([1.0, 2.0])]}).compared()
            2
        """
        return sum(error.compared for error in self._errors(gradients))

    def worst(self, gradients: bool = False) -> Error:
        """The error with the largest share of its budget.

        Args:
            gradients: True for those of gradients, False for those of outputs.

        Returns:
            :class:`Error`; NaN where none was compared.

        Example:
            >>> from rewardops.testing import check_op
            >>> check_op(torch.neg, torch.neg, {"one": [torch.tensor([1.0, 2.0])]}).worst().ulps
            0.0
        """
        found = self._errors(gradients)
        if all(error.passes and not error.compared for error in found):
            return _none_compared("gradient" if gradients else "output")
        return max(found, key=lambda e: e.of_budget)

    def __str__(self) -> str:
        empty = [name for name, found in self.comparisons.items() if not any(c.error.compared for c in found)]
        without = f", {len(empty)} of them without a number to compare" if empty else ""
        parts = [f"{len(self.comparisons)} cases{without}"]
        for what, error in (("error", self.worst()), ("gradient", self.worst(gradients=True))):
            measured = f"{error.ulps:.3g} ulp ({error.of_budget:.2g} of its budget)"
            parts.append(f"worst {what} {measured}" if error.ulps == error.ulps else str(error.fault))
        return "\n".join([f"{parts[0]}; {', '.join(parts[1:])}", *(f"  {fault}" for fault in self.faults)])


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
    gradients: bool = True,
    allow_empty: bool = False,
) -> Report:
    """Check a function of tensors against a plain one: values, gradients, and equal bits in every run.

    For kernels outside this package. For each case ``reference`` runs in float64, which is the exact result,
    and in float32 (float64 for float64 inputs), which sets the budget. Both get the inputs as rounded to
    their dtype. ``fn`` must satisfy :func:`assert_within_budget`, also for its gradients, and give the same
    bits ``repeats`` times. A case on which ``fn`` or ``reference`` raises fails; the other cases still run.

    What was not compared does not pass: outputs without a gradient where the reference has one, and, over all
    cases, outputs or gradients without a single number that is finite in float64 and not 0 (no case at all;
    cases that are empty, masked, or NaN in the reference too).

    Args:
        fn: called with the tensors of a case; returns a tensor, or a sequence of tensors (None among them is
            skipped).
        reference: the same in plain PyTorch, correct in float64.
        cases: names and inputs, for example :func:`logit_cases` and :func:`reward_cases`; floating-point
            inputs may have gradients.
        device: the device of ``fn``; None for that of the inputs, where the reference always runs.
        ulps: the budget's units in the last place.
        times: the budget's multiples of eager's worst error. The default is 2: of two computations in one
            precision either may round better.
        repeats: number of runs whose bits must agree, at least 1.
        raises: raise on a fault; if False, faults are only reported.
        gradients: compare gradients. False for a function that has none.
        allow_empty: accept cases in which there is nothing to compare.

    Returns:
        :class:`Report`; its text has the worst errors.

    Raises:
        AssertionError: faults, a line for each, which names its case.
        ValueError: ``repeats`` below 1.

    Example:
        >>> from rewardops.testing import check_op
        >>> cases = {"small": [torch.tensor([0.5, -2.0])], "empty": [torch.zeros(0)]}
        >>> report = check_op(torch.nn.functional.silu, lambda x: x * torch.sigmoid(x), cases)
        >>> report.worst().passes, report.compared()
        (True, 2)
        >>> check_op(torch.sin, torch.cos, cases, raises=False).faults[0]
        "small: output 0: ... where float64 has -0.416146837: off by 0.493, the budget is ...
    """
    checks.check_whole("repeats", repeats, 1)
    report = Report()
    for name, inputs in cases.items() if isinstance(cases, Mapping) else cases:
        single = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
        here = inputs[0].device if inputs else torch.device("cpu")
        report.comparisons[name] = []
        try:
            exact = evaluate(reference, inputs, device=here, dtype=torch.float64)
            eager = evaluate(reference, inputs, device=here, dtype=single)
        except Exception as error:
            report.faults.append(f"{name}: the reference raised {type(error).__name__}: {error}")
            continue
        try:
            runs = [evaluate(fn, inputs, device=here if device is None else device) for _ in range(repeats)]
        except Exception as error:  # any exception of a kernel is a failed case
            report.faults.append(f"{name}: raised {type(error).__name__}: {error}")
            continue
        if gradients and exact.gradients and not runs[0].gradients:
            report.faults.append(
                f"{name}: the outputs have no gradient, the reference's have (gradients=False to compare outputs"
                " only)"
            )
        if not gradients or not runs[0].gradients:
            exact, eager = exact._replace(gradients=[]), eager._replace(gradients=[])
        first = runs[0] if gradients else runs[0]._replace(gradients=[])
        comparisons = report.comparisons[name] = compare(first, exact, eager, ulps=ulps, times=times)
        report.faults += [f"{name}: {c.error.fault}" for c in comparisons if c.error.fault is not None]
        if not all(same_bits(runs[0], run) for run in runs[1:]):
            report.faults.append(f"{name}: other bits in another run of the same inputs")
    if not allow_empty:
        report.faults += _nothing_compared(report, gradients)
    if raises and report.faults:
        raise AssertionError("\n".join(report.faults))
    return report


def _nothing_compared(report: Report, gradients: bool) -> list[str]:
    """What a report without other faults lacks to mean anything."""
    if not report.comparisons:
        return ["cases: got none, want at least one (allow_empty=True to accept it)"]
    if report.faults:
        return []
    lacking = []
    if not report.compared():
        lacking.append(
            "outputs: no case has a number other than 0, NaN and infinity (allow_empty=True to accept it)"
        )
    if gradients and not report.compared(gradients=True):
        lacking.append(
            "gradients: no case has a number other than 0, NaN and infinity (gradients=False to compare outputs"
            " only)"
        )
    return lacking
