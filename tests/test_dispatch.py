"""What holds for every op: opcheck, gradcheck, torch.compile, forced backends, one public surface."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest
import torch

import rewardops
from rewardops import dispatch
from rewardops.testing import pack, random_groups, random_mask, shared_prefix_tokens

BATCH, WIDTH, VOCAB = 6, 7, 11


class Inputs(NamedTuple):
    """One small batch in both layouts; packed rows keep their holes."""

    mask: torch.Tensor
    lengths: torch.Tensor
    cu: torch.Tensor
    packed_mask: torch.Tensor
    groups: torch.Tensor
    rewards: torch.Tensor
    tokens: torch.Tensor
    steps: torch.Tensor
    logits: torch.Tensor
    values: torch.Tensor

    def pack(self, x):
        lengths = self.lengths.to(x.device)
        return pack(x, lengths)[0]


def inputs(device="cpu", dtype=torch.float64) -> Inputs:
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([7, 0, 5, 6, 3, 7])
    mask = random_mask(BATCH, WIDTH, g) & (torch.arange(WIDTH) < lengths[:, None])
    mask[0] = True
    groups = random_groups(BATCH, g)
    groups[:3] = 4
    packed_mask, cu = pack(mask, lengths)
    made = Inputs(
        mask,
        lengths,
        cu,
        packed_mask,
        groups,
        torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 1.0]).to(dtype),
        shared_prefix_tokens(groups, WIDTH, g),
        torch.rand(BATCH, WIDTH, generator=g) > 0.5,
        torch.randn(BATCH, WIDTH, VOCAB, generator=g).to(dtype),
        (torch.rand(BATCH, WIDTH, generator=g) + 0.1).to(dtype),
    )
    return Inputs(*(x.to(device) for x in made))


def smooth(outputs):
    """Those of a named tuple of outputs that have a gradient."""
    return [o for o in outputs if o is not None and o.is_floating_point()]


class KnownLoss(torch.autograd.Function):
    """A loss of one model's logits whose gradient comes with its value."""

    @staticmethod
    def forward(ctx, logits, tokens, mask, coefficient, inplace):
        coefficients = {name: coefficient for name in rewardops.logits.OUTPUTS[:6]}
        stats, grad = rewardops.token_stats_and_grad(
            logits.clone() if inplace else logits,
            tokens,
            coefficients,
            outputs=("is_top1",),
            mask=mask,
            temperature=0.7,
            softcap=2.0,
            vocab_size=VOCAB - 2,
            inplace=inplace,
        )
        ctx.save_for_backward(grad)
        return sum((coefficient * getattr(stats, name)).sum() for name in coefficients)

    @staticmethod
    def backward(ctx, up):
        (grad,) = ctx.saved_tensors
        return up * grad, None, None, None, None


