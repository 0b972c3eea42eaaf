"""Check every op on every backend of this machine against float64: ``python -m rewardops verify``."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.families import FAMILIES
from .budgets import EXACT, Error
from .calls import LAYOUTS, Batch, Call, calls, make_batch
from .checks import Comparison, Outcome, compare, evaluate, same_bits, served_by

__all__ = [
    "Case", "Row", "Truth", "as_json", "backends", "cases", "check_call", "graphs", "main", "opcheck", "recorded",
    "table", "usable_device", "verify",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half-precision products of hidden states come from the vendor library, which chooses their rounding.
FLOAT32 = ("linear",)
SEEDS = 3
REPEATS = 3


# ---- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Named options of :func:`make_batch`.

    Attributes:
        name: of the case: layout, dtype and what is special about it.
        dtype: of the floats of its batches.
        options: keywords of :func:`make_batch`.
    """

    name: str
    dtype: torch.dtype
    options: dict[str, Any]

    def batches(self, device: str) -> list[Batch]:
        """Batches of the case, one for each of ``SEEDS`` seeds.

        Args:
            device: of their tensors.

        Returns:
            The batches; those on the CPU are made once.

        Example:
            >>> from rewardops.testing import verify
            >>> case = next(verify.cases(quick=True))
            >>> len(case.batches("cpu")), case.batches("cpu")[0].logits.shape
            (3, torch.Size([12, 33, 130]))
        """
        batches = self._on_cpu
        return batches if device == "cpu" else [batch.to(device) for batch in batches]

    @functools.cached_property
    def _on_cpu(self) -> list[Batch]:
        return [make_batch(dtype=self.dtype, seed=seed, **self.options) for seed in range(SEEDS)]


def cases(quick: bool = False) -> Iterator[Case]:
    """Cases: layouts, dtypes, ragged and full rows, odd sizes, NaN at masked tokens, adversarial logits.

    Args:
        quick: True for a few of them.

    Returns:
        An iterator of :class:`Case`.

    Example:
        >>> from rewardops.testing import verify
        >>> [case.name for case in verify.cases(quick=True)][:2]
        ['padded, float32, ragged', 'padded, float32, no token']
    """
    usual = {"rows": 12, "width": 33, "vocab": 130, "poison": True}
    shapes: dict[str, dict[str, Any]] = {
        "ragged": usual,
        "whole rows": {**usual, "full": True},
        "one token": {"rows": 1, "width": 1, "vocab": 1},
        "no row": {"rows": 0, "width": 0, "vocab": 3},
        "no token": {"rows": 3, "width": 0, "vocab": 3},
        "long rows": {"rows": 3, "width": 700, "vocab": 5, "poison": True},
    }
    for kind in ("far above zero", "far below zero", "peaked", "equal", "tiny", "minus infinity"):
        shapes[f"logits {kind}"] = {**usual, "logits": kind}
    for layout in LAYOUTS:
        for dtype in DTYPES[: 2 if quick else 3]:
            for name, options in shapes.items():
                if quick and (name not in ("ragged", "no token") or (dtype, layout) == (DTYPES[1], "packed")):
                    continue
                short = str(dtype).removeprefix("torch.")
                yield Case(f"{layout}, {short}, {name}", dtype, {**options, "layout": layout})


