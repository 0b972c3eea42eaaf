"""Process groups: results and gradients on two and four processes equal those on one."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import rewardops
from rewardops import advantages, returns, td
from rewardops.core import distributed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


SIZES = [2, 4]


def cut(x, sizes):
    """The rows of each rank."""
    return None if x is None else x.split(sizes)


def at_rank(process_group, parts):
    return parts[dist.get_rank(process_group)]


def with_gradient(fn, *inputs):
    """Outputs, and the gradient of the sum of all ranks' losses."""
    xs = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*xs)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), xs)
    return [out.detach(), *grads]


# ---- advantages --------------------------------------------------------------------------------------------

ROWS = {2: [7, 5], 4: [5, 0, 1, 6]}


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    rewards = torch.randn(12, generator=generator, dtype=dtype)
    groups = torch.tensor([3, 3, 0, 7, 0, 3, 7, 0, 0, 9, 3, 5])
    mask = torch.rand(12, 6, generator=generator) < 0.6
    mask[4] = False  # a row without a token
    rewards[[1, 5]] = rewards[0].clone()
    return rewards, groups, mask


def _advantages(process_group, parts, options, hint):
    rewards, groups, mask, *rest = at_rank(process_group, parts)
    tensors = dict(zip(options.pop("tensors", ()), rest, strict=True))

    def fn(r):
        return advantages.group_advantages(
            r, groups, mask=mask, process_group=process_group, max_per_rank=hint, **tensors, **options
        )

    return with_gradient(fn, rewards)


