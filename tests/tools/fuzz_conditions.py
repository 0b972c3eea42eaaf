"""What must not change a call, and what must show in it, for any valid call of any function.

The default dtype and device of the process; memory that tensors share; a row's place in the batch; a number as a
tensor of no dimensions, or moved from step to step under ``torch.compile``: the results are the same. An infinity,
a NaN, a huge or a tiny number shows alike on every backend. A raw op refuses a tensor it does not expect.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from fuzz_arguments import CHANNEL_WEIGHTS, FUNCTIONS, Call, parameters
from fuzz_kinds import ABSENT, Either, Number
from fuzz_raw import Recorder, check_refused_or_right, places, spoiled
from fuzz_runs import RANDOM, Place, Runner, flat
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rewardops import use_backend
from rewardops.testing import Outcome, evaluate, same_bits


def chance(call: Call, salt: str) -> random.Random:
    """Draws that follow from the call alone, so that failures reproduce and shrink."""
    return random.Random(f"{Runner(call).seed} {salt}")


def differing(call: Call, **changed: Any) -> Call:
    """The call with other arguments."""
    other = Call(call.name, call.batch)
    other.arguments = {**call.arguments, **changed}
    return other


Result = Outcome | str


def result_of(run: Runner, inputs: list[Tensor], **options: Any) -> Result:
    """Outputs and gradients, or the error by which the call was refused."""
    try:
        return evaluate(run, inputs, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def close(ours: Result, wanted: Result, what: str, tolerance: float = 1e-4) -> None:
    """Equal errors; or NaN, infinities and, but for rounding, numbers at the same places."""
    if isinstance(ours, str) or isinstance(wanted, str):
        assert ours == wanted, f"{what}: got {ours}, want {wanted}"
        return
    # What is small beside the largest number is what is left of terms that cancel.
    scale = min(max((float(x.detach()[x.isfinite()].abs().max()) for x in (*wanted.outputs, *wanted.gradients)
                     if x.is_floating_point() and x.isfinite().any()), default=1.0), 1.0)  # fmt: skip
    for kind, mine, theirs in zip(("output", "gradient"), ours, wanted, strict=True):
        assert len(mine) == len(theirs), f"{what}: {len(mine)} {kind}s, want {len(theirs)}"
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a, b = a.detach().cpu().double(), b.detach().cpu().double()
            differ = (a.isnan() != b.isnan()) | ((a != b) & (a.isinf() | b.isinf()) & ~a.isnan() & ~b.isnan())
            if kind == "gradient":
                differ &= ~(b.isnan() & (a == 0))  # the reference multiplies NaN by a gradient of 0
            where = f"{what}: {kind} {k}"
            if differ.any():
                at = differ.nonzero()[0].tolist()
                raise AssertionError(f"{where} at {at}: not finite: {a.tolist()}, want {b.tolist()}")
            finite = b.isfinite() & a.isfinite()
            torch.testing.assert_close(
                a[finite], b[finite], rtol=tolerance, atol=tolerance * scale,
                msg=lambda m, where=where: f"{where}: {m}",
            )  # fmt: skip


def tolerance_of(inputs: list[Tensor]) -> float:
    """Several units in the last place of the least precise input, at least those of float32's sums."""
    return max([1e-4, *(16 * torch.finfo(x.dtype).eps for x in inputs)])


# ---- the defaults of the process ---------------------------------------------------------------------------

DTYPES = ("bfloat16", "float16", "float64")


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    """Another default dtype, or the default device ``meta``."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_defaults(call: Call, backend: str) -> None:
    """Check that results have the same bits under other defaults."""
    run = Runner(call)
    want = evaluate(run, run.inputs, backend=backend)
    for name in ("meta", chance(call, "defaults").choice(DTYPES)):
        try:
            with default(name):
                got = evaluate(run, run.inputs, backend=backend)
        except Exception as error:
            raise AssertionError(f"the default {name}: {type(error).__name__}: {error}") from error
        assert same_bits(got, want), f"the default {name} changes the result: {got}, want {want}"


# ---- shared memory -----------------------------------------------------------------------------------------


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() and len(x) else x


def windows(x: Tensor) -> Tensor:
    """Rows that begin one element after each other."""
    if x.dim() < 2 or not x.numel():
        return x
    inner = x.contiguous()
    return inner.as_strided(x.shape, (1, *inner.stride()[1:]))


def shifted(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The first tensor, and in place of the second the same memory, from the next row on."""
    base = torch.cat([x, x[:1]])
    return base[:-1], base[1:]


