"""What is timed: a case is an op with its data, and the computation as people write it without the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rewardops

Function = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """N tokens over a vocabulary of V; B rows of T tokens in groups of K; hidden states of D, and how many.

    Prefix trees have rows of their own, in groups of K and in large ones.
    """

    tokens: int
    vocab: int
    rows: int
    length: int
    group: int = 8
    hidden: int = 1024
    hidden_tokens: int = 1024
    tree_rows: int = 4096
    tree_length: int = 2048
    large_group: int = 128


FULL = Sizes(tokens=8192, vocab=151936, rows=1024, length=8192, hidden=4096, hidden_tokens=8192)
CPU = Sizes(tokens=512, vocab=151936, rows=1024, length=4096)
TINY = Sizes(tokens=4, vocab=300, rows=8, length=24, group=4, hidden=16, hidden_tokens=6,
             tree_rows=8, tree_length=12, large_group=8)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``ours(*inputs)``, ``plain(*inputs)`` and what other packages do return the same tensors.

    ``bytes_moved`` is what must cross memory at least: every input once, every output once.
    """

    name: str
    ours: Function
    plain: Function
    inputs: tuple[Tensor, ...]
    bytes_moved: int
    differentiable: int = 0  # the first so many inputs get a gradient; 0 for forward only
    peers: dict[str, Function] = field(default_factory=dict)
    floor: tuple[str, Callable[[], Any]] | None = None  # what nobody can leave out; timed, not compared
    compiled: bool = True  # whether `plain` is one that a compiler finishes with


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- the plain formulas ------------------------------------------------------------------------------------


