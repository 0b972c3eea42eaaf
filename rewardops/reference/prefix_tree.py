"""Prefix trees, the specification (see :mod:`rewardops.prefix_tree`).

A tree is two integer arrays of fixed size, whatever the tokens. ``rows`` is ``[5, B]``: ``order`` (the row at
each position: groups by label, the rows of one in lexicographic order, its empty rows last), ``leaf`` (a row's
deepest node, -1 for an empty row), ``first`` and ``length`` of the row's tokens, and ``shared`` (the tokens that
the row at a position shares with the one before it, -1 at the first of a group). ``nodes`` is ``[4, 2 B]``:
``begin`` and ``end`` (the positions of the rows that share it), ``depth`` (of its last state, -1 where there is
no node) and ``parent``. Node p < B is the prefix at which the rows at the positions p - 1 and p part, kept at
the first such place; node B + p is what the row at p shares with no other. Its states reach from behind its
parent's depth to its own, those of a tree's top from 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.groups import same_group
from ..core.rows import from_rows, move, move_back, places_without_holes, to_rows


class _Spans(NamedTuple):
    tokens: Tensor  # [B, T], every row's first valid token in column 0
    valid: Tensor  # [B, T], in the caller's columns
    first: Tensor  # [B]
    length: Tensor  # [B]: up to and including the last valid token, holes included; 0 for an empty row


def _spans(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Spans:
    x, inside = to_rows(tokens, None, cu_seqlens)
    valid = inside if mask is None else to_rows(mask, mask, cu_seqlens)[1]
    width = x.shape[1]
    column = torch.arange(width, device=x.device)
    if width == 0:
        nothing = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return _Spans(x, valid, nothing, nothing)
    first = torch.where(valid, column, width).amin(1)
    length = (torch.where(valid, column + 1, 0).amax(1) - first).clamp(min=0)
    index = (first[:, None] + column).clamp(max=width - 1)
    return _Spans(x.gather(1, index), valid, first, length)


def longest_common_prefixes(spans: _Spans, groups: Tensor) -> Tensor:
    """``[B, B]``: equal leading tokens of two rows; -1 where they share no group or one is empty."""
    batch, width = spans.tokens.shape
    same = same_group(groups, spans.length > 0)
    column = torch.arange(width, device=spans.tokens.device)
    lcp = torch.zeros(batch, batch, dtype=torch.int64, device=spans.tokens.device)
    for i in range(batch):
        shorter = torch.minimum(spans.length, spans.length[i])
        equal = (spans.tokens == spans.tokens[i]) & (column < shorter[:, None])
        lcp[i] = equal.to(torch.int64).cumprod(1).sum(1)
    return torch.where(same, lcp, -1)


def _precedes(spans: _Spans, groups: Tensor, lcp: Tensor) -> Tensor:
    """``[i, j]``: whether row j comes before row i."""
    row = torch.arange(len(groups), device=groups.device)
    at = lcp.clamp(min=0)
    width = spans.tokens.shape[1]
    token = spans.tokens.gather(1, at.clamp(max=width - 1)) if width else at
    goes_on = at < spans.length[:, None]
    earlier = row < row[:, None]
    both = torch.where(goes_on, token > token.T, earlier)
    by_token = torch.where(goes_on == goes_on.T, both, goes_on)
    empty = spans.length == 0
    same = groups == groups[:, None]
    by_end = torch.where(empty == empty[:, None], earlier, empty[:, None])
    return torch.where(same, torch.where(lcp >= 0, by_token, by_end), groups < groups[:, None])


def _enclosing(shared: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Node and depth of what the rows at ``[begin, end)`` share with a neighbour; -1 where nothing."""
    position = torch.arange(len(shared), device=shared.device)
    padded = torch.cat([shared, shared.new_full((1,), -1)])
    depth = torch.maximum(padded[begin], padded[end])
    below = (shared < depth[:, None]) & (position <= begin[:, None])
    start = torch.where(below, position, -1).amax(1)
    found = (shared == depth[:, None]) & (position > start[:, None])
    node = torch.where(found, position, 2 * len(shared)).amin(1)
    return torch.where(depth >= 0, node, -1), depth


