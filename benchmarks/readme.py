"""The figures in README.md and docs/measurements.md and the plots of docs/, from the committed reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from . import plots
from . import report as tables
from .run import ROOT, Report, Row, load, title

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MEASUREMENTS = ROOT / "docs" / "measurements.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# The cases that say whether the package is worth a try.
FEW = ("token_stats_backward", "token_kl_backward", "group_advantages", "gae", "prefix_values")
# The cases of the documentation's table, if measured; a report's table has all cases.
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
# Plots of sweeps in docs/: file -> (case, axes).
FIGURES = {"prefix_tree_cost.svg": ("prefix_values", ("group", "shared"))}


def committed(results: Path = RESULTS) -> Iterator[tuple[Path, Report]]:
    for path in sorted(results.glob("*.json")):
        yield path, load(path)


def digest(path: Path) -> str:
    """The digest of a report, stored in its plots."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def figures(results: Path = RESULTS) -> Iterator[tuple[str, Path, Report, plots.Curves]]:
    """The FIGURES measured on a CPU: name, report and curves."""
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


def few(results: Path = RESULTS) -> str:
    """The text between the markers of the README: a few cases of the first report."""
    for _, report in committed(results):
        rows = [row for row in chosen(report) if row["case"] in FEW and row["dtype"] == "float32"]
        head = ["case", "ours, ms", "eager", "`torch.compile`", "others"]
        cells = ([row[0], row[1], *row[3:6]] for row in map(_row, rows))
        return "\n".join([*tables.table(head, cells), "", f"{tables.measured(report)}.", ""])
    return "No results are committed yet.\n"


def section(results: Path = RESULTS) -> str:
    """The text between the markers of docs/measurements.md."""
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
        memory = ", freed memory kept" if report["settings"]["keep_memory"] else ""
        name = path.stem
        parts += [
            f"{tables.measured(report)}; `{report['backend']}` backend, the sizes `{report['settings']['sizes']}`"
            f" of `benchmarks/case.py`{memory}; copies at up to {tables.copy_bandwidth(report):.0f} GB/s."
            f" [All cases](../benchmarks/results/{name}.md), [the numbers](../benchmarks/results/{name}.json).",
            "",
            *tables.table(head, map(_row, chosen(report))),
            "",
            f"![time of each variant as a multiple of the roofline](../benchmarks/results/{name}.png)",
            "",
        ]
    return "\n".join(parts or ["No results are committed yet.", ""])


def replaced(text: str, inner: str) -> str:
    """A document with the text between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not begin or not also:
        raise ValueError(f"{BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{inner}\n{END}{after}"


def rewrite(results: Path = RESULTS, readme: Path = README, measurements: Path = MEASUREMENTS) -> list[Path]:
    """Rewrite the table and plot of every committed report, the two documents, and the plots of docs/."""
    written = []
    for path, report in committed(results):
        path.with_suffix(".md").write_text(tables.markdown(report))
        plots.overview(report, path.with_suffix(".png"), digest(path), chosen(report))
        written += [path.with_suffix(".md"), path.with_suffix(".png")]
    for name, path, report, curves in figures(results):
        written.append(measurements.parent / name)
        plots.swept(report, FIGURES[name][0], "float32", curves, written[-1], digest(path))
    readme.write_text(replaced(readme.read_text(), few(results)))
    measurements.write_text(replaced(measurements.read_text(), section(results)))
    return [*written, readme, measurements]
