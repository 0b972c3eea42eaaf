"""Hidden states: token statistics of ``hidden @ weight.T`` without holding the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from .core import checks, distributed
from .core.precision import autocast_enabled
from .core.settings import may_read
from .core.transforms import may_require_grad
from .logits import OUTPUTS, PARTIAL_OUTPUTS, TokenStats, merge_over_ranks, shard_start
from .ops import linear as ops
from .ops.token_arguments import check_coefficients, check_outputs, token_arguments
from .reference.linear import LinearArgs, precision
from .reference.logits import valid_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_token_loss", "linear_token_stats", "linear_token_stats_partial"]


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
    beta: float | Tensor = 0.5,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    num_tokens: int | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """Token statistics of the logits ``logit_scale * (hidden @ weight.T + bias)``, which are never held.

    Logits are computed block by block in a small workspace, read once, and computed again in the backward pass,
    where each block becomes its gradient in place: four products forward and backward, instead of the plain
    formula's three and several tensors of ``[N, V]``. :func:`linear_token_loss` needs three. On CUDA, products of
    half precision give float32, so that no logit is rounded; on CPUs with arithmetic for bfloat16 they give
    bfloat16, rounded once with the bias as in ``torch.nn.functional.linear``, elsewhere float32. Sums over blocks
    are in float32 (float64 for float64).

    Masked tokens are left out before the first product and cost nothing; their hidden states are not read.

    Args:
        hidden: ``[N, D]`` or ``[B, T, D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, the head; may have another dtype (products are in the wider of the two), and may be
            tied to the embedding. Under autocast both are cast as in a linear layer.
        tokens: ``[N]`` or ``[B, T]``, integer ids; -100 counts as masked.
        bias: ``[V]``; None for none.
        ref_hidden: hidden states of the reference model, one per token, for the outputs that compare the two;
            its hidden size may differ. None, with ``ref_weight``, for no reference.
        ref_weight: the reference's head, with the rows of ``weight``.
        ref_bias: ``[V]``, the reference's bias; None for none.
        temperature: above 0: a number, or a float tensor with one per row (``[B]``) or per token; no gradient
            flows into it.
        softcap: above 0; None for no softcap.
        logit_scale: above 0; applied before the softcap (as in Cohere and Granite).
        vocab_size: rows of the head from here on are padding; None for no padding.
        mask: the shape of ``tokens``; bool, integer or float 0/1. None for all tokens.
        outputs: names of the statistics to return, as in :func:`rewardops.token_stats`.
        beta: for ``jsd``, above 0 and below 1.
        chunk_tokens: tokens of a block; None for 4096. For ``jsd``, which needs whole rows, None is as many as
            the workspace holds, at least 512.
        chunk_vocab: vocabulary entries of a block; None for as many as the workspace holds: 256 MiB or 1 % of
            the logits in float32, the larger; 32 MiB on a CPU, near its caches. No effect for ``jsd``.
        num_tokens: an upper bound of the number of valid tokens. Without it the number is read from the device,
            the one synchronisation of this op, forward and backward.
        process_group: for tensor parallelism, as in :func:`rewardops.token_stats`: weight and bias are this
            rank's shards, hidden states are the same on all ranks. One collective forward, and one backward
            that sums the hidden states' gradient over the ranks (in float32, or float64), which is then the
            same on each.

    Returns:
        :class:`TokenStats`, with the shape of ``tokens``. Differentiable once in hidden, weight and bias of
        both sides. The weight's gradient is computed part by part, once per part; for ``jsd`` it is summed in a
        float32 tensor of its size.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, half a reference, an unknown output, an output of two
            models without a reference, a number out of its range, ``jsd`` with a process group.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
        >>> stats = ro.linear_token_stats(hidden, weight, torch.tensor([2, 0]))
        >>> [round(x, 3) for x in stats.logprob.tolist()]  # of the logits [1, 2, 3] and [0, 0, 0]
        [-0.408, -1.099]
    """
    if process_group is not None:
        checks.check_float("hidden", hidden)
        checks.check_float("weight", weight)
        replicated = distributed.replicated(hidden, process_group)
        ref_replicated = None if ref_hidden is None else distributed.replicated(ref_hidden, process_group)
        record = linear_token_stats_partial(
            replicated, weight, tokens, vocab_start=shard_start(weight.shape[:1], process_group), bias=bias,
            ref_hidden=ref_replicated, ref_weight=ref_weight, ref_bias=ref_bias, temperature=temperature,
            softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size, mask=mask, outputs=outputs,
            chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, num_tokens=num_tokens,
        )  # fmt: skip
        return merge_over_ranks(
            record, outputs, process_group, precision(hidden, weight, ref_hidden, ref_weight)
        )
    args = _arguments(
        hidden, weight, tokens, outputs, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
        temperature=temperature, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size, mask=mask,
        beta=beta, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, num_tokens=num_tokens,
    )  # fmt: skip
    _, *values = ops.linear_token_stats(*args)
    return TokenStats(**dict(zip(args.outputs, values, strict=True)))


def linear_token_stats_partial(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    vocab_start: int = 0,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """The records of :func:`rewardops.token_stats_partial` from hidden states and a part of the head.

    The logits are never held.

    Args:
        hidden: ``[N, D]`` or ``[B, T, D]``, float32, bfloat16, float16 or float64.
        weight: ``[V_part, D]``, the rows of the head from ``vocab_start`` on.
        tokens: ``[N]`` or ``[B, T]``, ids in the whole vocabulary; -100 counts as masked.
        vocab_start: the id of the first row of ``weight``.
        bias: ``[V_part]``; None for none.
        ref_hidden: hidden states of the reference model, one per token; None, with ``ref_weight``, for no
            reference.
        ref_weight: the reference's head, the same rows.
        ref_bias: ``[V_part]``, the reference's bias; None for none.
        temperature: above 0: a number, or a float tensor with one per row (``[B]``) or per token; the same for
            every part.
        softcap: above 0, the same for every part; None for no softcap.
        logit_scale: above 0, the same for every part; applied before the softcap.
        vocab_size: size of the whole vocabulary: ids from here on are padding. None for no padding.
        mask: the shape of ``tokens``; bool, integer or float 0/1, the same for every part. None for all tokens.
        outputs: statistics to merge the records into: any output of :func:`rewardops.token_stats` but ``jsd``.
        chunk_tokens: tokens of a block; None for 4096.
        chunk_vocab: vocabulary entries of a block; None for as many as the workspace holds.
        num_tokens: an upper bound of the number of valid tokens; None to read the number from the device.

    Returns:
        ``[*tokens.shape, 14]``, float64, for :func:`rewardops.merge_token_stats`. Differentiable once in
        hidden, weight and bias of both sides; the gradient of the hidden states is that of this part, to sum
        over parts.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, half a reference, an unknown output, an output of two
            models without a reference, a number out of its range.

    Example:
        >>> hidden, weight, tokens = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2])
        >>> parts = [ro.linear_token_stats_partial(hidden, weight[:1], tokens),
        ...          ro.linear_token_stats_partial(hidden, weight[1:], tokens, vocab_start=1)]
        >>> round(ro.merge_token_stats(parts).logprob.item(), 3)
        -0.408
    """
    args = _arguments(
        hidden, weight, tokens, outputs, vocab_start, True, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight,
        ref_bias=ref_bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size,
        mask=mask, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab, num_tokens=num_tokens,
    )  # fmt: skip
    record: Tensor = ops.linear_token_stats_partial(*args)
    return record


class LinearOptions(TypedDict, total=False):
    """Options that :func:`linear_token_loss` shares with :func:`linear_token_stats`."""

    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    temperature: float | Tensor
    softcap: float | Tensor | None
    logit_scale: float | Tensor
    vocab_size: int | None
    mask: Tensor | None
    beta: float | Tensor
    chunk_tokens: int | None
    chunk_vocab: int | None
    num_tokens: int | None


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    outputs: Sequence[str] = (),
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, TokenStats]:
    """A loss linear in the token statistics, its gradients computed in the forward pass: three products, not four.

    ``loss = sum over tokens and names of coefficients[name] * stats.name``, exact with its gradient. A policy
    gradient is of this form: ``coefficients = {"logprob": -advantages / count}``, and ``{"entropy": -c / count}``
    for a bonus. So is any loss on its first, on-policy step, where its first derivatives can replace it (a clipped
    ratio is 1 with derivative 1 there). From the second step with the same samples, the derivative of a ratio
    depends on the log-probabilities of that step: use :func:`linear_token_stats`.

    It saves one product, and costs a float32 sum of the weight's gradient over blocks. Measured on two CPU
    cores (1024 tokens, D = 1024, V = 151936), it wins in float32 (7.0 against 8.1 s) and loses in bfloat16 (2.0
    against 1.7 s), where products are five times faster and that sum is not.

    Args:
        hidden: ``[N, D]`` or ``[B, T, D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, the head; may have another dtype, and may be tied to the embedding.
        tokens: ``[N]`` or ``[B, T]``, integer ids; -100 counts as masked.
        coefficients: names of outputs (not ``is_top1``), each with a float tensor of the shape of ``tokens``;
            constants, no gradient flows into them. Their values at masked tokens have no effect.
        outputs: statistics to return beside the terms of the loss.
        bias: ``[V]``; None for none.
        ref_hidden: hidden states of the reference model, one per token, constant; None, with ``ref_weight``,
            for no reference.
        ref_weight: the reference's head, with the rows of ``weight``; constant.
        ref_bias: ``[V]``, the reference's bias, constant; None for none.
        temperature: above 0: a number (1 by default), or a float tensor with one per row (``[B]``) or per
            token.
        softcap: above 0; None for no softcap.
        logit_scale: above 0, 1 by default; applied before the softcap.
        vocab_size: rows of the head from here on are padding; None for no padding.
        mask: the shape of ``tokens``; bool, integer or float 0/1. None for all tokens.
        beta: for ``jsd``, above 0 and below 1; 0.5 by default.
        chunk_tokens: tokens of a block, which is of whole rows; None for as many as the workspace holds, at
            least 512.
        chunk_vocab: no effect, as blocks are of whole rows.
        num_tokens: an upper bound of the number of valid tokens; None to read the number from the device.

    Returns:
        The loss (a scalar, float32; float64 for float64), and :class:`TokenStats`, detached. The loss is
        differentiable once in hidden, weight and bias: a second backward pass raises. The gradient is scaled by
        the upstream one, so loss scaling works; the reference's side is constant. The weight's gradient is
        summed over blocks in a float32 tensor of its size.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, no coefficients, half a reference, an unknown output,
            an output of two models without a reference, a number out of its range.

    Example:
        >>> hidden = torch.zeros(1, 2, requires_grad=True)
        >>> weight, tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0])
        >>> loss, stats = ro.linear_token_loss(hidden, weight, tokens, {"logprob": torch.tensor([-1.0])})
        >>> loss.backward()
        >>> round(loss.item(), 3), hidden.grad.tolist()
        (0.693, [[-0.5, 0.5]])
    """
    checks.check_float("hidden", hidden)
    _check_tokens(tokens, hidden)
    names = check_coefficients(coefficients, outputs, tokens, hidden.device, "hidden")
    args = _arguments(hidden, weight, tokens, names, **options)
    terms = [name for name in args.outputs if name in coefficients]
    needs = [t is not None and may_require_grad(t) for t in args[:3]]
    factors = [coefficients[name].detach() for name in terms]
    loss, _, _, _, *values = ops.linear_token_loss(factors, terms, needs, *args)
    return loss, TokenStats(**{n: x.detach() for n, x in zip(args.outputs, values, strict=True)})


# ---- arguments ---------------------------------------------------------------------------------------------


def _check_side(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.check_float(f"{side}hidden", hidden)
    checks.check_float(f"{side}weight", weight)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{side}hidden: got shape {checks.show(hidden.shape)}, want [N, D] or [B, T, D]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        want = f"[V, {hidden.shape[-1]}]"
        raise ValueError(
            f"{side}weight: got shape {checks.show(weight.shape)}, want {want} (the columns of {side}hidden)"
        )
    checks.check_device(f"{side}weight", weight, hidden.device, f"{side}hidden")
    if bias is not None:
        checks.check_float(f"{side}bias", bias)
        checks.check_shape(f"{side}bias", bias, weight.shape[:1], f"one entry per row of {side}weight")
        checks.check_device(f"{side}bias", bias, hidden.device, f"{side}hidden")


def _check_tokens(tokens: Tensor, hidden: Tensor) -> None:
    checks.check_integer("tokens", tokens)
    checks.check_shape("tokens", tokens, hidden.shape[:-1], "the shape of hidden without its columns")
    checks.check_device("tokens", tokens, hidden.device, "hidden")


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as a linear layer does under autocast: float32 and half precision inputs to autocast's dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    if not autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]


def _count(name: str, value: int | None, least: int) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, want int")
    if value < least:
        raise ValueError(f"{name}: got {value}, want at least {least}")
    return value


def _arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    outputs: Sequence[str],
    vocab_start: int = 0,
    partial: bool = False,
    /,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    beta: float | Tensor = 0.5,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    num_tokens: int | None = None,
) -> LinearArgs:
    """Validate the arguments of a call; ``partial``: the head is a part of it, from ``vocab_start`` on."""
    _check_side("", hidden, weight, bias)
    _check_tokens(tokens, hidden)
    if (ref_hidden is None) != (ref_weight is None):
        got, missing = ("ref_hidden", "ref_weight") if ref_weight is None else ("ref_weight", "ref_hidden")
        raise ValueError(f"{missing}: got None with {got}, want both or neither")
    if ref_hidden is not None and ref_weight is not None:
        _check_side("ref_", ref_hidden, ref_weight, ref_bias)
        checks.check_shape(
            "ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_hidden.shape[-1]), "a row per token"
        )
        checks.check_shape(
            "ref_weight", ref_weight, (weight.shape[0], ref_weight.shape[1]), "the rows of weight"
        )
        checks.check_device("ref_hidden", ref_hidden, hidden.device, "hidden")
    elif ref_bias is not None:
        raise ValueError("ref_bias: got a value without ref_hidden, want None")
    names = check_outputs(outputs, PARTIAL_OUTPUTS if partial else OUTPUTS, ref_hidden is not None)
    logit_scale = checks.check_positive("logit_scale", logit_scale)
    options = token_arguments(
        tokens, names, width=weight.shape[0], temperature=temperature, softcap=softcap, vocab_size=vocab_size,
        mask=mask, beta=beta, vocab_start=vocab_start, partial=partial,
    )  # fmt: skip
    hint = -1 if num_tokens is None else _count("num_tokens", num_tokens, 0)
    if hint >= 0:
        valid = valid_rows(options.tokens, options.mask)
        if may_read(valid) and int(valid.sum()) > hint:
            raise ValueError(
                f"num_tokens: got {hint}, want at least {int(valid.sum())} (the tokens that count)"
            )
    # softcap * tanh(s x / softcap) / t equals the formula for x with softcap / s and t / s.
    options = options._replace(
        temperatures=None if options.temperatures is None else options.temperatures / logit_scale,
        temperature=options.temperature / logit_scale,
        softcap=options.softcap / logit_scale,
    )
    chunks = _count("chunk_tokens", chunk_tokens, 1), _count("chunk_vocab", chunk_vocab, 1)
    sides = _autocast(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return LinearArgs._make([*sides, *options, *chunks, hint])
