"""Presets of rewardops.advantages: by hand, against loops and against recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_advantages import advantages

import rewardops
from rewardops.testing import check_backend, random_mask

CUDA = True  # the `target` fixture also runs the CUDA C++ kernels


class Test_presets:
    def test_presets_of_one_group(self, target):
        """Results by hand for rewards 1, 0, 0, 0."""
        r = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(target.device)
        third = 1 / 3
        for preset, want in (
            ("grpo", [1.5, -0.5, -0.5, -0.5]),
            ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
            ("rloo", [1, -third, -third, -third]),
            ("lite_ppo", [1.5, -0.5, -0.5, -0.5]),
            ("max_rl", [3, -1, -1, -1]),
            ("pass_at_k", [1, 0, 0, 0]),
            ("gpg", [0.75, -0.25, -0.25, -0.25]),
        ):
            got = getattr(rewardops.advantages, preset)(r, group_size=4)
            torch.testing.assert_close(
                got.cpu(), torch.tensor(want, dtype=torch.float32), rtol=2e-5, atol=2e-5
            )
        got = rewardops.advantages.gpg(r, group_size=4, alpha="rewards")
        torch.testing.assert_close(got.cpu(), torch.tensor([3.0, -1, -1, -1]))
        rewards, groups = (
            torch.tensor([1.0, 0, 0, 1, 0]).to(target.device),
            torch.tensor([0, 0, 0, 1, 1]).to(target.device),
        )
        lengths = torch.tensor([2, 3, 1, 2, 3]).to(target.device)
        got = rewardops.advantages.opo(rewards, groups, lengths=lengths)
        torch.testing.assert_close(got.cpu(), torch.tensor([2 * third, -third, -third, 0.6, -0.4]))
        got = rewardops.advantages.pass_at_k(
            torch.tensor([0.2, 0.9, 0.5, 0.9, 0.1]).to(target.device), groups, scale="std"
        )
        torch.testing.assert_close(got.cpu(), torch.tensor([0, 1.13899, 0, 1.41421, 0]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("alpha", ["informative", "rewards"])
    def test_rows_without_a_token_are_not_in_the_alpha_of_gpg(self, target, alpha):
        rewards = torch.tensor([1.0, 0.0, 0.0, 7.0, 2.0, 2.0, torch.nan]).to(target.device)
        groups = torch.tensor([0, 0, 0, 0, 1, 1, 2]).to(target.device)
        mask = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [1, 1], [0, 0]]).to(target.device)
        got = rewardops.advantages.gpg(rewards, groups, alpha=alpha, mask=mask).cpu()
        share = 5 / 3  # five rows with a token; three informative ones, or three with a reward
        want = torch.tensor([2 * share, -share, -share, 0, 0, 0, 0])[:, None] / 3 * mask.cpu()
        torch.testing.assert_close(got, want)


class Test_gdpo:
    def test_gdpo(self, target, generator):
        rewards = torch.randn(8, 2, generator=generator).to(target.device)
        mask = random_mask(8, 5, generator).to(target.device)
        mask[:, 0] = True
        z = rewardops.group_advantages(rewards, group_size=4, weights=[1, 1])
        rows = rewardops.advantages.gdpo(rewards, group_size=4)
        torch.testing.assert_close(rows, rewardops.whiten(z))
        tokens = rewardops.advantages.gdpo(rewards, group_size=4, whitening="tokens", mask=mask)
        torch.testing.assert_close(
            tokens, rewardops.whiten(z[:, None].expand(mask.shape), mask), rtol=1e-4, atol=1e-5
        )
        spread = rewardops.advantages.gdpo(rewards, group_size=4, mask=mask)
        torch.testing.assert_close(spread, torch.where(mask, rows[:, None], 0))


class Test_group_advantages_and_presets:
    @pytest.mark.parametrize("name", ["uniform", "ragged", "holes"])
    def test_recorded_pairs(self, target, shared, name):
        d = np.load(shared / "golden" / f"verl_advantages_{name}.npz")
        mask = torch.tensor(d["response_mask"]) > 0
        rewards = torch.tensor(d["token_level_rewards"]).sum(1)
        groups = torch.tensor(d["index"])
        sizes = torch.bincount(groups)[groups]
        several = sizes > 1  # verl's loop returns the raw reward for a group of one
        here = mask.to(target.device)
        cases = {
            "grpo": {},
            "grpo_no_std": {"scale": "none"},
            "rloo": {"baseline": "leave_one_out", "scale": "none"},
            "opo": {"baseline": "length_weighted", "scale": "none"},
            "grpo_passk": {"baseline": "second_max"},
        }
        if target.interpreted and target.backend == "triton" and name != "ragged":
            del cases["grpo_passk"]  # slow
        for key, options in cases.items():
            # verl returns the raw reward of a group of one, except for pass@k, which raises.
            fn = advantages(groups, mask=mask, singleton="raw", **options)
            ours = fn(rewards.to(target.device)).cpu()
            rows = several if key == "grpo_passk" else torch.ones_like(several)
            torch.testing.assert_close(ours[rows], torch.tensor(d[key])[rows], rtol=2e-5, atol=2e-5, msg=key)
        there = (rewards.to(target.device), groups.to(target.device))
        token_rewards = torch.tensor(d["token_level_rewards"]).to(target.device)
        got = {
            "gpg": rewardops.advantages.gpg(*there, alpha="rewards", singleton="raw", mask=here),
            "reinforce_pp_baseline": rewardops.advantages.reinforce_plus_plus_baseline(
                *there, singleton="raw", mask=here
            ),
            "reinforce_pp": rewardops.advantages.reinforce_plus_plus(
                token_rewards, gamma=float(d["reinforce_pp_gamma"]), mask=here
            ),
            "remax": rewardops.advantages.remax(
                token_rewards, torch.tensor(d["remax_baseline"]).to(target.device), mask=here
            ),
        }  # fmt: skip
        for key, ours in got.items():
            torch.testing.assert_close(ours.cpu(), torch.tensor(d[key]) * mask, rtol=1e-4, atol=1e-4, msg=key)


# ---- PURE --------------------------------------------------------------------------------------------------


def pure_loop(
    r, ends, mask, groups, outcome, weight, baseline, temperature, separators, penalty=None, gamma=1.0
):
    """The authors' order, row by row in float64; ``penalty`` is ``beta * kl``."""
    batch, width = r.shape
    spots = [[t for t in range(width) if mask[b, t] and ends[b, t]] for b in range(batch)]
    soft = torch.zeros(batch, width, dtype=torch.float64)
    for b in range(batch):
        if spots[b]:
            x = r[b, spots[b]].double()
            soft[b, spots[b]] = (-x / temperature).softmax(0) * x
    total, length = soft.sum(1), mask.sum(1).double()
    live = length > 0
    out = torch.zeros_like(soft)
    for b in range(batch):
        others = [j for j in range(batch) if j != b and groups[j] == groups[b] and live[j]]
        x = soft[b].clone()
        if others and baseline == "step":
            mean = sum(float(total[j]) / max(len(spots[j]), 1) for j in others) / len(others)
            for t in spots[b]:
                x[t] -= mean
        if others and baseline == "token":
            per_token = sum(float(total[j]) for j in others) / sum(float(length[j]) for j in others)
            last = -1
            for t in spots[b]:
                x[t] -= per_token * int(mask[b, last + 1 : t].sum())
                last = t
        valid = mask[b].nonzero()[:, 0].tolist()
        if outcome is not None and valid:
            mean = sum(float(outcome[j]) for j in others) / len(others) if others else 0.0
            x[valid[-1]] += weight * (float(outcome[b]) - mean)
        running = 0.0
        for t in reversed(valid):
            running = float(x[t]) - (float(penalty[b, t]) if penalty is not None else 0.0) + gamma * running
            out[b, t] = 0.0 if t in spots[b] and not separators else running
    return out


