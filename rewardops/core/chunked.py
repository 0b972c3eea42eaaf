"""Hidden states to token statistics, a block of logits at a time.

The products are the vendor library's, the rows are read by a backend's logits kernels. A block of logits lives in
one workspace, is read as records that merge, and in the backward pass is made again and turned into its gradient
where it lies. Tokens that are masked are left out before any product.

Two orders of blocks. *Tiles*, for everything that records hold: blocks of tokens and of vocabulary. The backward
pass has the vocabulary outside, so that the weight's gradient is made part by part and never held twice; the
hidden states' is summed over the parts in float32. *Whole rows*, where a row's normalisers are needed beside its
logits (the Jensen-Shannon divergence, gradients made in the forward pass): blocks of tokens alone, the weight's
gradient summed over them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import logits as spec
from ..reference.linear import pack_saved, unpack_saved
from .native import fresh

# A block's logits should fill a GPU's multiprocessors and a CPU's caches.
_TOKENS = 4096
_LEAST_TOKENS = 512  # of whole rows: fewer make slow products
_SUM = 2**22  # elements of a product that is added in another precision


# ---- sizes -------------------------------------------------------------------------------------------------


def workspace_bytes(tokens: int, vocab: int, device: torch.device) -> int:
    """What blocks of logits may take: 256 MiB or 1 % of all logits in float32, the larger; on a CPU 32 MiB."""
    return 2**25 if device.type == "cpu" else max(2**28, tokens * vocab * 4 // 100)


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, max(size, 1)):
        yield start, min(start + size, count)


# ---- products ----------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``; unrounded where the library has products of half precision in float32 (CUDA)."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, the sum in the precision of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        # Part by part: a product in half precision is small and gone before it leaves the caches.
        for first, end in _blocks(total.shape[0], _SUM // max(total.shape[1], 1)):
            total[first:end].add_(torch.mm(a[first:end], b))


def _large(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a CPU in huge pages."""
    return fresh(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


class _Head:
    """One model's hidden states and head: logits of a block, and the sums of their gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, vocab: int) -> None:
        self.weight, self.bias = weight, bias
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        # Products of float16 are slower on CPUs than those of float32, and say less.
        self.dtype = torch.float32 if dtype is torch.float16 and hidden.device.type == "cpu" else dtype
        half = self.dtype in (torch.float16, torch.bfloat16)
        self.logits_dtype = torch.float32 if half and hidden.device.type == "cuda" else self.dtype
        self.hidden_dtype = hidden.dtype
        self.hidden = rows.gather(hidden, trailing=1).to(self.dtype)
        if rows.beyond is not None:
            # Their gradient is 0, and 0 times what a masked token holds need not be.
            self.hidden.masked_fill_(rows.beyond[:, None], 0)
        self.vocab = vocab
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of a logit in the workspace, with its gradient where that is another tensor."""
        return self.logits_dtype.itemsize + (self.dtype.itemsize if self.logits_dtype != self.dtype else 0)

    def workspace(self, tokens: int, columns: int) -> None:
        device, shape = self.hidden.device, (tokens * columns,)
        self.block = _large(shape, self.logits_dtype, device)
        same = self.logits_dtype == self.dtype
        self.grad_block = self.block if same else _large(shape, self.dtype, device)

    def part(self, first: int, end: int) -> Tensor:
        return self.weight[first:end].to(self.dtype)

    def logits(self, a: int, b: int, part: Tensor, first: int) -> Tensor:
        columns = part.shape[0]
        out = self.block[: (b - a) * columns].view(b - a, columns)
        _multiply(self.hidden[a:b], part.t(), out)
        if self.bias is not None:
            out += self.bias[first : first + columns].to(out.dtype)
        return out

    def gradient(self, a: int, b: int, columns: int) -> Tensor:
        """Where the gradient of a block goes: over the logits, unless the product takes another precision."""
        return self.grad_block[: (b - a) * columns].view(b - a, columns)

    # ---- gradients

    def prepare(self, needs: Sequence[bool], summed: bool) -> None:
        to_hidden, to_weight, to_bias = needs
        wide = _wide(self.dtype)
        if to_hidden:
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=wide)
        if to_weight:
            dtype = wide if summed else self.weight.dtype
            self.grad_weight = _large(self.weight.shape, dtype, self.weight.device)
            (self.grad_weight if summed else self.grad_weight[self.vocab :]).zero_()
        if to_bias:
            self.grad_bias = self.hidden.new_zeros(self.weight.shape[0], dtype=wide)

    @property
    def wanted(self) -> bool:
        return any(g is not None for g in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def part_sum(self, first: int, end: int, products: int) -> Tensor | None:
        """Where the gradient of a part of the weight is summed; None where one product writes it in place."""
        if self.grad_weight is None or (products == 1 and self.grad_weight.dtype == self.dtype):
            return None
        out = self.grad_weight[first:end]
        wide = _wide(self.dtype)
        return out.zero_() if out.dtype == wide else torch.zeros_like(out, dtype=wide)

    def add(self, g: Tensor, a: int, b: int, part: Tensor, first: int, total: Tensor | None) -> None:
        """The gradient ``g`` of the logits of tokens ``a:b`` in columns from ``first``."""
        end = first + part.shape[0]
        if self.grad_hidden is not None:
            _add_product(self.grad_hidden[a:b], g, part)
        if total is not None:
            _add_product(total, g.t(), self.hidden[a:b])
        elif self.grad_weight is not None:
            _multiply(g.t(), self.hidden[a:b], self.grad_weight[first:end])
        if self.grad_bias is not None:
            self.grad_bias[first:end] += g.sum(0, dtype=self.grad_bias.dtype)

    def gradients(self, rows: _Rows, shape: torch.Size) -> list[Tensor]:
        found = [self.hidden.new_empty(0) for _ in range(3)]
        if self.grad_hidden is not None:
            found[0] = rows.scatter(self.grad_hidden.to(self.hidden_dtype)).view(shape)
        if self.grad_weight is not None:
            found[1] = self.grad_weight.to(self.weight.dtype)
        if self.grad_bias is not None and self.bias is not None:
            found[2] = self.grad_bias.to(self.bias.dtype)
        return found


# ---- tokens ------------------------------------------------------------------------------------------------


class _Rows:
    """The tokens that count: their places, and per-token tensors gathered from there and scattered back."""

    def __init__(self, tokens: Tensor, mask: Tensor | None, num_tokens: int) -> None:
        valid = spec.valid_rows(tokens, mask).reshape(-1)
        self.total, self.shape = valid.numel(), tokens.shape
        self.index: Tensor | None
        if num_tokens < 0:
            index = valid.nonzero()[:, 0]
            self.index = None if index.numel() == self.total else index
        else:
            self.index = torch.nonzero_static(valid, size=min(num_tokens, self.total), fill_value=self.total)[
                :, 0
            ]
        self.hinted = num_tokens >= 0
        self.count = self.total if self.index is None else self.index.numel()
        # Where to gather from: places beyond the valid tokens read some token.
        self.places = self.index
        self.beyond: Tensor | None = None
        if self.hinted and self.index is not None:
            self.places = self.index.clamp(max=max(self.total - 1, 0))
            self.beyond = self.index == self.total
        self.tokens = self.gather(tokens)
        if self.beyond is not None:
            self.tokens = self.tokens.masked_fill(self.beyond, spec.IGNORED)

    def gather(self, x: Tensor, trailing: int = 0) -> Tensor:
        """Per-token values ``[count, ...]``, from ``tokens.shape`` and ``trailing`` more dimensions."""
        flat = x.reshape(self.total, *x.shape[x.dim() - trailing :])
        return flat if self.places is None else flat.index_select(0, self.places)

    def scatter(self, x: Tensor) -> Tensor:
        """Back to all tokens, 0 for the others; the leading dimension is ``tokens`` flattened."""
        if self.index is None:
            return x
        out = x.new_zeros((self.total + self.hinted, *x.shape[1:]))
        return out.index_copy_(0, self.index, x)[: self.total]


class _Problem:
    """What forward and backward have in common."""

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
        self.rows = _Rows(tokens, mask, num_tokens)
        self.start = start  # the id of the head's first row
        self.policy = _Head(hidden, weight, bias, self.rows, vocab)
        self.heads = [self.policy]
        self.shapes = [hidden.shape]
        if ref_hidden is not None and ref_weight is not None:
            self.heads.append(_Head(ref_hidden, ref_weight, ref_bias, self.rows, vocab))
            self.shapes.append(ref_hidden.shape)
        self.temperatures = None if temperatures is None else self.rows.gather(temperatures)
        self.scalars = (temperature, softcap)
        self.vocab, self.beta, self.outputs = vocab, beta, list(outputs)
        self.chunk_tokens, self.chunk_vocab = chunk_tokens, chunk_vocab
        self.wide = _wide(
            torch.promote_types(*(h.dtype for h in self.heads)) if self.paired else self.policy.dtype
        )
        if self.paired and self.wide is torch.float64:
            for head in self.heads:
                head.dtype = head.logits_dtype = torch.float64
                head.hidden = head.hidden.double()

    @property
    def paired(self) -> bool:
        return len(self.heads) > 1

    @property
    def one_block(self) -> bool:
        """Whether whole rows fit into one block, whose product writes the weight's gradient where it belongs."""
        same = all(h.weight.dtype == h.dtype for h in self.heads)
        return same and 0 < self.rows.count <= self._tokens(whole=True)

    def _tokens(self, whole: bool) -> int:
        if self.chunk_tokens or not whole:
            return self.chunk_tokens or _TOKENS
        return max(self._space() // self.vocab, _LEAST_TOKENS)

    def _space(self) -> int:
        """Logits that the workspace holds."""
        each = sum(h.bytes for h in self.heads)
        return workspace_bytes(max(self.rows.count, 1), self.vocab, self.policy.hidden.device) // each

    def sizes(self, whole: bool) -> tuple[int, int]:
        """Tokens and columns of a block."""
        count, tokens = max(self.rows.count, 1), self._tokens(whole)
        columns = self.chunk_vocab or max(self._space() // min(tokens, count) // 128 * 128, 128)
        if whole:
            columns = self.vocab
        tokens, columns = min(tokens, count), min(columns, self.vocab)
        for head in self.heads:
            head.workspace(tokens, columns)
        return tokens, columns

    def inputs(self, a: int, b: int, parts: list[Tensor], first: int) -> tuple[Any, ...]:
        """A block as the logits kernels take it."""
        made = [head.logits(a, b, part, first) for head, part in zip(self.heads, parts, strict=True)]
        t = None if self.temperatures is None else self.temperatures[a:b]
        return made[0], self.rows.tokens[a:b], made[1] if self.paired else None, None, t, *self.scalars

    def parts(self, first: int, end: int) -> list[Tensor]:
        return [head.part(first, end) for head in self.heads]

    def saved(self, kept: Tensor) -> Tensor:
        return self.rows.scatter(kept).view(*self.rows.shape, kept.shape[-1])

    def nothing(self, name: str) -> Tensor:
        """An output of no tokens."""
        return self.policy.hidden.new_empty(0, dtype=torch.bool if name == "is_top1" else self.wide)

    def finish(self, found: dict[str, Tensor]) -> list[Tensor]:
        """Outputs in the shape of the tokens."""
        out = []
        for name in self.outputs:
            value = found[name] if name == "is_top1" else found[name].to(self.wide)
            out.append(self.rows.scatter(value).view(self.rows.shape))
        return out


# ---- the ops -----------------------------------------------------------------------------------------------


def _records(kernels: ModuleType, p: _Problem) -> Tensor:
    """The record of every row, from those of its tiles."""
    record = p.policy.hidden.new_zeros((p.rows.count, len(spec.RECORD)), dtype=torch.float64)
    if not p.vocab:  # a shard of nothing but padding
        record[:, [spec.RECORD.index("shift"), spec.RECORD.index("ref_shift")]] = -torch.inf
        return record
    tokens, columns = p.sizes(whole=False)
    for a, b in _blocks(p.rows.count, tokens):
        found: list[Tensor] = []
        for first, end in _blocks(p.vocab, columns):
            block = p.inputs(a, b, p.parts(first, end), first)
            found.append(kernels.token_stats_partial(*block, p.start + first, end - first, p.outputs))
            if len(found) == 16:  # keep what waits to be merged small
                found = [spec.merge_records(torch.stack(found))]
        record[a:b] = spec.merge_records(torch.stack(found)) if len(found) > 1 else found[0]
    return record


def linear_token_stats(kernels: ModuleType, *args: Any) -> list[Tensor]:
    """What is saved, ``[N, 14]``, and the outputs asked for; ``kernels`` is a backend's logits module."""
    p = _Problem(*args)
    if "jsd" not in p.outputs:
        record = _records(kernels, p)
        values = spec.finish(spec.merge(record[None], p.outputs), p.outputs)
        return [p.saved(record), *p.finish(values)]
    saved: list[Tensor] = [p.policy.hidden.new_empty((spec.saved_rows(p.paired), 0), dtype=torch.float64)]
    found = {name: [p.nothing(name)] for name in p.outputs}
    for _, _, _, block in _whole_rows(p):
        kept, *made = kernels.token_stats(*block, p.vocab, p.beta, p.outputs, False)
        saved.append(kept)
        for name, value in zip(p.outputs, made, strict=True):
            found[name].append(value)
    return [
        p.saved(pack_saved(torch.cat(saved, 1))),
        *p.finish({k: torch.cat(v) for k, v in found.items()}),
    ]


def _whole_rows(p: _Problem) -> Iterator[tuple[int, int, list[Tensor], tuple[Any, ...]]]:
    """Blocks of tokens: their range, the heads' weights, and the logits kernels' inputs."""
    tokens, _ = p.sizes(whole=True)
    weights = p.parts(0, p.vocab)
    for a, b in _blocks(p.rows.count, tokens):
        yield a, b, weights, p.inputs(a, b, weights, 0)


def _tile_gradients(kernels: ModuleType, p: _Problem, record: Tensor, grad_record: Tensor) -> None:
    tokens, columns = p.sizes(whole=False)
    for first, end in _blocks(p.vocab, columns):
        parts = p.parts(first, end)
        sums = [h.part_sum(first, end, -(-p.rows.count // tokens)) for h in p.heads]
        for a, b in _blocks(p.rows.count, tokens):
            block = p.inputs(a, b, parts, first)
            outs = [h.gradient(a, b, end - first) if h.wanted else None for h in p.heads]
            kernels.token_stats_partial_backward_to(
                grad_record[a:b],
                record[a:b],
                *block,
                p.start + first,
                end - first,
                outs[0],
                outs[1] if p.paired else None,
            )
            for head, part, g, total in zip(p.heads, parts, outs, sums, strict=True):
                if g is not None:
                    head.add(g, a, b, part, first, total)
        for head, total in zip(p.heads, sums, strict=True):
            if total is not None and head.grad_weight is not None and total.dtype != head.grad_weight.dtype:
                head.grad_weight[first:end] = total


def _row_gradients(
    kernels: ModuleType, p: _Problem, a: int, b: int, weights: list[Tensor], block: tuple[Any, ...],
    saved: Tensor, outputs: Sequence[str], grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Adds the gradient of whole rows ``a:b``; their logits are gone afterwards."""
    outs = [h.gradient(a, b, p.vocab) if h.wanted else None for h in p.heads]
    kernels.token_stats_backward_to(
        grads, *block[:5], saved, *block[5:], p.vocab, p.beta, outputs, outs[0], outs[1] if p.paired else None
    )
    for head, weight, g in zip(p.heads, weights, outs, strict=True):
        if g is not None:
            summed = None if head.grad_weight is None or p.one_block else head.grad_weight[: p.vocab]
            head.add(g, a, b, weight, 0, summed)


def linear_token_stats_backward(
    kernels: ModuleType, grads: Sequence[Tensor | None], saved: Tensor, *args: Any
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides; empty for those not needed."""
    *rest, needs = args
    p = _Problem(*rest)
    given = {name: p.rows.gather(g) for name, g in zip(p.outputs, grads, strict=True) if g is not None}
    kept = p.rows.gather(saved, 1)
    whole = "jsd" in p.outputs
    for k, head in enumerate(p.heads):
        head.prepare(needs[3 * k : 3 * k + 3], summed=whole and not p.one_block)
    if whole:
        names = list(given)
        unpacked = unpack_saved(kept, p.paired)
        for a, b, weights, block in _whole_rows(p):
            ups = [given[name][a:b].contiguous() for name in names]
            _row_gradients(kernels, p, a, b, weights, block, unpacked[:, a:b].contiguous(), names, ups)
    else:
        _record_gradients(kernels, p, kept, spec.record_gradient(kept, given))
    return _collected(p)


def linear_token_stats_partial(kernels: ModuleType, *args: Any) -> Tensor:
    """The records ``[..., 14]`` of a part of the vocabulary."""
    p = _Problem(*args)
    return p.saved(_records(kernels, p))


def linear_token_stats_partial_backward(
    kernels: ModuleType, grad_record: Tensor, record: Tensor, *args: Any
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of both sides from that of the records; empty for those not needed."""
    *rest, needs = args
    p = _Problem(*rest)
    for k, head in enumerate(p.heads):
        head.prepare(needs[3 * k : 3 * k + 3], summed=False)
    _record_gradients(kernels, p, p.rows.gather(record, 1), p.rows.gather(grad_record, 1))
    return _collected(p)


def _record_gradients(kernels: ModuleType, p: _Problem, record: Tensor, grad_record: Tensor) -> None:
    if p.rows.count:
        _tile_gradients(kernels, p, record, grad_record)
        return
    for head in p.heads:
        if head.grad_weight is not None:
            head.grad_weight.zero_()


def _collected(p: _Problem) -> list[Tensor]:
    found = [g for head, shape in zip(p.heads, p.shapes, strict=True) for g in head.gradients(p.rows, shape)]
    return found + [p.policy.hidden.new_empty(0) for _ in range(6 - len(found))]


def linear_token_loss(
    kernels: ModuleType,
    coefficients: Sequence[Tensor],
    terms: Sequence[str],
    needs: Sequence[bool],
    *args: Any,
) -> list[Tensor]:
    """The loss, the gradients of hidden, weight and bias, and the outputs, from one product a block."""
    p = _Problem(*args)
    given = {name: p.rows.gather(c.to(p.wide)) for name, c in zip(terms, coefficients, strict=True)}
    p.policy.prepare(needs, summed=not p.one_block)
    found = {name: [p.nothing(name)] for name in p.outputs}
    loss = p.policy.hidden.new_zeros((), dtype=torch.float64)
    for a, b, weights, block in _whole_rows(p):
        saved, *made = kernels.token_stats(*block, p.vocab, p.beta, p.outputs, False)
        known = dict(zip(p.outputs, made, strict=True))
        for name, value in known.items():
            found[name].append(value)
        ups = [given[name][a:b].contiguous() for name in terms]
        live = block[1] != spec.IGNORED
        for name, up in zip(terms, ups, strict=True):
            loss += torch.where(live, up.double() * known[name].double(), 0).sum()
        if p.policy.wanted:
            _row_gradients(kernels, p, a, b, weights, block, saved, list(terms), ups)
    outputs = p.finish({k: torch.cat(v) for k, v in found.items()})
    return [loss.to(p.wide), *p.policy.gradients(p.rows, p.shapes[0]), *outputs]


def bound(kernels: ModuleType) -> list[Callable[..., Any]]:
    """The ops on a backend's logits kernels."""

    def bind(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: op(kernels, *args)

    return [
        bind(op)
        for op in (
            linear_token_stats, linear_token_stats_backward, linear_token_loss,
            linear_token_stats_partial, linear_token_stats_partial_backward,
        )
    ]  # fmt: skip
