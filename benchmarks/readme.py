"""README.md's performance section, and the pictures of the documentation, from the committed reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from . import plots
from . import report as tables
from .run import ROOT, Report, Row, load, title

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# The cases of the README, where they were measured; the table of a report has all.
HEADLINE = (
    "token_stats",
    "token_stats_backward",
    "token_stats_kl",
    "linear_token_stats",
    "linear_token_stats_backward",
    "linear_token_loss",
    "token_kl",
    "token_kl_backward",
    "group_advantages",
    "gtpo_rewards",
    "high_entropy_mask",
    "gae",
    "gae_long",
    "min_returns",
    "softmin_rewards",
    "segment_reduce",
    "prefix_values",
    "tempo_advantages",
    "tree_values",
)
# Pictures of sweeps in docs/: the case, the axes.
FIGURES = {"prefix_tree_cost.svg": ("prefix_values", ("group", "shared"))}


def committed(results: Path = RESULTS) -> Iterator[tuple[Path, Report]]:
    for path in sorted(results.glob("*.json")):
        yield path, load(path)


def digest(path: Path) -> str:
    """Of a report; its pictures carry it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def figures(results: Path = RESULTS) -> Iterator[tuple[str, Path, Report, plots.Curves]]:
    """Of FIGURES those that were measured on a CPU: the name, the report, and the curves."""
    for path, report in committed(results):
        for name, (case, axes) in FIGURES.items():
            curves = plots.curves(report, case, "float32")
            if "cpu" in report["machine"] and set(axes) <= set(curves):
                yield name, path, report, {axis: curves[axis] for axis in axes}


def chosen(report: Report) -> list[Row]:
    rows = tables.usual(report)
    return [row for row in rows if row["case"] in HEADLINE] or rows


def _row(row: Row) -> list[str]:
    v = row["variants"]

    def size(variant: str) -> str:
        known = variant in v and v[variant]["extra_bytes"] is not None
        return f"{v[variant]['extra_bytes'] / 1e6:.0f}" if known else ""

    ours = v["ours"]
    cells = [title(row), tables.ms(ours["median"]), tables.ms(row["roofline"])]
    return [
        *cells,
        *tables.others(row, lambda variant: tables.ratio(row, variant)),
        f"{size('ours')} / {size('eager')}",
    ]


def section(results: Path = RESULTS) -> str:
    """The text between the marks."""
    parts = []
    for path, report in committed(results):
        head = [
            "case",
            "ours, ms",
            "roofline, ms",
            "eager",
            "`torch.compile`",
            "others",
            "memory, ours / eager, MB",
        ]
        kept = ", freed memory kept" if report["settings"]["keep_memory"] else ""
        name = path.stem
        parts += [
            f"{tables.measured(report)}; `{report['backend']}` backend, the sizes `{report['settings']['sizes']}`"
            f" of `benchmarks/case.py`{kept}; copies at up to {tables.copy_bandwidth(report):.0f} GB/s."
            f" [All cases](benchmarks/results/{name}.md), [the numbers](benchmarks/results/{name}.json).",
            "",
            *tables.table(head, map(_row, chosen(report))),
            "",
            f"![time of each variant as a multiple of the roofline](benchmarks/results/{name}.png)",
            "",
        ]
    return "\n".join(parts or ["No results are committed yet.", ""])


def replaced(text: str, inner: str) -> str:
    """The README with what is between the marks replaced."""
    before, found, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not found or not also:
        raise ValueError(f"README.md: {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{inner}\n{END}{after}"


def rewrite(results: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Table and picture of every committed report, the README, and the pictures of docs/."""
    made = []
    for path, report in committed(results):
        path.with_suffix(".md").write_text(tables.markdown(report))
        plots.overview(report, path.with_suffix(".png"), digest(path), chosen(report))
        made += [path.with_suffix(".md"), path.with_suffix(".png")]
    for name, path, report, curves in figures(results):
        made.append(readme.parent / "docs" / name)
        plots.swept(report, FIGURES[name][0], "float32", curves, made[-1], digest(path))
    readme.write_text(replaced(readme.read_text(), section(results)))
    return [*made, readme]
