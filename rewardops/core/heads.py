"""Heads of language models, block by block: products, sizes of blocks, and sums of gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..reference import logits as spec
from ..reference.linear import LinearArgs
from ..reference.logits import TokenStatsArgs
from .native import fresh

# A block's logits should fill a GPU's multiprocessors and a CPU's caches.
_TOKENS = 4096
_LEAST_TOKENS = 512  # per block of whole rows: products of fewer are slow
_SUM = 2**22  # elements per product, where the sum has another precision


# ---- sizes -------------------------------------------------------------------------------------------------


def workspace_bytes(tokens: int, vocab: int, device: torch.device) -> int:
    """Size of the workspace: 256 MiB or 1 % of all logits in float32, the larger; on a CPU 32 MiB."""
    return 2**25 if device.type == "cpu" else max(2**28, tokens * vocab * 4 // 100)


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, max(size, 1)):
        yield start, min(start + size, count)


# ---- products ----------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@functools.cache
def multiplies_bfloat16() -> bool:
    """True if the CPU has products of bfloat16. Without them, those of float32 are many times faster, and exact."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _slow(dtype: torch.dtype, device: torch.device) -> bool:
    """True if products in this precision are slower than in float32."""
    if device.type != "cpu":
        return False
    return dtype is torch.float16 or (dtype is torch.bfloat16 and not multiplies_bfloat16())


