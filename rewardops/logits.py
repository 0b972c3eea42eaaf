"""Logits: every statistic of a token's distribution from one pass over ``[N, V]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .core import checks, distributed
from .core.inplace import check_overwritable, in_memory, physical
from .core.precision import widest
from .ops import logits as ops
from .ops.token_arguments import check_coefficients, check_outputs, token_arguments
from .reference import logits as spec
from .reference.logits import RECORD, TokenStatsArgs, accumulator, read_beside
from .reference.token_records import fields_of, finish, merge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TokenStats", "merge_token_stats", "token_stats", "token_stats_and_grad", "token_stats_partial"]

OUTPUTS = spec.OUTPUTS
PARTIAL_OUTPUTS = OUTPUTS[:-1]


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, in nats; None for outputs that were not requested.

    All have the shape of ``tokens`` and are float32 (float64 for float64 logits); ``is_top1`` is bool.
    :func:`token_stats` has the formulas and gradients.

    Attributes:
        logprob: log-probability of the token.
        entropy: entropy of the distribution.
        logsumexp: log of the sum of the logits' exponentials.
        sum_p2: sum of squared probabilities.
        sum_p2_logp: sum of ``p^2 log p``.
        mean_logit: mean of the logits over the vocabulary.
        is_top1: whether no logit is above the token's.
        ref_logprob: log-probability of the token under the reference.
        kl: KL(policy || reference).
        reverse_kl: KL(reference || policy).
        jsd: generalised Jensen-Shannon divergence.

    Example:
        >>> stats = ro.token_stats(torch.zeros(1, 4), torch.tensor([0]), outputs=["entropy", "is_top1"])
        >>> round(stats.entropy.item(), 3), stats.is_top1.item(), stats.logprob
        (1.386, True, None)
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    sum_p2: Tensor | None = None
    sum_p2_logp: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jsd: Tensor | None = None


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
    beta: float | Tensor = 0.5,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """The statistics of each token's distribution that a training step needs, from one read of the logits.

    With ``z = softcap * tanh(logits / softcap) / temperature`` (without a softcap ``logits / temperature``),
    ``L = log sum exp z``, ``p = exp(z - L)``, and ``q`` the same of ``ref_logits``:

    ==================  =====================================================  ===============================
    output              value                                                  gradient in ``z``
    ==================  =====================================================  ===============================
    ``logprob``         ``z[token] - L``                                       ``onehot(token) - p``
    ``entropy``         ``-sum p log p``                                       ``-p (log p + entropy)``
    ``logsumexp``       ``L``                                                  ``p``
    ``sum_p2``          ``sum p^2``; the Renyi-2 entropy is ``-log sum_p2``    ``2 p (p - sum_p2)``
    ``sum_p2_logp``     ``sum p^2 log p``, see :func:`entropy_change`          ``p (2 p log p + p -
                                                                               2 sum_p2_logp - sum_p2)``
    ``mean_logit``      mean of ``z`` over the vocabulary; ``L - mean_logit    ``1 / V``
                        - log V`` is KL(uniform || policy)
    ``is_top1``         whether no logit is above the token's (bool)           none
    ``ref_logprob``     ``log q[token]``                                       none in ``z``; as ``logprob``
                                                                               in the reference's
    ``kl``              KL(policy || ref), ``sum p (log p - log q)``           ``p (log p - log q - kl)``;
                                                                               reference: ``q - p``
    ``reverse_kl``      KL(ref || policy), ``sum q (log q - log p)``           ``p - q``; reference:
                                                                               ``q (log q - log p - reverse_kl)``
    ``jsd``             ``beta KL(q || m) + (1 - beta) KL(p || m)`` with       ``(1 - beta) p (log p - log m -
                        ``m = beta q + (1 - beta) p``, the generalised         KL(p || m))``; reference: the
                        Jensen-Shannon divergence (as in GKD, 2306.13649)      mirror image
    ==================  =====================================================  ===============================

    in nats, and all as sums relative to the row's largest logit, which keep their digits for logits of any
    offset. A logit of ``-inf`` has probability 0 and contributes nothing (under a softcap it is ``-softcap``,
    as the formula has it); a token there has logprob ``-inf``. A divergence is ``inf`` where one distribution
    has mass in a column that is ``-inf`` in the other (and has no gradient then); a column that is ``-inf`` in
    both is in no divergence. A logit of ``inf`` or NaN makes every statistic of its model and row NaN (``is_top1``
    False), with their gradients. ``jsd`` costs a second pass; nothing else does.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``; float32, bfloat16, float16 or float64. Strided rows, such as
            ``logits[:, :-1]``, are read in place. Accumulation is in float32 (float64 for float64).
        tokens: ``[N]`` or ``[B, T]``, integer column ids. -100 counts as masked; any other id outside
            ``[0, vocab_size)`` gives NaN at that token, and is never read (under :func:`rewardops.debug` it
            raises).
        temperature: above 0: a number, or a float tensor with one per row (``[B]``) or per token; no gradient
            flows into it.
        softcap: above 0, as in Gemma 2; None for no softcap.
        vocab_size: columns from here on are padding and do not exist; their gradient is 0. None for no padding.
        ref_logits: logits of the reference model, the shape of ``logits``, in any of the dtypes; temperature,
            softcap and vocab_size apply to them as well. None where no output compares two models.
        mask: the shape of ``tokens``; bool, integer or float 0/1. Masked rows are not read: their outputs
            and their gradient are exactly 0, whatever the logits hold. None for all tokens.
        outputs: names of the statistics to return; only these are computed.
        beta: for ``jsd``, above 0 and below 1 (at both ends jsd is 0: use ``kl`` or ``reverse_kl``).
        inplace_backward: write the gradient of the logits over them, which saves the memory of a second ``[N,
            V]``. The logits are lost in the backward pass; a second backward pass raises. Without effect where
            the logits' rows share memory (``expand``, windows that overlap) or hold another argument, as a
            ``ref_logits`` that is a shifted view of them; under ``torch.compile``, which plans memory itself,
            in ``torch.func``, and under saved-tensor hooks, as in activation checkpointing: autograd could not
            detect the overwritten logits.
        process_group: for tensor parallelism: its ranks hold shards ``[N, V_part]`` of the vocabulary, of equal
            width and in rank order, and get the statistics of the whole rows, the same bits on each. One
            collective, of 5 to 14 numbers per token, and none in the backward pass: every rank has the same
            loss, and gets its shard of that loss's gradient (Megatron's convention). ``vocab_size`` is that of
            the whole vocabulary. Not with ``jsd`` or ``inplace_backward``. For shards of unequal width use
            :func:`token_stats_partial`.

    Returns:
        :class:`TokenStats`, with the requested outputs. Differentiable once, in ``logits`` and ``ref_logits``.
        All upstream gradients are folded into one read and one write, in the dtype of the logits.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown output, an output of two models without
            ``ref_logits``, a number out of its range, ``jsd`` or ``inplace_backward`` with a process group.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0], [9.0, 9.0, -torch.inf]], requires_grad=True)
        >>> stats = ro.token_stats(logits, torch.tensor([2, 0]), outputs=["logprob", "entropy"])
        >>> [round(x, 3) for x in stats.logprob.tolist()], [round(x, 3) for x in stats.entropy.tolist()]
        ([-0.408, -0.693], [0.832, 0.693])
        >>> stats.logprob.sum().backward()
        >>> logits.grad[1, :2].tolist()
        [0.5, -0.5]
    """
    checks.check_flag("inplace_backward", inplace_backward)
    if process_group is not None:
        if inplace_backward:
            raise ValueError("inplace_backward: got True with process_group, want False")
        checks.check_float("logits", logits)
        record = token_stats_partial(
            logits, tokens, vocab_start=shard_start(logits.shape, process_group), temperature=temperature,
            softcap=softcap, vocab_size=vocab_size, ref_logits=ref_logits, mask=mask, outputs=outputs,
        )  # fmt: skip
        return merge_over_ranks(record, outputs, process_group, accumulator(logits))
    args = _arguments(
        logits, tokens, outputs, temperature=temperature, softcap=softcap, vocab_size=vocab_size,
        ref_logits=ref_logits, mask=mask, beta=beta,
    )  # fmt: skip
    inplace = inplace_backward and not torch.compiler.is_compiling()
    _, *values = ops.token_stats(*args, inplace)
    return TokenStats(**dict(zip(args.outputs, values, strict=True)))


def token_stats_and_grad(
    logits: Tensor,
    tokens: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    outputs: Sequence[str] = (),
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float | Tensor = 0.5,
    inplace: bool = False,
) -> tuple[TokenStats, Tensor]:
    """The token statistics, and the gradient in the logits of a loss that is linear in them.

    ``loss = sum over tokens and names of coefficients[name] * stats.name``; see :func:`linear_token_loss` for which
    losses are of this form. Where the coefficients are known at the call, the gradient need not wait for a backward
    pass, and the logits need not be read again for it. The rest of the backward pass starts from it::

        logits = model(input_ids).logits[:, :-1]
        stats, grad = token_stats_and_grad(logits, tokens, {"logprob": -advantages / count}, mask=mask)
        logits.backward(grad)

    The ``cuda`` backend keeps a row on chip between its statistics and its gradient: one read and one write of
    the logits. It does so for float32, bfloat16 and float16, outputs of one model, and rows of up to 1.8 MB (before
    Hopper 160 KB). All else, and the other backends, take a forward and a backward pass: two reads, one write.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``; float32, bfloat16, float16 or float64.
        tokens: ``[N]`` or ``[B, T]``, integer column ids; -100 counts as masked.
        coefficients: names of outputs (not ``is_top1``), each with a float tensor of the shape of ``tokens``;
            constants, no gradient flows into them. Their values at masked tokens have no effect.
        outputs: statistics to return beside the terms of the loss.
        temperature: above 0: a number, or a float tensor with one per row (``[B]``) or per token.
        softcap: above 0; None for no softcap.
        vocab_size: columns from here on are padding, with gradient 0; None for no padding.
        ref_logits: logits of the reference model, the shape of ``logits``, constant; None where no output
            compares two models.
        mask: the shape of ``tokens``; bool, integer or float 0/1. Masked rows are not read. None for all
            tokens.
        beta: for ``jsd``, above 0 and below 1.
        inplace: write the gradient over the logits, which saves the memory of a second ``[N, V]``. The logits
            are lost then; autograd raises where another op has saved them for its backward pass.

    Returns:
        :class:`TokenStats`, and the gradient, in the shape and dtype of the logits, zeros where masked and from
        ``vocab_size`` on. With ``inplace`` it is the logits' own memory. Neither is differentiable. The
        reference's side is constant.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown name, an output of two models without
            ``ref_logits``, a number out of its range; ``inplace`` with logits whose rows share memory
            (``expand``, windows that overlap), or whose memory holds another argument.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
        >>> advantages = torch.tensor([1.0, -1.0])
        >>> stats, grad = ro.token_stats_and_grad(logits, torch.tensor([0, 1]), {"logprob": -advantages / 2})
        >>> grad.tolist()
        [[-0.25, 0.25], [-0.25, 0.25]]
    """
    _check_logits(logits, tokens, ref_logits)
    checks.check_flag("inplace", inplace)
    names = check_coefficients(coefficients, outputs, tokens, logits.device, "logits")
    target = logits.detach()
    args = _arguments(
        target, tokens, names, temperature=temperature, softcap=softcap, vocab_size=vocab_size,
        ref_logits=None if ref_logits is None else ref_logits.detach(), mask=mask, beta=beta,
    )  # fmt: skip
    terms = [name for name in args.outputs if name in coefficients]
    factors = [coefficients[name].detach() for name in terms]
    transformed = False
    if inplace and not torch.compiler.is_compiling():
        _check_inplace(target, args, read_beside(args, "coefficients", terms, factors))
        # There a copy follows, which keeps the rules of torch.func and torch.vmap for writing to a tensor.
        transformed = torch._C._are_functorch_transforms_active()
    if inplace and args.logits is target and not transformed:
        grad, stacked = target, ops.token_stats_and_grad_(factors, terms, *args)
    else:
        stacked, grad = ops.token_stats_and_grad(factors, terms, *args)
        # The gradient is float64 where the reference logits are; the logits may be narrower.
        grad = target.copy_(grad) if inplace else grad.to(logits.dtype)
    if inplace and not (torch.compiler.is_compiling() or logits.is_inference()):
        torch.autograd.graph.increment_version(logits)
    values = dict(zip(args.outputs, stacked.unbind(0), strict=True))
    return TokenStats(**{k: v.bool() if k == "is_top1" else v for k, v in values.items()}), grad


def token_stats_partial(
    logits: Tensor,
    tokens: Tensor,
    *,
    vocab_start: int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
) -> Tensor:
    """The statistics of a part of the vocabulary, as records for :func:`merge_token_stats`.

    For vocabulary shards (tensor parallelism) and chunks: column ``k`` of ``logits`` is token
    ``vocab_start + k``. Differentiable in ``logits`` and ``ref_logits``, through the records: gather the
    other ranks' records without gradient, insert this rank's record among them, and merge; each rank's loss then
    gives the exact gradient of its own shard.

    Args:
        logits: ``[N, V_part]`` or ``[B, T, V_part]``; float32, bfloat16, float16 or float64.
        tokens: ``[N]`` or ``[B, T]``, ids in the whole vocabulary; -100 counts as masked.
        vocab_start: the id of the first column.
        temperature: above 0: a number, or a float tensor with one per row (``[B]``) or per token; the same for
            every part.
        softcap: above 0, the same for every part; None for no softcap.
        vocab_size: size of the whole vocabulary: columns with ids from here on are padding. None for no
            padding.
        ref_logits: these columns of the reference model's logits, the shape of ``logits``; None where no output
            compares two models.
        mask: the shape of ``tokens``; bool, integer or float 0/1, the same for every part. None for all tokens.
        outputs: statistics to merge the records into: any output of :func:`token_stats` but ``jsd``, whose
            terms need the whole row's normalisers.

    Returns:
        ``[*tokens.shape, 14]``, float64, for each token sums relative to the part's largest logit
        (``rewardops.reference.logits.RECORD`` names them). Sums that no output needs are NaN. Differentiable
        once in ``logits`` and ``ref_logits``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown output, an output of two models without
            ``ref_logits``, a number out of its range.

    Example:
        >>> logits, tokens = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2])
        >>> parts = [ro.token_stats_partial(logits[:, :2], tokens),
        ...          ro.token_stats_partial(logits[:, 2:], tokens, vocab_start=2)]
        >>> round(ro.merge_token_stats(parts).logprob.item(), 3)
        -0.408
    """
    args = _arguments(
        logits, tokens, outputs, temperature=temperature, softcap=softcap, vocab_size=vocab_size,
        ref_logits=ref_logits, mask=mask, vocab_start=vocab_start, partial=True,
    )  # fmt: skip
    record: Tensor = ops.token_stats_partial(*args)
    return record


def merge_token_stats(
    records: Tensor | Sequence[Tensor],
    *,
    outputs: Sequence[str] = ("logprob", "entropy"),
    dtype: torch.dtype = torch.float32,
) -> TokenStats:
    """Token statistics of whole rows from the records of their parts, in any order.

    A few operations per token, in float64 and plain PyTorch on every device; ``torch.compile`` fuses them.

    Args:
        records: ``[parts, *tokens.shape, 14]``, float64, or a sequence of results of
            :func:`token_stats_partial`.
        outputs: as in :func:`token_stats_partial`; outputs that were not requested there are NaN.
        dtype: dtype of the statistics: float32, bfloat16, float16 or float64.

    Returns:
        :class:`TokenStats`, with the shape of ``tokens``; a token that no part holds has logprob NaN.
        Differentiable in the records.

    Raises:
        TypeError: records that are no tensors of float64, or a dtype that is not accepted.
        ValueError: no records, records of unlike shapes, dtypes or devices or without 14 fields, an unknown
            output.

    Example:
        >>> record = ro.token_stats_partial(torch.zeros(1, 4), torch.tensor([0]), outputs=["entropy"])
        >>> whole = ro.merge_token_stats([record, record], outputs=["entropy"])  # 8 equal logits
        >>> round(whole.entropy.item(), 3)
        2.079
    """
    fields = len(RECORD)
    if isinstance(records, Tensor):
        parts = records
    elif not isinstance(records, Sequence) or not all(isinstance(part, Tensor) for part in records):
        raise TypeError(f"records: got {type(records).__name__}, want a tensor or a sequence of tensors")
    # Compared, not hashed: a hash would make sizes constants in a compiled graph.
    elif not records or any(
        (part.shape, part.dtype, part.device) != (records[0].shape, records[0].dtype, records[0].device)
        for part in records
    ):
        raise ValueError("records: got none or unlike ones, want some of one shape, dtype and device")
    else:
        parts = torch.stack(list(records))
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, want float32, bfloat16, float16 or float64")
    if parts.dtype is not widest(parts.device):
        raise TypeError(f"records: got dtype {parts.dtype}, want float64")
    if parts.dim() < 2 or parts.shape[-1] != fields or not parts.shape[0]:
        raise ValueError(f"records: got shape {checks.show(parts.shape)}, want [parts, ..., {fields}]")
    names = check_outputs(outputs, PARTIAL_OUTPUTS, True)
    values: dict[str, Any] = finish(merge(parts, names), names)
    return TokenStats(**{k: v if k == "is_top1" else v.to(dtype) for k, v in values.items()})


# ---- arguments ---------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, tokens: Tensor, ref_logits: Tensor | None) -> None:
    checks.check_float("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: got shape {checks.show(logits.shape)}, want [N, V] or [B, T, V]")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {checks.show(logits.shape)}, want a vocabulary of at least 1")
    checks.check_integer("tokens", tokens)
    checks.check_shape("tokens", tokens, logits.shape[:-1], "the shape of logits without the vocabulary")
    checks.check_device("tokens", tokens, logits.device, "logits")
    if ref_logits is not None:
        checks.check_float("ref_logits", ref_logits)
        checks.check_shape("ref_logits", ref_logits, logits.shape, "the shape of logits")
        checks.check_device("ref_logits", ref_logits, logits.device, "logits")


def _same_precision(logits: Tensor, ref_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits of both models: half and single precision may mix; float64 on one side makes both float64."""
    if ref_logits is None or torch.float64 not in (logits.dtype, ref_logits.dtype):
        return logits, ref_logits
    return logits.to(torch.float64), ref_logits.to(torch.float64)