OPTIONS = [
    {},
    {"baseline": "leave_one_out", "scale": "none"},
    {"scale": "batch_std", "ddof": 0},
    {"baseline": 0.3, "scale": "range"},
    {"baseline": "length_weighted", "scale": "none"},
    {"tensors": ("baseline",)},
    {"singleton": "raw", "baseline": "second_max", "scale": "none"},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_groups_of_rows_on_several_ranks(ranks, size, options):
    rewards, groups, mask = _batch()
    tensors = [rewards, groups, mask]
    arguments = {}
    if "tensors" in options:
        arguments["baseline"] = torch.linspace(-1, 1, 12, dtype=torch.float64)
        tensors.append(arguments["baseline"])
    parts = list(zip(*(cut(x, ROWS[size]) for x in tensors), strict=True))
    got = ranks.run(size, _advantages, parts, dict(options), None)
    hinted = ranks.run(size, _advantages, parts, dict(options), 9)
    whole = {k: v for k, v in options.items() if k != "tensors"}
    want = with_gradient(
        lambda r: rewardops.group_advantages(r, groups, mask=mask, **arguments, **whole), rewards
    )
    for k, value in enumerate(want):
        together = torch.cat([f[k] for f in got])
        torch.testing.assert_close(together, value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.cat([f[k] for f in hinted]), value, rtol=1e-12, atol=1e-14)
        if k == 0:
            assert torch.equal(together, value)


def _numbered(process_group, parts, group_size, hint):
    return advantages.grpo(
        at_rank(process_group, parts), group_size=group_size, process_group=process_group, max_per_rank=hint
    )


@pytest.mark.parametrize("hint", [None, 8])
@pytest.mark.parametrize("group_size", [4, [5, 0, 1, 6]], ids=str)
def test_group_sizes_run_on_from_rank_to_rank(ranks, group_size, hint):
    rewards = _batch()[0].float()
    for size in SIZES:
        got = ranks.run(size, _numbered, cut(rewards, ROWS[size]), group_size, hint)
        want = rewardops.group_advantages(rewards, group_size=group_size)
        torch.testing.assert_close(torch.cat(got), want)


def _nothing(process_group):
    empty = torch.zeros(0, requires_grad=True)
    out = [
        rewardops.group_advantages(empty, group_size=2, process_group=process_group),
        rewardops.whiten(empty.view(0, 3), process_group=process_group),
        rewardops.discounted_returns(empty.view(0, 3), process_group=process_group),
        rewardops.high_entropy_mask(empty.view(0, 3), process_group=process_group),
        rewardops.token_stats(empty.view(0, 3), torch.zeros(0).long(), process_group=process_group).logprob,
    ]
    sum(x.sum() for x in out if x.requires_grad).backward()
    return [x.detach() for x in out]


def test_no_rows_anywhere(ranks):
    for got in ranks.run(2, _nothing):
        assert [tuple(x.shape) for x in got] == [(0,), (0, 3), (0, 3), (0, 3), (0,)]


def _second(process_group):
    x = torch.ones(3, 2, dtype=torch.float64).cumsum(0).requires_grad_()
    out = rewardops.whiten(x, process_group=process_group)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_second_derivative_is_refused(ranks):
    ranks.run(2, _second)


def _named(process_group, rewards, names):
    return advantages.rloo(rewards, at_rank(process_group, names), process_group=process_group)


def test_labels_that_are_strings_mean_the_same_everywhere(ranks):
    """Ranks encounter labels in different orders."""
    names = [["a", "b", "a"], ["b", "c", "b"]]
    rewards = torch.tensor([1.0, 2.0, 4.0])
    got = torch.cat(ranks.run(2, _named, rewards, names))
    want = advantages.rloo(rewards.repeat(2), names[0] + names[1])
    assert torch.equal(got, want)
    numbers = [np.array([7, 8, 7]), np.array([8, 9, 8])]
    assert torch.equal(torch.cat(ranks.run(2, _named, rewards, numbers)), want)


def _preset(process_group, name, parts, options):
    rewards, groups, mask = at_rank(process_group, parts)
    first = (
        {"token_rewards": rewards}
        if name == "reinforce_plus_plus"
        else {"rewards": rewards, "groups": groups}
    )
    return getattr(advantages, name)(**first, mask=mask, process_group=process_group, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpg", {}),
        ("gpg", {"alpha": "rewards"}),
        ("gdpo", {"weights": [1.0, 0.5]}),
        ("gdpo", {"whitening": "tokens"}),
        ("gdpo", {"whitening": "rows", "missing": True}),
        ("gdpo", {"whitening": "tokens", "missing": True}),
        ("gdpo", {"whitening": "none"}),
        ("lite_ppo", {}),
        ("reinforce_plus_plus", {"gamma": 0.9}),
        ("reinforce_plus_plus_baseline", {}),
    ],
)
def test_presets(ranks, name, options):
    rewards, groups, mask = _batch()
    options = dict(options)
    if name == "gdpo":
        rewards = torch.stack([rewards, rewards.square()], 1)
        if options.pop("missing", False):
            rewards[1::3, 1] = rewards[4] = torch.nan
    if name == "reinforce_plus_plus":
        rewards = rewards[:, None] * torch.arange(6)
    if options.get("alpha") == "rewards":
        rewards = (rewards > 0).double()
    first = (rewards,) if name == "reinforce_plus_plus" else (rewards, groups)
    want = getattr(advantages, name)(*first, mask=mask, **options)
    for size in SIZES:
        parts = list(zip(*(cut(x, ROWS[size]) for x in (rewards, groups, mask)), strict=True))
        got = ranks.run(size, _preset, name, parts, options)
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-12, atol=1e-14)


def _whitened(process_group, parts, options):
    values, mask = at_rank(process_group, parts)
    return with_gradient(lambda x: rewardops.whiten(x, mask, process_group=process_group, **options), values)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("options", [{}, {"ddof": 0, "shift_mean": False}, {"eps": 0.5}], ids=str)
def test_whiten(ranks, options, offset):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(12, 6, generator=generator, dtype=torch.float64) + offset
    mask = _batch()[2]
    values[~mask] = torch.nan
    want = with_gradient(lambda x: rewardops.whiten(x, mask, **options), values)
    for size in SIZES:
        parts = list(zip(cut(values, ROWS[size]), cut(mask, ROWS[size]), strict=True))
        got = ranks.run(size, _whitened, parts, options)
        for k, value in enumerate(want):
            torch.testing.assert_close(torch.cat([f[k] for f in got]), value, rtol=1e-8, atol=1e-9)


def test_whiten_of_equal_values_is_zero(ranks):
    values = torch.full((12, 6), 0.1)
    parts = list(zip(cut(values, ROWS[4]), cut(torch.ones_like(values), ROWS[4]), strict=True))
    assert all(not f[0].any() for f in ranks.run(4, _whitened, parts, {"eps": 0.0}))


# ---- selection ---------------------------------------------------------------------------------------------


