"""Values, advantages and weights from prefix trees on every backend, against a dictionary of prefixes."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import (
    check_backend,
    evaluate,
    pack,
    random_groups,
    random_mask,
    shared_prefix_tokens,
)

CUDA = True  # the `target` fixture also runs the CUDA C++ kernels


def call(fn, tokens, groups, mask=None, cu_seqlens=None, **options):
    """Call ``fn`` with all arguments on the device of the rewards."""

    def on(x, rewards):
        return x.to(rewards.device) if isinstance(x, torch.Tensor) else x

    def run(rewards, *weights):
        arguments = {k: on(v, rewards) for k, v in options.items()}
        if weights:
            arguments["weights"] = weights[0]
        return fn(
            on(tokens, rewards),
            rewards,
            on(groups, rewards),
            mask=on(mask, rewards),
            cu_seqlens=on(cu_seqlens, rewards),
            **arguments,
        )

    return run


def values(*args, **options):
    return call(rewardops.prefix_values, *args, **options)


def tempo(*args, **options):
    return call(rewardops.tempo_advantages, *args, **options)


class Tries:
    """The oracle: dictionaries of the prefixes of every group, and loops in float64."""

    def __init__(self, tokens, groups, mask, masked="prefix"):
        self.shape, self.mask = tokens.shape, mask
        self.columns, self.path = (
            [],
            [],
        )  # per row: its tokens, and the nodes of its prefixes, starting with the empty one
        self.found, self.children = [], []  # per node: the rows with its prefix, and its children
        nodes = {}  # (parent node, token) -> node; the empty prefix by its group
        for b in range(tokens.shape[0]):
            columns = mask[b].nonzero()[:, 0].tolist()
            if masked == "prefix" and columns:
                columns = list(range(columns[0], columns[-1] + 1))
            path = []
            for token in [int(groups[b]), *tokens[b, columns].tolist()] if columns else []:
                before = path[-1] if path else None
                node = nodes.setdefault((before, token), len(nodes))
                if node == len(self.found):
                    self.found.append([])
                    self.children.append([])
                    if path:
                        self.children[before].append(node)
                self.found[node].append(b)
                path.append(node)
            self.columns.append(columns)
            self.path.append(path)

    def members(self, b, t):
        return self.found[self.path[b][t]]

    def length(self, b):
        return len(self.columns[b])

    def fill(self, fn):
        """``fn(row, number of its tokens up to and including this one)`` at every valid token."""
        out, mask = torch.zeros(self.shape, dtype=torch.float64).tolist(), self.mask.tolist()
        for b, columns in enumerate(self.columns):
            for t, column in enumerate(columns):
                if mask[b][column]:
                    out[b][column] = fn(b, t + 1)
        return torch.tensor(out, dtype=torch.float64).reshape(self.shape)

    def value(self, b, t, rewards, weights=None, gamma=1.0, min_count=1, leave_one_out=False):
        min_count = min(min_count, len(self.members(b, 0)) - leave_one_out)
        rows = [j for j in self.members(b, t) if not (leave_one_out and j == b)]
        while len(rows) < min_count:
            t -= 1
            rows = [j for j in self.members(b, t) if not (leave_one_out and j == b)]
        w = [1.0 if weights is None else float(weights[j]) for j in rows]
        terms = [u * gamma ** (self.length(j) - t) * rewards[j] for u, j in zip(w, rows, strict=True)]
        return sum(terms) / sum(w) if sum(w) else 0.0

    def branch(self, b, t):
        """The length of the prefix at which the unbranched run of this prefix of row b begins."""
        while t > 1 and len(self.children[self.path[b][t - 1]]) == 1 and self.ends(b, t - 1) == 0:
            t -= 1
        return t

    def ends(self, b, t):
        """The number of rows that are equal to this prefix."""
        return len(self.members(b, t)) - sum(len(self.found[c]) for c in self.children[self.path[b][t]])


def trie(tokens, rewards, groups, mask, masked="prefix", **options):
    tries, rewards = Tries(tokens, groups, mask, masked), rewards.tolist()
    before = tries.fill(lambda b, t: tries.value(b, t - 1, rewards, **options))
    after = tries.fill(lambda b, t: tries.value(b, t, rewards, **options))
    return before, after, tries.fill(lambda b, t: len(tries.members(b, t))).long()


def draw(batch, width, generator, holes=True):
    groups = random_groups(batch, generator)
    tokens = shared_prefix_tokens(groups, width, generator)
    return (
        tokens,
        torch.randn(batch, generator=generator),
        groups,
        random_mask(batch, width, generator, holes=holes),
    )


def rows_of(target):
    """The number of rows: enough to branch, few for the interpreter, where each row costs programs."""
    return 14 if target.interpreted and target.backend == "triton" else 24


OPTIONS = {
    "weights": {"weights": True},
    "min_count": {"min_count": 3},
    "gamma": {"gamma": 0.9},
    "gamma 0": {"gamma": 0.0},
    "others": {"leave_one_out": True},
    "others, weighed": {"leave_one_out": True, "weights": True},
    "skip": {"masked": "skip"},
    "all": {"weights": True, "min_count": 2, "gamma": 0.8, "leave_one_out": True, "masked": "skip"},
    "all but weights": {"min_count": 2, "gamma": 0.8, "leave_one_out": True},
}


def tree_rl_of(tries, rewards, form):
    rewards = rewards.tolist()

    def mean(rows):
        return sum(rewards[j] for j in rows) / len(rows)

    def node(b, t):
        n, root = tries.members(b, t), tries.members(b, 0)
        entry = tries.branch(b, t)
        # The parent is the state before the run; the top of the tree has none.
        whole = len(n) == len(root)
        up = root if whole else tries.members(b, entry - 1)
        v, p, r = mean(n), mean(up), mean(root)
        if form == "paper":
            return (v - p + v - r) / len(n) ** 0.5
        k = len(root) / (len(root) - 1) if len(root) > 1 else None
        v, p = (v, p) if k is None else ((v - r) * k, (p - r) * k)
        return 2 * v / len(n) ** 0.5 - p / len(up) ** 0.5

    return tries.fill(node)


ALL = [
    values,
    tempo,
    functools.partial(values, leave_one_out=True),
    functools.partial(values, gamma=0.9, min_count=2, masked="skip"),
    functools.partial(call, rewardops.prefix_std),
    functools.partial(call, rewardops.tree_rl_advantages),
    functools.partial(call, rewardops.sibling_advantages),
]


class Test_prefix_values:
    @pytest.mark.parametrize("holes", [False, True])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
    def test_matches_the_trie(self, target, generator, holes, dtype):
        tokens, rewards, groups, mask = draw(rows_of(target), 40, generator, holes)
        ours = check_backend(
            values(tokens.to(dtype), groups, mask), [rewards], backend=target.backend, device=target.device
        )
        want = trie(tokens, rewards, groups, mask)
        for a, b in zip(ours.outputs, want, strict=True):
            torch.testing.assert_close(a.cpu().double(), b.double(), rtol=1e-6, atol=1e-6)
        assert ours.outputs[2].dtype is torch.int32

    def test_group_size(self, target, generator):
        groups = torch.arange(24) // 6
        tokens = shared_prefix_tokens(groups, 30, generator)
        rewards = torch.randn(24, generator=generator)
        a = evaluate(values(tokens, groups), [rewards], backend=target.backend, device=target.device)
        b = evaluate(
            values(tokens, None, group_size=6), [rewards], backend=target.backend, device=target.device
        )
        for x, y in zip([*a.outputs, *a.gradients], [*b.outputs, *b.gradients], strict=True):
            assert torch.equal(x, y)

    def test_masked_ends_never_influence(self, target, generator):
        """Prompt, padding and empty rows; masked tokens between valid tokens are part of the prefix."""
        tokens, rewards, groups, _ = draw(14, 30, generator)
        length = torch.randint(0, 26, (14,), generator=generator)
        start = torch.randint(0, 5, (14,), generator=generator)
        column = torch.arange(30)
        mask = (column >= start[:, None]) & (column < (start + length)[:, None])
        mask[3] = False
        clean = evaluate(
            values(tokens, groups, mask), [rewards], backend=target.backend, device=target.device
        )
        dirty = torch.where(mask, tokens, torch.randint(0, 3, tokens.shape, generator=generator))
        rewards = rewards.clone()
        rewards[3] = torch.nan
        ours = evaluate(
            values(dirty, groups, mask), [rewards], backend=target.backend, device=target.device, poison=mask
        )
        for a, b in zip([*clean.outputs, *clean.gradients], [*ours.outputs, *ours.gradients], strict=True):
            assert torch.equal(a, b)
        assert all(bool((o.cpu()[~mask] == 0).all()) for o in ours.outputs)

    @pytest.mark.parametrize("options", [{}, {"gamma": 0.8, "masked": "skip"}], ids=str)
    def test_the_others_of_a_row_of_nearly_all_weight(self, target, generator, options):
        """What remains of a sum without its larger part would be rounding errors of the sum."""
        tokens, rewards, groups, mask = draw(rows_of(target), 20, generator)
        weights = 10 ** (-25 * torch.rand(len(rewards), generator=generator))
        rewards = rewards * 10 ** (-25 * torch.rand(len(rewards), generator=generator))
        options = {"leave_one_out": True, **options}

        def fn(r, w):
            here = [x.to(r.device) for x in (tokens, groups, mask)]
            return rewardops.prefix_values(here[0], r, here[1], weights=w, mask=here[2], **options)[:2]

        wide = [rewards.double(), weights.double()]
        ours = evaluate(fn, wide, backend=target.backend, device=target.device)
        want = trie(tokens, rewards.double(), groups, mask, weights=weights.double(), **options)
        for a, b in zip(ours.outputs, want[:2], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=0)
        assert all(bool(g.isfinite().all()) for g in ours.gradients)

    def test_duplicates_and_strict_prefixes(self, target):
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

    def test_rows_that_share_a_prefix_have_the_same_bits(self, target, generator):
        rows = 18 if target.interpreted and target.backend == "triton" else 33
        groups = torch.zeros(rows, dtype=torch.int64)
        tokens = shared_prefix_tokens(groups, 50, generator)
        rewards = torch.randn(rows, generator=generator)
        before, after, _ = (x.cpu() for x in values(tokens, groups)(rewards.to(target.device)))
        for i in range(rows):
            for j in range(i):
                same = int((tokens[i] == tokens[j]).long().cumprod(0).sum())
                assert torch.equal(before[i, : same + 1], before[j, : same + 1])
                assert torch.equal(after[i, :same], after[j, :same])

    def test_long_rows(self, target, generator):
        """Prefixes longer than a block of the comparison, and differences at every position of a block."""
        width = 2300
        tokens = torch.randint(0, 9, (1, width), generator=generator).repeat(7, 1)
        for i, place in enumerate([0, 1, 255, 256, 1024, 2299], start=1):
            tokens[i, place] += 1
        groups = torch.zeros(7, dtype=torch.int64)
        rewards = torch.randn(7, generator=generator)
        ours = check_backend(values(tokens, groups), [rewards], backend=target.backend, device=target.device)
        want = trie(tokens[:, :300], rewards, groups, torch.ones(7, 300).bool())
        for a, b in zip(ours.outputs, want, strict=True):
            torch.testing.assert_close(a[:, :300].cpu().double(), b.double(), rtol=1e-6, atol=1e-6)

    @given(seed=st.integers(0, 10**6), batch=st.integers(1, 9), width=st.integers(1, 14))
    def test_property_differences_telescope(self, seed, batch, width):
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
        # Packed rows, and a duplicate row.
        lengths = mask.sum(1)
        packed, cu = pack(tokens, lengths)
        flat = rewardops.prefix_values(packed, rewards, groups, cu_seqlens=cu)
        for a, b in zip(flat, (before, after, count), strict=True):
            assert torch.equal(a, pack(b, lengths)[0])
        twice = [torch.cat([x, x[:1]]) for x in (tokens, groups, mask)]
        both = rewardops.prefix_values(
            twice[0], torch.cat([rewards, rewards[:1] + 1]), twice[1], mask=twice[2]
        )
        for x in both:
            assert torch.equal(x[0], x[-1])


class Test_prefix_values_tvm_targets:
    @pytest.mark.parametrize("name", OPTIONS)
    def test_options_match_the_trie(self, target, generator, name):
        tokens, rewards, groups, mask = draw(rows_of(target), 40, generator)
        options = dict(OPTIONS[name])
        weights = (
            [torch.rand(rewards.shape, generator=generator) + 0.1] if options.pop("weights", False) else []
        )
        inputs = [rewards, *weights]
        where = {"backend": target.backend, "device": target.device}
        ours = check_backend(values(tokens, groups, mask, **options), inputs, **where)
        want = trie(tokens, rewards, groups, mask, **options, **({"weights": weights[0]} if weights else {}))
        for a, b in zip(ours.outputs, want, strict=True):
            torch.testing.assert_close(a.cpu().double(), b.double(), rtol=2e-6, atol=2e-6)
        if not options.get("leave_one_out"):
            options.pop("leave_one_out", None)
            targets = call(rewardops.tvm_targets, tokens, groups, mask, **options)
            other = evaluate(targets, inputs, **where).outputs[0]
            assert torch.equal(other.cpu(), ours.outputs[1].cpu())


class Test_prefix_values_prefix_std_tvm_targets_tree_rl_advantages_sibling_advantages:
    def test_channels_are_columns(self, target, generator):
        """Several rewards over one tree, in one call; padded and packed."""
        slow = target.interpreted and target.backend == "triton"
        rows, width = (6, 14) if slow else (16, 30)
        tokens, _, groups, _ = draw(rows, width, generator)
        lengths = torch.randint(0, width + 1, (rows,), generator=generator)
        mask = torch.arange(width) < lengths[:, None]
        rewards = torch.randn(rows, 3, generator=generator)
        packed, cu = pack(tokens, lengths)
        for k, (tokens_, mask_, cu_) in enumerate(((tokens, mask, None), (packed, None, cu))):
            fns = [
                values(tokens_, groups, mask_, cu_, gamma=0.9),
                values(tokens_, groups, mask_, cu_, leave_one_out=True),
                *(
                    call(fn, tokens_, groups, mask_, cu_)
                    for fn in (
                        rewardops.prefix_std,
                        rewardops.tvm_targets,
                        rewardops.tree_rl_advantages,
                        rewardops.sibling_advantages,
                    )
                ),
            ]
            for fn in fns[k::2] if slow else fns:
                ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
                for c in range(3):
                    alone = fn(rewards[:, c].to(target.device))
                    alone = [alone] if isinstance(alone, torch.Tensor) else alone
                    for a, b in zip(ours.outputs, alone, strict=True):
                        assert torch.equal(a[..., c] if a.dim() > b.dim() else a, b)
        none = values(tokens, groups, mask)(torch.zeros(rows, 0, device=target.device))
        assert none.before.shape == (rows, width, 0)


class Test_prefix_std:
    def test_std_matches_the_trie(self, target, generator):
        tokens, rewards, groups, mask = draw(rows_of(target), 40, generator)
        rewards = (rewards > 0).float()  # with ties
        tries = Tries(tokens, groups, mask)

        def std(b, t, ddof):
            x = rewards[tries.members(b, t)].double()
            return float(x.std(correction=ddof)) if len(x) > ddof else 0.0

        for ddof in (0, 1):
            fn = call(rewardops.prefix_std, tokens, groups, mask, ddof=ddof)
            ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
            want = tries.fill(lambda b, t, ddof=ddof: std(b, t, ddof))
            torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-6, atol=1e-7)
            assert bool((ours.outputs[0].cpu()[want == 0] == 0).all())
        weights = torch.rand(rewards.shape, generator=generator)
        check_backend(
            call(rewardops.prefix_std, tokens, groups, mask),
            [torch.randn(rewards.shape, generator=generator), weights],
            backend=target.backend,
            device=target.device,
        )
        constant = call(rewardops.prefix_std, tokens, groups, mask)(
            torch.full(rewards.shape, 0.3, device=target.device, requires_grad=True)
        )
        assert bool((constant == 0).all())
        constant.sum().backward()


class Test_shared_prefix_weights:
    def test_shared_prefix_weights(self, target, generator):
        tokens, _, groups, mask = draw(rows_of(target), 40, generator)
        tries = Tries(tokens, groups, mask)
        ours = call(lambda x, _, *a, **k: rewardops.shared_prefix_weights(x, *a, **k), tokens, groups, mask)(
            torch.zeros(len(groups), device=target.device)
        )
        want = tries.fill(lambda b, t: 1 / len(tries.members(b, t)))
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-7, atol=1e-7)
        # lambda-GRPO's numbers for TEMPO's tree
        tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8, 0], [1, 2, 3, 9]], device=target.device)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], device=target.device)
        third = pytest.approx(1 / 3)
        assert rewardops.shared_prefix_weights(tokens, group_size=4, mask=mask).cpu().tolist() == [
            [0.25, third, 0.5, 1],
            [0.25, third, 1, 1],
            [0.25, 1, 1, 0],
            [0.25, third, 0.5, 1],
        ]


class Test_tree_rl_advantages:
    def test_tree_rl_by_hand(self, target):
        """root -> {a: {a1 = 1, a2 = 0}, b: {b1 = 0}}, the paper's formula and the released code's numbers."""
        tokens = torch.tensor([[1, 2, 9], [1, 3, 9], [4, 5, 9]], device=target.device)
        rewards = torch.tensor([1.0, 0.0, 0.0], device=target.device)
        for form, a, a1, a2, b in (
            ("paper", 0.2357, 1.16667, -0.83333, -0.66667),
            ("released", 0.35355, 1.82322, -1.17678, -1.0),
        ):
            out = rewardops.tree_rl_advantages(tokens, rewards, group_size=3, form=form).cpu()
            # b and b1 are one node here: an unbranched run (see test_tree.py for the tree of a search).
            want = torch.tensor([[a, a1, a1], [a, a2, a2], [b, b, b]])
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", ["paper", "released"])
    def test_tree_rl_matches_the_trie(self, target, generator, form):
        tokens, rewards, groups, mask = draw(rows_of(target), 40, generator)
        fn = call(rewardops.tree_rl_advantages, tokens, groups, mask, form=form)
        ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
        want = tree_rl_of(Tries(tokens, groups, mask), rewards, form)
        torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-5, atol=1e-5)


class Test_sibling_advantages:
    @pytest.mark.parametrize("scale", ["std", "none"])
    def test_siblings_match_the_trie(self, target, generator, scale):
        tokens, rewards, groups, mask = draw(rows_of(target), 40, generator)
        fn = call(rewardops.sibling_advantages, tokens, groups, mask, scale=scale)
        ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
        tries = Tries(tokens, groups, mask)

        def among(b, t):
            if len(tries.members(b, t)) == len(tries.members(b, 0)):
                return 0.0
            entry = tries.branch(b, t)
            siblings = tries.children[tries.path[b][entry - 1]]
            v = torch.tensor([rewards[tries.found[s]].double().mean() for s in siblings])
            value = v[siblings.index(tries.path[b][entry])]
            if len(v) < 2:
                return 0.0
            return float((value - v.mean()) / (v.std() + 1e-6 if scale == "std" else 1.0))

        torch.testing.assert_close(ours.outputs[0].cpu().double(), tries.fill(among), rtol=1e-4, atol=1e-4)
        weights = torch.rand(rewards.shape, generator=generator) + 0.1
        check_backend(fn, [rewards, weights], backend=target.backend, device=target.device, ulps=64)


class Test_prefix_values_tempo_advantages:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_reward_dtypes(self, target, generator, dtype):
        tokens, rewards, groups, mask = draw(12, 20, generator)
        for make in (values, tempo):
            check_backend(
                make(tokens, groups, mask), [rewards.to(dtype)], backend=target.backend, device=target.device
            )


class Test_tempo_advantages:
    def test_tempo_by_hand(self, target):
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
            # The other reading: the unscaled temporal difference.
            td = torch.tensor(
                [[0, 1 / 6, 1 / 3, 0], [0, 1 / 6, -2 / 3, 0], [0, -0.5, 0, 0], [0, 1 / 6, 1 / 3, 0]]
            )
            flat = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None] * factor * mask
            ours = tempo(tokens, groups, mask, ddof=ddof, eps=0.0, td_scale="none")(rewards.to(target.device))
            torch.testing.assert_close(ours.cpu(), flat + td, rtol=1e-6, atol=1e-6)

    def test_tempo_matches_float64(self, target, generator):
        tokens, rewards, groups, mask = draw(18, 30, generator)
        check_backend(tempo(tokens, groups, mask), [rewards], backend=target.backend, device=target.device)
        check_backend(tempo(tokens, groups), [rewards], backend=target.backend, device=target.device)
        check_backend(
            tempo(tokens, groups, mask, scale="none"), [rewards], backend=target.backend, device=target.device
        )

    def test_equal_rewards_give_no_advantage(self, target, generator):
        groups = torch.zeros(8, dtype=torch.int64)
        tokens = shared_prefix_tokens(groups, 12, generator)
        out = tempo(tokens, groups)(torch.full((8,), 0.7, device=target.device))
        assert bool((out == 0).all())


class Test_prefix_values_prefix_std_tempo_advantages_tree_rl_advantages_sibling_advantages:
    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_equals_padded(self, target, generator, masked):
        rows = 9 if target.interpreted and target.backend == "triton" else 16
        tokens, rewards, groups, _ = draw(rows, 35, generator)
        lengths = torch.randint(0, 36, (rows,), generator=generator)
        lengths[5] = 0
        inside = torch.arange(35) < lengths[:, None]
        mask = inside & random_mask(rows, 35, generator) if masked else inside
        packed, cu = pack(tokens, lengths)
        packed_mask = pack(mask, lengths)[0] if masked else None
        for make in ALL:
            padded = evaluate(
                make(tokens, groups, mask), [rewards], backend=target.backend, device=target.device
            )
            ours = check_backend(
                make(packed, groups, packed_mask, cu), [rewards], backend=target.backend, device=target.device
            )
            for a, b in zip(ours.outputs, padded.outputs, strict=True):
                assert torch.equal(a.cpu(), pack(b.cpu(), lengths)[0])

    @pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
    def test_empty(self, target, shape):
        for make in ALL:
            ours = check_backend(
                make(torch.zeros(shape).long(), torch.zeros(shape[0]).long()),
                [torch.ones(shape[0])],
                backend=target.backend,
                device=target.device,
            )
            assert ours.outputs[0].shape == shape


class Test_prefix_values_tree_rl_advantages:
    @pytest.mark.parametrize("split", ["bytes", "words"])
    def test_real_rollouts(self, target, shared, split):
        """Real answers at byte level and by words, four to a question."""
        with (shared / "data" / "gsm8k_rollouts.jsonl").open() as file:
            rows = [
                json.loads(line)
                for _, line in zip(range(12 if target.interpreted else 32), file, strict=False)
            ]
        known = {}
        texts = [
            list(row["response"].encode())
            if split == "bytes"
            else [known.setdefault(word, len(known)) for word in row["response"].split()]
            for row in rows
        ]
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
        rl = call(rewardops.tree_rl_advantages, tokens, groups, mask)(rewards.to(target.device))
        want = tree_rl_of(Tries(tokens, groups, mask), rewards, "paper")
        torch.testing.assert_close(rl.cpu().double(), want, rtol=1e-5, atol=1e-5)
        assert bool((got.count.cpu() > 1).any())
