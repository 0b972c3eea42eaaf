"""Token statistics on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from ..core.native import compiled_module
from ..reference.logits import OUTPUTS, RECORD, accumulator, saved_rows, with_gradient
from .memory import address, dense, fresh, threads

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_ROWS = (0, 0, 1, 0, 0)
_TERMS = {"entropy": 1, "sum_sq": 2, "sum_sq_logprob": 2 | 32, "mean_logit": 4, "kl": 8, "reverse_kl": 16}

Rows = tuple[int, int, int, int, int]


def _unit_stride(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.stride(-1) == 1 else logits.contiguous()


def rows(logits: Tensor | None) -> Rows:
    """Address, dtype, and the rows of the leading dimensions: inner rows, outer and inner stride."""
    if logits is None:
        return _NO_ROWS
    *lead, _ = logits.shape
    outer, inner = (0, logits.stride(0)) if len(lead) == 1 else logits.stride()[:2]
    return logits.data_ptr(), _DTYPES[logits.dtype], max(lead[-1], 1), outer, inner


class Problem:
    """What forward and backward have in common, as the compiled module takes it; keeps its tensors alive."""

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        ref_logits: Tensor | None,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        first: int,
        vocab: int,
        beta: float,
    ) -> None:
        self.logits, self.ref = _unit_stride(logits), _unit_stride(ref_logits)
        self.kept = tokens.contiguous(), dense(mask), dense(temperatures)
        ids, valid, per_row = (address(t) for t in self.kept)
        self.tuple = (
            tokens.numel(), rows(self.logits), rows(self.ref), vocab, first, ids, valid,
            temperature, per_row, softcap, beta,
        )  # fmt: skip


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
    inplace: bool,
) -> list[Tensor]:
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, 0, vocab, beta)
    acc = accumulator(logits)
    # Zeros: not every row of it is filled.
    saved = torch.zeros((saved_rows(ref_logits is not None), *tokens.shape), dtype=torch.float64)
    made = {
        name: torch.empty(tokens.shape, dtype=torch.bool if name == "is_top1" else acc) for name in outputs
    }
    addresses = tuple(address(made.get(name)) for name in OUTPUTS)
    compiled_module().token_stats(problem.tuple, addresses, address(saved), 0, 0, threads())  # type: ignore[union-attr]
    return [saved, *made.values()]


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
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, first, vocab, 0.5)
    record = torch.empty((*tokens.shape, len(RECORD)), dtype=torch.float64)
    terms = reduce(or_, (_TERMS.get(name, 0) for name in outputs), 0)
    nothing = (0,) * len(OUTPUTS)
    compiled_module().token_stats(problem.tuple, nothing, 0, address(record), terms, threads())  # type: ignore[union-attr]
    return record


def _backward(
    problem: Problem,
    grads: tuple[int, ...],
    saved: Tensor | None,
    grad_record: Tensor | None,
    record: Tensor | None,
    grad_logits: Tensor | None,
    grad_ref: Tensor | None,
) -> None:
    assert problem.logits is not None
    compiled_module().token_stats_backward(  # type: ignore[union-attr]
        problem.tuple,
        grads,
        address(saved),
        address(grad_record),
        address(record),
        problem.logits.shape[-1],
        rows(grad_logits),
        rows(grad_ref),
        threads(),
    )


def _from_saved(
    problem: Problem,
    grads: Sequence[Tensor | None],
    outputs: Sequence[str],
    saved: Tensor,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    ups = {name: dense(g) for name, g in zip(outputs, grads, strict=True)}
    addresses = tuple(address(ups.get(name)) for name in OUTPUTS)
    _backward(problem, addresses, saved.contiguous(), None, None, out, ref_out)


def _from_record(
    problem: Problem, grad_record: Tensor, record: Tensor, out: Tensor | None, ref_out: Tensor | None
) -> None:
    nothing = (0,) * len(OUTPUTS)
    _backward(problem, nothing, None, grad_record.contiguous(), record.contiguous(), out, ref_out)


def _gradients(problem: Problem, to_logits: bool, to_ref: bool) -> tuple[Tensor | None, Tensor | None]:
    logits, ref = problem.logits, problem.ref
    return (
        fresh(logits.shape, logits.dtype) if to_logits and logits is not None else None,
        fresh(ref.shape, ref.dtype) if to_ref and ref is not None else None,
    )


def _or_empty(grad: Tensor | None, like: Tensor | None, other: Tensor) -> Tensor:
    return (other if like is None else like).new_empty(0) if grad is None else grad


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
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, 0, vocab, beta)
    made = _gradients(problem, to_logits, to_ref)
    _from_saved(problem, grads, outputs, saved, *made)
    return _or_empty(made[0], logits, logits), _or_empty(made[1], ref_logits, logits)


def token_stats_backward_(
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
) -> Tensor:
    """The gradient of the logits written over them; returns that of the reference."""
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, 0, vocab, beta)
    assert problem.logits is not None
    _, ref = _gradients(problem, False, to_ref)
    _from_saved(problem, grads, outputs, saved, problem.logits, ref)
    if problem.logits is not logits:
        logits.copy_(problem.logits)  # columns that were no unit stride apart
    return _or_empty(ref, ref_logits, logits)


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
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, first, vocab, 0.5)
    made = _gradients(problem, to_logits, to_ref)
    _from_record(problem, grad_record, record, *made)
    return _or_empty(made[0], logits, logits), _or_empty(made[1], ref_logits, logits)


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)


# ---- for blocks of logits that a product has just made: gradients written where the caller wants them ------------


def token_stats_backward_to(
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
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """As :func:`token_stats_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, 0, vocab, beta)
    _from_saved(problem, grads, outputs, saved, out, ref_out)


def token_stats_partial_backward_to(
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
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """As :func:`token_stats_partial_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    problem = Problem(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, first, vocab, 0.5)
    _from_record(problem, grad_record, record, out, ref_out)
