"""Token statistics from hidden states, the specification: all logits at once, in float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import logits as spec


def pack_saved(saved: Tensor) -> Tensor:
    """What a backward pass of whole rows needs ``[saved_rows, ...]``, as wide as a record."""
    return torch.nn.functional.pad(saved.movedim(0, -1), (0, len(spec.RECORD) - saved.shape[0]))


def unpack_saved(saved: Tensor, paired: bool) -> Tensor:
    return saved[..., : spec.saved_rows(paired)].movedim(-1, 0)


def precision(*tensors: Tensor | None) -> torch.dtype:
    """Of sums and outputs: float64 if any input is, else float32."""
    given = [t for t in tensors if t is not None]
    return torch.float64 if any(t.dtype is torch.float64 for t in given) else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, wide: torch.dtype) -> Tensor:
    x = torch.where(valid[..., None], hidden, 0).to(wide) @ weight.to(wide).T
    return x if bias is None else x + bias.to(wide)


class _Problem:
    """The arguments by name, and the logits of both sides."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        vocab: int,
        beta: float,
        outputs: Sequence[str],
        chunk_tokens: int,
        chunk_vocab: int,
        num_tokens: int,
        start: int = 0,
    ) -> None:
        self.sides = [(hidden, weight, bias)]
        if ref_hidden is not None and ref_weight is not None:
            self.sides.append((ref_hidden, ref_weight, ref_bias))
        self.wide = precision(hidden, weight, ref_hidden, ref_weight)
        self.valid = spec.valid_rows(tokens, mask)
        made = [_logits(*side, self.valid, self.wide) for side in self.sides]
        self.inputs = (made[0], tokens, made[1] if len(made) > 1 else None, mask, temperatures)
        self.scalars = (temperature, softcap)
        self.vocab, self.beta, self.outputs, self.start = vocab, beta, list(outputs), start

    def _none(self) -> Tensor:
        return self.inputs[0].new_empty(0)

    def gradients(self, of_logits: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """Of hidden, weight and bias of each side, from those of its logits; empty where not needed."""
        found = []
        for k in range(len(needs) // 3):
            if k >= len(self.sides):
                found += [self._none() for _ in range(3)]
                continue
            (hidden, weight, bias), g = self.sides[k], of_logits[k]
            kept = torch.where(self.valid[..., None], hidden, 0).to(self.wide).reshape(-1, hidden.shape[-1])
            flat = g.reshape(-1, g.shape[-1])
            to_hidden, to_weight, to_bias = needs[3 * k : 3 * k + 3]
            found.append((g @ weight.to(self.wide)).to(hidden.dtype) if to_hidden else self._none())
            found.append((flat.T @ kept).to(weight.dtype) if to_weight else self._none())
            found.append(flat.sum(0).to(bias.dtype) if to_bias and bias is not None else self._none())
        return found


def linear_token_stats(*args: Any) -> list[Tensor]:
    """What is saved, ``[..., len(RECORD)]``, and the outputs asked for."""
    p = _Problem(*args)
    if "jsd" in p.outputs:
        saved, *found = spec.token_stats(*p.inputs, *p.scalars, p.vocab, p.beta, p.outputs)
        return [pack_saved(saved), *found]
    record = spec.token_stats_partial(*p.inputs, *p.scalars, 0, p.vocab, p.outputs)
    values = spec.finish(spec.merge(record[None], p.outputs), p.outputs)
    return [record, *(v if name == "is_top1" else v.to(p.wide) for name, v in values.items())]


def linear_token_stats_backward(grads: Sequence[Tensor | None], saved: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    *rest, needs = args
    p = _Problem(*rest)
    both = True, len(p.sides) > 1
    if "jsd" in p.outputs:
        kept = unpack_saved(saved, both[1])
        options = (*p.scalars, p.vocab, p.beta, p.outputs)
        found = spec.token_stats_backward(grads, *p.inputs, kept, *options, *both)
    else:
        given = {name: g for name, g in zip(p.outputs, grads, strict=True) if g is not None}
        on = spec.record_gradient(saved, given)
        found = spec.token_stats_partial_backward(on, saved, *p.inputs, *p.scalars, 0, p.vocab, *both)
    return p.gradients(found, needs)


def linear_token_stats_partial(*args: Any) -> Tensor:
    """Records ``[..., len(RECORD)]`` of a part of the vocabulary."""
    p = _Problem(*args)
    return spec.token_stats_partial(*p.inputs, *p.scalars, p.start, p.vocab, p.outputs)


def linear_token_stats_partial_backward(grad_record: Tensor, record: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    *rest, needs = args
    p = _Problem(*rest)
    both = True, len(p.sides) > 1
    found = spec.token_stats_partial_backward(
        grad_record, record, *p.inputs, *p.scalars, p.start, p.vocab, *both
    )
    return p.gradients(found, needs)


def linear_token_loss(
    coefficients: Sequence[Tensor], terms: Sequence[str], needs: Sequence[bool], *args: Any
) -> list[Tensor]:
    """The loss, the gradients of hidden, weight and bias, and the outputs."""
    p = _Problem(*args)
    options = (*p.scalars, p.vocab, p.beta, p.outputs)
    saved, *made = spec.token_stats(*p.inputs, *options)
    known = dict(zip(p.outputs, made, strict=True))
    ups = {name: torch.where(p.valid, c, 0).to(p.wide) for name, c in zip(terms, coefficients, strict=True)}
    loss = sum((up.double() * known[name].double()).sum() for name, up in ups.items())
    grads = [ups.get(name) for name in p.outputs]
    found = spec.token_stats_backward(grads, *p.inputs, saved, *options, True, False)
    assert isinstance(loss, Tensor)
    return [loss.to(p.wide), *p.gradients(found, needs), *made]
