"""Token statistics on the GPU: one read of the logits forward, one read and one write backward.

A row of V logits of e bytes moves V * e bytes forward and 2 * V * e backward, and as much again for a reference.
The outputs of a row, and the records of a row that is split over programs, are negligible.

This file launches the kernels, which are in ``logits_forward``, ``logits_records`` (merges the parts of a row),
``logits_jsd`` and ``logits_backward``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.logits import (
    RECORD,
    SAVED,
    TokenStatsArgs,
    accumulator,
    saved_rows,
    with_gradient,
)
from .launch import BITS, INTERPRETED, cdiv, pair, splits
from .logits_backward import token_stats_backward_kernel
from .logits_coefficients import Gradients
from .logits_forward import token_stats_kernel
from .logits_jsd import token_stats_mixture_kernel
from .logits_records import Outputs, token_stats_combine
from .logits_rows import bits

WARPS = 2  # of a program: a row has few columns for each thread, and ends in arithmetic that all warps repeat
# Outputs of at most two sums leave registers for twice as many warps.
LIGHT = {"logprob", "entropy", "logsumexp", "is_top1"}
MANY = 24  # programs per multiprocessor of a forward pass
LONG = 8  # blocks
MAX_PARTS = 64  # parts of a row, at most; their records are merged at once

# ---- launches ------------------------------------------------------------------------------------------------


def _block(logits: Tensor, warps: int, loads: int = 2) -> int:
    """Elements of a row that a program processes at once: some 16-byte loads per thread."""
    return 1024 if INTERPRETED else loads * 16 * 32 * warps // logits.element_size()


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """Layout of the leading dimensions: number of inner rows, outer stride, inner stride."""
    if logits.dim() == 2:
        return max(logits.shape[0], 1), 0, logits.stride(0)
    return max(logits.shape[1], 1), logits.stride(0), logits.stride(1)


def _places(tensor: Tensor) -> tuple[int, ...]:
    """Bytes that decide where rows begin: the address of the first, and the steps between rows."""
    return tensor.data_ptr(), *(step * tensor.element_size() for step in _strides(tensor)[1:])


def _alignment(*tensors: Tensor) -> int:
    """The largest power of two of at most 16 bytes that the address of every row is a multiple of."""
    return math.gcd(16, *(place for t in tensors for place in _places(t)))


def _alike(first: Tensor, *others: Tensor) -> bool:
    """Whether the rows of all tensors, of one dtype, lie alike relative to multiples of 16 bytes."""
    return all(
        t.dtype == first.dtype
        and all((a - b) % 16 == 0 for a, b in zip(_places(t), _places(first), strict=True))
        for t in others
    )


class TokenStatsLaunch:
    """Launches of the kernels for one batch of rows, and the arguments that they have in common.

    In place of a missing tensor a kernel receives another one as a placeholder, which it does not read.
    """

    def __init__(self, a: TokenStatsArgs) -> None:
        self.vocab, self.first, self.beta = a.vocab, a.first, pair(a.beta)
        self.has_ref = a.ref_logits is not None
        self.logits = _unit_stride(a.logits)
        self.ref = self.logits if a.ref_logits is None else _unit_stride(a.ref_logits)
        tokens = a.tokens.contiguous()
        self.rows = (
            tokens,
            tokens if a.mask is None else a.mask.contiguous().view(torch.uint8),
            tokens if a.temperatures is None else a.temperatures.contiguous(),
        )
        self.count = tokens.numel()
        self.strides = (*_strides(self.logits), *_strides(self.ref))
        self.inverse_temperature, self.cap = pair(1.0 / a.temperature), pair(a.softcap or 1.0)
        self.row_flags = {"HAS_MASK": a.mask is not None, "HAS_TEMPERATURES": a.temperatures is not None}
        self.flags = {**self.row_flags, "CAPPED": a.softcap > 0}
        # One load of each model, or where the softcap takes registers.
        self.block = _block(self.logits, WARPS, 1 if self.has_ref or a.softcap > 0 else 2)

    def parts(self, block: int, few: int, many: int = 0) -> tuple[int, int]:
        """Blocks of a part, and parts of a row: several where rows alone do not fill the device.

        ``few`` programs per multiprocessor in any case; up to ``many``, so that the last to end are a small part
        of all, if parts have at least LONG blocks: each ends in the arithmetic of a row.
        """
        blocks = cdiv(self.vocab, block)
        least, most = (splits(self.logits, self.count, blocks, programs) for programs in (few, many))
        wanted = max(least, min(most, blocks // LONG))
        each = max(cdiv(blocks, min(MAX_PARTS, wanted)), 1)
        return each, max(cdiv(blocks, each), 1)

    def tiles(self, block: int) -> dict[str, int]:
        """A block by the loads of a lane, lanes, and elements of a load of 16 bytes; and the rows' alignment."""
        elements = 16 // self.logits.element_size()
        align = _alignment(self.logits, self.ref)
        return {"H": 2, "T": block // (2 * elements), "E": elements, "ALIGN": align}

    def forward(
        self, outputs: Sequence[str], results: dict[str, Tensor], saved: Tensor, record: Tensor | None
    ) -> None:
        """Write statistics to ``results`` and the inputs of the backward pass to ``saved``; or only a record."""
        if not self.count:
            return
        # Placeholders have the dtype of the accumulation.
        missing = self.logits.new_empty(1, dtype=accumulator(self.logits))
        out = [results.get(name, missing) for name in Outputs._fields]
        warps = WARPS if self.has_ref or not LIGHT.issuperset(outputs) else 2 * WARPS
        block = _block(self.logits, warps)
        each, parts = self.parts(block, 2, MANY)
        whole = saved if record is None else record
        partial = whole
        if parts > 1:
            partial = self.logits.new_empty((self.count, parts, len(RECORD)), dtype=torch.float64)
        want = {"WANT": bits(outputs), "HAS_REF": self.has_ref, "TO_RECORD": record is not None}
        token_stats_kernel[(self.count, parts)](
            self.logits, self.ref, *self.rows, *out, saved, partial, self.count, *self.strides,
            self.first, self.vocab, each, parts, *self.inverse_temperature, *self.cap,
            **want, **self.flags, SPLIT=parts > 1, **self.tiles(block), num_warps=warps, **BITS,
        )  # fmt: skip
        if parts > 1:
            token_stats_combine[(self.count,)](
                *self.rows, partial, *out, saved, whole, self.count, parts,
                *self.inverse_temperature, **want, **self.row_flags, MAX_PARTS=MAX_PARTS, num_warps=1, **BITS,
            )  # fmt: skip

    def mixture(self, saved: Tensor) -> tuple[Tensor, Tensor]:
        """KL of both models to their mixture, from the shifts and totals in ``saved``."""
        block = _block(self.logits, WARPS)
        each, parts = self.parts(block, 2)
        partial = saved.new_empty((self.count, parts, 2), dtype=torch.float64)
        if self.count:
            token_stats_mixture_kernel[(self.count, parts)](
                self.logits, self.ref, *self.rows, saved, partial, self.count, *self.strides,
                self.vocab, each, parts, *self.inverse_temperature, *self.cap, *self.beta,
                **self.flags, **self.tiles(block), num_warps=WARPS, **BITS,
            )  # fmt: skip
        mixed, ref_mixed = partial.sum(1).view(*saved.shape[1:], 2).unbind(-1)
        return mixed, ref_mixed

    def backward(
        self,
        grads: dict[str, Tensor],
        saved: Tensor,
        out: Tensor | None,
        ref_out: Tensor | None,
        grad_record: Tensor | None = None,
    ) -> None:
        """Write the gradients of logits to ``out`` and ``ref_out``, from those of statistics or of records.

        ``saved`` holds the saved statistics of the forward pass, or with ``grad_record`` the records.
        """
        if not self.count:
            return
        each, parts = self.parts(self.block, 4)
        target, ref_target = (self.logits if t is None else t for t in (out, ref_out))
        width = self.logits.shape[-1]
        tensors = [self.logits, self.ref, target, ref_target]
        aligned = _alignment(*tensors) == 16
        peel = not aligned and _alike(*tensors)
        token_stats_backward_kernel[(self.count, parts)](
            *(grads.get(name, saved) for name in Gradients._fields),
            saved if grad_record is None else grad_record, saved,
            self.logits, self.ref, *self.rows, target, ref_target,
            self.count, *self.strides, *_strides(target), width, self.first, self.vocab, width, each,
            *self.inverse_temperature, *self.cap, *self.beta,
            GRADS=bits(list(grads)), TO_LOGITS=out is not None, TO_REF=ref_out is not None, HAS_REF=self.has_ref,
            **self.flags, OF_RECORD=grad_record is not None, ALIGNED=aligned, PEEL=peel,
            BLOCK=self.block, num_warps=WARPS, **BITS,
        )  # fmt: skip


def _present(outputs: Sequence[str], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The upstream gradients that are not None, by output."""
    return {name: g.contiguous() for name, g in zip(outputs, grads, strict=True) if g is not None}


def _empty(a: TokenStatsArgs, to_logits: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of both models' logits; size 0 for a gradient that is not needed."""
    ref = a.logits if a.ref_logits is None else a.ref_logits
    return a.logits.new_empty(a.logits.shape if to_logits else 0), ref.new_empty(ref.shape if to_ref else 0)


# ---- the ops -------------------------------------------------------------------------------------------------


def token_stats(a: TokenStatsArgs, inplace: bool) -> list[Tensor]:
    """Return the saved statistics ``[saved_rows, ...]``, then the outputs."""
    launch = TokenStatsLaunch(a)
    acc, shape = accumulator(a.logits), a.tokens.shape
    # Zeros, as not every row is written.
    saved = a.logits.new_zeros((saved_rows(launch.has_ref), *shape), dtype=torch.float64)
    results = {
        name: a.logits.new_empty(shape, dtype=torch.uint8 if name == "is_top1" else acc)
        for name in a.outputs
        if name != "jsd"
    }
    launch.forward(a.outputs, results, saved, None)
    if "is_top1" in a.outputs:
        results["is_top1"] = results["is_top1"].view(torch.bool)
    if "jsd" in a.outputs:
        mixed, ref_mixed = launch.mixture(saved)
        saved[SAVED.index("mixed_kl")], saved[SAVED.index("ref_mixed_kl")] = mixed, ref_mixed
        results["jsd"] = (a.beta * ref_mixed + (1 - a.beta) * mixed).to(acc)
    return [saved, *(results[name] for name in a.outputs)]


def token_stats_partial(a: TokenStatsArgs) -> Tensor:
    """Return records ``[..., len(RECORD)]``; sums that no output needs are NaN, masked rows are 0."""
    record = a.logits.new_empty((*a.tokens.shape, len(RECORD)), dtype=torch.float64)
    TokenStatsLaunch(a).forward(a.outputs, {}, record, record)
    return record


def token_stats_backward(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of both models' logits; empty if not needed."""
    out, ref_out = _empty(a, to_logits, to_ref)
    token_stats_backward_to(grads, saved, a, out if to_logits else None, ref_out if to_ref else None)
    return out, ref_out


def token_stats_backward_(
    grads: Sequence[Tensor | None], saved: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> Tensor:
    """Overwrite the logits with their gradient; return the gradient of the reference's logits."""
    launch = TokenStatsLaunch(a)
    ref_out = launch.ref.new_empty(launch.ref.shape if to_ref else 0)
    out = launch.logits
    launch.backward(_present(a.outputs, grads), saved.contiguous(), out, ref_out if to_ref else None)
    if out is not a.logits:
        a.logits.copy_(out)  # the columns of these logits are more than an element apart
    return ref_out


def token_stats_partial_backward(
    grad_record: Tensor, record: Tensor, a: TokenStatsArgs, to_logits: bool, to_ref: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of both models' logits from that of their records; empty if not needed."""
    out, ref_out = _empty(a, to_logits, to_ref)
    token_stats_partial_backward_to(
        grad_record, record, a, out if to_logits else None, ref_out if to_ref else None
    )
    return out, ref_out


token_stats_and_grad, token_stats_and_grad_ = with_gradient(
    token_stats, token_stats_backward, token_stats_backward_
)


# ---- blocks of logits from a matmul: gradients are written to memory of the caller ---------------------------


def token_stats_backward_to(
    grads: Sequence[Tensor | None],
    saved: Tensor,
    a: TokenStatsArgs,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """:func:`token_stats_backward` with results in ``out`` and ``ref_out``, which may overlap the logits."""
    launch = TokenStatsLaunch(a)
    launch.backward(_present(a.outputs, grads), saved.contiguous(), out, ref_out)


def token_stats_partial_backward_to(
    grad_record: Tensor, record: Tensor, a: TokenStatsArgs, out: Tensor | None, ref_out: Tensor | None
) -> None:
    """:func:`token_stats_partial_backward` with results in ``out`` and ``ref_out``, likewise."""
    launch = TokenStatsLaunch(a)
    launch.backward({}, record.contiguous(), out, ref_out, grad_record.contiguous())
