"""The table of arguments: what each argument of each function is.

Arguments mean the same all over the API, so a name is enough (``ARGUMENTS``), but for the few that mean something
else in some function (``OVERRIDES``). A new function needs nothing here unless it brings a new argument.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fuzz_kinds import (
    ABSENT,
    Array,
    Bad,
    Batch,
    Choice,
    Coefficients,
    Either,
    Flag,
    GroupSize,
    Kind,
    Labels,
    Made,
    Make,
    Mask,
    Number,
    Offsets,
    Outputs,
    Rewards,
    Whole,
    first_as,
    longer,
    per_row,
    per_token,
    strangers,
)  # fmt: skip
from hypothesis import strategies as st
from torch import Tensor

import rewardops
from rewardops import advantages
from rewardops.reference.advantages import BASELINES, SCALES
from rewardops.reference.kl import ESTIMATORS
from rewardops.reference.logits import OUTPUTS
from rewardops.reference.segments import REDUCTIONS
from rewardops.testing import strategies as some

# ---- functions ---------------------------------------------------------------------------------------------

# What is public and computes nothing by itself.
NOT_FUZZED = {
    "BackendUnavailable", "DedupStats", "PrefixLcp", "PrefixTree", "PrefixValues", "TokenStats", "debug",
    "show_config", "use_backend",
}  # fmt: skip


def _functions() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(rewardops, name) for name in rewardops.__all__}
    for name in advantages.__all__:
        if name not in found:
            found[f"advantages.{name}"] = getattr(advantages, name)
    found["PrefixTree.from_tokens"] = rewardops.PrefixTree.from_tokens
    return {name: fn for name, fn in found.items() if name not in NOT_FUZZED}


FUNCTIONS = _functions()

# Where **options go on to, and what of it is settled there.
FORWARDED: dict[str, tuple[str, dict[str, str]]] = {
    "linear_token_loss": ("linear_token_stats", {}),
    "advantages.grpo": ("group_advantages", {}),
    "advantages.dr_grpo": ("group_advantages", {"scale": "none"}),
    "advantages.rloo": ("group_advantages", {"baseline": "leave_one_out", "scale": "none"}),
    "advantages.lite_ppo": ("group_advantages", {"scale": "batch_std"}),
    "advantages.opo": ("group_advantages", {"baseline": "length_weighted", "scale": "none"}),
    "advantages.pass_at_k": ("group_advantages", {"baseline": "second_max"}),
    "advantages.max_rl": ("group_advantages", {"scale": "mean_abs"}),
    "advantages.gpg": ("group_advantages", {"weights": ""}),
    "advantages.gdpo": ("group_advantages", {}),
    "advantages.gtpo": ("gtpo_rewards", {}),
    "advantages.grpo_s": ("grpo_s_rewards", {}),
    "advantages.reinforce_plus_plus_baseline": ("group_advantages", {"scale": "none", "eps": "", "ddof": ""}),
}


def parameters(name: str) -> dict[str, bool]:
    """The arguments of a function, those of its ``**options`` too, and whether one must be given."""
    found = {}
    for key, p in inspect.signature(FUNCTIONS[name]).parameters.items():
        if p.kind is not p.VAR_KEYWORD:
            found[key] = p.default is p.empty
            continue
        target, settled = FORWARDED[name]
        further = (k for k, needed in parameters(target).items() if not needed)
        found.update({k: False for k in further if k not in (*found, *settled)})
    return found


class Call:
    """A function, and its arguments by name."""

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.batch = name, batch
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name, ABSENT)

    def setting(self, name: str) -> Any:
        """An argument that is given, or that a preset gives to the function behind it, or ABSENT."""
        return self.arguments.get(name, FORWARDED.get(self.name, ("", {}))[1].get(name, ABSENT))

    def takes(self, name: str) -> bool:
        return name in parameters(self.name)

    def kind(self, name: str) -> Kind:
        return OVERRIDES.get((self.name, name)) or ARGUMENTS[name]

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={_written(v)}" for k, v in self.arguments.items())
        return f"{self.name}({given})"


def _written(value: Any) -> str:
    """An argument as it is written, as far as that is short."""
    if isinstance(value, Tensor):
        if value.numel() > 64 or value.is_meta:
            return f"<{value.dtype}{list(value.shape)}>"
        return f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_written(v)}" for k, v in value.items()) + "}"
    return repr(value)


class Fresh:
    """A generator, made anew for every run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __repr__(self) -> str:
        return f"torch.Generator().manual_seed({self.seed})"