def _high(process_group, parts, scope, hint, packed):
    entropy, mask, groups = at_rank(process_group, parts)
    options = {"scope": scope, "fraction": 0.3, "groups": groups if scope == "group" else None}
    ranks = {"process_group": process_group, "max_per_rank": hint}
    if packed:
        cu = torch.arange(entropy.shape[0] + 1) * entropy.shape[1]
        flat = rewardops.high_entropy_mask(entropy.view(-1), mask.view(-1), cu_seqlens=cu, **options, **ranks)
        return flat.view(entropy.shape)
    return rewardops.high_entropy_mask(entropy, mask, **options, **ranks)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("scope", ["batch", "group", "row"])
def test_high_entropy_mask(ranks, scope, packed):
    _, groups, mask = _batch()
    entropy = torch.rand(12, 6, generator=torch.Generator().manual_seed(1))
    entropy = (entropy * 8).round() / 8  # many ties: the earliest are selected
    entropy[~mask] = torch.nan
    named = groups if scope == "group" else None
    want = rewardops.high_entropy_mask(entropy, mask, fraction=0.3, scope=scope, groups=named)
    for size in SIZES:
        parts = list(zip(*(cut(x, ROWS[size]) for x in (entropy, mask, groups)), strict=True))
        for hint in (None, 50) if scope != "row" else (None,):
            got = ranks.run(size, _high, parts, scope, hint, packed)
            assert torch.equal(torch.cat(got), want)


# ---- shards of the vocabulary ------------------------------------------------------------------------------

EVERY = rewardops.logits.PARTIAL_OUTPUTS


def _logits(process_group, logits, ref, tokens, outputs, options):
    n, k = dist.get_world_size(process_group), dist.get_rank(process_group)
    shard, ref = (x.chunk(n, -1)[k].clone().requires_grad_() for x in (logits, ref))
    got = rewardops.token_stats(
        shard, tokens, ref_logits=ref, outputs=outputs, process_group=process_group, **options
    )
    return _with_gradients(got, outputs, [shard, ref])


def _with_gradients(found, outputs, inputs):
    """Outputs, and the gradient of a loss that is equal on all ranks."""
    values = [getattr(found, name) for name in outputs]
    finite = [torch.where(v.isfinite(), v, 0) for v in values if v.requires_grad]
    loss = sum((v * v.detach().cos()).sum() for v in finite)
    return [v.detach() for v in values], list(torch.autograd.grad(loss, inputs))


def _case(dtype):
    generator = torch.Generator().manual_seed(11)
    logits, ref = (torch.randn(9, 48, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    tokens = torch.randint(0, 43, (9,), generator=generator)
    tokens[2] = -100
    logits[3, 5] = -torch.inf
    ref[3, 5] = -torch.inf
    return logits.to(dtype), ref.to(dtype), tokens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [EVERY, ("logprob",), ("kl", "entropy")], ids=len)
def test_logits_in_shards(ranks, size, dtype, outputs):
    """All but seven columns of the last of four shards are padding."""
    logits, ref, tokens = _case(dtype)
    mask = torch.arange(9) != 6
    options = {"vocab_size": 43, "temperature": 0.8, "softcap": None, "mask": mask}
    got = ranks.run(size, _logits, logits, ref, tokens, outputs, options)
    whole = [x.clone().requires_grad_() for x in (logits, ref)]
    want = _with_gradients(
        rewardops.token_stats(whole[0], tokens, ref_logits=whole[1], outputs=outputs, **options),
        outputs,
        whole,
    )
    # Merged sums have the precision of unmerged ones, with one more rounding.
    exact = dtype is torch.float64
    close = {"rtol": 1e-11, "atol": 1e-12} if exact else {"rtol": 2e-6, "atol": 2e-6}
    for values, _ in got:
        for value, first, expected in zip(values, got[0][0], want[0], strict=True):
            assert value.equal(first)
            torch.testing.assert_close(value, expected, **close)
    for k in range(2):
        together = torch.cat([grads[k] for _, grads in got], -1)
        rounding = {"rtol": 2**-7, "atol": 1e-5} if dtype is torch.bfloat16 else close
        torch.testing.assert_close(together, want[1][k], **rounding)


def _hidden(process_group, hidden, weight, bias, tokens, outputs, options):
    n, k = dist.get_world_size(process_group), dist.get_rank(process_group)
    inputs = [x.clone().requires_grad_() for x in (hidden, weight.chunk(n)[k], bias.chunk(n)[k])]
    got = rewardops.linear_token_stats(
        inputs[0], inputs[1], tokens, bias=inputs[2], outputs=outputs, process_group=process_group, **options
    )
    return _with_gradients(got, outputs, inputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"vocab_size": 21, "chunk_tokens": 3, "chunk_vocab": 5}], ids=len)