def sharing(draw: random.Random) -> Place:
    """A way to lay out the inputs so that memory is shared, in a tensor or by two."""
    way = draw.choice(("expanded", "windows", "shifted", "one"))
    first = draw.random()

    def place(leaves: list[Tensor]) -> list[Tensor]:
        out = list(leaves)
        if not leaves:
            return out
        k = int(first * len(leaves))
        like = [j for j, x in enumerate(leaves) if j != k and x.shape == leaves[k].shape and x.dim() and len(x)
                and x.dtype is leaves[k].dtype]  # fmt: skip
        if way == "shifted" and like:
            out[k], out[like[0]] = shifted(leaves[k], leaves[like[0]])
        elif way == "one" and like:
            out[like[0]] = out[k]
        else:
            out[k] = windows(leaves[k]) if way == "windows" else expanded(leaves[k])
        return out

    return place


IN_PLACE = ("inplace", "inplace_backward")


def check_sharing(call: Call, backend: str) -> None:
    """Check that inputs that share memory give the result of copies, or are refused where they are written over."""
    place = sharing(chance(call, "sharing"))

    def apart(leaves: list[Tensor]) -> list[Tensor]:
        return [x.clone(memory_format=torch.contiguous_format) for x in place(leaves)]

    inputs = Runner(call).inputs
    got = result_of(Runner(call, place=place), inputs, backend=backend)
    want = result_of(Runner(call, place=apart), inputs, backend=backend)
    if isinstance(got, str) and not isinstance(want, str):
        writes = any(call[name] is True for name in IN_PLACE)
        refused = writes and got.startswith("ValueError: inplace: got True with ")
        assert refused, f"shared memory: {got}"
        return
    close(got, want, "shared memory")


# ---- numbers that are not finite, and those near the limits ---------------------------------------------------


def extremes(dtype: torch.dtype) -> dict[str, float]:
    info = torch.finfo(dtype)
    return {
        "infinity": float("inf"), "minus infinity": float("-inf"), "NaN": float("nan"),
        "a huge number": info.max / 64, "a tiny number": info.tiny * 2,
    }  # fmt: skip


def places_of(call: Call, x: Tensor) -> Tensor:
    """Indices of the elements of an input that count, in its flat order."""
    rows = call.batch.rows
    counts = torch.ones(x.shape, dtype=torch.bool)
    for valid in (rows.valid, rows.live):
        if x.dim() >= valid.dim() and x.shape[: valid.dim()] == valid.shape:
            counts = counts & valid.view(*valid.shape, *[1] * (x.dim() - valid.dim()))
            break
    return counts.flatten().nonzero()[:, 0]


def with_number(call: Call, salt: str) -> tuple[str, list[Tensor]] | None:
    """The inputs with an extreme number at a place that counts, and what it is; None for a call without any."""
    draw, run = chance(call, salt), Runner(call)
    spots = [(k, found) for k, x in enumerate(run.inputs) if len(found := places_of(call, x))]
    if not spots:
        return None
    k, found = draw.choice(spots)
    name, number = draw.choice(sorted(extremes(run.inputs[k].dtype).items()))
    spot = int(found[draw.randrange(len(found))])
    inputs = [x.clone(memory_format=torch.contiguous_format) for x in run.inputs]
    inputs[k].view(-1)[spot] = number
    return f"{name} in {run.names[k][0]} at {spot}", inputs


def check_extremes(call: Call, backend: str) -> None:
    """Check that an extreme number shows alike on backend and reference."""
    found = with_number(call, "extremes")
    if found is None:
        return
    what, inputs = found
    run = Runner(call)
    wide = torch.float64 if backend == "reference" else None
    got = result_of(run, inputs, backend=backend)
    want = result_of(run, inputs, backend="reference", dtype=wide)
    close(got, want, what, tolerance_of(inputs))


# ---- rows in another order ---------------------------------------------------------------------------------

# Of other things than rows, or by the first of equals.
NOT_OF_ROWS = {"weight", "ref_weight", "bias", "ref_bias", "probs"}
IN_ORDER = {
    "clip_cov_mask", "kl_cov_mask", "high_entropy_mask", "merge_token_stats", "tree_advantages", "tree_values",
    "prefix_lcp", "PrefixTree.from_tokens", "prefix_values", "budget_advantages",
    "unlikeliness_rewards",
}  # fmt: skip


