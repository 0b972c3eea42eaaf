"""Prefix trees, the specification (see :mod:`rewardops.prefix_tree`).

A tree is two integer arrays whose size does not depend on the tokens. ``rows`` is ``[5, B]``: ``order`` (the
row at each position: groups by label, the rows of a group in lexicographic order, its empty rows last),
``leaf`` (a row's deepest node, -1 for an empty row), ``first`` and ``length`` of the row's tokens, and
``shared`` (the number of tokens that the row at a position shares with the row before it, -1 at the first of
a group). ``nodes`` is ``[4, 2 B]``: ``begin`` and ``end`` (the positions of the rows that share the node),
``depth`` (of its last state, -1 where there is no node) and ``parent``. Node p < B is the prefix at which the
rows at positions p - 1 and p diverge, stored at the first such position; node B + p is the part of the row at
p that no other row shares. The states of a node are the depths above its parent's up to its own; for a tree's
top, from 0.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.groups import same_group
from ..core.kinds import Flags, IdRows, Offsets
from ..core.rows import from_rows, move, move_back, places_without_holes, to_rows

RowValues = Annotated[Tensor, "float64", "B", "C"]
NodeValues = Annotated[Tensor, "float64", "2B", "C"]
TreeRows = Annotated[Tensor, "int64", "5", "B"]
TreeNodes = Annotated[Tensor, "int64", "4", "2B"]


class PrefixTreeArgs(NamedTuple):
    """Arguments of ``prefix_tree``."""

    tokens: Annotated[Tensor, "integer", "..."]
    """``[B, T]``, or ``[N]`` packed; integer ids."""
    groups: IdRows
    """``[B]`` int64 labels; rows of other groups never match."""
    mask: Flags | None
    """bool, the shape of ``tokens``; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]`` int32 or int64, offsets of packed rows; None: padded rows."""
    skip: bool
    """True: masked tokens between valid ones are left out. False: they are part of the prefixes."""


class SubtreeArgs(NamedTuple):
    """Arguments of ``subtree_sums`` and its backward pass: a sum over the rows of every node."""

    x: RowValues
    """``[B, C]`` float64."""
    weights: Annotated[Tensor, "float64", "B"] | None
    """``[B]`` float64, weights of the rows; None for 1."""
    centre: NodeValues | None
    """``[2 B, C]`` float64, constant: squared distances from it are summed instead of ``x``."""
    rows: TreeRows
    """``[5, B]`` int64, from ``prefix_tree``."""
    nodes: TreeNodes
    """``[4, 2 B]`` int64, from ``prefix_tree``."""
    gamma: float
    """Discount per token from a row's end to the node; 1 with a centre."""


class _Spans(NamedTuple):
    tokens: Tensor  # [B, T], every row's first valid token in column 0
    valid: Tensor  # [B, T], in the caller's columns
    first: Tensor  # [B]
    length: (
        Tensor  # [B]: tokens from the first valid one to the last, masked ones included; 0 for an empty row
    )


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
    """``[B, B]``: the number of equal leading tokens of two rows; -1 for two groups, or if one row is empty."""
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
    """``[B, B]`` bool: True at ``[i, j]`` if row j comes before row i."""
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
    """Node and depth of the longest prefix that the rows at ``[begin, end)`` share with a neighbour; -1 if none."""
    position = torch.arange(len(shared), device=shared.device)
    padded = torch.cat([shared, shared.new_full((1,), -1)])
    depth = torch.maximum(padded[begin], padded[end])
    below = (shared < depth[:, None]) & (position <= begin[:, None])
    start = torch.where(below, position, -1).amax(1)
    at_depth = (shared == depth[:, None]) & (position > start[:, None])
    node = torch.where(at_depth, position, 2 * len(shared)).amin(1)
    return torch.where(depth >= 0, node, -1), depth


