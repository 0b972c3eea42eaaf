"""The testing kit: a correct kernel passes, and each known fault is caught by its case."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import GPU

import rewardops
from rewardops.cpp import td as cpp_td
from rewardops.testing import (
    adversarial_logits,
    assert_within_budget,
    check_backend,
    check_op,
    far_rows,
    logit_cases,
    measure_error,
    random_groups,
    random_mask,
    reward_cases,
    shared_prefix_tokens,
    verify,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

# ---- somebody's kernel: entropy, a program for each row ----------------------------------------------------

FAULTS = {
    "a maximum that starts from 0": "far below zero",
    "padding that counts as 0": "far below zero",
    "sums that are not shifted": "far above zero",
    "offsets in 32 bits": "rows 2^31 elements apart",
}


@triton.jit
def entropy_kernel(x, out, stride, vocab, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    row = tl.program_id(0)
    if FAULT != "offsets in 32 bits":
        row = row.to(tl.int64)
    x += row * stride
    top = 0.0 if FAULT == "a maximum that starts from 0" else -float("inf")
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(x + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(z, 0))
    total = 0.0
    weighted = 0.0
    other: tl.constexpr = 0.0 if FAULT == "padding that counts as 0" else -float("inf")
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(x + column, mask=column < vocab, other=other).to(tl.float32)
        e = tl.exp(z - top)
        total += tl.sum(e, 0)
        weighted += tl.sum(
            tl.where(e > 0, e * (z if FAULT == "sums that are not shifted" else z - top), 0.0), 0
        )
    if FAULT == "sums that are not shifted":
        weighted -= total * top
    tl.store(out + row, tl.log(total) - weighted / total)


@triton.jit
def entropy_of_blocks_kernel(x, top, order, sums, vocab, BLOCK: tl.constexpr):
    """A kernel whose blocks add to their row's sums in the order in which they finish."""
    block = tl.load(order + tl.program_id(1))
    row = tl.program_id(0)
    column = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + row * vocab + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    d = z - tl.load(top + row)
    e = tl.exp(d)
    tl.atomic_add(sums + 2 * row, tl.sum(e, 0))
    tl.atomic_add(sums + 2 * row + 1, tl.sum(tl.where(e > 0, e * d, 0.0), 0))


def entropy_of(fault: str = ""):
    def entropy(logits, tokens):
        out = torch.empty(len(logits), device=logits.device)
        entropy_kernel[(len(logits),)](logits, out, logits.stride(0), logits.shape[1], BLOCK=256, FAULT=fault)
        return out

    return entropy


def entropy_by_atomics(logits, tokens):
    blocks = triton.cdiv(logits.shape[1], 16)
    sums = torch.zeros(len(logits), 2, device=logits.device)
    # The interpreter runs programs in order; a GPU does not.
    order = torch.randperm(blocks).to(logits.device)
    x, top = logits.contiguous(), logits.float().amax(1)
    entropy_of_blocks_kernel[(len(logits), blocks)](x, top, order, sums, logits.shape[1], BLOCK=16)
    return sums[:, 0].log() - sums[:, 1] / sums[:, 0]


def plain(logits, tokens):
    logprob = logits.log_softmax(-1)
    return -torch.where(logprob > -torch.inf, logprob.exp() * logprob, 0).sum(-1)


SMALL = {"vocabs": (1, 7, 300), "device": GPU}


def test_a_sound_kernel_passes():
    report = check_op(entropy_of(), plain, logit_cases(**SMALL), gradients=False)
    assert not report.faults
    assert len(report.comparisons) > 50
    assert 0 < report.worst().of_budget < 1
    assert "worst error" in str(report)


@pytest.mark.parametrize("fault", FAULTS)
def test_known_faults_are_caught(fault):
    report = check_op(entropy_of(fault), plain, logit_cases(**SMALL), gradients=False, raises=False)
    assert any(text.startswith(FAULTS[fault]) for text in report.faults), report


def test_atomics_are_caught():
    cases = {
        name: inputs for name, inputs in logit_cases(vocabs=(1000,), device=GPU) if name.startswith("normal")
    }
    report = check_op(entropy_by_atomics, plain, cases, gradients=False, raises=False)
    assert any("other bits" in text for text in report.faults), report
    assert not any("the budget is" in text for text in report.faults), report  # the only fault


