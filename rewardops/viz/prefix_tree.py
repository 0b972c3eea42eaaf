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
        """
        return drawings.tree_dot(self, decode)

    def to_svg(self, decode: drawings.Decode | None = None, *, width: int = 1200) -> str:
        """A drawing of the tree: rows as lanes, tokens from left to right, values in colour and at the branches.

        Args:
            decode: from token ids to text; None writes the ids. width: in pixels.
        """
        return drawings.tree_svg(self, decode, width)

    def to_html(self, decode: drawings.Decode | None = None, *, title: str = "Prefix tree") -> str:
        """A page with the drawing, the savings from shared prefixes, and each row's text coloured by value."""
        return drawings.tree_html(self, decode, title)
