"""Run cases: time, memory and error of ours, the plain formula and other packages.

A report is a dictionary, written as JSON after each row. It has a description of the machine, and a row per case,
dtype and sizes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rewardops
from rewardops.core import dispatch

from . import accuracy, memory, timing
from .case import CPU, FULL, QUICK, TINY, Case, Function, Missing, Sizes
from .cases import axes, dtypes, make, op

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
PACKAGES = ("numpy", "triton", "trl", "verl", "liger-kernel", "torchrl", "cut-cross-entropy")
SIZES = {"tiny": TINY, "quick": QUICK, "cpu": CPU, "full": FULL}
COPY = "copy"  # the roofline: a copy that moves as many bytes as the case must

Report = dict[str, Any]
Row = dict[str, Any]


class Refused(ValueError):
    """A request that cannot be fulfilled, with the reason."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement, shared by all rows of a report."""

    device: str = "cpu"
    sizes: str = "cpu"
    """The name of the default sizes, from which sweeps start."""
    runs: int = 50
    seconds: float = 4.0
    compiled: bool = True
    backends: tuple[str, ...] = ()
    """Further backends on which ours is timed, besides the default."""
    keep_memory: bool = False
    """True if the C library keeps freed memory (set up by the caller)."""


@dataclass(frozen=True)
class Item:
    """A row to be measured."""

    case: str
    dtype: torch.dtype
    sizes: Sizes
    swept: str | None = None
    """The swept axis; None at the default sizes."""

    def key(self) -> tuple[Any, ...]:
        return (self.case, dtype_name(self.dtype), *asdict(self.sizes).items())


def key(row: Row) -> tuple[Any, ...]:
    """The identity of a measurement across reports."""
    return (row["case"], row["dtype"], *row["sizes"].items())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan(names: Iterable[str], sizes: str, sweep: Iterable[str] = ()) -> list[Item]:
    """Every case at its default sizes, followed by its points along the axes to sweep (``"all"``: all its axes)."""
    sweep, usual, quick = set(sweep), SIZES[sizes], sizes in ("tiny", "quick")
    items: dict[tuple[Any, ...], Item] = {}
    for name in names:
        planned = [Item(name, dtype, usual) for dtype in dtypes(name)]
        for axis, values in axes(name, quick=quick).items():
            if not sweep & {axis, "all"}:
                continue
            if axis == "dtype":
                planned += [Item(name, dtype, usual, axis) for dtype in values]
            else:
                changed = [replace(usual, **{axis: value}) for value in values]
                planned += [Item(name, dtype, s, axis) for dtype in dtypes(name) for s in changed]
        for item in planned:
            items.setdefault(item.key(), item)
    return list(items.values())


# ---- what a figure needs beside it to mean anything ----------------------------------------------------------


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def _commit() -> str:
    """The commit, marked if the code has uncommitted changes."""
    changed = _git("status", "--porcelain", "-uno", ".", ":!benchmarks/results", ":!docs", ":!*.md")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
    info = Path("/proc/cpuinfo")
    model = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": dispatch.config()["cpp"],
    }


def _versions(device: torch.device) -> dict[str, str]:
    versions = {"rewardops": rewardops.__version__, "python": platform.python_version()}
    versions["torch"] = str(torch.__version__)
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def header(settings: Settings) -> Report:
    device = torch.device(settings.device)
    return {
        "schema": SCHEMA,
        "machine": _machine(device),
        "versions": _versions(device),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {**asdict(settings), "backends": list(settings.backends)},
        "backend": dispatch.backend_for(device.type),
        "rows": [],
    }


# ---- a row ---------------------------------------------------------------------------------------------------


def _around(variant: str) -> contextlib.AbstractContextManager[None]:
    """A context that forces the backend of a variant ``ours/<backend>``."""
    ours, _, backend = variant.partition("/")
    return dispatch.use_backend(backend) if ours == "ours" and backend else contextlib.nullcontext()


def _variants(case: Case, settings: Settings) -> tuple[dict[str, Function], dict[str, str]]:
    """The variants to time, and the missing ones with reasons."""
    variants: dict[str, Function | Missing] = {"ours": case.ours}
    variants |= {f"ours/{backend}": case.ours for backend in settings.backends}
    variants["eager"] = case.plain
    if not settings.compiled:
        variants["compile"] = Missing("left out of this run")
    elif not case.compiled:
        variants["compile"] = Missing("it does not finish compiling this")
    else:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(case.plain, dynamic=False)
    variants |= case.peers
    missing = {variant: fn.why for variant, fn in variants.items() if isinstance(fn, Missing)}
    return {v: fn for v, fn in variants.items() if not isinstance(fn, Missing)}, missing


