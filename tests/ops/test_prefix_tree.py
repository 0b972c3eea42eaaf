"""The prefix tree itself: its arrays on every backend, common prefixes, and the compressed tree on the host."""

from __future__ import annotations

import itertools
import json
import re
import sys
import xml.etree.ElementTree as xml

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import pack, random_groups, random_mask, shared_prefix_tokens

CUDA = True  # the `target` fixture runs the kernels in CUDA C++ as well


def draw(batch, width, generator, holes=True):
    groups = random_groups(batch, generator)
    return (
        shared_prefix_tokens(groups, width, generator),
        groups,
        random_mask(batch, width, generator, holes=holes),
    )


def rows_of(tokens, mask, masked="prefix"):
    rows = []
    for x, m in zip(tokens.tolist(), mask.tolist(), strict=True):
        valid = [k for k, v in enumerate(m) if v]
        if masked == "prefix" and valid:
            valid = range(valid[0], valid[-1] + 1)
        rows.append([x[k] for k in valid])
    return rows


def lcp_of(a, b):
    return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(a, b, strict=False)))


def arrays(tokens, groups, mask=None, cu=None, backend="reference", device="cpu", skip=False):
    with rewardops.use_backend(backend):
        args = [None if x is None else x.to(device) for x in (tokens, groups, mask, cu)]
        return [x.cpu() for x in torch.ops.rewardops.prefix_tree(*args, skip)]


def same_arrays(target, *given, **options):
    ours = arrays(*given, backend=target.backend, device=target.device, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, arrays(*given, **options), strict=True))


def branches(width, generator):
    """Nine rows in two groups; the rows of a branch share a long prefix after leaving the other rows."""
    kinds = torch.tensor([0, 1, 1, 2, 1, 0, 2, 1, 1])
    tokens = torch.randint(-9, 9, (3, width), generator=generator)
    tokens[1, :7], tokens[2, :640] = tokens[0, :7], tokens[0, :640]
    tokens[1, 7], tokens[2, 640] = tokens[0, 7] - 1, tokens[0, 640] + 1
    rows = tokens[kinds].clone()
    for b, place in ((2, width - 1), (4, 1021), (6, 1290), (7, 519)):
        rows[b, place] += 1
    return rows, torch.tensor([4, 4, 4, 4, 4, 4, 4, 1, 1])


