"""Random API calls on every backend: 500 here, ``REWARDOPS_FUZZ_CALLS=10000`` for a nightly run."""

from __future__ import annotations

import inspect
import os

import fuzz_conditions
import pytest
import torch
from fuzz import RANDOM, Tally, fuzz, no_kernels, one_of
from fuzz_arguments import ARGUMENTS, FORWARDED, FUNCTIONS, NOT_FUZZED, OVERRIDES, Call, calls, parameters
from fuzz_conditions import CHECKS, check_compiled
from fuzz_kinds import Batch
from fuzz_raw import Recorder
from hypothesis import HealthCheck, Phase, given, settings

import rewardops
from rewardops.core import checks, dispatch, inplace, kinds, native, scalars
from rewardops.testing.strategies import Rows

CUDA = True  # the `target` fixture runs the kernels in CUDA C++ as well
CALLS = int(os.environ.get("REWARDOPS_FUZZ_CALLS", "500"))
LARGE = {"max_width": 129, "max_vocab": 1025} if CALLS > 1000 else {}
# By the interpreter, on a copy of every logit in pieces: minutes.
SLOW = {"linear_token_stats", "linear_token_stats_partial", "linear_token_loss"}
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
    conditions = one_of
    if target.interpreted:  # each takes a second
        conditions = (lambda call: ()) if CALLS <= 1000 or name in SLOW else one_of
    fuzz(name, each, tally, backend=target.backend, device=target.device, conditions=conditions, **size)
    assert tally.valid >= each
    assert tally.invalid >= 10 * each


FEW = (
    "token_kl", "group_advantages", "lambda_returns", "softmin_rewards", "token_stats", "PrefixTree.from_tokens",
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_conditions(backend, check):
    """Every condition, on a function of each kind."""
    if why := dispatch.unavailable(backend, "cpu"):
        pytest.skip(why)
    for name in FEW:
        fuzz(name, 6, Tally(), backend=backend, conditions=lambda call: (check,), shrink=False, **INTERPRETED)


COMPILED = ("gae", "implicit_rewards", "softmin_rewards", "token_stats")


@pytest.mark.parametrize("name", FUNCTIONS if CALLS > 1000 else COMPILED)
def test_numbers_move_in_compiled_calls(name):
    """A number that is another one at each step is one of a graph's, whatever the call."""

    @settings(max_examples=2, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(calls(name, on_device=True, **INTERPRETED))
    def check(call):
        check_compiled(call, "reference")

    check()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_minus_infinity_among_rewards(backend):
    if why := dispatch.unavailable(backend, "cpu"):
        pytest.skip(why)
    rewards = torch.tensor([[-torch.inf, 1.0, 2.0]], requires_grad=True)
    with rewardops.use_backend(backend):
        rewardops.softmin_rewards(rewards, mask=torch.tensor([[1, 0, 1]])).sum().backward()
    assert rewards.grad.isnan().tolist() == [[True, False, True]]


def test_a_dtype_of_its_own_is_refused():
    x = torch.zeros(1, 3)
    with Recorder() as recorder:
        rewardops.token_kl(x, x)
    ((op, _), args), *_ = recorder.seen.items()
    with pytest.raises(TypeError, match=r"ref_logprob: got dtype torch\.float64, want torch\.float32"):
        op(args[0], args[1].double(), *args[2:])


def test_memory_that_is_shared_is_seen():
    x = torch.zeros(4, 6)
    for windows in (x[:1].expand(4, 6), x.as_strided((3, 4), (1, 1)), x.as_strided((3, 4), (3, 1))):
        assert inplace.overlaps_itself(windows)
    assert not inplace.overlaps_itself(x[:, :3])
    assert inplace.share_memory(x[:3], x[1:])
    assert not inplace.share_memory(x[:2], x[2:])


def test_weights_are_no_mask():
    with pytest.raises(ValueError, match=r"mask: got 0.5 at \[0, 1\], want 0 or 1"):
        rewardops.discounted_returns(torch.ones(1, 3), mask=torch.tensor([[1.0, 0.5, 0.0]]))


def test_step_ids_fall_behind_a_masked_token():
    with pytest.raises(ValueError, match="steps: got id 1 after a larger one, at token 2 of row 0"):
        rewardops.min_returns(
            torch.ones(1, 3), steps=torch.tensor([[2, 0, 1]]), mask=torch.tensor([[1, 0, 1]])
        )


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
        ("largest", lambda out, args: out.float(), "output 0: torch.float32, want torch.bool"),
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
        fuzz("kl_cov_mask" if op == "largest" else "token_kl", 20, Tally(), backend="cpp", shrink=False)


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


# ---- conditions that it would find -------------------------------------------------------------------------


def finds(name, check, message, backend="reference"):
    condition = getattr(fuzz_conditions, f"check_{check}")
    with pytest.raises(AssertionError, match=message):
        fuzz(name, 40, Tally(), backend=backend, conditions=lambda call: (condition,), shrink=False)


def changed(monkeypatch, op, change):
    """Change the result of the reference's op, in place of the specification as well."""
    plain = dispatch._implementation

    def implementation(backend, family, name):
        original = plain(backend, family, name)
        return (lambda *args: change(original(*args))) if name == op else original

    monkeypatch.setattr(dispatch, "_implementation", implementation)


def test_a_default_dtype_is_found(monkeypatch):
    changed(monkeypatch, "token_kl", lambda out: out.to(torch.get_default_dtype()).to(out.dtype))
    finds("token_kl", "defaults", "the default (b?float16) changes the result")


def test_a_write_over_shared_memory_is_found(monkeypatch):
    if native.compiled_module() is None:
        pytest.skip("the compiled module was not built")
    monkeypatch.setattr(inplace, "obstacle", lambda *args: None)
    finds("token_stats_and_grad", "sharing", "shared memory: ", "cpp")


def test_an_infinity_that_does_not_show_is_found(monkeypatch):
    if native.compiled_module() is None:
        pytest.skip("the compiled module was not built")
    spoil(monkeypatch, "row_sums", lambda out, args: out.nan_to_num(0, 0, 0))
    finds("row_sum", "extremes", "(infinity|NaN|number) in values at .*: output 0", "cpp")


def test_a_row_that_depends_on_the_ones_before_it_is_found(monkeypatch):
    changed(monkeypatch, "row_sums", lambda out: out.cumsum(0).to(out.dtype))
    finds("row_sum", "permuted", "rows in another order")


def test_a_number_that_is_lost_in_a_tensor_is_found(monkeypatch):
    plain = checks.check_number

    def check(name, value, *want):
        return plain(name, value, *want) * (1 + isinstance(value, torch.Tensor))

    monkeypatch.setattr(checks, "check_number", check)
    finds("softmin_rewards", "numbers", "as tensors")


def test_an_unexpected_tensor_is_found(monkeypatch):
    monkeypatch.setattr(kinds._Call, "dtype", lambda *args: None)
    finds("token_kl", "raw", "rewardops.token_kl")


def test_a_constant_of_a_graph_is_found(monkeypatch):
    monkeypatch.setattr(scalars, "has_static_value", lambda number: True)
    rows = Rows(torch.tensor([3, 3]), 3, None, None)
    call = Call("softmin_rewards", Batch(rows, torch.tensor([0, 0]), torch.float32, 1))
    call.arguments = {
        "rewards": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "temperature": 0.5,
    }
    with pytest.raises(AssertionError, match="graphs for the numbers temperature"):
        check_compiled(call, "reference")
