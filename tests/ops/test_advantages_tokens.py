"""Group advantages of tokens anywhere in memory and of groups of any size, with gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from test_advantages import advantages

import rewardops
from rewardops.testing import check_backend, evaluate, pack

CUDA = True  # the `target` fixture also runs the CUDA C++ kernels

INF, NAN = torch.inf, torch.nan


def gradient(target, fn, rewards, up):
    """The gradient of the rewards for the upstream gradient ``up``."""
    leaf = rewards.to(target.device).requires_grad_()
    return torch.autograd.grad(fn(leaf), leaf, up.to(target.device))[0].cpu()


class Test_tokens_in_memory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        ("width", "first", "more"),
        [(1, 0, 0), (3, 1, 6), (4, 0, 4), (64, 0, 0), (67, 2, 3), (131, 3, 7), (132, 4, 8)],
    )  # fmt: skip
    def test_rows_begin_anywhere(self, target, generator, dtype, width, first, more):
        """Masks at any alignment; the gradient at masked tokens is not read as a number."""
        mask = (torch.rand(5, width + more, generator=generator) > 0.3)[:, first : first + width]
        rewards = torch.randn(5, generator=generator).to(dtype)
        up = torch.randn(5, width, generator=generator).to(dtype).masked_fill(~mask, NAN)
        fn = advantages(group_size=5, baseline="none", scale="none", mask=mask)
        got = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
        assert torch.equal(got, torch.where(mask, rewards[:, None], 0))
        want = torch.where(mask, up, 0).double().sum(1)
        torch.testing.assert_close(gradient(target, fn, rewards, up).double(), want, rtol=2e-7, atol=2e-7)

    @pytest.mark.parametrize("masked", [False, True])
    def test_packed_rows(self, target, generator, masked):
        """Rows at any offset, empty ones among them."""
        cu = torch.tensor([0, 1, 1, 67, 72, 202, 203])
        rewards, mask = torch.randn(6, generator=generator), torch.rand(203, generator=generator) > 0.3
        options = {"mask": mask} if masked else {"num_tokens": 203}
        valid = mask if masked else torch.ones(203).bool()
        up = torch.randn(203, generator=generator)
        row = torch.searchsorted(cu, torch.arange(203), right=True) - 1
        for groups in ({"groups": torch.tensor([4, 1, 4, 1, 4, 1])}, {"group_size": 3}):
            fn = advantages(**groups, scale="none", cu_seqlens=cu, **options)
            got = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
            live = torch.zeros(6).bool()
            live[row[valid]] = True
            members = torch.where(live, groups.get("groups", torch.arange(6) // 3), -1)
            same = (members[:, None] == members[None, :]) & live
            share = same.double() / same.sum(1, keepdim=True).clamp(min=1)
            want = torch.where(live, rewards.double() - share @ rewards.double(), 0)
            torch.testing.assert_close(got.double(), torch.where(valid, want[row], 0), rtol=1e-6, atol=1e-6)
            sums = torch.zeros(6).double().index_add(0, row, torch.where(valid, up, 0).double())
            want_grad = torch.where(live, sums - share.T @ sums, 0)
            got_grad = gradient(target, fn, rewards, up).double()
            torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)

    def test_tokens_of_no_row_are_zero(self, target):
        """Offsets on a device are not checked: tokens may lie before the first row and behind the last one."""
        rewards, cu = torch.tensor([1.0, 2.0]).to(target.device), torch.tensor([70, 73, 75]).to(target.device)
        groups, options = torch.zeros(2).long().to(target.device), ("none", 0.0, "none", 0.0, 1, False, True)
        out = torch.ops.rewardops.group_advantages(rewards, groups, None, None, None, cu, 300, *options)[
            0
        ].cpu()
        assert out.nonzero().flatten().tolist() == [70, 71, 72, 73, 74]
        assert out[70:75].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0]

    @pytest.mark.parametrize("packed", [False, True])
    def test_few_long_rows(self, target, generator, packed):
        """Several programs per row on a GPU."""
        mask = torch.rand(3, 1201, generator=generator) > 0.5
        mask[1] = False
        rewards, up = torch.tensor([1.5, 9.0, -0.25]), torch.randn(3, 1201, generator=generator)
        tokens = {"mask": mask}
        if packed:
            lengths = torch.tensor([1201, 700, 1201])
            tokens = dict(zip(("mask", "cu_seqlens"), pack(mask, lengths), strict=True))
        fn = advantages(torch.zeros(3).long(), scale="none", **tokens)
        got = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
        want = torch.where(mask, torch.tensor([0.875, 0, -0.875])[:, None], 0)
        assert torch.equal(got, pack(want, lengths)[0] if packed else want)
        sums = torch.where(mask, up, 0).double().sum(1)
        half = (sums[0] - sums[2]) / 2
        up = pack(up, lengths)[0] if packed else up
        got_grad = gradient(target, fn, rewards, up).double()
        torch.testing.assert_close(got_grad, torch.stack([half, half * 0, -half]), rtol=1e-6, atol=1e-6)

    def test_rows_whose_first_valid_token_is_late(self, target):
        late = [0, 3, 15, 16, 17, 31, 32, 90, 199]
        mask = torch.zeros(len(late) + 1, 200).bool()
        mask[torch.arange(len(late)), torch.tensor(late)] = True
        rewards = torch.arange(len(late) + 1.0)
        fn = advantages(torch.zeros(len(rewards)).long(), mask=mask, scale="none")
        got = evaluate(fn, [rewards], backend=target.backend, device=target.device).outputs[0].cpu()
        want = torch.where(mask, (rewards - rewards[:-1].mean())[:, None], 0)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("ups", "want"), [([INF, -INF], NAN), ([NAN, 1.0], NAN), ([3e38, 3e38, -3e38], 3e38)]
    )
    def test_gradients_that_are_not_finite(self, target, ups, want):
        """They show in their own row; what is beyond the range on the way there does not."""
        up = torch.zeros(2, 70)
        up[0, 1 : 1 + len(ups)] = torch.tensor(ups)
        up[1] = 1.0
        fn = advantages(group_size=1, baseline="none", scale="none", mask=torch.ones(2, 70).bool())
        got = gradient(target, fn, torch.ones(2), up)
        torch.testing.assert_close(got, torch.tensor([want, 70.0]), equal_nan=True)

    def test_sums_keep_their_digits(self, target, generator):
        """Long sums that cancel: float32 alone would lose them."""
        up = torch.randn(2, 3000, generator=generator) * 1000
        up[:, 1500:] = -up[:, :1500] + torch.rand(2, 1500, generator=generator) * 1e-3
        fn = advantages(group_size=1, baseline="none", scale="none", mask=torch.ones(2, 3000).bool())
        got = gradient(target, fn, torch.ones(2), up)
        torch.testing.assert_close(got.double(), up.double().sum(1), rtol=1e-6, atol=0)


class Test_groups_of_any_size:
    SIZES = (1, 15, 16, 17, 2, 64, 65, 130)

    @pytest.mark.parametrize(
        ("baseline", "scale"),
        [("mean", "std"), (0.3, "range"), ("second_max", "mean_abs"), ("none", "batch_std")],
    )
    def test_held_and_in_parts(self, target, generator, baseline, scale):
        """Groups as large as what a program reads at once, a row more, and in several parts; rows of no token."""
        sizes = self.SIZES if not target.interpreted or scale == "std" else self.SIZES[:5]
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        rewards = (torch.randperm(len(labels), generator=generator) / 97.0 - 1.1).float()
        live = (torch.rand(len(labels), generator=generator) > 0.1)[:, None]
        options = {"baseline": baseline, "scale": scale, "mask": live, "eps": 1e-4}
        by_size = check_backend(
            advantages(group_size=list(sizes), **options), [rewards], backend=target.backend, device=target.device
        )  # fmt: skip
        order = torch.randperm(len(labels), generator=generator)
        options["mask"] = live[order]
        by_label = check_backend(
            advantages(7 - labels[order], **options), [rewards[order]], backend=target.backend, device=target.device
        )  # fmt: skip
        back = order.argsort()
        torch.testing.assert_close(by_label.outputs[0][back], by_size.outputs[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rows", [24, 120])
    def test_sizes_and_labels_have_the_same_bits(self, target, generator, rows):
        """Rows in their order: by size, by label, and by labels that fall."""
        rewards = torch.randn(rows, generator=generator).to(target.device)
        want = rewardops.group_advantages(rewards, group_size=6)
        labels = (torch.arange(rows) // 6).to(target.device)
        for groups in (labels, -(labels << 40), labels % 2 * (1 << 62) - labels):
            assert torch.equal(rewardops.group_advantages(rewards, groups), want)
