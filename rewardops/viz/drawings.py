"""Drawings of prefix trees: Graphviz, SVG and HTML, without another package."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Callable, Sequence

from .compressed_tree import CompressedTree

Decode = Callable[[Sequence[int]], str]

# From low to high values; distinguishable with red-green colour blindness.
_LOW, _MIDDLE, _HIGH = (0xC2, 0x57, 0x1A), (0x9A, 0x9A, 0x94), (0x1F, 0x6F, 0xB2)
_PLAIN = "#5b7a8c"

_LANE = 28  # pixels per row
_TOP = 46  # above the first lane of a group: its name and the axis
_SIDE = 210  # right of the axis: the row's number, reward and length
_LEFT = 76


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def _shorten(text: str, most: int) -> str:
    text = " ".join(text.split()) if most else text
    return text if len(text) <= most else text[: max(most - 1, 0)] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}"


class _Colours:
    """Colours of values between the least and the largest reward."""

    def __init__(self, tree: CompressedTree) -> None:
        rewards = [] if tree.rewards is None else tree.rewards[tree.leaf >= 0].tolist()
        self.low: float = min(rewards, default=0.0)
        self.high: float = max(rewards, default=0.0)

    def of(self, value: float) -> str:
        if self.high <= self.low:
            return _PLAIN
        place = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        a, b = (_LOW, _MIDDLE) if place < 0.5 else (_MIDDLE, _HIGH)
        part = 2 * place if place < 0.5 else 2 * place - 1
        return "#" + "".join(f"{round(x + (y - x) * part):02x}" for x, y in zip(a, b, strict=True))

    def node(self, tree: CompressedTree, n: int) -> str:
        return _PLAIN if tree.mean is None else self.of(float(tree.mean[n]))


def _facts(tree: CompressedTree, n: int) -> str:
    """The statistics of a node, on one line."""
    facts = [f"{int(tree.count[n])} of {_group_size(tree, n)} rows"]
    if tree.mean is not None and tree.std is not None:
        facts.append(f"value {_number(float(tree.mean[n]))}")
        if int(tree.count[n]) > 1:
            facts.append(f"std {_number(float(tree.std[n]))}")
        up = int(tree.parent[n])
        if up >= 0:
            facts.append(f"{float(tree.mean[n] - tree.mean[up]):+.3g} on its parent")
    facts.append(f"tokens {int(tree.start[n])} to {int(tree.depth[n])}")
    return ", ".join(facts)


def _group_size(tree: CompressedTree, n: int) -> int:
    while int(tree.parent[n]) >= 0:
        n = int(tree.parent[n])
    return int(tree.count[n])


def _children(tree: CompressedTree) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for n, up in enumerate(tree.parent.tolist()):
        if up >= 0:
            children[up].append(n)
    return children


# ---- Graphviz ----------------------------------------------------------------------------------------------


def tree_dot(tree: CompressedTree, decode: Decode | None) -> str:
    """A tree in Graphviz's language, see :meth:`rewardops.PrefixTree.to_dot`.

    Args:
        tree: the compressed tree.
        decode: from token ids to text; None writes the ids.

    Returns:
        The source of the graph.

    Example:
        >>> from rewardops.viz import tree_dot
        >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6], [5, 7]]), group_size=2)
        >>> tree_dot(tree, None).splitlines()[0]
        'digraph prefix_tree {'
    """
    text_of, colours = decode or _ids, _Colours(tree)
    lines = [
        "digraph prefix_tree {",
        '  rankdir=LR; node [shape=box, style="rounded,filled", fontname="monospace", fontcolor=white];',
    ]
    for n in range(len(tree)):
        rows = tree.rows_of(n)
        label = [_shorten(text_of(tree.tokens_of(n)), 60) or "(start)", _facts(tree, n)]
        if len(rows) == 1:
            label.append(f"row {rows[0]}")
        text = "\\n".join(json.dumps(x, ensure_ascii=False)[1:-1] for x in label)
        lines.append(f'  n{n} [label="{text}", fillcolor="{colours.node(tree, n)}"];')
    lines += [f"  n{up} -> n{n};" for n, up in enumerate(tree.parent.tolist()) if up >= 0]
    return "\n".join([*lines, "}", ""])


# ---- SVG ---------------------------------------------------------------------------------------------------


class _Axis:
    """Pixels of depths: the root of an interval's length, as branches crowd near the start, and room per branch."""

    def __init__(self, depths: Sequence[int], branches: Sequence[int], width: int) -> None:
        self.depths = sorted({0, *depths})
        room = width - _LEFT - _SIDE
        crowded = set(branches) - {0}
        least = min(40.0, 0.6 * room / max(len(crowded), 1))
        roots = [math.sqrt(b - a) for a, b in itertools.pairwise(self.depths)]
        scale = (room - least * len(crowded)) / (sum(roots) or 1.0)
        spans = (scale * r + least * (d in crowded) for r, d in zip(roots, self.depths[1:], strict=True))
        self.places = list(itertools.accumulate(spans, initial=float(_LEFT)))

    def at(self, depth: int) -> float:
        return self.places[self.depths.index(depth)]

    def ticks(self) -> list[tuple[int, float]]:
        """Depths to label, no two closer than the width of their text; always the last one."""
        ticks: list[tuple[int, float]] = []
        for depth, place in zip(self.depths[:-1], self.places[:-1], strict=True):
            if place - (ticks[-1][1] if ticks else -_LANE) > 32 and self.places[-1] - place > 32:
                ticks.append((depth, place))
        return [*ticks, (self.depths[-1], self.places[-1])]


