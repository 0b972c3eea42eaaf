"""Validation of the arguments that the logits and the linear family share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.checks import Number
from ..core.precision import wide
from ..core.settings import debugging, may_read
from ..reference.logits import OUTPUTS, REF_OUTPUTS, valid_rows


class TokenArguments(NamedTuple):
    """The fields that ``TokenStatsArgs`` and ``LinearArgs`` have in common, in the order of the latter."""

    tokens: Tensor
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: Number
    softcap: Number
    first: int
    vocab: int
    beta: Number
    outputs: list[str]


def token_arguments(
    tokens: Tensor,
    outputs: list[str],
    *,
    width: int,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    vocab_size: int | None,
    mask: Tensor | None,
    beta: float | Tensor,
    vocab_start: int,
    partial: bool,
) -> TokenArguments:
    """Validate all arguments that do not depend on the source of the logits.

    Args:
        outputs: the names that :func:`check_outputs` returned.
        width: columns of the logits.
        partial: True if the logits are a part of the vocabulary, from ``vocab_start`` on.
    """
    mask = checks.as_mask(mask, tokens.shape, tokens.device, "tokens")
    temperatures, scalar = _temperatures(temperature, tokens, mask)
    cap = 0.0 if softcap is None else _softcap(softcap)
    vocab = _columns(vocab_start, vocab_size, width) if partial else _vocab(vocab_size, width)
    beta = _checked_beta(beta, outputs)
    tokens = tokens if tokens.dtype is torch.int64 else tokens.to(torch.int64)
    if debugging() and not partial:
        checks.check_token_ids(tokens, vocab, valid_rows(tokens, mask))
    return TokenArguments(tokens, mask, temperatures, scalar, cap, vocab_start, vocab, beta, outputs)


def check_outputs(outputs: Sequence[str], choices: Sequence[str], has_ref: bool) -> list[str]:
    """Validate names of outputs; return them in the order of the choices."""
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        raise ValueError(f"outputs: got {outputs!r}, want a sequence of names out of {tuple(choices)}")
    for name in outputs:
        if name not in choices:
            checks.check_choice("outputs", name, choices)
        if name in REF_OUTPUTS and not has_ref:
            raise ValueError(f"outputs: got {name!r} without ref_logits, want both or neither")
    return [name for name in choices if name in outputs]


def check_coefficients(
    coefficients: Mapping[str, Tensor],
    outputs: Sequence[str],
    tokens: Tensor,
    device: torch.device,
    other: str,
) -> list[str]:
    """Validate the coefficients of a loss linear in outputs; return the names of all outputs to compute."""
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


# ---- one argument each --------------------------------------------------------------------------------------


def _temperatures(
    temperature: float | Tensor, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, Number]:
    """Validate a temperature: a tensor gives (tensor per token, 1.0), a number (None, number)."""
    if not isinstance(temperature, Tensor) or (
        temperature.dim() == 0 and temperature.device != tokens.device
    ):
        return None, checks.check_positive("temperature", temperature)
    checks.check_float("temperature", temperature)
    checks.check_device("temperature", temperature, tokens.device, "logits")
    t = wide(temperature.detach())
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
        if bool(bad.any()) and bool((bad & valid_rows(tokens, mask)).any()):
            raise ValueError("temperature: got a value that is not above 0, want all above 0")
    return t.expand(tokens.shape).contiguous(), 1.0


def _softcap(softcap: float | Tensor | None) -> Number:
    return 0.0 if softcap is None else checks.check_positive("softcap", softcap)


def _vocab(vocab_size: int | None, width: int) -> int:
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: got {type(vocab_size).__name__}, want int")
    if not 0 < vocab_size <= width:
        raise ValueError(f"vocab_size: got {vocab_size}, want 1 to {width} (the columns of logits)")
    return vocab_size


def _columns(vocab_start: int, vocab_size: int | None, width: int) -> int:
    """The number of columns of a part of the vocabulary that are not padding."""
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


def _checked_beta(beta: float | Tensor, names: Sequence[str]) -> Number:
    """The beta of ``jsd``; without it any number will do."""
    if "jsd" not in names:
        return 0.5
    number = checks.check_positive("beta", beta)
    if not isinstance(number, Tensor) and number >= 1:
        raise ValueError(f"beta: got {beta}, want a number above 0 and below 1")
    return number
