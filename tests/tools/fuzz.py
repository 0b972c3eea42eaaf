"""Random API calls: valid calls agree with the specification, invalid calls raise errors that name the argument.

``python tests/tools/fuzz.py --calls 10000`` fuzzes every function on a backend; ``tests/system/test_fuzz.py``
does the same with fewer calls. Arguments are drawn by ``fuzz_arguments.py`` through hypothesis, which shrinks
failures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import hypothesis
import torch
from fuzz_arguments import FUNCTIONS, Call, Fresh, calls, parameters
from fuzz_conditions import CHECKS as CONDITIONS
from fuzz_conditions import Check, one_of
from fuzz_kinds import ABSENT
from fuzz_runs import NOT_PER_TOKEN, RANDOM, Runner
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import rewardops
from rewardops.core import dispatch
from rewardops.testing import Outcome, compare, evaluate

# ---- valid calls -------------------------------------------------------------------------------------------


def eager_of(run: Runner, inputs: Sequence[Tensor]) -> Outcome:
    """The outcome that sets the budget: the computation in the precision of the inputs.

    For float64 there is no higher precision. Where terms cancel, the noise is measured instead: the change of the
    result when inputs are scaled down by a few units in the last place (which keeps order and ties).
    """
    if any(x.dtype is torch.float64 for x in inputs):
        nudged = [x * (1 - 2**-40) if x.dtype is torch.float64 else x for x in inputs]
        return evaluate(run, nudged, backend="reference")
    return evaluate(Runner(run.call, plain=True), inputs, backend="reference")


def noise_of(run: Runner, exact: Outcome) -> Outcome:
    """The rounding noise of the plain computation, as an outcome at that distance from the exact one.

    Eager's error is a single draw. With few results and cancelling terms it may be 0 by chance. The noise is 4
    times the worst of 8 draws, each with all inputs scaled down by a few units in the last place. For gradients
    it is at least a unit in the last place of 1, the magnitude of the upstream gradients; likewise for statistics
    of logits, whose terms are about 1.
    """
    wide = any(x.dtype is torch.float64 for x in run.inputs)
    unit = torch.finfo(torch.float64 if wide else torch.float32).eps
    worst = [unit if "outputs" in parameters(run.call.name) else 0.0] * len(exact.outputs)
    worst += [unit] * len(exact.gradients)
    for k in range(1, 9):
        inputs = [x * (1 - 4 * k * torch.finfo(x.dtype).eps) for x in run.inputs]
        there = evaluate(run, inputs, backend="reference", dtype=torch.float64)
        pairs = zip(itertools.chain(*there), itertools.chain(*eager_of(run, inputs)), strict=True)
        for i, (a, b) in enumerate(pairs):
            off = (a.double() - b.double()).abs()
            worst[i] = max([worst[i], *off[off.isfinite()].tolist()])
    far = iter(worst)
    return Outcome(*([x.double() + 4 * next(far) for x in side] for side in exact))


def check_valid(call: Call, backend: str, device: torch.device | str = "cpu") -> bool:
    """Check that results and gradients of a call agree with the specification, and are 0 where masked.

    Returns:
        True if one draw of eager's rounding was not enough.
    """
    run, valid = Runner(call), call.batch.rows.valid if call.takes("mask") else None
    exact = evaluate(run, run.inputs, backend="reference", dtype=torch.float64)
    eager = eager_of(run, run.inputs)
    with rewardops.debug(debuggable(call)):
        ours = evaluate(run, run.inputs, backend=backend, device=device, poison=valid)
    for k, (out, like) in enumerate(zip(ours.outputs, eager.outputs, strict=True)):
        assert out.dtype is like.dtype, f"output {k}: {out.dtype}, want {like.dtype}"
    if valid is not None:
        if call.name not in NOT_PER_TOKEN:
            for k, out in enumerate(ours.outputs):
                assert not _behind(valid, out).any(), f"output {k}: not 0 where masked"
        for (name, _), gradient in zip(run.names, ours.gradients, strict=False):
            if call.kind(name).per_token:
                assert not _behind(valid, gradient).any(), f"gradient of {name}: not 0 where masked"
    noisy = not all(comparison.error.passes for comparison in compare(ours, exact, eager))
    for comparison in compare(ours, exact, noise_of(run, exact)) if noisy else ():
        assert comparison.error.passes, comparison.error.fault
    return noisy


def _behind(valid: Tensor, x: Tensor) -> Tensor:
    """The masked elements of per-token values; none for other shapes."""
    return x.cpu()[~valid] if x.shape[: valid.dim()] == valid.shape else x.new_zeros(0)


def debuggable(call: Call) -> bool:
    """True if :func:`rewardops.debug` accepts the call: ids in range, no NaN for rows without a token."""
    tokens, valid = call["tokens"], call.batch.rows.valid
    if not call.batch.rows.live.all():
        return False
    if call["logits"] is ABSENT and call["hidden"] is ABSENT:
        return True
    size = call.arguments.get("vocab_size", call.batch.vocab)
    return bool(((tokens >= 0) & (tokens < size))[valid & (tokens != -100)].all())


# ---- invalid calls -----------------------------------------------------------------------------------------

CHECKS = {"path_ends"}  # ops that are checks: it finds cycles


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """A context in which no op may run except CHECKS: arguments are checked before any kernel runs."""
    plain = dispatch._implementation

    def implementation(backend: str, family: str, op: str) -> Any:
        assert op in CHECKS, f"{op} ran before the arguments were checked"
        return plain(backend, family, op)

    with mock.patch.object(dispatch, "_implementation", implementation):
        yield


def spoiled(call: Call) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Invalid variants of a call: each argument, passed or not, replaced by each invalid value."""
    for name, needed in parameters(call.name).items():
        for what, bad in call.kind(name).wrong(call, call[name], needed):
            yield name, what, {**call.arguments, name: bad}
    yield "nonsense", "no such argument", {**call.arguments, "nonsense": 1}


