"""One list of families: every table has all of them, and every op has a test class."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest

import rewardops
from rewardops.core.families import FAMILIES
from rewardops.testing.calls import CALLS

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent))

from benchmarks import cases  # noqa: E402

OPS = [
    name
    for name in rewardops.__all__
    if not isinstance(getattr(rewardops, name), type) and name not in ("debug", "show_config", "use_backend")
]


def family_of(file: Path) -> str:
    """The family of ``test_<family>.py`` or ``test_<family>_<theme>.py``."""
    name = file.stem.removeprefix("test_")
    return max((f for f in FAMILIES if f"{name}_".startswith(f"{f}_")), key=len, default=name)


def test_tables_have_every_family():
    assert tuple(CALLS) == FAMILIES
    assert cases.families() == FAMILIES
    assert {family_of(file) for file in (TESTS / "ops").glob("test_*.py")} == set(FAMILIES)
    assert all((TESTS / "ops" / f"test_{family}.py").exists() for family in FAMILIES)


@functools.cache
def classes_of_tests() -> list[str]:
    trees = [ast.parse(file.read_text()) for file in (TESTS / "ops").glob("test_*.py")]
    return [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("op", OPS)
def test_every_op_can_be_selected(op):
    """``pytest tests/ops -k <op>`` runs the tests of its class; names of files do not count."""
    assert any(name.startswith("Test_") and f"_{op}_" in f"{name}_" for name in classes_of_tests())


@pytest.mark.parametrize("family", FAMILIES)
def test_public_names_of_a_family(family):
    """Every family lists its public names, all of them documented and its own."""
    module = importlib.import_module(f"rewardops.{family}")
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__, name
        assert value.__module__ == module.__name__, name
