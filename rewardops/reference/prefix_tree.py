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

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.groups import numbered
from ..core.kinds import Flags, IdRows, Offsets
from ..core.precision import wide, widest
from ..core.rows import from_rows, move, move_back, places_without_holes, to_rows

RowValues = Annotated[Tensor, "either", "B", "C"]
NodeValues = Annotated[Tensor, "float64", "2B", "C"]
TreeRows = Annotated[Tensor, "int64", "5", "B"]
TreeNodes = Annotated[Tensor, "int64", "4", "2B"]


STATISTICS = ("sum", "mean", "std")


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
    """Arguments of ``subtree_statistics`` and its backward pass: a statistic of the rows of every node."""

    x: RowValues
    """``[B, C]`` float32 or float64."""
    weights: Annotated[Tensor, "either", "B"] | None
    """``[B]`` float32 or float64, weights of the rows; None for 1."""
    rows: TreeRows
    """``[5, B]`` int64, from ``prefix_tree``."""
    nodes: TreeNodes
    """``[4, 2 B]`` int64, from ``prefix_tree``."""
    gamma: float
    """Discount of ``x`` per token from a row's end to the node; 1 for the std."""
    statistic: str
    """One of ``STATISTICS``."""
    ddof: int
    """For the std: a node of at most so many rows has 0."""


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


def _rank(spans: _Spans) -> Tensor:
    """``[B]``: the place of each row's tokens among the rows in lexicographic order; the same for equal rows.

    Tokens become ranks, and neighbouring columns of ranks one column of the ranks of the pairs, until one is left.
    A row's end is rank 0, so that it comes before any token.
    """
    batch, width = spans.tokens.shape
    inside = torch.arange(width, device=spans.tokens.device) < spans.length[:, None]
    ranks = numbered(spans.tokens.to(torch.int64).flatten()).view(batch, width)
    ranks = torch.where(inside, ranks + 1, 0)
    while width > 1:
        if width % 2:
            ranks = torch.cat([ranks, torch.zeros_like(ranks[:, :1])], 1)
        pairs = ranks[:, ::2] * (ranks.numel() + 1) + ranks[:, 1::2]
        ranks = numbered(pairs.flatten()).view(pairs.shape)
        width = pairs.shape[1]
    return ranks.sum(1)


def _lexicographic_order(spans: _Spans, groups: Tensor) -> Tensor:
    """``[B]``: the rows by label, by tokens (empty ones last), and by their index."""
    order = _rank(spans).argsort(stable=True)
    for key in (spans.length == 0, groups):
        order = order[key.to(torch.int64)[order].argsort(stable=True)]
    return order


def _shared_with_previous(spans: _Spans, groups: Tensor, order: Tensor) -> Tensor:
    """``[B]``: tokens shared by the rows at a position and before it; -1 at a group's first and an empty row."""
    tokens, length, label = spans.tokens[order], spans.length[order], groups[order]
    column = torch.arange(tokens.shape[1], device=tokens.device)
    shorter = torch.minimum(length[1:], length[:-1])
    equal = (tokens[1:] == tokens[:-1]) & (column < shorter[:, None])
    both = (label[1:] == label[:-1]) & (shorter > 0)
    shared = torch.where(both, equal.to(torch.int64).cumprod(1).sum(1), -1)
    return torch.cat([shared.new_full((1,), -1), shared])


class _Minima(NamedTuple):
    """The least of any range of ``[B]`` numbers, from the minima of ranges whose lengths are powers of two."""

    of_powers: Tensor
    """``[log2 B + 1, B]``: in row k and column p the minimum of ``[p, p + 2 ** k)``, cut off at B."""

    @staticmethod
    def of(x: Tensor) -> _Minima:
        rows, size = [x], 1
        while 2 * size <= len(x):
            x = torch.cat([torch.minimum(x[:-size], x[size:]), x[-size:]])
            rows.append(x)
            size *= 2
        return _Minima(torch.stack(rows))

    def between(self, begin: Tensor, end: Tensor) -> Tensor:
        """The minima of ``[begin, end)``, none of them empty: of two ranges that together cover it."""
        powers = 2 ** torch.arange(len(self.of_powers), device=begin.device)
        k = torch.searchsorted(powers, end - begin, right=True) - 1
        return torch.minimum(self.of_powers[k, begin], self.of_powers[k, end - powers[k]])


def _next_lower(x: Tensor) -> Tensor:
    """``[B]``: the next position that has a lower number; B where there is none."""
    size = len(x)
    end = torch.arange(1, size + 1, device=x.device)
    of_powers = _Minima.of(x).of_powers
    for k in reversed(range(len(of_powers))):
        none = of_powers[k][end.clamp(max=size - 1)] >= x
        end = torch.where(none, (end + 2**k).clamp(max=size), end)
    return end