def _multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out = a @ b + bias``; on CUDA, half-precision inputs give an unrounded float32 product.

    In one precision, product and bias are rounded once, together. A wider ``out`` takes the bias unrounded.
    """
    if bias is not None:
        if a.dtype == out.dtype:
            return torch.addmm(bias.to(out.dtype), a, b, out=out)
        return _multiply(a, b, out).add_(bias)
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor, alone: bool = False) -> None:
    """``total += a @ b``, the sum in the precision of ``total``; ``alone``: no other product is added to it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # Part by part, so that a half-precision product is added while it is still in the caches.
        for first, end in blocks(total.shape[0], _SUM // max(total.shape[1], 1)):
            rounded = torch.mm(a[first:end], b)
            total[first:end].add_(rounded)
            if not alone:
                # And what its rounding lost, which is nothing of an infinity: many rounded products are further off
                # than one over all blocks.
                lost = torch.addmm(rounded, a[first:end], b, beta=-1)
                total[first:end].add_(lost.nan_to_num_(0.0, 0.0, 0.0))


def _large(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a CPU in huge pages."""
    return fresh(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


class Head:
    """One model's hidden states and head: logits of a block, and the sums of their gradients."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: ValidTokens, vocab: int
    ) -> None:
        self.weight, self.bias = weight, bias
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = torch.float32 if _slow(dtype, hidden.device) else dtype
        half = self.dtype in (torch.float16, torch.bfloat16)
        # A bias in a wider precision than the products is not rounded to theirs.
        wider = bias is not None and torch.promote_types(bias.dtype, self.dtype) != self.dtype
        unrounded = half and (wider or hidden.device.type == "cuda")
        self.logits_dtype = torch.float32 if unrounded else self.dtype
        self.hidden_dtype = hidden.dtype
        self.hidden = rows.gather(hidden, trailing=1).to(self.dtype)
        if rows.beyond is not None:
            # The gradient of their logits is 0, but 0 times a NaN or infinite hidden state is NaN.
            self.hidden.masked_fill_(rows.beyond[:, None], 0)
        self.vocab = vocab
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Workspace bytes per logit, including its gradient where that is another tensor."""
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
        bias = None if self.bias is None else self.bias[first : first + columns]
        return _multiply(self.hidden[a:b], part.t(), out, bias)

    def gradient(self, a: int, b: int, columns: int) -> Tensor:
        """Memory for the gradient of a block: that of the logits, unless the product takes another precision."""
        return self.grad_block[: (b - a) * columns].view(b - a, columns)

    # ---- gradients

    def prepare(self, needs: Sequence[bool], summed: bool) -> None:
        """Allocate the gradients; ``summed``: the weight's gradient is a sum over blocks of tokens."""
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
        """The sum of the gradient of a part of the weight; None where one product writes it in place."""
        if self.grad_weight is None or (products == 1 and self.grad_weight.dtype == self.dtype):
            return None
        out = self.grad_weight[first:end]
        wide = _wide(self.dtype)
        return out.zero_() if out.dtype == wide else torch.zeros_like(out, dtype=wide)

    def add(self, g: Tensor, a: int, b: int, part: Tensor, first: int, total: Tensor | None) -> None:
        """Add the gradients due to ``g``, that of the logits of tokens ``a:b`` in columns from ``first``."""
        end = first + part.shape[0]
        if self.grad_hidden is not None:
            _add_product(self.grad_hidden[a:b], g, part, alone=part.shape[0] == self.vocab)
        if total is not None:
            _add_product(total, g.t(), self.hidden[a:b])
        elif self.grad_weight is not None:
            _multiply(g.t(), self.hidden[a:b], self.grad_weight[first:end])
        if self.grad_bias is not None:
            self.grad_bias[first:end] += g.sum(0, dtype=self.grad_bias.dtype)

    def gradients(self, rows: ValidTokens, shape: torch.Size) -> list[Tensor]:
        """Gradients of hidden, weight and bias; empty where not needed."""
        grads = [self.hidden.new_empty(0) for _ in range(3)]
        if self.grad_hidden is not None:
            grads[0] = rows.scatter(self.grad_hidden.to(self.hidden_dtype)).view(shape)
        if self.grad_weight is not None:
            grads[1] = self.grad_weight.to(self.weight.dtype)
        if self.grad_bias is not None and self.bias is not None:
            grads[2] = self.grad_bias.to(self.bias.dtype)
        return grads


# ---- tokens ------------------------------------------------------------------------------------------------


class ValidTokens:
    """The valid tokens: their indices, and the gather and scatter of per-token tensors."""

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
        # Indices to gather from: entries beyond the valid tokens read an arbitrary token.
        self.places = self.index
        self.beyond: Tensor | None = None
        if self.hinted and self.index is not None:
            self.places = self.index.clamp(max=max(self.total - 1, 0))
            self.beyond = self.index == self.total
        self.tokens = self.gather(tokens)
        if self.beyond is not None:
            self.tokens = self.tokens.masked_fill(self.beyond, spec.IGNORED)

    def gather(self, x: Tensor, trailing: int = 0) -> Tensor:
        """Values of the valid tokens, ``[count, ...]``; ``x`` has ``trailing`` dimensions after the tokens'."""
        flat = x.reshape(self.total, *x.shape[x.dim() - trailing :])
        return flat if self.places is None else flat.index_select(0, self.places)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gather`, 0 for masked tokens; the leading dimension is ``tokens`` flattened."""
        if self.index is None:
            return x
        out = x.new_zeros((self.total + self.hinted, *x.shape[1:]))
        return out.index_copy_(0, self.index, x)[: self.total]


# ---- models ------------------------------------------------------------------------------------------------


class Models:
    """The heads of the policy and, if any, the reference: logits of the valid tokens, in blocks."""

    def __init__(self, args: LinearArgs) -> None:
        self.args = args
        self.rows = ValidTokens(args.tokens, args.mask, args.num_tokens)
        self.policy = Head(args.hidden, args.weight, args.bias, self.rows, args.vocab)
        self.heads = [self.policy]
        self.shapes = [args.hidden.shape]
        if args.ref_hidden is not None and args.ref_weight is not None:
            self.heads.append(Head(args.ref_hidden, args.ref_weight, args.ref_bias, self.rows, args.vocab))
            self.shapes.append(args.ref_hidden.shape)
        self.temperatures = None if args.temperatures is None else self.rows.gather(args.temperatures)
        self.vocab, self.outputs = args.vocab, list(args.outputs)
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
        """True if whole rows fit into one block, whose product writes the weight's gradient in place."""
        same = all(h.weight.dtype == h.dtype for h in self.heads)
        return same and 0 < self.rows.count <= self._tokens(whole=True)

    def _tokens(self, whole: bool) -> int:
        if self.args.chunk_tokens or not whole:
            return self.args.chunk_tokens or _TOKENS
        return max(self._space() // self.vocab, _LEAST_TOKENS)

    def _space(self) -> int:
        """The number of logits that the workspace holds."""
        each = sum(h.bytes for h in self.heads)
        return workspace_bytes(max(self.rows.count, 1), self.vocab, self.policy.hidden.device) // each

    def sizes(self, whole: bool) -> tuple[int, int]:
        """Tokens and columns of a block; allocates the workspace for them."""
        count, tokens = max(self.rows.count, 1), self._tokens(whole)
        columns = self.args.chunk_vocab or max(self._space() // min(tokens, count) // 128 * 128, 128)
        if whole:
            columns = self.vocab
        tokens, columns = min(tokens, count), min(columns, self.vocab)
        for head in self.heads:
            head.workspace(tokens, columns)
        return tokens, columns

    def block_args(self, a: int, b: int, parts: list[Tensor], first: int, columns: int) -> TokenStatsArgs:
        """Arguments of the logits kernels for tokens ``a:b`` and ``columns`` columns from ``first``."""
        logits = [head.logits(a, b, part, first) for head, part in zip(self.heads, parts, strict=True)]
        temperatures = None if self.temperatures is None else self.temperatures[a:b]
        return TokenStatsArgs(
            logits[0], self.rows.tokens[a:b], logits[1] if self.paired else None, None, temperatures,
            self.args.temperature, self.args.softcap, self.args.first + first, columns, self.args.beta,
            self.outputs,
        )  # fmt: skip

    def parts(self, first: int, end: int) -> list[Tensor]:
        return [head.part(first, end) for head in self.heads]

    def saved(self, records: Tensor) -> Tensor:
        """Records of the valid tokens, scattered to the shape of the tokens."""
        return self.rows.scatter(records).view(*self.rows.shape, records.shape[-1])

    def nothing(self, name: str) -> Tensor:
        """An output for zero tokens."""
        return self.policy.hidden.new_empty(0, dtype=torch.bool if name == "is_top1" else self.wide)

    def finish(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Outputs scattered to the shape of the tokens."""
        out = []
        for name in self.outputs:
            value = values[name] if name == "is_top1" else values[name].to(self.wide)
            out.append(self.rows.scatter(value).view(self.rows.shape))
        return out
