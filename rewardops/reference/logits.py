"""Token statistics from logits, the specification (see :func:`rewardops.token_stats`).

A row's *record* holds sums over its columns, relative to its own largest logit. Records of parts of a row merge
into the record of the whole, and every statistic is a function of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OUTPUTS = (
    "logprob", "entropy", "logsumexp", "sum_sq", "sum_sq_logprob", "mean_logit", "is_top1",
    "ref_logprob", "kl", "reverse_kl", "jsd",
)  # fmt: skip
REF_OUTPUTS = OUTPUTS[7:]

# With y = z - shift and u = x - ref_shift, z the scaled logits and x the reference's: total = sum e^y,
# weighted = sum e^y y, squares = sum e^2y, squares_weighted = sum e^2y y, distance = sum y,
# kl = sum e^y (y - u), reverse = sum e^u (u - y).
RECORD = (
    "shift", "total", "weighted", "squares", "distance", "columns", "token", "found",
    "ref_shift", "ref_total", "ref_token", "kl", "reverse", "squares_weighted",
)  # fmt: skip

_NEEDS = {
    "logprob": {"token", "found"}, "is_top1": {"token", "found"}, "entropy": {"weighted"}, "logsumexp": set(),
    "sum_sq": {"squares"}, "sum_sq_logprob": {"squares", "squares_weighted"}, "mean_logit": {"distance"},
    "ref_logprob": {"found", "ref_token"}, "kl": {"kl"}, "reverse_kl": {"reverse"},
}  # fmt: skip


def fields_of(outputs: Sequence[str]) -> list[int]:
    """The places in a record of the sums that outputs are made of."""
    names = {"shift", "total", "columns"}.union(*(_NEEDS[name] for name in outputs))
    if any(name in REF_OUTPUTS for name in outputs):
        names |= {"ref_shift", "ref_total"}
    return [k for k, name in enumerate(RECORD) if name in names]


# What a backward pass needs of a row; the first five where there is no reference. Shifts are stored logits, and
# apart from log total: with logits near 1e4 their sum has lost the digits that the backward needs.
SAVED = (
    "shift", "total", "entropy", "sum_sq", "sum_sq_logprob",
    "ref_shift", "ref_total", "kl", "reverse_kl", "mixed_kl", "ref_mixed_kl",
)  # fmt: skip

IGNORED = -100


def saved_rows(paired: bool) -> int:
    return len(SAVED) if paired else 5


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def valid_rows(tokens: Tensor, mask: Tensor | None) -> Tensor:
    valid = tokens != IGNORED
    return valid if mask is None else valid & mask


def row_temperatures(tokens: Tensor, temperatures: Tensor | None, temperature: float) -> Tensor:
    if temperatures is None:
        return torch.full(tokens.shape, temperature, dtype=torch.float64, device=tokens.device)
    return temperatures


# ---- from logits to a record -------------------------------------------------------------------------------


def capped(logits: Tensor, softcap: float, vocab: int, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns that exist, the softcap applied; masked rows are 0."""
    x = torch.where(valid[..., None], logits[..., :vocab].to(dtype), 0)
    return softcap * torch.tanh(x / softcap) if softcap else x


