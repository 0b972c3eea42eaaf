"""The policy: a small causal transformer that caches keys and values while it samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import task


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, start : start + length] = k
            cache[1, :, :, start : start + length] = v
            k, v = cache[:, :, :, : start + length]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Policy(nn.Module):
    """A transformer from token ids ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, width: int, layers: int, heads: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.tokens = nn.Embedding(len(task.SYMBOLS), width)
        self.places = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(task.SYMBOLS))
        self.shape = (layers, heads, width // heads)

    def forward(self, ids: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        place = torch.arange(start, start + ids.shape[1], dtype=torch.int64, device=ids.device)
        x = self.tokens(ids) + self.places(place)
        for k, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[k], start)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, new_tokens: int, temperature: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue ``[B, P]`` to ``[B, P + new_tokens]``, with padding after the end token; temperature 0 is greedy."""
        batch, length = prompts.shape
        layers, heads, size = self.shape
        cache = prompts.new_zeros((layers, 2, batch, heads, length + new_tokens, size), dtype=torch.float32)
        ids = torch.full((batch, length + new_tokens), task.PAD, dtype=torch.int64, device=prompts.device)
        ids[:, :length] = prompts
        logits = self(prompts, cache)[:, -1]
        running = torch.ones(batch, dtype=torch.bool, device=prompts.device)
        for t in range(length, length + new_tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = (logits / temperature).softmax(-1)
                token = torch.multinomial(p, 1, generator=generator)[:, 0]
            ids[:, t] = torch.where(running, token, task.PAD)
            running &= token != task.END
            if t + 1 == length + new_tokens or not running.any():
                break
            logits = self(ids[:, t : t + 1], cache, t)[:, -1]
        return ids
