"""Every launch of a Triton kernel passes the compiler options that decide bits."""

from __future__ import annotations

import ast
import copy
import operator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[2] / "triton_kernels").glob("*.py"))


def jitted(tree: ast.Module) -> set[str]:
    """The functions under ``triton.jit``, with arguments or without."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


KERNELS = set().union(*(jitted(ast.parse(path.read_text())) for path in FILES))


def launches(source: str) -> list[tuple[int, bool]]:
    """The line of every ``kernel[grid]``, and whether it is called there with ``**BITS``."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    result = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).rpartition(".")[2] in KERNELS:
            call = calls.get(id(node))
            unpacked = [] if call is None else [ast.unparse(k.value) for k in call.keywords if k.arg is None]
            result.append((node.lineno, "BITS" in unpacked))
    return sorted(result)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_passes_the_options_that_decide_bits(path):
    without = [line for line, passed in launches(path.read_text()) if not passed]
    assert not without, f"{path.name}: launches without **BITS in lines {without}"


def test_launches_are_seen():
    assert sum(len(launches(path.read_text())) for path in FILES) >= 20
    lines = ("td_kernel[grid](x, **BITS)", "scans.td_kernel[(1, 2)](x, BLOCK=1)", "run = td_kernel[grid]")
    assert launches("\n".join(lines)) == [(1, True), (2, False), (3, False)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_constants_are_compared_quickly_at_a_launch(path):
    """``Constant`` in place of ``tl.constexpr``, whose comparisons took more than half of the time of a launch."""
    tree = ast.parse(path.read_text())
    slow = [
        node.lineno
        for statement in tree.body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.constexpr"
    ]
    assert not slow, f"{path.name}: tl.constexpr in lines {slow}"


def test_a_constant_compares_by_its_value():
    pytest.importorskip("triton")
    from rewardops.triton_kernels.launch import Constant

    same, other = (operator.ne(Constant(3), Constant(n)) for n in (3, 4))
    assert not same
    assert other
    assert copy.deepcopy(constant := Constant(3)) is constant