def prefix_tree(a: PrefixTreeArgs) -> tuple[Tensor, Tensor]:
    tokens, groups, mask = a.tokens, a.groups, a.mask
    if a.skip and mask is not None:
        places = places_without_holes(mask, a.cu_seqlens)
        tokens, mask = move(tokens, mask, places), move(mask, mask, places)
    spans = _spans(tokens, mask, a.cu_seqlens)
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
    diverges = (shared >= 0) & ~(between & (shared == shared[:, None])).any(1)
    begin = begin.clamp(min=0)
    node, _ = _enclosing(shared, begin, end)
    alone_node, alone_up = _enclosing(shared, position, position + 1)
    length = spans.length[order]
    is_alone = length > alone_up.clamp(min=0)

    nodes = torch.stack(
        [
            torch.cat([torch.where(diverges, begin, 0), torch.where(is_alone, position, 0)]),
            torch.cat([torch.where(diverges, end, 0), torch.where(is_alone, position + 1, 0)]),
            torch.cat([torch.where(diverges, shared, -1), torch.where(is_alone, length, -1)]),
            torch.cat([torch.where(diverges, node, -1), torch.where(is_alone, alone_node, -1)]),
        ]
    )
    leaf = torch.where(is_alone, batch + position, alone_node)
    leaf = torch.where(length > 0, leaf, -1)[place]
    # An empty row has no first column: 0 on every backend.
    rows = torch.stack([order, leaf, torch.where(spans.length > 0, spans.first, 0), spans.length, shared])
    return rows, nodes


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Members of each row's group in row order, and the common prefix with each; ``[B, most]`` both."""
    order, _, _, length, shared = rows
    batch, device = len(order), rows.device
    if batch == 0:
        return (torch.zeros(0, most, dtype=torch.int32, device=device),) * 2
    position = torch.arange(batch, device=device)
    # Two rows share the minimum over the neighbours between them: [position, distance ahead].
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
    """Rows sorted by label, ascending within a label; and per row the begin and end of its group in that order."""
    labels, rows = groups.sort(stable=True)
    begin, end = (torch.searchsorted(labels, groups, right=side) for side in (False, True))
    return rows, begin, end


