"""The C++ module under AddressSanitizer and UndefinedBehaviorSanitizer: built, and fuzzed in a separate process.

``python tests/tools/sanitized.py`` takes the arguments of ``tests/tools/fuzz.py``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import compiled

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "sanitized"
MODULE = "REWARDOPS_SANITIZED_MODULE"  # for the child process: the path of the module


def runtimes() -> list[str]:
    """The sanitizer runtimes to preload; empty if the compiler has none."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    libraries = []
    for name in ("libasan.so", "libubsan.so") if compiler else ():
        path = subprocess.run(
            [str(compiler), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if os.path.isabs(path):
            libraries.append(path)
    return libraries if len(libraries) == 2 else []


def why_not() -> str | None:
    """The reason why the module cannot be built here; None if it can."""
    if not compiled.TOOLS:
        return "no cmake, or no ninja"
    return None if runtimes() else "the compiler has no address or undefined behaviour sanitizer"


def build(source: Path = ROOT, folder: Path = BUILD) -> Path:
    """Build the module under the sanitizers, with one instruction set: the same loops, as wide as with AVX-512."""
    isa = "avx2" if platform.machine() == "x86_64" else "portable"
    sanitize = "-DREWARDOPS_SANITIZE=address,undefined,float-cast-overflow"
    return compiled.build(folder, sanitize, f"-DREWARDOPS_ISAS={isa}", source=source)


def run(module: Path, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a Python command in which ``load`` finds the module; it ends at the first report."""
    env = {
        **os.environ,
        "LD_PRELOAD": os.pathsep.join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",  # leaks of torch and Python
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        MODULE: str(module),
    }
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=HERE, capture_output=True, text=True, timeout=timeout
    )


def load() -> None:
    """Use the module as ``rewardops._C``, before the first import."""
    spec = importlib.util.spec_from_file_location("rewardops._C", os.environ[MODULE])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["rewardops._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main(arguments: Sequence[str]) -> int:
    if MODULE in os.environ:
        load()
        import fuzz

        return fuzz.main(arguments)
    done = run(build(), __file__, *arguments, timeout=24 * 3600)
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
