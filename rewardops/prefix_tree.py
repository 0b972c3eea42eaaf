"""Prefix trees: what the responses of a group share, found in the tokens alone.

The responses of a group are a tree of prefixes. Its arrays are of fixed size, whatever the tokens (see
``rewardops/reference/prefix_tree.py``), so that nothing is read back to build it; what is said of its nodes is
spread over the tokens in one write. A token's *state* is a prefix: the one without the token is before it, the
one with it after it. :mod:`rewardops.prefix_values` has the values and advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tree
from .core import checks
from .core.dispatch import define
from .core.groups import GroupSize, Labels, group_ids
from .core.rows import Layout
from .core.settings import may_read
from .reference.prefix_tree import OnTokens

HOLES = ("prefix", "skip")


# ---- ops ---------------------------------------------------------------------------------------------------

_prefix_tree = define(
    "prefix_tree",
    "prefix_tree(Tensor tokens, Tensor groups, Tensor? mask, Tensor? cu_seqlens, bool skip)"
    " -> (Tensor rows, Tensor nodes)",
    fake=lambda tokens, groups, *_: (
        groups.new_empty(5, groups.shape[0]),
        groups.new_empty(4, 2 * groups.shape[0]),
    ),
)

_prefix_lcp = define(
    "prefix_tree",
    "prefix_lcp(Tensor rows, Tensor groups, SymInt most) -> (Tensor members, Tensor lcp)",
    fake=lambda rows, groups, most: tuple(
        groups.new_empty((groups.shape[0], most), dtype=torch.int32) for _ in range(2)
    ),
)

_SUBTREES = "Tensor x, Tensor? weights, Tensor? centre, Tensor rows, Tensor nodes, float gamma"

_sums_backward = define(
    "prefix_tree",
    f"subtree_sums_backward(Tensor grad, {_SUBTREES}) -> (Tensor, Tensor)",
    fake=lambda grad, x, weights, *_: (
        x.new_empty(x.shape),
        x.new_empty(0 if weights is None else weights.shape),
    ),
)


def _setup_sums(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.gamma = inputs
    ctx.save_for_backward(*tensors)


def _gradient_sums(ctx, grad):  # type: ignore[no-untyped-def]
    by_x, by_weight = _sums_backward(grad, *ctx.saved_tensors, ctx.gamma)
    return by_x, None if ctx.saved_tensors[1] is None else by_weight, None, None, None, None


# With a centre: of squared distances from it. The centre is the mean, on which their sum does not depend to first
# order: it gets no gradient.
_subtree_sums = define(
    "prefix_tree",
    f"subtree_sums({_SUBTREES}) -> Tensor",
    fake=lambda x, weights, centre, rows, nodes, gamma: x.new_empty(nodes.shape[1], x.shape[1]),
    setup_context=_setup_sums,
    backward=_gradient_sums,
)

_ON_TOKENS = (
    "Tensor? values, Tensor? along, Tensor? base, Tensor? factor, Tensor rows, Tensor nodes, Tensor? mask,"
    " Tensor? cu_seqlens, bool skip, SymInt size, str at, float gamma"
)


def _fake_tokens(*arguments):  # type: ignore[no-untyped-def]
    a, dtype = OnTokens(*arguments[:-1]), arguments[-1]
    return a.rows.new_empty((a.channels, *a.shape), dtype=dtype)


_tokens_backward = define(
    "prefix_tree",
    f"nodes_to_tokens_backward(Tensor grad, {_ON_TOKENS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad, *arguments: OnTokens(*arguments).gradients(grad),
)


def _setup_tokens(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, skip, size, at, gamma, _ = inputs
    ctx.options = (skip, size, at, gamma)
    ctx.save_for_backward(*tensors)


def _gradient_tokens(ctx, grad):  # type: ignore[no-untyped-def]
    if not grad.dtype.is_floating_point:
        return (None,) * 13
    found = _tokens_backward(grad, *ctx.saved_tensors, *ctx.options)
    given = ctx.saved_tensors[:4]
    return (*(None if t is None else g for t, g in zip(given, found, strict=True)), *[None] * 9)


_nodes_to_tokens = define(
    "prefix_tree",
    f"nodes_to_tokens({_ON_TOKENS}, ScalarType dtype) -> Tensor",
    fake=_fake_tokens,
    setup_context=_setup_tokens,
    backward=_gradient_tokens,
)


# ---- the trees of a batch ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRows:
    """Tokens by row and group, checked: no kernel has run yet."""

    tokens: Tensor
    labels: Tensor
    layout: Layout
    hole: str

    @staticmethod
    def of(
        tokens: Tensor,
        groups: Labels,
        group_size: GroupSize,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        hole: str,
    ) -> TokenRows:
        checks.check_integer("tokens", tokens)
        checks.check_choice("hole", hole, HOLES)
        rows = checks.token_layout("tokens", tokens, mask, cu_seqlens)
        labels = group_ids(groups, group_size, rows.batch, tokens.device, "tokens")
        return TokenRows(tokens, labels, rows, hole)

    def forest(self) -> Forest:
        """The prefix trees of the groups."""
        skip = self.hole == "skip"
        rows, nodes = _prefix_tree(self.tokens, self.labels, self.layout.mask, self.layout.cu_seqlens, skip)
        return Forest(rows, nodes, self.layout, skip)


@dataclass(frozen=True)
class Forest:
    """The prefix trees of a batch: arrays of rows and nodes, and the layout of the tokens."""

    rows: Tensor
    nodes: Tensor
    layout: Layout
    skip: bool  # whether masked tokens between valid ones are left out

    @property
    def leaf(self) -> Tensor:
        return self.rows[1]

    @property
    def live(self) -> Tensor:
        """``[B]``: rows that have a token."""
        return self.rows[3] > 0

    @property
    def depth(self) -> Tensor:
        return self.nodes[2]

    @property
    def count(self) -> Tensor:
        """``[2 B]``: how many rows share a node."""
        return self.nodes[1] - self.nodes[0]

    @property
    def parent(self) -> Tensor:
        return self.nodes[3]

    def sums(
        self, x: Tensor, weights: Tensor | None = None, centre: Tensor | None = None, gamma: float = 1.0
    ) -> Tensor:
        """``[2 B, C]``: over each node's rows, of ``x`` discounted to it, or of squared distances from a centre."""
        centre = None if centre is None else centre.detach()
        out: Tensor = _subtree_sums(x, weights, centre, self.rows, self.nodes, float(gamma))
        return out

    def totals(self, weights: Tensor | None) -> Tensor:
        """``[2 B, 1]``: the weight of each node's rows."""
        if weights is None:
            return self.count.double()[:, None]
        return self.sums(torch.ones_like(weights)[:, None], weights)

    def means(self, x: Tensor, weights: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """``[2 B, C]``: over each node's rows; 0 where they weigh nothing."""
        total = self.totals(weights)
        return self.sums(x, weights, gamma=gamma) / torch.where(total > 0, total, 1)

    def supported_by(self, count: int) -> Tensor:
        """``[B]``: of a row's nodes, the deepest one that ``count`` rows share, or the top where none is."""
        self_or_up = torch.where(
            (self.count >= count) | (self.parent < 0), tree.own(self.parent), self.parent
        )
        return torch.where(self.leaf >= 0, tree.path_ends(self_or_up)[self.leaf.clamp(min=0)], -1)

    def tokens(
        self,
        values: Tensor | None,
        dtype: torch.dtype,
        *,
        at: str = "after",
        along: Tensor | None = None,
        base: Tensor | None = None,
        factor: Tensor | None = None,
        gamma: float = 1.0,
        leaf: Tensor | None = None,
    ) -> Tensor:
        """``base + values + factor * along`` of each token's row and state, ``[C, *tokens]``; 0 where masked.

        Args:
            values, along: ``[2 B, C]`` float64, discounted from the node's depth to the state.
            base, factor: ``[B, C]`` float64; factor is discounted from the row's end.
            at: ``"before"``, ``"after"``, or ``"step"``, the difference of the two.
            leaf: ``[B]``, the node at which a row's path ends; its value is held behind it.
        """
        rows = self.rows
        if leaf is not None:
            rows = torch.cat([rows[:1], leaf[None], rows[2:]])
        at_rest = (self.layout.mask, self.layout.cu_seqlens, self.skip, self.layout.shape[-1])
        out: Tensor = _nodes_to_tokens(
            values, along, base, factor, rows, self.nodes, *at_rest, at, float(gamma), dtype
        )
        return out


# ---- common prefixes ---------------------------------------------------------------------------------------


class PrefixLcp(NamedTuple):
    """Common prefixes by row: ``lcp[b, k]`` is what row b shares with row ``members[b, k]`` of its group."""

    members: Tensor
    """``[B, K]`` int32: the rows of b's group in ascending order, b itself among them; -1 behind the last."""
    lcp: Tensor
    """``[B, K]`` int32: equal leading tokens; a row's length with itself; -1 where one of the two is empty."""


def _largest_group(labels: Tensor, group_size: GroupSize, given: int | None) -> int:
    if given is not None:
        checks.check_whole("max_group_size", given, 1)
        return given
    if isinstance(group_size, int):
        return group_size
    if isinstance(group_size, (list, tuple)):
        return max(group_size, default=1)
    # The size of the output: on a device, reading it would be a synchronisation.
    if not may_read(labels):
        raise ValueError("max_group_size: got None, want the size of the largest group (or group_size)")
    return int(labels.unique(return_counts=True)[1].max()) if labels.numel() else 1


def prefix_lcp(
    tokens: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    max_group_size: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hole: str = "prefix",
) -> PrefixLcp:
    """How many leading tokens each row shares with each row of its group.

    From the rows in lexicographic order: two of them share the least of what the neighbours between them do,
    so no pair is compared.

    Args:
        tokens, groups, group_size, mask, cu_seqlens, hole: as in :func:`prefix_values`.
        max_group_size: K, the rows of the largest group; larger groups are cut. None reads it from ``groups``
            on the CPU; on a device ``group_size`` or this must say it.

    Returns:
        :class:`PrefixLcp`, ``[B, K]``; with contiguous groups of K, ``lcp.view(-1, K, K)`` is symmetric.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, a group
            size that is not known.
    """
    given = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, hole)
    most = _largest_group(given.labels, group_size, max_group_size)
    return PrefixLcp(*_prefix_lcp(given.forest().rows, given.labels, most))