def test_hidden_states_and_a_head_in_shards(ranks, size, dtype, options):
    """With 21 tokens the third of four shards has padding, and the fourth is all padding."""
    generator = torch.Generator().manual_seed(13)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 5, 8), (40, 8), (40,))
    )
    tokens = torch.randint(0, 21, (2, 5), generator=generator)
    tokens[1, 2] = -100
    options = {"mask": torch.arange(5).expand(2, 5) != 3, "softcap": 20.0, **options}
    outputs = ("logprob", "entropy", "sum_p2", "is_top1")
    got = ranks.run(size, _hidden, hidden, weight, bias, tokens, outputs, options)
    whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    want = _with_gradients(
        rewardops.linear_token_stats(whole[0], whole[1], tokens, bias=whole[2], outputs=outputs, **options),
        outputs, whole,
    )  # fmt: skip
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 5e-6, "atol": 5e-6}
    for values, grads in got:
        for value, expected in zip(values, want[0], strict=True):
            torch.testing.assert_close(value, expected, **close)
        assert torch.equal(grads[0], got[0][1][0])
        torch.testing.assert_close(grads[0], want[1][0], **close)
    for k in (1, 2):
        torch.testing.assert_close(torch.cat([grads[k] for _, grads in got]), want[1][k], **close)


# ---- parts of rows -----------------------------------------------------------------------------------------

WIDTHS = {2: [10, 7], 4: [6, 0, 1, 10]}


def _returns(process_group, name, parts, rest):
    (rewards, values, *tokens), names = at_rank(process_group, parts), rest["tokens"]
    arguments = dict(zip(names, tokens, strict=True))
    options = {**rest["options"], "process_group": process_group, **arguments}
    return _of_returns(name, rewards, values, rest["bootstrap"], options)


def _of_returns(name, rewards, values, bootstrap, options):
    fn = getattr(rewardops, name)
    if name in ("gae", "lambda_returns"):
        inputs = [rewards, values, bootstrap]
        call = lambda r, v, b: fn(r, v, bootstrap=b, **options)  # noqa: E731
    elif name == "discounted_returns":
        inputs = [rewards, bootstrap]
        call = lambda r, b: fn(r, bootstrap=b, **options)  # noqa: E731
    else:
        inputs, call = [rewards], lambda r: fn(r, **options)
    xs = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*xs)
    out = out if isinstance(out, torch.Tensor) else torch.stack(list(out))
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), xs)
    return out.detach(), grads


def _takes(name):
    return inspect.signature(getattr(rewardops, name)).parameters


