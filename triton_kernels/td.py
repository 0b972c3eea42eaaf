"""Discounted sums and temporal differences on the GPU: launches of the scans.

Memory traffic, forward: rewards, values and mask once, and two writes. Backward: the gradients and mask once, and
two writes. A few long rows are read twice.
"""

from __future__ import annotations

from torch import Tensor

from ..reference.td import TdArgs, of_scan
from .launch import BITS, cdiv, pair, pointer
from .rows import Rows, as_bytes, dense, stride
from .scans import MAX_CHUNKS, chunk_of, new_state, scan_in_stages
from .td_backward import FIELDS, td_backward_kernel
from .td_forward import NUMBER, PER_ROW, PER_TOKEN, td_kernel
from .tiles import EACH, THREADS, WARPS, empty_tokens, is_aligned


def _kind(discounts: Tensor | None) -> int:
    if discounts is None:
        return NUMBER.value
    return (PER_ROW if discounts.dim() == 2 and discounts.shape[1] == 1 else PER_TOKEN).value


def _discounts(discounts: Tensor | None) -> Tensor | None:
    if discounts is None:
        return None
    return discounts.contiguous() if _kind(discounts) == PER_ROW.value else dense(discounts)


def _token_stride(discounts: Tensor | None) -> int:
    return stride(discounts) if _kind(discounts) == PER_TOKEN.value else 0


def td_scan(a: TdArgs) -> tuple[Tensor, Tensor]:
    rows = Rows.of(a.rewards.shape, a.cu_seqlens, a.rewards)
    rewards, mask = dense(a.rewards), as_bytes(a.mask)
    values, rho, trace = (None if x is None else dense(x) for x in (a.values, a.rho, a.trace))
    gammas, lambdas = _discounts(a.gammas), _discounts(a.lambdas)
    bootstrap = None if a.bootstrap is None else a.bootstrap.contiguous()
    out = empty_tokens(rewards, rows)
    returns = rewards.new_empty(0) if values is None else empty_tokens(rewards, rows)
    if not out.numel() or not rows.batch:
        return out, returns
    chunk = chunk_of(rows, rewards)
    chunks = cdiv(rows.width, chunk)
    state = new_state(rows.batch, chunks, rewards)
    optional = (values, bootstrap, rho, trace, gammas, lambdas, mask)
    aligned = is_aligned(rows, rewards, values, rho, trace, gammas, lambdas, mask, out)
    pointers = (rewards, *(pointer(x, rewards) for x in optional), rows.cu, out, returns, state)
    strides = (stride(rewards), *(stride(x) for x in (values, mask, rho, trace)), _token_stride(gammas),
               _token_stride(lambdas), stride(out))  # fmt: skip

    def launch(stage: int) -> None:
        td_kernel[(rows.batch, chunks)](
            *pointers, rows.batch, rows.width, rows.total, chunks, chunk, *strides, *pair(a.gamma), *pair(a.lam),
            VALUES=values is not None, BOOT=bootstrap is not None, RHO=rho is not None, TRACE=trace is not None,
            GAMMA=_kind(gammas), LAMBDA=_kind(lambdas), DECAY=a.decay and mask is not None, PACKED=rows.packed,
            HAS_MASK=mask is not None, STAGE=stage, ALIGNED=aligned, MAX_CHUNKS=MAX_CHUNKS, PER=EACH, T=THREADS,
            num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out, returns


def td_scan_backward(
    grad: Tensor | None, grad_returns: Tensor | None, a: TdArgs, to_values: bool, to_bootstrap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = a.rewards
    rows = Rows.of(rewards.shape, a.cu_seqlens, rewards)
    grad, grad_returns, rho, trace = (
        None if x is None else dense(x) for x in (grad, grad_returns, a.rho, a.trace)
    )
    gammas, lambdas, mask = _discounts(a.gammas), _discounts(a.lambdas), as_bytes(a.mask)
    out = empty_tokens(rewards, rows)
    on_values = empty_tokens(rewards, rows) if to_values else rewards.new_empty(0)
    if not out.numel() or not rows.batch:
        return out, on_values, rewards.new_zeros(rows.batch if to_bootstrap else 0)
    on_bootstrap = rewards.new_empty(rows.batch if to_bootstrap else 0)
    decay = a.decay and mask is not None
    # The last valid token may lie in any chunk, and masked ones behind it pass nothing to the bootstrap value.
    chunk = rows.width if decay and to_bootstrap else chunk_of(rows, rewards)
    chunks = cdiv(rows.width, chunk)
    state = new_state(rows.batch, chunks, rewards, FIELDS.value)
    optional = (grad, grad_returns, rho, trace, gammas, lambdas, mask)
    aligned = is_aligned(rows, *optional, out)
    pointers = (*(pointer(x, rewards) for x in optional), rows.cu, out, on_values, on_bootstrap, state)
    strides = (stride(mask), stride(rho), stride(trace), _token_stride(gammas), _token_stride(lambdas),
               stride(grad), stride(grad_returns), stride(out))  # fmt: skip

    def launch(stage: int) -> None:
        td_backward_kernel[(rows.batch, chunks)](
            *pointers, rows.batch, rows.width, rows.total, chunks, chunk, *strides, *pair(a.gamma), *pair(a.lam),
            GRAD=grad is not None, THROUGH=grad_returns is not None, RHO=rho is not None, TRACE=trace is not None,
            GAMMA=_kind(gammas), LAMBDA=_kind(lambdas), DECAY=decay, VALUES=to_values, BOOT=to_bootstrap,
            PACKED=rows.packed, HAS_MASK=mask is not None, STAGE=stage, ALIGNED=aligned, MAX_CHUNKS=MAX_CHUNKS,
            PER=EACH, T=THREADS, num_warps=WARPS, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, chunks)
    return out, on_values, on_bootstrap


prefix_scan, differences = of_scan(td_scan_backward)
