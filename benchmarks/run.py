"""Runs cases: ours against the plain formula in eager and under torch.compile, with the error beside it."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rewardops
from rewardops import dispatch

from . import cases, memory, timing

ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it to mean anything."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    found: dict[str, Any] = {
        "rewardops": rewardops.__version__,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **dispatch.config(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
    else:
        model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        found["cpu"] = model[0].partition(":")[2].strip() if model else platform.processor()
    return found


def _step(fn: cases.Function, case: cases.Case) -> Callable[[], Any]:
    if not case.differentiable:
        return lambda: fn(*case.inputs)
    leaves = [x.detach().requires_grad_() for x in case.inputs[: case.differentiable]]
    rest = case.inputs[case.differentiable :]

    def step() -> Any:
        out = fn(*leaves, *rest)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    return step


def _largest_error(got: Any, want: Any) -> float:
    pairs = [(got, want)] if isinstance(got, torch.Tensor) else list(zip(got, want, strict=True))
    return max((float((a.float() - b.float()).abs().max()) if a.numel() else 0.0) for a, b in pairs)


def run_case(
    name: str,
    sizes: cases.Sizes,
    device: torch.device,
    dtype: torch.dtype,
    *,
    runs: int,
    seconds: float,
    compiled: bool = True,
) -> dict[str, Any]:
    """Time one case. A variant that runs out of memory, or fails to compile, is reported and left out."""
    case = cases.make(name, sizes, device, dtype)
    variants = {"ours": case.ours, "eager": case.plain, **case.peers}
    if compiled and case.compiled:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(case.plain, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {}
    results, notes = {}, {}
    for variant, fn in variants.items():
        step = _step(fn, case)
        try:
            results[variant] = step()
            calls[variant] = step
        except torch.OutOfMemoryError:
            notes[variant] = "out of memory"
        except RuntimeError as error:
            if variant == "ours":
                raise
            notes[variant] = f"failed: {str(error).splitlines()[0][:120]}"
    difference = {v: _largest_error(results["ours"], r) for v, r in results.items() if v != "ours"}
    del results
    extra = {variant: memory.peak(call, device) for variant, call in calls.items()}
    if case.floor is not None:
        calls[case.floor[0]] = case.floor[1]
    found = timing.interleaved(calls, device, runs=runs, seconds=seconds)
    ours = found["ours"].median
    return {
        "case": name,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": asdict(sizes),
        "bytes": case.bytes_moved,
        "gb_per_s": case.bytes_moved / ours / 1e6,
        "variants": {variant: asdict(t) for variant, t in found.items()},
        "speedup": {v: t.median / ours for v, t in found.items() if v != "ours"},
        "extra_bytes": extra,
        "floor": case.floor[0] if case.floor else None,
        "largest_difference": difference,
        "notes": notes,
    }


def _title(row: dict[str, Any]) -> str:
    return row["case"] + (f", {row['dtype']}" if len(cases.dtypes(row["case"])) > 1 else "")


def markdown(report: dict[str, Any]) -> str:
    """A table of a report: milliseconds, and how many times longer the others take.

    The roofline is the time in which the measured copy bandwidth moves the bytes that a case must move.
    """
    m = report["machine"]
    where = m.get("gpu") if m.get("gpu", "none") != "none" else m.get("cpu")
    rows = report["cases"]
    floors = {row["floor"] for row in rows}
    peers = sorted({v for row in rows for v in row["variants"]} - {"ours", "eager", "compile"} - floors)
    others = {"eager": "eager", "compile": "torch.compile", **{p: p for p in peers}}
    head = ["case", "ours, ms", "roofline, ms", "GB/s", "of copy"]
    head += [cell for other in others.values() for cell in (f"{other}, ms", "ratio")]
    lines = [
        f"{where}, torch {m['torch']}, commit {m['commit']}, {m['date']};"
        f" copy bandwidth {report['copy_gb_per_s']:.0f} GB/s; backend: {report['backend']}",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        v = row["variants"]
        name = _title(row)
        roofline = row["bytes"] / report["copy_gb_per_s"] / 1e6
        cells = [name, f"{v['ours']['median']:.3f}", f"{roofline:.3f}", f"{row['gb_per_s']:.0f}"]
        cells.append(f"{row['gb_per_s'] / report['copy_gb_per_s']:.0%}")
        for other in others:
            if other in v:
                cells += [f"{v[other]['median']:.3f}", f"{row['speedup'][other]:.1f}x"]
            else:
                cells += [row["notes"].get(other, "not run"), ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| case | floor | ms | ours to it |", "|---|---|---|---|"] * any(
        row["floor"] for row in rows
    )
    for row in rows:
        if row["floor"]:
            least = row["variants"][row["floor"]]["median"]
            ours = row["variants"]["ours"]["median"] / least
            lines.append(f"| {_title(row)} | {row['floor']} | {least:.1f} | {ours:.2f}x |")
    heads = ["ours", *others]
    lines += ["", "Peak memory beyond inputs and results, MB:", ""]
    lines += ["| case | " + " | ".join(["ours", *others.values()]) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        sizes = [row["extra_bytes"].get(v) for v in heads]
        cells = ["" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        lines.append(f"| {_title(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_all(
    names: Iterable[str],
    sizes: cases.Sizes,
    device: torch.device,
    *,
    runs: int = 20,
    seconds: float = 8.0,
    compiled: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """A report over the named cases."""
    copied = min(sizes.tokens * sizes.vocab * 2, 2**31)
    report: dict[str, Any] = {
        "machine": machine(device),
        "backend": dispatch.backend_for(device.type),
        "copy_gb_per_s": timing.copy_bandwidth(device, max(copied, 2**20)),
        "cases": [],
    }
    for name, dtype in ((n, dtype) for n in names for dtype in cases.dtypes(n)):
        row = run_case(name, sizes, device, dtype, runs=runs, seconds=seconds, compiled=compiled)
        report["cases"].append(row)
        rest = "".join(f", {v} {s:.1f}x" for v, s in row["speedup"].items())
        progress(
            f"{name} {row['dtype']}: {row['variants']['ours']['median']:.3f} ms{rest} {row['notes'] or ''}"
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report
