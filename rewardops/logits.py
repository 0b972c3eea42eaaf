"""Logits: every statistic of a token's distribution from one pass over ``[N, V]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .core import checks, distributed
from .core.dispatch import define
from .core.settings import debugging, may_read
from .core.transforms import may_overwrite_saved
from .reference import logits as spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = spec.OUTPUTS
PARTIAL_OUTPUTS = OUTPUTS[:-1]


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, in nats; None for what was not asked for.

    All have the shape of ``tokens`` and are float32 (float64 for float64 logits); ``is_top1`` is bool.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    sum_sq: Tensor | None = None
    sum_sq_logprob: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jsd: Tensor | None = None


# ---- the ops -----------------------------------------------------------------------------------------------

_INPUTS = "Tensor logits, Tensor tokens, Tensor? ref_logits, Tensor? mask, Tensor? temperatures"
_SCALARS = "float temperature, float softcap"


def _fake(logits, tokens, ref_logits, mask, temperatures, temperature, softcap, vocab, beta, outputs):  # type: ignore[no-untyped-def]
    acc = spec.accumulator(logits)
    saved = spec.saved_rows(ref_logits is not None)
    made = [logits.new_empty((saved, *tokens.shape), dtype=torch.float64)]
    for name in outputs:
        made.append(logits.new_empty(tokens.shape, dtype=torch.bool if name == "is_top1" else acc))
    return made


def _fake_stacked(coefficients, terms, logits, tokens, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty((len(rest[-1]), *tokens.shape), dtype=spec.accumulator(logits))


def _fake_stacked_and_grad(coefficients, terms, logits, *rest):  # type: ignore[no-untyped-def]
    return _fake_stacked(coefficients, terms, logits, *rest), logits.new_empty(logits.shape)


def _fake_gradients(logits, ref_logits, to_logits, to_ref):  # type: ignore[no-untyped-def]
    grad = logits.new_empty(logits.shape if to_logits else 0)
    like = logits if ref_logits is None else ref_logits
    return grad, like.new_empty(like.shape if to_ref else 0)


def _fake_backward(grads, logits, tokens, ref_logits, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(logits, ref_logits, *rest[-2:])


def _fake_backward_inplace(grads, logits, tokens, ref_logits, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(logits, ref_logits, False, rest[-1])[1]


def _fake_partial(logits, tokens, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty((*tokens.shape, len(spec.RECORD)), dtype=torch.float64)


def _fake_partial_backward(grad, record, logits, tokens, ref_logits, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(logits, ref_logits, *rest[-2:])


_SAVED = f"Tensor saved, {_SCALARS}, SymInt vocab, float beta, str[] outputs, bool to_logits, bool to_ref"
_INPUTS_OVERWRITTEN = _INPUTS.replace("Tensor logits", "Tensor(a!) logits")

_backward = define(
    "logits",
    f"token_stats_backward(Tensor?[] grads, {_INPUTS}, {_SAVED}) -> (Tensor, Tensor)",
    fake=_fake_backward,
)

_backward_inplace = define(
    "logits",
    f"token_stats_backward_(Tensor?[] grads, {_INPUTS_OVERWRITTEN}, {_SAVED}) -> Tensor",
    fake=_fake_backward_inplace,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, temperature, softcap, vocab, beta, outputs, inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])
    ctx.scalars = (temperature, softcap, vocab, beta, outputs)
    ctx.inplace = inplace and may_overwrite_saved()


def _gradient(ctx, grads):  # type: ignore[no-untyped-def]
    logits, tokens, ref_logits, mask, temperatures, saved = ctx.saved_tensors
    given = [g for g, name in zip(grads[1:], ctx.scalars[-1], strict=True)]
    to_logits, to_ref = ctx.needs_input_grad[0], ref_logits is not None and ctx.needs_input_grad[2]
    args = (tokens, ref_logits, mask, temperatures, saved, *ctx.scalars)
    grad, ref = None, None
    if all(g is None for g in given):
        pass
    elif ctx.inplace and to_logits and not torch.is_grad_enabled():  # torch.func records every backward pass
        grad = logits.detach()
        ref = _backward_inplace(given, grad, *args, True, to_ref)
        # The logits are gone: a second backward pass finds another version of them, and raises.
        torch.autograd.graph.increment_version(logits)
    else:
        grad, ref = _backward(given, logits, *args, to_logits, to_ref)
    return grad if to_logits else None, None, ref if to_ref else None, *[None] * 8


_forward = define(
    "logits",
    f"token_stats({_INPUTS}, {_SCALARS}, SymInt vocab, float beta, str[] outputs, bool inplace) -> Tensor[]",
    fake=lambda *args: _fake(*args[:-1]),
    setup_context=_setup,
    backward=_gradient,
)

# Statistics come stacked, in the order of the outputs and is_top1 as 0 or 1: functionalisation, which takes the op
# that writes over the logits into a compiled graph, knows no lists.
_KNOWN = "Tensor[] coefficients, str[] terms"
_OPTIONS = f"{_SCALARS}, SymInt vocab, float beta, str[] outputs"

_and_grad = define(
    "logits",
    f"token_stats_and_grad({_KNOWN}, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_stacked_and_grad,
)

_and_grad_inplace = define(
    "logits",
    f"token_stats_and_grad_({_KNOWN}, {_INPUTS_OVERWRITTEN}, {_OPTIONS}) -> Tensor",
    fake=_fake_stacked,
)

_SHARD = f"{_SCALARS}, SymInt first, SymInt vocab"

_partial_backward = define(
    "logits",
    f"token_stats_partial_backward(Tensor grad_record, Tensor record, {_INPUTS}, {_SHARD}, bool to_logits,"
    " bool to_ref) -> (Tensor, Tensor)",
    fake=_fake_partial_backward,
)


def _setup_partial(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, temperature, softcap, first, vocab, _ = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.scalars = (temperature, softcap, first, vocab)


def _gradient_partial(ctx, grad):  # type: ignore[no-untyped-def]
    record, logits, tokens, ref_logits, *rest = ctx.saved_tensors
    to_logits, to_ref = ctx.needs_input_grad[0], ref_logits is not None and ctx.needs_input_grad[2]
    args = (record, logits, tokens, ref_logits, *rest, *ctx.scalars)
    found, ref = _partial_backward(grad, *args, to_logits, to_ref)
    return found if to_logits else None, None, ref if to_ref else None, *[None] * 7


_partial = define(
    "logits",
    f"token_stats_partial({_INPUTS}, {_SHARD}, str[] outputs) -> Tensor",
    fake=_fake_partial,
    setup_context=_setup_partial,
    backward=_gradient_partial,
)


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


def check_outputs(outputs: Sequence[str], choices: Sequence[str], has_ref: bool) -> list[str]:
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        raise ValueError(f"outputs: got {outputs!r}, want a sequence of names out of {tuple(choices)}")
    for name in outputs:
        checks.check_choice("outputs", name, choices)
        if name in spec.REF_OUTPUTS and not has_ref:
            raise ValueError(f"outputs: got {name!r} without ref_logits, want both or neither")
    return [name for name in choices if name in outputs]


def temperatures_of(
    temperature: float | Tensor, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, float]:
    """A temperature for each row in float64, or one for all."""
    if not isinstance(temperature, Tensor):
        checks.check_positive("temperature", temperature)
        return None, float(temperature)
    checks.check_float("temperature", temperature)
    checks.check_device("temperature", temperature, tokens.device, "logits")
    t = temperature.detach().to(torch.float64)
    if t.dim() == 1 and tokens.dim() == 2 and t.shape[0] == tokens.shape[0]:
        t = t[:, None]
    elif t.dim() not in (0, tokens.dim()) or (t.dim() and t.shape[0] != tokens.shape[0]):
        t = t.new_empty((0, 0, 0))  # no shape that fits
    if t.dim() == tokens.dim() == 2 and t.shape[1] == 1:
        t = t.expand(tokens.shape)
    if t.dim() and t.shape != tokens.shape:
        rows = f"[{tokens.shape[0]}] or {checks.show(tokens.shape)}" if tokens.dim() == 2 else None
        raise ValueError(
            f"temperature: got shape {checks.show(temperature.shape)}, want a scalar or"
            f" {rows or checks.show(tokens.shape)} (one per row or per token)"
        )
    if may_read(t):
        bad = ~(t > 0)
        if bool(bad.any()) and bool((bad & spec.valid_rows(tokens, mask)).any()):
            raise ValueError("temperature: got a value that is not above 0, want all above 0")
    return t.expand(tokens.shape).contiguous(), 1.0


def softcap_of(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    checks.check_positive("softcap", softcap)
    return float(softcap)


def vocab_of(vocab_size: int | None, width: int) -> int:
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: got {type(vocab_size).__name__}, want int")
    if not 0 < vocab_size <= width:
        raise ValueError(f"vocab_size: got {vocab_size}, want 1 to {width} (the columns of logits)")
    return vocab_size


def columns_of(vocab_start: int, vocab_size: int | None, width: int) -> int:
    """How many columns of a part of the vocabulary are no padding."""
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start: got {type(vocab_start).__name__}, want int")
    if vocab_start < 0:
        raise ValueError(f"vocab_start: got {vocab_start}, want at least 0")
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size: got {type(vocab_size).__name__}, want int")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: got {vocab_size}, want at least 1")
    return min(max(vocab_size - vocab_start, 0), width)


def check_beta(beta: float, names: Sequence[str]) -> None:
    if "jsd" in names:
        checks.check_positive("beta", beta)
        if beta >= 1:
            raise ValueError(f"beta: got {beta}, want a number above 0 and below 1")


def check_coefficients(
    coefficients: Mapping[str, Tensor],
    outputs: Sequence[str],
    tokens: Tensor,
    device: torch.device,
    other: str,
) -> list[str]:
    """Of a loss that is linear in the outputs: a constant for each token. The terms and the other outputs."""
    if not isinstance(coefficients, Mapping) or not coefficients:
        raise ValueError("coefficients: got none, want a mapping from names of outputs to tensors")
    for name, value in coefficients.items():
        checks.check_choice("coefficients", name, [n for n in OUTPUTS if n != "is_top1"])
        checks.check_float(f"coefficients[{name!r}]", value)
        checks.check_shape(f"coefficients[{name!r}]", value, tokens.shape, "one per token")
        checks.check_device(f"coefficients[{name!r}]", value, device, other)
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise ValueError(f"outputs: got {outputs!r}, want a sequence of names out of {OUTPUTS}")
    return [*coefficients, *outputs]


def _same_precision(logits: Tensor, ref_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Half and single precision mix; float64 on one side makes both float64."""
    if ref_logits is None or torch.float64 not in (logits.dtype, ref_logits.dtype):
        return logits, ref_logits
    return logits.to(torch.float64), ref_logits.to(torch.float64)


