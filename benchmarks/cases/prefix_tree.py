"""Values, advantages and weights of tokens on the prefix tree of their group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import rewardops

from ..case import Case, Function
from ..data import Data
from ..registry import register

AXES = ("tree_rows", "tree_length", "group", "shared", "layout")


# ---- the formulas, over members of groups --------------------------------------------------------------------


def members(tokens: Tensor, mask: Tensor, group: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each member index j, and a mask ``[groups, K, T]`` of the prefix that rows share with member j.

    All pairs at once would need ``[groups, K, K, T]``.
    """
    x, m = tokens.view(-1, group, tokens.shape[1]), mask.view(-1, group, mask.shape[1])
    for j in range(group):
        yield j, ((x == x[:, j : j + 1]) & m & m[:, j : j + 1]).cumprod(2, dtype=torch.int8)


def plain_values(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values before and after each token, and the number of rows that share it: ``[groups, K, T]``."""
    r = rewards.view(-1, group)
    shape = (r.shape[0], group, tokens.shape[1])
    total, count = r.new_zeros(shape), r.new_zeros(shape)
    for j, same in members(tokens, mask, group):
        total += same * r[:, j, None, None]
        count += same
    after = total / count.clamp(min=1)
    root = r.mean(1)[:, None, None].expand(-1, group, 1)
    return torch.cat([root, after[..., :-1]], 2), after, count


def plain_prefix_values(
    tokens: Tensor, rewards: Tensor, mask: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    before, after, count = plain_values(tokens, rewards, mask, group)
    before, after, count = (x.view(tokens.shape) * mask for x in (before, after, count))
    return before, after, count.int()


def trie_prefix_values(
    tokens: Tensor, rewards: Tensor, mask: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A trie of dictionaries per group, as in trainers."""
    before, after, shared = (torch.zeros(tokens.shape, dtype=torch.float32) for _ in range(3))
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
            values = torch.tensor([total[n] / count[n] for n in path], dtype=torch.float32)
            before[b, : len(path) - 1], after[b, : len(path) - 1] = values[:-1], values[1:]
            shared[b, : len(path) - 1] = torch.tensor([count[n] for n in path[1:]], dtype=torch.float32)
    return before.to(tokens.device), after.to(tokens.device), shared.int().to(tokens.device)


def plain_prefix_std(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    _, value, count = plain_values(tokens, rewards, mask, group)
    squares = torch.zeros_like(value)
    for j, same in members(tokens, mask, group):
        squares += same * (rewards.view(-1, group)[:, j, None, None] - value).square()
    return (squares / (count - 1).clamp(min=1)).sqrt().view(tokens.shape) * mask


def plain_tempo(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    before, after, _ = plain_values(tokens, rewards, mask, group)
    r = rewards.view(-1, group, 1)
    centred, scale = r - r.mean(1, keepdim=True), r.std(1, keepdim=True) + 1e-6
    return ((centred + after - before) / scale).view(tokens.shape) * mask


def _at_start(x: Tensor, count: Tensor) -> Tensor:
    """Broadcast the value at the first token of each node to the tokens of the node."""
    fresh = torch.nn.functional.pad(count[..., 1:] != count[..., :-1], (1, 0), value=True)
    place = torch.where(fresh, torch.arange(count.shape[-1], device=count.device), 0)
    return x.gather(2, place.cummax(2).values)


def plain_tree_rl(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    before, after, count = plain_values(tokens, rewards, mask, group)
    parent, root = _at_start(before, count), before[..., :1]
    return ((2 * after - root - parent) / count.clamp(min=1).sqrt()).view(tokens.shape) * mask


def plain_siblings(tokens: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Sibling advantages; the children of a branch are the distinct next tokens of its rows."""
    _, value, count = plain_values(tokens, rewards, mask, group)
    once = torch.where(count > 0, 1 / count.clamp(min=1), 0)  # a row's share of its child
    number, total = torch.zeros_like(value), torch.zeros_like(value)
    for j, same in members(tokens, mask, group):
        parent = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)
        number += parent * once[:, j : j + 1]
        total += parent * (once * value)[:, j : j + 1]
    mean, squares = total / number.clamp(min=1), torch.zeros_like(value)
    for j, same in members(tokens, mask, group):
        parent = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)
        squares += parent * (once * (value[:, j : j + 1] - mean).square())[:, j : j + 1]
    std = (squares / (number - 1).clamp(min=1)).sqrt()
    # If all values are equal, the quotient of two rounding errors is meaningless.
    relative = torch.where(std > 1e-6, (value - mean) / (std + 1e-6), 0)
    return _at_start(relative, count).view(tokens.shape) * mask


def plain_lcp(tokens: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(tokens), device=tokens.device, dtype=torch.int32).view(-1, 1, group)
    shared = [same.sum(2, dtype=torch.int32).view(-1) for _, same in members(tokens, mask, group)]
    return rows.expand(-1, group, -1).reshape(-1, group), torch.stack(shared, 1)


# ---- the cases -----------------------------------------------------------------------------------------------


def _case(
    d: Data,
    op: Callable[..., Function],
    plain: Function,
    out: int,
    *,
    gradients: int = 0,
    peers: bool = False,
) -> Case:
    """A case of an op on tokens and outcomes, with ``out`` result bytes per token."""
    tokens, rewards = d.shared_prefixes()
    if d.backward:
        rewards = d.per_row()  # continuous: with equal rewards in a group the std has no gradient
    mask, where, by, k = d.mask, d.where, d.by, d.sizes.group
    versions = {}
    if peers and d.device.type == "cpu" and not d.backward:
        versions["dictionary trie"] = lambda r, x: trie_prefix_values(x, r, mask, k)
    return d.case(
        lambda r, x: op(x, r, **by, **where),
        lambda r, x: plain(x, r, mask, k),
        (rewards, d.pack(tokens)), out * d.numel, gradients=gradients, again=(), peers=versions,
        compiled=k <= 16,  # the compiler unrolls a loop over members
    )  # fmt: skip


@register("backward", "large", axes=AXES)
def prefix_values(d: Data) -> Case:
    if d.backward:
        return _case(
            d, lambda *x, **k: rewardops.prefix_values(*x, **k)[:2],
            lambda *x: plain_prefix_values(*x)[:2], 8, gradients=1,
        )  # fmt: skip
    return _case(d, rewardops.prefix_values, plain_prefix_values, 12, peers=True)


@register(axes=AXES)
def prefix_std(d: Data) -> Case:
    return _case(d, rewardops.prefix_std, plain_prefix_std, 4)


@register(axes=AXES)
def tvm_targets(d: Data) -> Case:
    return _case(
        d, rewardops.tvm_targets, lambda x, r, m, k: plain_values(x, r, m, k)[1].view(x.shape) * m, 4
    )


@register("backward", "large", axes=AXES)
def tempo_advantages(d: Data) -> Case:
    return _case(d, rewardops.tempo_advantages, plain_tempo, 4, gradients=1)


@register(axes=AXES)
def tree_rl_advantages(d: Data) -> Case:
    return _case(d, rewardops.tree_rl_advantages, plain_tree_rl, 4)


@register(axes=AXES)
def sibling_advantages(d: Data) -> Case:
    return _case(d, rewardops.sibling_advantages, plain_siblings, 4)


@register(axes=AXES)
def shared_prefix_weights(d: Data) -> Case:
    def plain(x: Tensor, r: Tensor, m: Tensor, k: int) -> Tensor:
        count = r.new_zeros(len(x) // k, k, x.shape[1])
        for _, same in members(x, m, k):
            count += same
        return (1 / count.clamp(min=1)).view(x.shape) * m

    return _case(d, lambda x, r, **known: rewardops.shared_prefix_weights(x, **known), plain, 4)


@register("large", axes=AXES)
def prefix_lcp(d: Data) -> Case:
    tokens, _ = d.shared_prefixes()
    mask, where, by, k = d.mask, d.where, d.by, d.sizes.group
    return d.case(
        lambda x: rewardops.prefix_lcp(x, **by, **where),
        lambda x: plain_lcp(x, mask, k),
        (d.pack(tokens),), 8 * d.rows * k, compiled=k <= 16,
    )  # fmt: skip
