"""Records of rows of logits: sums over columns, relative to the row's largest logit.

Records of parts of a row merge into the record of the whole row. Every statistic is a function of that record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OUTPUTS = (
    "logprob", "entropy", "logsumexp", "sum_p2", "sum_p2_logp", "mean_logit", "is_top1",
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
    "sum_p2": {"squares"}, "sum_p2_logp": {"squares", "squares_weighted"}, "mean_logit": {"distance"},
    "ref_logprob": {"found", "ref_token"}, "kl": {"kl"}, "reverse_kl": {"reverse"},
}  # fmt: skip


def fields_of(outputs: Sequence[str]) -> list[int]:
    """Indices in a record of the fields that outputs are computed from."""
    names = {"shift", "total", "columns"}.union(*(_NEEDS[name] for name in outputs))
    if any(name in REF_OUTPUTS for name in outputs):
        names |= {"ref_shift", "ref_total"}
    return [k for k, name in enumerate(RECORD) if name in names]


def merge(records: Tensor, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The record of whole rows, by field, from the records of their parts ``[parts, ..., len(RECORD)]``.

    With ``outputs``, only the fields that these are computed from.
    """
    r = dict(zip(RECORD, records.unbind(-1), strict=True))
    names = RECORD if outputs is None else [RECORD[k] for k in fields_of(outputs)]

    def moved(name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The shift of the whole row, the distance of each part's from it, and the factor of each part's sums."""
        part = r[name].detach()
        whole = part.amax(0)
        apart = torch.where(part == -torch.inf, 0, part - torch.where(whole == -torch.inf, 0, whole))
        return whole, apart, torch.where(part == -torch.inf, 0, apart.exp())

    def scaled(factor: Tensor, value: Tensor) -> Tensor:
        # An infinite divergence stays infinite under any factor. The sums of a part without mass are not read.
        finite = torch.where(factor > 0, factor * torch.where(factor > 0, value, 0), 0)
        return torch.where(value.isinf(), value, finite)

    shift, apart, factor = moved("shift")
    merged = {"shift": shift}
    terms: dict[str, Callable[[], Tensor]] = {
        "total": lambda: factor * r["total"],
        "weighted": lambda: scaled(factor, r["weighted"] + apart * r["total"]),
        "squares": lambda: factor * factor * r["squares"],
        "squares_weighted": lambda: scaled(factor * factor, r["squares_weighted"] + apart * r["squares"]),
        "distance": lambda: r["distance"] + apart * r["columns"],
    }
    if "ref_shift" in names:
        merged["ref_shift"], ref_apart, ref_factor = moved("ref_shift")
        between = apart - ref_apart
        terms |= {
            "ref_total": lambda: ref_factor * r["ref_total"],
            "kl": lambda: scaled(factor, r["kl"] + between * r["total"]),
            "reverse": lambda: scaled(ref_factor, r["reverse"] - between * r["ref_total"]),
        }
    for name in names:
        if name not in merged:
            merged[name] = (terms[name]() if name in terms else r[name]).sum(0)
    return merged


def merge_records(records: Tensor) -> Tensor:
    """The record of whole rows from those of their parts ``[parts, ..., len(RECORD)]``."""
    whole = merge(records)
    return torch.stack([whole[name] for name in RECORD], -1)


def record_gradient(record: Tensor, grads: dict[str, Tensor]) -> Tensor:
    """Gradient of whole rows' records from the gradients of their statistics, where autograd does not record."""
    r = dict(zip(RECORD, record.unbind(-1), strict=True))
    zero = torch.zeros_like(r["shift"])
    up = {name: grads[name].double() if name in grads else zero for name in OUTPUTS}
    # An infinite divergence does not change with the logits.
    kl, reverse = (torch.where(r[name].isinf(), 0, r[name]) for name in ("kl", "reverse"))
    on_kl = torch.where(r["kl"].isinf(), 0, up["kl"])
    on_reverse = torch.where(r["reverse"].isinf(), 0, up["reverse_kl"])
    # A value that is NaN has a gradient that is NaN.
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
    if "sum_p2" in grads:
        terms = terms - 2 * up["sum_p2"] * r["squares"] / total**2
    on_moment = up["sum_p2_logp"]
    if "sum_p2_logp" in grads:
        value = r["squares_weighted"] - total.log() * r["squares"]
        terms = terms - on_moment * (2 * value + r["squares"]) / total**2
    if "kl" in grads:
        terms = terms - on_kl * kl / total
    if "reverse_kl" in grads:
        on_ref_log = on_ref_log - on_reverse * reverse / ref_total
    gradient = {
        "total": terms / total,
        "weighted": -up["entropy"] / total,
        "squares": (up["sum_p2"] - (on_moment * total.log() if "sum_p2_logp" in grads else 0)) / total**2,
        "squares_weighted": on_moment / total**2,
        "distance": up["mean_logit"] / r["columns"],
        "token": on_token,
    }
    if any(name in grads for name in REF_OUTPUTS):
        gradient |= {
            "ref_total": on_ref_log / ref_total,
            "ref_token": on_ref_token,
            "kl": on_kl / total,
            "reverse": on_reverse / ref_total,
        }
    stacked = torch.stack([gradient.get(name, zero) for name in RECORD], -1)
    return torch.where((r["columns"] == 0)[..., None], 0, stacked)


def finish(r: dict[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """The statistics, in the precision of the record; a row with no columns is masked: 0."""
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
        "sum_p2": lambda: torch.where(empty, torch.nan, divided(r["squares"], r["total"] ** 2, empty)),
        "sum_p2_logp": lambda: torch.where(
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