# ---- functions with gradients ------------------------------------------------------------------------------


class Centred(torch.autograd.Function):
    """Rewards minus the mean of their group; ``wrong`` omits the gradient of the mean."""

    @staticmethod
    def forward(ctx, rewards, groups, wrong):
        same = (groups[:, None] == groups).double()
        ctx.save_for_backward(same)
        ctx.wrong = wrong
        x = rewards.double()
        return (x - same @ x / same.sum(1).clamp(min=1)).to(torch.promote_types(rewards.dtype, torch.float32))

    @staticmethod
    def backward(ctx, up):
        (same,) = ctx.saved_tensors
        g = up.double()
        through = 0 if ctx.wrong else same @ (g / same.sum(1).clamp(min=1))
        return (g - through).to(up.dtype), None, None


def centred(rewards, groups):
    same = (groups[:, None] == groups).to(rewards.dtype)
    return rewards - same @ rewards / same.sum(1).clamp(min=1)


def test_gradients_are_checked():
    assert not check_op(lambda r, g: Centred.apply(r, g, False), centred, reward_cases()).faults
    with pytest.raises(AssertionError, match="gradient 0"):
        check_op(lambda r, g: Centred.apply(r, g, True), centred, reward_cases())


def test_a_function_that_raises_is_a_fault_of_that_case_only():
    def picky(rewards, groups):
        if not len(rewards):
            raise IndexError("nothing there")
        return (
            centred(rewards.double(), groups).to(torch.promote_types(rewards.dtype, torch.float32)).detach()
        )

    report = check_op(picky, centred, reward_cases(), gradients=False, raises=False)
    assert report.faults
    assert all("empty" in fault and "IndexError: nothing there" in fault for fault in report.faults)


class Named(NamedTuple):
    mean: torch.Tensor
    none: torch.Tensor | None
    entropy: torch.Tensor


def test_a_named_output_is_called_by_its_name():
    cases = {"one": (torch.ones(3), torch.zeros(3).long())}

    def plain(rewards, groups):
        return Named(rewards * 1, None, rewards * 2)

    def off(rewards, groups):
        return Named(rewards * 1, None, rewards * 2.5)

    report = check_op(off, plain, cases, raises=False)
    assert [fault.split(":")[:2] for fault in report.faults] == [["one", " entropy"], ["one", " gradient 0"]]
    report = check_op(lambda *xs: tuple(off(*xs)), plain, cases, raises=False)
    assert [fault.split(":")[1] for fault in report.faults] == [" output 1", " gradient 0"]
    with pytest.raises(AssertionError, match=r"^entropy: .* where float64 has .* the budget is"):
        check_backend(off, cases["one"], backend="reference", reference=plain)


# ---- what was not compared ---------------------------------------------------------------------------------


def twice(x):
    return 2 * x


ONE = {"one": (torch.tensor([1.0, -2.0]),)}


def test_outputs_without_a_gradient_do_not_pass_for_right_ones():
    def detached(x):
        return 2 * x.detach()

    with pytest.raises(AssertionError, match="one: the outputs have no gradient, the reference's have"):
        check_op(detached, twice, ONE)
    report = check_op(detached, twice, ONE, gradients=False)
    assert "no gradient was compared" in str(report)
    assert "worst gradient" not in str(report)
    assert not report.worst(gradients=True).passes
    assert report.worst().passes
    assert (report.compared(), report.compared(gradients=True)) == (2, 0)
    with pytest.raises(AssertionError, match="gradients: no case has a number"):
        check_op(detached, detached, ONE)
    with pytest.raises(AssertionError, match="gradients: 1, the reference has 0"):
        check_op(twice, detached, ONE)
    report = check_op(twice, twice, ONE)
    assert "worst gradient 0 ulp" in str(report)
    assert report.compared(gradients=True) == 2


def test_a_wrong_gradient_is_accepted_only_where_none_is_asked_for():
    def off(x):
        return 2 * x.detach() + 3 * (x - x.detach())

    assert "gradient 0" in str(check_op(off, twice, ONE, raises=False))
    assert not check_op(off, twice, ONE, gradients=False).faults


