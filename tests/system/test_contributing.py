"""The list of an op's files in CONTRIBUTING.md is whole, as an op with every kind of kernel shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OP, FAMILY = "softmin_returns", "returns"
KERNELS = (".h", ".cpp", ".cu", ".cuh", ".py")
FOLDERS = ("benchmarks", "csrc", "docs", "rewardops", "tests", "triton_kernels")


def listed() -> dict[str, set[str]]:
    """Patterns of files in the table of CONTRIBUTING.md, by when they are needed."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding an op\n")[1].split("\n## ")[0]
    patterns: dict[str, set[str]] = {}
    for files, _, needed in re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", section, re.M):
        names = re.findall(r"`([^`]+)`", files.replace("<family>", FAMILY))
        patterns.setdefault(needed, set()).update(names)
    return patterns


def files() -> Iterator[Path]:
    """The text files of the project."""
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in FOLDERS:
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        made = ("__pycache__", ".hypothesis")
        yield from (p for p in paths if not set(made) & set(p.parts) and p.suffix != ".so")


def naming() -> set[str]:
    """The files that name the op, but for this one."""
    naming = {path for path in files() if OP in path.read_text(errors="ignore")} - {Path(__file__).resolve()}
    return {path.relative_to(ROOT).as_posix() for path in naming}


def test_every_file_that_names_an_op_is_listed():
    patterns = set().union(*listed().values())
    assert not {name for name in naming() if not any(fnmatch(name, p) for p in patterns)}


def test_every_file_that_is_always_needed_names_the_op():
    always = listed()["always"]
    assert len(always) > 5
    assert not {pattern for pattern in always if not any(fnmatch(name, pattern) for name in naming())}


def test_files_that_are_listed_exist():
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    # A family has kernels that are compiled for every instruction set, or once.
    for pattern in set().union(*listed().values()) - {f"csrc/cpu/{FAMILY}.cpp"}:
        assert any(fnmatch(name, pattern) for name in names), pattern


def test_few_files_name_an_op():
    assert len(naming()) <= 23, sorted(naming())


def test_a_commit_is_checked_by_the_linters_that_are_pinned():
    pinned = set((ROOT / "constraints.txt").read_text().split())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    wanted = {
        tool
        for group in re.findall(r"additional_dependencies: \[(.*)\]", hooks)
        for tool in group.split(", ")
    }
    assert wanted
    assert wanted <= pinned


def test_kernel_files_are_short():
    sources = [
        p for folder in ("csrc", "triton_kernels") for p in (ROOT / folder).rglob("*") if p.suffix in KERNELS
    ]
    assert len(sources) > 50
    assert not {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > 400}
