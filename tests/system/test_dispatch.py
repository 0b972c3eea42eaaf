"""Properties of every op: opcheck, gradcheck, torch.compile, forced backends, one public surface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import THOROUGH

import rewardops
from rewardops.core import dispatch, native
from rewardops.testing import calls, evaluate, same_bits, verify

LAYOUTS = pytest.mark.parametrize("layout", calls.LAYOUTS)


def on(device, layout, dtype=torch.float64):
    """All calls on a small batch."""
    return calls.calls(calls.make_batch(layout=layout, dtype=dtype).to(device))


def smooth_on(device, layout, dtype=torch.float64):
    return [call for call in on(device, layout, dtype) if call.differentiable]


def names(layout):
    return [call.name for call in smooth_on("cpu", layout)]


def firsts(layout):
    """Names of the first call of every function."""
    return set({call.op: call.name for call in reversed(smooth_on("cpu", layout))}.values())


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def outputs_of(call, xs):
    outputs = call.fn(*xs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_every_op_is_called():
    called = {call.op.removeprefix("advantages.") for call in on("cpu", "padded")}
    public = {name for name in rewardops.__all__ if not isinstance(getattr(rewardops, name), type)}
    assert public - called == {"debug", "show_config", "use_backend"}


@LAYOUTS
def test_gradcheck(target, layout):
    if target.interpreted and not THOROUGH:
        pytest.skip("its gradients are held to the specification's, family by family")
    for call in smooth_on(target.device, layout):
        if call.op == "linear_token_loss":
            continue  # it scales the gradient of the forward pass in place: only one backward pass
        # Random projections; every entry would take minutes.
        fast = target.backend != "reference" or not THOROUGH
        assert torch.autograd.gradcheck(call.fn, leaves(call.inputs), atol=1e-7, fast_mode=fast), call.name


@LAYOUTS
def test_opcheck(target, layout):
    """Every op that a public call dispatches, with its arguments, forward and backward."""
    if target.interpreted and layout == "packed" and not THOROUGH:
        pytest.skip("the same kernels")
    # Tracing is independent of the backend: it is checked on the fastest, and on others the schema and the shapes.
    others = ("triton",) if native.compiled_module() is None else ("triton", "reference")
    elsewhere = target.device.type == "cpu" and target.backend in others and not THOROUGH
    tests = ("test_schema", "test_faketensor") if elsewhere else None
    done = set()
    for call in on(target.device, layout, torch.float32):
        assert verify.opcheck(call, target.backend, done, tests)
    assert len(done) > 40


@LAYOUTS
def test_same_bits_every_time(target, layout):
    if target.interpreted and layout == "packed" and not THOROUGH:
        pytest.skip("the same kernels")
    for call in on(target.device, layout, torch.float32):
        first, second = (evaluate(call.fn, call.inputs, device=target.device) for _ in range(2))
        assert same_bits(first, second), call.name


# Rows, tokens of a row, vocabulary: all sizes of a batch differ, so that no size is mistaken for another.
SIZES = ((6, 7, 11), (8, 9, 14), (12, 5, 23))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("padded"))
def test_compile_padded(name):
    """Inductor compiles one call of every function, and all calls in a thorough run: each takes it seconds."""
    check_compiled(name, "padded", "inductor" if THOROUGH or name in firsts("padded") else "aot_eager")


@pytest.mark.parametrize("name", names("packed"))
def test_compile_packed(name):
    """The packed layout has the same graphs; inductor is tested on the padded layout."""
    check_compiled(name, "packed", "aot_eager")


def check_compiled(name, layout, backend):
    """Check compiled against eager code, forward and backward, with one graph for all sizes."""

    def loss(fn, *xs):
        # The squares of whitened values have a constant sum, the gradient of which is rounding error alone.
        outputs = fn(*xs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return sum((o * o + o.tanh()).sum() for o in outputs)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        batch = calls.make_batch(*size, layout=layout, dtype=torch.float32)
        (call,) = (call for call in calls.calls(batch) if call.name == name)
        ours, eager = leaves(call.inputs), leaves(call.inputs)
        with torch.compiler.set_stance("default" if size is SIZES[0] else "fail_on_recompile"):
            got = compiled(call.fn, *ours)
        got.backward()
        want = loss(call.fn, *eager)
        want.backward()
        torch.testing.assert_close(got, want)
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_ops_follow_inputs_under_no_grad_and_inference_mode(target):
    if target.interpreted:
        pytest.skip("what records a gradient knows no backend")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for call in on(target.device, "padded", torch.float32):
                assert not any(o.requires_grad for o in outputs_of(call, call.inputs))


def test_use_backend_forces_and_restores():
    assert dispatch.backend_for("cpu") in ("cpp", "reference")
    before = dispatch.backend_for("cpu")
    with rewardops.use_backend("reference"):
        assert dispatch.backend_for("cpu") == "reference"
        with rewardops.use_backend(None):
            assert dispatch.backend_for("cpu") == before
        assert dispatch.backend_for("cpu") == "reference"
    assert dispatch.backend_for("cpu") == before
    with (
        pytest.raises(ValueError, match="backend: got 'cuda11', want one of 'reference', 'cpp', 'triton'"),
        rewardops.use_backend("cuda11"),
    ):
        pass


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with rewardops.use_backend("triton"), pytest.raises(rewardops.BackendUnavailable, match="GPU"):
        rewardops.token_kl(torch.zeros(3), torch.zeros(3))
    with rewardops.use_backend("cpp"), pytest.raises(rewardops.BackendUnavailable, match="CPU tensors"):
        dispatch.backend_for("cuda")


def test_environment_forces_a_backend():
    code = "import rewardops; print(rewardops.core.dispatch.backend_for('cpu'))"
    env = {**os.environ, "REWARDOPS_BACKEND": "reference"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "reference"
    env["REWARDOPS_BACKEND"] = "nonsense"
    bad = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "backend: got 'nonsense'" in bad.stderr


def test_show_config_names_every_backend(capsys):
    text = rewardops.show_config()
    assert text in capsys.readouterr().out
    for word in ("torch", "cpp", "triton", "cpu ops", "cuda ops", "cuda kernels"):
        assert word in text


def test_every_public_name_is_documented():
    for name in rewardops.__all__:
        assert getattr(rewardops, name).__doc__, name


@pytest.mark.slow
@pytest.mark.skipif(native.compiled_module() is None, reason="the compiled module was not built")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(isa):
    """Every table of kernels that this machine can run passes the family tests."""
    env = {**os.environ, "REWARDOPS_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "import rewardops; print(rewardops.core.native.compiled_module().isa())"],
        env=env,
        capture_output=True,
        text=True,
    )
    if probe.stdout.strip() != isa:
        pytest.skip(f"this machine or build has no {isa}")
    if isa == native.compiled_module().isa():
        pytest.skip("what the tests run on anyway")
    ops = Path(__file__).parents[1] / "ops"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpp", "-p", "no:cacheprovider", str(ops)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