def _enclosing(shared: Tensor, node: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Node and depth of the longest prefix that the rows at ``[begin, end)`` share with a neighbour; -1 if none."""
    before, after = shared[begin], torch.cat([shared, shared.new_full((1,), -1)])[end]
    depth = torch.maximum(before, after)
    return torch.where(depth >= 0, node[torch.where(before >= after, begin, end)], -1), depth


def prefix_tree(a: PrefixTreeArgs) -> tuple[Tensor, Tensor]:
    tokens, groups, mask = a.tokens, a.groups, a.mask
    if a.skip and mask is not None:
        places = places_without_holes(mask, a.cu_seqlens)
        tokens, mask = move(tokens, mask, places), move(mask, mask, places)
    spans = _spans(tokens, mask, a.cu_seqlens)
    batch = len(groups)
    if batch == 0:
        return groups.new_zeros(5, 0), groups.new_zeros(4, 0)
    order = _lexicographic_order(spans, groups)
    shared = _shared_with_previous(spans, groups, order)
    length = spans.length[order]
    position = torch.arange(batch, device=groups.device)

    # The rows around a position that share its prefix of `shared` tokens, and where the first of them diverges.
    end = _next_lower(shared)
    begin = (batch - 1 - _next_lower(shared.flip(0)).flip(0)).clamp(min=0)
    inner = torch.where(shared >= 0, begin + 1, position)
    node = _Minima.of(shared * batch + position).between(inner, end) % batch
    diverges = (shared >= 0) & (node == position)

    above, _ = _enclosing(shared, node, begin, end)
    alone_above, alone_up = _enclosing(shared, node, position, position + 1)
    is_alone = length > alone_up.clamp(min=0)

    nodes = torch.stack(
        [
            torch.cat([torch.where(diverges, begin, 0), torch.where(is_alone, position, 0)]),
            torch.cat([torch.where(diverges, end, 0), torch.where(is_alone, position + 1, 0)]),
            torch.cat([torch.where(diverges, shared, -1), torch.where(is_alone, length, -1)]),
            torch.cat([torch.where(diverges, above, -1), torch.where(is_alone, alone_above, -1)]),
        ]
    )
    leaf = torch.where(is_alone, batch + position, alone_above)
    leaf = torch.empty_like(leaf).index_copy_(0, order, torch.where(length > 0, leaf, -1))
    # An empty row has no first column: 0 on every backend.
    rows = torch.stack([order, leaf, torch.where(spans.length > 0, spans.first, 0), spans.length, shared])
    return rows, nodes


def prefix_lcp(rows: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Members of each row's group in row order, and the common prefix with each; ``[B, most]`` both."""
    order, _, _, length, shared = rows
    if len(order) == 0:
        return (torch.zeros(0, most, dtype=torch.int32, device=rows.device),) * 2
    members, _ = members_of(groups, most)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=rows.device))
    here, there = place[:, None], place[members.clamp(min=0)]
    # Two rows share the minimum over the neighbours between them; a row shares all of its tokens with itself.
    first, last = torch.minimum(here, there), torch.maximum(here, there)
    lcp = _Minima.of(shared).between(torch.minimum(first + 1, last), last + 1)
    lcp = torch.where(here == there, torch.where(length > 0, length, -1)[:, None], lcp)
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


# ---- statistics of subtrees --------------------------------------------------------------------------------


def _paths(rows: Tensor, nodes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in order, and a node of each: first the leaves, then the parents of these, as long as any have one."""
    order, leaf = rows[:2]
    row, node = order, leaf[order]
    while True:
        there = node >= 0
        row, node = row[there], node[there]
        if len(row) == 0:
            return
        yield row, node
        node = nodes[3][node]


class SubtreeStatistics(NamedTuple):
    """Statistics of every node's rows, float64."""

    out: Tensor
    """``[2 B, C]``: the statistic; means and stds are 0 where the weights sum to 0."""
    total: Tensor
    """``[2 B, 1]``: the total weight of the rows."""
    centre: Tensor
    """``[2 B, C]``: the mean."""


class _Rows(NamedTuple):
    """Terms by row and node, ``[K, C]``."""

    row: Tensor
    node: Tensor
    weight: Tensor
    x: Tensor
    discount: Tensor


def _along_paths(a: SubtreeArgs) -> Iterator[_Rows]:
    for row, node in _paths(a.rows, a.nodes):
        x = wide(a.x[row])
        weight = x.new_ones(len(x), 1) if a.weights is None else wide(a.weights[row, None])
        left = a.rows[3][row] - a.nodes[2][node]
        yield _Rows(row, node, weight, x, (a.gamma ** left.to(x.dtype))[:, None])


def _corrected(a: SubtreeArgs) -> Tensor:
    """``[2 B, 1]``: n / (n - ddof) for the n rows of a node; 0 for at most ddof."""
    count = wide(a.nodes[1] - a.nodes[0])[:, None]
    return torch.where(count > a.ddof, count / (count - a.ddof).clamp(min=1), 0)


def subtree_statistics(a: SubtreeArgs) -> SubtreeStatistics:
    sums = a.x.new_zeros(a.nodes.shape[1], a.x.shape[1], dtype=widest(a.x.device))
    total = sums.new_zeros(len(sums), 1)
    for t in _along_paths(a):
        sums.index_put_((t.node,), t.weight * t.discount * t.x, accumulate=True)
        total.index_put_((t.node,), t.weight, accumulate=True)
    divisor = torch.where(total > 0, total, 1)
    centre, squares = sums / divisor, torch.zeros_like(sums)
    if a.statistic != "std":
        return SubtreeStatistics(sums if a.statistic == "sum" else centre.clone(), total, centre)
    for t in _along_paths(a):
        squares.index_put_((t.node,), t.weight * (t.x - centre[t.node]) ** 2, accumulate=True)
    variance = squares / divisor * _corrected(a)
    positive = variance > 0
    return SubtreeStatistics(
        torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0), total, centre
    )