# ---- one call on one backend -------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the table: one call of an op on one backend, over all cases.

    Attributes:
        call: name of the call, as in ``rewardops/testing/calls.py``.
        backend: the backend that was asked for.
        cases: how many ran.
        error: the error of an output with the largest share of its budget.
        gradient: the same of a gradient.
        differentiable: False if the call has no gradient by definition.
        compared: how many numbers of outputs (``"error"``) and of gradients were compared that tell
            something.
        served_by: the backends that served an op of the call.
        same_bits: True if repeated runs agreed in every bit.
        opcheck: the result of ``torch.library.opcheck``; None where it did not run.
        graphs: graphs that ``torch.compile`` traced for three sizes; None where it did not run.
        faults: a line for each failure, which names its case.
    """

    call: str
    backend: str
    cases: int = 0
    error: Error = EXACT
    gradient: Error = EXACT
    differentiable: bool = True
    compared: dict[str, int] = field(default_factory=lambda: {"error": 0, "gradient": 0})
    served_by: list[str] = field(default_factory=list)
    same_bits: bool = True
    opcheck: bool | None = None
    graphs: int | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """True if there is no fault."""
        return not self.faults

    @property
    def elsewhere(self) -> str:
        """Who computed the call, if not the backend: other backends, or torch, for a call without an op."""
        if self.backend.partition(",")[0] in self.served_by:
            return ""
        return ", ".join(self.served_by) or "torch"

    def demand(self, differentiable: bool) -> None:
        """Add a fault if no number was compared that is finite and not 0.

        Args:
            differentiable: True if the call has gradients, which are then demanded as well.

        Example:
            >>> from rewardops.testing.verify import Row
            >>> row = Row("row_sum", "cpp")
            >>> row.demand(differentiable=True)
            >>> row.faults
            ['no case']
        """
        self.differentiable = differentiable
        if not self.cases and not self.faults:
            self.faults.append("no case")
        for kind in ("error", "gradient") if differentiable else ("error",):
            if not self.compared[kind] and not self.faults:
                what = "outputs" if kind == "error" else "gradients"
                self.faults.append(f"{what}: no case has a number other than 0, NaN and infinity")

    def take(self, case: str, comparisons: Sequence[Comparison]) -> None:
        """Add the comparisons of a case.

        Args:
            case: its name.
            comparisons: of its outputs and gradients.

        Example:
            >>> from rewardops.testing import Comparison, Error
            >>> from rewardops.testing.verify import Row
            >>> row = Row("row_sum", "cpp")
            >>> row.take("ragged", [Comparison("output 0", Error(0.5, 0.06, None, compared=12))])
            >>> row.cases, row.error.ulps, row.compared
            (1, 0.5, {'error': 12, 'gradient': 0})
        """
        self.cases += 1
        for one in comparisons:
            kind = "gradient" if one.is_gradient else "error"
            worst: Error = getattr(self, kind)
            self.compared[kind] += one.error.compared
            if one.error.of_budget >= worst.of_budget:
                setattr(self, kind, one.error)
            if one.error.fault is not None:
                self.faults.append(f"{case}: {one.error.fault}")


def _pooled(runs: Sequence[Outcome]) -> Outcome:
    """Several draws of a case as one outcome, so that eager's worst error depends less on chance."""
    return Outcome(
        *(
            [torch.cat([x.flatten() for x in same]) for same in zip(*side, strict=True)]
            for side in ([run.outputs for run in runs], [run.gradients for run in runs])
        )
    )


def _pick(batch: Batch, family: str, name: str) -> Call:
    return next(call for call in calls(batch, family) if call.name == name)


