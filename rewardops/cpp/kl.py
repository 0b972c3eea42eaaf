"""Per-token KL on the CPU."""

from __future__ import annotations

from torch import Tensor

from .memory import address, dense, fresh, function, threads

_ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}


def _run(
    grad: Tensor | None, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    grad, mask = dense(grad), dense(mask)
    logprob, ref_logprob = logprob.contiguous(), ref_logprob.contiguous()
    out = fresh(logprob.shape, logprob.dtype)
    function("token_kl", logprob)(
        address(grad),
        address(logprob),
        address(ref_logprob),
        address(mask),
        _ESTIMATORS[estimator],
        address(out),
        out.numel(),
        threads(),
    )
    return out


def token_kl(logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    return _run(None, logprob, ref_logprob, mask, estimator)


def token_kl_backward(
    grad: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    return _run(grad, logprob, ref_logprob, mask, estimator)
