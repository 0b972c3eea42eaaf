"""Ops inside PyTorch: autocast, inference mode, torch.func, higher derivatives, checkpointing, hooks, DDP."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rewardops
from rewardops.testing import calls, evaluate, same_bits

# Their matmuls run in the precision of autocast; autocast leaves all other ops alone.
PRODUCTS = ("linear_token_stats", "linear_token_stats_partial", "linear_token_loss")
# Plain tensor arithmetic, which has derivatives of every order; and what is linear, with the sums that it needs.
TWICE = (
    "budget_advantages",
    "budget_returns",
    "step_progress",
    "step_progress discounted",
    "redistribute_outcome",
    "redistribute_outcome signed",
    "redistribute_outcome softmax",
    "row_mean",
    "row_sum",
    "running_mean",
    "running_sum",
    "segment_broadcast",
    "segment_reduce",
    "unlikeliness_rewards",
)
LAYOUTS = pytest.mark.parametrize("layout", calls.LAYOUTS)


def smooth(layout, dtype=torch.float64):
    """The differentiable calls on a small batch."""
    return [call for call in calls.calls(calls.make_batch(layout=layout, dtype=dtype)) if call.differentiable]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def loss_of(fn):
    """A scalar whose upstream gradients differ from token to token, and depend on the outputs."""

    def loss(*xs):
        outputs = fn(*xs)
        return sum((o * o).sum() for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))

    return loss


def gradients(fn, inputs):
    xs = leaves(inputs)
    loss_of(fn)(*xs).backward()  # not autograd.grad, which reentrant checkpoints do not support
    return [x.grad for x in xs]


def assert_equal(found, wanted, name):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b), name


# ---- autocast, inference mode ------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_changes_products_alone(backend, layout):
    for call in calls.calls(calls.make_batch(layout=layout, dtype=torch.float32)):
        inputs = call.inputs
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(call.fn, inputs, backend=backend)
        if call.op in PRODUCTS:
            inputs = [x.bfloat16() for x in inputs]
        want = evaluate(call.fn, inputs, backend=backend)
        assert [o.dtype for o in got.outputs] == [o.dtype for o in want.outputs], call.name
        if call.op in PRODUCTS:
            want = want._replace(gradients=[g.float() for g in want.gradients])
        if call.op == "linear_token_stats_partial":
            # Under autocast the parts' gradients of the hidden states are summed in float32.
            got, want = (x._replace(gradients=x.gradients[1:]) for x in (got, want))
        assert same_bits(got, want), call.name


def test_products_under_autocast_are_a_linear_layers(generator):
    """Matmuls run in autocast's dtype except for float64; the backward pass runs in the dtype of the forward."""
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (5, 11))
    tokens = torch.arange(5)
    for dtype, used in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float64,) * 2,
    ):
        want = gradients(lambda h, w: rewardops.linear_token_stats(h, w, tokens)[:2],
                         [hidden.to(dtype).to(used), weight.to(dtype).to(used)])  # fmt: skip
        xs = leaves([hidden.to(dtype), weight.to(dtype)])
        with torch.autocast("cpu", torch.bfloat16):
            stats = rewardops.linear_token_stats(*xs, tokens)[:2]
        assert all(s.dtype == (torch.float64 if used is torch.float64 else torch.float32) for s in stats)
        got = torch.autograd.grad(sum((s * s).sum() for s in stats), xs)
        assert_equal(got, [w.to(dtype) for w in want], dtype)


def test_logits_of_inference_mode_are_written_over():
    tokens = torch.tensor([1, 2, 0])
    with torch.inference_mode():
        logits = torch.randn(3, 4)
    want, grad = rewardops.token_stats_and_grad(logits, tokens, {"logprob": torch.ones(3)})
    same, over = rewardops.token_stats_and_grad(logits, tokens, {"logprob": torch.ones(3)}, inplace=True)
    assert over.data_ptr() == logits.data_ptr()
    assert torch.equal(over, grad)
    assert torch.equal(same.logprob, want.logprob)


# ---- torch.func, higher derivatives ------------------------------------------------------------------------


