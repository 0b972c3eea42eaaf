"""The harness that runs CUDA C++ kernels on the CPU: its results equal those of a GPU, and it detects faults."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", str(HERE / "include")]
RIGHT = ("sum", "scan", "votes", "chain", "cluster", "copy", "relay", "poll", "launch", "launch_cluster",
         "functions")  # fmt: skip

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compile the examples, on fibers or (with a sanitizer) on threads; skip if that cannot run here."""
    libraries: dict[str, Path] = {}

    def make(sanitizer: str = "") -> Path:
        if sanitizer not in libraries:
            out = tmp_path_factory.mktemp("cuda_on_host") / f"examples_{sanitizer}"
            # With fortification, longjmp aborts on a change of stack.
            flags = ["-O1", f"-fsanitize={sanitizer}"] if sanitizer else ["-O2", "-D_FORTIFY_SOURCE=2"]
            command = [COMPILER, *FLAGS, *flags, "-o", str(out), str(HERE / "examples.cpp")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode and sanitizer and "cannot find" in done.stderr:
                pytest.skip(f"the compiler has no {sanitizer} sanitizer")
            assert done.returncode == 0, done.stderr[-3000:]
            libraries[sanitizer] = out
        return libraries[sanitizer]

    return make


def run(program: Path, case: str) -> subprocess.CompletedProcess:
    command = [str(program), case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        # Some Linux kernels map a process over the sanitizer's shadow memory.
        if shutil.which("setarch") is None:
            pytest.skip("the sanitizer cannot run under this system's address layout")
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=120)
    return done


@pytest.mark.parametrize(
    "sanitizer", ["", *(pytest.param(s, marks=pytest.mark.slow) for s in ("thread", "address"))]
)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(build, case, sanitizer):
    """Shared memory, shuffles, votes, counting barriers, atomics, blocks in order and in clusters, launches."""
    done = run(build(sanitizer), case)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "ok\n"
    assert "Sanitizer" not in done.stderr


def test_numbers_of_16_bits(build):
    assert run(build(), "numbers").stdout == "ok\n"


@pytest.mark.slow
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
    """A barrier that one thread never reaches is reported and does not hang, in any order of threads."""
    for _ in range(5):
        done = run(build(), case)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.mark.parametrize(
    ("case", "sanitizer", "message"),
    [
        ("deadlock", "", "a deadlock: all threads that are left wait"),
        pytest.param(
            "deadlock", "address", "a deadlock: all threads that are left wait", marks=pytest.mark.slow
        ),
        ("poll_in_vain", "", "threads poll for what nobody writes"),
    ],
)
def test_threads_that_wait_for_one_another(build, case, sanitizer, message):
    done = run(build(sanitizer), case)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_an_access_out_of_bounds(build):
    done = run(build("address"), "bounds")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "bounds_kernel" in done.stderr


def test_a_launcher_as_it_is(tmp_path):
    """A launcher in a shared object works with either engine, and with both in one process."""
    width, rows = 700, 3
    ones = (ctypes.c_uint16 * (width * rows))(*[0x3F80] * (width * rows))
    for engine in ("", "-DCUDA_ON_HOST_THREADS"):
        library = tmp_path / f"launcher{engine}.so"
        flags = [*FLAGS, "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", *engine.split()]
        command = [COMPILER, *flags, "-o", str(library), "-x", "c++", str(HERE / "launcher.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        launch = ctypes.CDLL(str(library)).sum_rows_bf16
        for _ in range(2):
            out, count = (ctypes.c_float * rows)(), ctypes.c_uint(9)
            assert launch(ones, out, ctypes.byref(count), rows, width, None) == 0
            assert list(out) == [width] * rows
            assert count.value == rows
        assert launch(ones, out, ctypes.byref(count), 0, width, None) == 9  # no blocks


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_compiles_the_same_launcher(tmp_path):
    out = tmp_path / "launcher.o"
    command = [NVCC, "-std=c++17", "-arch=sm_90", "-c", "-o", str(out), str(HERE / "launcher.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
