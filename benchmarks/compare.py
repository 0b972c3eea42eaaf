"""Compare two reports of one machine: cases that became faster or slower beyond the noise."""

from __future__ import annotations

from typing import Any

from .run import Report, key, title

LEAST = 0.05  # smallest relative change to report


def different(a: Report, b: Report) -> list[str]:
    """Differences between the reports that make their times incomparable."""
    settings = ("device", "keep_memory")
    parts = [part for part in ("machine", "backend") if a[part] != b[part]]
    return parts + [name for name in settings if a["settings"][name] != b["settings"][name]]


def _verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Faster, slower or neither: the spreads must be disjoint and the medians differ by more than LEAST."""
    if new["p20"] > old["p80"] and new["median"] > (1 + LEAST) * old["median"]:
        return "REGRESSION"
    if new["p80"] < old["p20"] and new["median"] < (1 - LEAST) * old["median"]:
        return "faster"
    return ""


def compare(a: Report, b: Report) -> tuple[str, int]:
    """A Markdown table of the common rows, with a line per variant of ours, and the number of regressions."""
    before = {key(row): row for row in a["rows"]}
    lines = [
        f"{a['commit']} ({a['date']}) to {b['commit']} ({b['date']}); a copy: how the machine itself changed",
        "",
        "| case | variant | before, ms | after, ms | after / before | a copy | |",
        "|---|---|---|---|---|---|---|",
    ]
    regressions = shared = 0
    for row in b["rows"]:
        old = before.get(key(row))
        if old is None:
            continue
        shared += 1
        for variant in (v for v in row["variants"] if v.startswith("ours") and v in old["variants"]):
            x, y = old["variants"][variant], row["variants"][variant]
            verdict = _verdict(x, y)
            regressions += verdict == "REGRESSION"
            copy = old["copy_gb_per_s"] / row["copy_gb_per_s"]
            cells = [title(row), variant, f"{x['median']:.3f}", f"{y['median']:.3f}"]
            cells += [f"{y['median'] / x['median']:.2f}x", f"{copy:.2f}x", verdict]
            lines.append("| " + " | ".join(cells) + " |")
    alone = len(a["rows"]) - shared, len(b["rows"]) - shared
    lines += [
        "",
        f"{regressions} regressions in {shared} rows; {alone[0]} only before, {alone[1]} only after",
    ]
    return "\n".join(lines) + "\n", regressions
