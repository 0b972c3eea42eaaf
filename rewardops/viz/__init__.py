"""Prefix trees for inspection: the compressed tree of a batch, and drawings of it."""

from .compressed_tree import CompressedTree, DedupStats
from .drawings import Decode, tree_dot, tree_html, tree_svg
from .prefix_tree import PrefixTree

__all__ = ["CompressedTree", "Decode", "DedupStats", "PrefixTree", "tree_dot", "tree_html", "tree_svg"]
