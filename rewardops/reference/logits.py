"""Token statistics from logits, the specification (see :func:`rewardops.token_stats`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ..core.inplace import check_overwritable
from ..core.kinds import Flags, IdTokens, WideTokens
from .token_records import OUTPUTS as OUTPUTS
from .token_records import RECORD as RECORD
from .token_records import REF_OUTPUTS as REF_OUTPUTS
from .token_records import finish, merge

# Statistics of a row that a backward pass reads; the first five without a reference. Shifts are stored logits,
# separate from log total: with logits near 1e4 their sum loses the digits that the backward pass needs.
SAVED = (
    "shift", "total", "entropy", "sum_p2", "sum_p2_logp",
    "ref_shift", "ref_total", "kl", "reverse_kl", "mixed_kl", "ref_mixed_kl",
)  # fmt: skip

IGNORED = -100


class TokenStatsArgs(NamedTuple):
    """Arguments of every op of the family; rows ``[...]`` are ``[N]`` or ``[B, T]``."""

    logits: Annotated[Tensor, "float", "...", "V"]
    """``[..., V]``; float32, bfloat16, float16 or float64."""
    tokens: IdTokens
    """``[...]``, int64; ids in the whole vocabulary, -100 for a masked token."""
    ref_logits: Annotated[Tensor, "float", "...", "V"] | None
    """Logits of the reference model, the shape of ``logits``; float64 if and only if those are."""
    mask: Flags | None
    """``[...]``, bool; None: every token counts."""
    temperatures: WideTokens | None
    """``[...]``, float64, one per token; None: ``temperature`` for all."""
    temperature: float
    softcap: float
    """0 for no softcap."""
    first: int
    """The token id of column 0; 0 for the ops of whole rows."""
    vocab: int
    """Number of columns that are not padding."""
    beta: float
    """Weight of the reference in the Jensen-Shannon divergence; 0.5 without it."""
    outputs: Sequence[str]
    """Names out of ``OUTPUTS``, in that order."""


def saved_rows(paired: bool) -> int:
    return len(SAVED) if paired else 5


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def valid_rows(tokens: Tensor, mask: Tensor | None) -> Tensor:
    valid = tokens != IGNORED
    return valid if mask is None else valid & mask


# ---- arguments as kernels rely on them -----------------------------------------------------------------------


@lru_cache(maxsize=1024)
def check_names(outputs: tuple[str, ...], paired: bool) -> None:
    """Raise unless the outputs are distinct, and of one model where there is one."""
    known = OUTPUTS if paired else OUTPUTS[: -len(REF_OUTPUTS)]
    if len(set(outputs)) < len(outputs) or any(name not in known for name in outputs):
        raise ValueError(f"outputs: got {outputs}, want distinct names out of {known}")


def check_args(a: TokenStatsArgs) -> None:
    """Raise where a kernel would read or write beyond a tensor; kinds have checked dtypes and shapes by then."""
    if a.tokens.dim() not in (1, 2):
        raise ValueError(f"tokens: got {a.tokens.dim()} dimensions, want [N] or [B, T]")
    if not 0 <= a.vocab <= a.logits.shape[-1]:
        raise ValueError(f"vocab: got {a.vocab}, want 0 to {a.logits.shape[-1]} (the columns of logits)")
    if a.first < 0:
        raise ValueError(f"first: got {a.first}, want at least 0")
    if a.ref_logits is not None and accumulator(a.ref_logits) is not accumulator(a.logits):
        want = f"that of logits, {a.logits.dtype}, or one as wide"
        raise ValueError(f"ref_logits: got dtype {a.ref_logits.dtype}, want {want}")
    check_names(tuple(a.outputs), a.ref_logits is not None)


def check_backward(grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, *_: bool) -> None:
    """Raise unless gradients and saved statistics are those of the arguments."""
    check_args(a)
    check_upstream(a.outputs, accumulator(a.logits), grads, len(saved), saved_rows(a.ref_logits is not None))


def check_backward_(grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, *_: bool) -> None:
    """As :func:`check_backward`, and unless the gradient can be written over the logits."""
    check_overwritable(a.logits, "logits", read_beside(a, "grads", a.outputs, grads) | {"saved": saved})
    check_backward(grads, saved, a)


def check_loss(coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs) -> None:
    """Raise unless a loss that is known at the call is of outputs of the arguments."""
    check_args(a)
    check_terms(coefficients, terms, a.outputs)


def check_loss_(coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs) -> None:
    """As :func:`check_loss`, and unless the gradient can be written over the logits."""
    check_overwritable(a.logits, "logits", read_beside(a, "coefficients", terms, coefficients))
    check_loss(coefficients, terms, a)


def check_upstream(
    outputs: Sequence[str], acc: torch.dtype, grads: Sequence[Tensor | None], saved: int, wanted: int
) -> None:
    """Raise unless there is a gradient, or None, per output, and as many saved statistics as wanted."""
    if len(grads) != len(outputs):
        raise ValueError(f"grads: got {len(grads)}, want {len(outputs)} (one per output)")
    for name, grad in zip(outputs, grads, strict=True):
        if grad is not None and grad.dtype is not acc:
            raise TypeError(f"grads of {name}: got dtype {grad.dtype}, want {acc}")
    if saved != wanted:
        raise ValueError(f"saved: got {saved} statistics, want {wanted}")


def check_terms(coefficients: Sequence[Tensor], terms: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise unless there is a coefficient for each term of a loss."""
    if len(coefficients) != len(terms) or any(n not in outputs or n == "is_top1" for n in terms):
        got = f"{list(terms)} with {len(coefficients)} coefficients"
        raise ValueError(f"terms: got {got}, want names out of {list(outputs)}, one for each")


