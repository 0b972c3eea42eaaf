"""Reductions over rows and steps, on every backend."""

from __future__ import annotations

import pytest
import torch

import rewardops
from rewardops.core import dispatch
from rewardops.core.rows import Layout
from rewardops.ops import segments as ops
from rewardops.reference.segments import REDUCTIONS
from rewardops.testing import check_backend, pack, random_mask


def sums(mask=None, cu=None):
    def fn(x):
        to = [None if t is None else t.to(x.device) for t in (mask, cu)]
        batch = x.shape[0] if cu is None else cu.shape[0] - 1
        return ops.row_sums(x, Layout(batch, tuple(x.shape), *to))

    return fn


class Test_row_sums:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_row_sums(self, target, generator, dtype):
        x = torch.randn(5, 700, generator=generator, dtype=dtype)
        mask = random_mask(5, 700, generator)
        mask[2] = False
        where = {"backend": target.backend, "device": target.device}
        for m in (None, mask):
            ours = check_backend(sums(m), [x], **where)
            valid = torch.ones_like(x, dtype=torch.bool) if m is None else m
            torch.testing.assert_close(
                ours.outputs[0].cpu(), torch.where(valid, x.double(), 0).sum(1).to(dtype)
            )
        poisoned = check_backend(sums(mask), [x.masked_fill(~mask, 0)], **where)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = check_backend(sums(None, cu), [x[mask]], **where).outputs[0]
        torch.testing.assert_close(packed, poisoned.outputs[0], rtol=1e-6, atol=1e-6)

    def test_masked_tokens_never_influence(self, target, generator):
        x = torch.randn(3, 40, generator=generator)
        mask = random_mask(3, 40, generator)
        clean = sums(mask)(x.masked_fill(~mask, 0).to(target.device))
        assert torch.equal(sums(mask)(x.masked_fill(~mask, torch.nan).to(target.device)), clean)

    def test_empty(self, target):
        for shape, cu in (((0, 4), None), ((3, 0), None), ((0,), torch.tensor([0, 0, 0]))):
            got = sums(None, cu)(torch.zeros(shape, device=target.device))
            assert got.tolist() == [0.0] * (shape[0] if cu is None else 2)


class Test_row_counts:
    def test_row_counts(self, target, generator):
        mask = random_mask(5, 333, generator)
        mask[1] = False
        rows = Layout(5, (5, 333), mask.to(target.device), None)
        with dispatch.use_backend(target.backend):
            assert torch.equal(ops.row_counts(rows, target.device).cpu(), mask.sum(1).double())
            cu = torch.tensor([0, 100, 100, 333], device=target.device)
            rows = Layout(3, (333,), mask[0].to(target.device), cu)
            want = [float(mask[0, a:b].sum()) for a, b in ((0, 100), (100, 100), (100, 333))]
            assert ops.row_counts(rows, target.device).tolist() == want


# ---- steps -------------------------------------------------------------------------------------------------


def step_ids(batch, width, generator):
    ids = (torch.rand(batch, width, generator=generator) > 0.6).long().cumsum(1)
    return torch.where(torch.rand(batch, 1, generator=generator) > 0.5, ids - 2, ids)  # some start at -2


def ids_of(flags, mask, trailing=False):
    """The ids of steps that end at the flags of valid tokens; of tokens after a row's last flag -1, or one more."""
    ends = (flags & mask).long()
    before = ends.cumsum(1) - ends
    return before if trailing else torch.where(before < ends.sum(1, keepdim=True), before, -1)


def reduce(op, ids, mask=None, cu=None, num=None):
    def fn(x):
        i, m, c = (None if t is None else t.to(x.device) for t in (ids, mask, cu))
        return rewardops.segment_reduce(x, i, op, num_steps=num, mask=m, cu_seqlens=c)

    return fn


def by_hand(op, x, ids, mask, num):
    out = torch.zeros(x.shape[0], num, dtype=torch.float64)
    plain = {
        "sum": torch.sum, "mean": torch.mean, "min": torch.amin, "max": torch.amax, "prod": torch.prod,
        "first": lambda v: v[0], "last": lambda v: v[-1], "any": lambda v: (v != 0).any(),
    }[op]  # fmt: skip
    for b in range(x.shape[0]):
        for s in range(num):
            chosen = x[b].double()[(ids[b] == s) & mask[b]]
            if len(chosen):
                out[b, s] = plain(chosen)
    return out