# ---- logits and hidden states ------------------------------------------------------------------------------


def _logits(call: Call) -> st.SearchStrategy[Tensor]:
    """NaN where masked and in columns that are padding; every row has mass in those that are not."""
    rows, vocab = call.batch.rows, call.batch.vocab
    start, end = call.arguments.get("vocab_start", 0), call.arguments.get("vocab_size", math.inf)
    size = min(max(end - start, 0), vocab)

    def make(x: Tensor) -> Tensor:
        empty = (x[..., :size] == -torch.inf).all(-1)
        x[..., :1][empty] = 1.0
        x[..., size:] = torch.nan
        return torch.where(rows.valid[..., None], x, torch.nan)

    dtype = st.just(call.batch.dtype) | some.dtypes()
    return dtype.flatmap(lambda d: some.logits(rows.shape, vocab, dtype=d)).map(make)


def _ids(call: Call) -> st.SearchStrategy[Tensor]:
    """Columns of the logits; behind the mask, and at some tokens, ids that are none, and -100."""
    rows, vocab = call.batch.rows, call.batch.vocab

    def make(generator: torch.Generator, dtype: torch.dtype, outside: bool) -> Tensor:
        ids = torch.randint(0, vocab, rows.shape, generator=generator)
        odd = torch.tensor([-100, -1, vocab, 30000])[torch.randint(0, 4, rows.shape, generator=generator)]
        seldom = outside & (torch.rand(rows.shape, generator=generator) < 0.2)
        return torch.where(rows.valid & ~seldom, ids, odd).to(dtype)

    return st.builds(make, some.generators(), st.sampled_from(some.INTEGERS), st.booleans())


def _temperatures(call: Call) -> st.SearchStrategy[Tensor]:
    """For all, per row or per token, where what is masked may be anything."""
    rows = call.batch.rows
    forms = [(), rows.shape, *([rows.shape[:1], (rows.batch, 1)] if len(rows.shape) == 2 else [])]

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found = torch.rand(shape, generator=generator) + 0.5
        return torch.where(rows.valid, found, torch.nan) if shape == rows.shape else found

    return st.builds(make, st.sampled_from(forms), some.generators())


def _betas(call: Call) -> st.SearchStrategy[Tensor]:
    """For all, per row or per token, where what is masked may be anything."""
    rows = call.batch.rows
    forms = [(), rows.shape, *([rows.shape[:1]] if len(rows.shape) == 2 else [])]

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found = torch.rand(shape, generator=generator)
        return torch.where(rows.valid, found, torch.nan) if shape == rows.shape else found

    return st.builds(make, st.sampled_from(forms), some.generators())


HIDDEN, REF_HIDDEN = 5, 3


def _hidden(width: int) -> Make:
    def make(call):
        rows = call.batch.rows
        made = some.numbers((*rows.shape, width), ("normal", "zero", "quarters"), dtype=call.batch.dtype)
        return made.map(lambda x: torch.where(rows.valid[..., None], x, torch.nan))

    return make


def _head(*width: int, beside: str | None = None) -> Make:
    """Of the vocabulary; only where another argument is given."""

    def make(call):
        if beside is not None and call[beside] is ABSENT:
            return None
        return some.numbers((call.batch.vocab, *width), ("normal", "zero"), dtype=call.batch.dtype)

    return make


def _counted(call: Call) -> st.SearchStrategy[int]:
    """At least the tokens that ``linear_token_stats`` counts."""
    count = int((call.batch.rows.valid & (call["tokens"] != -100)).sum())
    return st.integers(count, count + 9)


def _vocab(call: Call) -> int:
    return call.batch.vocab


def _asks_for_jsd(call: Call) -> bool:
    return any("jsd" in call[key] for key in ("outputs", "coefficients") if call[key] is not ABSENT)


