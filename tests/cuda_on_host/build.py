"""The CUDA C++ kernels and launchers of csrc/cuda, compiled as C++ by the harness: a module that runs them on CPUs.

``python tests/cuda_on_host/build.py [thread|address]`` builds the module, optionally with a sanitizer, and prints
its path, for ``REWARDOPS_CUDA_ON_HOST``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
         "-Wno-unknown-pragmas"]  # fmt: skip


def _sources() -> list[Path]:
    cuda = ROOT / "csrc" / "cuda"
    return [*sorted(cuda.glob("*.cu")), cuda / "bindings.cpp", HERE / "module.cpp"]


def build(sanitizer: str = "") -> Path:
    """Compile changed sources; safe to call from several processes at once."""
    import pybind11

    includes = [HERE / "include", ROOT / "csrc" / "include", ROOT / "csrc", pybind11.get_include(),
                sysconfig.get_path("include")]  # fmt: skip
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    headers = [
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "csrc").rglob("*.cuh"),
        *HERE.rglob("*.h"),
        HERE / "include",
    ]
    common = hashlib.sha256(" ".join([COMPILER or "", *flags]).encode())
    for header in sorted(h for h in headers if h.is_file()):
        common.update(header.read_bytes())
    out = ROOT / "build" / "cuda_on_host" / (sanitizer or "plain")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs: list[tuple[Path, Path]] = []
        for source in _sources():
            key = common.copy()
            key.update(source.read_bytes())
            jobs.append((source, out / f"{source.stem}_{key.hexdigest()[:16]}.o"))

        def compile_one(job: tuple[Path, Path]) -> None:
            source, target = job
            if not target.exists():
                temporary = target.with_suffix(".tmp")
                _run(str(COMPILER), *flags, "-x", "c++", "-c", str(source), "-o", str(temporary))
                temporary.rename(target)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, jobs))
        objects = [str(target) for _, target in jobs]
        module = out / f"cuda_on_host_{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
        if not module.exists():
            temporary = module.with_suffix(".tmp")
            link = ["-shared", "-pthread", *([f"-fsanitize={sanitizer}"] if sanitizer else [])]
            _run(str(COMPILER), *link, *objects, "-o", str(temporary))
            temporary.rename(module)
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(command) + "\n" + done.stderr[-8000:])


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
