"""Hidden states to token statistics, a block of logits at a time.

The vendor library computes the products; a backend's logits kernels read the rows. A block of logits lives in one
workspace and is reduced to records, which merge. The backward pass computes it again and overwrites it with its
gradient. Masked tokens are left out before any product.

Two loop orders. *Tiles*, for all outputs that merge from records: blocks of tokens and of vocabulary. The backward
pass has the vocabulary in its outer loop, so that the weight's gradient is written part by part and never held
twice; the gradient of the hidden states is summed over the parts in float32. *Whole rows*, where a row's
normalisers are needed beside its logits (the Jensen-Shannon divergence, gradients in the forward pass): blocks of
tokens alone; the weight's gradient is summed over them in float32.

The ops take a backend's logits module, ``kernels``, as their first argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference import logits as spec
from ..reference.linear import LinearArgs, pack_saved, unpack_saved
from ..reference.logits import TokenStatsArgs
from ..reference.token_records import RECORD, finish, merge, merge_records, record_gradient
from .heads import Models, blocks

# ---- forward passes ----------------------------------------------------------------------------------------


def _records(kernels: ModuleType, models: Models) -> Tensor:
    """Record of every row, merged from the records of its tiles."""
    count, vocab = models.rows.count, models.vocab
    record = models.policy.hidden.new_zeros((count, len(RECORD)), dtype=torch.float64)
    if not vocab:  # a shard of nothing but padding
        record[:, [RECORD.index("shift"), RECORD.index("ref_shift")]] = -torch.inf
        return record
    tokens, columns = models.sizes(whole=False)
    for a, b in blocks(count, tokens):
        parts: list[Tensor] = []
        for first, end in blocks(vocab, columns):
            block = models.block_args(a, b, models.parts(first, end), first, end - first)
            parts.append(kernels.token_stats_partial(block))
            if len(parts) == 16:  # bounds the memory of unmerged records
                parts = [merge_records(torch.stack(parts))]
        record[a:b] = merge_records(torch.stack(parts)) if len(parts) > 1 else parts[0]
    return record


def _whole_rows(models: Models) -> Iterator[tuple[int, int, list[Tensor], TokenStatsArgs]]:
    """Blocks of tokens: their range, the heads' weights, and the logits kernels' arguments."""
    tokens, _ = models.sizes(whole=True)
    weights = models.parts(0, models.vocab)
    for a, b in blocks(models.rows.count, tokens):
        yield a, b, weights, models.block_args(a, b, weights, 0, models.vocab)


def linear_token_stats(kernels: ModuleType, args: LinearArgs) -> list[Tensor]:
    """Statistics saved for the backward pass, ``[..., 14]``, and the outputs."""
    models = Models(args)
    outputs = models.outputs
    if "jsd" not in outputs:
        record = _records(kernels, models)
        return [models.saved(record), *models.finish(finish(merge(record[None], outputs), outputs))]
    saved: list[Tensor] = [
        models.policy.hidden.new_empty((spec.saved_rows(models.paired), 0), dtype=torch.float64)
    ]
    values = {name: [models.nothing(name)] for name in outputs}
    for _, _, _, block in _whole_rows(models):
        saved_of_block, *values_of_block = kernels.token_stats(block, False)
        saved.append(saved_of_block)
        for name, value in zip(outputs, values_of_block, strict=True):
            values[name].append(value)
    return [
        models.saved(pack_saved(torch.cat(saved, 1))),
        *models.finish({name: torch.cat(parts) for name, parts in values.items()}),
    ]


def linear_token_stats_partial(kernels: ModuleType, args: LinearArgs) -> Tensor:
    """The records ``[..., 14]`` of a part of the vocabulary."""
    models = Models(args)
    return models.saved(_records(kernels, models))


# ---- backward passes ---------------------------------------------------------------------------------------


def _tile_gradients(kernels: ModuleType, models: Models, record: Tensor, grad_record: Tensor) -> None:
    """Add the gradients of all rows to the heads, from the gradients of their records."""
    count, heads = models.rows.count, models.heads
    tokens, columns = models.sizes(whole=False)
    for first, end in blocks(models.vocab, columns):
        parts = models.parts(first, end)
        sums = [h.part_sum(first, end, -(-count // tokens)) for h in heads]
        for a, b in blocks(count, tokens):
            block = models.block_args(a, b, parts, first, end - first)
            outs = [h.gradient(a, b, end - first) if h.wanted else None for h in heads]
            kernels.token_stats_partial_backward_to(
                grad_record[a:b], record[a:b], block, outs[0], outs[1] if models.paired else None
            )
            for head, part, g, total in zip(heads, parts, outs, sums, strict=True):
                if g is not None:
                    head.add(g, a, b, part, first, total)
        for head, total in zip(heads, sums, strict=True):
            if total is not None and head.grad_weight is not None and total.dtype != head.grad_weight.dtype:
                head.grad_weight[first:end] = total


def _record_gradients(kernels: ModuleType, models: Models, record: Tensor, grad_record: Tensor) -> None:
    if models.rows.count:
        _tile_gradients(kernels, models, record, grad_record)
        return
    for head in models.heads:
        if head.grad_weight is not None:
            head.grad_weight.zero_()


def _row_gradients(
    kernels: ModuleType, models: Models, a: int, b: int, weights: list[Tensor], block: TokenStatsArgs,
    saved: Tensor, grads: dict[str, Tensor],
) -> None:  # fmt: skip
    """Add the gradients of whole rows ``a:b`` to the heads; overwrites their logits."""
    outs = [h.gradient(a, b, models.vocab) if h.wanted else None for h in models.heads]
    kernels.token_stats_backward_to(
        list(grads.values()),
        saved,
        block._replace(outputs=list(grads)),
        outs[0],
        outs[1] if models.paired else None,
    )
    for head, weight, g in zip(models.heads, weights, outs, strict=True):
        if g is not None:
            summed = (
                None if head.grad_weight is None or models.one_block else head.grad_weight[: models.vocab]
            )
            head.add(g, a, b, weight, 0, summed)


def _by_side(models: Models) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    grads = [
        g
        for h, shape in zip(models.heads, models.shapes, strict=True)
        for g in h.gradients(models.rows, shape)
    ]
    return grads + [models.policy.hidden.new_empty(0) for _ in range(6 - len(grads))]


def linear_token_stats_backward(
    kernels: ModuleType,
    grads: Sequence[Tensor | None],
    saved: Tensor,
    args: LinearArgs,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    models = Models(args)
    rows = models.rows
    upstream = {name: rows.gather(g) for name, g in zip(models.outputs, grads, strict=True) if g is not None}
    saved = rows.gather(saved, 1)
    whole = "jsd" in models.outputs
    for k, head in enumerate(models.heads):
        head.prepare(needs[3 * k : 3 * k + 3], summed=whole and not models.one_block)
    if whole:
        unpacked = unpack_saved(saved, models.paired)
        for a, b, weights, block in _whole_rows(models):
            ups = {name: g[a:b].contiguous() for name, g in upstream.items()}
            _row_gradients(kernels, models, a, b, weights, block, unpacked[:, a:b].contiguous(), ups)
    else:
        _record_gradients(kernels, models, saved, record_gradient(saved, upstream))
    return _by_side(models)


def linear_token_stats_partial_backward(
    kernels: ModuleType, grad_record: Tensor, record: Tensor, args: LinearArgs, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides from those of the records; empty for those not needed."""
    models = Models(args)
    for k, head in enumerate(models.heads):
        head.prepare(needs[3 * k : 3 * k + 3], summed=False)
    _record_gradients(kernels, models, models.rows.gather(record, 1), models.rows.gather(grad_record, 1))
    return _by_side(models)


