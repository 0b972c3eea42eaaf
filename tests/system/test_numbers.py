"""Every float option of every public function: under compilation, and as a tensor of no dimensions."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import rewardops as ro
from rewardops import advantages
from rewardops.testing.calls import Batch, make_batch

FUNCTIONS: dict[str, typing.Callable[..., typing.Any]] = {
    name: getattr(module, name)
    for module in (advantages, ro)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


def options(fn) -> set[str]:
    """The names of a function's options that are numbers, those of its typed dictionaries included."""
    names = set()
    for parameter in inspect.signature(fn).parameters.values():
        hint = str(parameter.annotation)
        if parameter.kind is parameter.VAR_KEYWORD:
            typed = vars(inspect.getmodule(fn))[hint.removeprefix("Unpack[").removesuffix("]")]
            names |= {k for k, v in typed.__annotations__.items() if "float" in str(v)}
        elif "float" in hint:
            names.add(parameter.name)
    return names


def numbers(name: str, step: int):
    """An option's value at a training step: from .05 to .5, which all of them accept."""
    value = 0.05 + 0.04 * step
    if name in ("weights", "probs"):
        return [value, 1 - value]
    return value + 1 if name == "high" else value


# Calls of a function ``f`` on one differentiable input ``x``; options that are numbers are added.
Caller = typing.Callable[..., typing.Any]
CALLS: dict[str, tuple[str, Caller]] = {
    "advantages.gdpo": ("scores", lambda f, b, x, **o: f(x, b.groups, **o)),
    "advantages.grpo_s": (
        "values",
        lambda f, b, x, **o: f(b.rewards, x, b.groups, entropy_grad=True, **b.rows, **o),
    ),
    "advantages.gtpo": (
        "values",
        lambda f, b, x, **o: f(b.rewards, x, b.groups, entropy_grad=True, **b.rows, **o),
    ),
    "advantages.pure": (
        "values",
        lambda f, b, x, **o: f(x, b.steps, b.groups, outcome=b.rewards, **b.rows, **o),
    ),
    "advantages.reinforce_plus_plus": ("values", lambda f, b, x, **o: f(x, **b.rows, **o)),
    "budget_advantages": ("scores", lambda f, b, x, **o: f(x, b.groups, **o)),
    "budget_returns": ("scores", lambda f, b, x, **o: f(x, **o)),
    "clip_cov_mask": ("values", lambda f, b, x, **o: f(x, **b.rows, **o)),
    "clip_delta_rewards": ("values", lambda f, b, x, **o: f(x, b.steps, **b.rows, **o)),
    "discounted_returns": ("values", lambda f, b, x, **o: f(x, **b.rows, **o)),
    "entropy_bonus": ("values", lambda f, b, x, **o: f(x, b.critic, b.mask, **o)),
    "entropy_weights": (
        "values",
        lambda f, b, x, **o: f(x, mode="softmax", entropy_grad=True, **b.rows, **o),
    ),
    "gae": ("values", lambda f, b, x, **o: f(x, b.critic, **b.rows, **o)),
    "grpo_s_rewards": (
        "values",
        lambda f, b, x, **o: f(b.rewards, x, b.groups, entropy_grad=True, **b.rows, **o),
    ),
    "gtpo_rewards": (
        "values",
        lambda f, b, x, **o: f(b.rewards, x, b.groups, entropy_grad=True, **b.rows, **o),
    ),
    "high_entropy_mask": ("values", lambda f, b, x, **o: f(x, **b.rows, **o)),
    "implicit_rewards": ("values", lambda f, b, x, **o: f(x, b.critic, **b.rows, **o)),
    "kl_cov_mask": ("values", lambda f, b, x, **o: f(x, **b.rows, **o)),
    "lambda_returns": ("values", lambda f, b, x, **o: f(x, b.critic, **b.rows, **o)),
    "linear_token_loss": (
        "hidden",
        lambda f, b, x, **o: f(x, b.weight, b.tokens, {"logprob": b.values}, **o)[0],
    ),
    "linear_token_stats": ("hidden", lambda f, b, x, **o: f(x, b.weight, b.tokens, mask=b.mask, **o)[:2]),
    "linear_token_stats_partial": ("hidden", lambda f, b, x, **o: f(x, b.weight, b.tokens, mask=b.mask, **o)),
    "potential_shaping": ("values", lambda f, b, x, **o: f(x, b.critic, **b.rows, **o)),
    "prefix_values": ("rewards", lambda f, b, x, **o: f(b.tokens, x, b.groups, **b.rows, **o)[:2]),
    "redistribute_outcome": ("values", lambda f, b, x, **o: f(b.rewards, x, **b.rows, **o)),
    "sibling_advantages": ("rewards", lambda f, b, x, **o: f(b.tokens, x, b.groups, **b.rows, **o)),
    "signed_group_normalize": ("values", lambda f, b, x, **o: f(x, b.rewards, b.groups, **b.rows, **o)),
    "step_progress": ("values", lambda f, b, x, **o: f(x, b.steps, **b.rows, **o)),
    "softmin_returns": ("values", lambda f, b, x, **o: f(x, steps=b.steps, **b.rows, **o)),
    "softmin_rewards": ("values", lambda f, b, x, **o: f(x, steps=b.steps, **b.rows, **o)),
    "steer_weights": ("values", lambda f, b, x, **o: f(x, b.mask, **o)),
    "tempo_advantages": ("rewards", lambda f, b, x, **o: f(b.tokens, x, b.groups, **b.rows, **o)),
    "token_kl": ("values", lambda f, b, x, **o: f(x, b.critic, mask=b.mask, old_logprob=b.critic, **o)),
    "token_stats": ("logits", lambda f, b, x, **o: f(x, b.tokens, mask=b.mask, **o)[:2]),
    "token_stats_and_grad": (
        "logits",
        lambda f, b, x, **o: f(x.detach(), b.tokens, {"logprob": b.values}, **o)[1],
    ),
    "token_stats_partial": ("logits", lambda f, b, x, **o: f(x, b.tokens, mask=b.mask, **o)),
    "tree_advantages": ("rewards", lambda f, b, x, **o: f(b.parent, x, kind="siblings", max_depth=6, **o)),
    "tree_values": ("rewards", lambda f, b, x, **o: f(b.parent, x, reduce="softmax", max_depth=6, **o)),
    "tvm_targets": ("rewards", lambda f, b, x, **o: f(b.tokens, x, b.groups, **b.rows, **o)),
    "unlikeliness_rewards": ("rewards", lambda f, b, x, **o: f(x, b.scores[:, 1], b.groups, **o)),
    "vtrace": ("values", lambda f, b, x, **o: f(x, b.critic, b.values - 0.4, **b.rows, **o)),
    "whiten": ("values", lambda f, b, x, **o: f(x, b.mask, **o)),
}
PRESETS = (
    "dr_grpo",
    "gpg",
    "grpo",
    "lite_ppo",
    "max_rl",
    "pass_at_k",
    "reinforce_plus_plus_baseline",
    "rloo",
    "opo",
)
for preset in ("group_advantages", *(f"advantages.{name}" for name in PRESETS)):
    CALLS[preset] = "rewards", lambda f, b, x, **o: f(x, b.groups, **b.rows, **o)
