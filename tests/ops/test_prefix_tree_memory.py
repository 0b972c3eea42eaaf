"""The specification takes thousands of rows: no tensor of it grows with the number of pairs of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewardops.reference import prefix_tree as reference
from rewardops.testing import pack, shared_prefix_tokens

ROWS, WIDTH = 4000, 100


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
        return out


def one_group(generator):
    groups = torch.zeros(ROWS, dtype=torch.int64)
    return shared_prefix_tokens(groups, WIDTH, generator), groups


def many_groups(generator):
    groups = torch.arange(ROWS)[torch.randperm(ROWS, generator=generator)] // 16
    return shared_prefix_tokens(groups, WIDTH, generator), groups


def leaning(generator):
    """Each row leaves the next one token later: paths of as many nodes as a row has tokens, and duplicates."""
    leave = torch.arange(ROWS)[torch.randperm(ROWS, generator=generator)] % (WIDTH + 1)
    return (torch.arange(WIDTH) < leave[:, None]).to(torch.int64), torch.zeros(ROWS, dtype=torch.int64)


class Test_prefix_tree_of_thousands_of_rows:
    @pytest.mark.parametrize("draw", [one_group, many_groups, leaning])
    @pytest.mark.parametrize("packed", [False, True])
    def test_no_table_of_pairs_of_rows(self, generator, draw, packed):
        tokens, groups = draw(generator)
        mask = torch.rand(ROWS, WIDTH, generator=generator) > 0.02
        mask[5] = False
        padded, cu = tokens, None
        if packed:
            lengths = torch.full((ROWS,), WIDTH)
            (tokens, cu), (mask, _) = pack(tokens, lengths), pack(mask, lengths)
        x = torch.rand(ROWS, 1, generator=generator, dtype=torch.float64)
        with Largest() as largest:
            rows, nodes = reference.prefix_tree(reference.PrefixTreeArgs(tokens, groups, mask, cu, False))
            members, lcp = reference.prefix_lcp(rows, groups, 20)
            statistics = {}
            for statistic in ("std", "mean", "sum"):
                of_rows = reference.SubtreeArgs(x, x[:, 0], rows, nodes, 1.0, statistic, 1)
                statistics[statistic] = found = reference.subtree_statistics(of_rows)
                up = torch.ones_like(found.out)
                on_x, on_weights = reference.subtree_statistics_backward(up, *found, of_rows)
            on = reference.NodeTokensArgs(
                found.out, found.out, x, x, rows, nodes, mask, cu, False, tokens.shape[-1], "step", 0.9
            )
            grad = reference.nodes_to_tokens(on, torch.float64)
            reference.nodes_to_tokens_backward(grad, on)
        assert largest.elements <= 2 * ROWS * (WIDTH + 1)

        valid = mask.view(ROWS, WIDTH)
        spans = []
        for ids, at in zip(padded.tolist(), valid.tolist(), strict=True):
            places = [k for k, counts in enumerate(at) if counts]
            spans.append(ids[places[0] : places[-1] + 1] if places else [])
        label = groups.tolist()
        want = sorted(range(ROWS), key=lambda b: (label[b], not spans[b], spans[b], b))
        assert rows[0].tolist() == want

        def shared(a, b):
            if label[a] != label[b] or not spans[a] or not spans[b]:
                return -1
            return sum(
                1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(spans[a], spans[b], strict=False))
            )

        assert rows[4].tolist() == [-1, *(shared(a, b) for a, b in itertools.pairwise(want))]
        for b in range(0, ROWS, 97):
            others = [j for j in range(ROWS) if label[j] == label[b]][:20]
            assert members[b].tolist() == others + [-1] * (20 - len(others))
            assert lcp[b, : len(others)].tolist() == [shared(b, j) for j in others]

        # A node's rows: those that share its tokens, and no row before or after them.
        neighbours = [*rows[4].tolist(), -1]
        begin, end, depth, _ = nodes.tolist()
        ordered = x[rows[0]]
        for n in range(0, 2 * ROWS, 13):
            own = slice(begin[n], end[n])
            assert all(k >= depth[n] for k in neighbours[own][1:])
            assert end[n] == begin[n] or max(neighbours[begin[n]], neighbours[end[n]]) < depth[n]
            weight, y = ordered[own, 0], ordered[own]
            squares = (y**2).sum(0)
            torch.testing.assert_close(statistics["sum"].out[n], squares, rtol=1e-12, atol=0)
            if len(y) > 1:
                mean = squares / weight.sum()
                variance = (weight[:, None] * (y - mean) ** 2).sum(0) / weight.sum() * len(y) / (len(y) - 1)
                torch.testing.assert_close(statistics["mean"].out[n], mean, rtol=1e-12, atol=0)
                torch.testing.assert_close(statistics["std"].out[n] ** 2, variance, rtol=1e-9, atol=1e-14)
        # A row's gradient: the number of its path's nodes, times its weight, or its number.
        count = torch.zeros(ROWS, dtype=torch.float64)
        for b in range(0, ROWS, 61):
            node = int(rows[1, b])
            while node >= 0:
                count[b] += 1
                node = int(nodes[3, node])
        some = torch.arange(0, ROWS, 61)
        torch.testing.assert_close(on_x[some, 0], (count * x[:, 0])[some], rtol=1e-12, atol=0)
        torch.testing.assert_close(on_weights[some], (count * x[:, 0])[some], rtol=1e-12, atol=0)