# ---- a loss that is known at the call ----------------------------------------------------------------------


def linear_token_loss(
    kernels: ModuleType,
    coefficients: Sequence[Tensor],
    terms: Sequence[str],
    needs: Sequence[bool],
    args: LinearArgs,
) -> list[Tensor]:
    """The loss, the gradients of hidden, weight and bias, and the outputs; logits are computed once per block."""
    models = Models(args)
    rows, policy = models.rows, models.policy
    factors = {name: rows.gather(c.to(models.wide)) for name, c in zip(terms, coefficients, strict=True)}
    policy.prepare(needs, summed=not models.one_block)
    values = {name: [models.nothing(name)] for name in models.outputs}
    loss = policy.hidden.new_zeros((), dtype=torch.float64)
    for a, b, weights, block in _whole_rows(models):
        saved, *values_of_block = kernels.token_stats(block, False)
        by_name = dict(zip(models.outputs, values_of_block, strict=True))
        for name, value in by_name.items():
            values[name].append(value)
        ups = {name: c[a:b].contiguous() for name, c in factors.items()}
        valid = block.tokens != spec.IGNORED
        for name, up in ups.items():
            loss += torch.where(valid, up.double() * by_name[name].double(), 0).sum()
        if policy.wanted:
            _row_gradients(kernels, models, a, b, weights, block, saved, ups)
    outputs = models.finish({name: torch.cat(parts) for name, parts in values.items()})
    return [loss.to(models.wide), *policy.gradients(rows, models.shapes[0]), *outputs]