def members_of(groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``[B, most]``: the rows of each row's group, ascending, padded with -1; ``[B]``: the row's index there."""
    rows, begin, end = by_group(groups)
    index = begin[:, None] + torch.arange(most, device=groups.device)
    members = torch.where(index < end[:, None], rows[index.clamp(max=max(len(rows) - 1, 0))], -1)
    rank = torch.empty_like(rows)
    rank[rows] = torch.arange(len(rows), device=groups.device)
    return members, rank - begin


# ---- sums over subtrees ------------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """Terms of the sums by node and position, ``[2 B, B, C]``."""

    inside: Tensor  # True if the row at the position is the node's
    weight: Tensor
    value: Tensor  # multiplied by the weight
    slope: Tensor  # derivative of the value in x


def _terms(a: SubtreeArgs) -> _Terms:
    order, _, _, length, _ = a.rows
    begin, end, depth, _ = a.nodes
    position = torch.arange(a.rows.shape[1], device=a.rows.device)
    inside = ((position >= begin[:, None]) & (position < end[:, None]))[:, :, None]
    weights = torch.ones_like(length, dtype=a.x.dtype) if a.weights is None else a.weights
    weight, x = weights[order][None, :, None], a.x[order]
    if a.centre is None:
        left = (length[order] - depth[:, None]).clamp(min=0)
        slope = (a.gamma ** left.to(x.dtype))[:, :, None].expand(-1, -1, x.shape[1])
        return _Terms(inside, weight, slope * x, slope)
    off = x - a.centre[:, None]
    return _Terms(inside, weight, off * off, 2 * off)


def subtree_sums(a: SubtreeArgs) -> Tensor:
    t = _terms(a)
    return torch.where(t.inside, t.weight * t.value, 0).sum(1)


def subtree_sums_backward(grad: Tensor, a: SubtreeArgs) -> tuple[Tensor, Tensor]:
    t, order = _terms(a), a.rows[0]
    on_x, on_weights = torch.zeros_like(a.x), a.x.new_zeros(0 if a.weights is None else len(a.x))
    on_x[order] = torch.where(t.inside, grad[:, None] * t.weight * t.slope, 0).sum(0)
    if a.weights is not None:
        on_weights[order] = torch.where(t.inside, grad[:, None] * t.value, 0).sum((0, 2))
    return on_x, on_weights


# ---- nodes and tokens --------------------------------------------------------------------------------------

AT = ("after", "before", "step")


class NodeTokensArgs(NamedTuple):
    """Arguments of ``nodes_to_tokens`` and its backward pass.

    A token's result in channel c is ``row_bias + values + row_factor * scaled_values``: bias and factor of its row,
    values at the node of its state. It is 0 where masked.
    """

    values: NodeValues | None
    """``[2 B, C]`` float64, discounted from the node's depth to the state; None for 0."""
    scaled_values: NodeValues | None
    """``[2 B, C]`` float64, discounted as ``values`` are; None for 0."""
    row_bias: RowValues | None
    """``[B, C]`` float64; None for 0."""
    row_factor: RowValues | None
    """``[B, C]`` float64, discounted from the row's end to the node's depth; None without ``scaled_values``."""
    rows: TreeRows
    """``[5, B]`` int64, from ``prefix_tree``; ``leaf`` is the node at which a row's path ends."""
    nodes: TreeNodes
    """``[4, 2 B]`` int64, from ``prefix_tree``."""
    mask: Flags | None
    """bool, the shape of the tokens; None: every token counts."""
    cu_seqlens: Offsets | None
    """``[B + 1]`` int32 or int64, offsets of packed rows; None: padded rows."""
    skip: bool
    """True: the tree leaves out masked tokens between valid ones."""
    size: int
    """Tokens: T of padded rows, N of packed ones."""
    at: str
    """One of ``AT``: the state after the token, the one before it, or the difference of the two."""
    gamma: float
    """Discount per token, from 0 to 1."""

    @property
    def channels(self) -> int:
        values = self.scaled_values if self.values is None else self.values
        assert values is not None
        return values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tokens."""
        return (self.rows.shape[1], self.size) if self.cu_seqlens is None else (self.size,)

    def without_holes(self) -> NodeTokensArgs:
        """These arguments for rows whose valid tokens were moved to their front."""
        return self._replace(mask=None, skip=False)

    def zero_gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Zeros like values, scaled values, row bias and row factor; empty for a None."""
        return tuple(grad.new_zeros(0 if t is None else t.shape, dtype=torch.float64) for t in self[:4])


def _states(rows: Tensor, nodes: Tensor, width: int, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per state ``[B, width + 1]``: its node, and the discounts from the node's depth and from the row's end."""
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
    """Places of the caller's tokens, ``[B, T]``."""

    column: Tensor  # index of the token in its row; 0 where not valid
    valid: Tensor


def _places(a: NodeTokensArgs) -> _Places:
    like = torch.zeros(a.shape, dtype=torch.bool, device=a.rows.device)
    inside = to_rows(like, None, a.cu_seqlens)[1]
    valid = inside if a.mask is None else to_rows(a.mask, a.mask, a.cu_seqlens)[1]
    column = torch.arange(valid.shape[1], device=a.rows.device) - a.rows[2][:, None]
    valid = valid & (column >= 0) & (column < a.rows[3][:, None])
    return _Places(torch.where(valid, column, 0), valid)


def nodes_to_tokens(a: NodeTokensArgs, dtype: torch.dtype) -> Tensor:
    if a.skip and a.mask is not None:
        front = nodes_to_tokens(a.without_holes(), dtype)
        return move_back(front, a.mask, places_without_holes(a.mask, a.cu_seqlens))
    values, scaled_values, row_bias, row_factor = a[:4]
    places = _places(a)
    width = places.valid.shape[1]
    out = []
    for c in range(a.channels):
        if a.rows.shape[1] == 0:
            out.append(torch.zeros(a.shape, dtype=dtype, device=a.rows.device))
            continue
        node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
        value = torch.zeros_like(to_depth) if values is None else values[:, c][node] * to_depth
        if scaled_values is not None and row_factor is not None:
            value = value + row_factor[:, c, None] * scaled_values[:, c][node] * to_end
        before, after = value[:, :-1], value[:, 1:]
        x = {"before": before, "after": after, "step": after - before}[a.at].gather(1, places.column)
        x = x if row_bias is None else row_bias[:, c, None] + x
        out.append(from_rows(torch.where(places.valid, x, 0).to(dtype), a.shape, a.cu_seqlens))
    return torch.stack(out) if out else torch.zeros((0, *a.shape), dtype=dtype, device=a.rows.device)


def nodes_to_tokens_backward(grad: Tensor, a: NodeTokensArgs) -> tuple[Tensor, ...]:
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, a.without_holes())
    values, scaled_values, row_bias, row_factor = a[:4]
    places = _places(a)
    batch, width = places.valid.shape
    on_values, on_scaled, on_bias, on_factor = a.zero_gradients(grad)
    for c in range(a.channels if batch else 0):
        node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
        up = to_rows(grad[c], None, a.cu_seqlens)[0].to(torch.float64)
        up = torch.where(places.valid, up, 0)
        if row_bias is not None:
            on_bias[:, c] = up.sum(1)
        states = up.new_zeros(batch, width + 1)
        if a.at != "before":
            states.scatter_add_(1, places.column + 1, up)
        if a.at != "after":
            states.scatter_add_(1, places.column, up if a.at == "before" else -up)
        if values is not None:
            on_values[:, c].index_put_((node.flatten(),), (states * to_depth).flatten(), accumulate=True)
        if scaled_values is not None and row_factor is not None:
            states = states * to_end
            on_factor[:, c] = (states * scaled_values[:, c][node]).sum(1)
            sent = states * row_factor[:, c, None]
            on_scaled[:, c].index_put_((node.flatten(),), sent.flatten(), accumulate=True)
    return on_values, on_scaled, on_bias, on_factor