class Test_pure:
    @pytest.mark.parametrize("baseline", ["token", "step", "none"])
    @pytest.mark.parametrize("separators", [False, True])
    def test_pure(self, target, generator, baseline, separators):
        r, mask = torch.randn(8, 23, generator=generator), random_mask(8, 23, generator)
        flags = torch.rand(8, 23, generator=generator) > 0.6
        groups = torch.tensor([1, 1, 0, 1, 0, 7, 1, 0])
        outcome = (torch.rand(8, generator=generator) > 0.5).float() - 1
        ids = (flags & mask).long()
        ids = ids.cumsum(1) - ids  # the same steps, except for tokens after the last flag

        def fn(r, outcome, steps=flags):
            to = [x.to(r.device) for x in (steps, groups, mask)]
            return rewardops.advantages.pure(
                r, to[0], to[1], outcome=outcome, outcome_weight=0.7, temperature=0.3, baseline=baseline,
                separators=separators, mask=to[2],
            )  # fmt: skip

        ours = (
            check_backend(fn, [r, outcome], backend=target.backend, device=target.device, ulps=64)
            .outputs[0]
            .cpu()
        )
        want = pure_loop(r, flags, mask, groups, outcome, 0.7, baseline, 0.3, separators)
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)
        bare = rewardops.advantages.pure(
            r, ids, groups, temperature=0.3, baseline=baseline, separators=separators, mask=mask
        )
        ends = torch.zeros_like(mask)
        for b in range(8):
            valid = mask[b].nonzero()[:, 0].tolist()
            for here, following in zip(valid, [*valid[1:], None], strict=False):
                ends[b, here] = following is None or ids[b, following] != ids[b, here]
        want = pure_loop(r, ends, mask, groups, None, 1.0, baseline, 0.3, separators)
        torch.testing.assert_close(bare.double(), want, rtol=1e-5, atol=1e-5)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = rewardops.advantages.pure(
            r[mask], flags[mask], groups, outcome=outcome, outcome_weight=0.7, temperature=0.3, baseline=baseline,
            separators=separators, cu_seqlens=cu,
        )  # fmt: skip
        torch.testing.assert_close(packed, ours[mask], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("baseline", ["token", "step"])
    @pytest.mark.parametrize("separators", [False, True])
    def test_kl_is_subtracted_before_the_sums(self, target, generator, baseline, separators):
        r, mask = torch.randn(6, 15, generator=generator), random_mask(6, 15, generator)
        kl, flags = torch.rand(6, 15, generator=generator), torch.rand(6, 15, generator=generator) > 0.6
        groups, outcome = torch.tensor([1, 1, 0, 1, 0, 7]), torch.randn(6, generator=generator)

        def fn(r, outcome, kl):
            to = [x.to(r.device) for x in (flags, groups, mask)]
            return rewardops.advantages.pure(
                r, to[0], to[1], outcome=outcome, kl=kl, beta=0.3, baseline=baseline, gamma=0.9,
                separators=separators, mask=to[2],
            )  # fmt: skip

        where = {"backend": target.backend, "device": target.device}
        ours = check_backend(fn, [r, outcome, kl], ulps=64, **where).outputs[0].cpu()
        want = pure_loop(
            r,
            flags,
            mask,
            groups,
            outcome,
            1.0,
            baseline,
            0.1,
            separators,
            penalty=0.3 * kl.double(),
            gamma=0.9,
        )
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)
        dirty = fn(*(x.to(target.device) for x in (r, outcome, kl.masked_fill(~mask, torch.nan))))
        assert torch.equal(dirty.cpu(), ours)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        packed = rewardops.advantages.pure(
            r[mask], flags[mask], groups, outcome=outcome, kl=kl[mask], beta=0.3, baseline=baseline, gamma=0.9,
            separators=separators, cu_seqlens=cu,
        )  # fmt: skip
        torch.testing.assert_close(packed, ours[mask], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"kl: got shape \[6\], want \[6, 15\]"):
            rewardops.advantages.pure(r, flags, groups, kl=kl[:, 0])
        with pytest.raises(ValueError, match="beta: got inf"):
            rewardops.advantages.pure(r, flags, groups, kl=kl, beta=torch.inf)

    def test_pure_baseline_by_hand(self):
        """R = 1.2, .3, -.6 over 10, 8 and 12 tokens: baselines -.015, .02727, .08333 for each."""
        lengths, totals = [10, 8, 12], [1.2, 0.3, -0.6]
        mask = torch.arange(12) < torch.tensor(lengths)[:, None]
        flags, r = torch.zeros(3, 12).bool(), torch.zeros(3, 12)
        for b, (n, total) in enumerate(zip(lengths, totals, strict=True)):
            flags[b, n - 1], r[b, n - 1] = True, total
        got = rewardops.advantages.pure(r, flags, group_size=3, mask=mask)
        for b, base in enumerate((-0.015, 0.02727, 0.08333)):
            assert got[b, 0].item() == pytest.approx(totals[b] - base * (lengths[b] - 1), abs=1e-4)
            assert got[b, lengths[b] - 1].item() == 0
        with pytest.raises(TypeError, match="steps: got None"):
            rewardops.advantages.pure(r, None, group_size=3)