def _exact(case: Case) -> tuple[torch.Tensor, ...]:
    """The results in float64 for the same inputs."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
    return case.call(case.exact or case.plain, inputs)()


def _why(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"


def _tidy(value: Any) -> Any:
    """Round to six digits, and replace values that JSON lacks."""
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def measure(item: Item, settings: Settings) -> Row:
    """Measure one row. A variant that runs out of memory, or fails to compile, is listed as missing."""
    device = torch.device(settings.device)
    row: Row = {
        "case": item.case,
        "op": op(item.case),
        "dtype": dtype_name(item.dtype),
        "sizes": asdict(item.sizes),
        "swept": item.swept,
        "variants": {},
        "missing": {},
        "best_other": None,
        "floor": None,
    }
    try:
        case = make(item.case, item.sizes, device, item.dtype)
    except torch.OutOfMemoryError as error:
        return {**row, "missing": {"ours": _why(error)}}
    functions, missing = _variants(case, settings)
    exact = None
    if case.compared:
        try:
            exact = _exact(case)
        except torch.OutOfMemoryError as error:
            missing["float64"] = _why(error)
    calls: dict[str, Callable[[], Any]] = {}
    beside: dict[str, dict[str, Any]] = {}
    for variant, fn in functions.items():
        call = case.call(fn)
        try:
            with _around(variant):
                result = call()
                error = None if exact is None else accuracy.largest_error(result, exact)
                del result
                beside[variant] = {"extra_bytes": memory.peak(call, device), "error": error}
        except Exception as error:  # a compiler or another package may raise anything
            missing[variant] = _why(error)
        else:
            calls[variant] = call
    del exact
    compared = tuple(calls)
    if case.floor is not None:
        calls[case.floor[0]] = case.floor[1]
    calls[COPY], copied = timing.copy_of(case.bytes_moved, device)
    rounds = timing.interleaved(calls, device, runs=settings.runs, seconds=settings.seconds, around=_around)
    times = {variant: timing.summary(r) for variant, r in rounds.items()}
    copy = copied / times[COPY].median / 1e6  # GB/s
    for variant in compared:
        t = times[variant]
        row["variants"][variant] = {
            **asdict(t),
            "gb_per_s": case.bytes_moved / t.median / 1e6,
            "share_of_copy": case.bytes_moved / t.median / 1e6 / copy,
            **beside[variant],
        }
        if variant != "ours" and "ours" in rounds:
            ratio = timing.paired_ratio(rounds[variant], rounds["ours"])
            row["variants"][variant]["ratio"] = asdict(ratio)
    others = {v: t["ratio"]["median"] for v, t in row["variants"].items() if "ratio" in t and "ours" not in v}
    row |= {
        "bytes": case.bytes_moved,
        "copy_gb_per_s": copy,
        "roofline": case.bytes_moved / copy / 1e6,
        "floor": {"name": case.floor[0], **asdict(times[case.floor[0]])} if case.floor else None,
        "best_other": min(others, key=others.__getitem__) if others else None,
        "missing": missing,
    }
    return _tidy(row)


# ---- a report ------------------------------------------------------------------------------------------------


def title(row: Row) -> str:
    """The title in tables: the case, its dtype if not float32, and the point of a sweep."""
    parts = [row["case"]] + [row["dtype"]] * (row["dtype"] != "float32")
    if row["swept"] not in (None, "dtype"):
        parts.append(f"{row['swept']} = {row['sizes'][row['swept']]}")
    return ", ".join(parts)


def line(row: Row) -> str:
    """A row as a line of progress output."""
    ours = row["variants"].get("ours")
    if ours is None:
        return f"{title(row)}: {row['missing']['ours']}"
    text = f"{title(row)}: {ours['median']:.3f} ms, {ours['share_of_copy']:.0%} of copy"
    if row["best_other"] is not None:
        r = row["variants"][row["best_other"]]["ratio"]
        text += f"; {row['best_other']} {r['median']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]"
    return text


def load(path: Path) -> Report:
    report = json.loads(path.read_text())
    if report.get("schema") != SCHEMA:
        raise Refused(f"{path.name}: not a report of this version of the suite")
    return report


def _write(report: Report, path: Path) -> None:
    part = path.with_name(path.name + ".part")  # an interrupted run leaves the last complete report
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def begin(settings: Settings, out: Path | None, *, fresh: bool = False) -> Report:
    """A new report, or the one in ``out`` to continue; :class:`Refused` if the latter has other settings."""
    report = header(settings)
    if out is None or fresh or not out.exists():
        return report
    before = load(out)
    parts = ("machine", "versions", "commit", "settings", "backend")
    if changed := [part for part in parts if before[part] != report[part]]:
        raise Refused(
            f"{out.name} was measured with another {', '.join(changed)}; another file, or --fresh to begin it anew"
        )
    return before


def run_all(
    items: Iterable[Item],
    settings: Settings,
    *,
    out: Path | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Measure the items that the report in ``out`` lacks."""
    report = begin(settings, out, fresh=fresh)
    known = {key(row) for row in report["rows"]}
    for item in items:
        if item.key() in known:
            continue
        row = measure(item, settings)
        report["rows"].append(row)
        if out is not None:
            _write(report, out)
        say(line(row))
        if settings.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return report