class Test_segment_reduce:
    @pytest.mark.parametrize("op", REDUCTIONS)
    def test_segment_reduce(self, target, generator, op):
        x = torch.randn(5, 90, generator=generator).mul(2).round()  # with ties and zeros
        x[0] += 0.25
        mask = random_mask(5, 90, generator)
        ids = step_ids(5, 90, generator)
        where = {"backend": target.backend, "device": target.device}
        num = int(ids[mask].max()) + 1
        ours = check_backend(reduce(op, ids, mask, num=num), [x], **where).outputs[0].cpu()
        torch.testing.assert_close(ours.double(), by_hand(op, x, ids, mask, num), rtol=1e-6, atol=1e-6)
        # num_steps below and above the number of steps; packed.
        fewer = check_backend(reduce(op, ids, mask, num=3), [x], **where).outputs[0].cpu()
        assert torch.equal(fewer, ours[:, :3])
        assert not reduce(op, ids, mask, num=num + 20)(x.to(target.device))[:, num:].any()
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = check_backend(reduce(op, ids[mask], None, cu, num), [x[mask]], **where).outputs[0].cpu()
        torch.testing.assert_close(packed, ours, rtol=1e-6, atol=1e-6)
        dirty = reduce(op, ids, mask, num=num)(x.masked_fill(~mask, torch.nan).to(target.device))
        assert torch.equal(dirty.cpu(), reduce(op, ids, mask, num=num)(x.to(target.device)).cpu())

    def test_extremes_of_nan_and_infinities(self, target):
        nan, inf = torch.nan, torch.inf
        x = torch.tensor(
            [[1.0, nan, 0.0, nan, inf, inf, -inf, 2.0]], device=target.device, requires_grad=True
        )
        ids = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]], device=target.device)
        with dispatch.use_backend(target.backend):
            for op, want in (("min", [nan, inf, -inf]), ("max", [nan, inf, 2.0])):
                out = rewardops.segment_reduce(x, ids, op, num_steps=3)
                torch.testing.assert_close(out.detach().cpu(), torch.tensor([want]), equal_nan=True)
                (grad,) = torch.autograd.grad(out, x, torch.tensor([[1.0, 2.0, 3.0]], device=target.device))
                last = [3.0, 0.0] if op == "min" else [0.0, 3.0]
                assert grad.tolist() == [[0.0, 1.0, 0.0, 0.0, 2.0, 0.0, *last]]

    def test_of_equal_extremes_the_earliest_has_the_gradient(self, target):
        """Ties within and across blocks."""
        x, places = torch.zeros(1, 2600, device=target.device), [100, 1500, 2500]
        x[0, places] = 1.0
        ids = torch.zeros(1, 2600, dtype=torch.int64, device=target.device)
        with dispatch.use_backend(target.backend):
            for op, sign in (("max", 1), ("min", -1)):
                leaf = (sign * x).requires_grad_()
                out = rewardops.segment_reduce(leaf, ids, op, num_steps=1)
                assert out.item() == sign
                (grad,) = torch.autograd.grad(out.sum(), leaf)
                assert grad.nonzero().tolist() == [[0, 100]]

    def test_products_have_a_gradient_at_zero(self, target):
        x = torch.tensor(
            [[2.0, 0.0, 3.0, 0.0, 0.0, 5.0, 4.0, 0.5]], dtype=torch.float64, device=target.device
        )
        ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]], device=target.device)
        leaf = x.requires_grad_()
        with dispatch.use_backend(target.backend):
            (grad,) = torch.autograd.grad(
                rewardops.segment_reduce(leaf, ids, "prod", num_steps=3).sum(), leaf
            )
        assert grad.tolist() == [[0.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.5, 4.0]]

    @pytest.mark.parametrize("op", REDUCTIONS)
    def test_flags_are_ids(self, target, generator, op):
        """In values and gradients; masked flags end nothing, and tokens after the last are of no step."""
        x = torch.randn(4, 70, generator=generator).mul(2).round()
        mask = random_mask(4, 70, generator)
        flags = torch.rand(4, 70, generator=generator) > 0.8
        flags[1] = False
        ids, num = ids_of(flags, mask), int((flags & mask).sum(1).max())
        where = {"backend": target.backend, "device": target.device}
        for steps in (num - 1, num + 2):
            want = check_backend(reduce(op, ids, mask, num=steps), [x], **where)
            got = check_backend(reduce(op, flags, mask, num=steps), [x], **where)
            assert torch.equal(got.outputs[0], want.outputs[0])
            assert not got.outputs[0][1].any()
            for ours, theirs in zip(got.gradients, want.gradients, strict=True):
                assert torch.equal(ours, theirs)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = check_backend(reduce(op, flags[mask], None, cu, num + 2), [x[mask]], **where).outputs[0]
        torch.testing.assert_close(packed, got.outputs[0], rtol=1e-6, atol=1e-6)

    def test_flags_are_counted(self, target, generator):
        """The number of steps is that of the longest row, where it may be read."""
        flags, mask = torch.rand(3, 40, generator=generator) > 0.7, random_mask(3, 40, generator)
        x, steps = torch.ones(3, 40), int((flags & mask).sum(1).max())
        assert rewardops.segment_reduce(x, flags, mask=mask).shape == (3, steps)
        assert rewardops.segment_reduce(x, flags & False).shape == (3, 0)
        assert rewardops.segment_reduce(x[:0], flags[:0]).shape == (0, 0)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = rewardops.segment_reduce(x[mask], flags[mask], cu_seqlens=cu)
        assert torch.equal(packed, rewardops.segment_reduce(x, flags, mask=mask))

    @pytest.mark.parametrize("op", ["sum", "mean", "min", "last", "prod"])
    @pytest.mark.parametrize("by", ["ids", "flags"])
    def test_few_long_rows(self, target, generator, op, by):
        """Steps of any length, within a thread or over chunks; tokens of none between those of a step."""
        width = 700 if target.interpreted or target.backend == "reference" else 70_000
        ends = torch.rand(2, width, generator=generator) < 0.3
        ends[:, width // 5 : width // 2] = False
        x = torch.rand(2, width, generator=generator) + 0.5
        mask = random_mask(2, width, generator)
        ids = ids_of(ends, mask, trailing=True)
        if by == "ids":
            ids = torch.where(ids > 5, ids + 3, ids)  # three steps without a token
            ids[torch.rand(2, width, generator=generator) < 0.1] = -1
        num = int(ids[mask].max()) + 1
        steps = ids if by == "ids" else ends
        with dispatch.use_backend(target.backend):
            ours = reduce(op, steps, mask, num=num)(x.to(target.device)).cpu()
        for row in range(2):
            valid = mask[row] & (ids[row] >= 0)
            if by == "flags":
                valid &= ids[row] < (ends & mask)[row].sum()
            step, terms = ids[row][valid], x[row][valid].double()
            if op == "last":
                terms = torch.arange(width)[valid].double()
            how = {"min": "amin", "last": "amax"}.get(op, op)
            want = torch.zeros(num).double().scatter_reduce(0, step, terms, how, include_self=False)
            if op == "last":
                want = x[row].double()[want.long()].where(torch.bincount(step, minlength=num) > 0, 0)
            torch.testing.assert_close(ours[row].double(), want, rtol=1e-5, atol=1e-30)

    @pytest.mark.parametrize("op", ["sum", "mean"])
    def test_sums_of_infinities_and_beyond_float32(self, target, op):
        """What is not finite shows in its own step alone, and a sum that returns from beyond float32 is right."""
        inf = torch.inf
        x = torch.tensor([[1.0, 2.0, inf, 1.0, inf, -inf, 3e38, 3e38, -3e38, -2e38, 1.0, 2.0]])
        ids = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4]])
        with dispatch.use_backend(target.backend):
            got = rewardops.segment_reduce(x.to(target.device), ids.to(target.device), op, num_steps=5)
        want = torch.tensor([[3.0, inf, torch.nan, 1e38, 3.0]])
        if op == "mean":
            want = want / torch.tensor([2.0, 2.0, 2.0, 4.0, 2.0])
        torch.testing.assert_close(got.cpu(), want, equal_nan=True)

    def test_ids_that_fall_stay_in_bounds(self, target, generator):
        """On a device ids are not looked at: what is made of wrong ones is of no meaning, but has its place."""
        ids = torch.randint(-(2**62), 2**62, (3, 90), generator=generator)
        ids[:, ::2] = torch.randint(-2, 9, (3, 45), generator=generator)
        x = torch.randn(3, 90, generator=generator).to(target.device)
        room = torch.zeros(3, 6, device=target.device)
        with dispatch.use_backend(target.backend):
            for op in REDUCTIONS:
                args = x, ids.to(target.device), None, None, 6, op
                out, kept = ops.segment_reduce(*args)
                grads = ops.segment_reduce_backward(room + 1, out, kept, *args)
                assert out.shape == (3, 6)
                assert grads.shape == (3, 90)
            for at_ends in (False, True):
                ops.segment_broadcast(room, ids.to(target.device), None, None, at_ends)

    def test_second_derivatives(self, target, generator):
        """Of what is linear in the values."""
        x = torch.randn(2, 7, generator=generator, dtype=torch.float64).to(target.device).requires_grad_()
        ids, mask = (t.to(target.device) for t in (step_ids(2, 7, generator), random_mask(2, 7, generator)))
        fns = [lambda x, fn=fn: fn(x.sin(), mask=mask) for fn in (rewardops.row_sum, rewardops.row_mean)]
        fns += [lambda x, op=op: reduce(op, ids, mask, num=4)(x.sin()) for op in ("sum", "mean")]
        for place in (rewardops.segment_broadcast, rewardops.place_at_step_end):
            fns.append(lambda s, place=place: place(s.sin(), ids, mask=mask))

        def second(fn, backend):
            with dispatch.use_backend(backend):
                (grad,) = torch.autograd.grad((fn(x) ** 2).sum(), x, create_graph=True)
                return torch.autograd.grad((grad**2).sum(), x)[0]

        for fn in fns:
            torch.testing.assert_close(second(fn, target.backend), second(fn, "reference"))
            if target.backend == "reference":
                assert torch.autograd.gradgradcheck(fn, x)
        with pytest.raises(RuntimeError, match="segment_reduce: a second derivative"):
            second(reduce("max", ids, mask, num=4), target.backend)


