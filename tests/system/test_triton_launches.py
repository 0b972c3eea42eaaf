"""Every launch of a Triton kernel passes the compiler options that decide bits; and how many launches ops make."""

from __future__ import annotations

import ast
import copy
import operator
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rewardops
from rewardops.core import dispatch
from rewardops.reference.segments import SegmentsArgs

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


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_kernel_calls_itself(path):
    """Triton 3.4 and 3.5 do not end when they look for what such a function depends on."""
    tree = ast.parse(path.read_text())
    for function in [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in jitted(tree)]:
        called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
        assert function.name not in called


# ---- number of launches -------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """The kernels that run while it is open, and operations of torch but for allocations and views."""

    def __init__(self, monkeypatch, *modules) -> None:
        super().__init__()
        self.names: list[str] = []
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Counted(getattr(module, name), self.names))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace != "rewardops" and not name.startswith(
            (
                "empty",
                "new_empty",
                "view",
                "detach",
                "slice",
                "select",
                "expand",
                "item",
                "unbind",
                "squeeze",
                "unsqueeze",
            )
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Counted:
    """A kernel that notes its name at every launch, and then runs."""

    def __init__(self, kernel, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.kernel.fn.__name__.removesuffix("_kernel"))
            with _disable_current_modes():  # the interpreter's own copies
                return self.kernel[grid](*args, **kwargs)

        return launch


FORWARD, BACKWARD = "group_advantages", "group_advantages_backward"
COUNTS = {
    "rows": ({"contiguous": True}, [FORWARD], [BACKWARD]),
    "rows by label": ({}, ["prepare", FORWARD], ["prepare", BACKWARD]),
    "many rows by label": ({"sort": True}, ["sort", FORWARD], ["sort", BACKWARD]),
    "median of rows by label": ({"baseline": "median"}, ["prepare", FORWARD], ["prepare", BACKWARD]),
    "std of the batch, rows by label": (
        {"scale": "batch_std"}, ["prepare", "batch", FORWARD], ["prepare", "batch", BACKWARD],
    ),
    "tokens": ({"width": 5, "contiguous": True}, ["prepare", FORWARD, "spread"], ["prepare", BACKWARD]),
    "tokens by label": ({"width": 5}, ["prepare", FORWARD, "spread"], ["prepare", BACKWARD]),
    "packed tokens by label": ({"width": 5, "packed": True}, ["prepare", FORWARD, "spread"], ["prepare", BACKWARD]),
    "values to tokens": (
        {"width": 5, "baseline": "none", "scale": "none"}, ["spread"], ["prepare", BACKWARD],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_launches_of_group_advantages(monkeypatch, name):
    """One to three in either direction, whatever the number of rows and groups, and nothing else on the device."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import advantages, advantages_tokens
    from rewardops.triton_kernels import groups as groups_of_rows

    from rewardops.reference.advantages import AdvantagesArgs

    changes, forward, backward = COUNTS[name]
    options = {
        "width": 0,
        "packed": False,
        "baseline": "mean",
        "scale": "std",
        "contiguous": False,
        **changes,
    }
    rows, width = 8, options["width"]
    if "sort" in options:
        monkeypatch.setattr(groups_of_rows, "SORTED", rows - 1)
    rewards, groups = torch.randn(rows), torch.arange(rows) // 4
    mask, cu, tokens = None, None, rewards
    if width:
        mask = torch.ones(rows, width).bool() if not options["packed"] else None
        cu = torch.arange(0, rows * width + 1, width) if options["packed"] else None
        tokens = torch.randn(rows * width if options["packed"] else (rows, width))
    count = -1 if cu is None else rows * width
    args = AdvantagesArgs(
        rewards, groups, None, None, mask, cu, count, options["baseline"], 0.0, options["scale"], 1e-6, 1, False,
        options["contiguous"],
    )  # fmt: skip
    with Launches(monkeypatch, advantages, advantages_tokens) as launched:
        _, inv_scale, numerator = advantages.group_advantages(args)
        assert launched.names == forward
        launched.names.clear()
        advantages.group_advantages_backward(tokens, None, inv_scale, numerator, args)
        assert launched.names == backward


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_launches_of_gtpo(monkeypatch, contiguous, packed):
    """One, or two where rows are sorted; and two backward."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import advantages_tokens, entropy

    from rewardops.reference.entropy import GtpoArgs

    x, cu = torch.rand(8, 5), torch.arange(0, 41, 5) if packed else None
    x = x.flatten() if packed else x
    args = GtpoArgs(torch.rand(8), x, torch.arange(8) // 4, x > 0.1, cu, 1.0, 0.1, 0.5, 0.01, contiguous)
    with Launches(monkeypatch, advantages_tokens, entropy) as launched:
        entropy.gtpo_rewards(args)
        assert launched.names == ([] if contiguous else ["prepare"]) + ["gtpo"]
        launched.names.clear()
        entropy.gtpo_rewards_backward(x, args)
        assert launched.names == ["prepare", "gtpo"]


@pytest.mark.parametrize("name", ["high_entropy_mask", "clip_cov_mask", "kl_cov_mask"])
@pytest.mark.parametrize("packed", [False, True])
def test_launches_of_masks(monkeypatch, name, packed):
    """At most eight of a whole call: four of digits, two of the choice, zeros for counts, and a random draw."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import selection

    x, mask = torch.randn(3, 40), torch.ones(3, 40).bool()
    cu = torch.tensor([0, 40, 80, 120]) if packed else None
    given = (x.flatten(), None) if packed else (x, mask)
    run = dispatch._run
    with Launches(monkeypatch, selection) as launched, rewardops.use_backend("triton"):

        def counted(*args):
            with launched:
                return run(*args)

        monkeypatch.setattr(dispatch, "_run", counted)
        getattr(rewardops, name)(*given, cu_seqlens=cu)
    kernels = ["digits"] * 4 + ["chosen"] * 2
    assert [n for n in launched.names if n in kernels] == kernels
    if not packed:  # whose offsets are checked on a CPU
        others = ["rand"] * (name == "clip_cov_mask") + ["zeros"]
        assert [n for n in launched.names if n not in kernels] == others


THREE = ["parts", "scopes", "map"]
SCOPES = {
    "whiten": (lambda x, r, g, **where: rewardops.whiten(x, where["mask"]), THREE, THREE),
    "signed_group_normalize": (
        lambda x, r, g, **where: rewardops.signed_group_normalize(x, r, g, **where), THREE, THREE,
    ),
    "entropy_weights": (
        lambda x, r, g, **where: rewardops.entropy_weights(x, entropy_grad=True, **where), THREE, THREE,
    ),
    "softmax of a group": (
        lambda x, r, g, **where: rewardops.entropy_weights(
            x, mode="softmax", normalize="group", groups=g, entropy_grad=True, **where
        ),
        THREE, THREE,
    ),
    "entropy_bonus": (
        lambda x, r, g, **where: rewardops.entropy_bonus(x, x, where["mask"]), ["map"], ["map"],
    ),
    "steer_weights": (lambda x, r, g, **where: rewardops.steer_weights(x, where["mask"]), THREE, []),
    "advantage_logprob_cov": (
        lambda x, r, g, **where: rewardops.advantage_logprob_cov(x, x, **where), THREE, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("packed", [False, True])
def test_launches_of_what_is_relative_to_a_scope(monkeypatch, name, packed):
    """One to three in either direction, and nothing else on the device but a sort of many rows."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import groups as groups_of_rows
    from rewardops.triton_kernels import scopes

    fn, forward, backward = SCOPES[name]
    x, mask = torch.rand(6, 40), torch.ones(6, 40).bool()
    rewards, groups = torch.tensor([1.0, 0.0] * 3), torch.tensor([3, 3, 3, 3, -1, -1])
    cu = torch.arange(0, 241, 40) if packed else None
    x, mask = (x.flatten(), mask.flatten()) if packed else (x, mask)
    x.requires_grad_()
    run = dispatch._run
    with Launches(monkeypatch, scopes) as launched, rewardops.use_backend("triton"):

        def counted(*args):
            with launched:
                return run(*args)

        monkeypatch.setattr(dispatch, "_run", counted)
        with _disable_current_modes():
            out = fn(x, rewards, groups, mask=mask, cu_seqlens=cu)
            assert launched.names == forward
            launched.names.clear()
            if backward:
                torch.autograd.grad(out, x, torch.ones_like(out))
                assert launched.names == backward
            launched.names.clear()
            monkeypatch.setattr(groups_of_rows, "SORTED", 5)
            fn(x, rewards, groups, mask=mask, cu_seqlens=cu)
            assert [n for n in launched.names if n != "sort"] == forward


@pytest.mark.parametrize("layout", ["padded", "packed", "long"])
def test_a_scan_is_one_launch(monkeypatch, layout):
    """Two where a few long rows are cut; and its gradient as many."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import returns, returns_backward, softmin, td

    if layout == "long" and torch.cuda.is_available():
        pytest.skip("chunks are longer there")
    # Of kernels alone, as it is not opened.
    launched = Launches(monkeypatch, td, returns, returns_backward, softmin)
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
        torch.autograd.grad(rewardops.min_returns(x, **where).sum(), x)
    cut = 2 if layout == "long" else 1
    assert Counter(launched.names) == {
        "td": cut, "td_backward": cut, "extremes": cut, "returns_backward": cut,
    }  # fmt: skip
    launched.names.clear()
    with dispatch.use_backend("triton"):
        soft = [minima for name, minima in vars(rewardops).items() if name.startswith("softmin_re")]
        torch.autograd.grad(soft[0](x, **where).sum(), x)
    assert launched.names[1:] == ["returns_backward"] * cut
    launched.names.clear()
    with dispatch.use_backend("triton"), torch.no_grad():
        for minima in soft:
            minima(x, **where)
    assert len(launched.names) == 2


@pytest.mark.parametrize("layout", ["padded", "packed", "long"])
def test_launches_of_segments(monkeypatch, layout):
    """One in either direction, two where a few long rows are cut, whatever the steps are given by."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import segments

    if layout == "long" and torch.cuda.is_available():
        pytest.skip("chunks are longer there")
    rows, width = (1, 600) if layout == "long" else (6, 32)
    x = torch.rand(rows, width)
    mask, flags, cu = x > 0.1, x > 0.7, None
    ids = flags.long().cumsum(1)
    if layout == "packed":
        cu = torch.arange(0, rows * width + 1, width)
        x, mask, flags, ids = (t.flatten() for t in (x, mask, flags, ids))
    launched = Launches(monkeypatch, segments)
    cut = ["segment_reduce"] * (2 if layout == "long" else 1)
    for steps in (ids, flags, None):
        a = SegmentsArgs(x, steps, mask, cu, 1 if steps is None else 40, "mean")
        counted = 2 if layout == "long" and steps is flags else 1
        with launched:
            launched.names.clear()
            out, kept = segments.segment_reduce(a)
            assert launched.names == cut
            launched.names.clear()
            segments.segment_reduce_backward(out, out, kept, a)
            assert launched.names == ["steps_to_tokens"] * counted
            for at_ends in (False, True) if steps is not None else ():
                launched.names.clear()
                segments.steps_to_tokens(out, steps, mask, cu, at_ends)
                assert launched.names == ["steps_to_tokens"] * counted
    with launched:
        launched.names.clear()
        segments.row_counts(mask, cu)
        segments.row_sums(x, mask, cu)
        assert launched.names == ["row_counts", *cut]


def test_public_calls_of_segments_add_nothing(monkeypatch):
    """No operations of torch on tokens beside the kernels, forward and backward, with flags and with ids."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import segments

    x, of_steps, mask = torch.rand(6, 32), torch.rand(6, 9), torch.rand(6, 32) > 0.1
    flags = torch.rand(6, 32) > 0.7
    launched, run = Launches(monkeypatch, segments), dispatch._run

    def counted(*args):
        with launched:
            return run(*args)

    monkeypatch.setattr(dispatch, "_run", counted)
    for steps in (flags, flags.long().cumsum(1)):
        for fn, given in (
            (lambda v, s: rewardops.segment_reduce(v, s, "max", num_steps=9, mask=mask), x),
            (lambda v, s: rewardops.segment_broadcast(v, s, mask=mask), of_steps),
            (lambda v, s: rewardops.place_at_step_end(v, s, mask=mask), of_steps),
            (lambda v, s: rewardops.row_mean(v, mask=mask), x),
            (lambda v, s: rewardops.row_sum(v, mask=mask), x),
        ):
            launched.names.clear()
            leaf = given.clone().requires_grad_()
            with dispatch.use_backend("triton"):
                out = fn(leaf, steps)
                torch.autograd.grad(out, leaf, torch.ones_like(out))
            assert sorted(launched.names) == ["segment_reduce", "steps_to_tokens"]


# Of a public function: its options, and launches forward and backward, kernels and operations of torch.
TREES = {
    "prefix_values": ({}, 7, 4),
    "prefix_values, weighed": ({"weights": torch.ones(8)}, 8, 4),
    "prefix_std": ({}, 5, 2),
    "tvm_targets": ({}, 5, 2),
    "tempo_advantages": ({}, 8, 6),
    "sibling_advantages": ({}, 8, 4),
    "tree_rl_advantages": ({}, 6, 3),
    "shared_prefix_weights": ({}, 8, 0),
    "prefix_lcp": ({"max_group_size": 4}, 5, 0),
}


@pytest.mark.parametrize("name", TREES)
def test_launches_of_prefix_trees(monkeypatch, name):
    """At most eight in either direction."""
    pytest.importorskip("triton")
    from rewardops.triton_kernels import advantages, advantages_tokens, prefix_tree, tree
    from rewardops.triton_kernels import tree_statistics as statistics
    from rewardops.triton_kernels import tree_tokens as forward_pass
    from rewardops.triton_kernels import tree_tokens_backward as backward

    from rewardops.core import checks, groups
    from rewardops.ops import forest

    for module in (checks, groups, forest):  # what only looks at values, on a CPU
        monkeypatch.setattr(module, "may_read", lambda _: False)
    for module in (prefix_tree, forward_pass, backward):  # as with many rows
        monkeypatch.setattr(module, "splits", lambda *_: 1)
    options, forward, back = TREES[name]
    tokens, mask, labels = torch.randint(0, 2, (8, 16)), torch.ones(8, 16).bool(), torch.arange(8) // 4
    rewards = [torch.randn(8, requires_grad=True)] if back else []
    modules = (advantages, advantages_tokens, prefix_tree, tree, statistics, forward_pass, backward)
    launched = Launches(monkeypatch, *modules)
    run = dispatch._run

    def counted(*args):
        with launched:
            return run(*args)

    monkeypatch.setattr(dispatch, "_run", counted)
    function = getattr(rewardops, name.partition(",")[0])
    with rewardops.use_backend("triton"):
        with launched:
            out = function(tokens, *rewards, labels, mask=mask, **options)
        assert len(launched.names) == forward, str(launched.names)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        upstream = [torch.ones_like(x) for x in outputs]
        launched.names.clear()
        if back:
            with launched:
                torch.autograd.grad(outputs, rewards, upstream)
            assert len(launched.names) == back, str(launched.names)
