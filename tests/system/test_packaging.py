"""The wheel: built in isolation, complete, and without files that do not belong to it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(os.environ.get("REWARDOPS_OFFLINE")),
        reason="REWARDOPS_OFFLINE: an isolated build downloads its tools",
    ),
]


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist (which tests that it is complete) in an environment without torch."""
    out = tmp_path_factory.mktemp("dist")
    # Without CUDA C++, which takes minutes; the development install has it.
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out, REWARDOPS_CUDA="0")
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment with the wheel, and with torch and Triton on its path."""
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", home, cwd=home)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A plain path entry does not follow the development install of this package there.
    (site / "torch_from_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rewardops", next(t for t in tops if t.endswith(".dist-info"))}
    assert "triton_kernels" not in tops
    assert not [n for n in names if "test_" in n or "conftest" in n or n.endswith((".cpp", ".h"))]
    modules = [*(ROOT / "rewardops").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]
    for path in modules:
        name = path.relative_to(ROOT).as_posix()
        assert (name if name.startswith("rewardops/") else f"rewardops/{name}") in names
    assert any(n.startswith("rewardops/_C.") for n in names)
    assert "rewardops/py.typed" in names


CODE = """
import torch, rewardops
from importlib.util import find_spec
stats = rewardops.token_stats(torch.randn(4, 9), torch.arange(4))
assert rewardops.group_advantages(torch.tensor([1.0, 0.0]), group_size=2).tolist()[0] > 0.7
print(rewardops.__file__)
print(find_spec("rewardops.triton_kernels") is not None)
rewardops.show_config()
"""


def test_imports_from_any_directory(python, tmp_path):
    out = run(python, "-c", CODE, cwd=tmp_path)
    assert str(python.parents[1]) in out.splitlines()[0]
    assert out.splitlines()[1] == "True"
    assert "kernels" in next(line for line in out.splitlines() if line.strip().startswith("cpp:"))
    assert "cpu ops: cpp" in out


def test_works_without_the_compiled_module(python, tmp_path):
    (module,) = python.parents[1].glob("lib/python*/site-packages/rewardops/_C.*.so")
    aside = module.with_suffix(".aside")
    module.rename(aside)
    try:
        out = run(python, "-c", CODE, cwd=tmp_path)
    finally:
        aside.rename(module)
    assert "cpp: not built" in out
    assert "cpu ops: reference" in out


def test_licence_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch>=2.8" in text
    assert any(n.endswith("LICENSE") for n in archive.namelist())
