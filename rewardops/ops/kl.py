"""Ops of the KL family."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import RealTokens
from ..core.records import save_record, saved_record, schema_of
from ..reference.kl import TokenKlArgs

_ARGS = schema_of(TokenKlArgs)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (args,) = inputs
    save_record(ctx, args._replace(rewards=None))


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    args, _ = saved_record(ctx)
    (needs,) = ctx.needs_input_grad
    grads: dict[str, Tensor] = {}
    if needs.logprob or needs.ref_logprob:
        on_logprob, on_ref = token_kl_backward(grad, *args, needs.logprob, needs.ref_logprob)
        if needs.logprob:
            grads["logprob"] = on_logprob
        if needs.ref_logprob:
            grads["ref_logprob"] = on_ref
    if needs.rewards:
        grads["rewards"] = grad if args.mask is None else torch.where(args.mask, grad, 0)
    return grads


token_kl_backward = define(
    "kl",
    f"token_kl_backward(Tensor grad, {_ARGS}, bool to_logprob, bool to_ref) -> (Tensor, Tensor)",
    record=TokenKlArgs,
    tensors={"grad": RealTokens},
    fake=lambda grad, args, *wanted: tuple(grad.new_empty(grad.shape if want else 0) for want in wanted),
)

token_kl = define(
    "kl",
    f"token_kl({_ARGS}) -> Tensor",
    record=TokenKlArgs,
    fake=lambda args: args.logprob.new_empty(args.logprob.shape),
    setup_context=_setup,
    backward=_gradient,
)