def test_no_case_is_no_result():
    for cases in ({}, iter(())):
        with pytest.raises(AssertionError, match="cases: got none, want at least one"):
            check_op(twice, twice, cases)
    assert str(check_op(twice, twice, {}, allow_empty=True)).startswith("0 cases; no output was compared")


NOTHING = {
    "an empty input": torch.zeros(0),
    "nothing but 0": torch.zeros(3),
    "nothing but NaN": torch.full((3,), torch.nan),
    "nothing but infinity": torch.tensor([torch.inf, -torch.inf]),
}


@pytest.mark.parametrize("case", NOTHING)
def test_cases_with_nothing_to_compare(case):
    """A function of zeros, or a reference that fails itself, would pass them all."""
    nothing = {case: (NOTHING[case],)}
    with pytest.raises(AssertionError, match="outputs: no case has a number other than 0"):
        check_op(twice, twice, nothing, gradients=False)
    assert not check_op(twice, twice, nothing, gradients=False, allow_empty=True).faults
    report = check_op(twice, twice, {**ONE, **nothing}, gradients=False)
    assert "2 cases, 1 of them without a number to compare" in str(report)


def test_outputs_that_are_none_are_not_compared():
    for nothing in (lambda x: [], lambda x: (None, None)):
        with pytest.raises(AssertionError, match="outputs: no case has a number"):
            check_op(nothing, nothing, ONE)


def test_a_reference_that_fails_is_a_fault_of_that_case():
    def picky(x):
        if len(x) == 1:
            raise IndexError("one")
        return 2 * x

    report = check_op(twice, picky, {"short": (torch.ones(1),), **ONE}, raises=False)
    assert report.faults == ["short: the reference raised IndexError: one"]
    with pytest.raises(AssertionError, match="short: the reference raised"):
        check_op(twice, picky, {"short": (torch.ones(1),)})


def test_runs_are_compared_in_number_too():
    count = iter((1, 1, 2))

    def sometimes(x):
        return [2 * x] * next(count)

    report = check_op(sometimes, twice, ONE, raises=False)
    assert any("other bits" in fault for fault in report.faults)
    with pytest.raises(ValueError, match="repeats: got 0"):
        check_op(twice, twice, ONE, repeats=0)


def test_integers_are_not_the_floats_they_truncate():
    exact = torch.tensor([0.9, 2.0], dtype=torch.float64)
    assert not measure_error(torch.tensor([0, 2]), exact).passes
    assert measure_error(torch.tensor([1, 2]), exact, torch.tensor([1.0, 2.0])).passes
    assert measure_error(torch.tensor([2**60 + 1]), torch.tensor([2**60 + 1])).compared == 1
    assert not measure_error(torch.tensor([2**60]), torch.tensor([2**60 + 1])).passes
    assert "no budget" in measure_error(torch.ones(1) * 1j, torch.ones(1)).fault


def test_a_backend_that_served_nothing_is_not_checked():
    x = [torch.randn(3, 4)]
    for backend in ("cpp", "reference", "cpp,reference"):
        with pytest.raises(AssertionError, match=f"backend: got '{backend}', which served no op"):
            check_backend(twice, x, backend=backend)
        assert check_backend(twice, x, backend=backend, allow_fallback=True).gradients
    check_backend(rewardops.discounted_returns, x, backend="reference")
    for unknown in ("", "cp", "cpp,"):
        with pytest.raises(ValueError, match="backend: got '"):
            check_backend(rewardops.discounted_returns, x, backend=unknown)
    if rewardops.core.dispatch.unavailable("cuda", "cpu"):
        with pytest.raises(rewardops.BackendUnavailable):
            check_backend(rewardops.discounted_returns, x, backend="cuda")