# Several rewards per row are a case of their own.
LEFT_OUT = {name: {"weights"} for name in CALLS if name != "advantages.gdpo"} | {"budget_returns": set()}


def names_of(name: str) -> list[str]:
    return sorted(options(FUNCTIONS[name.removeprefix("advantages.")]) - LEFT_OUT.get(name, set()))


def test_the_table_has_every_function():
    with_numbers = {name for name, fn in FUNCTIONS.items() if options(fn) - {"weights"}}
    assert {name.removeprefix("advantages.") for name in CALLS} == with_numbers


def run(name: str, batch: Batch, wrap=lambda f: f):
    """A function of a call's numbers: its outputs, and the gradient of their sum."""
    of, call = CALLS[name]
    fn = FUNCTIONS[name.removeprefix("advantages.")]

    def step(x, given):
        out = [t for t in tree_leaves(call(fn, batch, x, **given)) if isinstance(t, torch.Tensor)]
        return [t for t in out if t.is_floating_point() or t.dtype is torch.bool]

    step = wrap(step)

    def both(given, seed):
        torch.manual_seed(seed)
        x = getattr(batch, of).detach().requires_grad_(True)
        out = step(x, given)
        smooth = [t for t in out if t.requires_grad]
        grads = (
            torch.autograd.grad([torch.where(t.isfinite(), t, 0).sum() for t in smooth], x) if smooth else ()
        )
        return [*out, *grads]

    return both


def eager_and_compiled(name: str):
    """The call in both modes, and the counter of its graphs."""
    batch, counter = make_batch(dtype=torch.float32), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = run(name, batch, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    return run(name, batch), compiled, counter


def check(ours, wanted, name: str):
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", sorted(CALLS))
def test_two_graphs_serve_every_value(name):
    """A controller moves every number at each step: the first graph is for constants, the second for all others."""
    eager, compiled, counter = eager_and_compiled(name)
    for step in range(4):
        given = {option: numbers(option, step) for option in names_of(name)}
        check(compiled(given, step), eager(given, step), f"{name} at step {step}")
        if step == 1:  # a second compilation may start over, to specialise what it does not use
            graphs = counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_tensor_of_no_dimensions_is_a_number(name):
    """In eager mode, and compiled."""
    eager, compiled, counter = eager_and_compiled(name)
    for step in range(2):
        given = {option: numbers(option, step) for option in names_of(name)}
        tensors = {option: torch.tensor(value, dtype=torch.float64) for option, value in given.items()}
        want = eager(given, step)
        check(eager(tensors, step), want, f"{name} with tensors")
        check(compiled(tensors, step), want, f"{name} compiled with tensors")
    assert counter.frame_count <= 2