class Test_segment_broadcast_place_at_step_end:
    def test_steps_to_tokens(self, target, generator):
        """Broadcast and placed at step ends, from ids and from flags; each is the adjoint of a reduction."""
        mask = random_mask(4, 30, generator)
        ids = step_ids(4, 30, generator)
        flags = torch.rand(4, 30, generator=generator) > 0.7
        steps = torch.randn(4, 12, generator=generator)
        for markers in (ids, flags):
            expected_ids = ids
            if markers is flags:
                expected_ids = ids_of(flags, mask)
            for fn, place in ((rewardops.segment_broadcast, False), (rewardops.place_at_step_end, True)):
                call = lambda s, fn=fn, m=markers: fn(s, m.to(s.device), mask=mask.to(s.device))  # noqa: E731
                got = (
                    check_backend(call, [steps], backend=target.backend, device=target.device)
                    .outputs[0]
                    .cpu()
                )
                for b in range(4):
                    valid = mask[b].nonzero()[:, 0].tolist()
                    want = torch.zeros(30)
                    for k, t in enumerate(valid):
                        s = int(expected_ids[b, t])
                        following = int(expected_ids[b, valid[k + 1]]) if k + 1 < len(valid) else None
                        if 0 <= s < 12 and (not place or following != s):
                            want[t] = steps[b, s]
                    assert torch.equal(got[b], want)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(target.device)
        padded = rewardops.place_at_step_end(
            steps.to(target.device), flags.to(target.device), mask=mask.to(target.device)
        )
        packed = rewardops.place_at_step_end(
            steps.to(target.device), flags[mask].to(target.device), cu_seqlens=cu
        )
        assert torch.equal(packed, padded[mask.to(target.device)])


