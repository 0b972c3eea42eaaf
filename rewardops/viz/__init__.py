"""Prefix trees to look at: the compressed tree of a batch, and drawings of it."""

from .compressed_tree import DedupStats, PrefixTree
from .drawings import Decode, tree_dot, tree_html, tree_svg

__all__ = ["Decode", "DedupStats", "PrefixTree", "tree_dot", "tree_html", "tree_svg"]
