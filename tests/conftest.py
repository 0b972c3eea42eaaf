"""Every op test runs over every backend: `backend` is the name, `device` where its tensors live."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Triton decides at the definition of a kernel whether it is interpreted, so before anything imports one.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings  # noqa: E402

from rewardops import dispatch  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(2)


class Target(NamedTuple):
    """A backend and the device that it is tested on."""

    backend: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """Triton on the CPU: small inputs will do, its blocks are small as well."""
        return self.backend == "triton" and self.device.type == "cpu"


def _targets() -> list:
    cases = [
        ("reference", "cpu", None),
        ("cpp", "cpu", dispatch.unavailable("cpp", "cpu")),
        ("triton", "cuda" if HAS_GPU else "cpu", None if importlib.util.find_spec("triton") else "no triton"),
    ]
    return [
        pytest.param(
            Target(name, torch.device(device)),
            id=f"{name}-{device}",
            marks=[] if why is None else pytest.mark.skip(reason=why),
        )
        for name, device, why in cases
    ]


@pytest.fixture(params=_targets())
def target(request: pytest.FixtureRequest):
    """Each backend in turn, forced for the whole test."""
    with dispatch.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded pairs and real rollouts, which lies beside the project and not in it."""
    folder = Path(os.environ.get("REWARDOPS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"recorded data not found at {folder} (set REWARDOPS_SHARED)")
    return folder