def padded_calls(i: Inputs):
    """(name, function, differentiable inputs) of every public op on padded rows."""
    y = i.tokens
    return [
        (
            "token_stats",
            lambda x: rewardops.token_stats(
                x, y, temperature=0.7, mask=i.mask, outputs=("logprob", "entropy", "logsumexp")
            )[:3],
            [i.logits],
        ),
        (
            "token_stats of two models",
            lambda x, r: smooth(
                rewardops.token_stats(
                    x,
                    y,
                    ref_logits=r,
                    mask=i.mask,
                    outputs=rewardops.logits.OUTPUTS,
                    temperature=i.values[:, 0] + 0.5,
                    softcap=2.0,
                    vocab_size=VOCAB - 2,
                    beta=0.3,
                )
            ),
            [i.logits, i.logits.flip(0) * 0.7],
        ),
        (
            "token_stats in parts",
            lambda x, r: smooth(
                rewardops.merge_token_stats(
                    [
                        rewardops.token_stats_partial(
                            x[..., a:b],
                            y,
                            vocab_start=a,
                            ref_logits=r[..., a:b],
                            mask=i.mask,
                            outputs=rewardops.logits.PARTIAL_OUTPUTS,
                        )
                        for a, b in ((0, 4), (4, VOCAB))
                    ],
                    outputs=rewardops.logits.PARTIAL_OUTPUTS,
                    dtype=x.dtype,
                )
            ),
            [i.logits, i.logits.flip(0) * 0.7],
        ),
        (
            "token_stats_and_grad",
            lambda x: KnownLoss.apply(x, y, i.mask, i.values, False),
            [i.logits],
        ),
        (
            "token_stats_and_grad in place",
            lambda x: KnownLoss.apply(x, y, i.mask, i.values, True),
            [i.logits],
        ),
        (
            "linear_token_stats",
            lambda h, w, b: smooth(
                rewardops.linear_token_stats(
                    h,
                    w,
                    y,
                    bias=b,
                    mask=i.mask,
                    temperature=0.7,
                    chunk_tokens=5,
                    chunk_vocab=4,
                    outputs=rewardops.logits.OUTPUTS[:7],
                )
            ),
            [i.logits[..., :3], i.logits[0, :, :3].repeat(2, 1)[:VOCAB], i.logits[0, 0]],
        ),
        (
            "linear_token_stats of two models",
            lambda h, w, r, v: smooth(
                rewardops.linear_token_stats(
                    h,
                    w,
                    y,
                    ref_hidden=r,
                    ref_weight=v,
                    mask=i.mask,
                    logit_scale=0.5,
                    chunk_tokens=5,
                    num_tokens=y.numel(),
                    outputs=rewardops.logits.OUTPUTS,
                )
            ),
            [
                i.logits[..., :3],
                i.logits[0, :, :3].repeat(2, 1)[:VOCAB],
                i.logits[..., 3:5],
                i.logits[1, :, :2].repeat(2, 1)[:VOCAB],
            ],
        ),
        (
            "token_kl k1",
            lambda a, b: rewardops.token_kl(a, b, mask=i.mask, estimator="k1"),
            [i.values, i.values * 1.3 - 0.2],
        ),
        (
            "token_kl k2",
            lambda a, b: rewardops.token_kl(a, b, mask=i.mask, estimator="k2"),
            [i.values, i.values * 1.3 - 0.2],
        ),
        (
            "token_kl weighted",
            lambda a, b, r: rewardops.token_kl(
                a, b, mask=i.mask, importance=i.values.detach() * 0.9, beta=0.3, rewards=r, clamp=(20, 10)
            ),
            [i.values, i.values * 1.3 - 0.2, i.values + 1],
        ),
        (
            "token_kl binary",
            lambda a, b: rewardops.token_kl(a, b, mask=i.mask, estimator="binary_kl"),
            [-i.values, -i.values * 1.3 - 0.1],
        ),
        ("token_kl k3", lambda a, b: rewardops.token_kl(a, b, mask=i.mask), [i.values, i.values * 1.3 - 0.2]),
        ("group_advantages", lambda r: rewardops.group_advantages(r, i.groups), [i.rewards]),
        (
            "group_advantages rloo",
            lambda r: rewardops.group_advantages(r, i.groups, baseline="leave_one_out", scale="none"),
            [i.rewards],
        ),
        (
            "group_advantages given",
            lambda r, v: rewardops.group_advantages(
                r, i.groups, baseline="given", given=v, scale="batch_std", mask=i.mask
            ),
            [i.rewards, i.rewards.flip(0) + 0.3],
        ),
        (
            "group_advantages by length",
            lambda r: rewardops.group_advantages(
                r, i.groups, baseline="length_weighted", scale="mean_abs", mask=i.mask
            ),
            [i.rewards],
        ),
        (
            "implicit_rewards",
            lambda a, b: rewardops.implicit_rewards(a, b, beta=0.1, mask=i.mask, segments=i.steps),
            [i.values, i.values.flip(1)],
        ),
        (
            "group_advantages tokens",
            lambda r: rewardops.group_advantages(r, i.groups, baseline="none", mask=i.mask),
            [i.rewards],
        ),
        (
            "gtpo_rewards",
            lambda r, h: rewardops.gtpo_rewards(r, h, i.groups, mask=i.mask, entropy_grad=True),
            [i.rewards, i.values],
        ),
        (
            "gtpo",
            lambda h: rewardops.advantages.gtpo(i.rewards, h, i.groups, mask=i.mask, entropy_grad=True),
            [i.values],
        ),
        (
            "entropy_weights",
            lambda h: rewardops.entropy_weights(
                h * rewardops.high_entropy_mask(h, i.mask, fraction=0.4),
                i.mask,
                normalize="row",
                entropy_grad=True,
            ),
            [i.values],
        ),
        ("min_returns", lambda r: rewardops.min_returns(r, mask=i.mask, steps=i.steps), [i.values]),
        ("max_returns", lambda r: rewardops.max_returns(r, mask=i.mask, steps=i.steps.cumsum(1)), [i.values]),
        (
            "softmin_returns",
            lambda r: rewardops.softmin_returns(r, mask=i.mask, steps=i.steps, temperature=0.5),
            [i.values],
        ),
        (
            "gae",
            lambda r, v, b: rewardops.gae(r, v, gamma=0.9, lam=0.8, bootstrap=b, mask=i.mask),
            [i.values, i.values.flip(1), i.rewards],
        ),
        (
            "gae decay",
            lambda r, v, b: rewardops.gae(r, v, gamma=0.9, lam=0.8, bootstrap=b, mask=i.mask, hole="decay"),
            [i.values, i.values.flip(1), i.rewards],
        ),
        (
            "vtrace",
            lambda r, v: rewardops.vtrace(r, v, i.values - 0.4, lam=i.values * 0.8, gamma=0.9, mask=i.mask),
            [i.values, i.values.flip(1)],
        ),
        (
            "segments",
            lambda v: rewardops.place_at_step_end(
                rewardops.segment_reduce(v, i.steps, "max", num_segments=5, mask=i.mask), i.steps, mask=i.mask
            ),
            [i.values],
        ),
        ("progress", lambda q: rewardops.progress(q, i.steps, mask=i.mask), [i.values]),
        (
            "pure",
            lambda r, o: rewardops.advantages.pure(r, i.steps, i.groups, outcome=o, mask=i.mask),
            [i.values, i.rewards],
        ),
        (
            "softmin_rewards",
            lambda r: rewardops.softmin_rewards(r, mask=i.mask, steps=i.steps, temperature=0.5),
            [i.values],
        ),
        (
            "prefix_values",
            lambda r: rewardops.prefix_values(i.tokens, r, i.groups, mask=i.mask)[:2],
            [i.rewards],
        ),
        (
            "prefix_values of the others, weighed",
            lambda r, w: rewardops.prefix_values(
                i.tokens, r, i.groups, mask=i.mask, weights=w, gamma=0.9, min_count=2, leave_one_out=True
            )[:2],
            [i.values[:, :2], i.rewards + 0.5],
        ),
        (
            "tempo_advantages",
            lambda r: rewardops.tempo_advantages(i.tokens, r, i.groups, mask=i.mask),
            [i.rewards],
        ),
        (
            "prefix_std",
            lambda r, w: rewardops.prefix_std(i.tokens, r, i.groups, mask=i.mask, weights=w),
            [i.values[:, 0], i.rewards + 0.5],
        ),
        (
            "sibling_advantages",
            lambda r: rewardops.sibling_advantages(i.tokens, r, i.groups, mask=i.mask, eps=0.1),
            [i.values[:, 0]],
        ),
        (
            "tree_rl_advantages",
            lambda r: rewardops.tree_rl_advantages(i.tokens, r, i.groups, mask=i.mask, form="released"),
            [i.rewards],
        ),
        (
            "tree_advantages",
            lambda r: rewardops.tree_advantages(
                torch.tensor([-1, 0, 0, 2, 2, 2], device=r.device), r, reduce="softmax", max_depth=2
            ),
            [i.values[:, 0]],
        ),
    ]