class Truth:
    """Reference outcomes of a call, in float64 and in the case's precision, cached for all backends."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], tuple[Outcome, Outcome]] = {}

    def of(self, case: Case, draws: Sequence[Call]) -> tuple[Outcome, Outcome]:
        """Reference outcomes of a call on the batches of a case.

        Args:
            case: the case.
            draws: the call on each of its batches, on the CPU.

        Returns:
            The outcome in float64, and that in the case's precision; all batches pooled.

        Example:
            >>> from rewardops.testing import verify
            >>> case = next(verify.cases(quick=True))
            >>> draws = [verify.calls(batch, "segments")[0] for batch in case.batches("cpu")]
            >>> exact, eager = verify.Truth().of(case, draws)
            >>> exact.outputs[0].dtype, eager.outputs[0].dtype
            (torch.float64, torch.float32)
        """
        key = (case.name, draws[0].name)
        if key not in self.known:
            exact, eager = (
                _pooled([_run(call, "reference", dtype=dtype) for call in draws])
                for dtype in (torch.float64, None)
            )
            self.known[key] = exact, eager
        return self.known[key]


def _run(call: Call, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Outcome:
    run = evaluate(call.fn, call.inputs, backend=backend, device=device, dtype=dtype)
    return run if call.differentiable else run._replace(gradients=[])


def check_call(
    family: str,
    name: str,
    backend: str,
    device: str,
    cases: Sequence[Case],
    truth: Truth,
    done: Kinds,
    *,
    quick: bool,
    compiles: bool,
) -> Row:
    """Check one call over all cases on one backend: errors, gradients, bits, opcheck, graphs.

    Args:
        family: of the op, a name of ``rewardops.core.families``.
        name: of the call, as in ``rewardops/testing/calls.py``.
        backend: the backend to force; or several with commas, of which each may serve.
        device: where the call runs.
        cases: the cases.
        truth: reference outcomes, kept for other backends.
        done: argument kinds that opcheck has seen; added to.
        quick: True leaves the slow tests of opcheck out.
        compiles: True counts the graphs of ``torch.compile`` too.

    Returns:
        :class:`Row`; any exception is a fault of it.

    Raises:
        KeyError: an unknown family.
        StopIteration: a call that the family does not have.

    Example:
        >>> from rewardops.testing import verify
        >>> some = list(verify.cases(quick=True))[:1]
        >>> arguments = ("segments", "row_sum", "reference", "cpu", some, verify.Truth(), set())
        >>> row = verify.check_call(*arguments, quick=True, compiles=False)
        >>> row.passes, row.served_by
        (True, ['reference'])
    """
    row, used = Row(name, backend), set()
    for case in cases:
        if family in FLOAT32 and case.dtype is not torch.float32:
            continue
        if family != "logits" and "logits" in case.options:
            continue
        try:
            exact, eager = truth.of(case, [_pick(b, family, name) for b in case.batches("cpu")])
            here = [_pick(b, family, name) for b in case.batches(device)]
            with served_by() as served:
                ours = [_run(call, backend, device) for call in here]
            used |= served
            row.take(case.name, compare(_pooled(ours), exact, eager, times=2.0))
            again = [_run(here[0], backend, device) for _ in range(REPEATS - 1)]
            if not all(same_bits(ours[0], other) for other in again):
                row.same_bits = False
                row.faults.append(f"{case.name}: other bits in another run of the same inputs")
        except Exception as error:  # any exception is a failed case
            row.faults.append(f"{case.name}: raised {type(error).__name__}: {error}")
    small = make_batch(dtype=torch.float32).to(device)
    row.served_by = sorted(used)
    row.demand(_pick(small, family, name).differentiable)
    tests = TRACED_BY_NOTHING if quick else None
    if used:
        row.opcheck = _guarded(
            row, "opcheck", lambda: opcheck(_pick(small, family, name), backend, done, tests)
        )
    if compiles:
        row.graphs = _guarded(row, "torch.compile", lambda: graphs(family, name, backend, device))
        if row.graphs is not None and row.graphs != 1:
            row.faults.append(f"torch.compile: {row.graphs} graphs for three sizes, want 1")
    return row


def _guarded(row: Row, what: str, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except Exception as error:
        row.faults.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False if what == "opcheck" else None


def recorded(call: Call, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """All ops that a call dispatches, forward and backward, with their arguments.

    Args:
        call: the call.
        backend: the backend to force.

    Returns:
        A pair of op and arguments for each dispatch, in order.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: an op that the backend cannot serve on the device of the inputs.

    Example:
        >>> from rewardops.testing import calls, verify
        >>> call = calls.calls(calls.make_batch(), "segments")[0]
        >>> [str(op) for op, _ in verify.recorded(call, "reference")]
        ['rewardops.row_sums.default', 'rewardops.segment_reduce_backward.default']
    """
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "rewardops":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        evaluate(call.fn, call.inputs, backend=backend, device=call.inputs[0].device)
    return seen


Kinds = set[tuple[Any, ...]]
TRACED_BY_NOTHING = ("test_schema", "test_autograd_registration", "test_faketensor")
# The omitted tests differentiate every output; here these would be second derivatives.
GRADIENTS_AMONG_OUTPUTS = ("rewardops::linear_token_loss",)


def opcheck(call: Call, backend: str, done: Kinds, tests: Sequence[str] | None = None) -> bool:
    """Run ``torch.library.opcheck`` on every op that a call dispatches: schema, fake, autograd, AOT dispatch.

    Args:
        call: the call.
        backend: the backend to force.
        done: argument kinds already checked, which are skipped; added to.
        tests: the opcheck tests to run; None for all.

    Returns:
        True.

    Raises:
        Exception: an op that fails, of the type that torch raises.
        ValueError: an unknown backend.
        BackendUnavailable: an op that the backend cannot serve on the device of the inputs.

    Example:
        >>> from rewardops.testing import calls, verify
        >>> call = calls.calls(calls.make_batch(), "segments")[0]
        >>> verify.opcheck(call, "reference", set(), ["test_schema"])
        True
    """
    with dispatch.use_backend(backend):
        for func, args in recorded(call, backend):
            kind = (func, *(type(a) if isinstance(a, Tensor) else str(a) for a in args))
            if kind not in done:
                _opcheck(func, args, tests)
                done.add(kind)
    return True


def _opcheck(func: Any, args: tuple[Any, ...], tests: Sequence[str] | None) -> None:
    forward = "backward" not in func.name() and "and_grad" not in func.name()
    leaves = [
        a.detach().clone().requires_grad_(forward and a.is_floating_point()) if isinstance(a, Tensor) else a
        for a in args
    ]
    if tests is None and func.name() in GRADIENTS_AMONG_OUTPUTS:
        tests = TRACED_BY_NOTHING
    if tests is None:
        torch.library.opcheck(func, tuple(leaves))
    else:
        torch.library.opcheck(func, tuple(leaves), test_utils=tests)


def graphs(family: str, name: str, backend: str, device: str) -> int:
    """Number of graphs that ``torch.compile(dynamic=True)`` traces for three sizes of a call.

    Args:
        family: of the op, a name of ``rewardops.core.families``.
        name: of the call, as in ``rewardops/testing/calls.py``.
        backend: the backend to force.
        device: where the call runs.

    Returns:
        The number, 1 if one graph serves all sizes.

    Raises:
        KeyError: an unknown family.
        ValueError: an unknown backend.

    Example:
        >>> from rewardops.testing import verify
        >>> verify.graphs("segments", "row_sum", "reference", "cpu")
        1
    """
    torch._dynamo.reset()
    traced = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    def step(batch: Batch, *xs: Tensor) -> Any:
        return _pick(batch, family, name).fn(*xs)

    compiled = torch.compile(step, backend=counting, dynamic=True, fullgraph=True)
    with dispatch.use_backend(backend):
        for rows, width, vocab in ((4, 6, 10), (6, 9, 14), (8, 12, 22)):
            batch = make_batch(rows, width, vocab, dtype=torch.float32).to(device)
            compiled(batch, *_pick(batch, family, name).inputs)
    return len(traced)


# ---- all of them -------------------------------------------------------------------------------------------


def backends(device: str) -> list[str]:
    """Backends that serve a device on this machine.

    Args:
        device: its name, such as ``"cpu"``.

    Returns:
        Their names.

    Raises:
        RuntimeError: a name that torch does not know.

    Example:
        >>> from rewardops.testing import verify
        >>> "reference" in verify.backends("cpu")
        True
    """
    kind = torch.device(device).type
    return [name for name in dispatch.BACKENDS if dispatch.unavailable(name, kind) is None]


def usable_device(name: str) -> str:
    """Check that a device of this machine computes.

    Args:
        name: of the device, such as ``"cpu"`` or ``"cuda:0"``.

    Returns:
        The name.

    Raises:
        ValueError: any other name.

    Example:
        >>> from rewardops.testing import verify
        >>> verify.usable_device("cpu")
        'cpu'
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: got {name!r}, want cpu, or an accelerator such as cuda") from None
    if device.type == "meta":
        raise ValueError("device: got 'meta', want one whose tensors have values")
    try:
        (torch.ones(2, dtype=torch.float32, device=device) + 1).sum().item()
    except Exception as error:  # each backend of torch raises its own
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"device: got {name!r}, which this machine cannot use: {why}") from None
    return name


