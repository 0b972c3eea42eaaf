"""The kernels in CUDA C++ as a whole: machine code without spills, and runs without sanitizer reports.

Their results are tested with the families, by the `target` fixture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import torch
from conftest import THOROUGH
from cuda_on_host import build as cuda_on_host

import rewardops
from rewardops.core import native

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "cuda_on_host"


# ---- machine code ------------------------------------------------------------------------------------------


def disassembler() -> Path:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("Triton brings no cuobjdump here")
    return tool


@pytest.fixture(scope="module")
def module() -> Path:
    """The compiled module with the kernels of all architectures, as ``REWARDOPS_CUDA=1`` builds it."""
    built = native.compiled_module()
    if built is not None and hasattr(built, "cuda"):
        return Path(built.__file__)
    if not (shutil.which("nvcc") and compiled.TOOLS):
        pytest.skip("no nvcc, cmake or ninja")
    # The code for the host is left unoptimised, which takes a tenth of the time; that for devices is as released.
    unoptimised = "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0 -w", "-DCMAKE_CUDA_FLAGS=-DNDEBUG"
    return compiled.build(
        ROOT / "build" / "cuda", "-DREWARDOPS_CUDA=1", "-DREWARDOPS_ISAS=portable", *unoptimised
    )


def dump(module: Path, *options: str) -> str:
    tool = disassembler()
    env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # the tool calls nvdisasm
    return subprocess.run(
        [str(tool), *options, str(module)], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_no_kernel_spills(module):
    text = dump(module, "--dump-resource-usage")
    by_target = {}
    for part in text.split("Fatbin elf code:")[1:]:
        target = re.search(r"arch = (sm_\d+)", part).group(1)
        for name, stack, local in re.findall(r"Function (\w+):\n.*?STACK:(\d+).*?LOCAL:(\d+)", part):
            by_target.setdefault(target, {})[name] = int(stack) + int(local)
    if "CUDAARCHS" not in os.environ:
        assert set(by_target) == {"sm_80", "sm_90", "sm_100"}
    for target, kernels in by_target.items():
        assert len(kernels) > 20, target
        assert not [name for name, stack in kernels.items() if stack], target
    assert len({frozenset(kernels) for kernels in by_target.values()}) == 1


def test_tokens_are_moved_sixteen_bytes_at_a_time(module):
    text = dump(module, "--dump-sass", "-arch", "sm_90")
    for function in text.split("Function : ")[1:]:
        name = function.split("\n", 1)[0]
        if re.search("scan_kernel|nodes_to_tokens|token_stats_and_grad|group_advantages_kernel", name):
            assert re.search(r"STG\.E[.\w]*\.128", function), name
        if re.search("scan_kernel|token_stats_and_grad|places", name):
            assert re.search(r"LDG(STS)?\.E[.\w]*\.128", function), name


# ---- sanitizers --------------------------------------------------------------------------------------------


def runtime(sanitizer: str) -> str:
    name = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
    if cuda_on_host.COMPILER is None:
        pytest.skip("no C++ compiler")
    library = subprocess.run(
        [cuda_on_host.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    return library


def run_under(sanitizer: str, *command: str) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "LD_PRELOAD": runtime(sanitizer),
        "REWARDOPS_CUDA_ON_HOST": str(cuda_on_host.build(sanitizer)),
        # Torch and Python are not built for the sanitizer: ignore their reports.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        done = subprocess.run(
            ["setarch", "-R", *command], env=env, capture_output=True, text=True, timeout=600
        )
    return done


@pytest.mark.slow
@pytest.mark.parametrize("family", ["returns", "prefix_trees", "advantages", "logits"])
@pytest.mark.parametrize("sanitizer", ["thread", "address"] if THOROUGH else ["thread"])
def test_every_kernel_under(sanitizer, family):
    forms = ["--all"] if THOROUGH else []
    done = run_under(sanitizer, sys.executable, str(HERE / "every_kernel.py"), family, *forms)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[:3000]
    assert "every kernel ran" in done.stdout
    assert "Sanitizer" not in done.stderr


# ---- chosen by name ----------------------------------------------------------------------------------------


def test_cuda_alone_serves_what_it_has(target_cuda):
    rewards = torch.tensor([[1.0, 2.0, 3.0]], device=target_cuda)
    with rewardops.use_backend("cuda"):
        assert rewardops.discounted_returns(rewards).tolist() == [[6.0, 5.0, 3.0]]
        assert rewardops.min_returns(rewards).tolist() == [[1.0, 2.0, 3.0]]
        with pytest.raises(
            rewardops.BackendUnavailable, match=r"'cuda' cannot serve token_kl .* no kernel for it"
        ):
            rewardops.token_kl(rewards, rewards)
    with rewardops.use_backend("cuda,reference"):
        assert not rewardops.token_kl(rewards, rewards).any()


def test_what_was_asked_first_does_not_stay(monkeypatch, target_cuda):
    """The module is looked up by its current path, even if `show_config` has already looked it up."""
    here = native.cuda_module()
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("REWARDOPS_CUDA_ON_HOST", raising=False)
        rewardops.show_config()
    assert native.cuda_module() is here


def test_a_launch_that_fails_names_the_kernel(target_cuda):
    x = torch.ones(1, 4, device=target_cuda)
    shape, row = (1, 4, 0, 0, True), (x.data_ptr(), 4)
    nothing = (0, 0)
    with pytest.raises(RuntimeError, match="td_scan: "):
        native.cuda_module().td_scan_f32(
            shape, 4, nothing, (row, *[nothing] * 5), (0, 0, 0), 1.0, 1.0, False, False, (row, nothing), 0,
            0, 2048, 0, 0,
        )  # fmt: skip
