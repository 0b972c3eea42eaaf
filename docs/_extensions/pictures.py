"""The pictures of the gallery, drawn by the package when the site is built."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import rewardops as ro
from rewardops.advantages import dr_grpo, max_rl, pass_at_k, pure, rloo
from rewardops.demo import report, rollouts

ROLLOUTS = Path(__file__).parents[1] / "rollouts.jsonl"


def _rows() -> tuple[list[rollouts.Row], report.Rollouts]:
    rows = rollouts.read(ROLLOUTS)
    return rows, rollouts.batch_of(rows)


def _decode(rows: list[rollouts.Row]) -> Callable[[list[int]], str]:
    texts = {i: piece for row in rows for i, piece in zip(row.ids, row.pieces, strict=True)}
    return lambda ids: "".join(texts[i] for i in ids)


def tree() -> str:
    rows, batch = _rows()
    prefixes = ro.PrefixTree.from_tokens(batch.tokens, batch.groups, mask=batch.mask, rewards=batch.rewards)
    return prefixes.to_svg(_decode(rows), width=820)


def tree_page() -> str:
    rows, batch = _rows()
    prefixes = ro.PrefixTree.from_tokens(batch.tokens, batch.groups, mask=batch.mask, rewards=batch.rewards)
    return prefixes.to_html(_decode(rows), title="The prefix tree of a group")


def recipes() -> str:
    return rollouts.report(ROLLOUTS, [], 1)[0]


def estimators() -> str:
    """The same group under more estimators."""
    rows, r = _rows()
    by_row = {"mask": r.mask}
    tree = {"tokens": r.tokens, "rewards": r.rewards, "groups": r.groups, "mask": r.mask}
    advantages = {
        "dr_grpo": dr_grpo(r.rewards, r.groups, **by_row),
        "rloo": rloo(r.rewards, r.groups, **by_row),
        "pass_at_k": pass_at_k(r.rewards, r.groups, **by_row),
        "max_rl": max_rl(r.rewards, r.groups, **by_row),
        "pure": pure(r.step_rewards, r.step_ends, r.groups, outcome=r.rewards, mask=r.mask),
        "tempo_advantages": ro.tempo_advantages(**tree),
        "tree_rl_advantages": ro.tree_rl_advantages(**tree),
        "sibling_advantages": ro.sibling_advantages(**tree),
    }
    group = report.Group("One group, eight estimators", r, [row.pieces for row in rows], advantages)
    panels = (report.panel(group, name, float(x.abs().max()) or 1.0) for name, x in advantages.items())
    lead = "Advantages of every token, by the name of the function, each in units of its own largest."
    return report.page(group.title, lead, f'<div class="panels">{"".join(panels)}</div>')


PICTURES = {"tree": tree, "tree-page": tree_page, "recipes": recipes, "estimators": estimators}


class Picture(SphinxDirective):
    """A picture of this file by name: SVG in the page, or a page of its own in a frame as high as it is."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(ROLLOUTS))
        with torch.no_grad():
            drawn = PICTURES[name]()
        if drawn.lstrip().startswith("<svg"):
            html = f'<div class="picture">{drawn}</div>'
        else:
            drawn += "<style>body { padding: 0 1rem; }</style>"
            grow = "this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'"
            html = (
                f'<iframe class="picture" title="{escape(name)}" srcdoc="{escape(drawn)}" onload="{escape(grow)}">'
                "</iframe>"
            )
        return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
