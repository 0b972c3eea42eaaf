"""``python -m benchmarks.gpu``: build, test, check and time on a bare GPU machine.

Needs a checkout, a python3 with torch, Triton, pybind11, setuptools, pytest and hypothesis, nvcc, cmake, ninja;
no network. Installs nothing: the package is built into ``build/gpu``. A run ends within nine minutes; call it
again to continue with the parts that have not passed. ``--fresh`` starts anew, ``--part`` selects parts. Writes
``<gpu>-<date>.json`` and ``.md`` to ``--out``, ``$OUT`` or ``benchmarks/results``.

``--dry`` walks the same parts on the CPU: tiny shapes, interpreted kernels, and the CUDA C++ kernels in the
harness of the tests. Its figures are meaningless and written only to ``build/gpu``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
STATE = BUILD / "state.json"
LIMIT = 530.0  # seconds in total
MANY_TOKENS = 65536  # in addition to the default, for cases of token_stats


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclass(frozen=True)
class Walk:
    """The options and paths shared by all parts."""

    dry: bool
    out: Path

    def environment(self) -> dict[str, str]:
        """Environment variables; the built package precedes the checkout on the path."""
        paths = [str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]
        # cmake and ninja may belong to this Python environment, which may not be activated.
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        variables = {
            **os.environ,
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "PYTHONUNBUFFERED": "1",
            "REWARDOPS_OFFLINE": "1",
        }
        if self.dry:
            variables.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", REWARDOPS_CUDA="0")
            variables["REWARDOPS_ISAS"] = "portable"  # any build will do
        else:
            import torch

            variables.setdefault("REWARDOPS_CUDA", "1" if shutil.which("nvcc") else "0")
            variables.setdefault("CUDAARCHS", "".join(map(str, torch.cuda.get_device_capability())))
        return variables

    def run(self, command: list[str], limit: float, **environment: str) -> tuple[int, str]:
        """Run a command in ``build/gpu``, where nothing shadows the built package; return status and output."""
        try:
            done = subprocess.run(
                command, cwd=BUILD, env={**self.environment(), **environment}, timeout=max(limit, 1.0),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
            print(text[-3000:], flush=True)
            return 124, f"stopped after {limit:.0f} s"
        print(done.stdout[-12000:] if done.returncode else done.stdout[-1500:], flush=True)
        return done.returncode, (done.stdout.strip().splitlines() or [""])[-1]

    def pytest(self, files: list[Path], chosen: str, limit: float) -> tuple[int, str]:
        # Compiling kernels takes longer than running them: use several processes if pytest-xdist is installed.
        workers = [] if self.dry or importlib.util.find_spec("xdist") is None else ["-n", "8"]
        where = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *workers, *where, "-k", chosen, *map(str, files)]
        return self.run(command, limit)


# ---- the parts ---------------------------------------------------------------------------------------------


def build(walk: Walk, limit: float) -> tuple[int, str]:
    SITE.mkdir(parents=True, exist_ok=True)
    options = "--quiet --no-build-isolation --no-deps --no-index --no-compile --upgrade"
    command = [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(SITE), str(ROOT)]
    return walk.run(command, limit)


def test(walk: Walk, limit: float) -> tuple[int, str]:
    """Run the op tests on the device, with Triton and CUDA C++ kernels; a dry run selects a few."""
    if walk.dry:
        files = [TESTS / "ops" / f"test_{family}.py" for family in ("kl", "td")]
        return walk.pytest(files, "(triton and test_kl) or (cuda and by_hand)", limit)
    system = ("dispatch", "testing", "layout", "cuda_kernels")
    files = [TESTS / "ops", *(TESTS / "system" / f"test_{name}.py" for name in system)]
    return walk.pytest(files, "triton or cuda", limit)


def device(walk: Walk, limit: float) -> tuple[int, str]:
    """Test that ops do not synchronise, can be captured, repeat bits and share kernels; skipped without a GPU."""
    return walk.pytest([TESTS / "system" / "test_device.py"], "test", limit)


def verify(walk: Walk, limit: float) -> tuple[int, str]:
    """Run ``rewardops verify``: every op on every backend of the device, against float64."""
    command = [sys.executable, "-m", "rewardops", "verify", "--quick"]
    return walk.run([*command, *(["--op", "token_kl"] if walk.dry else ["--device", "cuda"])], limit)


def sanitize(walk: Walk, limit: float) -> tuple[int, str]:
    """Run every CUDA C++ kernel under compute-sanitizer; in a dry run once in the harness, which checks as much."""
    script = [sys.executable, str(TESTS / "cuda_on_host" / "every_kernel.py")]
    if walk.dry:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            return 0, "not done: no C++ compiler"
        status, path = walk.run([sys.executable, str(TESTS / "cuda_on_host" / "build.py")], limit)
        return walk.run(script, limit, REWARDOPS_CUDA_ON_HOST=path) if status == 0 else (status, path)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return 0, "not done: there is no compute-sanitizer"
    summaries = []
    for check in ("memcheck", "racecheck"):
        options = ["--tool", check, "--error-exitcode", "66", "--kernel-regex", "kns=rewardops"]
        status, words = walk.run([tool, *options, *script, "--device", "cuda"], limit / 2)
        summaries.append(f"{check}: {words}")
        if status:
            return status, summaries[-1]
    return 0, "; ".join(summaries)


def timing(walk: Walk, limit: float) -> tuple[int, str]:
    """Time cases in a separate process that imports the built package; row by row, so that it can resume."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", "--out", str(walk.out)]
    if walk.dry:
        return walk.run([*command, "--dry"], limit, REWARDOPS_BACKEND="triton")
    return walk.run(command, limit)


