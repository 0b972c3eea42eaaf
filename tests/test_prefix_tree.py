"""prefix_values and tempo_advantages on every backend."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import (
    check_op,
    evaluate,
    pack,
    random_groups,
    random_mask,
    shared_prefix_tokens,
)


def values(tokens, groups, mask=None, cu_seqlens=None, **options):
    def fn(rewards):
        to = [None if x is None else x.to(rewards.device) for x in (tokens, groups, mask, cu_seqlens)]
        return rewardops.prefix_values(to[0], rewards, to[1], mask=to[2], cu_seqlens=to[3], **options)

    return fn


def tempo(tokens, groups, mask=None, cu_seqlens=None, **options):
    def fn(rewards):
        to = [None if x is None else x.to(rewards.device) for x in (tokens, groups, mask, cu_seqlens)]
        return rewardops.tempo_advantages(to[0], rewards, to[1], mask=to[2], cu_seqlens=to[3], **options)

    return fn


def trie(tokens, rewards, groups, mask):
    """The oracle: a dictionary from (group, prefix) to the rewards of the rows that begin with it."""
    spans, found = [], {}
    for b in range(len(rewards)):
        valid = mask[b].nonzero()[:, 0].tolist()
        row = tokens[b, valid[0] : valid[-1] + 1].tolist() if valid else None
        spans.append((valid[0] if valid else 0, row))
        for t in range(0 if row is None else len(row) + 1):
            found.setdefault((int(groups[b]), tuple(row[:t])), []).append(float(rewards[b]))
    before = torch.zeros(tokens.shape, dtype=torch.float64)
    after, count = torch.zeros_like(before), torch.zeros(tokens.shape, dtype=torch.int64)
    for b, (start, row) in enumerate(spans):
        for t in range(0 if row is None else len(row)):
            if not mask[b, start + t]:
                continue
            here = found[int(groups[b]), tuple(row[:t])]
            there = found[int(groups[b]), tuple(row[: t + 1])]
            before[b, start + t] = sum(here) / len(here)
            after[b, start + t] = sum(there) / len(there)
            count[b, start + t] = len(there)
    return before, after, count


def draw(batch, width, generator, holes=True):
    groups = random_groups(batch, generator)
    tokens = shared_prefix_tokens(groups, width, generator)
    return (
        tokens,
        torch.randn(batch, generator=generator),
        groups,
        random_mask(batch, width, generator, holes=holes),
    )


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_matches_the_trie(target, generator, holes, dtype):
    tokens, rewards, groups, mask = draw(24, 40, generator, holes)
    ours = check_op(
        values(tokens.to(dtype), groups, mask), [rewards], backend=target.backend, device=target.device
    )
    want = trie(tokens, rewards, groups, mask)
    for a, b in zip(ours.outputs, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-6, atol=1e-6)
    assert ours.outputs[2].dtype is torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_reward_dtypes(target, generator, dtype):
    tokens, rewards, groups, mask = draw(12, 20, generator)
    for make in (values, tempo):
        check_op(
            make(tokens, groups, mask), [rewards.to(dtype)], backend=target.backend, device=target.device
        )


def test_tempo_by_hand(target):
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8, 0], [1, 2, 3, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    groups = torch.zeros(4, dtype=torch.int64)
    want = torch.tensor(
        [[1, 4 / 3, 5 / 3, 1], [-1, -2 / 3, -7 / 3, -1], [-1, -2, -1, 0], [1, 4 / 3, 5 / 3, 1]]
    )
    for ddof, factor in ((0, 1.0), (1, 0.8660254)):
        ours = tempo(tokens, groups, mask, ddof=ddof, eps=0.0)(rewards.to(target.device)).cpu()
        torch.testing.assert_close(ours, want * factor, rtol=1e-6, atol=1e-6)


def test_tempo_matches_float64(target, generator):
    tokens, rewards, groups, mask = draw(18, 30, generator)
    check_op(tempo(tokens, groups, mask), [rewards], backend=target.backend, device=target.device)
    check_op(tempo(tokens, groups), [rewards], backend=target.backend, device=target.device)
    check_op(
        tempo(tokens, groups, mask, scale="none"), [rewards], backend=target.backend, device=target.device
    )


def test_group_size(target, generator):
    groups = torch.arange(24) // 6
    tokens = shared_prefix_tokens(groups, 30, generator)
    rewards = torch.randn(24, generator=generator)
    a = evaluate(values(tokens, groups), [rewards], backend=target.backend, device=target.device)
    b = evaluate(values(tokens, None, group_size=6), [rewards], backend=target.backend, device=target.device)
    for x, y in zip([*a.outputs, *a.gradients], [*b.outputs, *b.gradients], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_padded(target, generator, masked):
    tokens, rewards, groups, _ = draw(16, 35, generator)
    lengths = torch.randint(0, 36, (16,), generator=generator)
    lengths[5] = 0
    inside = torch.arange(35) < lengths[:, None]
    mask = inside & random_mask(16, 35, generator) if masked else inside
    packed, cu = pack(tokens, lengths)
    packed_mask = pack(mask, lengths)[0] if masked else None
    for make in (values, tempo):
        padded = evaluate(make(tokens, groups, mask), [rewards], backend=target.backend, device=target.device)
        ours = check_op(
            make(packed, groups, packed_mask, cu), [rewards], backend=target.backend, device=target.device
        )
        for a, b in zip(ours.outputs, padded.outputs, strict=True):
            assert torch.equal(a.cpu(), pack(b.cpu(), lengths)[0])


def test_masked_ends_never_influence(target, generator):
    """Prompt, padding and empty rows; what is masked between valid tokens is part of the prefix."""
    tokens, rewards, groups, _ = draw(14, 30, generator)
    length = torch.randint(0, 26, (14,), generator=generator)
    start = torch.randint(0, 5, (14,), generator=generator)
    column = torch.arange(30)
    mask = (column >= start[:, None]) & (column < (start + length)[:, None])
    mask[3] = False
    clean = evaluate(values(tokens, groups, mask), [rewards], backend=target.backend, device=target.device)
    dirty = torch.where(mask, tokens, torch.randint(0, 3, tokens.shape, generator=generator))
    rewards = rewards.clone()
    rewards[3] = torch.nan
    ours = evaluate(
        values(dirty, groups, mask), [rewards], backend=target.backend, device=target.device, poison=mask
    )
    for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
        assert torch.equal(a, b)
    assert all(bool((o.cpu()[~mask] == 0).all()) for o in ours.outputs)


def test_duplicates_and_strict_prefixes(target):
    tokens = torch.tensor([[4, 5, 6], [4, 5, 6], [4, 5, 0], [4, 9, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    before, after, count = values(tokens, torch.zeros(4).long(), mask)(rewards.to(target.device))
    third = 2 / 3
    assert before.cpu().tolist() == [
        [0.5, 0.5, pytest.approx(third)],
        [0.5, 0.5, pytest.approx(third)],
        [0.5, 0.5, 0.0],
        [0.5, 0.5, 0.0],
    ]
    assert after.cpu().tolist() == [
        [0.5, pytest.approx(third), 0.5],
        [0.5, pytest.approx(third), 0.5],
        [0.5, pytest.approx(third), 0.0],
        [0.5, 0.0, 0.0],
    ]
    assert count.cpu().tolist() == [[4, 3, 2], [4, 3, 2], [4, 3, 0], [4, 1, 1]]


def test_rows_that_share_a_prefix_have_the_same_bits(target, generator):
    groups = torch.zeros(33, dtype=torch.int64)
    tokens = shared_prefix_tokens(groups, 50, generator)
    rewards = torch.randn(33, generator=generator)
    before, after, _ = (x.cpu() for x in values(tokens, groups)(rewards.to(target.device)))
    for i in range(33):
        for j in range(i):
            same = int((tokens[i] == tokens[j]).long().cumprod(0).sum())
            assert torch.equal(before[i, : same + 1], before[j, : same + 1])
            assert torch.equal(after[i, :same], after[j, :same])


def test_equal_rewards_give_no_advantage(target, generator):
    groups = torch.zeros(8, dtype=torch.int64)
    tokens = shared_prefix_tokens(groups, 12, generator)
    out = tempo(tokens, groups)(torch.full((8,), 0.7, device=target.device))
    assert bool((out == 0).all())


def test_long_rows(target, generator):
    """Prefixes longer than a block of the compare, and differences in every place of a block."""
    width = 2300
    tokens = torch.randint(0, 9, (1, width), generator=generator).repeat(7, 1)
    for i, place in enumerate([0, 1, 255, 256, 1024, 2299], start=1):
        tokens[i, place] += 1
    groups = torch.zeros(7, dtype=torch.int64)
    rewards = torch.randn(7, generator=generator)
    ours = check_op(values(tokens, groups), [rewards], backend=target.backend, device=target.device)
    want = trie(tokens[:, :300], rewards, groups, torch.ones(7, 300).bool())
    for a, b in zip(ours.outputs, want, strict=True):
        torch.testing.assert_close(a[:, :300].cpu().double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty(target, shape):
    for make in (values, tempo):
        ours = check_op(
            make(torch.zeros(shape).long(), torch.zeros(shape[0]).long()),
            [torch.ones(shape[0])],
            backend=target.backend,
            device=target.device,
        )
        assert ours.outputs[0].shape == shape


def test_real_rollouts(target, shared):
    """Real answers at byte level, four to a question."""
    with (shared / "data" / "gsm8k_rollouts.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(32), file, strict=False)]
    texts = [list(row["response"].encode()) for row in rows]
    lengths = torch.tensor([len(t) for t in texts])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = torch.tensor(text)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    groups = torch.tensor([row["group"] for row in rows])
    rewards = torch.tensor([row["reward"] for row in rows])
    got = values(tokens, groups, mask)(rewards.to(target.device))
    for a, b in zip(got, trie(tokens, rewards, groups, mask), strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-6, atol=1e-6)
    assert bool((got.count.cpu() > 1).any())


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 9), width=st.integers(1, 14))
def test_property_differences_telescope(seed, batch, width):
    g = torch.Generator().manual_seed(seed)
    tokens, rewards, groups, mask = draw(batch, width, g, holes=False)
    rewards = rewards.double()
    before, after, count = rewardops.prefix_values(tokens, rewards, groups, mask=mask)
    live = mask.any(1)
    for b in range(batch):
        if not live[b]:
            continue
        peers = live & (groups == groups[b])
        mean, last = rewards[peers].mean(), after[b, int(mask[b].sum()) - 1]
        torch.testing.assert_close((after - before)[b].sum(), last - mean, rtol=1e-9, atol=1e-9)
    assert bool((count[:, 1:] <= count[:, :-1]).all())
    order = torch.randperm(batch, generator=g)
    again = rewardops.prefix_values(tokens[order], rewards[order], groups[order] + 1, mask=mask[order])
    torch.testing.assert_close(again.before, before[order], rtol=1e-12, atol=1e-12)
    assert torch.equal(again.count, count[order])
