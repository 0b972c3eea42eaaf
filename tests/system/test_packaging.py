"""The sdist and the wheel: built in isolation, complete, without other files, and usable on older systems."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from once import once

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel: wheels for Linux"),
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
def dist(tmp_path_factory) -> Path:
    """The folder of an sdist and the wheel built from it (a test that it is complete), without torch."""

    def made():
        out = tmp_path_factory.mktemp("dist")
        # With the environment of this interpreter, which is not installed anew.
        environment = [f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
        run("make", "-C", ROOT, *environment, "wheel", f"DIST={out}", cwd=out)
        return str(out)

    return Path(once(tmp_path_factory, "dist", made))


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment with the wheel, and with torch and Triton on its path."""
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", home, cwd=home)
    python = home / "bin" / "python"
    # Without a PATH, on which compilers and cmake would be found.
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home, PATH="")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A plain path entry does not follow the development install of this package there.
    (site / "torch_from_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_files_of_a_release(dist, wheel):
    (sdist,) = dist.glob("*.tar.gz")
    assert {path.name for path in dist.iterdir()} == {wheel.name, sdist.name}
    assert wheel.name.endswith(f"-manylinux_2_28_{platform.machine()}.whl")
    assert wheel.stat().st_size < 2e6
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "CMakeLists.txt",
        "LICENSE",
        "CHANGELOG.md",
        "csrc/bindings.cpp",
        "triton_kernels/kl.py",
    } <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_the_module_needs_no_newer_system(wheel):
    from elftools.elf.elffile import ELFFile

    archive = zipfile.ZipFile(wheel)
    (module,) = (name for name in archive.namelist() if name.endswith(".so"))
    elf = ELFFile(BytesIO(archive.read(module)))
    libraries = {
        tag.needed.split(".")[0] for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
    }
    assert libraries <= {
        "libc",
        "libm",
        "libpthread",
        "libgcc_s",
        f"ld-linux-{platform.machine()}",
        "ld-linux-x86-64",
    }
    files = elf.get_section_by_name(".gnu.version_r").iter_versions()
    needed = [version.name for _, versions in files for version in versions]
    glibc = [tuple(map(int, name[6:].split("."))) for name in needed if name.startswith("GLIBC_")]
    assert (2,) < max(glibc) <= (2, 28)
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    assert [s.name for s in symbols if s.name and s["st_shndx"] != "SHN_UNDEF"] == ["PyInit__C"]
    assert elf.get_section_by_name(".symtab") is None  # stripped


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


def test_tests_of_a_family_pass_on_the_wheel(python, tmp_path):
    """With the command by which cibuildwheel tests its wheels."""
    (command,) = re.findall(r'^test-command = "python (.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    out = run(
        python, *command.replace("{project}/tests/ops", f"{ROOT}/tests/ops/test_kl.py").split(), cwd=tmp_path
    )
    assert "passed" in out


def test_licence_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch>=2.8" in text
    assert any(n.endswith("LICENSE") for n in archive.namelist())
