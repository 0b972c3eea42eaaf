"""Devices that are neither CPUs nor CUDA's: every op runs on the reference, in float32 where float64 is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewardops
from rewardops.core import dispatch, precision

TOY = Path(__file__).resolve().parents[1] / "tools" / "toy_device.py"


def test_every_op_runs_on_a_device_without_float64():
    """In a process of its own, as PyTorch takes one such device per process."""
    run = subprocess.run([sys.executable, str(TOY)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


@pytest.mark.parametrize("key", ["MPS", "XPU", "HPU", "PrivateUse1"])
def test_every_op_has_a_kernel(key):
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    missing = [op for op in torch.ops.rewardops if not has(f"rewardops::{op}", key)]
    assert not missing


def test_the_reference_serves_them():
    assert dispatch.backend_for("mps") == "reference"
    with (
        rewardops.use_backend("cpp"),
        pytest.raises(rewardops.BackendUnavailable, match="serves CPU tensors"),
    ):
        dispatch.backend_for("mps")


def test_float64_is_replaced_by_float32():
    with precision.InFloat32():
        made = torch.zeros(2, dtype=torch.float64), torch.zeros(2).double(), torch.zeros(2).to(torch.float64)
    assert {x.dtype for x in made} == {torch.float32}
    assert torch.zeros(2).double().dtype is torch.float64