def distances(x: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """``(x - max x) / temperature`` and ``max x``: the difference first, exact near the maximum."""
    if not x.shape[-1]:
        return x, x.new_full(x.shape[:-1], -torch.inf)
    shift = x.amax(-1)
    # Where every logit is -inf, -inf - 0 keeps them without mass.
    return (x - torch.where(shift == -torch.inf, 0, shift)[..., None]) / temperature.to(x.dtype)[
        ..., None
    ], shift


def at_column(x: Tensor, column: Tensor, found: Tensor) -> Tensor:
    if not x.shape[-1]:
        return x.new_zeros(column.shape)
    return torch.where(found, x.gather(-1, torch.where(found, column, 0)[..., None])[..., 0], 0)


def gap(y: Tensor, u: Tensor) -> Tensor:
    """``y - u``, and 0 where both are -inf: a column without mass on either side is in nobody's divergence."""
    return torch.where((y == -torch.inf) & (u == -torch.inf), 0, y - u)


def product(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` with the limit 0 where the weight of a -inf is 0."""
    return torch.where((weight == 0) & value.isinf(), 0, weight * value)


def divergence(y: Tensor, u: Tensor, sums: torch.dtype | None) -> Tensor:
    """``sum e^y (y - u)``: infinite where the second has no mass and the first has, however little."""
    broken = ((u == -torch.inf) & (y > -torch.inf)).any(-1)
    return torch.where(broken, torch.inf, product(y.exp(), gap(y, u)).sum(-1, dtype=sums))


def _records(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    outputs: Sequence[str],
    sums: torch.dtype | None,
) -> Tensor:
    """Records, their sums taken in ``sums``, or in the precision of the logits."""
    acc = accumulator(logits)
    valid = valid_rows(tokens, mask)
    t = row_temperatures(tokens, temperatures, temperature)
    column = tokens - first
    found = (column >= 0) & (column < vocab)
    none = t.new_full(t.shape, torch.nan)
    moments = "sum_sq" in outputs or "sum_sq_logprob" in outputs

    x = capped(logits, softcap, vocab, valid, acc)
    y, shift = distances(x, t)
    weight = y.exp()
    fields = {
        "shift": shift / t,
        "total": weight.sum(-1, dtype=sums),
        "weighted": product(weight, y).sum(-1, dtype=sums) if "entropy" in outputs else none,
        "squares": (weight * weight).sum(-1, dtype=sums) if moments else none,
        "squares_weighted": product(weight * weight, y).sum(-1, dtype=sums)
        if "sum_sq_logprob" in outputs
        else none,
        "distance": y.sum(-1, dtype=sums) if "mean_logit" in outputs else none,
        "columns": torch.full_like(t, vocab),
        "token": at_column(x, column, found) / t,
        "found": found,
    }
    if ref_logits is not None:
        x = capped(ref_logits, softcap, vocab, valid, acc)
        u, shift = distances(x, t)
        fields["ref_shift"] = shift / t
        fields["ref_total"] = u.exp().sum(-1, dtype=sums)
        fields["ref_token"] = at_column(x, column, found) / t
        fields["kl"] = divergence(y, u, sums) if "kl" in outputs else none
        fields["reverse"] = divergence(u, y, sums) if "reverse_kl" in outputs else none
    record = torch.stack([fields.get(name, torch.zeros_like(t)).double() for name in RECORD], -1)
    return torch.where(valid[..., None], record, 0)


def token_stats_partial(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    outputs: Sequence[str],
) -> Tensor:
    """Return records ``[..., len(RECORD)]`` in float64; sums that no output needs are NaN, masked rows are 0."""
    args = (tokens, ref_logits, mask, temperatures, temperature, softcap, first, vocab, outputs)
    return _records(logits, *args, torch.float64)  # terms of parts cancel where they are merged


# ---- from records to statistics ----------------------------------------------------------------------------


def merge(records: Tensor, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The record of whole rows, by name, from those of their parts ``[parts, ..., len(RECORD)]``.

    All of it, or only what some outputs are made of.
    """
    r = dict(zip(RECORD, records.unbind(-1), strict=True))
    names = RECORD if outputs is None else [RECORD[k] for k in fields_of(outputs)]

    def moved(name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The shift of the whole, the distance of each part's, and the factor of the part's sums."""
        part = r[name].detach()
        whole = part.amax(0)
        apart = torch.where(part == -torch.inf, 0, part - torch.where(whole == -torch.inf, 0, whole))
        return whole, apart, torch.where(part == -torch.inf, 0, apart.exp())

    def scaled(factor: Tensor, value: Tensor) -> Tensor:
        # An infinite divergence stays infinite under any factor. Sums of parts without mass are not looked at.
        finite = torch.where(factor > 0, factor * torch.where(factor > 0, value, 0), 0)
        return torch.where(value.isinf(), value, finite)

    shift, apart, factor = moved("shift")
    found = {"shift": shift}
    terms: dict[str, Callable[[], Tensor]] = {
        "total": lambda: factor * r["total"],
        "weighted": lambda: scaled(factor, r["weighted"] + apart * r["total"]),
        "squares": lambda: factor * factor * r["squares"],
        "squares_weighted": lambda: scaled(factor * factor, r["squares_weighted"] + apart * r["squares"]),
        "distance": lambda: r["distance"] + apart * r["columns"],
    }
    if "ref_shift" in names:
        found["ref_shift"], ref_apart, ref_factor = moved("ref_shift")
        between = apart - ref_apart
        terms |= {
            "ref_total": lambda: ref_factor * r["ref_total"],
            "kl": lambda: scaled(factor, r["kl"] + between * r["total"]),
            "reverse": lambda: scaled(ref_factor, r["reverse"] - between * r["ref_total"]),
        }
    for name in names:
        if name not in found:
            found[name] = (terms[name]() if name in terms else r[name]).sum(0)
    return found


def merge_records(records: Tensor) -> Tensor:
    """One record from those of parts ``[parts, ..., len(RECORD)]``."""
    whole = merge(records)
    return torch.stack([whole[name] for name in RECORD], -1)


def record_gradient(record: Tensor, grads: dict[str, Tensor]) -> Tensor:
    """The gradient of whole rows' records from that of their statistics, where autograd is not at hand."""
    r = dict(zip(RECORD, record.unbind(-1), strict=True))
    zero = torch.zeros_like(r["shift"])
    up = {name: grads[name].double() if name in grads else zero for name in OUTPUTS}
    # An infinite divergence does not change with the logits.
    kl, reverse = (torch.where(r[name].isinf(), 0, r[name]) for name in ("kl", "reverse"))
    on_kl = torch.where(r["kl"].isinf(), 0, up["kl"])
    on_reverse = torch.where(r["reverse"].isinf(), 0, up["reverse_kl"])
    # Where a value is NaN, so is its gradient.
    missing = torch.where(r["found"] > 0, zero, torch.nan)
    on_token = up["logprob"] + missing if "logprob" in grads else zero
    on_ref_token = up["ref_logprob"] + missing if "ref_logprob" in grads else zero
    total = torch.where(r["shift"] == -torch.inf, torch.nan, r["total"])
    ref_total = torch.where(r["ref_shift"] == -torch.inf, torch.nan, r["ref_total"])
    on_log = up["logsumexp"] + up["entropy"] - on_token - on_kl + on_reverse
    on_ref_log = on_kl - on_reverse - on_ref_token
    terms = on_log
    if "entropy" in grads:
        terms = terms + up["entropy"] * r["weighted"] / total
    if "sum_sq" in grads:
        terms = terms - 2 * up["sum_sq"] * r["squares"] / total**2
    on_moment = up["sum_sq_logprob"]
    if "sum_sq_logprob" in grads:
        value = r["squares_weighted"] - total.log() * r["squares"]
        terms = terms - on_moment * (2 * value + r["squares"]) / total**2
    if "kl" in grads:
        terms = terms - on_kl * kl / total
    if "reverse_kl" in grads:
        on_ref_log = on_ref_log - on_reverse * reverse / ref_total
    found = {
        "total": terms / total,
        "weighted": -up["entropy"] / total,
        "squares": (up["sum_sq"] - (on_moment * total.log() if "sum_sq_logprob" in grads else 0)) / total**2,
        "squares_weighted": on_moment / total**2,
        "distance": up["mean_logit"] / r["columns"],
        "token": on_token,
    }
    if any(name in grads for name in REF_OUTPUTS):
        found |= {
            "ref_total": on_ref_log / ref_total,
            "ref_token": on_ref_token,
            "kl": on_kl / total,
            "reverse": on_reverse / ref_total,
        }
    made = torch.stack([found.get(name, zero) for name in RECORD], -1)
    return torch.where((r["columns"] == 0)[..., None], 0, made)


def finish(r: dict[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """The statistics, in the precision of the record; a row of no columns is masked, and 0."""
    masked = r["columns"] == 0
    empty = ~masked & (r["shift"] == -torch.inf)

    def log(total: Tensor, empty: Tensor) -> Tensor:
        return torch.where(empty, torch.nan, torch.where(masked | empty, 1, total).log())

    def divided(value: Tensor, total: Tensor, empty: Tensor) -> Tensor:
        return torch.where(masked | empty, 0, value) / torch.where(masked | empty, 1, total)

    def infinite_or(value: Tensor, finite: Callable[[Tensor], Tensor]) -> Tensor:
        # No gradient reaches an infinite divergence, which does not change with the logits.
        infinite = value.isinf() & ~normalisers.isnan()
        return torch.where(infinite, torch.inf, finite(torch.where(value.isinf(), 0, value)))

    def of_token(name: str) -> Tensor:
        return torch.where(r["found"] > 0, r[name], torch.nan)

    log_sum = log(r["total"], empty)
    if any(name in (*REF_OUTPUTS, "ref_log_sum") for name in outputs):
        ref_empty = ~masked & (r["ref_shift"] == -torch.inf)
        ref_log_sum = log(r["ref_total"], ref_empty)
        normalisers = ref_log_sum - log_sum
    formulas = {
        "log_sum": lambda: log_sum,
        "ref_log_sum": lambda: ref_log_sum,
        "logprob": lambda: of_token("token") - r["shift"] - log_sum,
        "entropy": lambda: log_sum - divided(r["weighted"], r["total"], empty),
        "logsumexp": lambda: torch.where(empty, 0, r["shift"]) + log_sum,
        "sum_sq": lambda: torch.where(empty, torch.nan, divided(r["squares"], r["total"] ** 2, empty)),
        "sum_sq_logprob": lambda: torch.where(
            empty,
            torch.nan,
            divided(r["squares_weighted"] - log_sum * r["squares"], r["total"] ** 2, empty),
        ),
        "mean_logit": lambda: torch.where(
            empty, -torch.inf, r["shift"] + divided(r["distance"], r["columns"], empty)
        ),
        "is_top1": lambda: (
            (r["found"] > 0) & ~empty & (r["total"] == r["total"]) & (r["token"] == r["shift"])
        ),
        "ref_logprob": lambda: of_token("ref_token") - r["ref_shift"] - ref_log_sum,
        "kl": lambda: infinite_or(r["kl"], lambda v: divided(v, r["total"], empty) + normalisers),
        "reverse_kl": lambda: infinite_or(
            r["reverse"], lambda v: divided(v, r["ref_total"], ref_empty) - normalisers
        ),
    }
    return {
        name: torch.where(masked, torch.zeros((), dtype=value.dtype, device=value.device), value)
        for name, value in ((name, formulas[name]()) for name in outputs)
    }


def log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """``log(beta q + (1 - beta) p)``; -inf where neither has mass."""
    largest = torch.maximum(logp, logq)
    shift = torch.where(largest == -torch.inf, 0, largest)
    return shift + (beta * (logq - shift).exp() + (1 - beta) * (logp - shift).exp()).log()


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    inplace: bool = False,
) -> list[Tensor]:
    """Return what is saved, ``[saved_rows, ...]``, and the outputs asked for."""
    acc = accumulator(logits)
    args = (temperatures, temperature, softcap)
    record = _records(logits, tokens, ref_logits, mask, *args, 0, vocab, outputs, None)
    whole = merge(record[None])
    t = row_temperatures(tokens, temperatures, temperature)
    names = [name for name in outputs if name != "jsd"]
    needed = ["log_sum"] if ref_logits is None else ["log_sum", "ref_log_sum"]
    if "sum_sq_logprob" in names:
        needed.append("sum_sq")  # of its backward pass
    found = finish(whole, [*needed, *names])
    for side in ("", "ref_"):
        found[f"{side}shift"] = whole[f"{side}shift"] * t
        empty = whole[f"{side}shift"] == -torch.inf
        found[f"{side}total"] = torch.where(empty, torch.nan, whole[f"{side}total"])
    if "jsd" in outputs:
        assert ref_logits is not None
        logp, logq = log_probabilities(
            logits, ref_logits, tokens, mask, t, softcap, vocab, found["log_sum"], found["ref_log_sum"]
        )
        log_m = log_mixture(logp, logq, beta)
        found["mixed_kl"] = product(logp.exp(), gap(logp, log_m)).sum(-1)
        found["ref_mixed_kl"] = product(logq.exp(), gap(logq, log_m)).sum(-1)
        found["jsd"] = beta * found["ref_mixed_kl"] + (1 - beta) * found["mixed_kl"]
        valid = valid_rows(tokens, mask)
        for name in ("mixed_kl", "ref_mixed_kl", "jsd"):
            found[name] = torch.where(valid, found[name], 0)
    rows = SAVED[: saved_rows(ref_logits is not None)]
    saved = torch.stack([found.get(name, torch.zeros_like(found["log_sum"])).double() for name in rows])
    return [saved, *(found[name] if name == "is_top1" else found[name].to(acc) for name in outputs)]


# ---- backward ----------------------------------------------------------------------------------------------


def log_probabilities(logits, ref_logits, tokens, mask, t, softcap, vocab, log_sum, ref_log_sum):  # type: ignore[no-untyped-def]
    acc = accumulator(logits)
    valid = valid_rows(tokens, mask)
    found = []
    for x, normaliser in ((logits, log_sum), (ref_logits, ref_log_sum)):
        y, _ = distances(capped(x, softcap, vocab, valid, acc), t)
        found.append(y - normaliser.to(acc)[..., None])
    return found


def side_gradient(
    logits: Tensor,
    logp: Tensor,
    logq: Tensor | None,
    log_m: Tensor | None,
    on: dict[str, Tensor],
    column: Tensor,
    found: Tensor,
    valid: Tensor,
    temperature: Tensor,
    softcap: float,
    vocab: int,
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
    if vocab:
        at = torch.where(found, column, 0)[..., None]
        g = g.scatter_add(-1, at, torch.where(found[..., None], on["token"], 0))
    g = g / temperature.to(g.dtype)[..., None]
    if softcap:
        g = g * (1 - torch.tanh(logits[..., :vocab].to(g.dtype) / softcap) ** 2)
    g = torch.where(valid[..., None], g, 0).to(logits.dtype)
    return torch.nn.functional.pad(g, (0, logits.shape[-1] - vocab))


def token_stats_backward(
    grads: Sequence[Tensor | None],
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    saved: Tensor,
    temperature: float,
    softcap: float,
    vocab: int,
    beta: float,
    outputs: Sequence[str],
    to_logits: bool,
    to_ref: bool,
) -> tuple[Tensor, Tensor]:
    """All upstream gradients folded into one gradient of the logits, and one of the reference's."""
    valid = valid_rows(tokens, mask)
    acc = accumulator(logits)
    known = dict(zip(SAVED, saved.to(acc), strict=False))
    t = row_temperatures(tokens, temperatures, temperature)
    found = (tokens >= 0) & (tokens < vocab)
    zero = torch.zeros_like(known["shift"])
    given = {name: g for name, g in zip(outputs, grads, strict=True) if g is not None}
    up = {name: torch.where(valid, given.get(name, zero), 0) for name in OUTPUTS}
    for name in ("kl", "reverse_kl"):
        if name in known:  # an infinite divergence does not change with the logits
            infinite = known[name].isinf()
            up[name], known[name] = torch.where(infinite, 0, up[name]), torch.where(infinite, 0, known[name])
    for name in ("logprob", "ref_logprob"):
        if name in given:  # where its value is NaN, so is its gradient
            up[name] = torch.where(found, up[name], torch.nan)

    policy = {
        "p": up["logsumexp"] - up["logprob"]
        - up["entropy"] * known["entropy"] - 2 * up["sum_sq"] * known["sum_sq"]
        - up["sum_sq_logprob"] * (2 * known["sum_sq_logprob"] + known["sum_sq"]),
        "log": -up["entropy"],
        "square": 2 * up["sum_sq"] + up["sum_sq_logprob"],
        "square_log": 2 * up["sum_sq_logprob"],
        "one": up["mean_logit"] / vocab,
        "token": up["logprob"],
    }  # fmt: skip
    if ref_logits is None:
        y, _ = distances(capped(logits, softcap, vocab, valid, acc), t)
        logp = y - known["total"].log()[..., None]
        grad = side_gradient(logits, logp, None, None, policy, tokens, found, valid, t, softcap, vocab)
        return grad, logits.new_empty(0)

    logp, logq = log_probabilities(
        logits, ref_logits, tokens, mask, t, softcap, vocab, known["total"].log(), known["ref_total"].log()
    )
    log_m = log_mixture(logp, logq, beta) if "jsd" in given else None
    policy["p"] = (
        policy["p"] + up["reverse_kl"] - up["kl"] * known["kl"] - (1 - beta) * up["jsd"] * known["mixed_kl"]
    )
    policy |= {"gap": up["kl"], "mixed": (1 - beta) * up["jsd"], "q": -up["reverse_kl"]}
    ref = {
        "p": up["kl"] - up["ref_logprob"]
        - up["reverse_kl"] * known["reverse_kl"] - beta * up["jsd"] * known["ref_mixed_kl"],
        "log": zero, "square": zero, "square_log": zero, "one": zero,
        "token": up["ref_logprob"],
        "gap": up["reverse_kl"], "mixed": beta * up["jsd"], "q": -up["kl"],
    }  # fmt: skip
    rest = (tokens, found, valid, t, softcap, vocab)
    return (
        side_gradient(logits, logp, logq, log_m, policy, *rest) if to_logits else logits.new_empty(0),
        side_gradient(ref_logits, logq, logp, log_m, ref, *rest) if to_ref else ref_logits.new_empty(0),
    )


def token_stats_backward_(grads: Sequence[Tensor | None], logits: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    """The same, the gradient of the logits written over them; returns that of the reference."""
    grad, ref = token_stats_backward(grads, logits, *rest)
    logits.copy_(grad)
    return ref


def token_stats_partial_backward(
    grad_record: Tensor,
    record: Tensor,
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    first: int,
    vocab: int,
    to_logits: bool,
    to_ref: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of the logits from that of their record: the same terms, of sums that are not normalised."""
    acc = torch.float64  # of sums that are not normalised: large terms cancel
    valid = valid_rows(tokens, mask)
    t = row_temperatures(tokens, temperatures, temperature)
    column = tokens - first
    found = (column >= 0) & (column < vocab)
    g = dict(zip(RECORD, torch.where(valid[..., None], grad_record, 0).unbind(-1), strict=True))
    y, _ = distances(capped(logits, softcap, vocab, valid, acc), t)
    zero = torch.zeros_like(g["total"])
    policy = {
        "p": g["total"] + g["weighted"] + g["kl"], "log": g["weighted"],
        "square": 2 * g["squares"] + g["squares_weighted"], "square_log": 2 * g["squares_weighted"],
        "one": g["distance"], "token": g["token"], "gap": g["kl"], "q": -g["reverse"],
    }  # fmt: skip
    rest = (column, found, valid, t, softcap, vocab)
    if ref_logits is None:
        return side_gradient(logits, y, None, None, policy, *rest), logits.new_empty(0)
    u, _ = distances(capped(ref_logits, softcap, vocab, valid, acc), t)
    ref = {
        "p": g["ref_total"] + g["reverse"], "log": zero, "square": zero, "square_log": zero, "one": zero,
        "token": g["ref_token"],
        "gap": g["reverse"], "q": -g["kl"],
    }  # fmt: skip
    return (
        side_gradient(logits, y, u, None, policy, *rest) if to_logits else logits.new_empty(0),
        side_gradient(ref_logits, u, y, None, ref, *rest) if to_ref else ref_logits.new_empty(0),
    )


# ---- a loss that is known at the call ------------------------------------------------------------------------


def with_gradient(
    forward: Callable[..., Any], backward: Callable[..., Any], backward_: Callable[..., Any]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """``token_stats_and_grad`` and its form in place, of a backend's forward and backward passes."""

    def run(coefficients, terms, logits, *rest):  # type: ignore[no-untyped-def]
        """The statistics, stacked; and the arguments of the backward pass."""
        *tensors, temperature, softcap, vocab, beta, outputs = rest
        scalars = (temperature, softcap, vocab, beta, outputs)
        acc = accumulator(logits)
        saved, *found = forward(logits, *tensors, *scalars, False)
        given = {name: c.to(acc) for name, c in zip(terms, coefficients, strict=True)}
        ups = [given.get(name) for name in outputs]
        return torch.stack([x.to(acc) for x in found]), (ups, logits, *tensors, saved, *scalars)

    def token_stats_and_grad(*args):  # type: ignore[no-untyped-def]
        stacked, rest = run(*args)
        return stacked, backward(*rest, True, False)[0]

    def token_stats_and_grad_(*args):  # type: ignore[no-untyped-def]
        stacked, rest = run(*args)
        backward_(*rest, True, False)
        return stacked

    return token_stats_and_grad, token_stats_and_grad_


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)