def prefix_tree(
    tokens: Tensor, groups: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, skip: bool
) -> tuple[Tensor, Tensor]:
    if skip and mask is not None:
        places = places_without_holes(mask, cu_seqlens)
        tokens, mask = move(tokens, mask, places), move(mask, mask, places)
    spans = _spans(tokens, mask, cu_seqlens)
    batch = len(groups)
    if batch == 0:
        return groups.new_zeros(5, 0), groups.new_zeros(4, 0)
    lcp = longest_common_prefixes(spans, groups)
    precedes = _precedes(spans, groups, lcp)
    place = precedes.sum(1)
    position = torch.arange(batch, device=groups.device)
    order = torch.empty_like(place)
    order[place] = position
    shared = torch.where(precedes, lcp, -1).amax(1)[order]

    lower = shared < shared[:, None]
    begin = torch.where(lower & (position < position[:, None]), position, -1).amax(1)
    end = torch.where(lower & (position > position[:, None]), position, batch).amin(1)
    between = (position > begin[:, None]) & (position < position[:, None])
    parts = (shared >= 0) & ~(between & (shared == shared[:, None])).any(1)
    begin = begin.clamp(min=0)
    node, _ = _enclosing(shared, begin, end)
    alone_node, alone_up = _enclosing(shared, position, position + 1)
    length = spans.length[order]
    own = length > alone_up.clamp(min=0)

    nodes = torch.stack(
        [
            torch.cat([torch.where(parts, begin, 0), torch.where(own, position, 0)]),
            torch.cat([torch.where(parts, end, 0), torch.where(own, position + 1, 0)]),
            torch.cat([torch.where(parts, shared, -1), torch.where(own, length, -1)]),
            torch.cat([torch.where(parts, node, -1), torch.where(own, alone_node, -1)]),
        ]
    )
    leaf = torch.where(own, batch + position, alone_node)
    leaf = torch.where(length > 0, leaf, -1)[place]
    # An empty row's first column means nothing; every backend says 0.
    rows = torch.stack([order, leaf, torch.where(spans.length > 0, spans.first, 0), spans.length, shared])
    return rows, nodes


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Members of each row's group in row order, and what it shares with them: ``[B, most]`` both."""
    order, _, _, length, shared = rows
    batch, device = len(order), rows.device
    if batch == 0:
        return (torch.zeros(0, most, dtype=torch.int32, device=device),) * 2
    position = torch.arange(batch, device=device)
    # Two rows share the least of what the neighbours between them do: [position, how far ahead].
    ahead = torch.cat([shared, shared.new_full((batch,), -1)])[position[:, None] + position]
    ahead[:, 0] = torch.iinfo(torch.int64).max
    ahead = ahead.cummin(1).values
    ahead[:, 0] = torch.where(length > 0, length, -1)[order]
    members, _ = members_of(groups, most)
    place = torch.empty_like(order)
    place[order] = position
    here, there = place[:, None], place[members.clamp(min=0)]
    lcp = ahead[torch.minimum(here, there), (here - there).abs()]
    return members.to(torch.int32), torch.where(members >= 0, lcp, -1).to(torch.int32)


