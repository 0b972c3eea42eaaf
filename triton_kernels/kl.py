"""Per-token KL on the GPU: elementwise; two reads and a write forward, three reads and a write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, pointer

BLOCK = 1024
_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


@triton.jit
def exp_remainder(x, TERMS: tl.constexpr):
    """(e^x - 1 - x) / x^2 on |x| < 1, by its Taylor series."""
    y = x * 0 + 1.0
    for i in tl.static_range(TERMS):
        y = 1.0 + y * x * (1.0 / (TERMS + 2 - i))
    return y * 0.5


@triton.jit
def expm1_minus(x, LINEAR: tl.constexpr, TERMS: tl.constexpr):
    """e^x - 1, less x where LINEAR says so, to full relative accuracy."""
    near = (x < 1) & (x > -1)
    s = tl.where(near, x, 0.0)
    small = s * s * exp_remainder(s, TERMS)
    large = tl.exp(x) - 1
    if LINEAR:
        return tl.where(near, small, large - x)
    return tl.where(near, s + small, large)


@triton.jit(do_not_specialize=["count"])
def token_kl_kernel(
    grad, logprob, ref_logprob, mask, out, count,
    ESTIMATOR: tl.constexpr, HAS_MASK: tl.constexpr, BACKWARD: tl.constexpr, TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    if HAS_MASK:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    d = tl.load(logprob + at, mask=valid, other=0.0) - tl.load(ref_logprob + at, mask=valid, other=0.0)
    if BACKWARD:
        up = tl.load(grad + at, mask=valid, other=0.0)
        if ESTIMATOR == 1:
            value = up
        elif ESTIMATOR == 2:
            value = up * d
        else:
            value = -up * expm1_minus(-d, False, TERMS)
    else:
        if ESTIMATOR == 1:
            value = d
        elif ESTIMATOR == 2:
            value = d * d * 0.5
        else:
            value = expm1_minus(-d, True, TERMS)
    tl.store(out + at, tl.where(valid, value, 0.0), mask=at < count)


def _run(
    grad: Tensor | None, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    logprob, ref_logprob = logprob.contiguous(), ref_logprob.contiguous()
    out = logprob.new_empty(logprob.shape)
    count = out.numel()
    if count:
        token_kl_kernel[(cdiv(count, BLOCK),)](
            pointer(None if grad is None else grad.contiguous(), logprob),
            logprob,
            ref_logprob,
            logprob if mask is None else mask.contiguous().view(torch.uint8),
            out,
            count,
            ESTIMATOR=_ESTIMATORS[estimator],
            HAS_MASK=mask is not None,
            BACKWARD=grad is not None,
            TERMS=18 if logprob.dtype is torch.float64 else 9,
            BLOCK=BLOCK,
        )
    return out


def token_kl(logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    return _run(None, logprob, ref_logprob, mask, estimator)


def token_kl_backward(
    grad: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    return _run(grad, logprob, ref_logprob, mask, estimator)
