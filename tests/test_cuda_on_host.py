"""The harness that runs CUDA C++ kernels on the CPU: it computes what a GPU would, and finds what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
RIGHT = ("sum", "scan", "votes", "chain", "cluster")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compile the examples, once per sanitizer; skip where it cannot run."""
    made: dict[str, Path] = {}

    def make(sanitizer: str = "") -> Path:
        if sanitizer not in made:
            out = tmp_path_factory.mktemp("cuda_on_host") / f"examples_{sanitizer}"
            flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
            flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
            command = [COMPILER, *flags, "-o", str(out), str(HERE / "examples.cpp")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and sanitizer and "cannot find" in done.stderr:
                pytest.skip(f"the compiler has no {sanitizer} sanitizer")
            assert done.returncode == 0, done.stderr[-3000:]
            made[sanitizer] = out
        return made[sanitizer]

    return make


def run(program: Path, case: str) -> subprocess.CompletedProcess:
    command = [str(program), case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        # Some kernels place a process where the sanitizer keeps its shadow.
        if shutil.which("setarch") is None:
            pytest.skip("the sanitizer cannot run under this system's address layout")
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=120)
    return done


@pytest.mark.parametrize("sanitizer", ["", "thread", "address"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(build, case, sanitizer):
    """Shared memory, shuffles, votes, counting barriers, atomics, blocks in order and in clusters."""
    done = run(build(sanitizer), case)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "ok\n"
    assert "Sanitizer" not in done.stderr


@pytest.mark.parametrize("case", ["race", "cluster_race"])
def test_a_missing_barrier_is_a_race(build, case):
    done = run(build("thread"), case)
    assert "data race" in done.stderr
    assert f"{case}_kernel" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("left", "a thread left its block at a __syncthreads"),
        ("left_warp", "a thread left its warp at a shuffle, vote or __syncwarp"),
        ("lane", "a lane is not in the mask that it calls with"),
    ],
)
def test_a_thread_that_is_waited_for_in_vain(build, case, message):
    """It neither hangs nor goes unnoticed, whichever of the threads comes first."""
    for _ in range(5):
        done = run(build(), case)
        assert done.returncode != 0
        assert message in done.stderr


def test_an_access_out_of_bounds(build):
    done = run(build("address"), "bounds")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "bounds_kernel" in done.stderr