def fault_of(function: str, name: str, arguments: dict[str, Any]) -> str | None:
    """The fault in the rejection of a call with one invalid argument; None if it is right."""
    arguments = {k: torch.Generator() if isinstance(v, Fresh) else v for k, v in arguments.items()}
    try:
        with no_kernels():
            FUNCTIONS[function](**arguments)
    except (TypeError, ValueError) as error:
        named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error))
        return None if named else f"the message does not name it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def check_invalid(call: Call) -> int:
    """Check that every invalid variant of a valid call is rejected by name; return their number."""
    count = 0
    for name, what, arguments in spoiled(call):
        count += 1
        fault = fault_of(call.name, name, arguments)
        assert fault is None, f"{name} ({what}): {fault}"
    return count


# ---- many calls --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """Counts of the calls run."""

    valid: int = 0
    invalid: int = 0
    conditions: int = 0  # further runs of valid calls, as fuzz_conditions.py has them
    noisy: int = 0  # valid calls for which one draw of eager's rounding was not enough


def fuzz(
    name: str,
    count: int,
    tally: Tally,
    *,
    backend: str,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    shrink: bool = True,
    conditions: Callable[[Call], Sequence[Check]] = one_of,
    **size: int,
) -> None:
    """Run ``count`` calls of a function and all invalid variants; raise on the smallest failure.

    On a CPU each call is run under some ``conditions`` as well.
    """
    on_device = torch.device(device).type != "cpu"
    if on_device and name in RANDOM:
        return

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(name, on_device=on_device, **size))
    def check(call: Call) -> None:
        tally.valid += 1
        tally.noisy += check_valid(call, backend, device)
        tally.invalid += check_invalid(call)
        for condition in () if on_device else conditions(call):
            tally.conditions += 1
            condition(call, backend)

    (check if seed is None else hypothesis.seed(seed)(check))()


def _progress(names: list[str]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names, unit="function", disable=None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000, help="valid calls, over all functions")
    parser.add_argument("--backend", default="cpp", help="what is held to the reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", action="store_true", help="no calls under other conditions")
    parser.add_argument("--seed", type=int, help="for other calls than without it")
    parser.add_argument("--only", default="", help="functions with this in their name")
    parser.add_argument("--max-width", type=int, default=129, help="tokens of a row")
    parser.add_argument("--max-vocab", type=int, default=1025)
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    names = [name for name in FUNCTIONS if args.only in name]
    each = max(args.calls // max(len(names), 1), 1)
    failed, tally, start = [], Tally(), time.perf_counter()
    for name in _progress(names):
        try:
            fuzz(name, each, tally, backend=args.backend, device=args.device, seed=args.seed,
                 max_width=args.max_width, max_vocab=args.max_vocab,
                 conditions=lambda call: () if args.plain else CONDITIONS)  # fmt: skip
        except Exception:
            failed.append(name)
            print(f"\n==== {name}\n{traceback.format_exc(limit=-4)}", file=sys.stderr)
    print(
        f"{len(names)} functions in {time.perf_counter() - start:.0f} s: {tally.valid} valid calls "
        f"({tally.noisy} within noise), {tally.invalid} invalid ones, "
        f"{tally.conditions} under other conditions; failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