def packed_calls(i: Inputs):
    tokens, steps, values = i.pack(i.tokens), i.pack(i.steps), i.pack(i.values)
    options = {"mask": i.packed_mask, "cu_seqlens": i.cu}
    return [
        (
            "token_stats",
            lambda x: rewardops.token_stats(x, tokens, mask=i.packed_mask)[:2],
            [i.pack(i.logits)],
        ),
        (
            "token_stats_and_grad",
            lambda x: KnownLoss.apply(x, tokens, i.packed_mask, values, False),
            [i.pack(i.logits)],
        ),
        ("token_kl", lambda a, b: rewardops.token_kl(a, b, mask=i.packed_mask), [values, values * 1.3 - 0.2]),
        ("group_advantages", lambda r: rewardops.group_advantages(r, i.groups, **options), [i.rewards]),
        (
            "group_advantages without a mask",
            lambda r: rewardops.group_advantages(r, i.groups, cu_seqlens=i.cu, num_tokens=values.shape[0]),
            [i.rewards],
        ),
        (
            "gtpo_rewards",
            lambda r, h: rewardops.gtpo_rewards(r, h, i.groups, entropy_grad=True, **options),
            [i.rewards, values],
        ),
        (
            "entropy_weights",
            lambda h: rewardops.entropy_weights(
                h * rewardops.high_entropy_mask(h, fraction=0.4, **options),
                normalize="row",
                entropy_grad=True,
                **options,
            ),
            [values],
        ),
        ("min_returns", lambda r: rewardops.min_returns(r, steps=steps, **options), [values]),
        (
            "softmin_returns",
            lambda r: rewardops.softmin_returns(r, steps=steps.cumsum(0), temperature=0.5, **options),
            [values],
        ),
        (
            "gae",
            lambda r, v, b: rewardops.gae(r, v, gamma=0.9, lam=0.8, bootstrap=b, **options),
            [values, values.flip(0), i.rewards],
        ),
        ("discounted_returns", lambda r: rewardops.discounted_returns(r, gamma=0.9, **options), [values]),
        (
            "segments",
            lambda v: rewardops.segment_broadcast(
                rewardops.segment_reduce(v, steps, "mean", num_segments=5, **options), steps, **options
            ),
            [values],
        ),
        (
            "pure",
            lambda r, o: rewardops.advantages.pure(r, steps, i.groups, outcome=o, **options),
            [values, i.rewards],
        ),
        (
            "softmin_rewards",
            lambda r: rewardops.softmin_rewards(r, steps=steps, temperature=0.5, **options),
            [values],
        ),
        ("prefix_values", lambda r: rewardops.prefix_values(tokens, r, i.groups, **options)[:2], [i.rewards]),
        (
            "prefix_values without holes",
            lambda r: rewardops.prefix_values(tokens, r, i.groups, hole="skip", gamma=0.9, **options)[:2],
            [i.rewards],
        ),
        (
            "tempo_advantages",
            lambda r: rewardops.tempo_advantages(tokens, r, i.groups, **options),
            [i.rewards],
        ),
    ]


