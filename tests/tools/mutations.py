"""Plant the faults of `faults.py` in a copy of the checkout, one at a time, and run the tests that should catch it.

    python tests/tools/mutations.py [--list] [--only SUBSTRING] [--markdown FILE]

A fault is caught when a test's assertion fails; a fault that no test catches is a gap in the suite. A run without
a verdict (missing text, code that does not compile, tests that crash or time out) proves nothing, and is an error
of the list. Everything runs on the CPU: Triton interpreted, CUDA C++ by `tests/cuda_on_host`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0  # seconds for a build or a test run
LEFT_OUT = ("build", "dist", "__pycache__", "*.egg-info", "*.so", ".*")
# Text in pytest's summary of a failed assertion, as opposed to another exception.
SEEN = re.compile(
    r"^FAILED (?P<test>.+?) - (assert |AssertionError|Failed: DID NOT RAISE|.*GradcheckError)", re.M
)


class FaultyList(Exception):
    """A fault cannot be judged, because of the list of faults or the unchanged checkout."""


class Outcome(NamedTuple):
    """The outcome of a fault.

    ``caught_by``: the first failing test, None if the fault survived. ``error``: why it was not judged.
    """

    fault: Fault
    caught_by: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return "error: " + self.error.splitlines()[0]
        return "SURVIVED" if self.caught_by is None else f"caught by {self.caught_by}"


def planted(source: str, fault: Fault) -> str:
    """The file's text with the fault in it."""
    count = source.count(fault.text)
    if count != 1:
        raise FaultyList(
            f"{fault.file} has the text of '{fault.name}' {count} times, want once: {fault.text!r}"
        )
    return source.replace(fault.text, fault.instead)


