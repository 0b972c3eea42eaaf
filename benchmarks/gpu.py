"""``python -m benchmarks.gpu``: build, test and time on a GPU, with what a bare GPU machine has.

Needs a checkout, a python3 with torch, Triton, pybind11, setuptools, pytest and hypothesis, cmake, ninja;
no network. Nothing is installed into the environment: the package is built into ``build/gpu``.
Writes ``<gpu>-<date>.json`` and ``.md`` to ``--out``, ``$OUT`` or ``benchmarks/results``.

``--dry`` walks the same steps on the CPU, on tiny shapes and with interpreted kernels; its figures mean
nothing and are written to ``build/gpu`` alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def environment(dry: bool) -> dict[str, str]:
    """The built package first, then the checkout for its benchmarks; never the checkout's own package."""
    paths = [str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # cmake and ninja may be this environment's, which need not have been activated.
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = {
        **os.environ,
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONUNBUFFERED": "1",
        "REWARDOPS_OFFLINE": "1",
    }
    if dry:
        # CUDA C++ takes minutes to build, and nothing here would run it.
        found.update(
            TRITON_INTERPRET="1", REWARDOPS_BACKEND="triton", CUDA_VISIBLE_DEVICES="", REWARDOPS_CUDA="0"
        )
    return found


def run(command: list[str], dry: bool, limit: float) -> int:
    """Run in ``build/gpu``, where no package of the checkout shadows the built one."""
    try:
        return subprocess.run(command, cwd=BUILD, env=environment(dry), timeout=limit).returncode
    except subprocess.TimeoutExpired:
        say(f"stopped after {limit:.0f} s")
        return 124


def build(dry: bool) -> int:
    SITE.mkdir(parents=True, exist_ok=True)
    options = "--quiet --no-build-isolation --no-deps --no-index --no-compile --upgrade"
    command = [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(SITE), str(ROOT)]
    return run(command, dry, 180)


def test(dry: bool) -> int:
    """The op tests on the device, with Triton kernels; in a dry run one family's, by the interpreter."""
    families = ("logits", "kl", "advantages", "entropy", "returns", "prefix_tree", "prefix_values", "tree")
    families = ("kl",) if dry else families
    files = [str(ROOT / "tests" / f"test_{f}.py") for f in families]
    if not dry:
        files += [str(ROOT / "tests" / f"test_{f}.py") for f in ("dispatch", "layout")]
    # Compiling kernels takes longer than running them: several processes, where pytest-xdist is there.
    workers = [] if dry or importlib.util.find_spec("xdist") is None else ["-n", "8"]
    where = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider"]
    command += [*workers, *where, *files]
    return run(command, dry, 200)


def measure(dry: bool, out: Path) -> None:
    """Time the cases of the README, in a process of its own, in which the built package is imported.

    All cases take longer than a machine is lent for: ``python -m benchmarks run --full`` has them. A dry run walks
    through one of each family, since interpreted kernels are slow.
    """
    import torch

    from benchmarks import case, readme, report, run

    settings = run.Settings(
        device="cpu" if dry else "cuda",
        sizes="tiny" if dry else "full",
        runs=2 if dry else 20,
        seconds=1.0 if dry else 4.0,
        compiled=not dry,
    )
    name = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    base = out / f"{name}-{time.strftime('%Y-%m-%d')}"
    first = [case.names(family)[0] for family in case.families()]
    items = run.plan(first if dry else readme.HEADLINE, settings.sizes)
    found = run.run_all(items, settings, out=base.with_suffix(".json"), fresh=True, say=say)
    base.with_suffix(".md").write_text(report.markdown(found))
    print("\n" + report.markdown(found))
    say(f"wrote {base}.json and .md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="no GPU: tiny shapes, interpreted kernels")
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    default = BUILD if options.dry else Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out = (options.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.measure:
        measure(options.dry, out)
        return 0

    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("no GPU: torch.cuda.is_available() is false (--dry walks the script without one)")
            return 2
    begin = time.monotonic()
    say("build")
    if build(options.dry):
        return 1
    say("test")
    tested = test(options.dry)
    say("time")
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", "--out", str(out)]
    timed = run(command + (["--dry"] if options.dry else []), options.dry, 240)
    say(
        f"build ok, tests {'ok' if tested == 0 else 'FAILED'}, "
        f"timing {'ok' if timed == 0 else 'FAILED'}, {time.monotonic() - begin:.0f} s"
    )
    return 1 if tested or timed else 0


if __name__ == "__main__":
    sys.exit(main())
