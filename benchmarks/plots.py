"""Plots of a report: times relative to the roofline of every case, and time and memory over sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import NAMES, usual, where
from .run import Report, Row, title

KNOWN = {"ours": "#0b5fa5", "eager": "#d1495b", "compile": "#edae49"}
REST = ("#00798c", "#8f5ba8", "#6b8e23", "#b5651d", "#e377c2", "#7f7f7f", "#17becf", "#2f4b26")
MARKERS = "osD^vP*X<>h"

Curves = dict[str, list[tuple[Any, Row]]]  # axis -> (value, measured row)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "rewardops"
    from matplotlib import pyplot

    return pyplot


def _styles(report: Report) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each variant, the same in all plots of a report."""
    variants = list(KNOWN) + sorted({v for row in report["rows"] for v in row["variants"]} - set(KNOWN))
    colours = [*KNOWN.values(), *(REST[i % len(REST)] for i in range(len(variants)))]
    return {
        v: {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "label": NAMES.get(v, v)}
        for i, v in enumerate(variants)
    }


def _heading(report: Report) -> str:
    versions = report["versions"]
    names = [f"{p} {versions[p]}" for p in ("torch", "triton") if p in versions]
    return f"{where(report)}\n{', '.join(names)}; commit {report['commit']}, {report['date']}"


def _save(figure: Any, path: Path, digest: str) -> None:
    """Save with the report's digest in the metadata, so that a test can detect a stale plot."""
    svg = path.suffix == ".svg"
    stamp = {"Date": None, "Description": digest} if svg else {"Software": None, "Description": digest}
    figure.savefig(path, dpi=140, metadata=stamp)
    _pyplot().close(figure)


def overview(report: Report, path: Path, digest: str = "", rows: list[Row] | None = None) -> None:
    """Overview: a line per case with each variant's time as a multiple of the roofline."""
    rows = usual(report) if rows is None else rows
    styles = _styles(report)
    figure, axis = _pyplot().subplots(figsize=(8.5, 1.6 + 0.27 * len(rows)), layout="constrained")
    for variant, style in styles.items():
        points = [
            (i, r["variants"][variant], r["roofline"]) for i, r in enumerate(rows) if variant in r["variants"]
        ]
        if not points:
            continue
        low, x, high = ([t[q] / roofline for _, t, roofline in points] for q in ("p20", "median", "p80"))
        spread = [[b - a for a, b in zip(low, x, strict=True)], [b - a for a, b in zip(x, high, strict=True)]]
        size = 7 if variant == "ours" else 5
        axis.errorbar(x, [i for i, *_ in points], xerr=spread, ls="", ms=size, lw=1, zorder=3, **style)
    axis.axvline(1, color="black", ls="--", lw=1, label="roofline (a copy of the bytes)")
    axis.set_xscale("log")
    axis.set_xlabel("time as a multiple of the time of a copy of the same bytes")
    axis.set_yticks(range(len(rows)), [title(r) for r in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    axis.set_title(_heading(report), fontsize=9)
    _save(figure, path, digest)


def _label(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def curves(report: Report, case: str, dtype: str) -> Curves:
    """The points of each swept axis of a case in order, including the default sizes."""
    rows = [r for r in report["rows"] if r["case"] == case and "ours" in r["variants"]]
    by_axis: Curves = {}
    for axis in dict.fromkeys(r["swept"] for r in rows if r["swept"]):
        chosen = [r for r in rows if r["swept"] in (None, axis) and (axis == "dtype" or r["dtype"] == dtype)]
        points = [(r["dtype"] if axis == "dtype" else r["sizes"][axis], r) for r in chosen]
        if not isinstance(points[0][0], str):
            points.sort(key=lambda p: p[0])
        by_axis[axis] = points
    return {axis: points for axis, points in by_axis.items() if len(points) > 1}


def _panel(plot: Any, points: list[tuple[Any, Row]], styles: dict[str, Any], what: str) -> None:
    """Milliseconds or megabytes of each variant over the values of an axis."""
    values = [v for v, _ in points]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    place = dict(zip(values, values if numbers else range(len(values)), strict=True))
    for variant, style in styles.items():
        measured = [(place[v], r["variants"][variant]) for v, r in points if variant in r["variants"]]
        measured = [(x, t) for x, t in measured if what == "ms" or t["extra_bytes"] is not None]
        if not measured:
            continue
        x = [x for x, _ in measured]
        y = [t["median"] if what == "ms" else t["extra_bytes"] / 1e6 for _, t in measured]
        above = 4 if variant == "ours" else 3
        plot.plot(x, y, ms=4, lw=1.4, ls="-" if numbers else "", zorder=above, **style)
        if what == "ms" and numbers:
            low, high = [t["p20"] for _, t in measured], [t["p80"] for _, t in measured]
            plot.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
    if what == "ms":
        roofline = [r["roofline"] for _, r in points]
        plot.plot(
            list(place.values()),
            roofline,
            color="black",
            ls="--",
            lw=1,
            label="roofline (a copy of the bytes)",
        )
        plot.set_yscale("log")
    else:
        plot.set_yscale("symlog", linthresh=1)
    if numbers and min(values) > 0:
        plot.set_xscale("log", base=2)
    elif numbers:
        plot.set_xscale("symlog", base=2, linthresh=min(v for v in values if v > 0))
    plot.minorticks_off()
    plot.set_xticks(list(place.values()), [_label(v) for v in values], rotation=45, fontsize=7)
    plot.grid(alpha=0.3)


def swept(report: Report, case: str, dtype: str, along: Curves, path: Path, digest: str = "") -> None:
    """Time and memory of a case, with a column per axis."""
    styles, columns = _styles(report), len(along)
    size = (max(3.2 * columns, 6.5), 6.2)
    figure, grid = _pyplot().subplots(
        2, columns, figsize=size, squeeze=False, sharex="col", sharey="row", layout="constrained"
    )
    for (above, below), (axis, points) in zip(grid.T, along.items(), strict=True):
        _panel(above, points, styles, "ms")
        _panel(below, points, styles, "MB")
        below.set_xlabel(axis)
    grid[1][0].set_ylim(bottom=-0.1)
    grid[0][0].set_ylabel("milliseconds")
    grid[1][0].set_ylabel("MB beyond inputs and results")
    handles = {h.get_label(): h for plot in grid[0] for h in plot.get_legend_handles_labels()[0]}
    figure.legend(handles=handles.values(), fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(f"{case}, {dtype}\n{_heading(report)}", fontsize=9)
    _save(figure, path, digest)


def all_of(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write all plots of a report to a folder."""
    pictures = []
    if usual(report):
        pictures.append(folder / f"{stem}.png")
        overview(report, pictures[-1])
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in report["rows"] if r["swept"] is None):
        if along := curves(report, case, dtype):
            pictures.append(folder / f"{stem}-{case}{'' if dtype == 'float32' else '-' + dtype}.png")
            swept(report, case, dtype, along, pictures[-1])
    return pictures
