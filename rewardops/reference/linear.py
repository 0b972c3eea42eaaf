"""Token statistics from hidden states, the specification: all logits at once, in float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.kinds import Flags, IdTokens, WideTokens
from . import logits as spec
from .logits import TokenStatsArgs, check_names, check_terms, check_upstream
from .token_records import RECORD, finish, merge, record_gradient


class LinearArgs(NamedTuple):
    """Arguments of every op of the family; rows ``[...]`` are ``[N]`` or ``[B, T]``."""

    hidden: Annotated[Tensor, "float", "...", "D"]
    """``[..., D]``; float32, bfloat16, float16 or float64."""
    weight: Annotated[Tensor, "float", "V", "D"]
    """``[V, D]``, the head."""
    bias: Annotated[Tensor, "float", "V"] | None
    """``[V]``."""
    ref_hidden: Annotated[Tensor, "float", "...", "E"] | None
    """``[..., D_ref]``, hidden states of the reference model; None without one."""
    ref_weight: Annotated[Tensor, "float", "V", "E"] | None
    """``[V, D_ref]``."""
    ref_bias: Annotated[Tensor, "float", "V"] | None
    """``[V]``."""
    tokens: IdTokens
    """This and the fields up to ``outputs``: as in ``TokenStatsArgs``."""
    mask: Flags | None
    temperatures: WideTokens | None
    temperature: float
    softcap: float
    first: int
    """The token id of the head's first row; 0 for the ops of whole rows."""
    vocab: int
    """Number of rows of the head that are not padding."""
    beta: float
    outputs: Sequence[str]
    chunk_tokens: int
    """Tokens of a block of logits; 0: as many as the workspace holds."""
    chunk_vocab: int
    """Columns of a block of logits; 0: as many as the workspace holds."""
    num_tokens: int
    """An upper bound of the number of valid tokens; -1: the number is read from the device."""


# ---- arguments as the products and kernels rely on them ------------------------------------------------------


def check_args(a: LinearArgs) -> None:
    """Raise where arguments do not fit together; kinds have checked dtypes and shapes by then."""
    if (a.ref_hidden is None) != (a.ref_weight is None):
        raise ValueError("ref_hidden: got one of ref_hidden and ref_weight, want both or neither")
    if not 0 <= a.vocab <= a.weight.shape[0]:
        raise ValueError(f"vocab: got {a.vocab}, want 0 to {a.weight.shape[0]} (the rows of weight)")
    for name in ("first", "chunk_tokens", "chunk_vocab"):
        if getattr(a, name) < 0:
            raise ValueError(f"{name}: got {getattr(a, name)}, want at least 0")
    check_names(tuple(a.outputs), a.ref_hidden is not None)


def check_backward(
    grads: Sequence[Tensor | None], saved: Tensor, a: LinearArgs, needs: Sequence[bool]
) -> None:
    """Raise unless gradients and saved statistics are those of the arguments."""
    check_args(a)
    check_upstream(a.outputs, _wide(a), grads, saved.shape[-1], len(RECORD))
    _check_needs(needs, 6)


def check_partial_backward(grad_record: Tensor, record: Tensor, a: LinearArgs, needs: Sequence[bool]) -> None:
    check_args(a)
    _check_needs(needs, 6)


def check_loss(
    coefficients: Sequence[Tensor], terms: Sequence[str], needs: Sequence[bool], a: LinearArgs
) -> None:
    """Raise unless a loss that is known at the call is of outputs of the arguments."""
    check_args(a)
    check_terms(coefficients, terms, a.outputs)
    _check_needs(needs, 3)


def _check_needs(needs: Sequence[bool], count: int) -> None:
    if len(needs) != count:
        raise ValueError(f"needs: got {len(needs)}, want {count} (one per tensor with a gradient)")


# ---- products of whole rows ----------------------------------------------------------------------------------


def pack_saved(saved: Tensor) -> Tensor:
    """Pad saved row statistics ``[saved_rows, ...]`` to the width of a record: both paths save one shape."""
    return torch.nn.functional.pad(saved.movedim(0, -1), (0, len(RECORD) - saved.shape[0]))


def unpack_saved(saved: Tensor, paired: bool) -> Tensor:
    """The inverse of :func:`pack_saved`."""
    return saved[..., : spec.saved_rows(paired)].movedim(-1, 0)


