"""Every launch of a Triton kernel passes the compiler options that decide bits."""

from __future__ import annotations

import ast
import copy
import operator
from pathlib import Path

import pytest
import torch

import rewardops
from rewardops.core import dispatch

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


class Counter:
    """A kernel that counts its launches."""

    def __init__(self, kernel, counts):
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        self.counts[self.kernel.__name__] = self.counts.get(self.kernel.__name__, 0) + 1
        return self.kernel[grid]


@pytest.mark.parametrize("layout", ["padded", "packed", "long"])
def test_a_scan_is_one_launch(monkeypatch, layout):
    """Two where a few long rows are cut; and its gradient as many."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import returns, softmin, td

    if layout == "long" and torch.cuda.is_available():
        pytest.skip("chunks are longer there")
    counts: dict[str, int] = {}
    for module in (td, returns, softmin):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counter(getattr(module, name), counts))
    rows, width = (1, 600) if layout == "long" else (6, 32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(rows, width, device=device)
    where = {"mask": x > 0.1}
    if layout == "packed":
        cu = torch.arange(0, rows * width + 1, width, device=device)
        x, where = x.flatten(), {"mask": x.flatten() > 0.1, "cu_seqlens": cu}
    x.requires_grad_()
    with dispatch.use_backend("triton"):
        out = rewardops.gae(x, x, gamma=0.9, lam=0.9, **where)
        torch.autograd.grad(out.advantages.sum() + out.returns.sum(), x)
        with torch.no_grad():
            rewardops.min_returns(x, **where)
            rewardops.softmin_returns(x, **where)
    cut = 2 if layout == "long" else 1
    assert counts == {
        "td_kernel": cut, "td_backward_kernel": cut, "extremes_kernel": cut, "softmin_returns_kernel": 1
    }  # fmt: skip


def test_tokens_of_no_row_are_zeros():
    """Before the first packed row and behind the last, where nobody has looked at the offsets."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import returns, td

    from rewardops.reference.returns import ReturnsArgs
    from rewardops.reference.td import TdArgs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(90, device=device) + 0.5
    cu = torch.tensor([7, 20, 20, 60], device=device)
    a, b = TdArgs(x, x, cu_seqlens=cu), ReturnsArgs(x, None, cu, None)
    results = [
        *td.td_scan(a),
        *td.td_scan_backward(x, x, a, True, False)[:2],
        returns.extreme_returns(b, False),
        *returns.softmin_returns(b, 0.1, False),
        returns.softmin_rewards(b, 0.1, True),
    ]
    for result in results:
        assert not result[:7].any() | result[60:].any()
        assert result[7:60].any()