@LAYOUTS
def test_func_grad(layout):
    for call in smooth(layout):
        places = tuple(range(len(call.inputs)))
        got = torch.func.grad(loss_of(call.fn), places)(*call.inputs)
        assert_equal(got, gradients(call.fn, call.inputs), call.name)


@LAYOUTS
def test_vmap(layout):
    """vmap over any dimension, nested, around and inside a gradient, equals slice by slice."""
    for call in smooth(layout):
        loss, places = loss_of(call.fn), tuple(range(len(call.inputs)))
        slices = [[x * scale for x in call.inputs] for scale in (1.0, 0.9)]
        stacked = [torch.stack(xs) for xs in zip(*slices, strict=True)]
        want = torch.stack([loss(*xs) for xs in slices])
        assert torch.equal(torch.vmap(loss)(*stacked), want), call.name
        twice = torch.vmap(torch.vmap(loss, in_dims=-1))(*[torch.stack([x, x], -1) for x in stacked])
        assert torch.equal(twice, want[:, None].expand(2, 2)), call.name
        want = [torch.stack(gs) for gs in zip(*(gradients(call.fn, xs) for xs in slices), strict=True)]
        assert_equal(torch.vmap(torch.func.grad(loss, places))(*stacked), want, call.name)
        total = torch.func.grad(lambda *xs, loss=loss: torch.vmap(loss)(*xs).sum(), places)(*stacked)
        assert_equal(total, want, call.name)


def test_vmap_over_nothing_says_so():
    with pytest.raises(
        ValueError, match=r"vmap over rewardops\.token_kl\.default: got a dimension of size 0"
    ):
        torch.vmap(rewardops.token_kl)(torch.zeros(0, 3), torch.zeros(0, 3))


@LAYOUTS
def test_second_derivatives_are_right_or_refused(layout):
    for call in smooth(layout):
        if "_and_grad" in call.name:
            continue  # the test's own function is once_differentiable
        if call.name in TWICE:
            assert torch.autograd.gradgradcheck(call.fn, leaves(call.inputs), fast_mode=True), call.name
            continue
        xs = leaves(call.inputs)
        got = torch.autograd.grad(loss_of(call.fn)(*xs), xs, create_graph=True)
        # Added to another differentiable term, where a lost graph would go unnoticed.
        penalty = sum((g * g).sum() for g in got) + sum(x.sum() for x in xs)
        with pytest.raises(RuntimeError, match=r"rewardops::\w+: a second derivative was asked for"):
            torch.autograd.grad(penalty, xs)


def test_forward_mode_is_refused():
    a, b = torch.rand(3), torch.rand(3)
    with pytest.raises(RuntimeError, match=r"rewardops::token_kl: a forward-mode derivative was asked for"):
        torch.func.jvp(lambda a: rewardops.token_kl(a, b), (a,), (b,))
    with pytest.raises(RuntimeError, match=r"rewardops::token_kl_backward: a forward-mode derivative"):
        torch.func.hessian(lambda a: rewardops.token_kl(a, b).sum())(a)


def test_a_gradient_of_an_op_without_one_is_refused():
    logits = torch.randn(3, 4, requires_grad=True)
    y = torch.zeros(3, dtype=torch.long)
    ones = [torch.ones(3)]
    args = (ones, ["logprob"], logits, y, None, None, None, 1.0, 0.0, 0, 4, 0.5, ["logprob"])
    stats, _ = torch.ops.rewardops.token_stats_and_grad(*args)
    with pytest.raises(RuntimeError, match="rewardops::token_stats_and_grad: a gradient was asked for"):
        stats.sum().backward()


