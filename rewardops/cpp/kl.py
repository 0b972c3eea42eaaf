"""Per-token KL on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..reference.kl import ESTIMATORS
from .memory import address, dense, fresh, function, threads


def _run(
    inputs: list[Tensor | None], estimator: str, scalars: tuple[float, float, float, bool], wanted: list[bool]
) -> list[Tensor]:
    """``inputs``: grad, logprob, ref_logprob, behavior, rewards, mask."""
    kept = [dense(t) for t in inputs]
    like = kept[1]
    assert like is not None
    outs = [fresh(like.shape, like.dtype) if want else like.new_empty(0) for want in wanted]
    addresses = [address(out) if want else 0 for out, want in zip(outs, wanted, strict=True)]
    function("token_kl", like)(
        tuple(address(t) for t in kept), (ESTIMATORS.index(estimator), *scalars), *addresses,
        like.numel(), threads(),
    )  # fmt: skip
    return outs


def token_kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None,
    behavior: Tensor | None,
    rewards: Tensor | None,
    estimator: str,
    largest_d: float,
    largest_value: float,
    scale: float,
    live: bool,
) -> Tensor:
    inputs = [None, logprob, ref_logprob, behavior, rewards, mask]
    return _run(inputs, estimator, (largest_d, largest_value, scale, live), [True, False])[0]


def token_kl_backward(
    grad: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None,
    behavior: Tensor | None,
    estimator: str,
    largest_d: float,
    largest_value: float,
    scale: float,
    live: bool,
    to_logprob: bool,
    to_ref: bool,
) -> tuple[Tensor, Tensor]:
    inputs = [grad, logprob, ref_logprob, behavior, None, mask]
    scalars = (largest_d, largest_value, scale, live)
    on_logprob, on_ref = _run(inputs, estimator, scalars, [to_logprob, to_ref])
    return on_logprob, on_ref
