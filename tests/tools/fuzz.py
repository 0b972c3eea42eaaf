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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import hypothesis
import torch
from fuzz_arguments import FUNCTIONS, Call, Fresh, calls, parameters
from fuzz_kinds import ABSENT
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import rewardops
from rewardops.core import dispatch
from rewardops.testing import Outcome, compare, evaluate

# ---- a call as a function of its numbers -------------------------------------------------------------------


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, f.name) for f in dataclasses.fields(result)]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in flat(part)]
    return []


PLACES = ("dense", "rows apart", "columns first", "every other")


def placed(x: Tensor, how: str) -> Tensor:
    """The same values in another memory layout, with NaN in the gaps; differentiable."""
    if x.dim() == 0 or how == "dense":
        return x
    if how == "columns first":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    hole = torch.full_like(x, torch.nan)
    if how == "rows apart":
        return torch.cat([x, hole[..., :1]], -1)[..., : x.shape[-1]]
    return torch.stack([hole, x], -1)[..., 1]


class Runner:
    """A call as a function of its floating-point tensors; ``plain`` selects the computation for the budget."""

    def __init__(self, call: Call, plain: bool = False) -> None:
        self.call, self.plain = call, plain
        self.names: list[tuple[str, str | None]] = []  # (argument, key in it)
        self.inputs: list[Tensor] = []
        for name, value in call.arguments.items():
            for key, x in value.items() if isinstance(value, dict) else [(None, value)]:
                if isinstance(x, Tensor) and x.is_floating_point() and name != "mask":
                    self.names.append((name, key))
                    self.inputs.append(x)
        # Seeded by the call alone, so that failures reproduce.
        self.seed = zlib.crc32(repr(call).encode())

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        device = leaves[0].device if leaves else torch.device("cpu")
        arguments = {name: _on(value, device) for name, value in self.call.arguments.items()}
        for k, ((name, key), leaf) in enumerate(zip(self.names, leaves, strict=True)):
            x = placed(leaf, PLACES[(self.seed >> 2 * k) % len(PLACES)])
            if key is None:
                arguments[name] = x
            else:
                arguments[name][key] = x
        torch.manual_seed(self.seed)  # for ops that draw random numbers
        return flat((PLAIN if self.plain else CHECKED)[self.call.name](**arguments))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Fresh):
        return torch.Generator().manual_seed(value.seed)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_on(v, device) for v in value]
    return value


# ---- what is checked of some functions, and what they are compared with ------------------------------------


def merged(**arguments: Any) -> Any:
    """Statistics merged from :func:`token_stats_partial`, as sums in records are relative to their maximum."""
    outputs = arguments.get("outputs", ("logprob", "entropy"))
    return rewardops.merge_token_stats(rewardops.token_stats_partial(**arguments)[None], outputs=outputs)


def of_the_part(
    *, tokens: Tensor, vocab_start: int = 0, vocab_size: int | None = None, **arguments: Any
) -> Any:
    """The reference for :func:`merged`: statistics of the columns of the part."""
    width = arguments["logits"].shape[-1]
    size = width if vocab_size is None else min(vocab_size - vocab_start, width)
    if size < 1:
        return merged(tokens=tokens, vocab_start=vocab_start, vocab_size=vocab_size, **arguments)
    ids = tokens.long() - vocab_start
    ids = torch.where((ids >= 0) & (ids < size), ids, -1).masked_fill(tokens == -100, -100)
    return rewardops.token_stats(tokens=ids, vocab_size=size, **arguments)


def _counts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens != -100 if mask is None else (tokens != -100) & (mask != 0)


def by_logits(
    *, hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None,
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    logit_scale: float = 1.0, chunk_tokens: int | None = None, chunk_vocab: int | None = None,
    num_tokens: int | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """The reference for :func:`linear_token_stats`, from all logits at once."""
    valid = _counts(tokens, arguments.get("mask"))[..., None]

    def logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(torch.where(valid, x, 0), w, b) * logit_scale

    if ref_hidden is not None and ref_weight is not None:
        arguments["ref_logits"] = logits(ref_hidden, ref_weight, ref_bias)
    stats = rewardops.token_stats if "vocab_start" not in arguments else of_the_part
    return stats(logits=logits(hidden, weight, bias), tokens=tokens, **arguments)


def loss_by_logits(
    *, coefficients: Mapping[str, Tensor], outputs: Sequence[str] = (), **arguments: Any
) -> Any:
    """The reference for :func:`linear_token_loss`, from all logits at once."""
    stats = by_logits(outputs=[*coefficients, *outputs], **arguments)
    valid = _counts(arguments["tokens"], arguments.get("mask"))
    terms = (torch.where(valid, c * getattr(stats, name), 0).sum() for name, c in coefficients.items())
    return sum(terms), [None if x is None else x.detach() for x in stats]


def linear_merged(**arguments: Any) -> Any:
    """Statistics merged from :func:`linear_token_stats_partial`."""
    outputs = arguments.get("outputs", ("logprob", "entropy"))
    return rewardops.merge_token_stats(
        rewardops.linear_token_stats_partial(**arguments)[None], outputs=outputs
    )


CHECKED = {**FUNCTIONS, "token_stats_partial": merged, "linear_token_stats_partial": linear_merged}
# References that compute in float64 for any input dtype: they give no budget for lower precision.
PLAIN = {
    **FUNCTIONS,
    "token_stats_partial": of_the_part,
    "linear_token_stats": by_logits,
    "linear_token_stats_partial": lambda **arguments: by_logits(**{"vocab_start": 0, **arguments}),
    "linear_token_loss": loss_by_logits,
}


# ---- valid calls -------------------------------------------------------------------------------------------

# Functions with results that are not per token, whatever their shape.
NOT_PER_TOKEN = {
    "budget_advantages", "budget_returns", "entropy_reward", "grpo_s_rewards", "merge_token_stats", "prefix_lcp",
    "row_mean", "row_sum", "segment_reduce", "tdpo_terms", "tree_advantages", "tree_values", "unlikeliness_rewards",
    "PrefixTree.from_tokens",
}  # fmt: skip


# Functions that draw random numbers, which differ between device and host.
RANDOM = {"clip_cov_mask"}


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
    **size: int,
) -> None:
    """Run ``count`` calls of a function and all invalid variants; raise on the smallest failure."""
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
                 max_width=args.max_width, max_vocab=args.max_vocab)  # fmt: skip
        except Exception:
            failed.append(name)
            print(f"\n==== {name}\n{traceback.format_exc(limit=-4)}", file=sys.stderr)
    print(
        f"{len(names)} functions in {time.perf_counter() - start:.0f} s: {tally.valid} valid calls "
        f"({tally.noisy} within noise), {tally.invalid} invalid ones; failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
