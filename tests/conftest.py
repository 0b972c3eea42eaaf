"""Every op test runs over every backend: `backend` is the name, `device` where its tensors live."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# `make thorough`: slow variants that seldom find more than the others.
THOROUGH = os.environ.get("REWARDOPS_THOROUGH", "0") not in ("", "0")
# Triton decides at a kernel's definition whether it is interpreted: set this before any kernel is imported.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings  # noqa: E402

from rewardops.core import dispatch  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(2)


class Target(NamedTuple):
    """A backend, or several in order of preference, and the device under test."""

    backend: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """True for GPU kernels on the CPU: small inputs suffice, as their blocks are small too."""
        return self.device.type == "cpu" and self.backend.startswith(("triton", "cuda"))


def _case(backend: str, device: str, why: str | None) -> object:
    return pytest.param(
        Target(backend, torch.device(device)),
        id=f"{backend.partition(',')[0]}-{device}",
        marks=[] if why is None else pytest.mark.skip(reason=why),
    )


GPU = "cuda" if HAS_GPU else "cpu"
TARGETS = [
    _case("reference", "cpu", None),
    _case("cpp", "cpu", dispatch.unavailable("cpp", "cpu")),
    _case("triton", GPU, None if importlib.util.find_spec("triton") else "no triton"),
]
# The harness of CUDA C++, and modules without tests.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "tools")]
if not HAS_GPU and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.hasten()
# For ops with kernels in CUDA C++; the reference serves the other ops of a function.
from cuda_on_host import build as cuda_on_host  # noqa: E402

NO_CUDA = "no C++ compiler" if cuda_on_host.COMPILER is None else None
CUDA_TARGET = _case("cuda,reference", GPU, dispatch.unavailable("cuda", "cuda") if HAS_GPU else NO_CUDA)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise tests with a `target` by backend; CUDA C++ only in modules with `CUDA = True`."""
    if "target" in metafunc.fixturenames:
        cuda = [CUDA_TARGET] if getattr(metafunc.module, "CUDA", False) else []
        metafunc.parametrize("target", TARGETS + cuda, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that have slow tests: at the end, the other processes would wait for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


_cuda_on_host_module = functools.cache(cuda_on_host.build)


def run_cuda_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CUDA C++ kernels serve CPU tensors through the harness, during one test."""
    if "REWARDOPS_CUDA_ON_HOST" not in os.environ:
        monkeypatch.setenv("REWARDOPS_CUDA_ON_HOST", str(_cuda_on_host_module()))


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each backend in turn, forced for the whole test."""
    if request.param.backend.startswith("cuda") and not HAS_GPU:
        run_cuda_on_host(monkeypatch)
    with dispatch.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def target_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the kernels in CUDA C++."""
    target = CUDA_TARGET.values[0]
    if why := CUDA_TARGET.marks:
        pytest.skip(why[0].kwargs["reason"])
    if not HAS_GPU:
        run_cuda_on_host(monkeypatch)
    return target.device


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded pairs and real rollouts, outside the project."""
    folder = Path(os.environ.get("REWARDOPS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"recorded data not found at {folder} (set REWARDOPS_SHARED)")
    return folder