class Test_segment_reduce_segment_broadcast:
    def test_step_errors(self, generator):
        x, ids = torch.randn(3, 4, generator=generator), torch.zeros(3, 4).long()
        assert rewardops.segment_reduce(x, ids - 1).shape == (3, 0)
        assert rewardops.segment_reduce(x[:0], ids[:0]).shape == (0, 0)
        assert rewardops.segment_broadcast(x[:, :0], ids).tolist() == [[0.0] * 4] * 3
        for call, kind, message in (
            (lambda: rewardops.segment_reduce(x, ids, "median"), ValueError, "op: got 'median'"),
            (
                lambda: rewardops.segment_reduce(x, ids[:2]),
                ValueError,
                r"steps: got shape \[2, 4\], want \[3, 4\]",
            ),
            (lambda: rewardops.segment_reduce(x, ids, num_steps=-1), ValueError, "num_steps: got -1"),
            (lambda: rewardops.segment_reduce(x, None), TypeError, "steps: got None"),
            (
                lambda: rewardops.segment_broadcast(x[:2], ids),
                ValueError,
                r"step_values: got shape \[2, 4\], want \[3, steps\]",
            ),
        ):
            with pytest.raises(kind, match=message):
                call()


def running(kind, x, mask):
    """By a loop, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        total, number = 0.0, 0
        for t in mask[b].nonzero()[:, 0].tolist():
            total, number = total + float(x[b, t]), number + 1
            out[b, t] = total / number if kind == "mean" else total
    return out


class Test_running_sum_running_mean:
    @pytest.mark.parametrize("kind", ["sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_by_a_loop(self, target, generator, kind, packed, dtype):
        op = rewardops.running_sum if kind == "sum" else rewardops.running_mean
        x = torch.randn(6, 37, generator=generator).to(dtype)
        lengths = torch.tensor([37, 0, 5, 37, 20, 1])
        inside = torch.arange(37) < lengths[:, None]
        mask = inside & random_mask(6, 37, generator)
        mask[3] = False
        m, cu = (pack(mask, lengths)[0], pack(x, lengths)[1]) if packed else (mask, None)

        def fn(x):
            return op(x, mask=m.to(x.device), cu_seqlens=None if cu is None else cu.to(x.device))

        where = {"backend": target.backend, "device": target.device}
        ours = check_backend(fn, [pack(x, lengths)[0] if packed else x], **where).outputs[0].cpu()
        want = running(kind, x, mask)
        want = pack(want, lengths)[0] if packed else want
        torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-6)
        dirty = x.masked_fill(~mask, torch.nan)
        dirty = (pack(dirty, lengths)[0] if packed else dirty).to(target.device)
        assert torch.equal(fn(dirty).cpu(), ours)

    def test_gradients_by_hand(self, target):
        x = torch.tensor([[1.0, 9.0, 2.0, 3.0]], device=target.device, requires_grad=True)
        mask = torch.tensor([[1, 0, 1, 1]], device=target.device)
        up = torch.tensor([[1.0, 100.0, 10.0, 6.0]], device=target.device)
        (grad,) = torch.autograd.grad(rewardops.running_sum(x, mask=mask), x, up)
        assert grad.tolist() == [[17.0, 0.0, 16.0, 6.0]]
        (grad,) = torch.autograd.grad(rewardops.running_mean(x, mask=mask), x, up)
        assert grad.tolist() == [[8.0, 0.0, 7.0, 2.0]]

    def test_rows_are_summed_on_their_own(self, target, generator):
        """An infinity or a large value of a row shows in no other, and long rows keep their digits."""
        n = 3000 if target.interpreted or target.backend == "reference" else 100_000
        x = torch.rand(2 * n + 3, generator=generator)
        x[:3] = torch.tensor([1e30, torch.inf, torch.nan])
        cu = torch.tensor([0, 3, n + 3, 2 * n + 3], device=target.device)
        for op, number in ((rewardops.running_sum, 1.0), (rewardops.running_mean, torch.arange(1, n + 1))):
            got = op(x.to(target.device), cu_seqlens=cu).cpu()
            assert got[0] == x[0]
            assert got[1] == torch.inf
            assert got[2].isnan()
            want = x[3:].double().view(2, n).cumsum(1) / number
            torch.testing.assert_close(got[3:].double().view(2, n), want, rtol=1.2e-7, atol=0)

    def test_empty_and_bad_values(self):
        for op in (rewardops.running_sum, rewardops.running_mean):
            assert op(torch.zeros(0, 4)).shape == (0, 4)
            assert op(torch.zeros(3, 0)).shape == (3, 0)
            assert op(torch.zeros(0), cu_seqlens=torch.tensor([0, 0])).shape == (0,)
            with pytest.raises(ValueError, match=r"values: got shape \[3\], want \[B, T\]"):
                op(torch.zeros(3))
            with pytest.raises(TypeError, match=r"values: got dtype torch\.int64"):
                op(torch.zeros(2, 3).long())


class Test_row_sum_row_mean:
    def test_row_sum_and_mean(self, generator):
        x = torch.randn(4, 6, generator=generator)
        mask = random_mask(4, 6, generator)
        mask[2] = False
        lengths = torch.full((4,), 6)
        packed, cu = pack(x, lengths)
        for fn in (rewardops.row_sum, rewardops.row_mean):
            want = torch.where(mask, x, 0).sum(1)
            if fn is rewardops.row_mean:
                want = want / mask.sum(1).clamp(min=1)
            torch.testing.assert_close(fn(x, mask=mask), want)
            got = fn(packed, mask=pack(mask, lengths)[0], cu_seqlens=cu)
            torch.testing.assert_close(got, want)

    def test_bad_values(self):
        for fn in (rewardops.row_sum, rewardops.row_mean):
            with pytest.raises(ValueError, match=r"values: got shape \[3\], want \[B, T\]"):
                fn(torch.zeros(3))