def _records(call: Call) -> st.SearchStrategy[Any]:
    """Of the parts of rows of logits, cut at columns."""
    rows, vocab = call.batch.rows, call.batch.vocab

    def make(x: Tensor, ref: Tensor, ids: Tensor, cuts: list[int], stacked: bool) -> Any:
        bounds = itertools.pairwise(sorted({0, *cuts, vocab}))
        parts = [
            rewardops.token_stats_partial(
                x[..., a:b],
                ids,
                vocab_start=a,
                ref_logits=ref[..., a:b],
                outputs=OUTPUTS[:-1],
                vocab_size=vocab,
            )
            for a, b in bounds
        ]
        return torch.stack(parts) if stacked else parts

    logits, cuts = some.logits(rows.shape, vocab), st.lists(st.integers(1, vocab), max_size=2)
    return st.builds(make, logits, logits, _ids(call), cuts, st.booleans())


def _bad_records(call: Call, value: Any) -> Bad:
    parts = value if isinstance(value, Tensor) else torch.stack(value)
    yield from strangers()
    yield from (("nothing", []), ("words", ["x"]), ("of float32", parts.float()), ("no part", parts[:0]))
    yield "of complex numbers", parts.to(torch.complex128)
    yield "a field too few", parts[..., :-1]
    yield "of one dimension", parts.new_zeros(14)
    yield "of several shapes", [parts[0], parts.new_zeros((1, 1, 1, 14))]


def _bad_dtypes(call: Call, value: Any) -> Bad:
    yield from strangers()
    yield from (("a name", "float32"), ("of integers", torch.int64), ("of complex numbers", torch.complex64))


# ---- scans, steps and groups -------------------------------------------------------------------------------


def _factors(call: Call) -> st.SearchStrategy[Tensor]:
    """A factor from 0 to 1 per row, or per token, where what is masked may be anything."""
    rows = call.batch.rows
    of_rows = some.numbers((rows.batch,), ("fraction", "zero or one"))
    if call["masked"] == "step" or rows.shape == (rows.batch,):
        return of_rows
    tokens = some.numbers(rows.shape, ("fraction", "zero or one"))
    return of_rows | tokens.map(lambda x: torch.where(rows.valid, x, torch.nan))


def _steps(call: Call) -> st.SearchStrategy[Tensor]:
    return some.steps(call.batch.rows)


def _columns(call: Call) -> st.SearchStrategy[Tensor]:
    """A few numbers per row."""
    return st.integers(0, 4).flatmap(lambda n: some.numbers((call.batch.size, n), dtype=call.batch.dtype))


def _packed_tokens(call: Call) -> st.SearchStrategy[int] | None:
    rows = call.batch.rows
    return None if rows.cu_seqlens is None else st.just(rows.shape[0])


class NumTokens(Whole):
    """How many packed tokens there are."""

    def __init__(self) -> None:
        super().__init__(_packed_tokens, 0)

    def wrong(self, call, value, needed):
        yield from super().wrong(call, value, needed)
        yield "one more", call.batch.rows.shape[0] + 1  # or without offsets


def _lengths(call: Call) -> st.SearchStrategy[Tensor] | None:
    if call.setting("baseline") != "length_weighted":
        return None
    return some.numbers((call.batch.size,), ("positive",))


def _no_lengths(call: Call) -> bool:
    """Whether nothing else says how long rows are."""
    return call.setting("baseline") == "length_weighted" and {call["mask"], call["cu_seqlens"]} == {ABSENT}


def _bad_amounts(size: int) -> Bad:
    yield "of complex numbers", torch.ones(size, dtype=torch.complex64)
    yield "one more", torch.ones(size + 1)
    yield "another rank", torch.ones(1, size)
    yield "another device", torch.ones(size, device="meta")
    if size:
        yield "negative", -torch.ones(size)


def _bad_lengths(call: Call, value: Any) -> Bad:
    size = call.batch.size
    yield from strangers("a tensor", *([] if _no_lengths(call) else ["None"]))
    if call.setting("baseline") != "length_weighted":
        yield "without a use", torch.ones(size)
        return
    for what, bad in _bad_amounts(size):
        if what != "negative" or bool(
            call.batch.rows.live.any()
        ):  # lengths of rows without a token do not matter
            yield what, bad