def precision(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums and outputs: float64 if any input is float64, else float32."""
    double = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _wide(a: LinearArgs) -> torch.dtype:
    return precision(a.hidden, a.weight, a.ref_hidden, a.ref_weight)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, wide: torch.dtype) -> Tensor:
    x = torch.where(valid[..., None], hidden, 0).to(wide) @ weight.to(wide).T
    return x if bias is None else x + bias.to(wide)


def _token_stats_args(a: LinearArgs) -> TokenStatsArgs:
    """The logits of the policy and the reference, with the other arguments of their statistics."""
    valid, wide, ref = spec.valid_rows(a.tokens, a.mask), _wide(a), None
    if a.ref_hidden is not None and a.ref_weight is not None:
        ref = _logits(a.ref_hidden, a.ref_weight, a.ref_bias, valid, wide)
    return TokenStatsArgs(
        _logits(a.hidden, a.weight, a.bias, valid, wide), a.tokens, ref, a.mask, a.temperatures,
        a.temperature, a.softcap, a.first, a.vocab, a.beta, list(a.outputs),
    )  # fmt: skip


def _head_gradients(a: LinearArgs, of_logits: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of hidden, weight and bias of each side, from that of its logits; empty where not needed."""
    valid, wide = spec.valid_rows(a.tokens, a.mask), _wide(a)

    def empty() -> Tensor:
        return of_logits[0].new_empty(0)

    sides = ((a.hidden, a.weight, a.bias), (a.ref_hidden, a.ref_weight, a.ref_bias))
    grads: list[Tensor] = []
    for k, (hidden, weight, bias) in enumerate(sides[: len(needs) // 3]):
        if hidden is None or weight is None:
            grads += [empty(), empty(), empty()]
            continue
        to_hidden, to_weight, to_bias = needs[3 * k : 3 * k + 3]
        g = of_logits[k]
        flat = g.reshape(-1, g.shape[-1])
        inputs = torch.where(valid[..., None], hidden, 0).to(wide).reshape(-1, hidden.shape[-1])
        # Rows of padding and hidden states of masked tokens may hold anything.
        on_hidden = torch.where(valid[..., None], g[..., : a.vocab] @ weight[: a.vocab].to(wide), 0)
        grads.append(on_hidden.to(hidden.dtype) if to_hidden else empty())
        grads.append((flat.T @ inputs).to(weight.dtype) if to_weight else empty())
        grads.append(flat.sum(0).to(bias.dtype) if to_bias and bias is not None else empty())
    return grads


def linear_token_stats(a: LinearArgs) -> list[Tensor]:
    """Statistics saved for the backward pass, ``[..., len(RECORD)]``, and the outputs."""
    rows = _token_stats_args(a)
    if "jsd" in a.outputs:
        saved, *values = spec.token_stats(rows)
        return [pack_saved(saved), *values]
    record = spec.token_stats_partial(rows)
    by_name = finish(merge(record[None], a.outputs), a.outputs)
    return [record, *(v if name == "is_top1" else v.to(_wide(a)) for name, v in by_name.items())]


def linear_token_stats_backward(
    grads: Sequence[Tensor | None], saved: Tensor, a: LinearArgs, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    rows = _token_stats_args(a)
    paired = rows.ref_logits is not None
    if "jsd" in a.outputs:
        of_logits = spec.token_stats_backward(grads, unpack_saved(saved, paired), rows, True, paired)
    else:
        upstream = {name: g for name, g in zip(a.outputs, grads, strict=True) if g is not None}
        on_record = record_gradient(saved, upstream)
        of_logits = spec.token_stats_partial_backward(on_record, saved, rows, True, paired)
    return _head_gradients(a, of_logits, needs)


def linear_token_stats_partial(a: LinearArgs) -> Tensor:
    """Records ``[..., len(RECORD)]`` of a part of the vocabulary."""
    return spec.token_stats_partial(_token_stats_args(a))


def linear_token_stats_partial_backward(
    grad_record: Tensor, record: Tensor, a: LinearArgs, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    rows = _token_stats_args(a)
    paired = rows.ref_logits is not None
    return _head_gradients(
        a, spec.token_stats_partial_backward(grad_record, record, rows, True, paired), needs
    )


def linear_token_loss(
    coefficients: Sequence[Tensor], terms: Sequence[str], needs: Sequence[bool], a: LinearArgs
) -> list[Tensor]:
    """The loss, the gradients of hidden, weight and bias, and the outputs."""
    rows, wide = _token_stats_args(a), _wide(a)
    valid = spec.valid_rows(a.tokens, a.mask)
    saved, *values = spec.token_stats(rows)
    by_name = dict(zip(a.outputs, values, strict=True))
    ups = {name: torch.where(valid, c, 0).to(wide) for name, c in zip(terms, coefficients, strict=True)}
    loss = sum((up.double() * by_name[name].double()).sum() for name, up in ups.items())
    assert isinstance(loss, Tensor)
    grads = [ups.get(name) for name in a.outputs]
    of_logits = spec.token_stats_backward(grads, saved, rows, True, False)
    return [loss.to(wide), *_head_gradients(a, of_logits, needs), *values]
