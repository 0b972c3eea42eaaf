"""Build: the compiled module by CMake, and ``triton_kernels/`` as ``rewardops.triton_kernels``."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Build the extension with CMake; the build description is CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DREWARDOPS_MODULE_DIR={target.parent}",
            f"-DREWARDOPS_CUDA={os.environ.get('REWARDOPS_CUDA', '0')}",
            f"-DREWARDOPS_ISAS={os.environ.get('REWARDOPS_ISAS', '')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)

    def copy_file(self, infile: str, outfile: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """Copy the module into the checkout atomically: running processes may import it at any time."""
        made = f"{outfile}.tmp"
        shutil.copy2(infile, made)
        os.replace(made, outfile)
        return outfile, True


# One build at a time in a checkout, as builds share its build folder. The lock is on the checkout's directory.
checkout = os.open(ROOT, os.O_RDONLY)
fcntl.flock(checkout, fcntl.LOCK_EX)
try:
    # Not a top-level triton_kernels: Triton ships a package of that name, which other packages import.
    setup(
        packages=[*find_packages(include=["rewardops", "rewardops.*"]), "rewardops.triton_kernels"],
        package_dir={"rewardops.triton_kernels": "triton_kernels"},
        package_data={"rewardops": ["py.typed"]},
        ext_modules=[Extension("rewardops._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
finally:
    os.close(checkout)