def _arguments(
    logits: Tensor,
    tokens: Tensor,
    outputs: Sequence[str],
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    beta: float,
) -> tuple[list[str], tuple[Any, ...]]:
    """Checked, as the ops take them."""
    _check_logits(logits, tokens, ref_logits)
    names = check_outputs(outputs, OUTPUTS, ref_logits is not None)
    mask = checks.as_mask(mask, tokens.shape, logits.device, "tokens")
    temperatures, scalar = temperatures_of(temperature, tokens, mask)
    cap = softcap_of(softcap)
    vocab = vocab_of(vocab_size, logits.shape[-1])
    check_beta(beta, names)
    tokens = tokens.to(torch.int64)
    if debugging():
        checks.check_token_ids(tokens, vocab, spec.valid_rows(tokens, mask))
    logits, ref_logits = _same_precision(logits, ref_logits)
    return names, (
        logits, tokens, ref_logits, mask, temperatures, scalar, cap, vocab, float(beta), names,
    )  # fmt: skip


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
    beta: float = 0.5,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """Whatever a training step wants to know about each token's distribution, from one read of the logits.

    With ``z = softcap * tanh(logits / softcap) / temperature`` (without a softcap ``logits / temperature``),
    ``L = log sum exp z``, ``p = exp(z - L)``, and ``q`` the same of ``ref_logits``:

    ==================  =====================================================  ===============================
    output              value                                                  gradient in ``z``
    ==================  =====================================================  ===============================
    ``logprob``         ``z[token] - L``                                       ``onehot(token) - p``
    ``entropy``         ``-sum p log p``                                       ``-p (log p + entropy)``
    ``logsumexp``       ``L``                                                  ``p``
    ``sum_sq``          ``sum p^2``; the Renyi-2 entropy is ``-log sum_sq``    ``2 p (p - sum_sq)``
    ``sum_sq_logprob``  ``sum p^2 log p``, see :func:`entropy_change`          ``p (2 p log p + p -
                                                                               2 sum_sq_logprob - sum_sq)``
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
    both is in no divergence. ``jsd`` costs a second pass; nothing else does.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``; float32, bfloat16, float16 or float64. Strided rows, such as
            ``logits[:, :-1]``, are read in place. Accumulation is in float32 (float64 for float64).
        tokens: ``[N]`` or ``[B, T]``, integer column ids. -100 counts as masked; any other id outside
            ``[0, vocab_size)`` gives NaN at that token, and is never read (under :func:`rewardops.debug` it
            raises).
        temperature: a number, or a tensor with one per row (``[B]``) or per token; no gradient flows into it.
        softcap: as of Gemma 2; None for none.
        vocab_size: columns from here on are padding and do not exist; their gradient is 0.
        ref_logits: the reference model's, the shape of ``logits``, in any of the dtypes; temperature, softcap
            and vocab_size apply to it as well.
        mask: the shape of ``tokens``; bool, integer or float 0/1. Masked rows are not read: their outputs
            and their gradient are exactly 0, whatever the logits hold.
        outputs: names of what to return; only that is computed.
        beta: of ``jsd``, above 0 and below 1 (at both ends it is 0: ask for ``kl`` or ``reverse_kl``).
        inplace_backward: write the gradient of the logits over them, which saves the memory of a second
            ``[N, V]``. The logits are gone after the backward pass; a second backward pass raises. Without
            effect under ``torch.compile``, which plans memory itself, in ``torch.func``, and where what is saved
            goes through hooks, as in activation checkpointing: autograd could not tell that they are gone.
        process_group: of tensor parallelism: its ranks hold shards ``[N, V_part]`` of the vocabulary of one width,
            in their order, and get the statistics of the whole rows, the same bits on each. One collective, of 5 to
            14 numbers per token, and none in the backward pass: every rank has the same loss, and gets its shard of
            that loss's gradient (Megatron's convention). ``vocab_size`` is that of the whole. Not with ``jsd`` or
            ``inplace_backward``. For shards of other widths there is :func:`token_stats_partial`.

    Returns:
        :class:`TokenStats`, with the outputs asked for. Differentiable once, in ``logits`` and ``ref_logits``:
        all upstream gradients are folded into one read and one write, in the dtype of the logits.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, an
            unknown output, an output of two models without ``ref_logits``, a number out of its range.
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
        return merge_over_ranks(record, outputs, process_group, spec.accumulator(logits))
    names, args = _arguments(
        logits, tokens, outputs, temperature, softcap, vocab_size, ref_logits, mask, beta
    )
    inplace = inplace_backward and not torch.compiler.is_compiling()
    _, *found = _forward(*args, inplace)
    return TokenStats(**dict(zip(names, found, strict=True)))


def token_stats_and_grad(
    logits: Tensor,
    tokens: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    outputs: Sequence[str] = (),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float = 0.5,
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
        logits, tokens, temperature, softcap, vocab_size, ref_logits, mask, beta: as in :func:`token_stats`.
        coefficients: names of outputs (not ``is_top1``), each with a float tensor of the shape of ``tokens``;
            constants, no gradient flows into them. At masked tokens they do not matter.
        outputs: statistics to return beside the terms of the loss.
        inplace: write the gradient over the logits, which saves the memory of a second ``[N, V]``. The logits are
            gone then; autograd raises where another op has saved them for its backward pass.

    Returns:
        :class:`TokenStats`, and the gradient, in the shape and dtype of the logits: zeros where masked and from
        ``vocab_size`` on. With ``inplace`` it is the logits' own memory. Neither is differentiable. The reference's
        side is constant.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape, device, name or number that is not.
    """
    _check_logits(logits, tokens, ref_logits)
    checks.check_flag("inplace", inplace)
    asked = check_coefficients(coefficients, outputs, tokens, logits.device, "logits")
    target = logits.detach()
    names, args = _arguments(
        target, tokens, asked, temperature, softcap, vocab_size,
        None if ref_logits is None else ref_logits.detach(), mask, beta,
    )  # fmt: skip
    terms = [name for name in names if name in coefficients]
    fixed = [coefficients[name].detach() for name in terms]
    if inplace and args[0] is target:
        grad, stacked = target, _and_grad_inplace(fixed, terms, *args)
    else:
        stacked, grad = _and_grad(fixed, terms, *args)
        # Computed in the reference's float64, where its dtype is not the logits'.
        grad = target.copy_(grad) if inplace else grad.to(logits.dtype)
    if inplace and not (torch.compiler.is_compiling() or logits.is_inference()):
        torch.autograd.graph.increment_version(logits)
    found = dict(zip(names, stacked.unbind(0), strict=True))
    return TokenStats(**{k: v.bool() if k == "is_top1" else v for k, v in found.items()}), grad


