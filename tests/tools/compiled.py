"""Builds of the compiled module by CMake, in folders of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str | None:
    """The path of a program in this environment, or in the system."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


TOOLS = tool("cmake") and tool("ninja")


def build(folder: Path, *options: str, source: Path = ROOT) -> Path:
    """Build the module of a checkout, recompiling changed sources; safe to call from several processes at once."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        str(tool("cmake")), "-S", str(source), "-B", str(folder), "-G", "Ninja", *options,
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DREWARDOPS_MODULE_DIR={folder / 'module'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [str(tool("cmake")), "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(" ".join(command) + "\n" + (done.stdout + done.stderr)[-8000:])
    (module,) = (folder / "module").glob("_C.*.so")
    return module