def _panel(
    tree: CompressedTree,
    top: int,
    children: list[list[int]],
    text_of: Decode,
    colours: _Colours,
    width: int,
    y0: float,
) -> tuple[list[str], float]:
    """SVG elements of a group's drawing from ``y0`` down, and the y coordinate of its end."""
    nodes = range(top, int(tree.tout[top]))
    rows = tree.rows_of(top)
    lane = {row: y0 + _TOP + (k + 0.5) * _LANE for k, row in enumerate(rows)}
    branches = [int(tree.depth[n]) for n in nodes if children[n]]
    axis = _Axis([int(tree.depth[n]) for n in nodes], branches, width)
    middle = {n: sum(lane[r] for r in tree.rows_of(n)) / int(tree.count[n]) for n in nodes}
    bottom = y0 + _TOP + len(rows) * _LANE

    name = f"group {int(tree.group[top])}: {len(rows)} rows, {len(nodes)} nodes"
    if tree.mean is not None and tree.std is not None:
        name += f", mean {_number(float(tree.mean[top]))}, std {_number(float(tree.std[top]))}"
    out = [f'<text class="name" x="{_LEFT}" y="{y0 + 16:.1f}">{html.escape(name)}</text>']
    for depth, x in axis.ticks():
        out.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y0 + 38:.1f}" y2="{bottom:.1f}"/>')
        out.append(f'<text class="small" x="{x:.1f}" y="{y0 + 34:.1f}" text-anchor="middle">{depth}</text>')
    out.append(f'<text class="small" x="{_LEFT - 8}" y="{y0 + 34:.1f}" text-anchor="end">tokens</text>')

    for n in nodes:
        left, right, y = axis.at(int(tree.start[n])), axis.at(int(tree.depth[n])), middle[n]
        colour, thick = colours.node(tree, n), 2.5 + 1.5 * math.log2(int(tree.count[n]))
        tip = f"{_facts(tree, n)}\n{_shorten(text_of(tree.tokens_of(n)), 600)}"
        out.append(f'<g class="node"><title>{html.escape(tip)}</title>')
        up = int(tree.parent[n])
        if up >= 0:
            out.append(
                f'<path d="M{left:.1f} {middle[up]:.1f}V{y:.1f}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
            )
        out.append(
            f'<path d="M{left:.1f} {y:.1f}H{max(right, left + 1):.1f}" stroke="{colour}"'
            f' stroke-width="{thick:.1f}" stroke-linecap="round"/>'
        )
        room = int((right - left - 8) / 5.9)
        text = _shorten(text_of(tree.tokens_of(n)), room)
        if room >= 4 and text:
            out.append(
                f'<text class="said" x="{left + 5:.1f}" y="{y - thick / 2 - 2:.1f}">{html.escape(text)}</text>'
            )
        if children[n]:
            value = "" if tree.mean is None else _number(float(tree.mean[n])) + " "
            out.append(f'<circle cx="{right:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" class="branch"/>')
            out.append(
                f'<text class="value" x="{right - 7:.1f}" y="{y + thick / 2 + 9:.1f}" text-anchor="end">'
                f'{value}<tspan class="count">n={int(tree.count[n])}</tspan></text>'
            )
        out.append("</g>")
    for row in rows:
        end = int(tree.leaf[row])
        x, y = axis.at(int(tree.depth[end])), lane[row]
        if middle[end] != y:
            # A row that ends where others continue, or equal rows: the node's end is not on the row's lane.
            out.append(f'<path class="ends" d="M{x:.1f} {middle[end]:.1f}L{x + 6:.1f} {y:.1f}"/>')
            x += 6
        out.append(f'<path class="lead" d="M{x + 5:.1f} {y:.1f}H{width - _SIDE + 4:.1f}"/>')
        caption = f"row {row}"
        fill = _PLAIN
        if tree.rewards is not None:
            caption += f"  reward {_number(float(tree.rewards[row]))}"
            fill = colours.of(float(tree.rewards[row]))
        out.append(f'<circle cx="{width - _SIDE + 12:.1f}" cy="{y:.1f}" r="5" fill="{fill}"/>')
        out.append(
            f'<text class="row" x="{width - _SIDE + 22:.1f}" y="{y + 4:.1f}">{caption}'
            f'<tspan class="count">  {len(tree.tokens[row])} tokens</tspan></text>'
        )
    return out, bottom + 16