def test_inputs_do_not_depend_on_defaults_of_torch():
    def draw():
        generator = torch.Generator("cpu").manual_seed(5)
        drawn = [random_mask(5, 7, generator), groups := random_groups(6, generator)]
        drawn += [shared_prefix_tokens(groups, 4, generator)]
        drawn += [adversarial_logits(kind, 3, 5, generator) for kind in rewardops.testing.LOGITS]
        return drawn + [
            x for cases in (logit_cases(vocabs=(7,)), reward_cases()) for _, xs in cases for x in xs
        ]

    want = draw()
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            got = draw()
            assert [x.dtype for x in got] == [x.dtype for x in want]
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert all(torch.equal(x, y) for x, y in zip(draw(), want, strict=True))


def test_another_number_of_outputs_is_a_fault():
    cases = {"one": (torch.randn(3), torch.zeros(3).long())}
    report = check_op(lambda r, g: (r, r), lambda r, g: r, cases, raises=False)
    assert "outputs: 2, the reference has 1" in str(report)


# ---- budgets -----------------------------------------------------------------------------------------------


def test_budget():
    exact = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    off = torch.tensor([1.0 + 2e-6, 1e-3])
    assert "the budget is" in measure_error(off, exact).fault
    assert measure_error(off, exact, torch.tensor([1.0 + 3e-6, 1e-3])).passes
    assert not measure_error(off, exact, torch.tensor([1.0 + 1e-6, 1e-3])).passes
    assert measure_error(off, exact, torch.tensor([1.0 + 1e-6, 1e-3]), times=2.0).passes
    assert measure_error(exact.float(), exact).ulps < 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value):
    exact = torch.tensor([value, 1.0], dtype=torch.float64)
    assert_within_budget(exact.float(), exact)
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([value, value])):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, exact)


def test_what_all_cancelled_is_measured_by_what_it_was_made_of():
    exact, ours = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1e-15)
    assert not measure_error(ours, exact).passes
    assert measure_error(ours, exact, scale=1.0).passes


# ---- inputs ------------------------------------------------------------------------------------------------


def test_far_rows_lie_far_apart(generator):
    x = torch.randn(3, 5, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        view = far_rows(x.to(dtype))
        assert torch.equal(view, x.to(dtype))
        assert (view[-1].data_ptr() - view[0].data_ptr()) // view.element_size() > 2**31


def test_every_adversarial_row_has_mass(generator):
    for kind in rewardops.testing.LOGITS:
        x = adversarial_logits(kind, 6, 9, generator)
        assert x.shape == (6, 9)
        assert not x.isnan().any()
        assert x.amax(1).isfinite().all()
    with pytest.raises(ValueError, match="kind: got 'odd', want one of 'normal'"):
        adversarial_logits("odd", 1, 1, generator)


# ---- rewardops verify --------------------------------------------------------------------------------------

QUICK = {"ops": ["gae"], "only": ["cpp"], "quick": True}
needs_cpp = pytest.mark.skipif(
    rewardops.core.native.compiled_module() is None, reason="the compiled module was not built"
)


@needs_cpp
def test_verify_passes_what_is_right():
    rows = verify.verify(**QUICK)
    assert [row.call for row in rows] == ["gae", "gae decay"]
    for row in rows:
        assert row.passes, row.faults
        assert row.cases >= 4
        assert 0 < row.error.of_budget < 1
        assert 0 < row.gradient.of_budget < 1
        assert row.opcheck
    assert "FAILS" not in verify.table(rows)
    assert all(row.served_by == ["cpp"] and not row.elsewhere for row in rows)
    assert min(row.compared["gradient"] for row in rows) > 100


def off_by_a_little(*args):
    return [x * (1 + 1e-5) for x in SOUND(*args)]


def other_bits(*args):
    return [x * (1 + 3e-7 * torch.rand(())) for x in SOUND(*args)]


def not_at_all(*args):
    raise RuntimeError("no kernel image")


SOUND = cpp_td.td_scan


@needs_cpp
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (off_by_a_little, "the budget is"),
        (other_bits, "other bits"),
        (not_at_all, "RuntimeError: no kernel image"),
    ],
)
def test_verify_finds_what_is_wrong(monkeypatch, broken, says):
    monkeypatch.setattr(cpp_td, "td_scan", broken)
    rewardops.core.dispatch._implementation.cache_clear()
    try:
        (row, _) = verify.verify(**QUICK)
    finally:
        monkeypatch.undo()
        rewardops.core.dispatch._implementation.cache_clear()
    assert not row.passes
    assert any(says in fault for fault in row.faults), row.faults
    assert "FAILS" in verify.table([row])