def subtree_statistics_backward(
    grad: Tensor, out: Tensor, total: Tensor, centre: Tensor, a: SubtreeArgs
) -> tuple[Tensor, Tensor]:
    on_x = torch.zeros_like(a.x, dtype=grad.dtype)
    on_weights = grad.new_zeros(0 if a.weights is None else len(a.x))
    # The derivative is `per` times that of a weighted sum of terms, less `mean` times that of the weights' sum.
    per = grad if a.statistic == "sum" else grad / torch.where(total > 0, total, 1)
    mean = torch.zeros_like(out) if a.statistic == "sum" else torch.where(total > 0, out, 0)
    if a.statistic == "std":
        factor, some = _corrected(a), out > 0
        per = torch.where(some, per * factor / torch.where(some, 2 * out, 1), 0)
        mean = torch.where(some, mean * out / torch.where(factor > 0, factor, 1), 0)
    for t in _along_paths(a):
        term, slope = t.discount * t.x, t.discount
        if a.statistic == "std":
            # The mean is a constant here: the derivative in it is 0.
            off = t.x - centre[t.node]
            term, slope = off * off, 2 * off
        on_x[t.row] += per[t.node] * t.weight * slope
        if a.weights is not None:
            on_weights[t.row] += (per[t.node] * (term - mean[t.node])).sum(1)
    return on_x.to(a.x.dtype), on_weights if a.weights is None else on_weights.to(a.weights.dtype)


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
    """``[B, C]`` float32 or float64; None for 0."""
    row_factor: RowValues | None
    """``[B, C]`` float32 or float64, discounted from the row's end to the node; None without ``scaled_values``."""
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
        return tuple(grad.new_zeros(0) if t is None else torch.zeros_like(t) for t in self[:4])


def _states(rows: Tensor, nodes: Tensor, width: int, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per state ``[B, width + 1]``: its node, and the discounts from the node's depth and from the row's end."""
    depth = nodes[2]
    state = torch.arange(width + 1, device=rows.device)
    # A state's node is the first node of the row's path that is as deep; after the last, the leaf.
    at = rows[1].clamp(min=0)[:, None].repeat(1, width + 1)
    ends = torch.full_like(at, width)
    for row, node in _paths(rows, nodes):
        at[row, depth[node]] = node
        ends[row, depth[node]] = depth[node]
    at = at.gather(1, ends.flip(1).cummin(1).values.flip(1))
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
    values, scaled_values, row_bias, row_factor = (None if t is None else wide(t) for t in a[:4])
    places = _places(a)
    batch, width = places.valid.shape
    if batch == 0 or a.channels == 0:
        return torch.zeros((a.channels, *a.shape), dtype=dtype, device=a.rows.device)
    node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
    out = []
    for c in range(a.channels):
        value = torch.zeros_like(to_depth) if values is None else values[:, c][node] * to_depth
        if scaled_values is not None and row_factor is not None:
            value = value + row_factor[:, c, None] * scaled_values[:, c][node] * to_end
        before, after = value[:, :-1], value[:, 1:]
        x = {"before": before, "after": after, "step": after - before}[a.at].gather(1, places.column)
        x = x if row_bias is None else row_bias[:, c, None] + x
        out.append(from_rows(torch.where(places.valid, x, 0).to(dtype), a.shape, a.cu_seqlens))
    return torch.stack(out)


def nodes_to_tokens_backward(grad: Tensor, a: NodeTokensArgs) -> tuple[Tensor, ...]:
    if a.skip and a.mask is not None:
        moved = move(grad, a.mask, places_without_holes(a.mask, a.cu_seqlens))
        return nodes_to_tokens_backward(moved, a.without_holes())
    values, scaled_values, row_bias, row_factor = (None if t is None else wide(t) for t in a[:4])
    places = _places(a)
    batch, width = places.valid.shape
    on_values, on_scaled, on_bias, on_factor = gradients = a.zero_gradients(grad)
    if batch == 0:
        return gradients
    node, to_depth, to_end = _states(a.rows, a.nodes, width, a.gamma)
    for c in range(a.channels):
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