class Baseline(Choice):
    """``baseline`` of :func:`group_advantages`: a name, a quantile, or a tensor with one value per row."""

    def __init__(self) -> None:
        super().__init__(
            [b for b in BASELINES if b not in ("quantile", "values")], also=("number", "a tensor")
        )

    def draw(self, draw, call, needed):
        kind = draw(st.sampled_from(("name", "quantile", "tensor")))
        if kind == "name":
            return super().draw(draw, call, needed)
        if kind == "quantile":
            return draw(st.sampled_from((0.0, 0.25, 0.5, 0.9, 1, 1.0)))
        return draw(some.numbers((call.batch.size,), dtype=call.batch.dtype))

    def wrong(self, call, value, needed):
        yield from strangers("a number", "a tensor")
        yield from (("no such name", "nonsense"), ("above 1", 1.5), ("below 0", -0.25), ("a list", ["mean"]))
        yield "the name of a tensor", "values"
        if isinstance(value, Tensor):
            yield "of integers", torch.zeros(value.shape, dtype=torch.int64)
            yield "one more", longer(value, 0)
            yield "another rank", value[None]
            yield "another device", value.to("meta")


def _channel_weights(call: Call) -> st.SearchStrategy[Any] | None:
    if call["rewards"].dim() == 1:
        return None
    made = some.numbers((call["rewards"].shape[1],), ("normal", "zero"))
    return made | made.map(Tensor.tolist)


def _asks_for_channels(call: Call) -> bool:
    """Whether rewards without weights could be per token; those of ``gdpo`` only if they have the mask's shape."""
    rewards, mask = call["rewards"], call["mask"]
    if call.takes("whitening"):
        return isinstance(mask, Tensor) and mask.shape == rewards.shape and call["cu_seqlens"] is ABSENT
    return rewards.dim() == 2


def _bad_channel_weights(call: Call, value: Any) -> Bad:
    yield from strangers("None", "a list", "a tensor")
    if call["rewards"].dim() == 1:
        yield "for one reward", [1.0]
        return
    count = call["rewards"].shape[1]
    yield "too many", [1.0] * (count + 1)
    yield "a tensor of too many", torch.ones(count + 1)
    yield "another rank", torch.ones(1, count)
    yield "words", ["x"] * max(count, 1)
    yield "of complex numbers", torch.ones(count, dtype=torch.complex64)


def _probs(call: Call) -> st.SearchStrategy[Any]:
    positive = some.numbers((call["scores"].shape[1],), ("positive",))
    return positive | positive.map(Tensor.tolist)


def _bad_probs(call: Call, value: Any) -> Bad:
    count = call["scores"].shape[1]
    yield from strangers("None", "a list", "a tensor")
    yield "too many", [0.5] * (count + 1)
    yield "words", ["x"] * max(count, 1)
    yield "of complex numbers", torch.ones(count, dtype=torch.complex64)
    yield "another rank", torch.ones(1, count)
    if count:
        yield from (
            ("negative", [-1.0] * count),
            ("zero", [0.0] * count),
            ("NaN", torch.full((count,), math.nan)),
        )


def _clamps(call: Call) -> st.SearchStrategy[Any]:
    return st.sampled_from((None, 0.75, 20, (20.0, 10.0), [0.75, 1.5], (math.inf, 2.0)))


def _bad_clamps(call: Call, value: Any) -> Bad:
    yield from strangers("None", "a number", "a whole number")
    yield from (
        ("zero", 0.0),
        ("negative", -1.0),
        ("three", (1.0, 2.0, 3.0)),
        ("none", ()),
        ("a word", (1.0, "x")),
    )
    yield from (("a negative one", (1.0, -1.0)), ("a flag and a number", (True, 1.0)))


def _ratio_caps(call: Call) -> st.SearchStrategy[float] | None:
    return None if call["old_logprob"] is ABSENT else st.sampled_from((0.5, 1, 3.0))


def _bad_ratio_caps(call: Call, value: Any) -> Bad:
    yield from strangers("None", "a number", "a whole number")
    yield from (("zero", 0.0), ("negative", -1.0), ("infinite", math.inf), ("NaN", math.nan))
    if call["old_logprob"] is ABSENT:
        yield "without old_logprob", 2.0


def _generators(call: Call) -> st.SearchStrategy[Fresh]:
    return st.integers(0, 2**31 - 1).map(Fresh)


# ---- trees of parents --------------------------------------------------------------------------------------


