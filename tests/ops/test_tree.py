"""Values and advantages of given trees on every backend, against recursion over dictionaries in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.testing import check_backend, evaluate

REDUCES = ["mean", "max", "min", "softmax", "sum"]
# root -> {a: {a1 = 1, a2 = 0}, b: {b1 = 0}}; the order of nodes is arbitrary
ROOT, A, B, A1, A2, B1 = 3, 0, 5, 1, 4, 2
PARENT = [3, 0, 5, -1, 0, 3]
REWARDS = [math.nan, 1.0, 0.0, math.nan, 0.0, math.nan]


def random_tree(nodes, generator, trees=2):
    """Parents in random order, some nodes with one child and some with many."""
    parent = [
        -1 if n < trees else int(torch.randint(max(0, n - 9), n, (), generator=generator))
        for n in range(nodes)
    ]
    order = torch.randperm(nodes, generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(nodes)
    out = torch.full((nodes,), -1)
    for n, p in enumerate(parent):
        out[place[n]] = -1 if p < 0 else int(place[p])
    return out


def depth_of(parent):
    parent = parent.tolist()

    def depth(n):
        return 0 if parent[n] < 0 else 1 + depth(parent[n])

    return max((depth(n) for n in range(len(parent))), default=0)


def oracle(parent, rewards, reduce, visits=None, temperature=1.0):
    parent = parent.tolist()
    children = {n: [c for c in range(len(parent)) if parent[c] == n] for n in range(len(parent))}

    def leaves(n):
        return sum(map(leaves, children[n])) if children[n] else 1

    def value(n):
        if not children[n]:
            return float(rewards[n])
        weigh = {None: lambda c: 1.0, "leaves": leaves}.get(visits if isinstance(visits, str) else None)
        weighted = [
            (value(c), float(visits[c]) if torch.is_tensor(visits) else weigh(c)) for c in children[n]
        ]
        weighted = [(v, w) for v, w in weighted if w]
        if not weighted:
            return 0.0
        v, w = (torch.tensor(x, dtype=torch.float64) for x in zip(*weighted, strict=True))
        return float(
            {
                "mean": (v * w).sum() / w.sum(),
                "max": v.max(),
                "min": v.min(),
                "softmax": ((v / temperature).softmax(0) * v).sum(),
                "sum": v.sum(),
            }[reduce]
        )

    return torch.tensor([value(n) for n in range(len(parent))], dtype=torch.float64)


def values(parent, reduce, **options):
    depth = depth_of(parent)

    def run(rewards, fn=rewardops.tree_values):
        on = {k: v.to(rewards.device) if torch.is_tensor(v) else v for k, v in options.items()}
        return fn(parent.to(rewards.device), rewards, reduce=reduce, max_depth=depth, **on)

    return run


class Test_tree_values:
    @pytest.mark.parametrize("visits", [None, "leaves", "given"])
    @pytest.mark.parametrize("reduce", REDUCES)
    def test_matches_recursion(self, target, generator, reduce, visits):
        nodes = 40 if target.interpreted else 70
        parent = random_tree(nodes, generator)
        rewards = torch.randn(nodes, generator=generator)
        if visits == "given":
            visits = torch.randint(0, 4, (nodes,), generator=generator)
        for temperature in (1.0, 0.2) if reduce == "softmax" else (1.0,):
            fn = values(parent, reduce, visits=visits, temperature=temperature)
            ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
            want = oracle(parent, rewards, reduce, visits, temperature)
            torch.testing.assert_close(ours.outputs[0].cpu().double(), want, rtol=1e-6, atol=1e-6)
            grad = rewards.double().to(target.device).requires_grad_()
            assert torch.autograd.gradcheck(fn, grad, atol=1e-7, fast_mode=target.interpreted)

    def test_search_estimates(self, target):
        """Math-Shepherd's hard and soft estimates of a step with completions 1, 0, 0, 1; the first maximum wins."""
        parent = torch.tensor([-1, 0, 0, 0, 0], device=target.device)
        rewards = torch.tensor([9.0, 1, 0, 0, 1], device=target.device, requires_grad=True)
        soft = rewardops.tree_values(parent, rewards, max_depth=1)
        hard = rewardops.tree_values(parent, rewards, reduce="max", max_depth=1)
        assert float(soft[0]) == 0.5
        assert float(hard[0]) == 1.0
        (grad,) = torch.autograd.grad(hard[0], rewards)
        assert grad.cpu().tolist() == [0, 1, 0, 0, 0]

    def test_of_many_equal_children_the_first_is_chosen(self, target):
        parent = torch.tensor([-1] + [0] * 40, device=target.device)
        rewards = torch.zeros(41, device=target.device)
        rewards[[5, 23, 39]] = 1.0
        for reduce, sign in (("max", 1), ("min", -1)):
            leaf = (sign * rewards).requires_grad_()
            value = rewardops.tree_values(parent, leaf, reduce=reduce, max_depth=1)
            assert value[0].item() == sign
            assert torch.autograd.grad(value[0], leaf)[0].nonzero().tolist() == [[5]]

    def test_nodes_without_visits_do_not_count(self, target):
        parent = torch.tensor([-1, 0, 0, 1, 1], device=target.device)
        rewards = torch.tensor([0.0, 0, 0.5, math.nan, math.inf], device=target.device, requires_grad=True)
        visits = torch.tensor([3, 2, 1, 0, 0], device=target.device)
        for reduce in REDUCES:
            v = rewardops.tree_values(parent, rewards, reduce=reduce, visits=visits, max_depth=2)
            assert float(v[1]) == 0.0
            assert bool(v[:3].isfinite().all())
            (grad,) = torch.autograd.grad(v[0], rewards)
            assert grad[3:].cpu().tolist() == [0, 0]

    def test_a_chain(self, target):
        """A tree as deep as its number of nodes."""
        n = 20 if target.interpreted else 200
        parent = torch.arange(n) - 1
        rewards = torch.arange(float(n))
        fn = values(parent, "mean")
        ours = check_backend(fn, [rewards], backend=target.backend, device=target.device)
        assert bool((ours.outputs[0] == n - 1).all())

    def test_the_same_bits_in_any_dtype(self, target, generator):
        parent = random_tree(30, generator)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            rewards = torch.randn(30, generator=generator).to(dtype)
            out = check_backend(
                values(parent, "softmax"), [rewards], backend=target.backend, device=target.device
            )
            again = evaluate(
                values(parent, "softmax"), [rewards], backend=target.backend, device=target.device
            )
            assert out.outputs[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
            assert torch.equal(out.outputs[0], again.outputs[0])
            assert torch.equal(out.gradients[0], again.gradients[0])

    @given(seed=st.integers(0, 10**6), nodes=st.integers(1, 25), reduce=st.sampled_from(REDUCES))
    def test_property_numbers_of_nodes_mean_nothing(self, seed, nodes, reduce):
        g = torch.Generator().manual_seed(seed)
        parent = random_tree(nodes, g, trees=1)
        rewards = torch.randn(nodes, generator=g, dtype=torch.float64)
        value = rewardops.tree_values(parent, rewards, reduce=reduce, temperature=0.5)
        order = torch.randperm(nodes, generator=g)
        place = torch.empty_like(order)
        place[order] = torch.arange(nodes)
        moved = torch.where(parent[order] < 0, -1, place[parent[order]])
        again = rewardops.tree_values(moved, rewards[order], reduce=reduce, temperature=0.5)
        torch.testing.assert_close(again, value[order], rtol=1e-12, atol=1e-12)
        if reduce != "sum":
            leaf = torch.ones(nodes, dtype=torch.bool)
            leaf[parent[parent >= 0]] = False
            assert bool((value >= rewards[leaf].min() - 1e-12).all())
            assert bool((value <= rewards[leaf].max() + 1e-12).all())


class Test_tree_advantages:
    @pytest.mark.parametrize("kind", ["local", "global", "tree_rl", "siblings"])
    def test_advantages_match_float64(self, target, generator, kind):
        parent = random_tree(40, generator)
        rewards = torch.randn(40, generator=generator)

        def fn(r):
            return rewardops.tree_advantages(parent.to(r.device), r, kind=kind, max_depth=depth_of(parent))

        ours = (
            check_backend(fn, [rewards], backend=target.backend, device=target.device)
            .outputs[0]
            .cpu()
            .double()
        )
        v = oracle(parent, rewards, "mean", "leaves" if kind == "tree_rl" else None)
        up = torch.where(parent < 0, torch.arange(40), parent)
        root = up
        for _ in range(40):
            root = up[root]
        if kind == "siblings":
            want = torch.zeros_like(v)
            for n in range(40):
                among = v[(parent == parent[n]).nonzero()[:, 0]]
                if parent[n] >= 0 and len(among) > 1:
                    want[n] = (v[n] - among.mean()) / (among.std() + 1e-6)
        else:
            leaves = oracle(parent, torch.ones(40), "sum")
            want = {
                "local": v - v[up],
                "global": v - v[root],
                "tree_rl": (v - v[up] + v - v[root]) / leaves.sqrt(),
            }[kind]
        torch.testing.assert_close(ours, want, rtol=2e-5, atol=2e-6)
        assert bool((ours[parent < 0] == 0).all())

    def test_equal_children_have_no_advantage(self, target):
        parent = torch.tensor([-1] + [0] * 7 + [1] * 3, device=target.device)
        rewards = torch.full((11,), 0.3, device=target.device)
        for kind in ("local", "global", "tree_rl", "siblings"):
            out = rewardops.tree_advantages(parent, rewards, kind=kind, max_depth=2)
            assert bool((out == 0).all()), kind


class Test_tree_values_tree_advantages:
    def test_tree_rl_by_hand(self, target):
        """The paper's numbers and those of the released code; rewards of inner nodes are arbitrary."""
        parent, rewards = (torch.tensor(x, device=target.device) for x in (PARENT, REWARDS))
        leaf_mean = rewardops.tree_values(parent, rewards, visits="leaves", max_depth=2)
        child_mean = rewardops.tree_values(parent, rewards, max_depth=2)
        assert float(leaf_mean[ROOT]) == pytest.approx(1 / 3)
        assert float(child_mean[ROOT]) == 0.25
        for form, want in (
            ("paper", {A: 0.2357, B: -0.66667, A1: 1.16667, A2: -0.83333, B1: -0.33333}),
            ("released", {A: 0.35355, B: -1.0, A1: 1.82322, A2: -1.17678, B1: -0.5}),
        ):
            ours = rewardops.tree_advantages(parent, rewards, kind="tree_rl", form=form, max_depth=2)
            for node, value in want.items():
                assert float(ours[node]) == pytest.approx(value, abs=1e-5)

    @pytest.mark.parametrize("nodes", [0, 1])
    def test_small(self, target, nodes):
        parent, rewards = torch.full((nodes,), -1), torch.rand(nodes)
        for reduce in REDUCES:
            out = evaluate(values(parent, reduce), [rewards], backend=target.backend, device=target.device)
            assert torch.equal(out.outputs[0].cpu(), rewards)
        for kind in ("local", "global", "tree_rl", "siblings"):
            out = rewardops.tree_advantages(
                parent.to(target.device), rewards.to(target.device), kind=kind, max_depth=0
            )
            assert out.cpu().tolist() == [0.0] * nodes

    @pytest.mark.parametrize(
        ("fn", "error", "message"),
        [
            (lambda p, r: rewardops.tree_values(p.float(), r), TypeError, "parent: got dtype torch.float32"),
            (lambda p, r: rewardops.tree_values(p[None], r), ValueError, r"parent: got shape \[1, 6\]"),
            (
                lambda p, r: rewardops.tree_values(p, r[:2]),
                ValueError,
                r"leaf_rewards: got shape \[2\], want \[6\]",
            ),
            (lambda p, r: rewardops.tree_values(p - 1, r), ValueError, "parent: got -2, want -1"),
            (lambda p, r: rewardops.tree_values(p + 1, r), ValueError, "parent: got 6, want -1"),
            (
                lambda p, r: rewardops.tree_values(p.clone().fill_(2), r),
                ValueError,
                "parent: got a cycle through node 2",
            ),
            (lambda p, r: rewardops.tree_values(torch.tensor([1, 2, 0, 4, 5, 3]), r), ValueError, "a cycle"),
            (lambda p, r: rewardops.tree_values(p, r, reduce="median"), ValueError, "reduce: got 'median'"),
            (lambda p, r: rewardops.tree_values(p, r, temperature=0.0), ValueError, "temperature: got 0.0"),
            (lambda p, r: rewardops.tree_values(p, r, visits="some"), ValueError, "visits: got 'some'"),
            (lambda p, r: rewardops.tree_values(p, r, visits=r[:1]), ValueError, r"visits: got shape \[1\]"),
            (lambda p, r: rewardops.tree_values(p, r, max_depth=-1), ValueError, "max_depth: got -1"),
            (
                lambda p, r: rewardops.tree_values(p.to("meta"), r.to("meta")),
                ValueError,
                "max_depth: got None",
            ),
            (lambda p, r: rewardops.tree_advantages(p, r, kind="x"), ValueError, "kind: got 'x'"),
            (lambda p, r: rewardops.tree_advantages(p, r, form="x"), ValueError, "form: got 'x'"),
        ],
    )
    def test_bad_input(self, fn, error, message):
        with pytest.raises(error, match=message):
            fn(torch.tensor(PARENT), torch.tensor(REWARDS))
