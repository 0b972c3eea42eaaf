"""Token statistics on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from ..core.native import compiled_module, fresh
from ..reference.logits import OUTPUTS, RECORD, TokenStatsArgs, accumulator, saved_rows, with_gradient
from .memory import address, dense, threads

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_ROWS = (0, 0, 1, 0, 0)
_NO_ADDRESSES = (0,) * len(OUTPUTS)
_TERMS = {"entropy": 1, "sum_p2": 2, "sum_p2_logp": 2 | 32, "mean_logit": 4, "kl": 8, "reverse_kl": 16}

Rows = tuple[int, int, int, int, int]


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def rows(logits: Tensor | None) -> Rows:
    """Address, dtype, and the rows of the leading dimensions: inner rows, outer and inner stride."""
    if logits is None:
        return _NO_ROWS
    shape, strides = logits.shape, logits.stride()
    outer = strides[0] if len(shape) == 3 else 0
    return logits.data_ptr(), _DTYPES[logits.dtype], max(shape[-2], 1), outer, strides[-2]


def _addresses(by_name: dict[str, Tensor]) -> tuple[int, ...]:
    """An address for each of ``OUTPUTS``, 0 where there is no tensor."""
    return tuple([by_name[name].data_ptr() if name in by_name else 0 for name in OUTPUTS])


class TokenStatsLaunch:
    """Arguments as the compiled module takes them; keeps the tensors alive whose addresses they hold."""

    def __init__(self, a: TokenStatsArgs) -> None:
        self.logits = _unit_stride(a.logits)
        self.ref = None if a.ref_logits is None else _unit_stride(a.ref_logits)
        self.per_row = a.tokens.contiguous(), dense(a.mask), dense(a.temperatures)
        ids, valid, temperatures = [address(t) for t in self.per_row]
        self.tuple = (
            a.tokens.numel(), rows(self.logits), ids, rows(self.ref), valid, temperatures,
            a.temperature, a.softcap, a.first, a.vocab, a.beta,
        )  # fmt: skip


def token_stats(a: TokenStatsArgs, inplace: bool) -> list[Tensor]:
    launch = TokenStatsLaunch(a)
    shape, acc = a.tokens.shape, accumulator(a.logits)
    # Zeros: the kernel does not fill every row.
    like = a.logits
    saved = like.new_zeros((saved_rows(a.ref_logits is not None), *shape), dtype=torch.float64)
    out = {name: like.new_empty(shape, dtype=torch.bool if name == "is_top1" else acc) for name in a.outputs}
    compiled_module().token_stats(launch.tuple, _addresses(out), address(saved), 0, 0, threads())  # type: ignore[union-attr]
    return [saved, *out.values()]


def token_stats_partial(a: TokenStatsArgs) -> Tensor:
    launch = TokenStatsLaunch(a)
    record = a.logits.new_empty((*a.tokens.shape, len(RECORD)), dtype=torch.float64)
    terms = reduce(or_, (_TERMS.get(name, 0) for name in a.outputs), 0)
    compiled_module().token_stats(launch.tuple, _NO_ADDRESSES, 0, address(record), terms, threads())  # type: ignore[union-attr]
    return record


# ---- backward passes into memory of the caller, which may lie over the logits ------------------------------


def _from_saved(
    launch: TokenStatsLaunch,
    grads: Sequence[Tensor | None],
    saved: Tensor,
    outputs: Sequence[str],
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    ups = {name: g.contiguous() for name, g in zip(outputs, grads, strict=True) if g is not None}
    saved = saved.contiguous()
    compiled_module().token_stats_backward(  # type: ignore[union-attr]
        launch.tuple,
        _addresses(ups),
        address(saved),
        0,
        0,
        launch.logits.shape[-1],
        rows(out),
        rows(ref_out),
        threads(),
    )


def _from_record(
    launch: TokenStatsLaunch, grad_record: Tensor, record: Tensor, out: Tensor | None, ref_out: Tensor | None
) -> None:
    grad_record, record = grad_record.contiguous(), record.contiguous()
    compiled_module().token_stats_backward(  # type: ignore[union-attr]
        launch.tuple, _NO_ADDRESSES, 0, address(grad_record), address(record), launch.logits.shape[-1],
        rows(out), rows(ref_out), threads(),
    )  # fmt: skip


def token_stats_backward_to(
    grads: Sequence[Tensor | None],
    saved: Tensor,
    a: TokenStatsArgs,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """As :func:`token_stats_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    _from_saved(TokenStatsLaunch(a), grads, saved, a.outputs, out, ref_out)


def token_stats_partial_backward_to(
    grad_record: Tensor, record: Tensor, a: TokenStatsArgs, out: Tensor | None, ref_out: Tensor | None
) -> None:
    """As :func:`token_stats_partial_backward`, into ``out`` and ``ref_out``, which may lie over the logits."""
    _from_record(TokenStatsLaunch(a), grad_record, record, out, ref_out)


# ---- backward passes ---------------------------------------------------------------------------------------


def _gradients(
    launch: TokenStatsLaunch, to_logits: bool, to_ref: bool
) -> tuple[Tensor | None, Tensor | None]:
    logits, ref = launch.logits, launch.ref
    return (
        fresh(logits.shape, logits.dtype) if to_logits else None,
        fresh(ref.shape, ref.dtype) if to_ref and ref is not None else None,
    )


def _or_empty(grad: Tensor | None, like: Tensor | None, other: Tensor) -> Tensor:
    return (other if like is None else like).new_empty(0) if grad is None else grad


def token_stats_backward(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    launch = TokenStatsLaunch(a)
    out, ref_out = _gradients(launch, to_logits, to_ref)
    _from_saved(launch, grads, saved, a.outputs, out, ref_out)
    return _or_empty(out, a.logits, a.logits), _or_empty(ref_out, a.ref_logits, a.logits)


def token_stats_backward_(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> Tensor:
    """Write the gradient of the logits over them; return that of the reference."""
    launch = TokenStatsLaunch(a)
    _, ref_out = _gradients(launch, False, to_ref)
    _from_saved(launch, grads, saved, a.outputs, launch.logits, ref_out)
    if launch.logits is not a.logits:
        a.logits.copy_(launch.logits)  # the columns did not have unit stride
    return _or_empty(ref_out, a.ref_logits, a.logits)


def token_stats_partial_backward(
    grad_record: Tensor, record: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    launch = TokenStatsLaunch(a)
    out, ref_out = _gradients(launch, to_logits, to_ref)
    _from_record(launch, grad_record, record, out, ref_out)
    return _or_empty(out, a.logits, a.logits), _or_empty(ref_out, a.ref_logits, a.logits)


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)