def _tried(backend: str) -> str:
    """The backends to force: CUDA C++ has only some ops; the reference serves the others."""
    return "cuda,reference" if backend == "cuda" else backend


def verify(
    ops: Sequence[str] = (),
    only: Sequence[str] = (),
    device: str = "cpu",
    quick: bool = False,
    progress: TextIO | None = None,
) -> list[Row]:
    """Check all selected calls on all selected backends.

    Args:
        ops: names of ops, calls or families; none for all.
        only: backends; none for all that serve the device.
        device: where the calls run.
        quick: few cases, without ``torch.compile`` (also in opcheck).
        progress: the stream of the progress bar; None for no bar.

    Returns:
        A :class:`Row` for each call and backend.

    Raises:
        ValueError: an unknown name, a device that is not there, a backend that does not serve it or none of
            the ops.

    Example:
        >>> from rewardops.testing.verify import verify
        >>> rows = verify(["row_sum"], ["reference"], quick=True)
        >>> [(row.call, row.backend, row.cases, row.passes) for row in rows]
        [('row_sum', 'reference', 6, True)]
    """
    device = usable_device(device)
    for backend in only:
        checks.check_choice("backend", backend, dispatch.BACKENDS)
    names = [(f, c.name) for f in FAMILIES for c in calls(make_batch(), f) if _wanted(f, c, ops)]
    known = {word for f in FAMILIES for c in calls(make_batch(), f) for word in (f, c.op, c.name)}
    for op in ops:
        if op not in known:
            raise ValueError(
                f"op: got {op!r}, want a name of rewardops.__all__, or a family: {', '.join(FAMILIES)}"
            )
    for backend in only:
        if why := dispatch.unavailable(backend, torch.device(device).type):
            raise ValueError(f"backend: got {backend!r} on {device}: {why}")
    chosen = list(dict.fromkeys(only)) or backends(device)
    all_cases, truth = list(cases(quick)), Truth()
    done: dict[str, Kinds] = {backend: set() for backend in chosen}
    rows = []
    bar = Bar(len(names) * len(chosen), progress)
    for family, name in names:
        for backend in chosen:
            bar.at(f"{name} on {backend}")
            compiles = not quick and backend == chosen[0]
            arguments = (family, name, _tried(backend), device, all_cases, truth, done[backend])
            row = check_call(*arguments, quick=quick, compiles=compiles)
            rows.append(row)
    bar.close()
    if all(row.served_by and row.elsewhere and row.passes for row in rows):
        raise ValueError(f"backend: got {', '.join(chosen)}, with a kernel for none of these ops")
    return rows


