"""Discounted sums and temporal differences on the GPU: launches of the scans in float64.

Memory traffic, forward: rewards, values and mask once, and two writes. Backward: the gradients and mask once, one
write, and one more read and write for the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.td import TdArgs, of_scan
from .launch import BITS, INTERPRETED, pair, pointer
from .rows import Rows, as_bytes, dense, output, stride
from .scans import CHUNK, chunks_of, new_state, scan_in_stages
from .td_backward import td_backward_kernel, td_values_kernel
from .td_forward import NUMBER, PER_ROW, PER_TOKEN, td_kernel

BLOCK = 64 if INTERPRETED else 256


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
    out = output(rewards, rewards.shape, rows.packed)
    returns = rewards.new_empty(0) if values is None else output(rewards, rewards.shape, rows.packed)
    if not out.numel() or not rows.batch:
        return out, returns
    chunks = chunks_of(rows, rewards)
    state = new_state(rows.batch, chunks, rewards)
    optional = (values, bootstrap, rho, trace, gammas, lambdas, mask)
    pointers = (rewards, *(pointer(x, rewards) for x in optional), rows.cu, out, returns, state)
    strides = (stride(rewards), *(stride(x) for x in (values, mask, rho, trace)), _token_stride(gammas),
               _token_stride(lambdas), stride(out))  # fmt: skip

    def launch(stage: int) -> None:
        td_kernel[(rows.batch, chunks)](
            *pointers, rows.width, rows.total, chunks, *strides, *pair(a.gamma), *pair(a.lam),
            VALUES=values is not None, BOOT=bootstrap is not None, RHO=rho is not None, TRACE=trace is not None,
            GAMMA=_kind(gammas), LAMBDA=_kind(lambdas), DECAY=a.decay and mask is not None, PACKED=rows.packed,
            HAS_MASK=mask is not None, STAGE=stage, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, state, reverse=True)
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
    out = output(rewards, rewards.shape, rows.packed)
    on_values = output(rewards, rewards.shape, rows.packed) if to_values else rewards.new_empty(0)
    on_bootstrap = rewards.new_zeros(rows.batch if to_bootstrap else 0)
    if not out.numel() or not rows.batch:
        return out, on_values, on_bootstrap
    passes = to_values or to_bootstrap
    passed = rewards.new_empty(rewards.shape if passes else 0, dtype=torch.float64)
    chunks = chunks_of(rows, rewards)
    state = new_state(rows.batch, chunks, rewards)
    optional = (grad, grad_returns, rho, trace, gammas, lambdas, mask)
    pointers = (*(pointer(x, rewards) for x in optional), rows.cu, out, passed, state)
    strides = (stride(mask), stride(rho), stride(trace), _token_stride(gammas), _token_stride(lambdas),
               stride(grad), stride(grad_returns), stride(out))  # fmt: skip
    options = {
        "THROUGH": grad_returns is not None, "GAMMA": _kind(gammas), "DECAY": a.decay and mask is not None,
        "PACKED": rows.packed, "HAS_MASK": mask is not None, "BLOCK": BLOCK, "num_warps": 4,
    }  # fmt: skip

    def launch(stage: int) -> None:
        td_backward_kernel[(rows.batch, chunks)](
            *pointers, rows.width, rows.total, chunks, *strides, *pair(a.gamma), *pair(a.lam),
            GRAD=grad is not None, RHO=rho is not None, TRACE=trace is not None, LAMBDA=_kind(lambdas),
            PASS=passes, STAGE=stage, CHUNK=CHUNK, **options, **BITS,
        )  # fmt: skip

    scan_in_stages(launch, state, reverse=False)
    if passes:
        td_values_kernel[(rows.batch,)](
            passed, pointer(grad_returns, rewards), pointer(gammas, rewards), pointer(mask, rewards), rows.cu,
            on_values, on_bootstrap, rows.width, rows.total, stride(mask), _token_stride(gammas),
            stride(grad_returns), stride(out), *pair(a.gamma), VALUES=to_values, BOOT=to_bootstrap,
            **options, **BITS,
        )  # fmt: skip
    return out, on_values, on_bootstrap


prefix_scan, differences = of_scan(td_scan_backward)