def plain_token_stats(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def plain_token_stats_kl(logits: Tensor, tokens: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    logp, logq = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], (logp.exp() * (logp - logq)).sum(-1)


def plain_linear(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return plain_token_stats(hidden @ weight.T, tokens)


def plain_token_kl(logprob: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    d = ref - logprob
    return (d.exp() - d - 1) * mask


def plain_group_advantages(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).view(-1, 1) * mask


def loop_group_advantages(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """As trainers write it: scores gathered by label, a loop over samples."""
    labels = [b // group for b in range(rewards.shape[0])]
    members: dict[int, list[Tensor]] = {}
    scores = rewards.clone()
    for b, label in enumerate(labels):
        members.setdefault(label, []).append(scores[b])
    mean = {label: torch.stack(found).mean() for label, found in members.items()}
    std = {label: torch.stack(found).std() for label, found in members.items()}
    for b, label in enumerate(labels):
        scores[b] = (scores[b] - mean[label]) / (std[label] + 1e-6)
    return scores[:, None] * mask


def plain_gtpo(rewards: Tensor, entropy: Tensor, mask: Tensor, group: int) -> Tensor:
    shape = (-1, group, entropy.shape[1])
    right = (rewards > 0).view(-1, group, 1)
    h = entropy.clamp(min=1e-2).view(shape)
    live = mask.view(shape)
    weight = torch.where(right, h, 1 / h)
    out = []
    for chosen in (right, ~right):
        member = live & chosen
        total = (weight * member).sum(1, keepdim=True)
        out.append(member.sum(1, keepdim=True) * weight / total)
    shaped = torch.where(right, rewards.view(-1, group, 1) + 0.1 * out[0], -1 - 0.1 * out[1])
    return torch.where(live, shaped, 0).view(entropy.shape)


def plain_high_entropy_mask(entropy: Tensor, mask: Tensor) -> Tensor:
    flat = entropy.masked_fill(~mask, -torch.inf).flatten()
    count = int(0.2 * int(mask.sum()) + 0.5)
    out = torch.zeros_like(flat, dtype=torch.bool)
    out[flat.topk(count, sorted=False).indices] = True
    return out.view(mask.shape)


def plain_min_returns(rewards: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
    x = torch.where(steps & mask, rewards, torch.inf)
    low = x.flip(1).cummin(1).values.flip(1)
    return torch.where(mask & low.isfinite(), low, 0)


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without a loop: maps composed over distances 1, 2, 4, ...; rows without holes."""
    v = torch.where(mask, values, 0)
    x = torch.where(mask, rewards + 0.99 * torch.nn.functional.pad(v[:, 1:], (0, 1)) - v, 0)
    a = torch.full_like(x, 0.99 * 0.95)
    step = 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :-step] + a[:, :-step] * x[:, step:], x[:, -step:]], 1)
        a = torch.cat([a[:, :-step] * a[:, step:], a[:, -step:]], 1)
        step *= 2
    return torch.where(mask, x, 0), torch.where(mask, x + v, 0)


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A step of tensor operations for each position, as trainers have it."""
    live = mask.to(rewards.dtype)
    ahead = carry = torch.zeros_like(rewards[:, 0])
    found = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + 0.99 * ahead - values[:, t]
        ahead = live[:, t] * values[:, t] + (1 - live[:, t]) * ahead
        carry = live[:, t] * (delta + 0.99 * 0.95 * carry) + (1 - live[:, t]) * carry
        found.append(carry)
    advantages = torch.stack(found[::-1], 1)
    return advantages * live, (advantages + values) * live


def plain_softmin_rewards(rewards: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
    ends = steps & mask
    weight = torch.where(ends, -rewards / 0.1, -torch.inf).softmax(1)
    return torch.where(ends, weight * rewards, 0)


def plain_prefix_values(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A member of every group at a time: all pairs at once would be [groups, K, K, T]."""
    x, m = tokens.view(-1, group, tokens.shape[1]), mask.view(-1, group, mask.shape[1])
    r = rewards.view(-1, group)
    total = torch.zeros(x.shape, device=x.device)
    count = torch.zeros_like(total)
    for j in range(group):
        same = ((x == x[:, j : j + 1]) & m & m[:, j : j + 1]).cumprod(2, dtype=torch.int8)
        total += same * r[:, j, None, None]
        count += same
    value = total / count.clamp(min=1)
    root = r.mean(1)[:, None, None].expand(-1, group, 1)
    before = torch.cat([root, value[..., :-1]], 2)
    return (before * m).view(tokens.shape), (value * m).view(tokens.shape)


def trie_prefix_values(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A trie of dictionaries per group, as it is written in trainers."""
    before, after = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    rows = [x[m].tolist() for x, m in zip(tokens.cpu(), mask.cpu(), strict=True)]
    outcome = rewards.tolist()
    for start in range(0, len(rows), group):
        children: list[dict[int, int]] = [{}]
        total, count, paths = [0.0], [0], []
        for b in range(start, start + group):
            path, node = [0], 0
            for token in rows[b]:
                following = children[node].get(token)
                if following is None:
                    following = children[node][token] = len(children)
                    children.append({})
                    total.append(0.0)
                    count.append(0)
                node = following
                path.append(node)
            for node in path:
                total[node] += outcome[b]
                count[node] += 1
            paths.append(path)
        for b, path in enumerate(paths, start):
            values = torch.tensor([total[n] / count[n] for n in path])
            before[b, : len(path) - 1], after[b, : len(path) - 1] = values[:-1], values[1:]
    return before.to(tokens.device), after.to(tokens.device)


def plain_tempo(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    before, after = plain_prefix_values(tokens, rewards, mask, group)
    grouped = rewards.view(-1, group)
    centred = (grouped - grouped.mean(1, keepdim=True)).view(-1, 1)
    scale = (grouped.std(1, keepdim=True) + 1e-6).expand(-1, group).reshape(-1, 1)
    return (centred + after - before) / scale * mask


# ---- other packages' ----------------------------------------------------------------------------------------


def trl_token_stats() -> dict[str, Function]:
    """TRL's, where it is installed: its fused kernel on a GPU, its two functions on a CPU."""
    try:
        from trl.trainer.utils import selective_log_softmax_and_entropy
    except ImportError:
        return {}
    return {"trl": selective_log_softmax_and_entropy}


def trl_linear() -> dict[str, Function]:
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return {}

    def chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, 8192, None, 1.0, ("entropy",))
        return found[0], found[1]

    return {"trl": chunked}


def multiply(rows: int, length: int, device: torch.device) -> Callable[[], Tensor]:
    """Two float32 tensors of the size multiplied into a third."""
    x, y = (torch.ones(rows, length, device=device) for _ in range(2))
    return lambda: torch.mul(x, y)


def products(count: int, hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The first so many of a head's bare products: the logits, the gradients of hidden and weight, the logits."""
    logits, grad_hidden, grad_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)
        if count > 3:
            torch.mm(hidden, weight.T, out=logits)

    return call


def shared_prefixes(
    rows: int, length: int, group: int, shared: int, vocab: int, g: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and outcomes of ragged rows that branch off an earlier one of their group.

    The depth of a branch is exponential with mean ``shared``: most rows part early, as samples do.
    """
    tokens = torch.randint(0, vocab, (rows, length), generator=g, device=device)
    place = torch.arange(rows, device=device) % group
    own = (torch.rand(rows, generator=g, device=device) * place).long()  # an earlier row of the group
    depth = -shared * torch.rand(rows, generator=g, device=device).clamp(min=1e-9).log()
    column = torch.arange(length, device=device)
    for k in range(1, group):
        later = (place == k).nonzero()[:, 0]
        there = tokens[later - place[later] + own[later]]
        tokens[later] = torch.where(column < depth[later, None], there, tokens[later])
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=g, device=device)
    rewards = torch.randint(0, 2, (rows,), generator=g, device=device).float()
    return tokens, column < lengths[:, None], rewards


# ---- the cases ---------------------------------------------------------------------------------------------

NAMES = (
    "token_stats",
    "token_stats_backward",
    "token_stats_kl",
    "linear_token_stats",
    "linear_token_stats_backward",
    "linear_token_loss",
    "token_kl",
    "token_kl_backward",
    "group_advantages",
    "gtpo_rewards",
    "high_entropy_mask",
    "min_returns",
    "min_returns_long",
    "softmin_rewards",
    "gae",
    "gae_long",
    "prefix_values",
    "prefix_values_large",
    "tempo_advantages",
    "tempo_advantages_large",
)


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those of the logits a case is timed with."""
    logits = name.startswith(("token_stats", "linear"))
    return (torch.float32, torch.bfloat16) if logits else (torch.float32,)


def make(name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case with its data; ``dtype`` is that of the logits."""
    g = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=device)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g, device=device)

    if name.startswith("token_stats"):
        logits = torch.randn(sizes.tokens, sizes.vocab, generator=g, device=device, dtype=dtype) * 3
        tokens = ids(sizes.vocab, sizes.tokens)
        rest = size_of(tokens) + 8 * sizes.tokens
        if name == "token_stats_kl":
            ref = logits + torch.randn(logits.shape, generator=g, device=device, dtype=dtype) * 0.3

            def with_kl(logits: Tensor, tokens: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
                stats = rewardops.token_stats(logits, tokens, ref_logits=ref, outputs=("logprob", "kl"))
                return tuple(x for x in stats if x is not None)

            return Case(
                name, with_kl, plain_token_stats_kl, (logits, tokens, ref), size_of(logits, ref) + rest
            )
        backward = name.endswith("backward")
        moved = size_of(logits) * (3 if backward else 1) + rest

        def ours(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            stats = rewardops.token_stats(logits, tokens, outputs=("logprob", "entropy"))
            return tuple(x for x in stats if x is not None)

        return Case(name, ours, plain_token_stats, (logits, tokens), moved, int(backward), trl_token_stats())

    if name.startswith("linear"):
        n, d, v = sizes.hidden_tokens, sizes.hidden, sizes.vocab
        hidden = torch.randn(n, d, generator=g, device=device, dtype=dtype)
        weight = torch.randn(v, d, generator=g, device=device, dtype=dtype) * (2 / d**0.5)
        tokens = ids(v, n)
        inputs = (hidden, weight, tokens)
        backward = name != "linear_token_stats"
        moved = size_of(hidden, weight) * (2 if backward else 1) + size_of(tokens) + 8 * n

        def stats(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            found = rewardops.linear_token_stats(hidden, weight, tokens)
            return tuple(x for x in found if x is not None)

        def loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            one = torch.ones(tokens.shape, device=tokens.device)
            return rewardops.linear_token_loss(hidden, weight, tokens, {"logprob": one, "entropy": one})[0]

        if name == "linear_token_loss":
            peers = {
                p: lambda h, w, t, fn=fn: torch.stack(fn(h, w, t)).sum() for p, fn in trl_linear().items()
            }
            floor = ("3 products", products(3, hidden, weight))
            return Case(
                name, loss, lambda *x: torch.stack(plain_linear(*x)).sum(), inputs, moved, 2, peers, floor
            )
        count = 4 if backward else 1
        floor = (f"{count} product{'s' * backward}", products(count, hidden, weight))
        return Case(name, stats, plain_linear, inputs, moved, 2 * backward, trl_linear(), floor)

    b, t, k = sizes.rows, sizes.length, sizes.group
    if name.endswith("_long"):  # a few long rows
        b, t = 4, 32 * t
    lengths = ids(t, b, 1) + 1
    mask = torch.arange(t, device=device) < lengths
    rewards = (rand(b) > 0.5).float()
    if name.startswith("token_kl"):
        logprob, ref = -rand(b, t) * 3, -rand(b, t) * 3
        backward = name.endswith("backward")
        moved = size_of(logprob, ref, mask) + size_of(logprob)
        # Backward: both inputs, the mask and the upstream gradient; one gradient, as the reference has none.
        moved += size_of(logprob) * 4 + size_of(mask) if backward else 0
        return Case(
            name,
            lambda a, r, m: rewardops.token_kl(a, r, mask=m),
            plain_token_kl,
            (logprob, ref, mask),
            moved,
            1 if backward else 0,
        )
    if name == "group_advantages":
        return Case(
            name,
            lambda r, m: rewardops.group_advantages(r, group_size=k, mask=m),
            lambda r, m: plain_group_advantages(r, m, k),
            (rewards, mask),
            size_of(mask) * 5,
            peers={"loop over samples": lambda r, m: loop_group_advantages(r, m, k)},
            floor=("torch.mul [B, T]", multiply(b, t, device)),
        )
    if name == "gtpo_rewards":
        entropy = rand(b, t) * 2
        return Case(
            name,
            lambda r, h, m: rewardops.gtpo_rewards(r, h, group_size=k, mask=m),
            lambda r, h, m: plain_gtpo(r, h, m, k),
            (rewards, entropy, mask),
            size_of(entropy) * 2 + size_of(mask),
        )
    if name == "high_entropy_mask":
        entropy = rand(b, t) * 2
        return Case(
            name,
            lambda h, m: rewardops.high_entropy_mask(h, m),
            plain_high_entropy_mask,
            (entropy, mask),
            size_of(entropy) + size_of(mask) * 2,
        )
    if name.startswith("gae"):
        token_rewards, values = rand(b, t) - 0.5, rand(b, t)
        return Case(
            name,
            lambda r, v, m: rewardops.gae(r, v, gamma=0.99, lam=0.95, mask=m),
            plain_gae,
            (token_rewards, values, mask),
            size_of(token_rewards) * 4 + size_of(mask),
            peers={"loop over time": loop_gae},
            floor=("copy of the inputs", lambda: (token_rewards.clone(), values.clone())),
        )
    if name.startswith(("min_returns", "softmin_rewards")):
        step_rewards, steps = rand(b, t), rand(b, t) > 0.9
        op = getattr(rewardops, name.removesuffix("_long"))
        plain = plain_softmin_rewards if name == "softmin_rewards" else plain_min_returns
        return Case(
            name,
            lambda r, m, s: op(r, mask=m, steps=s),
            plain,
            (step_rewards, mask, steps),
            size_of(step_rewards) * 2 + size_of(mask, steps),
            floor=("copy of the rewards", lambda: step_rewards.clone()),
        )
    large, on_host = name.endswith("_large"), device.type == "cpu"
    b, t, k = sizes.tree_rows, sizes.tree_length, sizes.large_group if large else k
    tokens, mask, rewards = shared_prefixes(b, t, k, t // 10, sizes.vocab, g, device)
    moved = size_of(tokens, mask)
    if name.startswith("prefix_values"):
        return Case(
            name,
            lambda x, r, m: rewardops.prefix_values(x, r, group_size=k, mask=m)[:2],
            lambda x, r, m: plain_prefix_values(x, r, m, k),
            (tokens, rewards, mask),
            moved + 12 * b * t,
            peers={"dictionary trie": lambda x, r, m: trie_prefix_values(x, r, m, k)} if on_host else {},
            compiled=not large,
        )
    assert name.startswith("tempo_advantages"), name
    return Case(
        name,
        lambda x, r, m: rewardops.tempo_advantages(x, r, group_size=k, mask=m),
        lambda x, r, m: plain_tempo(x, r, m, k),
        (tokens, rewards, mask),
        moved + 4 * b * t,
        compiled=not large,
    )