def by_group(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by label, those of one ascending; and per row where its group begins and ends there."""
    labels, rows = groups.sort(stable=True)
    begin, end = (torch.searchsorted(labels, groups, right=side) for side in (False, True))
    return rows, begin, end


def members_of(groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``[B, most]``: the rows of each row's group, ascending, -1 behind them; ``[B]``: its place among them."""
    rows, begin, end = by_group(groups)
    index = begin[:, None] + torch.arange(most, device=groups.device)
    members = torch.where(index < end[:, None], rows[index.clamp(max=max(len(rows) - 1, 0))], -1)
    rank = torch.empty_like(rows)
    rank[rows] = torch.arange(len(rows), device=groups.device)
    return members, rank - begin


# ---- sums over subtrees ------------------------------------------------------------------------------------


def _terms(
    x: Tensor, weights: Tensor | None, centre: Tensor | None, rows: Tensor, nodes: Tensor, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[2 B, B, C]`` by node and position: membership, weight, its factor, and its derivative by x."""
    order, _, _, length, _ = rows
    begin, end, depth, _ = nodes
    position = torch.arange(rows.shape[1], device=rows.device)
    inside = ((position >= begin[:, None]) & (position < end[:, None]))[:, :, None]
    weight = (torch.ones_like(length, dtype=x.dtype) if weights is None else weights)[order][None, :, None]
    value = x[order]
    if centre is None:
        left = (length[order] - depth[:, None]).clamp(min=0)
        slope = (gamma ** left.to(x.dtype))[:, :, None].expand(-1, -1, x.shape[1])
        return inside, weight, slope * value, slope
    off = value - centre[:, None]
    return inside, weight, off * off, 2 * off


def subtree_sums(
    x: Tensor, weights: Tensor | None, centre: Tensor | None, rows: Tensor, nodes: Tensor, gamma: float
) -> Tensor:
    inside, weight, term, _ = _terms(x, weights, centre, rows, nodes, gamma)
    return torch.where(inside, weight * term, 0).sum(1)


def subtree_sums_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    centre: Tensor | None,
    rows: Tensor,
    nodes: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    inside, weight, term, slope = _terms(x, weights, centre, rows, nodes, gamma)
    by_x, by_weight = torch.zeros_like(x), x.new_zeros(0 if weights is None else len(x))
    by_x[rows[0]] = torch.where(inside, grad[:, None] * weight * slope, 0).sum(0)
    if weights is not None:
        by_weight[rows[0]] = torch.where(inside, grad[:, None] * term, 0).sum((0, 2))
    return by_x, by_weight


# ---- nodes and tokens --------------------------------------------------------------------------------------


AT = ("after", "before", "step")


class OnTokens(NamedTuple):
    """The arguments that writing nodes to tokens and its gradient share, in the order of their schemas."""

    values: Tensor | None
    along: Tensor | None
    base: Tensor | None
    factor: Tensor | None
    rows: Tensor
    nodes: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    skip: bool
    size: int
    at: str
    gamma: float

    @property
    def channels(self) -> int:
        given = self.along if self.values is None else self.values
        assert given is not None
        return given.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens."""
        return (self.rows.shape[1], self.size) if self.cu_seqlens is None else (self.size,)

    def at_front(self) -> OnTokens:
        """The same over rows whose valid tokens were moved to their front."""
        return self._replace(mask=None, skip=False)

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Zeros for those of values, along, base and factor; empty where one was not given."""
        return tuple(grad.new_zeros(0 if t is None else t.shape, dtype=torch.float64) for t in self[:4])


def _states(rows: Tensor, nodes: Tensor, width: int, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """The node of each state ``[B, width + 1]``; the discounts from its depth and from the row's end."""
    _, _, depth, parent = nodes
    state = torch.arange(width + 1, device=rows.device)
    node = rows[1].clamp(min=0)
    at = node[:, None].repeat(1, width + 1)
    while True:
        up = parent[node]
        if not bool((up >= 0).any()):
            break
        node = torch.where(up >= 0, up, node)
        at = torch.where(state <= depth[node][:, None], node[:, None], at)
    to_depth = (depth[at] - state).clamp(min=0).to(torch.float64)
    to_end = to_depth + (rows[3][:, None] - depth[at]).clamp(min=0)
    return at, gamma**to_depth, gamma**to_end


class _Places(NamedTuple):
    """Where the states of the rows lie among their tokens."""

    column: Tensor  # [B, T], of the caller's: which token of its row it is, clamped
    valid: Tensor


def _places(a: OnTokens) -> _Places:
    like = torch.zeros(a.shape, dtype=torch.bool, device=a.rows.device)
    inside = to_rows(like, None, a.cu_seqlens)[1]
    valid = inside if a.mask is None else to_rows(a.mask, a.mask, a.cu_seqlens)[1]
    column = torch.arange(valid.shape[1], device=a.rows.device) - a.rows[2][:, None]
    valid = valid & (column >= 0) & (column < a.rows[3][:, None])
    return _Places(torch.where(valid, column, 0), valid)


def nodes_to_tokens(*arguments: Any) -> Tensor:
    a, dtype = OnTokens(*arguments[:-1]), arguments[-1]
    if a.skip and a.mask is not None:
        front = nodes_to_tokens(*a.at_front(), dtype)
        return move_back(front, a.mask, places_without_holes(a.mask, a.cu_seqlens))
    values, along, base, factor = a[:4]
    places = _places(a)
    width = places.valid.shape[1]
    out = []
    for c in range(a.channels):
        if a.rows.shape[1] == 0:
            out.append(torch.zeros(a.shape, dtype=dtype, device=a.rows.device))
            continue
        node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
        value = torch.zeros_like(to_depth) if values is None else values[:, c][node] * to_depth
        if along is not None and factor is not None:
            value = value + factor[:, c, None] * along[:, c][node] * to_end
        before, after = value[:, :-1], value[:, 1:]
        x = {"before": before, "after": after, "step": after - before}[a.at].gather(1, places.column)
        x = x if base is None else base[:, c, None] + x
        out.append(from_rows(torch.where(places.valid, x, 0).to(dtype), a.shape, a.cu_seqlens))
    return torch.stack(out) if out else torch.zeros((0, *a.shape), dtype=dtype, device=a.rows.device)


def nodes_to_tokens_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    a = OnTokens(*arguments)
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, *a.at_front())
    values, along, base, factor = a[:4]
    places = _places(a)
    batch, width = places.valid.shape
    by_value, by_along, by_base, by_factor = a.gradients(grad)
    for c in range(a.channels if batch else 0):
        node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
        up = to_rows(grad[c], None, a.cu_seqlens)[0].to(torch.float64)
        up = torch.where(places.valid, up, 0)
        if base is not None:
            by_base[:, c] = up.sum(1)
        states = up.new_zeros(batch, width + 1)
        if a.at != "before":
            states.scatter_add_(1, places.column + 1, up)
        if a.at != "after":
            states.scatter_add_(1, places.column, up if a.at == "before" else -up)
        if values is not None:
            by_value[:, c].index_put_((node.flatten(),), (states * to_depth).flatten(), accumulate=True)
        if along is not None and factor is not None:
            states = states * to_end
            by_factor[:, c] = (states * along[:, c][node]).sum(1)
            sent = states * factor[:, c, None]
            by_along[:, c].index_put_((node.flatten(),), sent.flatten(), accumulate=True)
    return by_value, by_along, by_base, by_factor
