"""Imports only go down, also lazy ones and those for type checkers; `docs/architecture.md` lists the floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewardops
from rewardops.core.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]

# Backends, and the blocked matmuls of hidden states that they share.
BACKENDS = (
    "rewardops.cpp", "rewardops.cuda", "rewardops.triton_kernels", "rewardops.core.chunked", "rewardops.core.heads",
)  # fmt: skip

# The floors of the package, from the ground up: a module imports from its floor and the floors below.
FLOORS = (
    ("rewardops.core",),
    ("rewardops.reference",),
    BACKENDS,
    ("rewardops.ops",),
    ("families",),
    ("rewardops.viz",),
    ("rewardops",),
    (
        "rewardops.testing", "rewardops.integrations", "rewardops.recipes", "rewardops.demo", "rewardops.__main__",
    ),
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name, `triton_kernels/` under its installed name."""
    folders = {"rewardops": ROOT / "rewardops", "rewardops.triton_kernels": ROOT / "triton_kernels",
               "benchmarks": ROOT / "benchmarks"}  # fmt: skip
    names = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def for_type_checkers(tree: ast.Module) -> ast.If:
    """The statement in which the package shows type checkers the modules that it imports when asked for them."""
    (node,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return node


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package in a module's import statements, at any depth."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    if name == "rewardops":
        for_type_checkers(tree).body = []  # test_modules_above_are_only_shown has them
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{base}.{alias.name}"
                if module in known:
                    yield module
                elif base in known:
                    yield base


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {m for m in imports(name, path, known) if m != name} for name, path in known.items()}


def floor(name: str) -> int:
    """The index of a module's floor; a module directly in the package is a family."""
    best = -1, ""
    for k, prefixes in enumerate(FLOORS):
        for prefix in prefixes:
            if (name == prefix or name.startswith(prefix + ".")) and len(prefix) > len(best[1]):
                best = k, prefix
    is_family = name.count(".") == 1 and best[1] == "rewardops" and name != "rewardops"
    return next(k for k, prefixes in enumerate(FLOORS) if "families" in prefixes) if is_family else best[0]


def test_imports_go_down(graph):
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if name.startswith("rewardops") and (target.startswith("benchmarks") or floor(target) > floor(name))
    ]
    assert not wrong


def test_no_circles(graph):
    """Repeatedly remove modules that import none of the others; the rest would be circles."""
    left = {name: set(targets) for name, targets in graph.items()}
    # A package's `__init__` is imported with each of its modules; only imports by name count.
    while True:
        done = {name for name, targets in left.items() if not targets & left.keys()}
        if not done:
            break
        left = {name: targets for name, targets in left.items() if name not in done}
    assert not left


def test_backends_import_core_and_reference_only(graph):
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        if name.startswith(BACKENDS)
        for target in targets
        if not target.startswith((*BACKENDS, "rewardops.core", "rewardops.reference"))
    ]
    assert not wrong


def test_nothing_imports_the_integrations(graph):
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        if not name.startswith("rewardops.integrations")
        for target in targets
        if target.startswith("rewardops.integrations")
    ]
    assert not wrong


# The modules that `rewardops` has as attributes, and imports when asked for them.
ABOVE = {
    "adapters": "rewardops.integrations.adapters",
    "integrations": "rewardops.integrations",
    "recipes": "rewardops.recipes",
    "testing": "rewardops.testing",
}


def test_modules_above_are_only_shown():
    """Type checkers see what is imported when asked for; `as` makes it theirs to use, under the same name."""
    tree = ast.parse((ROOT / "rewardops" / "__init__.py").read_text())
    shown = {}
    for node in for_type_checkers(tree).body:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name
            shown[alias.asname] = ".".join(filter(None, ("rewardops", node.module, alias.name)))
    assert shown == ABOVE


PLAIN = f"""
import sys, rewardops
loaded = [m for m in sys.modules if m.startswith({(*ABOVE.values(), "rewardops.demo", "hypothesis", "triton")!r})]
assert not loaded, loaded
for name, module in {ABOVE!r}.items():
    assert getattr(rewardops, name) is sys.modules[module], name
assert "hypothesis" not in sys.modules
"""


def test_a_plain_import_loads_nothing_above():
    subprocess.run([sys.executable, "-c", PLAIN], check=True, cwd=ROOT)


def test_dir_has_public_names_only():
    names = [name for name in dir(rewardops) if not (name.startswith("__") and name.endswith("__"))]
    assert sorted(names) == sorted({*rewardops.__all__, *FAMILIES, *ABOVE})
    assert "__version__" in dir(rewardops)
    assert all(hasattr(rewardops, name) for name in dir(rewardops))
    with pytest.raises(AttributeError, match="module 'rewardops' has no attribute 'nothing'"):
        getattr(rewardops, "nothing")  # noqa: B009


def test_the_specification_calls_no_dispatched_op():
    for path in sorted((ROOT / "rewardops" / "reference").glob("*.py")):
        assert "torch.ops" not in path.read_text(), path.name