# ---- who sees an op ----------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Names of the ops that run while it is open."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Logged(torch.Tensor):
    """A subclass that notes the ops it meets."""

    names: typing.ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def who_called(call):
    """The names of the Python functions that the CPU's kernel of an op was called from."""
    callers = set()

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_name == "on_cpu":
            callers.add(frame.f_back.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return callers


def test_modes_and_subclasses_see_every_op():
    x, name = torch.rand(3, 4), "rewardops.row_sums.default"
    for mode in (Seen(), Functions()):
        with mode:
            rewardops.row_sum(x)
        assert name in mode.names
    Logged.names.clear()
    assert isinstance(rewardops.row_sum(x.as_subclass(Logged)), Logged)
    assert name in Logged.names


def test_the_profiler_sees_every_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        rewardops.row_sum(torch.rand(3, 4))
    assert "rewardops::row_sums" in {event.key for event in seen.key_averages()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_traced_call_is_in_the_graph():
    graph = make_fx(lambda x: rewardops.row_sum(x))(torch.rand(3, 4)).graph
    assert any("row_sums" in str(node.target) for node in graph.nodes)
    traced = torch.jit.trace(lambda x: rewardops.row_sum(x), torch.rand(3, 4))
    assert "rewardops::row_sums" in str(traced.graph)


def test_a_plain_call_goes_straight_to_its_kernel():
    """And not where a gradient is to be recorded."""
    x = torch.rand(3, 4)
    assert who_called(lambda: rewardops.row_sum(x)) == {"directly"}
    assert who_called(lambda: rewardops.gae(x, x, gamma=0.5, lam=0.5)) == {"directly"}
    x.requires_grad_()
    assert who_called(lambda: rewardops.row_sum(x)) - {"directly"}
    with torch.no_grad():
        assert who_called(lambda: rewardops.row_sum(x)) == {"directly"}


def test_a_negated_view_is_read_as_its_numbers():
    z = torch.complex(torch.zeros(2, 3), torch.arange(6.0).view(2, 3))
    x = z.conj().imag
    assert x.is_neg()
    assert rewardops.row_sum(x).tolist() == [-3.0, -12.0]


# ---- saved tensors: checkpointing, hooks, writing in place -------------------------------------------------


def stats_of(inplace):
    def fn(hidden, weight, tokens):
        logits = hidden @ weight.T
        return rewardops.token_stats(logits, tokens, inplace_backward=inplace)[:2]

    return fn


def linear_stats(hidden, weight, tokens):
    return rewardops.linear_token_stats(hidden, weight, tokens)[:2]


def linear_loss(hidden, weight, tokens):
    coefficients = {"logprob": torch.linspace(-1, 1, len(tokens)), "entropy": torch.full((len(tokens),), 0.1)}
    return rewardops.linear_token_loss(hidden, weight, tokens, coefficients)[0]


BLOCKS = pytest.mark.parametrize(
    "fn",
    [stats_of(False), stats_of(True), linear_stats, linear_loss],
    ids=["token_stats", "token_stats in place", "linear_token_stats", "linear_token_loss"],
)


@pytest.fixture
def block(generator):
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (7, 11))
    return hidden, weight, torch.randint(0, 11, (7,), generator=generator)


@BLOCKS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(fn, reentrant, block):
    hidden, weight, tokens = block
    got = gradients(lambda h, w: checkpoint(fn, h, w, tokens, use_reentrant=reentrant), [hidden, weight])
    assert_equal(got, gradients(lambda h, w: fn(h, w, tokens), [hidden, weight]), reentrant)


@BLOCKS
def test_saved_tensor_hooks(fn, block):
    """Saved tensors are offloaded and returned unchanged: a second backward pass equals the first."""
    hidden, weight, tokens = block
    want = gradients(lambda h, w: fn(h, w, tokens), [hidden, weight])
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        xs = leaves([hidden, weight])
        with hooks:
            loss = loss_of(lambda h, w: fn(h, w, tokens))(*xs)
        for _ in range(2):
            assert_equal(torch.autograd.grad(loss, xs, retain_graph=True), want, hooks)


def test_a_checkpoint_that_shares_logits(block):
    """Another op in the checkpoint reads the logits after a possible overwrite by token_stats."""
    hidden, weight, tokens = block

    def fn(hidden, weight, inplace):
        logits = hidden @ weight.T
        square = logits.square()
        return rewardops.token_stats(logits, tokens, inplace_backward=inplace)[0].sum() + square.sum()

    want = gradients(lambda h, w: fn(h, w, False), [hidden, weight])
    got = gradients(lambda h, w: checkpoint(fn, h, w, True, use_reentrant=False), [hidden, weight])
    assert_equal(got, want, "checkpoint")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(lambda h, w: fn(h, w, True), [hidden, weight])


@pytest.mark.parametrize("fn", [stats_of(True), linear_loss], ids=["token_stats", "linear_token_loss"])
def test_what_is_written_over_is_not_read_again(fn, block):
    hidden, weight, tokens = block
    xs = leaves([hidden, weight])
    loss = loss_of(lambda h, w: fn(h, w, tokens))(*xs)
    torch.autograd.grad(loss, xs, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, xs)


# ---- torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token_stats", "linear_token_loss", "gae", "group_advantages on tokens"])
def test_compiled_twice_at_most(name):
    """By default torch.compile detects varying sizes at the second size (test_dispatch has dynamic=True)."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda fn, *xs: fn(*xs), fullgraph=True, backend="aot_eager")
    for k, size in enumerate(((6, 7, 11), (8, 9, 14), (12, 5, 23), (5, 13, 17))):
        batch_calls = calls.calls(calls.make_batch(*size, dtype=torch.float32))
        (call,) = (call for call in batch_calls if call.name == name)
        with torch.compiler.set_stance("default" if k < 2 else "fail_on_recompile"):
            compiled(call.fn, *leaves(call.inputs))


def test_compiled_around_a_checkpoint(block):
    hidden, weight, tokens = block

    def fn(h, w):
        return checkpoint(stats_of(True), h, w, tokens, use_reentrant=False)

    torch._dynamo.reset()
    got = gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), [hidden, weight])
    for a, b in zip(got, gradients(fn, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_export(generator):
    """An op is one node of an exported graph, for any number of tokens."""

    class Model(nn.Module):
        def forward(self, logits, tokens):
            return rewardops.token_stats(logits, tokens).logprob

    def arguments(count):
        return torch.randn(count, 11, generator=generator), torch.arange(count)

    count = torch.export.Dim("count")
    exported = torch.export.export(Model(), arguments(3), dynamic_shapes=({0: count}, {0: count}))
    assert [n.target for n in exported.graph.nodes if "rewardops" in str(n.target)] == [
        torch.ops.rewardops.token_stats.default
    ]
    inputs = arguments(5)
    assert torch.equal(exported.module()(*inputs), Model()(*inputs))


# ---- DistributedDataParallel -------------------------------------------------------------------------------


class Policy(nn.Module):
    """A model that returns per-token statistics, as in a trainer: the logits stay inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, tokens, mask):
        hidden = self.embed(tokens)
        fused = rewardops.linear_token_stats(hidden, self.head.weight, tokens, bias=self.head.bias, mask=mask)
        plain = rewardops.token_stats(self.head(hidden), tokens, mask=mask, inplace_backward=True)
        return fused.logprob, plain.entropy


def policy_gradients(model, rows):
    g = torch.Generator().manual_seed(1)
    tokens, rewards = torch.randint(0, 11, (4, 5), generator=g)[rows], torch.rand(4, generator=g)[rows]
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[rows, None]
    logprob, entropy = model(tokens, mask)
    advantages = rewardops.group_advantages(rewards, group_size=2, mask=mask)
    ((logprob * advantages).sum() + entropy.sum()).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def ddp_rank(rank, folder):
    """Run a rank's half of the batch, then exit: destroying a process group beside DDP may hang."""
    torch.manual_seed(0)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Policy())
    torch.save(policy_gradients(model, [2 * rank, 2 * rank + 1]), os.path.join(folder, f"rank{rank}"))
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_ddp(tmp_path):
    """The gradients of two ranks equal the mean of one process's gradients of the halves."""
    code = "import os, sys, torch._dynamo, test_torch as t; t.ddp_rank(int(os.fork() > 0), sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parent, timeout=300, check=True)
    torch.manual_seed(0)
    want = policy_gradients(Policy(), [0, 1, 2, 3])
    for rank in (0, 1):
        got = torch.load(tmp_path / f"rank{rank}")
        assert got.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad / 2, msg=name)