def _wanted(family: str, call: Call, ops: Sequence[str]) -> bool:
    return not ops or bool({family, call.op, call.name} & set(ops))


class Bar:
    """A progress bar: tqdm's if it is installed, else lines of text."""

    def __init__(self, total: int, to: TextIO | None) -> None:
        self.bar: Any = None
        if to is not None:
            try:
                from tqdm import tqdm
            except ImportError:
                self.bar = None
            else:
                self.bar = tqdm(total=total, file=to, leave=False)
        self.to, self.total, self.done = to, total, 0

    def at(self, what: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_description(what)
            self.bar.update()
        elif self.to is not None:
            print(f"{self.done}/{self.total} {what}", file=self.to)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- report ------------------------------------------------------------------------------------------------

HEAD = (
    "call",
    "backend",
    "cases",
    "error, ulp",
    "of budget",
    "gradient, ulp",
    "of budget",
    "bits",
    "opcheck",
    "graphs",
    "",
)


def _number(x: float) -> str:
    return f"{x:.2g}" if x < 1000 else f"{x:.1e}"


def _errors(error: Error, compared: int) -> tuple[str, str]:
    """Units in the last place and share of the budget; dashes where nothing was compared."""
    if not compared and error.passes:
        return "-", "-"
    return _number(error.ulps), _number(error.of_budget)


def table(rows: Sequence[Row]) -> str:
    """Table of the rows, for a terminal.

    Args:
        rows: from :func:`verify`.

    Returns:
        The text, a line per row below the head.

    Example:
        >>> from rewardops.testing.verify import Row, table
        >>> print(table([Row("row_sum", "cpp", cases=6)]).splitlines()[1].split()[:3])
        ['row_sum', 'cpp', '6']
    """
    lines = [HEAD]
    for r in rows:
        lines.append(
            (
                r.call,
                r.backend.partition(",")[0],
                str(r.cases),
                *_errors(r.error, r.compared["error"]),
                *_errors(r.gradient, r.compared["gradient"]),
                "same" if r.same_bits else "DIFFER",
                {True: "ok", False: "FAILS", None: "-"}[r.opcheck],
                "-" if r.graphs is None else str(r.graphs),
                ("" if not r.elsewhere else f"by {r.elsewhere}") if r.passes else "FAILS",
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k < 2 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def as_json(rows: Sequence[Row], seconds: float) -> str:
    """The rows as JSON, with the configuration of this machine.

    Args:
        rows: from :func:`verify`.
        seconds: that they took.

    Returns:
        The text of an object with ``config``, ``seconds`` and ``rows``; NaN and infinities are written as
        such.

    Example:
        >>> import json
        >>> from rewardops.testing.verify import Row, as_json
        >>> json.loads(as_json([Row("row_sum", "cpp")], 1.0))["rows"][0]["call"]
        'row_sum'
    """
    report = {"config": dispatch.config(), "seconds": round(seconds, 1), "rows": [asdict(r) for r in rows]}
    for row, r in zip(report["rows"], rows, strict=True):  # type: ignore[call-overload]
        row["error"], row["gradient"] = r.error._asdict(), r.gradient._asdict()
    return json.dumps(report, indent=1, allow_nan=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rewardops verify`` with its command-line arguments.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code, 0 if everything passes, else 1.

    Raises:
        SystemExit: arguments that are wrong, or ``--help``.

    Example:
        >>> from rewardops.testing import verify
        >>> verify.main(["--op", "row_sum", "--backend", "reference", "--quick"])
        call     backend    cases  error, ulp ...
        all 1 pass, ... s
        0
    """
    parser = argparse.ArgumentParser(prog="rewardops verify", description=__doc__)
    parser.add_argument(
        "--op", action="append", default=[], help="an op or a family (again for several); default all"
    )
    parser.add_argument(
        "--backend", action="append", default=[], choices=dispatch.BACKENDS, help="default all here"
    )
    parser.add_argument(
        "--device",
        help="default cuda if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--quick", action="store_true", help="few cases, no torch.compile")
    parser.add_argument("--json", action="store_true", help="the whole of it as JSON, instead of the table")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        rows = verify(args.op, args.backend, args.device, args.quick, sys.stderr)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    failed = [r for r in rows if not r.passes]
    if args.json:
        print(as_json(rows, seconds))
        return int(bool(failed))
    print(table(rows))
    for r in failed:
        print(f"\n{r.call} on {r.backend}:")
        for fault in r.faults[:5]:
            print(f"  {fault}")
        if len(r.faults) > 5:
            print(f"  and {len(r.faults) - 5} more")
    print()
    dispatch.show_config()
    verdict = f"{len(failed)} of {len(rows)} FAIL" if failed else f"all {len(rows)} pass"
    if elsewhere := sum(bool(r.elsewhere) for r in rows):
        verdict += f" ({elsewhere} of them not computed by the backend named)"
    print(f"\n{verdict}, {seconds:.0f} s")
    return int(bool(failed))