class Copy:
    """A copy of the checkout for planting faults; Python imports the package of the copy there."""

    def __init__(self, folder: Path) -> None:
        self.root, self.build = folder / "checkout", folder / "build"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        # An editable install points to the original checkout.
        link = self.root / "rewardops" / "triton_kernels"
        if not link.exists():
            link.symlink_to("../triton_kernels")
        # Without bytecode files, none can be stale.
        settings = {
            "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400",
            "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1",
        }  # fmt: skip
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("REWARDOPS_", "PYTEST_"))}
        self.env = inherited | settings
        self.check_imports()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, cwd=self.root, env=self.env, timeout=LIMIT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise FaultyList(f"{' '.join(command)} took more than {LIMIT:.0f} seconds") from None

    def must(self, *command: str) -> str:
        done = self.run(*command)
        if done.returncode:
            raise FaultyList(f"{' '.join(command)} failed\n{done.stdout[-4000:]}")
        return done.stdout

    def check_imports(self) -> None:
        code = "import rewardops, rewardops.triton_kernels as t; print(rewardops.__file__, t.__file__, sep='\\n')"
        for origin in self.must(sys.executable, "-c", code).splitlines()[-2:]:
            if not Path(origin).is_relative_to(self.root):
                raise FaultyList(f"the tests of {self.root} would import {origin}")

    def compile(self) -> None:
        """Compile changed sources of the C++ module, unoptimised, which takes a tenth of the time."""
        import pybind11

        if not self.build.exists():
            self.must(
                "cmake", "-S", ".", "-B", str(self.build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None",
                "-DCMAKE_CXX_FLAGS=-O0 -w", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DREWARDOPS_CUDA=0",
                f"-DREWARDOPS_MODULE_DIR={self.root / 'rewardops'}",
            )  # fmt: skip
        self.must("cmake", "--build", str(self.build))

    def compile_on_host(self) -> None:
        self.must(sys.executable, "tests/cuda_on_host/build.py")

    def prepare(self, faults: Iterable[Fault]) -> None:
        """Compile what these faults need, with earlier faults removed; skip what is up to date."""
        if self.build.exists() or any(f.compiled for f in faults):
            self.compile()
        if any(f.on_host for f in faults):
            self.compile_on_host()

    def test(self, file: str, select: str) -> subprocess.CompletedProcess[str]:
        options = ("-x", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider")
        return self.run(sys.executable, "-m", "pytest", *options, file, "-k", select)

    def must_pass(self, faults: list[Fault]) -> None:
        """Check that the tests of all faults pass in the unchanged copy: otherwise a failure shows nothing."""
        for file in dict.fromkeys(f.tests for f in faults):
            selects = dict.fromkeys(f.select for f in faults if f.tests == file)
            done = self.test(file, " or ".join(f"({s})" for s in selects))
            if done.returncode:
                raise FaultyList(f"{file} does not pass without a fault\n{done.stdout[-4000:]}")

    def judge(self, fault: Fault) -> Outcome:
        """Plant a fault, run its tests, remove it."""
        path = self.root / fault.file
        source = path.read_text()
        try:
            path.write_text(planted(source, fault))
            self.prepare([fault])
            return verdict(fault, self.test(fault.tests, fault.select))
        except FaultyList as error:
            return Outcome(fault, error=str(error))
        finally:
            path.write_text(source)


def verdict(fault: Fault, done: subprocess.CompletedProcess[str]) -> Outcome:
    """The outcome from a test run with a planted fault."""
    seen = SEEN.search(done.stdout)
    if done.returncode == 1 and seen:
        return Outcome(fault, caught_by=seen["test"])
    if done.returncode == 0 and re.search(r"\d+ passed", done.stdout):
        return Outcome(fault)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    why = f"pytest ended with {done.returncode}, and no assertion failed: {last}"
    return Outcome(fault, error=f"{why}\n{done.stdout[-4000:]}")


# ---- the report --------------------------------------------------------------------------------------------

HEAD = """\
# Faults that the tests catch

A test suite is trusted for what it would catch. `tests/tools/mutations.py` plants small faults, of the kind that a
careful author might make, in a copy of the checkout, one at a time, and runs the tests that should see each:

```
python tests/tools/mutations.py                               # all of them, in some minutes on two cores
python tests/tools/mutations.py --only segments               # those whose name, kind, file or tests have the word
python tests/tools/mutations.py --markdown docs/mutations.md  # all of them, and write this page
```

The same tests pass first without a fault. A fault is caught where the assertion of a test fails; a test that
crashes, or code that no longer compiles, does not count. The list is `tests/tools/faults.py`: a new kernel gets an
entry there. `tests/system/test_mutations.py` holds the list to the sources, and this page to the list.

"""


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | kind | where | caught by |", "|---|---|---|---|"]
    for o in outcomes:
        test = (o.caught_by or "").partition("::")[2]
        by = f"`{test}`" if o.caught_by else "**nothing**" if o.error is None else "**not judged**"
        lines.append(f"| {o.fault.name} | {o.fault.kind} | `{o.fault.file}` | {by} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="only name the faults")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="of a fault's name, kind, file or tests"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where the table is written")
    args = parser.parse_args()
    if args.markdown and args.only:
        parser.error("--markdown: got --only as well, want all faults in the table")
    faults = [f for f in FAULTS if args.only in " ".join((f.name, f.kind, f.file, f.tests))]
    if not faults:
        parser.error(f"--only: got {args.only!r}, which is in none of the {len(FAULTS)} faults")
    if args.list:
        print("\n".join(f"{f.kind}: {f.name} ({f.file})" for f in faults))
        return 0
    for fault in faults:
        planted((ROOT / fault.file).read_text(), fault)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="rewardops-mutations-") as folder:
        copy = Copy(Path(folder))
        print(f"{len(faults)} faults; the tests without any ...", flush=True)
        start = time.monotonic()
        copy.prepare(faults)
        copy.must_pass(faults)
        print(f"... pass ({time.monotonic() - start:.0f} s)", flush=True)
        for k, fault in enumerate(faults, 1):
            start = time.monotonic()
            outcome = copy.judge(fault)
            outcomes.append(outcome)
            took = time.monotonic() - start
            print(f"[{k}/{len(faults)}] {fault.kind}: {fault.name}: {outcome} ({took:.0f} s)", flush=True)
            if outcome.error:
                print(outcome.error)
    if args.markdown:
        args.markdown.write_text(HEAD + table(outcomes))
    missed = [o for o in outcomes if not o.caught_by]
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught")
    for outcome in missed:
        print(f"  not: {outcome.fault.name} ({outcome.fault.file})")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FaultyList as error:
        sys.exit(f"mutations: {error}")