def token_stats_partial(
    logits: Tensor,
    tokens: Tensor,
    *,
    vocab_start: int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    outputs: Sequence[str] = ("logprob", "entropy"),
) -> Tensor:
    """The statistics of a part of the vocabulary, as records for :func:`merge_token_stats`.

    For vocabulary shards (tensor parallelism) and chunks: column ``k`` of ``logits`` is token
    ``vocab_start + k``. Differentiable in ``logits`` and ``ref_logits``, through the records: gather the
    other ranks' records without gradient, put one's own among them, merge, and each rank's loss gives its own
    shard's exact gradient.

    Args:
        logits: ``[N, V_part]`` or ``[B, T, V_part]``, as in :func:`token_stats`.
        tokens: ``[N]`` or ``[B, T]``, ids in the whole vocabulary; -100 counts as masked.
        vocab_start: the id of the first column.
        vocab_size: of the whole vocabulary: columns with ids from here on are padding.
        temperature, softcap, ref_logits, mask: as in :func:`token_stats`, the same for every part.
        outputs: what the records are to be merged into: of the outputs of :func:`token_stats` all but
            ``jsd``, whose terms need the whole row's normalisers.

    Returns:
        ``[*tokens.shape, 14]``, float64: for each token sums relative to the part's largest logit
        (``rewardops.reference.logits.RECORD`` names them). Sums that no output needs are NaN.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape, device, name or number that is not.
    """
    _check_logits(logits, tokens, ref_logits)
    names = check_outputs(outputs, PARTIAL_OUTPUTS, ref_logits is not None)
    mask = checks.as_mask(mask, tokens.shape, logits.device, "tokens")
    temperatures, scalar = temperatures_of(temperature, tokens, mask)
    cap = softcap_of(softcap)
    vocab = columns_of(vocab_start, vocab_size, logits.shape[-1])
    logits, ref_logits = _same_precision(logits, ref_logits)
    record: Tensor = _partial(
        logits,
        tokens.to(torch.int64),
        ref_logits,
        mask,
        temperatures,
        scalar,
        cap,
        vocab_start,
        vocab,
        names,
    )
    return record