def permuted(value: Any, order: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == len(order):
        return value[order]
    if isinstance(value, np.ndarray):
        return value[order.numpy()]
    if isinstance(value, dict):
        return {k: permuted(v, order) for k, v in value.items()}
    if isinstance(value, list) and len(value) == len(order) and all(isinstance(v, str) for v in value):
        return [value[k] for k in order.tolist()]
    return value


def check_permuted(call: Call, backend: str) -> None:
    """Check that padded rows in another order have their results in that order, extreme numbers among them."""
    size = call.batch.size
    if call.name in IN_ORDER or size < 2 or call["cu_seqlens"] is not ABSENT:
        return
    if call["group_size"] is not ABSENT:
        return
    draw = chance(call, "permuted")
    found = with_number(call, "permuted") if draw.random() < 0.5 else None
    arguments = dict(call.arguments)
    run = Runner(call)
    for (name, key), x in zip(run.names, found[1] if found else run.inputs, strict=True):
        arguments[name] = x if key is None else {**arguments[name], key: x}
    order = torch.tensor(draw.sample(range(size), size), device="cpu")
    fixed = {k for k in arguments if k in NOT_OF_ROWS or call.kind(k) is CHANNEL_WEIGHTS}
    moved = {k: v if k in fixed else permuted(v, order) for k, v in arguments.items()}
    results = []
    for given in (arguments, moved):
        run = Runner(differing(call, **given), place=list)
        try:
            with use_backend(backend):
                results.append(run(*(x.clone() for x in run.inputs)))
        except (TypeError, ValueError) as error:
            results.append(type(error))
    want, got = results
    if isinstance(want, type):
        assert got is want, f"rows in another order: {got}, want {want}"
        return
    want = [x[order] if x.dim() and len(x) == size else x for x in want]
    close(Outcome(got, []), Outcome(want, []), f"rows in another order, {found and found[0]}",
          tolerance_of(run.inputs))  # fmt: skip


# ---- options that are numbers ------------------------------------------------------------------------------


def numbers_of(call: Call) -> dict[str, list[float]]:
    """The names of a call's numbers, each with numbers between two that are valid."""
    found = {}
    for name in parameters(call.name):
        kind = call.kind(name)
        kind = kind.number if isinstance(kind, Either) else kind
        value = call[name]
        if (
            not isinstance(kind, Number)
            or isinstance(value, (Tensor, bool))
            or not isinstance(value, (int, float))
        ):
            continue
        valid = sorted({float(v) for v in kind.values if v is not None and abs(v) < float("inf")})
        low, high = valid[-2:]
        found[name] = [low + (high - low) * part for part in (0.2, 0.4, 0.6, 0.7, 0.8)]
    return found


def check_numbers(call: Call, backend: str) -> None:
    """Check that numbers may be tensors of no dimensions."""
    names = list(numbers_of(call))
    if not names:
        return
    inputs = Runner(call).inputs
    tensors = {name: torch.tensor(call[name], dtype=torch.float64, device="cpu") for name in names}
    run, other = Runner(call, place=list), Runner(call, place=list)
    other.call = differing(call, **tensors)
    got = result_of(other, inputs, backend=backend)
    close(got, result_of(run, inputs, backend=backend), f"{', '.join(names)} as tensors", 1e-6)


def check_compiled(call: Call, backend: str) -> bool:
    """Check that one graph for constants and one for all other values serve a call whose numbers move.

    Returns:
        False for calls without numbers, or without inputs that are differentiable.
    """
    numbers = numbers_of(call)
    run = Runner(differing(call, **({"groups": call.batch.labels} if call["groups"] is not ABSENT else {})))
    if not numbers or call.name in RANDOM:
        return False
    fn, fixed = FUNCTIONS[call.name], run.call.arguments

    def step(leaves: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
        arguments = {**fixed, **given}
        for (name, key), x in zip(run.names, leaves, strict=True):
            arguments[name] = x if key is None else {**arguments[name], key: x}
        return flat(fn(**arguments))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for k in range(5):
        given = {name: values[k] for name, values in numbers.items()}
        got, want = (
            evaluate(lambda *leaves, f=f, given=given: f(list(leaves), given), run.inputs, backend=backend)
            for f in (compiled, step)
        )
        close(got, want, f"compiled with {given}", tolerance_of(run.inputs))
    assert counter.frame_count <= 3, f"{counter.frame_count} graphs for the numbers {', '.join(numbers)}"
    return True


# ---- raw ops -----------------------------------------------------------------------------------------------


HALVES = (torch.float16, torch.bfloat16)


def check_raw(call: Call, backend: str) -> None:
    """Check that each raw op of a call refuses a tensor of another dtype, shape or layout, or takes it right."""
    run = Runner(call)
    with Recorder() as recorder:
        evaluate(run, run.inputs, backend=backend)
    draw = chance(call, "raw")
    for (op, _), args in recorder.seen.items():
        found = list(places(op, args))
        if found:
            name, tensor, put = draw.choice(found)
            other = draw.choice(list(spoiled(tensor)))
            what = f"{op} with {name} {other.dtype}{list(other.shape)} of {tensor.dtype}{list(tensor.shape)}"
            check_refused_or_right(op, put(other), backend, what, rounded=other.dtype in HALVES)


Check = Callable[[Call, str], None]
# All but that of compilation, which takes seconds.
CHECKS: tuple[Check, ...] = (
    check_defaults, check_sharing, check_extremes, check_permuted, check_numbers, check_raw,
)  # fmt: skip


def one_of(call: Call) -> tuple[Check, ...]:
    """One of the checks: as many calls are drawn, each checks all of them."""
    return (chance(call, "check").choice(CHECKS),)