def read_beside(
    a: TokenStatsArgs, kind: str, names: Sequence[str], tensors: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """What a pass reads beside the logits, by name; ``tensors`` are gradients or coefficients of outputs."""
    of_outputs = {f"{kind} of {name}": t for name, t in zip(names, tensors, strict=False)}
    return {n: getattr(a, n) for n in ("ref_logits", "tokens", "mask", "temperatures")} | of_outputs


class _Rows(NamedTuple):
    """Per-row values, ``[...]``."""

    valid: Tensor
    temperature: Tensor
    column: Tensor
    """Column of the row's token."""
    inside: Tensor
    """True where that column is among the logits."""


def _rows(a: TokenStatsArgs) -> _Rows:
    column = a.tokens - a.first
    t = a.temperatures
    if t is None:
        t = torch.full(a.tokens.shape, a.temperature, dtype=torch.float64, device=a.tokens.device)
    return _Rows(valid_rows(a.tokens, a.mask), t, column, (column >= 0) & (column < a.vocab))


# ---- from logits to a record -------------------------------------------------------------------------------


def capped(logits: Tensor, a: TokenStatsArgs, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of the columns that are not padding, with the softcap applied; masked rows are 0."""
    x = torch.where(valid[..., None], logits[..., : a.vocab].to(dtype), 0)
    return a.softcap * torch.tanh(x / a.softcap) if a.softcap else x


def distances(x: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """``(x - max x) / temperature`` and ``max x``: the difference first, exact near the maximum.

    NaN throughout where a logit is NaN or inf.
    """
    if not x.shape[-1]:
        return x, x.new_full(x.shape[:-1], -torch.inf)
    shift = x.amax(-1)
    shift = torch.where(shift == torch.inf, torch.nan, shift)
    # Where every logit is -inf, -inf - 0 keeps them without mass.
    return (x - torch.where(shift == -torch.inf, 0, shift)[..., None]) / temperature.to(x.dtype)[
        ..., None
    ], shift


def at_column(x: Tensor, rows: _Rows) -> Tensor:
    """The value in the token's column; 0 where ``x`` does not have that column."""
    if not x.shape[-1]:
        return x.new_zeros(rows.column.shape)
    index = torch.where(rows.inside, rows.column, 0)[..., None]
    return torch.where(rows.inside, x.gather(-1, index)[..., 0], 0)


def gap(y: Tensor, u: Tensor) -> Tensor:
    """``y - u``, and 0 where both are -inf: a column without mass on either side adds nothing to a divergence."""
    return torch.where((y == -torch.inf) & (u == -torch.inf), 0, y - u)


def product(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` with the limit 0 where the weight of a -inf is 0."""
    return torch.where((weight == 0) & value.isinf(), 0, weight * value)


def divergence(y: Tensor, u: Tensor, sums: torch.dtype | None) -> Tensor:
    """``sum e^y (y - u)``: infinite where the second distribution has no mass and the first has some."""
    broken = ((u == -torch.inf) & (y > -torch.inf)).any(-1)
    return torch.where(broken, torch.inf, product(y.exp(), gap(y, u)).sum(-1, dtype=sums))


def _records(a: TokenStatsArgs, sums: torch.dtype | None) -> Tensor:
    """Records, with sums in the dtype ``sums``; None for the accumulator's."""
    acc, rows, outputs = accumulator(a.logits), _rows(a), a.outputs
    valid, t = rows.valid, rows.temperature
    none = t.new_full(t.shape, torch.nan)
    moments = "sum_p2" in outputs or "sum_p2_logp" in outputs

    x = capped(a.logits, a, valid, acc)
    y, shift = distances(x, t)
    weight = y.exp()
    fields = {
        "shift": shift / t,
        "total": weight.sum(-1, dtype=sums),
        "weighted": product(weight, y).sum(-1, dtype=sums) if "entropy" in outputs else none,
        "squares": (weight * weight).sum(-1, dtype=sums) if moments else none,
        "squares_weighted": product(weight * weight, y).sum(-1, dtype=sums)
        if "sum_p2_logp" in outputs
        else none,
        "distance": y.sum(-1, dtype=sums) if "mean_logit" in outputs else none,
        "columns": torch.full_like(t, a.vocab),
        "token": at_column(x, rows) / t,
        "found": rows.inside,
    }
    if a.ref_logits is not None:
        x = capped(a.ref_logits, a, valid, acc)
        u, shift = distances(x, t)
        fields["ref_shift"] = shift / t
        fields["ref_total"] = u.exp().sum(-1, dtype=sums)
        fields["ref_token"] = at_column(x, rows) / t
        fields["kl"] = divergence(y, u, sums) if "kl" in outputs else none
        fields["reverse"] = divergence(u, y, sums) if "reverse_kl" in outputs else none
    record = torch.stack([fields.get(name, torch.zeros_like(t)).double() for name in RECORD], -1)
    return torch.where(valid[..., None], record, 0)


def token_stats_partial(a: TokenStatsArgs) -> Tensor:
    """Records ``[..., len(RECORD)]`` in float64; sums that no output needs are NaN, masked rows are 0."""
    return _records(a, torch.float64)  # terms cancel when parts are merged


# ---- statistics of whole rows ------------------------------------------------------------------------------


def log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """``log(beta q + (1 - beta) p)``; -inf where neither has mass."""
    largest = torch.maximum(logp, logq)
    shift = torch.where(largest == -torch.inf, 0, largest)
    return shift + (beta * (logq - shift).exp() + (1 - beta) * (logp - shift).exp()).log()


def log_probabilities(
    a: TokenStatsArgs, rows: _Rows, log_sum: Tensor, ref_log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q`` of every column, from the logarithms of the rows' totals."""
    acc = accumulator(a.logits)

    def normalised(logits: Tensor, log_sum: Tensor) -> Tensor:
        y, _ = distances(capped(logits, a, rows.valid, acc), rows.temperature)
        return y - log_sum.to(acc)[..., None]

    assert a.ref_logits is not None
    return normalised(a.logits, log_sum), normalised(a.ref_logits, ref_log_sum)


def token_stats(a: TokenStatsArgs, inplace: bool = False) -> list[Tensor]:
    """Statistics saved for the backward pass, ``[saved_rows, ...]``, and the outputs."""
    acc, rows, paired = accumulator(a.logits), _rows(a), a.ref_logits is not None
    whole = merge(_records(a, None)[None])
    names = [name for name in a.outputs if name != "jsd"]
    needed = ["log_sum", "ref_log_sum"] if paired else ["log_sum"]
    if "sum_p2_logp" in names:
        needed.append("sum_p2")  # for its backward pass
    values = finish(whole, [*needed, *names])
    for side in ("", "ref_"):
        values[f"{side}shift"] = whole[f"{side}shift"] * rows.temperature
        empty = whole[f"{side}shift"] == -torch.inf
        values[f"{side}total"] = torch.where(empty, torch.nan, whole[f"{side}total"])
    if "jsd" in a.outputs:
        logp, logq = log_probabilities(a, rows, values["log_sum"], values["ref_log_sum"])
        log_m = log_mixture(logp, logq, a.beta)
        values["mixed_kl"] = product(logp.exp(), gap(logp, log_m)).sum(-1)
        values["ref_mixed_kl"] = product(logq.exp(), gap(logq, log_m)).sum(-1)
        values["jsd"] = a.beta * values["ref_mixed_kl"] + (1 - a.beta) * values["mixed_kl"]
        for name in ("mixed_kl", "ref_mixed_kl", "jsd"):
            values[name] = torch.where(rows.valid, values[name], 0)
    zero = torch.zeros_like(values["log_sum"])
    saved = torch.stack([values.get(name, zero).double() for name in SAVED[: saved_rows(paired)]])
    return [saved, *(values[name] if name == "is_top1" else values[name].to(acc) for name in a.outputs)]


# ---- backward ----------------------------------------------------------------------------------------------


def side_gradient(
    a: TokenStatsArgs,
    rows: _Rows,
    logits: Tensor,
    logp: Tensor,
    logq: Tensor | None,
    log_m: Tensor | None,
    on: dict[str, Tensor],
) -> Tensor:
    """The gradient of one side's logits from the coefficients of its terms.

    ``p (on_p + on_log log p + on_gap (log p - log q) + on_mixed (log p - log m))
    + p^2 (on_square + on_square_log log p) + on_q q + on_one + [column = token] on_token``, times the slope of
    the softcap over the temperature.
    """
    on = {name: value.to(logp.dtype)[..., None] for name, value in on.items()}
    p = logp.exp()
    g = on["p"] * p + on["log"] * product(p, logp) + on["square"] * p * p + on["one"]
    g = g + on["square_log"] * product(p * p, logp)
    if logq is not None:
        # Where the gap is infinite, so is the divergence, which then has no gradient.
        apart = gap(logp, logq)
        g = g + on["gap"] * p * torch.where(apart.isinf(), 0, apart) + on["q"] * logq.exp()
    if log_m is not None:
        g = g + on["mixed"] * product(p, gap(logp, log_m))
    if a.vocab:
        at = torch.where(rows.inside, rows.column, 0)[..., None]
        g = g.scatter_add(-1, at, torch.where(rows.inside[..., None], on["token"], 0))
    g = g / rows.temperature.to(g.dtype)[..., None]
    if a.softcap:
        g = g * (1 - torch.tanh(logits[..., : a.vocab].to(g.dtype) / a.softcap) ** 2)
    g = torch.where(rows.valid[..., None], g, 0).to(logits.dtype)
    return torch.nn.functional.pad(g, (0, logits.shape[-1] - a.vocab))


def token_stats_backward(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    """All upstream gradients folded into one gradient of the logits, and one of the reference logits."""
    rows, acc = _rows(a), accumulator(a.logits)
    known = dict(zip(SAVED, saved.to(acc), strict=False))
    zero = torch.zeros_like(known["shift"])
    upstream = {name: g for name, g in zip(a.outputs, grads, strict=True) if g is not None}
    up = {name: torch.where(rows.valid, upstream.get(name, zero), 0) for name in OUTPUTS}
    for name in ("kl", "reverse_kl"):
        if name in known:  # an infinite divergence does not change with the logits
            infinite = known[name].isinf()
            up[name], known[name] = torch.where(infinite, 0, up[name]), torch.where(infinite, 0, known[name])
    # A NaN among them is in no gradient that was not asked for.
    for name, output in (
        ("kl", "kl"),
        ("reverse_kl", "reverse_kl"),
        ("mixed_kl", "jsd"),
        ("ref_mixed_kl", "jsd"),
    ):
        if output not in upstream:
            known[name] = zero
    for name in ("logprob", "ref_logprob"):
        if name in upstream:  # a value that is NaN has a gradient that is NaN
            up[name] = torch.where(rows.inside, up[name], torch.nan)

    policy = {
        "p": up["logsumexp"] - up["logprob"]
        - up["entropy"] * known["entropy"] - 2 * up["sum_p2"] * known["sum_p2"]
        - up["sum_p2_logp"] * (2 * known["sum_p2_logp"] + known["sum_p2"]),
        "log": -up["entropy"],
        "square": 2 * up["sum_p2"] + up["sum_p2_logp"],
        "square_log": 2 * up["sum_p2_logp"],
        "one": up["mean_logit"] / a.vocab,
        "token": up["logprob"],
    }  # fmt: skip
    if a.ref_logits is None:
        y, _ = distances(capped(a.logits, a, rows.valid, acc), rows.temperature)
        logp = y - known["total"].log()[..., None]
        return side_gradient(a, rows, a.logits, logp, None, None, policy), a.logits.new_empty(0)

    logp, logq = log_probabilities(a, rows, known["total"].log(), known["ref_total"].log())
    # Without a divergence the two sides do not meet: a NaN on one does not reach the other.
    meet = any(name in upstream for name in ("kl", "reverse_kl", "jsd"))
    log_m = log_mixture(logp, logq, a.beta) if "jsd" in upstream else None
    policy["p"] = (
        policy["p"] + up["reverse_kl"] - up["kl"] * known["kl"] - (1 - a.beta) * up["jsd"] * known["mixed_kl"]
    )
    policy |= {"gap": up["kl"], "mixed": (1 - a.beta) * up["jsd"], "q": -up["reverse_kl"]}
    ref = {
        "p": up["kl"] - up["ref_logprob"]
        - up["reverse_kl"] * known["reverse_kl"] - a.beta * up["jsd"] * known["ref_mixed_kl"],
        "log": zero, "square": zero, "square_log": zero, "one": zero,
        "token": up["ref_logprob"],
        "gap": up["reverse_kl"], "mixed": a.beta * up["jsd"], "q": -up["kl"],
    }  # fmt: skip
    return (
        side_gradient(a, rows, a.logits, logp, logq if meet else None, log_m, policy)
        if to_logits
        else a.logits.new_empty(0),
        side_gradient(a, rows, a.ref_logits, logq, logp if meet else None, log_m, ref)
        if to_ref
        else a.ref_logits.new_empty(0),
    )


def token_stats_backward_(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> Tensor:
    """Write the gradient of the logits over them; return that of the reference."""
    grad, ref = token_stats_backward(grads, saved, a, to_logits, to_ref)
    a.logits.copy_(grad)
    return ref


def token_stats_partial_backward(
    grad_record: Tensor, record: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits from that of their record: the same terms, of sums that are not normalised."""
    acc = torch.float64  # sums are not normalised: large terms cancel
    rows = _rows(a)
    g = dict(zip(RECORD, torch.where(rows.valid[..., None], grad_record, 0).unbind(-1), strict=True))
    y, _ = distances(capped(a.logits, a, rows.valid, acc), rows.temperature)
    zero = torch.zeros_like(g["total"])
    policy = {
        "p": g["total"] + g["weighted"] + g["kl"], "log": g["weighted"],
        "square": 2 * g["squares"] + g["squares_weighted"], "square_log": 2 * g["squares_weighted"],
        "one": g["distance"], "token": g["token"], "gap": g["kl"], "q": -g["reverse"],
    }  # fmt: skip
    if a.ref_logits is None:
        return side_gradient(a, rows, a.logits, y, None, None, policy), a.logits.new_empty(0)
    u, _ = distances(capped(a.ref_logits, a, rows.valid, acc), rows.temperature)
    ref = {
        "p": g["ref_total"] + g["reverse"], "log": zero, "square": zero, "square_log": zero, "one": zero,
        "token": g["ref_token"],
        "gap": g["reverse"], "q": -g["kl"],
    }  # fmt: skip
    return (
        side_gradient(a, rows, a.logits, y, u, None, policy) if to_logits else a.logits.new_empty(0),
        side_gradient(a, rows, a.ref_logits, u, y, None, ref) if to_ref else a.ref_logits.new_empty(0),
    )


# ---- a loss that is known at the call ----------------------------------------------------------------------


def with_gradient(
    forward: Callable[..., Any], backward: Callable[..., Any], backward_: Callable[..., Any]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """``token_stats_and_grad`` and its in-place form, from a backend's forward and backward passes."""

    def run(
        coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Stacked statistics, and the arguments of the backward pass."""
        acc = accumulator(a.logits)
        saved, *values = forward(a, False)
        by_name = {name: c.to(acc) for name, c in zip(terms, coefficients, strict=True)}
        ups = [by_name.get(name) for name in a.outputs]
        return torch.stack([x.to(acc) for x in values]), (ups, saved, a, True, False)

    def token_stats_and_grad(
        coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs
    ) -> tuple[Tensor, Tensor]:
        stacked, backward_args = run(coefficients, terms, a)
        return stacked, backward(*backward_args)[0]

    def token_stats_and_grad_(
        coefficients: Sequence[Tensor], terms: Sequence[str], a: TokenStatsArgs
    ) -> Tensor:
        stacked, backward_args = run(coefficients, terms, a)
        backward_(*backward_args)
        return stacked

    return token_stats_and_grad, token_stats_and_grad_


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)