_STYLE = """
svg.prefix-tree { font: 12px system-ui, sans-serif; background: #fff; }
.prefix-tree text { fill: #222; }
.prefix-tree .name { font-weight: 600; font-size: 13px; }
.prefix-tree .small, .prefix-tree .count { fill: #777; font-size: 10px; }
.prefix-tree .said { font: 9.5px ui-monospace, monospace; fill: #555; }
.prefix-tree .value { font-size: 10px; font-weight: 600; }
.prefix-tree .tick { stroke: #eee; }
.prefix-tree .lead, .prefix-tree .ends { stroke: #ccc; stroke-dasharray: 1 3; fill: none; }
.prefix-tree .branch { stroke: #fff; }
.prefix-tree .node:hover path { stroke: #111; }
"""


def _scale(colours: _Colours, width: int, y: float) -> list[str]:
    """The legend of the colours."""
    if colours.high <= colours.low:
        return []
    steps = [colours.low + (colours.high - colours.low) * k / 20 for k in range(21)]
    x0 = width - _SIDE + 6
    out = [
        f'<rect x="{x0 + 6 * k}" y="{y:.1f}" width="6.5" height="9" fill="{colours.of(v)}"/>'
        for k, v in enumerate(steps)
    ]
    ends = ((x0, "start", colours.low), (x0 + 126, "end", colours.high))
    for x, anchor, value in ends:
        out.append(
            f'<text class="small" x="{x}" y="{y + 20:.1f}" text-anchor="{anchor}">{_number(value)}</text>'
        )
    out.append(f'<text class="small" x="{x0 + 63}" y="{y + 20:.1f}" text-anchor="middle">value</text>')
    return out


def tree_svg(tree: CompressedTree, decode: Decode | None, width: int) -> str:
    """A drawing of a tree, see :meth:`rewardops.PrefixTree.to_svg`.

    Args:
        tree: the compressed tree.
        decode: from token ids to text; None writes the ids.
        width: in pixels.

    Returns:
        An SVG element.

    Example:
        >>> from rewardops.viz import tree_svg
        >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6], [5, 7]]), group_size=2)
        >>> tree_svg(tree, None, 600)[:4]
        '<svg'
    """
    text_of, colours, children = decode or _ids, _Colours(tree), _children(tree)
    body, y = _scale(colours, width, 6.0), 4.0
    for top in (tree.parent < 0).nonzero()[:, 0].tolist():
        panel, y = _panel(tree, top, children, text_of, colours, width, y)
        body += panel
    size = f'width="{width}" height="{y:.0f}" viewBox="0 0 {width} {y:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="prefix-tree" {size}>',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{y:.0f}" fill="#fff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


# ---- HTML --------------------------------------------------------------------------------------------------

_PAGE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 24px auto; max-width: 1240px; }
.scroll { overflow-x: auto; }
.text { font: 12.5px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.text { margin: 4px 0 14px; }
.text span { border-bottom: 2px solid; padding-bottom: 1px; }
.text span + span { border-left: 2px solid #111; padding-left: 2px; }
.note { color: #666; }
"""


def tree_html(tree: CompressedTree, decode: Decode | None, title: str) -> str:
    """A page about a tree, see :meth:`rewardops.PrefixTree.to_html`.

    Args:
        tree: the compressed tree.
        decode: from token ids to text; None writes the ids.
        title: heading of the page, in plain text.

    Returns:
        The page, which needs no other file.

    Example:
        >>> from rewardops.viz import tree_html
        >>> tree = ro.PrefixTree.from_tokens(torch.tensor([[5, 6], [5, 7]]), group_size=2)
        >>> "<h1>A group</h1>" in tree_html(tree, None, "A group")
        True
    """
    text_of, colours, s = decode or _ids, _Colours(tree), tree.dedup_stats()
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{s.rows} rows, {s.tokens} tokens, {s.nodes} nodes. {s.shared:.1%} of the tokens lie in a prefix that"
        f" another row shares; computing every prefix once would save {s.saved:.1%} of them.</p>",
        f'<div class="scroll">{tree_svg(tree, decode, 1200)}</div>',
        "<h2>Rows</h2>",
        '<p class="note">Underlined by the value of the prefix; a bar is a branch. Point at a stretch for its'
        " numbers.</p>",
    ]
    for row in tree.order.tolist():
        path = tree.path(row)
        if not path:
            continue
        head = f"row {row}, group {int(tree.group[path[-1]])}"
        if tree.rewards is not None:
            head += f", reward {_number(float(tree.rewards[row]))}"
        spans = "".join(
            f'<span style="border-bottom-color:{colours.node(tree, n)}" title="{html.escape(_facts(tree, n))}">'
            f"{html.escape(text_of(tree.tokens_of(n)))}</span>"
            for n in path
            if int(tree.length[n])
        )
        parts.append(f'<div><b>{html.escape(head)}</b><div class="text">{spans}</div></div>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_PAGE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