def merge_token_stats(
    records: Tensor | Sequence[Tensor],
    *,
    outputs: Sequence[str] = ("logprob", "entropy"),
    dtype: torch.dtype = torch.float32,
) -> TokenStats:
    """Token statistics of whole rows from the records of their parts, in any order.

    A few operations per token, in float64 and plain PyTorch on every device, which ``torch.compile`` fuses.

    Args:
        records: ``[parts, *tokens.shape, 14]``, or a sequence of what :func:`token_stats_partial` returned.
        outputs: as given to :func:`token_stats_partial`; what was not asked for there comes out as NaN.
        dtype: of the statistics.

    Returns:
        :class:`TokenStats`; a token that no part holds has logprob NaN. Differentiable in the records.

    Raises:
        TypeError, ValueError: records or outputs that are not as above.
    """
    fields = len(spec.RECORD)
    if isinstance(records, Tensor):
        parts = records
    elif not isinstance(records, Sequence) or not all(isinstance(part, Tensor) for part in records):
        raise TypeError(f"records: got {type(records).__name__}, want a tensor or a sequence of tensors")
    # Compared, not hashed: a hash makes constants of sizes in a compiled graph.
    elif not records or any(
        (part.shape, part.dtype, part.device) != (records[0].shape, records[0].dtype, records[0].device)
        for part in records
    ):
        raise ValueError("records: got none or unlike ones, want some of one shape, dtype and device")
    else:
        parts = torch.stack(list(records))
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, want float32, bfloat16, float16 or float64")
    if parts.dtype is not torch.float64:
        raise TypeError(f"records: got dtype {parts.dtype}, want float64")
    if parts.dim() < 2 or parts.shape[-1] != fields or not parts.shape[0]:
        raise ValueError(f"records: got shape {checks.show(parts.shape)}, want [parts, ..., {fields}]")
    names = check_outputs(outputs, PARTIAL_OUTPUTS, True)
    found: dict[str, Any] = spec.finish(spec.merge(parts, names), names)
    return TokenStats(**{k: v if k == "is_top1" else v.to(dtype) for k, v in found.items()})


# ---- shards of the vocabulary on the ranks of a process group ----------------------------------------------


def shard_start(shape: torch.Size, process_group: ProcessGroup) -> int:
    """The first column of this rank's shard, whose last dimension (if it has one yet unchecked) is its width."""
    return distributed.rank(distributed.check(process_group)) * (shape[-1] if shape else 0)


def merge_over_ranks(
    record: Tensor, outputs: Sequence[str], process_group: ProcessGroup, dtype: torch.dtype
) -> TokenStats:
    """The statistics of whole rows from the records of all ranks' shards; the gradient reaches one's own."""
    fields = spec.fields_of(outputs)
    at, ranks = distributed.rank(process_group), distributed.size(process_group)
    others = record.detach().new_zeros((ranks, *record.shape))
    others[..., fields] = distributed.exchange(record[..., fields], process_group)
    everyone = torch.cat([others[:at], record[None], others[at + 1 :]])
    return merge_token_stats(everyone, outputs=outputs, dtype=dtype)
