"""The benchmark cases: all variants compute the same, every op has a case, bytes equal a count by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewardops
from rewardops.core.families import FAMILIES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import case, cases, peers
from benchmarks.data import Data, size_of

CPU = torch.device("cpu")
LAYOUTS = {
    "padded": {},
    "full": {"ragged": False},
    "packed": {"layout": "packed"},
    "holes": {"density": 0.6},
    "packed, holes": {"layout": "packed", "density": 0.6},
    "ragged groups": {"ragged_groups": True},
}


def make(name: str, dtype: torch.dtype = torch.float32, **sizes) -> case.Case:
    return cases.make(name, replace(case.TINY, **sizes), CPU, dtype)


def check_same(theirs, ours, rtol: float, atol: float) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape
        scale = 1 + float(b.detach().abs().max()) if b.is_floating_point() and b.numel() else 1.0
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=atol * scale)


def test_every_op_has_a_case():
    names = [name for name in rewardops.__all__ if not isinstance(getattr(rewardops, name), type)]
    ops = set(names) - {"debug", "show_config", "use_backend"}
    assert {cases.op(name) for name in cases.names()} == ops


def test_names():
    assert cases.families() == FAMILIES
    assert "gae_long" in cases.names("td")
    assert sum(len(cases.names(family)) for family in cases.families()) == len(cases.names())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.names())
def test_variants_agree(name, layout):
    if layout == "ragged groups" and "ragged_groups" not in cases.axes(name):
        return
    timed = make(name, **LAYOUTS[layout])
    ours = timed.call(timed.ours)()
    for fn in (timed.plain, *timed.peers.values()):
        if not isinstance(fn, case.Missing):
            theirs = timed.call(fn)()
            if timed.compared:
                check_same(theirs, ours, 1e-4, 1e-5)


@pytest.mark.parametrize("name", [n for n in cases.names() if "dtype" in cases.axes(n)])
def test_half_precision(name):
    """The formula computes in float32, and gradients come out in the dtype of the inputs."""
    timed = make(name, torch.bfloat16)
    assert timed.inputs[0].dtype is torch.bfloat16 or timed.inputs[1].dtype is torch.bfloat16
    if timed.compared:
        check_same(timed.call(timed.plain)(), timed.call(timed.ours)(), 0.02, 0.02)


@pytest.mark.parametrize("name", cases.names())
def test_float64_holds_ours(name):
    """The reference of errors is the formula in float64 on the same numbers."""
    timed = make(name)
    exact = timed.call(
        timed.exact or timed.plain, tuple(x.double() if x.is_floating_point() else x for x in timed.inputs)
    )()
    assert all(x.dtype is torch.float64 for x in exact if x.is_floating_point())
    if timed.compared:
        check_same(exact, timed.call(timed.ours)(), 1e-4, 1e-5)


@pytest.mark.parametrize("name", cases.names())
def test_data(name):
    """Data is reproducible, and no tensor is all zeros."""
    timed, again = make(name), make(name)
    for a, b in zip(timed.inputs, again.inputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert bool(a.any())


@pytest.mark.parametrize("name", [n for n in cases.names() if n.endswith("_backward")])
def test_backward_moves_more(name):
    timed = make(name)
    assert timed.differentiable
    assert timed.bytes_moved > make(name.removesuffix("_backward")).bytes_moved
    grads = timed.call(timed.ours)()
    assert [g.shape for g in grads] == [x.shape for x in timed.inputs[: timed.differentiable]]


@pytest.mark.parametrize("name", cases.names())
def test_bytes_are_no_less_than_inputs_and_outputs(name):
    timed = make(name)
    if not timed.differentiable:
        assert timed.bytes_moved >= size_of(*timed.inputs, *case.as_tuple(timed.ours(*timed.inputs)))


def test_bytes_by_hand():
    """4 tokens over 300; 8 rows of 24 and trees of 8 rows of 12; 6 hidden states of 16."""
    tokens, mask, logits = 8 * 24, 8 * 24, 4 * 300 * 4
    assert make("token_stats").bytes_moved == logits + 4 * 8 + 2 * 4 * 4
    assert make("token_stats", torch.bfloat16).bytes_moved == logits // 2 + 4 * 8 + 2 * 4 * 4
    assert make("token_stats_backward").bytes_moved == 3 * logits + 2 * (4 * 8 + 2 * 4 * 4)
    assert make("token_stats_and_grad").bytes_moved == 2 * logits + 4 * 8 + 4 * 4 + 2 * 4 * 4
    assert make("token_kl").bytes_moved == 3 * 4 * tokens + mask
    # Backward: both inputs and the upstream gradient are read, one gradient is written.
    assert make("token_kl_backward").bytes_moved == 7 * 4 * tokens + 2 * mask
    assert make("group_advantages").bytes_moved == 4 * 8 + 4 * tokens + mask
    assert make("gae").bytes_moved == 4 * 4 * tokens + mask
    # Backward of a linear op: neither rewards nor values are read again.
    assert make("gae_backward").bytes_moved == 8 * 4 * tokens + 2 * mask
    assert make("min_returns").bytes_moved == 2 * 4 * tokens + 2 * mask
    assert make("high_entropy_mask").bytes_moved == 4 * tokens + 2 * mask
    hidden, weight = 6 * 16 * 4, 300 * 16 * 4
    assert make("linear_token_stats").bytes_moved == hidden + weight + 6 * 8 + 2 * 6 * 4
    # One read of all inputs, one write of both gradients; the loss and its upstream gradient.
    assert make("linear_token_loss").bytes_moved == 2 * (hidden + weight) + 6 * 8 + 6 * 4 + 2 * 4
    assert make("prefix_values").bytes_moved == 8 * 4 + 8 * 12 * (8 + 1 + 12)


def test_masked_logits_are_not_counted():
    whole, some = make("token_stats"), make("token_stats", density=0.5)
    rows, left = divmod(whole.bytes_moved + 4 - some.bytes_moved, 300 * 4)
    assert left == 0
    assert 0 < rows < 4


def test_packed_rows_move_less():
    tokens = make("gae", layout="packed").inputs[0].numel()
    assert 8 < tokens < 8 * 24
    assert make("gae", layout="packed").bytes_moved == 4 * 4 * tokens + 4 * 9
    assert make("gae", layout="packed", density=0.5).bytes_moved == 4 * 4 * tokens + 4 * 9 + tokens


def _fingerprint(timed: case.Case) -> tuple[object, ...]:
    """A fingerprint of results: shapes, dtypes, bytes, and sums weighted by position."""
    outs = [x.double().flatten() for x in case.as_tuple(timed.ours(*timed.inputs))]
    inputs = tuple((x.shape, x.dtype) for x in timed.inputs)
    return (*inputs, timed.bytes_moved, *(float(x @ torch.arange(len(x)).double()) for x in outs))


@pytest.mark.parametrize(
    ("name", "axis"), [(n, a) for n in cases.names() if n == cases.op(n) for a in cases.axes(n)]
)
def test_sweeps_make_different_cases(name, axis):
    quick, long = cases.axes(name, quick=True)[axis], cases.axes(name)[axis]
    assert len(quick) <= len(long)
    usual = {"rows": 64, "length": 512, "tree_length": 64}
    swept = [make(name, v) if axis == "dtype" else make(name, **{**usual, axis: v}) for v in quick]
    assert len({_fingerprint(timed) for timed in swept}) == len(quick)


def test_every_axis_is_a_size():
    fields = {"dtype", *case.Sizes.__dataclass_fields__}
    assert set(case.AXES) <= fields
    assert all(set(cases.axes(name)) <= set(case.AXES) for name in cases.names())


def test_ragged_groups():
    d = Data("", "", "", replace(case.TINY, rows=64, ragged_groups=True), CPU, torch.float32)
    sizes = torch.bincount(d.labels)
    assert len(d.labels) == 64
    assert int(sizes.min()) >= 2
    assert int(sizes.max()) > int(sizes.min())


def test_missing_packages_say_why(monkeypatch):
    assert peers._module("no_such_package").why == "no-such-package is not installed"

    def broken(name):
        raise OSError("libfoo.so: not found\nand more")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert peers._module("a_package.part").why == "a-package does not import: libfoo.so: not found"
    peers._module.cache_clear()


def test_peers_without_a_gradient_or_holes_say_so(monkeypatch):
    monkeypatch.setattr(peers, "_module", lambda name: object())
    assert make("group_advantages_backward").peers["verl"] == case.Missing("has no gradient")
    assert make("vtrace", density=0.5).peers["torchrl"] == case.Missing("knows no masks with holes")
    assert make("linear_token_logprob").peers["liger"] == case.Missing("needs a GPU")
