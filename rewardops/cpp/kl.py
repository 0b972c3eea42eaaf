"""Per-token KL on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..core.native import fresh
from ..reference.kl import ESTIMATORS, TokenKlArgs
from .memory import address, dense, function, threads


def _launch(grad: Tensor | None, a: TokenKlArgs, wanted: list[bool]) -> list[Tensor]:
    """Outputs that are wanted, and empty tensors for the others."""
    inputs = [dense(t) for t in (*a[:5], grad)]  # the tensors
    like = a.logprob
    outs = [fresh(like.shape, like.dtype) if want else like.new_empty(0) for want in wanted]
    addresses = [address(out) if want else 0 for out, want in zip(outs, wanted, strict=True)]
    function("token_kl", like)(
        tuple(address(t) for t in inputs),
        (ESTIMATORS.index(a.estimator), a.largest_d, a.largest_value, a.scale, a.ratio_grad),
        *addresses, like.numel(), threads(),
    )  # fmt: skip
    return outs


def token_kl(a: TokenKlArgs) -> Tensor:
    return _launch(None, a, [True, False])[0]


def token_kl_backward(grad: Tensor, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    on_logprob, on_ref = _launch(grad, a, [to_logprob, to_ref])
    return on_logprob, on_ref
