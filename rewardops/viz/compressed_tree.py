"""The compressed prefix trees of a batch, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..core import checks
from ..core.groups import GroupSize, Labels
from ..ops.forest import TokenRows, checked_rewards, checked_weights


class DedupStats(NamedTuple):
    """The savings of computing shared prefixes once, as in training on a packed tree.

    Attributes:
        rows: rows with a token.
        nodes: nodes of the compressed trees.
        tokens: tokens of all rows, each from its first valid token to its last.
        unique: tokens of the trees: every prefix counted once.
        shared: the fraction of the tokens that lie in a prefix of another row.
        saved: ``1 - unique / tokens``, 0 without tokens.
    """

    rows: int
    nodes: int
    tokens: int
    unique: int
    shared: float
    saved: float


@dataclass(frozen=True)
class CompressedTree:
    """The compressed prefix trees of a batch, on the host: at most ``2 B - 1`` nodes, one per unbranched run.

    Nodes are numbered depth first, so that those below node n are ``n + 1 .. tout[n] - 1``. Depths count
    tokens from a row's first valid one; a node's own tokens are the last ``length[n]`` of the first
    ``depth[n]`` tokens of row ``row[n]``. A node has no token only at the top of a group whose rows diverge
    at their first token. Tensors lie on the CPU; those of nodes have M entries.

    Attributes:
        parent: ``[M]`` int64, the node above; -1 for the top of a group.
        depth: ``[M]`` int64, tokens of the prefix up to the node's end.
        row: ``[M]`` int64, a row that runs through the node.
        start: ``[M]`` int64, tokens of the row before the node's own.
        length: ``[M]`` int64, tokens of the node itself.
        begin: ``[M]`` int64: the node's rows are ``order[begin[n] : end[n]]``.
        end: ``[M]`` int64, see ``begin``.
        order: ``[B]`` int64, rows by group, within a group in lexicographic order of their tokens; empty rows
            last.
        leaf: ``[B]`` int64, the node at which a row ends; -1 for an empty row.
        group: ``[M]`` int64, label of the group.
        tin: ``[M]`` int64: m is n or below it where ``tin[n] <= tin[m] < tout[n]``, the test of a tree
            attention mask.
        tout: ``[M]`` int64, see ``tin``.
        mean: ``[M]`` float64, (weighted) mean reward of the node's rows; None without rewards.
        std: ``[M]`` float64, standard deviation (ddof 1) of those rewards; 0 for a single row; None without
            rewards.
        rewards: ``[B]`` float64; None without rewards.
        tokens: token ids per row, from its first valid token to its last.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [1, 1, 1]])
        >>> tree = ro.PrefixTree.from_tokens(tokens, group_size=3, rewards=torch.tensor([1.0, 0.0, 0.0]))
        >>> [tree.tokens_of(node) for node in range(len(tree))]
        [(), (1, 1, 1), (5, 6), (7,), (8,)]
        >>> tree.parent.tolist(), [round(x, 3) for x in tree.mean.tolist()]
        ([-1, 0, 0, 2, 2], [0.333, 0.0, 0.5, 1.0, 0.0])
    """

    parent: Tensor
    depth: Tensor
    row: Tensor
    start: Tensor
    length: Tensor
    begin: Tensor
    end: Tensor
    order: Tensor
    leaf: Tensor
    group: Tensor
    tin: Tensor
    tout: Tensor
    mean: Tensor | None
    std: Tensor | None
    rewards: Tensor | None
    tokens: tuple[Tensor, ...]

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor,
        groups: Labels = None,
        *,
        group_size: GroupSize = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rewards: Tensor | None = None,
        weights: Tensor | None = None,
        masked: str = "prefix",
    ) -> Self:
        """Build the tree of a batch, and copy it to the host.

        It is built on the device of the tokens (C++ on the host, Triton on a device).

        Args:
            tokens: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; integer ids, compared for equality.
            groups: ``[B]``, one label per row in any order: integers, or a sequence of anything hashable.
                Rows of other groups never match.
            group_size: instead of ``groups``: rows per contiguous group, or the size of each (a sequence or
                ``[G]``, integer).
            mask: the shape of ``tokens``; bool, or integer or float of 0 and 1; None: every token is valid.
            cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
            rewards: ``[B]``, for ``mean`` and ``std``; float32, bfloat16, float16 or float64; None to leave
                them out.
            weights: ``[B]``, non-negative, of the rows in ``mean`` and ``std``; None for 1.
            masked: masked tokens between valid ones: ``"prefix"``: they are part of the prefix; ``"skip"``:
                they are left out.

        Returns:
            The tree, of the class it is called on; no gradient flows through it.

        Raises:
            TypeError: an argument that is no tensor, a dtype that is not accepted, labels that cannot be
                hashed.
            ValueError: a shape or device that does not match, both or neither of ``groups`` and
                ``group_size``, rewards of several channels, a negative weight, weights without rewards.

        Example:
            >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8]])
            >>> tree = ro.PrefixTree.from_tokens(tokens, group_size=2)
            >>> len(tree), tree.depth.tolist(), tree.count.tolist()
            (3, [2, 3, 3], [2, 1, 1])
        """
        token_rows = TokenRows.of(tokens, groups, group_size, mask, cu_seqlens, masked)
        x = w = mean = std = None
        if rewards is not None:
            x, _, channels = checked_rewards(rewards, token_rows)
            if channels:
                raise ValueError(f"rewards: got shape {checks.show(rewards.shape)}, want [B] (one per row)")
            w = checked_weights(weights, token_rows)
        elif weights is not None:
            raise ValueError("weights: got a value without rewards, want None")
        forest = token_rows.forest()
        if x is not None:
            with torch.no_grad():
                mean, std = forest.means(x, w)[:, 0].cpu(), forest.std(x, w, 1)[:, 0].cpu()
            x = x.detach()[:, 0].cpu()
        rows = forest.rows.cpu()
        order, leaf, _, _, _ = rows
        begin, end, depth, parent = forest.nodes.cpu()

        # Parents before children, and children in the order of their rows.
        nodes = (depth >= 0).nonzero()[:, 0]
        nodes = nodes[torch.argsort(depth[nodes], stable=True)]
        nodes = nodes[torch.argsort(begin[nodes], stable=True)]
        number = torch.full((len(depth) + 1,), -1, dtype=torch.int64, device="cpu")
        number[nodes] = torch.arange(len(nodes), device="cpu")
        parent, begin, end, depth = number[parent[nodes]], begin[nodes], end[nodes], depth[nodes]
        above = torch.where(parent >= 0, depth[parent], 0)
        row = order[begin]
        return cls(
            parent=parent,
            depth=depth,
            row=row,
            start=above,
            length=depth - above,
            begin=begin,
            end=end,
            order=order,
            leaf=number[leaf],
            group=token_rows.labels.cpu()[row],
            tin=torch.arange(len(nodes), device="cpu"),
            tout=torch.searchsorted(begin, end),
            mean=None if mean is None else mean[nodes],
            std=None if std is None else std[nodes],
            rewards=x,
            tokens=_tokens_by_row(token_rows, rows),
        )

    def __len__(self) -> int:
        return self.parent.shape[0]

    @property
    def count(self) -> Tensor:
        """Rows that share each node, ``[M]`` int64."""
        return self.end - self.begin

    def rows_of(self, node: int) -> list[int]:
        """Rows that run through a node.

        Args:
            node: its number, from 0 to ``len(tree) - 1``.

        Returns:
            Indices of rows, in the order of ``order``.

        Raises:
            IndexError: no such node.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> tree.rows_of(0), tree.rows_of(2)
            ([0, 1], [1])
        """
        return self.order[int(self.begin[node]) : int(self.end[node])].tolist()  # type: ignore[no-any-return]

    def tokens_of(self, node: int) -> tuple[int, ...]:
        """A node's own tokens, those after its parent's end.

        Args:
            node: its number, from 0 to ``len(tree) - 1``.

        Returns:
            Token ids; none at the top of a group whose rows diverge at their first token.

        Raises:
            IndexError: no such node.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> tree.tokens_of(0), tree.tokens_of(1)
            ((5, 6), (7,))
        """
        start = int(self.start[node])
        return tuple(self.tokens[int(self.row[node])][start : start + int(self.length[node])].tolist())

    def path(self, row: int) -> list[int]:
        """Nodes from the top of the group to the end of a row.

        Args:
            row: its index in the batch, from 0.

        Returns:
            Numbers of nodes, from the top; none for an empty row.

        Raises:
            IndexError: no such row.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> tree.path(1)
            [0, 2]
        """
        nodes, node = [], int(self.leaf[row])
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def dedup_stats(self) -> DedupStats:
        """The savings of computing shared prefixes once.

        Returns:
            :class:`DedupStats`.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7, 7], [5, 6, 8, 8]]), group_size=2)
            >>> tree.dedup_stats()
            DedupStats(rows=2, nodes=3, tokens=8, unique=6, shared=0.5, saved=0.25)
        """
        tokens, unique = int((self.count * self.length).sum()), int(self.length.sum())
        shared = int((self.count * self.length)[self.count > 1].sum())
        rows = int((self.leaf >= 0).sum())
        total = max(tokens, 1)
        return DedupStats(
            rows, len(self), tokens, unique, shared / total, 1 - unique / total if tokens else 0.0
        )

    def attributes(self, node: int) -> dict[str, Any]:
        """A node's fields as plain Python values.

        Args:
            node: its number, from 0 to ``len(tree) - 1``.

        Returns:
            The fields with an entry per node by name, with ``count`` and ``rows``; without ``mean`` and
            ``std`` where there are no rewards.

        Raises:
            IndexError: no such node.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> node = tree.attributes(0)
            >>> node["depth"], node["count"], node["rows"]
            (2, 2, [0, 1])
        """
        names = ["parent", "depth", "row", "start", "length", "group", "count", "tin", "tout", "mean", "std"]
        fields = {name: getattr(self, name) for name in names}
        return {k: v[node].item() for k, v in fields.items() if v is not None} | {"rows": self.rows_of(node)}

    def to_networkx(self) -> Any:
        """Convert to a ``networkx.DiGraph``: edges from parents to children.

        Its nodes have :meth:`attributes` and ``tokens``.

        Returns:
            The graph, of nodes 0 to ``len(tree) - 1``.

        Raises:
            ImportError: networkx is not installed.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> list(tree.to_networkx().edges)
            [(0, 1), (0, 2)]
        """
        import networkx  # type: ignore[import-untyped]

        graph = networkx.DiGraph()
        for n in range(len(self)):
            graph.add_node(n, tokens=self.tokens_of(n), **self.attributes(n))
        graph.add_edges_from((int(p), n) for n, p in enumerate(self.parent) if p >= 0)
        return graph


def _tokens_by_row(token_rows: TokenRows, rows: Tensor) -> tuple[Tensor, ...]:
    """Token ids per row, from its first valid token to its last; valid ones only if masked ones are skipped."""
    tokens, cu = token_rows.tokens.cpu(), token_rows.layout.cu_seqlens
    sizes = None if cu is None else (cu[1:] - cu[:-1]).tolist()
    parts = tokens.unbind() if sizes is None else tokens.split(sizes)
    if token_rows.masked == "skip":
        valid = token_rows.layout.valid(token_rows.tokens.device).cpu()
        masks = valid.unbind() if sizes is None else valid.split(sizes)
        return tuple(x[m] for x, m in zip(parts, masks, strict=True))
    spans = zip(parts, *rows[2:4].tolist(), strict=True)
    return tuple(x[first : first + length] for x, first, length in spans)