class Test_prefix_tree_arrays:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_backend_builds_the_same_arrays(self, target, seed):
        g = torch.Generator().manual_seed(seed)
        tokens, groups, mask = draw(30, 24, g)
        tokens[7] = tokens[3]  # duplicates
        groups[7], mask[7], mask[11] = groups[3], mask[3], False
        where = (target.backend, target.device)
        kinds = (tokens, tokens.int(), tokens.to(torch.uint8), tokens[:, ::2])
        for ids in kinds[seed : seed + 1] if target.interpreted else kinds:
            m = mask[:, ::2] if ids.shape != mask.shape else mask
            for skip in (False, True):
                ours, want = arrays(ids, groups, m, None, *where, skip), arrays(ids, groups, m, skip=skip)
                assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
        lengths = mask.sum(1)
        packed, cu = pack(tokens, lengths)
        inside = torch.arange(24) < lengths[:, None]
        ours, want = arrays(packed, groups, None, cu, *where), arrays(tokens, groups, inside)
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))

    def test_groups_of_any_size(self, target, generator):
        """Thousands of rows with a group of one row and a large group; arrays compared with sorted rows."""
        batch = 40 if target.interpreted else 700
        sizes = [1, 2, batch - 10, 7]
        groups = torch.repeat_interleave(torch.tensor([5, -2, 9, 0]), torch.tensor(sizes))
        tokens = shared_prefix_tokens(groups, 12, generator)
        shuffle = torch.randperm(batch, generator=generator)
        tokens, groups = tokens[shuffle], groups[shuffle]
        rows, nodes = arrays(tokens, groups, None, None, target.backend, target.device)
        want = sorted(range(batch), key=lambda b: (int(groups[b]), tokens[b].tolist(), b))
        assert rows[0].tolist() == want
        shared = [
            lcp_of(tokens[a].tolist(), tokens[b].tolist()) if groups[a] == groups[b] else -1
            for a, b in itertools.pairwise(want)
        ]
        assert rows[4].tolist() == [-1, *shared]
        assert int((nodes[2] >= 0).sum()) <= 2 * batch - len(sizes)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
    def test_ids_and_labels_at_the_ends_of_their_types(self, target, generator, dtype):
        """Compared as numbers, without a difference of two of them; a row before those that continue it."""
        info, last = torch.iinfo(dtype), torch.iinfo(torch.int64)
        ids = torch.tensor([info.min, info.max, 0, info.min + 1, info.max - 1], dtype=dtype)
        tokens = ids[torch.randint(0, 5, (24, 4), generator=generator)]
        tokens[:, :2] = tokens[torch.randint(0, 3, (24,), generator=generator), :2]
        groups = torch.tensor([last.max, last.min, 0])[torch.randint(0, 3, (24,), generator=generator)]
        lengths = torch.randint(0, 5, (24,), generator=generator)
        mask = torch.arange(4) < lengths[:, None]
        rows, _ = arrays(tokens, groups, mask, None, target.backend, target.device)
        spans = rows_of(tokens, mask)
        want = sorted(range(24), key=lambda b: (int(groups[b]), not spans[b], spans[b], b))
        assert rows[0].tolist() == want
        same_arrays(target, tokens, groups, mask)

    def test_a_tree_that_leans(self, target):
        """Each row leaves the next one token later: the tree is as deep as the number of rows, in both orders."""
        n = 24 if target.interpreted else {"reference": 200, "cpp": 200}.get(target.backend, 300)
        tokens = torch.tril(torch.ones(n, n, dtype=torch.int64), -1)
        for x in (tokens, tokens.flip(0), 1 - tokens):
            where = (target.backend, target.device)
            ours, want = (
                arrays(x, torch.zeros(n).long(), None, None, *where),
                arrays(x, torch.zeros(n).long()),
            )
            assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
        rewards = torch.rand(n, device=target.device)
        values = rewardops.prefix_values(tokens.to(target.device), rewards, group_size=n)
        assert values.count[:, 0].cpu().tolist() == [1] + [n - 1] * (n - 1)
        for b in range(0, n, 7):
            want = [float(rewards[max(t, 0) :].mean()) for t in range(b)]
            torch.testing.assert_close(values.before[b, :b].cpu(), torch.tensor(want), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_rows_that_start_anywhere(self, target, generator, dtype):
        """Comparisons of 16 bytes, and of rows without a common alignment."""
        if target.backend == "reference":
            pytest.skip("it is what the others are compared with")
        slow = target.interpreted and target.backend == "triton"
        if slow and dtype is torch.int32:
            pytest.skip("Triton's compiler sees to that")
        width = 1300
        tokens, groups = branches(width + 8, generator)
        tokens = tokens.to(dtype)
        for shift in (0, 3) if slow else range(4):
            same_arrays(target, tokens[:, shift : width + shift], groups)
        start = torch.tensor([0, 1, 2, 3, 5, 1, 0, 700, 2])  # prompts padded on the left
        end = torch.tensor([width, width, width, 900, 1100, 1200, width, width, width])
        column = torch.arange(width)
        mask = (column >= start[:, None]) & (column < end[:, None])
        same_arrays(target, tokens[:, :width], groups, mask)
        moved = torch.zeros(9, width, dtype=dtype)
        for b in range(9):
            moved[b, start[b] : end[b]] = tokens[b, : end[b] - start[b]]
        for skip in (False, True):
            same_arrays(target, moved, groups, mask, skip=skip)
        holes = mask & (torch.rand(9, width, generator=generator) > 0.1)
        same_arrays(target, moved, groups, holes, skip=True)
        lengths = end - start
        packed, cu = pack(tokens[:, :width], lengths)
        same_arrays(target, packed, groups, None, cu)
        for skip in (False, True):
            same_arrays(target, packed, groups, pack(holes, lengths)[0], cu.long(), skip=skip)

    def test_tokens_far_from_the_ends_of_a_row(self, target, generator):
        """Rows masked at both ends for more tokens than a step of the search."""
        width = 9000
        spans = [(0, width), (17, 40), (4100, 4103), (8999, 9000), (4096, 8192), (0, 1), (5, 5), (3, 8998)]
        column = torch.arange(width)
        mask = torch.stack([(column >= a) & (column < b) for a, b in spans])
        tokens = torch.randint(0, 2, (8, width), generator=generator)
        for b in (2, 3, 7):
            tokens[b, spans[b][0] : spans[b][1]] = tokens[0, : spans[b][1] - spans[b][0]]
        for shift in (0, 3):
            same_arrays(target, tokens[:, shift:], torch.zeros(8).long(), mask[:, shift:])

    @pytest.mark.parametrize("rows", [2, 3])
    def test_few_long_rows(self, target, generator, rows):
        """Rows that are searched and compared in parts."""
        width = 1500
        tokens = torch.randint(0, 3, (1, width), generator=generator).repeat(rows, 1)
        tokens[-1, 1200] -= 1
        column = torch.arange(width)
        spans = torch.tensor([[0, width], [5, width - 7], [0, 300]])[:rows]
        mask = (column >= spans[:, :1]) & (column < spans[:, 1:])
        for m in (None, mask, mask & (torch.arange(rows) > 0)[:, None]):
            same_arrays(target, tokens, torch.zeros(rows).long(), m)

    def test_labels_counted_or_sorted(self, target, generator, monkeypatch):
        tokens, groups, mask = draw(70, 9, generator)
        members = [rewardops.prefix_lcp(*(x.to(target.device) for x in (tokens, groups)), max_group_size=40)]
        same_arrays(target, tokens, groups, mask)
        if target.backend.startswith("cuda"):
            monkeypatch.setattr("rewardops.cuda.prefix_tree.COUNTED", 0)
            same_arrays(target, tokens, groups, mask)
            members += [
                rewardops.prefix_lcp(*(x.to(target.device) for x in (tokens, groups)), max_group_size=40)
            ]
        with rewardops.use_backend("reference"):
            want = rewardops.prefix_lcp(tokens, groups, max_group_size=40)
        for member_rows in members:
            assert all(torch.equal(a.cpu(), b) for a, b in zip(member_rows, want, strict=True))


def statistics_of_rows(target, x, weights, rows, nodes, *options):
    """``subtree_statistics``, and its gradients for an upstream gradient of 1."""
    tensors = [None if t is None else t.to(target.device) for t in (x, weights, rows, nodes)]
    ops = torch.ops.rewardops
    found = ops.subtree_statistics(*tensors, *options)
    gradients = ops.subtree_statistics_backward(torch.ones_like(found[0]), *found, *tensors, *options)
    return [t.cpu() for t in (found[0], *gradients)]


class Test_subtree_statistics:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize(
        ("gamma", "statistic"), [(0.0, "sum"), (0.9, "mean"), (1.0, "sum"), (1.0, "std")]
    )
    def test_a_number_that_is_not_finite_stays_in_its_nodes(self, target, generator, gamma, statistic, bad):
        """Sums of the rows of a node alone, not differences of sums of more rows: others have the same bits."""
        tokens, groups, mask = draw(20, 8, generator)
        tokens[7], groups[7], mask[7] = tokens[3], groups[3], mask[3]
        rows, nodes = arrays(tokens, groups, mask)
        x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        weights = torch.rand(20, generator=generator, dtype=torch.float64)
        given = (rows, nodes, gamma, statistic, 1)
        want = statistics_of_rows(target, x, weights, *given)
        row = int(rows[0, 4])
        spoiled = x.clone()
        spoiled[row, 1] = bad
        got = statistics_of_rows(target, spoiled, weights, *given)
        position = torch.arange(20)
        inside = (position >= nodes[0][:, None]) & (position < nodes[1][:, None])
        has_row = inside[:, rows[0] == row].any(1)
        assert bool(has_row.any())
        # A variance that is NaN has no root: the std is 0 there.
        assert statistic == "std" or torch.equal(got[0][:, 1].isfinite(), ~has_row)
        assert torch.equal(got[0][~has_row], want[0][~has_row])
        assert torch.equal(got[0][:, 0], want[0][:, 0])
        apart = torch.ones(20, dtype=torch.bool)
        if statistic == "sum":
            apart[row] = False
        else:
            apart[rows[0][inside[has_row].any(0)]] = False
        assert bool(apart.any())
        assert all(torch.equal(a[apart], b[apart]) for a, b in zip(got[1:], want[1:], strict=True))
        left = (rows[3][rows[0]] - nodes[2][:, None]).clamp(min=0).double()
        weight = torch.where(inside, weights[rows[0]], 0)
        count, total = inside.sum(1), weight.sum(1).clamp(min=1e-300)
        for c in range(2):
            y = x[rows[0], c]
            by_hand = (weight * gamma**left * y).sum(1)
            if statistic != "sum":
                by_hand = by_hand / total
            if statistic == "std":
                squares = (weight * (y - by_hand[:, None]) ** 2).sum(1) / total
                by_hand = torch.where(count > 1, squares * count / (count - 1), 0)
            result = want[0][:, c] ** 2 if statistic == "std" else want[0][:, c]
            torch.testing.assert_close(result, by_hand, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("statistic", ["sum", "mean", "std"])
    @pytest.mark.parametrize("weighed", [False, True])
    def test_gradients_are_those_of_the_formula(self, target, generator, statistic, weighed):
        tokens, groups, mask = draw(16, 8, generator)
        rows, nodes = arrays(tokens, groups, mask)
        x = torch.randn(16, 2, generator=generator, dtype=torch.float64)
        weights = torch.rand(16, generator=generator, dtype=torch.float64) if weighed else None
        if weighed:
            weights[::5] = 0
        position = torch.arange(16)
        inside = ((position >= nodes[0][:, None]) & (position < nodes[1][:, None])).double()
        gamma = 1.0 if statistic == "std" else 0.9
        decay = gamma ** (rows[3][rows[0]] - nodes[2][:, None]).clamp(min=0).double()
        leaves = [t.requires_grad_() for t in (x, weights) if t is not None]
        weight = inside * (1.0 if weights is None else weights[rows[0]])
        total = weight.sum(1, keepdim=True)
        total = torch.where(total > 0, total, 1)
        out = (weight * decay) @ x[rows[0]]
        if statistic != "sum":
            out = out / total
        if statistic == "std":
            count = inside.sum(1, keepdim=True)
            factor = torch.where(count > 1, count / (count - 1).clamp(min=1), 0)
            variance = (weight[:, :, None] * (x[rows[0]] - out[:, None]) ** 2).sum(1) / total * factor
            out = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
        want = [out.detach(), *torch.autograd.grad(out.sum(), leaves)]
        given = [None if t is None else t.detach() for t in (x, weights)]
        got = statistics_of_rows(target, *given, rows, nodes, gamma, statistic, 1)
        for ours, theirs in zip(got, want, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def on_tokens(
    target,
    tokens,
    groups,
    mask,
    cu,
    generator,
    at,
    gamma,
    skip,
    *,
    given="vabf",
    channels=2,
    dtype=torch.float64,
):
    """Compare nodes_to_tokens and its gradients with the specification; some leaves lie higher up.

    ``given``: the initials of the passed arguments: values, along, base, factor.
    """
    rows, nodes = arrays(tokens, groups, mask, cu, skip=skip)
    batch = len(groups)
    up = nodes[3][rows[1].clamp(min=0)]
    rows[1] = torch.where((torch.arange(batch) % 5 == 3) & (rows[1] >= 0) & (up >= 0), up, rows[1])
    values, along = torch.randn(2, 2 * batch, channels, generator=generator, dtype=torch.float64)
    base, factor = torch.randn(2, batch, channels, generator=generator, dtype=torch.float64)
    named = {"v": values, "a": along, "b": base, "f": factor}
    of_nodes = [x if name in given else None for name, x in named.items()]
    grad = torch.randn(channels, *tokens.shape, generator=generator, dtype=dtype)
    grad = grad if mask is None else grad.masked_fill(~mask, torch.nan)
    options = (skip, tokens.shape[-1], at, gamma)
    ops, got = torch.ops.rewardops, []
    for backend, device in ((target.backend, target.device), ("reference", "cpu")):
        tensors = [None if t is None else t.to(device) for t in (*of_nodes, rows, nodes, mask, cu)]
        with rewardops.use_backend(backend):
            out = ops.nodes_to_tokens(*tensors, *options, dtype)
            gradients = ops.nodes_to_tokens_backward(grad.to(device), *tensors, *options)
        got.append([x.cpu() for x in (out, *gradients)])
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    for ours, want in zip(*got, strict=True):
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    if mask is not None:
        assert bool((got[0][0][:, ~mask] == 0).all())


AT_AND_GAMMA = [("after", 1.0), ("before", 0.97), ("after", 0.0), ("step", 1.0)]


def tree_of(tokens, groups, mask, **options):
    rewards = torch.randn(tokens.shape[0], generator=torch.Generator().manual_seed(1))
    arguments = {"mask": mask, "rewards": rewards.to(tokens.device), **options}
    return rewardops.PrefixTree.from_tokens(tokens, groups, **arguments), rewards


def ancestors(tree, n):
    nodes = {n}
    while int(tree.parent[n]) >= 0:
        n = int(tree.parent[n])
        nodes.add(n)
    return nodes


def answers(shared, questions):
    with (shared / "data" / "gsm8k_rollouts.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(4 * questions), file, strict=False)]
    known = {}
    texts = [[known.setdefault(w, len(known)) for w in re.findall(r"\s*\S+", r["response"])] for r in rows]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
    words = list(known)
    tree = rewardops.PrefixTree.from_tokens(
        tokens,
        [r["group"] for r in rows],
        mask=mask,
        rewards=torch.tensor([r["reward"] for r in rows]),
    )
    return tree, rows, lambda ids: "".join(words[i] for i in ids)


class Test_prefix_lcp:
    @pytest.mark.parametrize("masked", ["prefix", "skip"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_lcp_of_all_pairs(self, target, generator, masked, packed):
        tokens, groups, mask = draw(22, 30, generator)
        rows = rows_of(tokens, mask, masked)
        arguments = {"tokens": tokens, "mask": mask}
        if packed:
            lengths = torch.full((22,), 30)
            arguments = {"tokens": pack(tokens, lengths)[0], "mask": pack(mask, lengths)[0]}
            arguments["cu_seqlens"] = pack(tokens, lengths)[1]
        arguments = {k: v.to(target.device) for k, v in arguments.items()}
        size = max(groups.tolist().count(x) for x in groups.tolist())
        members, lcp = rewardops.prefix_lcp(
            groups=groups.to(target.device), max_group_size=size, masked=masked, **arguments
        )
        assert members.shape == lcp.shape == (22, size)
        assert members.dtype is lcp.dtype is torch.int32
        for b in range(22):
            want = [j for j in range(22) if groups[j] == groups[b]]
            assert members[b].tolist() == want + [-1] * (size - len(want))
            for j, common in zip(want, lcp[b].tolist(), strict=False):
                assert common == (lcp_of(rows[b], rows[j]) if rows[b] and rows[j] else -1)
            assert set(lcp[b, len(want) :].tolist()) <= {-1}

    def test_lcp_of_a_large_group(self, target, generator):
        """A group with more rows than lanes of a warp."""
        batch = 40 if target.interpreted and target.backend == "triton" else 80
        groups = torch.zeros(batch, dtype=torch.int64)
        tokens = shared_prefix_tokens(groups, 12, generator)
        rows = tokens.tolist()
        lcp = rewardops.prefix_lcp(tokens.to(target.device), group_size=batch).lcp
        assert lcp.tolist() == [[lcp_of(a, b) for b in rows] for a in rows]

    def test_lcp_knows_the_size_of_groups(self, target, generator):
        groups = torch.arange(12) // 4
        tokens = shared_prefix_tokens(groups, 9, generator).to(target.device)
        groups = groups.to(target.device)
        known = {} if target.device.type == "cpu" else {"max_group_size": 4}
        a, b = rewardops.prefix_lcp(tokens, group_size=4), rewardops.prefix_lcp(tokens, groups, **known)
        assert torch.equal(a.lcp, b.lcp)
        assert torch.equal(a.members, b.members)
        assert torch.equal(a.lcp.view(3, 4, 4), a.lcp.view(3, 4, 4).mT)
        assert torch.equal(rewardops.prefix_lcp(tokens, group_size=[4, 2, 6]).lcp[:4, :4], a.lcp[:4])
        cut = rewardops.prefix_lcp(tokens, groups, max_group_size=2)
        assert torch.equal(cut.members, a.members[:, :2])
        assert torch.equal(cut.lcp, a.lcp[:, :2])
        with pytest.raises(ValueError, match="max_group_size: got 0"):
            rewardops.prefix_lcp(tokens, groups, max_group_size=0)
        for shape in ((0, 0), (0, 4), (3, 0)):
            empty = rewardops.prefix_lcp(tokens[:0].new_zeros(shape), group_size=[shape[0]])
            assert empty.lcp.shape == (shape[0], shape[0])

    @given(seed=st.integers(0, 10**6), batch=st.integers(1, 10), width=st.integers(1, 12))
    def test_property_the_order_of_rows_does_not_matter(self, seed, batch, width):
        g = torch.Generator().manual_seed(seed)
        tokens, groups, mask = draw(batch, width, g)
        order = torch.randperm(batch, generator=g)
        a = rewardops.PrefixTree.from_tokens(tokens, groups, mask=mask)
        b = rewardops.PrefixTree.from_tokens(tokens[order], groups[order], mask=mask[order])
        for name in ("parent", "depth", "start", "length", "begin", "end", "group", "tin", "tout"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.dedup_stats() == b.dedup_stats()
        assert [a.tokens_of(n) for n in range(len(a))] == [b.tokens_of(n) for n in range(len(b))]
        # The prefix of the last common node of two rows is their common prefix.
        members, lcp = rewardops.prefix_lcp(tokens, groups, mask=mask)
        for i in range(batch):
            for j, common in zip(members[i].tolist(), lcp[i].tolist(), strict=True):
                both = set(a.path(i)) & set(a.path(j)) if j >= 0 else set()
                assert common == max((int(a.depth[n]) for n in both), default=-1)


# ---- nodes and tokens, op by op ----------------------------------------------------------------------------


class Test_tokens_of_nodes:
    @pytest.mark.parametrize(("at", "gamma"), AT_AND_GAMMA)
    def test_tokens_of_nodes(self, target, generator, at, gamma):
        """A few rows of several tiles, at every alignment."""
        if target.backend == "reference":
            pytest.skip("it is what the others are compared with")
        interpreted = target.backend == "triton" and target.interpreted
        if interpreted and at == "after":
            pytest.skip("slow")
        width = 1300 if interpreted else 2300
        tokens, groups = branches(width + 4, generator)
        mask = random_mask(9, width + 4, generator)
        mask[:, :3] = False
        mask[1:4] |= torch.arange(width + 4) > 900
        args = (generator, at, gamma)
        on_tokens(target, tokens[:, :width], groups, None, None, *args, False, dtype=torch.float32)
        on_tokens(target, tokens[:, 1:], groups, mask[:, 1:], None, *args, False, given="v")
        on_tokens(target, tokens[:, :-2], groups, mask[:, :-2], None, *args, True, given="abf")
        lengths = torch.tensor([width, 1, 0, 811, 1029, 47, 1024, 2, 1290])
        packed, cu = pack(tokens, lengths)
        packed_mask = pack(mask, lengths)[0]
        on_tokens(target, packed, groups, None, cu, *args, False, given="v")
        on_tokens(target, packed, groups, packed_mask, cu, *args, False, given="vb", dtype=torch.float32)
        on_tokens(target, packed, groups, packed_mask, cu, *args, True)

    @pytest.mark.parametrize(("at", "gamma"), AT_AND_GAMMA)
    def test_tokens_of_a_tree_that_leans(self, target, generator, at, gamma):
        """Paths longer than the list of nodes of a step, and nodes with many rows."""
        n = 20 if target.backend == "triton" and target.interpreted else 150
        tokens = torch.tril(torch.ones(n, n, dtype=torch.int64), -1)
        on_tokens(target, tokens, torch.zeros(n).long(), None, None, generator, at, gamma, False, channels=1)

    @pytest.mark.parametrize(("at", "gamma"), AT_AND_GAMMA)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_rows_of_whole_loads(self, target, generator, at, gamma, dtype):
        tokens, groups, mask = draw(12, 48, generator)
        options = (None, generator, at, gamma, False)
        on_tokens(target, tokens, groups, mask, *options, channels=1, dtype=dtype)
        on_tokens(target, tokens, groups, None, *options, channels=1, dtype=dtype, given="vb")

    @pytest.mark.parametrize("gamma", [0.999, 0.99999])
    def test_powers_of_long_rows(self, target, generator, gamma):
        if target.interpreted and target.backend == "triton":
            pytest.skip("slow")
        tokens = torch.zeros(2, 70_000, dtype=torch.int32)
        on_tokens(target, tokens, torch.arange(2), None, None, generator, "after", gamma, False, channels=1)


class Test_PrefixTree:
    @pytest.mark.parametrize("masked", ["prefix", "skip"])
    def test_compressed_tree(self, target, generator, masked):
        tokens, groups, mask = draw(26, 30, generator)
        tokens[9], groups[9], mask[9] = tokens[4], groups[4], mask[4]
        mask[13] = False
        rows = rows_of(tokens, mask, masked)
        on = target.device
        inputs = (tokens.to(on), groups.to(on), mask.to(on))
        assert tree_of(*inputs, masked=masked, rewards=None)[0].mean is None
        tree, rewards = tree_of(*inputs, masked=masked)
        live = [b for b in range(26) if rows[b]]
        assert len(tree) <= 2 * len(live) - len({int(groups[b]) for b in live})
        assert [tree.rewards[b] for b in live] == [rewards[b] for b in live]
        assert [x.tolist() for x in tree.tokens] == rows
        for b in range(26):
            path = tree.path(b)
            assert [t for n in path for t in tree.tokens_of(n)] == rows[b]
            assert all(b in tree.rows_of(n) for n in path)
            assert bool(path) == bool(rows[b])
        for n in range(len(tree)):
            below = tree.rows_of(n)
            prefix = rows[below[0]][: int(tree.depth[n])]
            # A node has all rows of the group with its prefix, and no longer prefix has the same rows.
            same = [j for j in live if groups[j] == groups[below[0]] and rows[j][: len(prefix)] == prefix]
            assert sorted(below) == same
            assert (
                len(below) == 1
                or len({tuple(rows[j][: len(prefix) + 1]) for j in below}) > 1
                or all(rows[j] == prefix for j in below)
            )
            torch.testing.assert_close(tree.mean[n], rewards[below].double().mean())
            std = rewards[below].double().std() if len(below) > 1 else torch.tensor(0.0).double()
            torch.testing.assert_close(tree.std[n], std)
            up = int(tree.parent[n])
            assert up < n
            assert int(tree.start[n]) == (0 if up < 0 else int(tree.depth[up]))
            inside = {m for m in range(len(tree)) if tree.tin[n] <= tree.tin[m] < tree.tout[n]}
            assert inside == {m for m in range(len(tree)) if n in ancestors(tree, m)}
            assert int(tree.group[n]) == int(groups[below[0]])

    def test_values_of_the_tree_are_those_of_the_tokens(self, generator):
        tokens, groups, mask = draw(20, 25, generator, holes=False)
        weights = torch.rand(20, generator=generator)
        tree, rewards = tree_of(tokens, groups, mask, weights=weights)
        values = rewardops.prefix_values(tokens, rewards.double(), groups, mask=mask, weights=weights)
        std = rewardops.prefix_std(tokens, rewards.double(), groups, mask=mask, weights=weights)
        for b in range(20):
            for n in tree.path(b):
                at = slice(int(tree.start[n]), int(tree.depth[n]))
                assert bool((values.after[b, at] == tree.mean[n]).all())
                assert bool((std[b, at] == tree.std[n]).all())
                assert bool((values.count[b, at] == tree.count[n]).all())

    def test_dedup_stats(self):
        tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 0], [7, 0, 0, 0], [5, 5, 5, 5]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
        stats = rewardops.PrefixTree.from_tokens(tokens, torch.zeros(5).long(), mask=mask).dedup_stats()
        assert stats == rewardops.DedupStats(4, 5, 12, 6, 10 / 12, 0.5)
        none = rewardops.PrefixTree.from_tokens(tokens[:0], torch.zeros(0).long()).dedup_stats()
        assert none == (0, 0, 0, 0, 0.0, 0.0)
        # The weights of lambda-GRPO sum to the number of unique tokens.
        weights = rewardops.shared_prefix_weights(tokens, torch.zeros(5).long(), mask=mask)
        assert float(weights.sum()) == pytest.approx(stats.unique)

    def test_real_answers_survive_the_tree(self, shared):
        """The texts of the rows are those of the nodes on their paths."""
        tree, rows, decode = answers(shared, 40)
        for b, row in enumerate(rows):
            assert "".join(decode(tree.tokens_of(n)) for n in tree.path(b)) == row["response"].rstrip()
        stats = tree.dedup_stats()
        assert stats.rows == 160
        assert 0 < stats.saved < stats.shared < 1

    @pytest.mark.parametrize("with_rewards", [True, False])
    def test_drawings(self, generator, with_rewards):
        """A drawing has every row, every value of a branch, and escaped text."""
        tokens, groups, mask = draw(14, 20, generator)
        rewards = torch.rand(14, generator=generator) if with_rewards else None
        tree = rewardops.PrefixTree.from_tokens(tokens, groups, mask=mask, rewards=rewards)
        decode = lambda ids: "".join("<a&\"'>"[i] for i in ids)  # noqa: E731
        svg = tree.to_svg(decode)
        root = xml.fromstring(svg)
        texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
        for b in range(14):
            assert any(t.startswith(f"row {b} ") or t.startswith(f"row {b}  ") for t in texts) == bool(
                tree.path(b)
            )
        titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
        assert len(titles) == len(tree)
        for n in range(len(tree)):
            if tree.mean is not None:
                assert f"value {float(tree.mean[n]):.3g}" in titles[n]
            assert titles[n].startswith(f"{int(tree.count[n])} of ")
        dot = tree.to_dot(decode)
        assert dot.count("->") == int((tree.parent >= 0).sum())
        assert dot.count("[label=") == len(tree)
        page = tree.to_html(decode, title="a < b")
        for part in ("<svg", "a &lt; b", "&lt;a"):
            assert part in page
        for text in (tree.to_svg(), tree.to_dot(), tree.to_html()):
            assert " ".join(map(str, tree.tokens_of(tree.path(0)[-1])))[:3] in text

    def test_drawing_is_readable_at_16_rows(self, generator):
        """Labels of branches are on the page, and none at one height overlap."""
        groups = torch.zeros(16, dtype=torch.int64)
        tokens = shared_prefix_tokens(groups, 400, generator, vocab=90)
        tree, _ = tree_of(tokens, groups, None)
        root = xml.fromstring(tree.to_svg(width=1200))
        boxes = {}
        for t in root.iter("{http://www.w3.org/2000/svg}text"):
            if t.get("class") == "value":
                right, y = float(t.get("x")), float(t.get("y"))
                left = right - 6.2 * len("".join(t.itertext()))
                assert 0 < left < right < 1200
                boxes.setdefault(y, []).append((left, right))
        assert sum(map(len, boxes.values())) == int((torch.bincount(tree.parent[1:]) > 0).sum())
        for spans in boxes.values():
            for a, b in itertools.pairwise(sorted(spans)):
                assert a[1] <= b[0]

    def test_networkx(self, generator):
        networkx = pytest.importorskip("networkx")
        tokens, groups, mask = draw(14, 20, generator)
        tree, _ = tree_of(tokens, groups, mask)
        graph = tree.to_networkx()
        assert len(graph) == len(tree)
        assert networkx.is_forest(graph)
        for n in graph:
            assert graph.nodes[n]["tokens"] == tree.tokens_of(n)
            assert graph.nodes[n]["mean"] == float(tree.mean[n])
            assert list(graph.predecessors(n)) == [int(p) for p in tree.parent[n : n + 1] if p >= 0]
            assert networkx.descendants(graph, n) == set(range(n + 1, int(tree.tout[n])))

    def test_networkx_is_not_needed(self, monkeypatch):
        tree = rewardops.PrefixTree.from_tokens(torch.tensor([[1, 2]]), group_size=1)
        monkeypatch.setitem(sys.modules, "networkx", None)
        with pytest.raises(ImportError, match="networkx"):
            tree.to_networkx()
        with pytest.raises(ValueError, match=r"rewards: got shape \[1, 2\], want \[B\]"):
            rewardops.PrefixTree.from_tokens(torch.tensor([[1, 2]]), group_size=1, rewards=torch.ones(1, 2))
        with pytest.raises(ValueError, match="weights: got a value without rewards"):
            rewardops.PrefixTree.from_tokens(torch.tensor([[1, 2]]), group_size=1, weights=torch.ones(1))