def _parents(call: Call) -> st.SearchStrategy[Tensor]:
    """Chains, stars, roots alone and forests, their nodes in any order."""

    def make(kind: str, size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        own = torch.arange(size)
        ups = {
            "forest": (torch.rand(size, generator=generator) * (own + 1)).floor().long() - 1,
            "chain": own - 1,
            "star": torch.where(own == 0, -1, 0),
            "roots": torch.full((size,), -1),
        }
        up, order = ups[kind], torch.randperm(size, generator=generator)
        moved = torch.empty_like(up)
        moved[order] = torch.where(up < 0, -1, order[up.clamp(min=0)])
        return moved.to(dtype)

    kinds = st.sampled_from(("forest", "chain", "star", "roots"))
    return st.builds(make, kinds, st.integers(0, 9), some.generators(), st.sampled_from(some.INTEGERS))


def _bad_parents(call: Call, value: Tensor) -> Bad:
    yield from strangers()
    yield from (("of floats", value.float()), ("of complex numbers", value.to(torch.complex64)))
    yield from (
        ("one more", longer(value)),
        ("another rank", value[None]),
        ("another device", value.to("meta")),
    )
    if len(value):
        yield from (("no such node", first_as(value, len(value))), ("below -1", first_as(value, -2)))
        yield "its own parent", first_as(value, 0)
    if len(value) > 1:
        yield "a cycle", torch.cat([value.new_tensor([1, 0]), value[2:]])


def _leaf_rewards(call: Call) -> st.SearchStrategy[Tensor]:
    return some.numbers((len(call["parent"]),), dtype=call.batch.dtype)


def _visits(call: Call) -> st.SearchStrategy[Any]:
    floats = some.numbers((len(call["parent"]),), ("positive", "zero or one"))
    return st.sampled_from((None, "leaves")) | floats | floats.map(lambda x: x.round().long())


def _bad_visits(call: Call, value: Any) -> Bad:
    size = len(call["parent"])
    yield from strangers("None", "a tensor")
    yield from _bad_amounts(size)


# ---- the table ---------------------------------------------------------------------------------------------

FRACTIONS = (0.0, 0.5, 0.9, 1.0, 1)
FRACTION = Number(*FRACTIONS, 0.2, least=0, most=1)
FACTOR = Either(
    Number(*FRACTIONS, least=0, most=1, also=("a tensor",)),
    Array(_factors, dtypes="real"),
    1.5,
    lambda call: call.batch.rows.valid,
)
TRACE = Either(
    Number(*FRACTIONS, 1.5, least=0, also=("a tensor",)),
    Array(_factors, dtypes="real"),
    -0.5,
    lambda call: call.batch.rows.valid,
)
TEMPERATURE = Either(
    Number(0.5, 1, 2.5, above=0, also=("a tensor",)),
    Array(_temperatures),
    0.0,
    lambda call: call.batch.rows.valid & (call["tokens"] != -100),
)
CLIP = Number(0.5, 1.0, 2, least=0, none=True)
NON_NEGATIVE = Number(0.0, 1e-6, 0.25, 1, least=0)
POSITIVE = Number(0.25, 0.5, 1.0, 2, above=0)
ANY = Number(-1.0, 0.0, 0.1, 0.5, 1)
LOGPROB = per_token("log-probability", "zero")
LOGPROB_FIRST = per_token("log-probability", "zero", joined=False)
ENTROPY = per_token("positive", "zero", "quarters")
ENTROPY_FIRST = per_token("positive", "zero", "quarters", joined=False)
TOKENS_FIRST = per_token(joined=False)
STEPS = Array(_steps, dtypes="integer")
CHANNEL_WEIGHTS = Made(_channel_weights, _bad_channel_weights, must=_asks_for_channels)

ARGUMENTS: dict[str, Kind] = {
    # layouts and groups
    "mask": Mask(),
    "cu_seqlens": Offsets(),
    "num_tokens": NumTokens(),
    "groups": Labels(),
    "group_size": GroupSize(),
    "max_group_size": Whole(lambda call: st.integers(1, call.batch.size + 2), 1),
    "steps": STEPS,
    "num_steps": Whole(lambda call: st.integers(0, 6), 0),
    "tokens": Array(lambda call: some.tokens(call.batch.rows, call.batch.labels), dtypes="integer", joined=False),
    # one per row
    "rewards": Rewards(),
    "outcome": per_row(),
    "bootstrap": per_row(),
    "start": per_row(),
    "final": Either(
        Number(-1.0, 0.0, 0.5, 1, also=("a tensor",)),
        per_row(),
        math.inf,
        lambda call: torch.zeros(1, dtype=torch.bool),
    ),
    "lengths": Made(_lengths, _bad_lengths, must=_no_lengths),
    "sequence_logprob": per_row("log-probability", "equal"),
    "step_values": Array(_columns),
    "scores": Array(_columns, joined=False),
    "probs": Made(_probs, _bad_probs),
    "weights": CHANNEL_WEIGHTS,
    # one per token
    "values": TOKENS_FIRST,
    "entropy": ENTROPY,
    "advantages": TOKENS_FIRST,
    "logprob": LOGPROB,
    "ref_logprob": LOGPROB,
    "old_logprob": LOGPROB,
    "log_ratio": per_token("normal", "zero", "quarters"),
    "reverse_kl": ENTROPY,
    "sum_p2": per_token("fraction"),
    "sum_p2_logp": per_token("normal"),
    "cov": TOKENS_FIRST,
    "metric": per_token("positive", "zero", "equal", joined=False, any_rank=True),
    "potential": per_token(),
    "process_rewards": TOKENS_FIRST,
    "token_rewards": TOKENS_FIRST,
    "kl": per_token(),
    # trees of parents
    "parent": Made(_parents, _bad_parents),
    "leaf_rewards": Array(_leaf_rewards),
    "visits": Made(_visits, _bad_visits),
    "max_depth": Whole(lambda call: st.integers(len(call["parent"]), 12), 0),
    # logits and hidden states
    "logits": Array(_logits, joined=False, per_token=True),
    "ref_logits": Array(_logits, per_token=True),
    "hidden": Array(_hidden(HIDDEN), joined=False, per_token=True),
    "weight": Array(_head(HIDDEN), longer_in=-1),
    "bias": Array(_head()),
    "ref_hidden": Array(_hidden(REF_HIDDEN), per_token=True),
    "ref_weight": Array(_head(REF_HIDDEN, beside="ref_hidden"), must=lambda call: call["ref_hidden"] is not ABSENT),
    "ref_bias": Array(_head(beside="ref_hidden")),
    "coefficients": Coefficients("ref_logits"),
    "records": Made(_records, _bad_records),
    "outputs": Outputs(),
    "vocab_size": Whole(lambda call: st.integers(1, _vocab(call)), 1, _vocab),
    "vocab_start": Whole(lambda call: st.sampled_from((0, 1, 1000)), 0),
    "softcap": Number(0.5, 5, 30.0, above=0, none=True),
    "logit_scale": POSITIVE,
    "chunk_tokens": Whole(lambda call: st.integers(1, 9), 1),
    "chunk_vocab": Whole(lambda call: st.integers(1, 40), 1),
    "dtype": Made(lambda call: some.dtypes(), _bad_dtypes),
    # numbers
    "gamma": FACTOR,
    "lam": TRACE,
    "temperature": Number(0.1, 0.5, 1.0, 2, above=0),
    "eps": NON_NEGATIVE,
    "ddof": Whole(lambda call: st.integers(0, 1), 0, lambda call: 1),
    "alpha": NON_NEGATIVE,
    "kappa": POSITIVE,
    "alpha1": ANY,
    "alpha2": ANY,
    "beta1": ANY,
    "beta2": ANY,
    "beta": POSITIVE,
    "positive": Number(-1.0, 0.0, 0.5, -math.inf, math.inf, none=True, infinite=True),
    "entropy_floor": Number(1e-2, 0.25, 1, above=0),
    "fraction": FRACTION,
    "low": Number(-0.5, 0.0, 0.25, -math.inf, infinite=True),
    "high": Number(0.5, 1.0, 5, math.inf, infinite=True),
    "growth": POSITIVE,
    "share": FRACTION,
    "eta": Number(-0.25, 0.0, 0.25, none=True),
    "outcome_weight": ANY,
    "rho_clip": CLIP,
    "trace_clip": CLIP,
    "advantage_rho_clip": CLIP,
    "clamp": Made(_clamps, _bad_clamps),
    "ratio_cap": Made(_ratio_caps, _bad_ratio_caps),
    "min_count": Whole(lambda call: st.integers(1, 4), 1),
    "generator": Made(_generators, lambda call, value: strangers("None")),
    # tests/system/test_distributed.py gives these
    "process_group": Made(lambda call: None, lambda call, value: strangers("None")),
    "max_per_rank": Made(lambda call: None, lambda call, value: strangers("None")),
    # names and flags
    "baseline": Baseline(),
    "scale": Choice(SCALES),
    "singleton": Choice(lambda call: ["zero"] if call.setting("scale") == "batch_std" else ["zero", "raw"]),
    "scope": Choice(("batch", "row", "group")),
    "normalize": Choice(("batch", "row", "group")),
    "mode": Choice(("linear", "softmax", "rank", "quantile")),
    "masked": Choice(("prefix", "skip")),
    "estimator": Choice(ESTIMATORS),
    "op": Choice(REDUCTIONS),
    "reduce": Choice(("mean", "max", "min", "softmax", "sum")),
    "kind": Choice(("local", "global", "tree_rl", "siblings")),
    "form": Choice(("paper", "released")),
    "td_scale": Choice(("group", "none")),
    "per": Choice(("row", "token")),
    "last": Choice(("zero", "own")),
    "norm": Choice(("sum", "max", "none", "softmax")),
    "eps_at": Choice(("variance", "std")),
    "whitening": Choice(("rows", "tokens", "none")),
    **{name: Flag() for name in (
        "joint", "entropy_grad", "ratio_grad", "inverse", "delta", "mean", "through_weights",
        "leave_one_out", "inplace", "inplace_backward", "shift_mean", "separators", "signed",
    )},
}  # fmt: skip


def _family(*families: str, but: str = "") -> list[str]:
    """The functions of families; ``but`` names those that are left out."""
    modules = [f"rewardops.{family}" for family in families]
    return [name for name, fn in FUNCTIONS.items() if fn.__module__ in modules and name not in but.split()]


def _each(functions: Iterable[str] | str, name: str, kind: Kind) -> dict[tuple[str, str], Kind]:
    """The kind of an argument of those of the functions that take it."""
    functions = functions.split() if isinstance(functions, str) else functions
    return {(fn, name): kind for fn in functions if name in parameters(fn)}


def _first(name: str, kind: Kind) -> dict[tuple[str, str], Kind]:
    """The kind of an argument where it comes first, and says what shape the others have."""
    return {(fn, name): kind for fn in FUNCTIONS if next(iter(parameters(fn))) == name}


LOGITS, LINEAR = _family("logits", but="merge_token_stats"), _family("linear")
PRESETS = [name for name, (function, _) in FORWARDED.items() if function == "group_advantages"]

OVERRIDES: dict[tuple[str, str], Kind] = {
    **_each(_family("returns", "td", "shaping"), "rewards", TOKENS_FIRST),
    **_each(["group_advantages", *PRESETS], "rewards", Rewards("maybe", joined=False)),
    **_each("unlikeliness_rewards advantages.gpg", "rewards", Rewards(joined=False)),
    **_each(_family("prefix_tree", but="tempo_advantages"), "rewards", Rewards("maybe")),
    ("advantages.gdpo", "rewards"): Rewards("always", joined=False),
    ("token_kl", "rewards"): per_token(),
    **_each(_family("prefix_tree"), "weights", per_row("positive", "zero or one")),
    ("PrefixTree.from_tokens", "weights"): Array(
        lambda call: None if call["rewards"] is ABSENT else some.numbers((call.batch.size,), ("positive",))
    ),
    ("redistribute_outcome", "weights"): per_token("positive", "zero or one", "normal", joined=False),
    ("advantages_to_tokens", "advantages"): per_row(joined=False),
    **_each("advantages_to_tokens advantages.reinforce_plus_plus_baseline", "mask", Mask(one_of_two=True)),
    ("high_entropy_mask", "groups"): Labels(lambda call: call["scope"] == "group"),
    ("entropy_weights", "groups"): Labels(lambda call: call["normalize"] == "group"),
    ("budget_advantages", "groups"): Labels(spare=lambda call: call["baseline"] == "none"),
    **_each(_family("td"), "masked", Choice(("skip", "step"))),
    **_each(_family("segments", but="segment_reduce"), "steps", Array(_steps, dtypes="integer", joined=False)),
    **_each(LOGITS + LINEAR, "tokens", Array(_ids, dtypes="integer")),
    **_each(LOGITS + LINEAR, "temperature", TEMPERATURE),
    **_each(LOGITS + LINEAR, "beta", Number(0.25, 0.5, 0.9, above=0, below=1, when=_asks_for_jsd)),
    ("linear_token_stats", "outputs"): Outputs("ref_hidden"),
    ("linear_token_loss", "outputs"): Outputs("ref_hidden", empty=True),
    ("linear_token_loss", "coefficients"): Coefficients("ref_hidden"),
    ("token_stats_and_grad", "outputs"): Outputs(empty=True),
    **_each("token_stats_partial merge_token_stats", "outputs", Outputs(but=("jsd",))),
    ("linear_token_stats_partial", "outputs"): Outputs("ref_hidden", but=("jsd",)),
    **_each("token_stats_partial linear_token_stats_partial", "vocab_size",
            Whole(lambda call: st.integers(1, _vocab(call) + 1001), 1)),
    **_each(LINEAR, "num_tokens", Whole(_counted, 0)),
    **_first("logprob", LOGPROB_FIRST),
    **_first("entropy", ENTROPY_FIRST),
    ("token_kl", "beta"): Either(
        Number(0.0, 0.25, 1, least=0, none=True, also=("a tensor",)),
        Array(_betas),
        -1.0,
        lambda call: call.batch.rows.valid if call["mask"] is not ABSENT else torch.ones(call.batch.rows.shape),
    ),
    ("unlikeliness_rewards", "beta"): Number(0.0, 0.25, 1, least=0),
    ("advantages.pure", "beta"): ANY,
    ("entropy_reward", "reduce"): Choice(("mean", "sum")),
    ("implicit_rewards", "clamp"): Number(0.75, 20, math.inf, above=0, none=True, infinite=True),
    ("steer_weights", "mode"): Choice(("linear", "exp")),
    ("steer_weights", "low"): Number(0.25, 0.8, 1, above=0),
    ("steer_weights", "high"): Number(1.0, 1.2, 3, least=0.25),
    ("whiten", "values"): per_token(joined=False, any_rank=True),
    ("advantages.remax", "baseline"): per_row(),
    ("advantages.pure", "baseline"): Choice(("token", "step", "none")),
    ("advantages.gpg", "alpha"): Choice(("informative", "rewards")),
    ("budget_advantages", "baseline"): Choice(("brpo", "history", "group", "none")),
    **_each("prefix_values tvm_targets", "gamma", FRACTION),
    # Where all tokens are equal, a gradient of 0 is what is left of terms of 1 / sqrt(eps).
    ("advantages.reinforce_plus_plus_baseline", "eps"): Number(0.25, 1, least=0, given=True),
}  # fmt: skip


# What others depend on is drawn before them.
EARLY = (
    "parent", "scores", "vocab_size", "vocab_start", "rewards", "tokens", "ref_logits", "ref_hidden", "baseline",
    "scale", "scope", "normalize", "masked", "old_logprob", "mask", "cu_seqlens", "outputs", "groups",
)  # fmt: skip
# On a device, these say what would have to be read there.
TOLD = ("num_tokens", "num_steps", "max_group_size", "max_depth")


@st.composite
def calls(
    draw: some.Draw, name: str, *, max_width: int = 17, max_vocab: int = 40, on_device: bool = False
) -> Call:
    """Valid calls of a function."""
    rows = draw(some.rows(max_width=max_width))
    vocab = draw(some.sizes(max_vocab).map(lambda n: max(n, 1)))
    call, wanted = (
        Call(name, Batch(rows, draw(some.groups(rows.batch)), draw(some.dtypes()), vocab)),
        parameters(name),
    )
    for key in sorted(wanted, key=lambda k: EARLY.index(k) if k in EARLY else len(EARLY)):
        value = call.kind(key).draw(draw, call, wanted[key] or (on_device and key in TOLD))
        if value is not ABSENT:
            call.arguments[key] = value
    call.arguments = {k: call.arguments[k] for k in wanted if k in call.arguments}
    return call
