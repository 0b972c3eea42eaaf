"""Arguments that could be taken for something else: fractional masks, flags given as ids, offsets, numbers."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops.core import checks


class TestMasks:
    FRACTIONS = torch.tensor([[1.0, 0.5, 0.25, 0.0]])

    @pytest.mark.parametrize(
        "call",
        [
            lambda x, m: rewardops.token_kl(x, x * 2, mask=m),
            lambda x, m: rewardops.gae(x, x, mask=m),
            lambda x, m: rewardops.min_returns(x, mask=m),
            lambda x, m: rewardops.group_advantages(x[:, 0], group_size=1, mask=m),
            lambda x, m: rewardops.entropy_weights(x, m),
            lambda x, m: rewardops.running_sum(x, mask=m),
            lambda x, m: rewardops.token_stats(x[..., None].expand(1, 4, 3), x.long(), mask=m),
        ],
    )
    def test_fractions_are_refused(self, call):
        x = torch.ones(1, 4)
        with pytest.raises(ValueError, match=r"mask: got 0\.5 at \[0, 1\], want 0 or 1"):
            call(x, self.FRACTIONS)
        with pytest.raises(ValueError, match=r"mask: got 2 at \[0, 2\], want 0 or 1"):
            call(x, torch.tensor([[1, 0, 2, 0]]))
        with pytest.raises(ValueError, match="mask: got nan"):
            call(x, torch.tensor([[1.0, torch.nan, 0, 0]]))

    def test_zeros_and_ones_of_any_dtype_are_masks(self):
        x, m = torch.randn(2, 4), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])
        want = rewardops.row_sum(x, mask=m.bool())
        for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(rewardops.row_sum(x, mask=m.to(dtype)), want)
            assert torch.equal(
                rewardops.gae(x, x, mask=m.to(dtype)).returns, rewardops.gae(x, x, mask=m.bool()).returns
            )

    @pytest.mark.parametrize("packed", [False, True])
    def test_weights_of_sums_and_means(self, packed):
        g = torch.Generator().manual_seed(0)
        x, w = torch.randn(3, 5, generator=g), torch.rand(3, 5, generator=g)
        w[0, 2], w[2] = 0, 0
        x[0, 2] = torch.nan
        clean = x.nan_to_num(0).double()
        where = {"mask": w.flatten(), "cu_seqlens": torch.tensor([0, 5, 10, 15])} if packed else {"mask": w}
        values = x.flatten() if packed else x
        torch.testing.assert_close(rewardops.row_sum(values, **where).double(), (clean * w).sum(1))
        means = (clean * w).sum(1) / w.double().sum(1).clamp(min=1e-30)
        torch.testing.assert_close(rewardops.row_mean(values, **where).double(), means)

    def test_weights_of_whitening(self):
        """As verl's masked_whiten of a mask that weighs."""
        g = torch.Generator().manual_seed(0)
        x, w = torch.randn(3, 50, generator=g), torch.rand(3, 50, generator=g)
        d, v = x.double(), w.double()
        mean = (d * v).sum() / v.sum()
        var = ((d - mean).square() * v).sum() / v.sum() * v.sum() / (v.sum() - 1)
        torch.testing.assert_close(
            rewardops.whiten(x, w).double(), (d - mean) * (var + 1e-8).rsqrt(), rtol=1e-5, atol=1e-6
        )
        with pytest.raises(ValueError, match="mask: got a weight below 0"):
            rewardops.whiten(x, -w)


class TestSteps:
    def test_flags_given_as_integers(self):
        rewards, flags = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.8, 0.7]]), torch.tensor([[0, 0, 1, 0, 0, 1]])
        with pytest.raises(
            ValueError, match=r"steps: got id 0 after a larger one, at token 3 of row 0 \(flags"
        ):
            rewardops.min_returns(rewards, steps=flags)

    @pytest.mark.parametrize(
        "call",
        [
            lambda x, s: rewardops.min_returns(x, steps=s),
            lambda x, s: rewardops.softmin_rewards(x, steps=s),
            lambda x, s: rewardops.segment_reduce(x, s),
            lambda x, s: rewardops.step_progress(x, s),
            lambda x, s: rewardops.implicit_rewards(x, x, beta=1.0, steps=s),
            lambda x, s: rewardops.advantages.pure(x, s, group_size=1),
        ],
    )
    def test_falling_ids_are_refused(self, call):
        with pytest.raises(ValueError, match="steps: got id 2 after a larger one, at token 2 of row 1"):
            call(torch.ones(2, 3), torch.tensor([[0, 1, 2], [3, 4, 2]]))

    @given(st.data())
    def test_a_quick_look_misses_nothing(self, data):
        """Masked ids and ids of no step may be anything; the others must not fall along their row."""
        lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
        count = sum(lengths)
        ids = data.draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
        valid = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        falls, at = False, 0
        for length in lengths:
            row = [
                i for i, v in zip(ids[at : at + length], valid[at : at + length], strict=True) if v and i >= 0
            ]
            falls |= row != sorted(row)
            at += length
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        arguments = {"mask": torch.tensor(valid, dtype=torch.bool), "cu_seqlens": cu}
        steps = torch.tensor(ids, dtype=torch.int64)
        if falls:
            with pytest.raises(ValueError, match="after a larger one"):
                rewardops.min_returns(torch.ones(count), steps=steps, **arguments)
        else:
            rewardops.min_returns(torch.ones(count), steps=steps, **arguments)


class TestOffsets:
    def test_errors_name_the_place(self):
        x = torch.ones(5)
        cases = {
            (1, 5): "got first entry 1, want 0",
            (0, 3, 2, 5): "got 3 then 2 at row 1, want a non-decreasing sequence",
            (0, 4): "got last entry 4, want 5",
        }
        for offsets, message in cases.items():
            with pytest.raises(ValueError, match=message):
                rewardops.row_sum(x, cu_seqlens=torch.tensor(offsets))

    def test_the_check_is_not_a_loop_over_rows(self):
        """A look at 65,536 rows is a few passes over their offsets: as long as a few others of that size."""
        cu = torch.arange(0, 65536 * 16 + 1, 16, dtype=torch.int32)
        calls = []

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                calls.append(op)
                return op(*args, **(kwargs or {}))

        start = time.process_time()
        with Count():
            checks.check_cu_seqlens(cu, cu.device, "x", 65536 * 16)
        assert len(calls) < 20
        assert time.process_time() - start < 5


class TestNumbers:
    def test_tensors_of_other_shapes_are_refused(self):
        x = torch.ones(2, 3)
        with pytest.raises(
            TypeError, match=r"temperature: got a tensor \[2\] of torch.float32, want a number above 0"
        ):
            rewardops.softmin_rewards(x, temperature=torch.ones(2))
        with pytest.raises(ValueError, match=r"temperature: got -1\.0, want a finite number above 0"):
            rewardops.softmin_rewards(x, temperature=torch.tensor(-1.0))

    def test_no_gradient_flows_into_them(self):
        x, t = torch.ones(2, 3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
        out = rewardops.softmin_rewards(x, temperature=t)
        assert torch.autograd.grad(out.sum(), [x, t], allow_unused=True)[1] is None

    def test_vmap_over_a_number(self):
        x, t = torch.rand(2, 3), torch.tensor([0.1, 0.5, 2.0])
        got = torch.vmap(lambda t: rewardops.softmin_rewards(x, temperature=t))(t)
        want = torch.stack([rewardops.softmin_rewards(x, temperature=float(value)) for value in t])
        torch.testing.assert_close(got, want)