# The functions whose rows may lie on several ranks in parts, each with every choice of its numbers.
PUBLIC = [name for family in (td, returns) for name in family.__all__ if name in rewardops.__all__]
SCANS = [name for name in PUBLIC if "process_group" in _takes(name)]
NUMBERS = {"gamma", "lam", "temperature"}
OPTIONS = [
    {},
    {"gamma": 0.9},
    {"gamma": 1.0},
    {"gamma": 0.97, "lam": 0.9},
    {"gamma": 0.9, "lam": 0.0},
    {"gamma": torch.tensor([1.0, 0.5, 0.0, 0.9, 0.8]), "lam": torch.tensor([0.9, 0.0, 1.0, 0.5, 1.0])},
    {"temperature": 0.3},
    {"temperature": 0.3, "mean": True},
]
RETURNS = [
    (name, options)
    for name in SCANS
    for options in OPTIONS
    if NUMBERS & set(_takes(name)) <= set(options) <= set(_takes(name))
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_token", ["mask", "mask and more"])
@pytest.mark.parametrize(("name", "options"), RETURNS, ids=str)
def test_rows_in_parts(ranks, name, options, per_token, size):
    """Steps (or factors, where there are no steps) per token, holes across cuts, a part without a column."""
    generator = torch.Generator().manual_seed(17)
    rewards, values = torch.randn(2, 5, 17, generator=generator, dtype=torch.float64)
    rewards = (rewards * 4).round() / 4  # ties: the earliest has the gradient
    mask = torch.rand(5, 17, generator=generator) < 0.7
    mask[3, 7:] = False
    mask[4, :7] = False
    rewards[~mask] = torch.nan
    values[~mask] = torch.inf
    tokens = {"mask": mask}
    if per_token != "mask":
        if "returns" in name and name not in ("discounted_returns", "lambda_returns"):
            tokens["steps"] = torch.rand(5, 17, generator=generator) < 0.3
        else:
            keys = ("gamma",) if name == "discounted_returns" else ("gamma", "lam")
            tokens |= {key: torch.rand(5, 17, generator=generator).round(decimals=1) for key in keys}
            options = {}
    bootstrap = torch.linspace(-1, 1, 5, dtype=torch.float64)
    widths = WIDTHS[size]
    parts = [
        [x[:, a:b] for x in (rewards, values, *tokens.values())]
        for a, b in zip(
            [sum(widths[:k]) for k in range(size)], [sum(widths[: k + 1]) for k in range(size)], strict=True
        )
    ]
    rest = {"tokens": list(tokens), "options": options, "bootstrap": bootstrap}
    got = ranks.run(size, _returns, name, parts, rest)
    want, grads = _of_returns(name, rewards, values, bootstrap, {**options, **tokens})
    torch.testing.assert_close(torch.cat([out for out, _ in got], -1), want, rtol=1e-11, atol=1e-12)
    of_tokens = 2 if name in ("gae", "lambda_returns") else 1
    for k, grad in enumerate(grads):
        of_ranks = [g[k] for _, g in got]
        together = torch.cat(of_ranks, -1) if k < of_tokens else sum(of_ranks)
        torch.testing.assert_close(together, grad, rtol=1e-10, atol=1e-11)


def _packed(process_group, parts, gamma):
    rewards, cu = at_rank(process_group, parts)
    return (
        rewardops.discounted_returns(rewards, gamma=gamma, cu_seqlens=cu, process_group=process_group),
        rewardops.min_returns(rewards, cu_seqlens=cu, process_group=process_group),
    )


def test_packed_rows_in_parts(ranks):
    """Three rows, of lengths 5, 3 and 0, and 0, 4 and 2, on two ranks."""
    rewards = torch.randn(14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = rewards[:8], rewards[8:]
    parts = [(a, torch.tensor([0, 5, 8, 8])), (b, torch.tensor([0, 0, 4, 6]))]
    got = ranks.run(2, _packed, parts, 0.9)
    whole, cu = torch.cat([a, b[:4], b[4:]]), torch.tensor([0, 5, 12, 14])
    for k, want in enumerate(
        (
            rewardops.discounted_returns(whole, gamma=0.9, cu_seqlens=cu),
            rewardops.min_returns(whole, cu_seqlens=cu),
        )
    ):
        torch.testing.assert_close(torch.cat([f[k] for f in got]), want, rtol=1e-12, atol=1e-13)


# ---- what all have in common -------------------------------------------------------------------------------


def _calls(process_group, device="cpu"):
    """Calls of every function with a process group, on a small input of this rank."""
    k = 0 if process_group is None else dist.get_rank(process_group)
    x, mask = torch.arange(12.0, device=device).view(3, 4) + k, torch.ones(3, 4, device=device)
    tokens = torch.tensor([1, 5, 7] if k else [1, 2, 0], device=device)
    where = {} if process_group is None else {"process_group": process_group}
    hint = {**where, "max_per_rank": 12} if where else {}
    return {
        "group_advantages": lambda: rewardops.group_advantages(x[:, 0], tokens % 2, mask=mask, **hint),
        "whiten": lambda: rewardops.whiten(x, **where),
        "high_entropy_mask": lambda: rewardops.high_entropy_mask(x, **hint),
        "token_stats": lambda: rewardops.token_stats(x, tokens, **where).logprob,
        "linear_token_stats": lambda: rewardops.linear_token_stats(x, x, tokens, **where).logprob,
        **{name: _scan(name, x, where) for name in SCANS},
    }


def _scan(name, x, where):
    fn, taken = getattr(rewardops, name), _takes(name)
    inputs = [x, x.cos()] if "values" in taken else [x]
    options = {key: 0.9 for key in ("gamma", "lam") if key in taken} | where

    def call():
        out = fn(*inputs, **options)
        return out if isinstance(out, torch.Tensor) else out[0]

    return call


def _counted(process_group):
    """The number of collectives of a call, and True if a second call has the same bits."""
    found = {}
    real = distributed._all_gather
    for name, call in _calls(process_group).items():
        made = []

        def counted(*args, made=made, **options):
            made.append(args[0].numel())
            return real(*args, **options)

        distributed._all_gather = counted
        try:
            first, second = call(), call()
        finally:
            distributed._all_gather = real
        found[name] = len(made) / 2, torch.equal(first, second)
    return found


def test_one_collective_and_the_same_bits(ranks):
    for got in ranks.run(4, _counted):
        assert got == dict.fromkeys(got, (1, True))


def _alone(process_group, device):
    """Compare every call in a group of only this rank with the call without a group."""
    if device == "cuda":
        process_group = dist.new_group([0], backend="nccl", use_local_synchronization=True)
    calls = [_calls(group, device) for group in (process_group, None)]
    return {name: [call[name]().cpu() for call in calls] for name in calls[0]}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_group_of_one_rank(ranks, device):
    """The same code runs on NCCL if there is a GPU."""
    (got,) = ranks.run(1, _alone, device)
    for name, (ours, want) in got.items():
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def _compiled(process_group):
    """Compare every call as one graph with eager; return the differences by name."""
    got = []
    for name, call in _calls(process_group).items():
        if name == "linear_token_stats":  # reads the number of valid tokens
            continue
        torch._dynamo.reset()
        if not torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(), call()):
            got.append(name)
    return got


def test_collectives_are_part_of_a_compiled_graph(ranks):
    assert ranks.run(2, _compiled) == [[], []]


WRONG = [
    (lambda pg: rewardops.whiten(torch.ones(2), process_group=3), TypeError, "process_group: got int"),
    (lambda pg: rewardops.group_advantages(torch.ones(2), [1, 1], process_group="x"), TypeError, "process_group"),
    (lambda pg: rewardops.group_advantages(torch.ones(2), [1, 1], max_per_rank=2), ValueError, "max_per_rank"),
    (
        lambda pg: rewardops.group_advantages(torch.ones(2), group_size=1, process_group=pg, max_per_rank=1),
        ValueError, "max_per_rank: got 1, want at least 2",
    ),
    (
        lambda pg: rewardops.group_advantages(torch.ones(2), group_size=3, process_group=pg),
        ValueError, "group_size: got 3, want a divisor",
    ),
    (
        lambda pg: rewardops.group_advantages(torch.ones(2), [1.5, 2.5], process_group=pg),
        TypeError, "groups: got a label of type float",
    ),
    (
        lambda pg: rewardops.high_entropy_mask(torch.ones(2, 2), scope="group", group_size=2, process_group=pg),
        ValueError, "group_size",
    ),
    (
        lambda pg: rewardops.token_stats(
            torch.ones(2, 3), torch.tensor([0, 1]), inplace_backward=True, process_group=pg
        ),
        ValueError, "inplace_backward",
    ),
    (
        lambda pg: rewardops.token_stats(
            torch.ones(2, 3), torch.tensor([0, 1]), ref_logits=torch.ones(2, 3), outputs=["jsd"], process_group=pg
        ),
        ValueError, "outputs: got 'jsd'",
    ),
    (lambda pg: rewardops.gae(*torch.ones(2, 2, 3), masked="step", process_group=pg), ValueError, "masked"),
    (
        lambda pg: rewardops.min_returns(torch.ones(2, 3), steps=torch.zeros(2, 3).long(), process_group=pg),
        TypeError, "steps: got dtype torch.int64 with process_group",
    ),
]  # fmt: skip


def _errors(process_group):
    got = []
    for call, kind, message in WRONG:
        with pytest.raises(kind, match=message) as error:
            call(process_group)
        got.append(str(error.value))
    return got


def test_wrong_arguments_are_named(ranks):
    """Errors are raised on every rank, before any collective in which others would wait."""
    assert len(ranks.run(2, _errors)[0]) == len(WRONG)
