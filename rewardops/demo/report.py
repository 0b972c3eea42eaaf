"""The report: one self-contained HTML file with learning curves and groups of responses, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import rewardops

from ..recipes import Rollouts

# Okabe and Ito's colours, distinguishable for colour-blind readers; blue and orange are the ends of the scale.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --paper: #ffffff; --line: #d7dce2; --box: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b1; --paper: #14171b; --line: #343b44; --box: #1d2127; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: .9rem 0 .3rem; } p { color: var(--soft); max-width: 75rem; margin: .3rem 0; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } svg text { fill: var(--soft); font-size: 11px; }
svg .title { fill: var(--ink); font-size: 13px; } svg .grid { stroke: var(--line); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.2rem; }
.panel { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem 1rem;
         overflow-x: auto; }
.row { display: flex; gap: .6rem; align-items: baseline; margin: .35rem 0; }
.who { flex: 0 0 7.2rem; font-size: 12px; color: var(--soft); text-align: right; font-variant-numeric: tabular-nums; }
.text { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { padding: 1px 1px; border-radius: 2px; } .t:hover { outline: 2px solid var(--ink); }
.branch { border-left: 3px solid var(--ink); margin-left: 3px; padding-left: 2px; }
.good.end::after, .good.line::before { content: "\\2713"; font-weight: bold; font-size: 11px; }
.bad.end::after, .bad.line::before { content: "\\2717"; font-weight: bold; font-size: 11px; }
.tree { overflow-x: auto; }
.scale { display: inline-block; width: 16rem; height: .8rem; border-radius: 3px; vertical-align: middle;
         border: 1px solid var(--line);
         background: linear-gradient(90deg, rgba(213,94,0,.7), rgba(213,94,0,0), rgba(0,114,178,0), rgba(0,114,178,.7)); }
.key { font-size: 13px; color: var(--soft); }
"""


@dataclass(frozen=True)
class Group:
    """One group of responses and the credit that each recipe gives its tokens."""

    title: str
    rollouts: Rollouts
    pieces: list[list[str]]
    """The text of each row's tokens."""
    advantages: Mapping[str, Any]
    """Advantages ``[B, T]`` by recipe."""
    logprob: Any = None
    labels: Sequence[str] = ()
    """A name for each row."""


def chart(title: str, curves: Mapping[str, Sequence[tuple[int, float]]], top: float | None = None) -> str:
    """A line chart as SVG, with a line per recipe."""
    width, height, left, bottom = 400, 250, 48, 34
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return ""
    last = max(x for x, _ in points) or 1
    high = top if top is not None else max(y for _, y in points) * 1.1 or 1.0

    def place(x: float, y: float) -> str:
        across = left + x / last * (width - left - 12)
        return f"{across:.1f},{height - bottom - min(y, high) / high * (height - bottom - 34):.1f}"

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape(title)}"><text class="title" x="{left}" y="16">{escape(title)}</text>'
    ]
    for k in range(5):
        y = high * k / 4
        at = float(place(0, y).split(",")[1])
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{at}" y2="{at}"/>')
        label = f"{y:.0%}" if top == 1.0 else f"{y:.2f}"
        parts.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end">{label}</text>')
    for k in range(5):
        x = round(last * k / 4)
        across = place(x, 0).split(",")[0]
        parts.append(f'<text x="{across}" y="{height - 16}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 3}" text-anchor="middle">update</text>')
    for k, (name, curve) in enumerate(curves.items()):
        colour = LINES[k % len(LINES)]
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{line}"/>')
        parts.append(
            f'<text x="{width - 16 - 52 * (len(curves) - 1 - k)}" y="30" text-anchor="end"'
            f' style="fill:{colour}">{escape(name)}</text>'
        )
    return "".join(parts) + "</svg>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def panel(group: Group, recipe: str, peak: float) -> str:
    """One group under one recipe: a row per response, a box per token."""
    r = group.rollouts
    values = rewardops.prefix_values(r.tokens, r.rewards, r.groups, mask=r.mask)
    size = len(r.rewards)
    parts = [f'<div class="panel"><h3>{escape(recipe)}</h3>']
    for b in range(size):
        name = f"{escape(group.labels[b])}<br>" if group.labels else ""
        parts.append(
            f'<div class="row"><div class="who">{name}reward {float(r.rewards[b]):g}</div><div class="text">'
        )
        sharing = size
        for t, piece in enumerate(group.pieces[b]):
            if not r.mask[b, t]:
                continue
            a, count = float(group.advantages[recipe][b, t]), int(values.count[b, t])
            strength = min(abs(a) / peak, 1.0) * 0.7
            colour = f"rgba(0,114,178,{strength:.2f})" if a > 0 else f"rgba(213,94,0,{strength:.2f})"
            marks = ["t"]
            tip = [f"{piece!r}", f"advantage {a:+.3f}"]
            if group.logprob is not None:
                tip.append(f"logprob {float(group.logprob[b, t]):.3f}")
            if r.entropy is not None:
                tip.append(f"entropy {float(r.entropy[b, t]):.3f}")
            tip.append(f"prefix value {float(values.before[b, t]):.3f} to {float(values.after[b, t]):.3f}")
            tip.append(f"shared by {count} of {size}")
            if count < sharing:
                marks.append("branch")
                tip.append(f"BRANCH: {sharing} rows become {count}")
            sharing = count
            if r.step_ends is not None and r.step_rewards is not None and bool(r.step_ends[b, t]):
                # A mark after a line break would appear on the next line.
                marks.append("line" if piece.endswith("\n") else "end")
                marks.append("good" if float(r.step_rewards[b, t]) > 0 else "bad")
            parts.append(
                f'<span class="{" ".join(marks)}" style="background:{colour}" title="{escape(" | ".join(tip))}">'
                f"{escape(piece)}</span>"
            )
        parts.append("</div></div>")
    return "".join(parts) + "</div>"


def tree(group: Group) -> str:
    """The prefix tree of a group, with the values of its branches."""
    r = group.rollouts
    prefixes = rewardops.PrefixTree.from_tokens(r.tokens, r.groups, mask=r.mask, rewards=r.rewards)
    texts = {
        int(token): piece
        for row, pieces in zip(r.tokens, group.pieces, strict=True)
        for token, piece in zip(row, pieces, strict=False)
    }
    return f'<div class="tree">{prefixes.to_svg(lambda ids: "".join(texts[i] for i in ids))}</div>'


def groups_section(groups: Sequence[Group]) -> str:
    """All groups, each with its recipes side by side, a colour scale per panel."""
    parts = [
        '<p class="key">advantage: below 0 <span class="scale"></span> above 0 (each panel in units of its own largest;'
        " no colour is 0). A bar before a token is a branch of the group's prefix tree: from there on fewer rows share"
        " the prefix, as the drawing of the tree shows with its values. A tick or cross ends a checked step. Point at a token for its numbers.</p>"
    ]
    for group in groups:
        parts.append(f"<h2>{escape(group.title)}</h2>{tree(group)}<div class='panels'>")
        for recipe, advantages in group.advantages.items():
            peak = float(advantages.abs().max()) or 1.0
            parts.append(
                panel(group, recipe, peak).replace("</h3>", f" <small>largest {peak:.2f}</small></h3>", 1)
            )
        parts.append("</div>")
    return "".join(parts)


def page(title: str, lead: str, *sections: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>{''.join(sections)}</body></html>\n"
    )