def _check_inplace(target: Tensor, args: TokenStatsArgs, beside: Mapping[str, Tensor | None]) -> None:
    """Raise where the gradient cannot be written over ``target``; traced calls are checked when they run."""
    if in_memory(physical(target)):
        others = {name: None if t is None else physical(t) for name, t in beside.items()}
        check_overwritable(physical(target), "logits", others)


def _arguments(
    logits: Tensor,
    tokens: Tensor,
    outputs: Sequence[str],
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    vocab_size: int | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    beta: float | Tensor = 0.5,
    vocab_start: int = 0,
    partial: bool = False,
) -> TokenStatsArgs:
    """Validated arguments of the ops; ``partial``: for a part of the vocabulary, from ``vocab_start`` on."""
    _check_logits(logits, tokens, ref_logits)
    names = check_outputs(outputs, PARTIAL_OUTPUTS if partial else OUTPUTS, ref_logits is not None)
    options = token_arguments(
        tokens, names, width=logits.shape[-1], temperature=temperature, softcap=softcap, vocab_size=vocab_size,
        mask=mask, beta=beta, vocab_start=vocab_start, partial=partial,
    )  # fmt: skip
    logits, ref_logits = _same_precision(logits, ref_logits)
    return TokenStatsArgs(logits, options.tokens, ref_logits, *options[1:])


# ---- shards of the vocabulary on the ranks of a process group ----------------------------------------------


def shard_start(shape: torch.Size, process_group: ProcessGroup) -> int:
    """Vocabulary offset of this rank: its rank times the width of its shard, whose ``shape`` is not checked yet."""
    return distributed.rank(distributed.check(process_group)) * (shape[-1] if shape else 0)


def merge_over_ranks(
    record: Tensor, outputs: Sequence[str], process_group: ProcessGroup, dtype: torch.dtype
) -> TokenStats:
    """Statistics of whole rows from the records of all ranks' shards; the gradient reaches this rank's record."""
    fields = fields_of(outputs)
    at, ranks = distributed.rank(process_group), distributed.size(process_group)
    others = record.detach().new_zeros((ranks, *record.shape))
    others[..., fields] = distributed.exchange(record[..., fields], process_group)
    everyone = torch.cat([others[:at], record[None], others[at + 1 :]])
    return merge_token_stats(everyone, outputs=outputs, dtype=dtype)