# ---- the compressed tree -----------------------------------------------------------------------------------


class DedupStats(NamedTuple):
    """What computing shared prefixes once would save (training on a packed tree, say)."""

    rows: int
    """Rows with a token."""
    nodes: int
    tokens: int
    """Of all rows, from their first valid token to their last."""
    unique: int
    """Of the trees: every prefix counted once."""
    shared: float
    """The share of tokens that lie in a prefix that another row has too."""
    saved: float
    """``1 - unique / tokens``."""


@dataclass(frozen=True)
class PrefixTree:
    """The compressed prefix trees of a batch, on the host: at most ``2 B - 1`` nodes, a node per unbranched run.

    Nodes are numbered depth first, so that those below node n are ``n + 1 .. tout[n] - 1``. Depths count tokens
    from a row's first valid one; a node's own tokens are the ``length[n]`` last ones of the first ``depth[n]``
    of row ``row[n]``. A node has no token only where all rows of a group part at once.
    """

    parent: Tensor
    """``[M]``; -1 for the top of a group."""
    depth: Tensor
    """``[M]``, tokens of the prefix up to the node's end."""
    row: Tensor
    """``[M]``, a row that runs through the node."""
    start: Tensor
    """``[M]``, tokens of the row before the node's own."""
    length: Tensor
    """``[M]``, tokens of the node itself."""
    begin: Tensor
    """``[M]``: the node's rows are ``order[begin[n] : end[n]]``."""
    end: Tensor
    order: Tensor
    """``[B]``, rows by group, those of one in lexicographic order of their tokens; empty rows last."""
    leaf: Tensor
    """``[B]``, the node at which a row ends; -1 for an empty row."""
    group: Tensor
    """``[M]``, label of the group."""
    tin: Tensor
    """``[M]``: m is n or below it where ``tin[n] <= tin[m] < tout[n]``, the test of a tree attention mask."""
    tout: Tensor
    mean: Tensor | None
    """``[M]`` float64, (weighted) mean reward of the node's rows; None without rewards."""
    std: Tensor | None
    """``[M]`` float64, standard deviation (ddof 1) of them; 0 for a single row."""
    rewards: Tensor | None
    """``[B]`` float64."""
    tokens: tuple[Tensor, ...]
    """Per row, from its first valid token to its last."""

    @staticmethod
    def from_tokens(
        tokens: Tensor,
        groups: Labels = None,
        *,
        group_size: GroupSize = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rewards: Tensor | None = None,
        weights: Tensor | None = None,
        hole: str = "prefix",
    ) -> PrefixTree:
        """Build it where the tokens are (in C++ on the host, by Triton on a device) and bring it to the host.

        Args:
            tokens, groups, group_size, mask, cu_seqlens, weights, hole: as in
                :func:`rewardops.prefix_values`.
            rewards: ``[B]``, for ``mean`` and ``std``; None to leave them out.

        Raises:
            TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
        """
        from .prefix_values import checked_rewards, checked_weights, node_std

        given = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, hole)
        x = w = mean = std = None
        if rewards is not None:
            x, _, channels = checked_rewards(rewards, given)
            if channels:
                raise ValueError(f"rewards: got shape {checks.show(rewards.shape)}, want [B] (one per row)")
            w = checked_weights(weights, given)
        elif weights is not None:
            raise ValueError("weights: got a value without rewards, want None")
        forest = given.forest()
        if x is not None:
            with torch.no_grad():
                mean, std = forest.means(x, w)[:, 0].cpu(), node_std(forest, x, w, 1)[:, 0].cpu()
            x = x.detach()[:, 0].cpu()
        rows = forest.rows.cpu()
        order, leaf, _, _, _ = rows
        begin, end, depth, parent = forest.nodes.cpu()

        kept = (depth >= 0).nonzero()[:, 0]
        # Parents before children, and children in the order of their rows.
        kept = kept[torch.argsort(depth[kept], stable=True)]
        kept = kept[torch.argsort(begin[kept], stable=True)]
        number = torch.full((len(depth) + 1,), -1)
        number[kept] = torch.arange(len(kept))
        parent, begin, end, depth = number[parent[kept]], begin[kept], end[kept], depth[kept]
        above = torch.where(parent >= 0, depth[parent], 0)
        row = order[begin]
        own = torch.arange(len(kept))
        return PrefixTree(
            parent=parent,
            depth=depth,
            row=row,
            start=above,
            length=depth - above,
            begin=begin,
            end=end,
            order=order,
            leaf=number[leaf],
            group=given.labels.cpu()[row],
            tin=own,
            tout=torch.searchsorted(begin, end),
            mean=None if mean is None else mean[kept],
            std=None if std is None else std[kept],
            rewards=x,
            tokens=_token_rows(given, rows),
        )

    def __len__(self) -> int:
        return self.parent.shape[0]

    @property
    def count(self) -> Tensor:
        """``[M]``, how many rows share the node."""
        return self.end - self.begin

    def rows_of(self, node: int) -> list[int]:
        """The rows that run through a node."""
        return self.order[int(self.begin[node]) : int(self.end[node])].tolist()  # type: ignore[no-any-return]

    def tokens_of(self, node: int) -> tuple[int, ...]:
        """A node's own tokens."""
        start = int(self.start[node])
        own = self.tokens[int(self.row[node])][start : start + int(self.length[node])]
        return tuple(own.tolist())

    def path(self, row: int) -> list[int]:
        """The nodes from the top to where a row ends; none for an empty row."""
        found, node = [], int(self.leaf[row])
        while node >= 0:
            found.append(node)
            node = int(self.parent[node])
        return found[::-1]

    def dedup_stats(self) -> DedupStats:
        """How much the rows share."""
        tokens, unique = int((self.count * self.length).sum()), int(self.length.sum())
        shared = int((self.count * self.length)[self.count > 1].sum())
        rows = int((self.leaf >= 0).sum())
        of = max(tokens, 1)
        return DedupStats(rows, len(self), tokens, unique, shared / of, 1 - unique / of if tokens else 0.0)

    def attributes(self, node: int) -> dict[str, Any]:
        """What is known of a node, as plain Python values."""
        names = ["parent", "depth", "row", "start", "length", "group", "count", "tin", "tout", "mean", "std"]
        found = {name: getattr(self, name) for name in names}
        return {k: v[node].item() for k, v in found.items() if v is not None} | {"rows": self.rows_of(node)}

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` from parents to children, with :meth:`attributes` and ``tokens`` at its nodes.

        Raises:
            ImportError: networkx is not installed.
        """
        import networkx  # type: ignore[import-untyped]

        graph = networkx.DiGraph()
        for n in range(len(self)):
            graph.add_node(n, tokens=self.tokens_of(n), **self.attributes(n))
        graph.add_edges_from((int(p), n) for n, p in enumerate(self.parent) if p >= 0)
        return graph

    def to_dot(self, decode: Callable[[Sequence[int]], str] | None = None) -> str:
        """The tree in Graphviz's language: a box per node with its text, rows and value.

        Args:
            decode: from token ids to text; None writes the ids.
        """
        from .viz import tree_dot

        return tree_dot(self, decode)

    def to_svg(self, decode: Callable[[Sequence[int]], str] | None = None, *, width: int = 1200) -> str:
        """A drawing of the tree: rows as lanes, tokens from left to right, values in colour and at the branches.

        Args:
            decode: from token ids to text; None writes the ids. width: in pixels.
        """
        from .viz import tree_svg

        return tree_svg(self, decode, width)

    def to_html(
        self, decode: Callable[[Sequence[int]], str] | None = None, *, title: str = "Prefix tree"
    ) -> str:
        """A page with the drawing, what the rows share, and every row's text coloured by its prefixes' values."""
        from .viz import tree_html

        return tree_html(self, decode, title)


def _token_rows(given: TokenRows, rows: Tensor) -> tuple[Tensor, ...]:
    """Per row from its first valid token to its last; only the valid ones where holes are skipped."""
    tokens, cu = given.tokens.cpu(), given.layout.cu_seqlens
    sizes = None if cu is None else (cu[1:] - cu[:-1]).tolist()
    found = tokens.unbind() if sizes is None else tokens.split(sizes)
    if given.hole == "skip":
        valid = given.layout.valid(given.tokens.device).cpu()
        masks = valid.unbind() if sizes is None else valid.split(sizes)
        return tuple(x[m] for x, m in zip(found, masks, strict=True))
    spans = zip(found, *rows[2:4].tolist(), strict=True)
    return tuple(x[first : first + length] for x, first, length in spans)
