"""Per-token KL on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..core.native import fresh_like
from ..reference.kl import ESTIMATORS, TokenKlArgs
from .memory import address, dense, function, threads


def _launch(grad: Tensor | None, a: TokenKlArgs, out: Tensor | None, out_ref: Tensor | None) -> None:
    inputs = [dense(t) for t in (*a[:5], grad)]  # the tensors
    function("token_kl", a.logprob)(
        tuple([address(t) for t in inputs]),
        (ESTIMATORS.index(a.estimator), a.largest_d, a.largest_value, a.scale, a.ratio_grad, a.ratio_cap),
        address(out), address(out_ref), a.logprob.numel(), threads(),
    )  # fmt: skip


def token_kl(a: TokenKlArgs) -> Tensor:
    out = fresh_like(a.logprob)
    _launch(None, a, out, None)
    return out


def token_kl_backward(grad: Tensor, a: TokenKlArgs, to_logprob: bool, to_ref: bool) -> tuple[Tensor, Tensor]:
    out, out_ref = (fresh_like(a.logprob) if wanted else None for wanted in (to_logprob, to_ref))
    _launch(grad, a, out, out_ref)
    return tuple(a.logprob.new_empty(0) if x is None else x for x in (out, out_ref))  # type: ignore[return-value]