def names(calls):
    return [name for name, *_ in calls(inputs())]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("calls", [padded_calls, packed_calls], ids=["padded", "packed"])
def test_gradcheck(target, calls):
    for name, fn, xs in calls(inputs(target.device)):
        # By random projections where kernels are interpreted: an entry at a time takes minutes there.
        assert torch.autograd.gradcheck(fn, leaves(xs), atol=1e-7, fast_mode=target.interpreted), name


@pytest.mark.parametrize("calls", [padded_calls, packed_calls], ids=["padded", "packed"])
def test_opcheck(target, calls):
    """Every op that a public call reaches, with the very arguments that it gets, forward and backward."""
    for name, fn, xs in calls(inputs(target.device, torch.float32)):
        seen = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, seen=seen):
                if func.namespace == "rewardops":
                    seen.append((func, args))
                return func(*args, **(kwargs or {}))

        with Recorder():
            xs = leaves(xs)
            outputs = fn(*xs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            torch.autograd.grad(outputs, xs, [torch.ones_like(o) for o in outputs])
        # A gradient that comes with the value has no op of its own, nor one.
        assert len(seen) >= (1 if "and_grad" in name else 2), name
        for func, args in seen:
            forward = "backward" not in func.name() and "and_grad" not in func.name()
            detached = [
                a.detach().clone().requires_grad_(forward and a.is_floating_point())
                if isinstance(a, torch.Tensor)
                else a
                for a in args
            ]
            torch.library.opcheck(func, tuple(detached))


@pytest.mark.parametrize("calls", [padded_calls, packed_calls], ids=["padded", "packed"])
def test_same_bits_every_time(target, calls):
    for name, fn, xs in calls(inputs(target.device, torch.float32)):
        runs = []
        for _ in range(2):
            outputs = fn(*(xs := leaves(xs)))
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            grads = torch.autograd.grad(outputs, xs, [o.detach() for o in outputs])
            runs.append([*outputs, *grads])
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", names(padded_calls))
def test_compile_padded(name):
    check_compiled(name, padded_calls(inputs(dtype=torch.float32)))


@pytest.mark.parametrize("name", names(packed_calls))
def test_compile_packed(name):
    check_compiled(name, packed_calls(inputs(dtype=torch.float32)))


def check_compiled(name, calls):
    (fn, xs) = next((fn, xs) for n, fn, xs in calls if n == name)

    def step(*xs):
        outputs = fn(*xs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return sum((o * o).sum() for o in outputs)

    eager, compiled = leaves(xs), leaves(xs)
    want = step(*eager)
    want.backward()
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True)(*compiled)
    got.backward()
    torch.testing.assert_close(got, want)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compile_is_dynamic_in_shapes():
    """One graph for every batch and length."""
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def step(logits, tokens, rewards, groups, mask):
        stats = rewardops.token_stats(logits, tokens, mask=mask)
        advantages = rewardops.group_advantages(rewards, groups, mask=mask)
        return (stats.logprob * advantages).sum() + stats.entropy.sum()

    for batch, width, vocab in ((4, 5, 17), (6, 9, 31), (8, 3, 50)):
        step(
            torch.randn(batch, width, vocab),
            torch.randint(0, vocab, (batch, width)),
            torch.randn(batch),
            torch.arange(batch) // 2,
            torch.ones(batch, width).bool(),
        )
    assert count.frame_count == 1


def test_ops_follow_inputs_under_no_grad_and_inference_mode(target):
    i = inputs(target.device, torch.float32)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _, fn, xs in padded_calls(i):
                out = fn(*xs)
                out = [out] if isinstance(out, torch.Tensor) else out
                assert not any(o.requires_grad for o in out)


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
    code = "import rewardops; print(rewardops.dispatch.backend_for('cpu'))"
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


@pytest.mark.skipif(dispatch.compiled_module() is None, reason="the compiled module was not built")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(isa):
    """Every table of kernels that this machine can run passes the family tests."""
    env = {**os.environ, "REWARDOPS_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "import rewardops; print(rewardops.dispatch.compiled_module().isa())"],
        env=env,
        capture_output=True,
        text=True,
    )
    if probe.stdout.strip() != isa:
        pytest.skip(f"this machine or build has no {isa}")
    families = ["logits", "kl", "advantages", "entropy", "returns", "prefix_tree", "prefix_values", "tree"]
    files = [os.path.join(os.path.dirname(__file__), f"test_{family}.py") for family in families]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpp", "-p", "no:cacheprovider", *files],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_threads_at_once_and_after_fork():
    logits = torch.randn(64, 5000)
    tokens = torch.randint(0, 5000, (64,))
    want = rewardops.token_stats(logits, tokens).entropy
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(rewardops.token_stats(logits, tokens).entropy, want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong
    code = (
        "import os, torch, rewardops\n"
        "torch.set_num_threads(2)\n"
        "x, y = torch.randn(64, 5000), torch.zeros(64).long()\n"
        "a = rewardops.token_stats(x, y).entropy\n"
        "pid = os.fork()\n"
        "same = torch.equal(rewardops.token_stats(x, y).entropy, a)\n"
        "os._exit(0 if same else 1) if pid == 0 else None\n"
        "assert same and os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
