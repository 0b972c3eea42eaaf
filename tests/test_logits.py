"""token_stats on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import assert_within_budget, check_op, evaluate, random_mask

ALL = ("logprob", "entropy", "logsumexp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stats(tokens, mask=None, temperature=1.0, outputs=ALL):
    def fn(logits):
        y = tokens.to(logits.device)
        m = None if mask is None else mask.to(logits.device)
        return rewardops.token_stats(logits, y, temperature=temperature, mask=m, outputs=outputs)

    return fn


def draw(shape, vocab, generator, scale=3.0, dtype=torch.float32):
    logits = (torch.randn(*shape, vocab, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, vocab, shape, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000, 5003])
def test_matches_float64(target, generator, dtype, vocab):
    logits, tokens = draw((9,), vocab, generator, dtype=dtype)
    check_op(stats(tokens, temperature=0.7), [logits], backend=target.backend, device=target.device)


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, -120.0])
def test_scales_and_offsets(target, generator, scale, offset):
    logits, tokens = draw((6,), 2500, generator, scale)
    check_op(stats(tokens), [logits + offset], backend=target.backend, device=target.device)


@pytest.mark.parametrize("masked", [False, True])
def test_padded_rows_and_strided_views(target, generator, masked):
    logits, tokens = draw((3, 6), 130, generator)
    mask = random_mask(3, 5, generator) if masked else None
    fn = stats(tokens[:, 1:], mask)
    check_op(lambda x: fn(x[:, :-1]), [logits], backend=target.backend, device=target.device)
    # Rows with a padded stride, and columns that are no unit stride apart.
    wide = torch.randn(5, 200, generator=generator)
    fn = stats(torch.arange(5))
    check_op(lambda x: fn(x[:, :77]), [wide], backend=target.backend, device=target.device)
    check_op(lambda x: fn(x[:, ::2]), [wide], backend=target.backend, device=target.device)


def test_real_vocabulary(target, generator):
    logits, tokens = draw((3,), 50257, generator)
    check_op(stats(tokens), [logits], backend=target.backend, device=target.device)


def test_peaked_and_flat_rows(target):
    vocab = 4096
    peaked = torch.zeros(vocab)
    peaked[17] = 25.0  # entropy about 1e-6
    flat = torch.full((vocab,), 3.0)
    logits = torch.stack([peaked, flat])
    ours = check_op(
        stats(torch.tensor([17, 5])), [logits], backend=target.backend, device=target.device
    ).outputs
    # An entropy of 1e-6 to its own last places, where a float32 sum of probabilities has none of them.
    if target.backend != "reference":
        p = peaked.double().softmax(0)
        assert ours[1][0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert ours[1][1].item() == pytest.approx(math.log(vocab), rel=1e-6)
    assert ours[0][1].item() == pytest.approx(-math.log(vocab), rel=1e-6)


def test_minus_infinity(target, generator):
    vocab = 9000
    logits, _ = draw((4,), vocab, generator)
    logits[0, 3] = -torch.inf  # one column
    logits[1, :8192] = -torch.inf  # whole first blocks
    logits[2, torch.arange(vocab) != 8500] = -torch.inf  # everywhere but at the token
    logits[3, 11] = -torch.inf  # at the token
    tokens = torch.tensor([5, 8500, 8500, 11])
    ours = check_op(stats(tokens), [logits], backend=target.backend, device=target.device)
    logprob, entropy, _ = ours.outputs
    assert logprob[2].item() == 0.0
    assert entropy[2].item() == 0.0
    assert logprob[3].item() == -math.inf
    assert ours.gradients[0].isfinite().all()


def test_a_row_without_mass_is_nan_and_alone(target):
    logits = torch.zeros(2, 8)
    logits[0] = -torch.inf
    out = evaluate(stats(torch.tensor([1, 1])), [logits], backend=target.backend, device=target.device)
    assert all(o[0].isnan() and o[1].isfinite() for o in out.outputs)


def test_nan_in_a_logit_shows(target):
    logits = torch.zeros(3, 5000)
    logits[0, 4999] = torch.nan
    logits[1, :4096] = -torch.inf
    logits[1, 5] = torch.nan
    out = evaluate(stats(torch.tensor([1, 4999, 1])), [logits], backend=target.backend, device=target.device)
    assert out.outputs[0].isnan().tolist() == [True, True, False]
    assert out.outputs[1].isnan().tolist() == [True, True, False]


def test_masked_rows_never_influence(target, generator):
    logits, tokens = draw((4, 5), 70, generator)
    mask = random_mask(4, 5, generator)
    clean = evaluate(stats(tokens, mask), [logits], backend=target.backend, device=target.device)
    dirty = torch.where(mask[..., None], logits, torch.nan)
    tokens = torch.where(mask, tokens, -100)
    ours = evaluate(stats(tokens, mask), [dirty], backend=target.backend, device=target.device, poison=mask)
    for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
        assert torch.equal(a, b)
    assert all(bool((o.cpu()[~mask] == 0).all()) for o in ours.outputs)
    assert bool((ours.gradients[0].cpu()[~mask] == 0).all())


@pytest.mark.parametrize("outputs", [("logprob",), ("entropy",), ("logsumexp",), ("entropy", "logprob")])
def test_only_what_was_asked_for(target, generator, outputs):
    logits, tokens = draw((5,), 40, generator)
    result = stats(tokens, outputs=outputs)(logits.to(target.device))
    assert {name for name, value in result._asdict().items() if value is not None} == set(outputs)
    check_op(stats(tokens, outputs=outputs), [logits], backend=target.backend, device=target.device)


def test_ids_out_of_range_are_nan_and_never_read(target, generator):
    logits, tokens = draw((4,), 9, generator)
    tokens[1], tokens[2] = 9, -1
    result = stats(tokens)(logits.to(target.device))
    assert result.logprob.isnan().tolist() == [False, True, True, False]
    assert result.entropy.isfinite().all()
    with rewardops.debug(), pytest.raises(ValueError, match=r"tokens: got 9 at \[1\], want ids in \[0, 9\)"):
        stats(tokens)(logits.to(target.device))


def test_offsets_beyond_2_to_the_31(target, generator):
    """Rows 2^31 elements apart; what lies between is never touched, so it takes address space and no memory."""
    if target.interpreted:
        pytest.skip("the interpreter copies its arguments")
    apart, vocab = 2**31 + 16, 300
    logits, tokens = draw((2,), vocab, generator, dtype=torch.bfloat16)
    far = torch.empty(apart + vocab, dtype=torch.bfloat16, device=target.device)
    far = far.as_strided((2, vocab), (apart, 1))
    far.copy_(logits)
    ours = stats(tokens)(far)
    near = stats(tokens)(logits.to(target.device))
    assert torch.equal(ours.logprob, near.logprob)
    assert torch.equal(ours.entropy, near.entropy)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty(target, shape):
    logits = torch.zeros(*shape, 5)
    ours = check_op(
        stats(torch.zeros(shape, dtype=torch.int64)), [logits], backend=target.backend, device=target.device
    )
    assert ours.outputs[0].shape == shape


def test_same_bits_every_time(target, generator):
    logits, tokens = draw((7,), 3001, generator)
    runs = [evaluate(stats(tokens), [logits], backend=target.backend, device=target.device) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip([*runs[0].outputs, *runs[0].gradients], [*run.outputs, *run.gradients], strict=True):
            assert torch.equal(a, b)


def test_against_torch_in_float64(target, generator):
    """The independent oracle: log_softmax, and autograd through it."""
    if target.backend == "triton" and target.device.type == "cpu":
        pytest.skip("float64 cases of the interpreter are covered above")
    logits, tokens = draw((8,), 301, generator, dtype=torch.float64)
    logits = logits.to(target.device).requires_grad_()
    y = tokens.to(target.device)
    logp = (logits / 1.3).log_softmax(-1)
    want = (logp.gather(-1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1))
    (want_grad,) = torch.autograd.grad(want[0].sum() + 2 * want[1].sum(), logits)
    got = rewardops.token_stats(logits, y, temperature=1.3)
    (got_grad,) = torch.autograd.grad(got.logprob.sum() + 2 * got.entropy.sum(), logits)
    torch.testing.assert_close(got.logprob, want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, want[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["trl_linear_stats.npz"])
def test_recorded_pairs(target, shared, name):
    d = np.load(shared / "golden" / name)
    hidden, weight, bias = (torch.tensor(d[k], dtype=torch.float64) for k in ("hidden", "weight", "bias"))
    hidden.requires_grad_()
    logits = (hidden @ weight.T + bias).float().to(target.device)
    got = rewardops.token_stats(
        logits, torch.tensor(d["targets"]).to(target.device), temperature=float(d["temperature"])
    )
    torch.testing.assert_close(got.logprob.cpu().detach(), torch.tensor(d["logprob"]), rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(got.entropy.cpu().detach(), torch.tensor(d["entropy"]), rtol=2e-6, atol=5e-6)
    up = [torch.tensor(d[k]).to(target.device) for k in ("upstream_logprob", "upstream_entropy")]
    (grad,) = torch.autograd.grad([got.logprob, got.entropy], hidden, up)
    torch.testing.assert_close(grad.float(), torch.tensor(d["grad_hidden"]), rtol=1e-4, atol=1e-5)


@given(
    shift=st.floats(-100, 100, width=32),
    rows=st.integers(1, 4),
    vocab=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_property_shift_invariance_and_bounds(shift, rows, vocab, seed):
    logits, tokens = draw((rows,), vocab, torch.Generator().manual_seed(seed), dtype=torch.float64)
    here = rewardops.token_stats(logits, tokens)
    there = rewardops.token_stats(logits + shift, tokens)
    torch.testing.assert_close(here.logprob, there.logprob, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(here.entropy, there.entropy, rtol=1e-10, atol=1e-10)
    assert bool((here.entropy >= -1e-12).all())
    assert bool((here.entropy <= math.log(vocab) + 1e-12).all())
    assert bool((here.logprob <= 1e-12).all())


def test_beats_eager_on_half_precision(target, generator):
    """bf16 logits: outputs are float32 and carry float32's error, not bf16's."""
    logits, tokens = draw((16,), 2000, generator, dtype=torch.bfloat16)
    exact = evaluate(stats(tokens), [logits], backend="reference", dtype=torch.float64)
    ours = evaluate(stats(tokens), [logits], backend=target.backend, device=target.device)
    assert all(o.dtype is torch.float32 for o in ours.outputs)
    assert ours.gradients[0].dtype is torch.bfloat16
    for a, b in zip(ours.outputs, exact.outputs, strict=True):
        assert_within_budget(a, b, b.float(), ulps=16)