Part = Callable[[Walk, float], "tuple[int, str]"]
# Each part with its time limit in seconds.
PARTS: dict[str, tuple[Part, float]] = {
    "build": (build, 150),
    "test": (test, 220),
    "device": (device, 90),
    "verify": (verify, 120),
    "sanitize": (sanitize, 120),
    "time": (timing, 300),
}


def base_name(walk: Walk) -> Path:
    """The path of the report, without its suffix."""
    if walk.dry:
        name = "dry"
    else:
        import torch

        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return walk.out / f"{name}-{time.strftime('%Y-%m-%d')}"


def measure(walk: Walk) -> None:
    """Time the cases of the README; ``python -m benchmarks run --full`` has all, which take hours.

    A dry run walks through one case of each family, since interpreted kernels are slow.
    """
    from benchmarks import cases, readme, report, run

    settings = run.Settings(
        device="cpu" if walk.dry else "cuda",
        sizes="tiny" if walk.dry else "full",
        runs=2 if walk.dry else 20,
        seconds=1.0 if walk.dry else 4.0,
        compiled=not walk.dry,
        backends=() if walk.dry else ("cuda,triton",),
    )
    first = [cases.names(family)[0] for family in cases.families()]
    items = run.plan(first if walk.dry else readme.HEADLINE, settings.sizes)
    if not walk.dry:
        many = [x for x in items if x.case.startswith("token_stats")]
        items += [replace(x, sizes=replace(x.sizes, tokens=MANY_TOKENS), swept="tokens") for x in many]
    path = base_name(walk).with_suffix(".json")
    measured = run.run_all(items, settings, out=path, say=say)
    path.with_suffix(".md").write_text(report.markdown(measured))
    print("\n" + report.markdown(measured))


# ---- the walk ----------------------------------------------------------------------------------------------


def _known(walk: Walk, fresh: bool) -> dict[str, Any]:
    """Results of earlier calls, if they had the same code and mode."""
    code = hashlib.sha256()
    for folder in ("csrc", "rewardops", "triton_kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                code.update(path.read_bytes())
    fresh_state = {"code": code.hexdigest(), "dry": walk.dry, "parts": {}}
    if fresh or not STATE.exists():
        return fresh_state
    known: dict[str, Any] = json.loads(STATE.read_text())
    return known if all(known.get(k) == fresh_state[k] for k in ("code", "dry")) else fresh_state


def _written(walk: Walk, known: dict[str, Any]) -> None:
    """Append the results of the parts to the report."""
    path = base_name(walk).with_suffix(".json")
    if not path.exists():
        return
    report = {**json.loads(path.read_text()), "qualification": known["parts"]}
    path.write_text(json.dumps(report, indent=1) + "\n")
    lines = ["", "| part | result | seconds | last words |", "|---|---|---|---|"]
    for name, part in known["parts"].items():
        words = part["words"].replace("|", "/")[:160]
        lines.append(f"| {name} | {part['result']} | {part['seconds']} | {words} |")
    page = path.with_suffix(".md")
    page.write_text(page.read_text().split("\n| part |")[0].rstrip("\n") + "\n" + "\n".join(lines) + "\n")
    say(f"wrote {path} and .md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="no GPU: tiny shapes, interpreted kernels")
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="do parts again that have passed")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    default = BUILD if options.dry else Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    walk = Walk(options.dry, (options.out or default).resolve())
    walk.out.mkdir(parents=True, exist_ok=True)
    if options.measure:
        measure(walk)
        return 0

    if not walk.dry:
        import torch

        if not torch.cuda.is_available():
            print("no GPU: torch.cuda.is_available() is false (--dry walks the script without one)")
            return 2
    begin = time.monotonic()
    known = _known(walk, options.fresh)
    if options.fresh:
        base_name(walk).with_suffix(".json").unlink(missing_ok=True)
    failed = []
    for name in options.part or PARTS:
        part, most = PARTS[name]
        if known["parts"].get(name, {}).get("result") == "ok" and not options.part:
            say(f"{name}: passed before")
            continue
        left = LIMIT - (time.monotonic() - begin)
        if left < 20 and not walk.dry:
            say(f"{name}: no time left; call again to go on")
            failed.append(name)
            continue
        say(name)
        start = time.monotonic()
        # A dry run may share its machine with a test suite.
        status, words = part(walk, 3 * most if walk.dry else min(most, left))
        result = "ok" if status == 0 else "stopped" if status == 124 else "FAILED"
        known["parts"][name] = {"result": result, "seconds": round(time.monotonic() - start), "words": words}
        STATE.write_text(json.dumps(known, indent=1) + "\n")
        if status:
            failed.append(name)
            if name == "build":
                break
    _written(walk, known)
    results = ", ".join(f"{name} {part['result']}" for name, part in known["parts"].items())
    say(f"{results}; {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
