"""Random API calls on every backend: 500 here, ``REWARDOPS_FUZZ_CALLS=10000`` for a nightly run."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from fuzz import RANDOM, Tally, fuzz, no_kernels
from fuzz_arguments import ARGUMENTS, FORWARDED, FUNCTIONS, NOT_FUZZED, OVERRIDES, parameters

import rewardops
from rewardops.core import checks, dispatch, native

CUDA = True  # the `target` fixture runs the kernels in CUDA C++ as well
CALLS = int(os.environ.get("REWARDOPS_FUZZ_CALLS", "500"))
LARGE = {"max_width": 129, "max_vocab": 1025} if CALLS > 1000 else {}
INTERPRETED = {"max_width": 7, "max_vocab": 17}


# ---- the table ---------------------------------------------------------------------------------------------


def test_every_function_is_fuzzed():
    assert set(rewardops.__all__) <= {*FUNCTIONS, *NOT_FUZZED}
    forwarding = {
        name
        for name, fn in FUNCTIONS.items()
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
    }
    assert forwarding == set(FORWARDED)


def test_every_argument_is_in_the_table():
    taken = {(fn, name) for fn in FUNCTIONS for name in parameters(fn)}
    missing = {(fn, name) for fn, name in taken if (fn, name) not in OVERRIDES and name not in ARGUMENTS}
    assert not missing, "how are they drawn, and what must they not be?"
    assert not set(OVERRIDES) - taken
    assert not set(ARGUMENTS) - {name for _, name in taken}


# ---- calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls(target, name):
    """Valid calls agree with the specification, forward and backward; invalid calls name the argument."""
    each, size = max(CALLS // len(FUNCTIONS), 2), LARGE
    if target.interpreted or target.backend == "reference":
        if name.startswith("advantages."):
            pytest.skip("made of functions that are fuzzed")
        each, size = max(each // 4, 2), INTERPRETED
    if target.device.type != "cpu" and name in RANDOM:
        pytest.skip("it draws numbers of its own, others than on the host")
    tally = Tally()
    fuzz(name, each, tally, backend=target.backend, device=target.device, **size)
    assert tally.valid >= each
    assert tally.invalid >= 10 * each


# ---- what it would find ------------------------------------------------------------------------------------


def spoil(monkeypatch, op, change):
    """Change a result tensor of an implementation, only on the backend under test."""
    plain = dispatch._implementation

    def implementation(backend, family, name):
        original = plain(backend, family, name)
        return (lambda *args: change(original(*args), args)) if (backend, name) == ("cpp", op) else original

    monkeypatch.setattr(dispatch, "_implementation", implementation)


@pytest.mark.skipif(native.compiled_module() is None, reason="the compiled module was not built")
@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("token_kl", lambda out, args: out * (1 + 1e-5), "output 0: .* off by"),
        ("token_kl", lambda out, args: out.double(), "output 0: torch.float64, want torch.float32"),
        (
            "token_kl",
            lambda out, args: out if args[0].mask is None else out + ~args[0].mask * 1e-9,
            "output 0: not 0 where masked",
        ),
        ("token_kl_backward", lambda out, args: (out[0] * (1 + 1e-5), out[1]), "gradient 0: .* off by"),
        (
            "token_kl_backward",
            lambda out, args: (out[0] + args[0].isnan() * 1e-9, out[1]),
            "gradient of logprob: not 0 where masked",
        ),
    ],
    ids=["a value", "a dtype", "a masked value", "a gradient", "a masked gradient"],
)
def test_a_wrong_kernel_is_found(monkeypatch, op, change, message):
    spoil(monkeypatch, op, change)
    with pytest.raises(AssertionError, match=message):
        fuzz("token_kl", 20, Tally(), backend="cpp", shrink=False)


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("entropy_weights", "check_choice", r"mode \(None\): .* ran before"),
        ("row_sum", "check_float", r"values \(None\): AttributeError"),
    ],
)
def test_a_missing_check_is_found(monkeypatch, name, check, message):
    monkeypatch.setattr(checks, check, lambda *args: None)
    with pytest.raises(AssertionError, match=message):
        fuzz(name, 20, Tally(), backend="reference", shrink=False)


def test_an_error_that_names_nothing_is_found(monkeypatch):
    def check(name, value, choices):
        if value not in choices:
            raise ValueError("no such thing")

    monkeypatch.setattr(checks, "check_choice", check)
    with pytest.raises(AssertionError, match="the message does not name it: no such thing"):
        fuzz("segment_reduce", 20, Tally(), backend="reference", shrink=False)


def test_a_kernel_that_runs_too_early_is_found():
    x = torch.ones(2, 3)
    with no_kernels(), pytest.raises(AssertionError, match="row_sums ran before the arguments were checked"):
        rewardops.row_sum(x)
