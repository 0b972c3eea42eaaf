"""Markdown tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .run import Report, Row, title

NAMES = {"compile": "torch.compile"}


def where(report: Report) -> str:
    """A description of the machine."""
    m = report["machine"]
    return m["gpu"] if "gpu" in m else f"{m['cpu']}, {m['threads']} of {m['cores']} cores"


def measured(report: Report) -> str:
    """Machine, versions, commit and date of a report."""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if name != "rewardops")
    return f"{where(report)}; {versions}; commit {report['commit']}, {report['date']}"


def copy_bandwidth(report: Report) -> float:
    """Bandwidth of the largest copy in GB/s; each row has a copy of its size."""
    return max((r["bytes"], r["copy_gb_per_s"]) for r in report["rows"] if "bytes" in r)[1]


def usual(report: Report) -> list[Row]:
    """The rows at the default sizes for which ours ran."""
    return [row for row in report["rows"] if row["swept"] is None and "ours" in row["variants"]]


def times(x: float) -> str:
    return f"{x:.0f}x" if x >= 100 else f"{x:.1f}x" if x >= 10 else f"{x:.2f}x"


def ms(x: float) -> str:
    return f"{x:.0f}" if x >= 1000 else f"{x:.1f}" if x >= 10 else f"{x:.3g}"


def _error(variant: dict[str, Any]) -> str:
    return "" if variant["error"] is None else f"{float(variant['error']['relative']):.0e}"


def ratio(row: Row, variant: str) -> str:
    """Time as a multiple of ours; for the best other variant in bold, with its interval."""
    r = row["variants"][variant]["ratio"]
    if variant != row["best_other"]:
        return times(r["median"])
    return f"**{times(r['median'])}** [{times(r['low'])[:-1]}, {times(r['high'])[:-1]}]"


def peers(row: Row) -> list[str]:
    """The variants of other packages, and loops as in trainers."""
    return [v for v in row["variants"] if not v.startswith("ours") and v not in ("eager", "compile")]


def others(row: Row, cell: Callable[[str], str]) -> list[str]:
    """The cells of eager and torch.compile, and one cell of all other variants."""
    first = [cell(v) if v in row["variants"] else row["missing"].get(v, "") for v in ("eager", "compile")]
    return [*first, "; ".join(f"{v} {cell(v)}" for v in peers(row))]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def _times(row: Row) -> list[str]:
    ours = row["variants"]["ours"]

    def cell(variant: str) -> str:
        error = _error(row["variants"][variant])
        return ratio(row, variant) + (f", {error}" if error else "")

    spread = f"{ms(ours['p20'])} to {ms(ours['p80'])}"
    share = f"{ours['share_of_copy']:.0%}"
    cells = [ms(ours["median"]), spread, ms(row["roofline"]), f"{ours['gb_per_s']:.3g}", share, _error(ours)]
    return [title(row), *cells, *others(row, cell)]


def _memory(row: Row) -> list[str]:
    def cell(variant: str) -> str:
        size = row["variants"][variant]["extra_bytes"]
        return "" if size is None else f"{size / 1e6:.1f}"

    return [title(row), cell("ours"), *others(row, cell)]


def _backends(rows: list[Row]) -> list[str]:
    """A table of ours on the requested backends besides the default."""
    requested = list(
        dict.fromkeys(v for row in rows for v in [*row["variants"], *row["missing"]] if "ours/" in v)
    )
    if not requested:
        return []

    def cell(row: Row, variant: str) -> str:
        timing = row["variants"].get(variant)
        if timing is None:
            return row["missing"].get(variant, "")
        return f"{ms(timing['median'])} ({times(timing['ratio']['median'])}, {_error(timing)})"

    head = ["case", "ours, ms", *(v.removeprefix("ours/") for v in requested)]
    cells = ([title(r), ms(r["variants"]["ours"]["median"]), *(cell(r, v) for v in requested)] for r in rows)
    return ["", "On other backends, milliseconds (times ours, relative error):", "", *table(head, cells)]


def _floors(rows: list[Row]) -> list[str]:
    bounded = [row for row in rows if row["floor"]]
    if not bounded:
        return []

    def cells(row: Row) -> list[str]:
        floor = row["floor"]
        return [
            title(row),
            floor["name"],
            ms(floor["median"]),
            times(row["variants"]["ours"]["median"] / floor["median"]),
        ]

    head = ["case", "what nobody can leave out", "ms", "ours to it"]
    return ["", *table(head, map(cells, bounded))]


def _missing(report: Report) -> list[str]:
    """Each reason once, with its cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        for variant, why in row["missing"].items():
            cases = reasons.setdefault((variant, why), [])
            if row["case"] not in cases:
                cases.append(row["case"])
    if not reasons:
        return []
    lines = [f"- {NAMES.get(v, v)}: {why} ({', '.join(cases)})" for (v, why), cases in reasons.items()]
    return ["", "Not measured:", "", *lines]


def markdown(report: Report) -> str:
    """The report as Markdown: times with errors, memory, floors, missing variants."""
    rows = [row for row in report["rows"] if "ours" in row["variants"]]
    head = ["case", "ours, ms", "p20 to p80", "roofline, ms", "GB/s", "of copy", "error"]
    names = ["eager", NAMES["compile"], "others"]
    settings = report["settings"]
    memory = "; freed memory kept" if settings["keep_memory"] else ""
    lines = [
        f"{measured(report)}; sizes: {settings['sizes']}; backend: {report['backend']}{memory}."
        + (f" Largest copy: {copy_bandwidth(report):.0f} GB/s." if rows else ""),
        "",
        "Others: times as long as ours (of the fastest in bold, with the 95 % interval), and the largest error"
        " against float64 relative to the largest value.",
        "",
        *table([*head, *names], map(_times, rows)),
        *_backends(rows),
        *_floors(rows),
        "",
        "Peak memory beyond inputs and results, MB:",
        "",
        *table(["case", "ours", *names], map(_memory, rows)),
        *_missing(report),
    ]
    return "\n".join(lines) + "\n"
