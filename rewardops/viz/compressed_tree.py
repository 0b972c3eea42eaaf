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
    """The savings of computing shared prefixes once, as in training on a packed tree."""

    rows: int
    """Rows with a token."""
    nodes: int
    tokens: int
    """Tokens of all rows, each from its first valid token to its last."""
    unique: int
    """Tokens of the trees: every prefix counted once."""
    shared: float
    """The fraction of the tokens that lie in a prefix of another row."""
    saved: float
    """``1 - unique / tokens``."""


@dataclass(frozen=True)
class CompressedTree:
    """The compressed prefix trees of a batch, on the host: at most ``2 B - 1`` nodes, a node per unbranched run.

    Nodes are numbered depth first, so that those below node n are ``n + 1 .. tout[n] - 1``. Depths count tokens
    from a row's first valid one; a node's own tokens are the last ``length[n]`` of the first ``depth[n]`` tokens of
    row ``row[n]``. A node has no token only at the top of a group whose rows diverge at their first token.
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
    """``[B]``, rows by group, within a group in lexicographic order of their tokens; empty rows last."""
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
    """``[M]`` float64, standard deviation (ddof 1) of those rewards; 0 for a single row."""
    rewards: Tensor | None
    """``[B]`` float64."""
    tokens: tuple[Tensor, ...]
    """Token ids per row, from its first valid token to its last."""

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
        """Build the tree on the device of the tokens (C++ on the host, Triton on a device) and copy it to the host.

        Args:
            tokens, groups, group_size, mask, cu_seqlens, weights, masked: as in
                :func:`rewardops.prefix_values`.
            rewards: ``[B]``, for ``mean`` and ``std``; None to leave them out.

        Raises:
            TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
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
        """``[M]``, the number of rows that share the node."""
        return self.end - self.begin

    def rows_of(self, node: int) -> list[int]:
        """The rows that run through a node."""
        return self.order[int(self.begin[node]) : int(self.end[node])].tolist()  # type: ignore[no-any-return]

    def tokens_of(self, node: int) -> tuple[int, ...]:
        """A node's own tokens."""
        start = int(self.start[node])
        return tuple(self.tokens[int(self.row[node])][start : start + int(self.length[node])].tolist())

    def path(self, row: int) -> list[int]:
        """The nodes from the top of the group to the end of a row; none for an empty row."""
        nodes, node = [], int(self.leaf[row])
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def dedup_stats(self) -> DedupStats:
        """The savings of computing shared prefixes once."""
        tokens, unique = int((self.count * self.length).sum()), int(self.length.sum())
        shared = int((self.count * self.length)[self.count > 1].sum())
        rows = int((self.leaf >= 0).sum())
        total = max(tokens, 1)
        return DedupStats(
            rows, len(self), tokens, unique, shared / total, 1 - unique / total if tokens else 0.0
        )

    def attributes(self, node: int) -> dict[str, Any]:
        """A node's fields as plain Python values."""
        names = ["parent", "depth", "row", "start", "length", "group", "count", "tin", "tout", "mean", "std"]
        fields = {name: getattr(self, name) for name in names}
        return {k: v[node].item() for k, v in fields.items() if v is not None} | {"rows": self.rows_of(node)}

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