def test_verify_counts_graphs():
    (row,) = verify.verify(ops=["token_kl k1"], only=["reference"], quick=True)
    assert row.graphs is None
    assert verify.graphs("kl", "token_kl k1", "reference", "cpu") == 1


def test_verify_says_what_no_kernel_computed():
    rows = verify.verify(ops=["entropy_change", "steer_metric"], only=["reference"], quick=True)
    assert [(row.passes, row.served_by, row.elsewhere) for row in rows] == [(True, [], "torch")] * 2
    assert [line.split()[-2:] for line in verify.table(rows).splitlines()[1:]] == [["by", "torch"]] * 2
    row = verify.Row("gae", "cuda,reference", cases=3, served_by=["reference"])
    assert row.elsewhere == "reference"


def test_verify_does_not_pass_what_it_did_not_compare(monkeypatch):
    row = verify.Row("gae", "cpp")
    row.demand(True)
    assert row.faults == ["no case"]
    row = verify.Row("gae", "cpp", cases=2, compared={"error": 5, "gradient": 0})
    row.demand(False)
    assert row.passes
    row.demand(True)
    assert row.faults == ["gradients: no case has a number other than 0, NaN and infinity"]
    assert verify.table([row]).splitlines()[1].split()[5:7] == ["-", "-"]
    nothing = [case for case in verify.cases(quick=True) if case.name.endswith("no token")]
    monkeypatch.setattr(verify, "cases", lambda quick: nothing)
    (row,) = verify.verify(ops=["gae"], only=["reference"], quick=True)[:1]
    assert not row.passes
    # The reference in place of every kernel.
    monkeypatch.setattr(verify.dispatch, "unavailable", lambda *where: None)
    monkeypatch.setattr(
        verify, "check_call", lambda *where, **how: verify.Row("gae", "cuda", 1, served_by=["cpp"])
    )
    with pytest.raises(ValueError, match="backend: got cuda, with a kernel for none of these ops"):
        verify.verify(ops=["gae"], only=["cuda"], quick=True)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", "device: got 'foo', want cpu, or an accelerator such as cuda"),
        ("", "device: got '', want cpu"),
        ("meta", "device: got 'meta', want one whose tensors have values"),
        ("cuda:97", "device: got 'cuda:97', which this machine cannot use: "),
        ("mps", "device: got 'mps', which this machine cannot use: "),
    ],
)
def test_verify_of_a_device_that_is_not_there(device, message, capsys):
    with pytest.raises(ValueError, match=message):
        verify.verify(ops=["gae"], device=device)
    with pytest.raises(SystemExit) as left:
        verify.main(["--op", "gae", "--device", device])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    assert f"error: {message}" in told.err
    assert len(told.err.splitlines()[-1]) < 250


def test_verify_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="backend: got 'cp', want one of 'reference'"):
        verify.verify(only=["cp"])
    with pytest.raises(
        ValueError, match=r"op: got 'gea', want a name of rewardops.__all__, or a family: logits"
    ):
        verify.verify(ops=["gea"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: got 'cuda', which this machine cannot use"):
            verify.verify(only=["cpp"], device="cuda")
    if rewardops.core.dispatch.unavailable("cuda", "cpu"):
        with pytest.raises(ValueError, match="backend: got 'cuda' on cpu"):
            verify.verify(only=["cuda"])


def test_command():
    command = [sys.executable, "-m", "rewardops"]
    run = subprocess.run(
        [*command, "verify", "--quick", "--op", "token_kl", "--backend", "reference", "--json"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert got["config"]["torch"] == torch.__version__
    assert {row["backend"] for row in got["rows"]} == {"reference"}
    assert all(row["opcheck"] and not row["faults"] for row in got["rows"])
    bad = subprocess.run([*command, "verify", "--op", "gea"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "op: got 'gea'" in bad.stderr
    bad = subprocess.run([*command, "verify", "--device", "cuda:97"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
