"""The compressed prefix trees of a batch, with their drawings."""

from __future__ import annotations

from dataclasses import dataclass

from . import drawings
from .compressed_tree import CompressedTree


@dataclass(frozen=True)
class PrefixTree(CompressedTree):
    __doc__ = CompressedTree.__doc__

    def to_dot(self, decode: drawings.Decode | None = None) -> str:
        """The tree in Graphviz's language: a box per node with its text, rows and value.

        Args:
            decode: from token ids to text; None writes the ids.

        Returns:
            The source of the graph, text for ``dot``.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> print(tree.to_dot().splitlines()[-3].strip())
            n0 -> n1;
        """
        return drawings.tree_dot(self, decode)

    def to_svg(self, decode: drawings.Decode | None = None, *, width: int = 1200) -> str:
        """A drawing of the tree: rows as lanes, tokens from left to right, values in colour.

        Args:
            decode: from token ids to text; None writes the ids.
            width: in pixels.

        Returns:
            An SVG element, on its own or inside a page.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> tree.to_svg(lambda ids: "".join(chr(96 + i) for i in ids), width=600)[:4]
            '<svg'
        """
        return drawings.tree_svg(self, decode, width)

    def to_html(self, decode: drawings.Decode | None = None, *, title: str = "Prefix tree") -> str:
        """A page with the drawing, the savings from shared prefixes, and each row's text coloured by value.

        Args:
            decode: from token ids to text; None writes the ids.
            title: heading of the page, in plain text.

        Returns:
            The page, which needs no other file.

        Example:
            >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6, 7], [5, 6, 8]]), group_size=2)
            >>> "computing every prefix once would save 33.3%" in tree.to_html(title="A group")
            True
        """
        return drawings.tree_html(self, decode, title)
