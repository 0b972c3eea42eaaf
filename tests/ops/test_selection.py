"""Exact numbers of largest elements per scope, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewardops
from rewardops import selection
from rewardops.core import dispatch
from rewardops.core.rows import Layout
from rewardops.reference.selection import share_of
from rewardops.testing import pack, random_mask


def choose(x, mask, cu, ids, fraction, target, **options):
    to = [None if t is None else t.to(target.device) for t in (x, mask, cu, ids)]
    batch = x.shape[0] if cu is None else cu.shape[0] - 1
    rows = Layout(batch, tuple(x.shape), to[1], to[2])
    with dispatch.use_backend(target.backend):
        return selection.largest(to[0], rows, to[3], fraction, **options).cpu()


def by_sorting(x, mask, ids, wanted):
    out = torch.zeros_like(mask)
    for scope in ids.unique().tolist():
        where = [
            (b, t) for b in (ids == scope).nonzero()[:, 0].tolist() for t in mask[b].nonzero()[:, 0].tolist()
        ]
        where.sort(key=lambda at: -x[at].item())  # stable
        for at in where[: int(wanted[scope])]:
            out[at] = True
    return out


class Test_largest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("kind", ["distinct", "ties", "extremes"])
    def test_by_sorting(self, target, generator, dtype, kind):
        x = torch.randn(6, 41, generator=generator, dtype=dtype)
        if kind == "ties":
            x = (x * 2).round()
            signs = x[x == 0].signbit()  # zeros of both signs are equal
            assert bool(signs.any())
            assert not bool(signs.all())
        if kind == "extremes":
            x[0, :5], x[1, 3], x[2, 2] = torch.inf, -torch.inf, 1e-40
        mask = random_mask(6, 41, generator)
        mask[4] = False
        ids = torch.tensor([0, 2, 0, 1, 2, 3])
        counts = selection.scope_counts(mask.sum(1), ids)
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        for share in (0.0, 0.1, 0.5, 1.0):
            wanted = share_of(share, counts, True)
            want = by_sorting(x, mask, ids, wanted)
            if not target.interpreted or share in (0.1, 1.0):
                got = choose(x.masked_fill(~mask, torch.nan), mask, None, ids, share, target)
                assert torch.equal(got, want)
            if not target.interpreted or share in (0.0, 0.5):
                assert torch.equal(choose(x[mask], None, cu, ids, share, target), want[mask])

    def test_strides_and_empty(self, target, generator):
        x = torch.randn(4, 30, generator=generator)[:, 3:20]
        ids, wanted = torch.arange(4), torch.tensor([5, 5, 5, 5])
        got = choose(x, None, None, ids, 0.3, target)  # of 17
        assert torch.equal(got, by_sorting(x, torch.ones_like(x, dtype=torch.bool), ids, wanted))
        none = torch.zeros(0, dtype=torch.int64)
        assert choose(torch.zeros(0, 3), None, None, none, 0.5, target).shape == (0, 3)
        assert choose(torch.zeros(2, 0), None, None, ids[:2], 0.5, target).shape == (2, 0)
        cu = torch.tensor([0, 0, 3, 3])
        got = choose(torch.tensor([1.0, 3.0, 2.0]), None, cu, torch.zeros(3).long(), 0.5, target)
        assert got.tolist() == [False, True, True]

    def test_long_rows(self, target, generator):
        """Several parts per row, with ties across parts."""
        n = 700 if target.interpreted else 200_000
        x = torch.randint(0, 50, (1, n), generator=generator).float()
        got = choose(x, None, None, None, 1 / 3, target, nearest=False)[0]
        order = x[0].argsort(descending=True, stable=True)[: n // 3]
        assert torch.equal(got.nonzero()[:, 0], order.sort().values)

    @pytest.mark.parametrize("packed", [False, True])
    def test_inside_a_band(self, target, generator, packed):
        """The share is of all valid tokens, and no more than there are in the band, whose ends are outside."""
        x, mask = torch.randn(5, 37, generator=generator), random_mask(5, 37, generator)
        band = (torch.rand(5, 37, generator=generator) * 4).round()
        band[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        inside = mask & (band == 2)
        ids = torch.tensor([1, 0, 1, 3, 3])
        for scopes, fraction in ((ids, 0.1), (ids, 0.9), (None, 0.13)):
            place = torch.zeros(5).long() if scopes is None else scopes
            share = share_of(fraction, selection.scope_counts(mask.sum(1), place), False)
            wanted = torch.minimum(share, selection.scope_counts(inside.sum(1), place))
            want = by_sorting(x, inside, place, wanted)
            cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)) if packed else None
            inputs = (x[mask], None, cu) if packed else (x, mask, None)
            within = {"band": (band[mask] if packed else band).to(target.device), "low": 1.0, "high": 3.0}
            got = choose(*inputs, scopes, fraction, target, nearest=False, **within)
            assert torch.equal(got, want[mask] if packed else want)

    @given(seed=st.integers(0, 10**6), batch=st.integers(1, 9), width=st.integers(1, 40))
    def test_property_backends_agree(self, seed, batch, width):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, width, generator=generator).mul(3).round()
        mask = random_mask(batch, width, generator)
        ids = torch.randint(0, batch, (batch,), generator=generator)
        fraction = float(torch.rand((), generator=generator))
        wanted = share_of(fraction, selection.scope_counts(mask.sum(1), ids), True)
        got = []
        for backend in ("reference", "cpp"):
            with dispatch.use_backend(backend):
                got.append(selection.largest(x, Layout(batch, (batch, width), mask, None), ids, fraction))
        assert torch.equal(*got)
        assert torch.equal(selection.scope_counts(got[0].sum(1), ids), wanted)

    def test_more_tokens_than_a_float_counts(self):
        """Beyond 2^24 tokens, where torch.quantile stops; one row, shared by several threads."""
        n = (1 << 24) + 4099
        x = torch.zeros(1, n)
        x[0, 5::2] = 1.0
        high = int(x.sum())
        with dispatch.use_backend("cpp"):
            got = selection.largest(x, Layout(1, (1, n), None, None), None, (high + 7) / n)
        assert int(got.sum()) == high + 7
        assert got[0, 5::2].all()
        assert got[0, :11].tolist() == [True] * 10 + [False]  # 0 to 4, 6 and 8: the earliest of the ties


# ---- masks of tokens -----------------------------------------------------------------------------------------


def chosen_by_sort(values, valid, count):
    """The flat indices of the ``count`` largest elements; ties go to the earliest."""
    flat = torch.where(valid, values.double(), -torch.inf).flatten()
    order = flat.argsort(descending=True, stable=True)
    out = torch.zeros(flat.shape, dtype=torch.bool)
    out[order[:count]] = True
    return out.view(values.shape)


class Test_high_entropy_mask:
    @pytest.mark.parametrize("scope", ["batch", "row", "group"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("fraction", [0.0, 0.2, 0.55, 1.0])
    def test_high_entropy_mask(self, generator, scope, dtype, fraction):
        entropy = (torch.rand(9, 31, generator=generator) * 3).round(decimals=1).to(dtype)  # many ties
        mask = random_mask(9, 31, generator)
        groups = torch.tensor([7, -1, 7, 7, 2**40, -1, 7, 2**40, -1]) if scope == "group" else None
        got = rewardops.high_entropy_mask(
            entropy.masked_fill(~mask, torch.nan), mask, fraction=fraction, scope=scope, groups=groups
        )
        parts = {"batch": [torch.arange(9)], "row": list(torch.arange(9)[:, None])}.get(scope)
        if parts is None:
            parts = [(groups == g).nonzero()[:, 0] for g in groups.unique()]
        for rows in parts:
            n = int(mask[rows].sum())
            count = min(max(int(n * fraction + 0.5), 1), n)
            assert torch.equal(got[rows], chosen_by_sort(entropy[rows], mask[rows], count))
        lengths = torch.full((9,), 31)
        packed = rewardops.high_entropy_mask(
            pack(entropy, lengths)[0], pack(mask, lengths)[0], fraction=fraction, scope=scope, groups=groups,
            cu_seqlens=pack(mask, lengths)[1],
        )  # fmt: skip
        assert torch.equal(packed, pack(got, lengths)[0])

    def test_high_entropy_mask_by_hand(self):
        h = torch.tensor([[0.1, 0.9, 0.3, 0.2, 2.0]])
        assert rewardops.high_entropy_mask(h).tolist() == [[False, False, False, False, True]]
        assert not rewardops.high_entropy_mask(h, torch.zeros(1, 5)).any()
        assert rewardops.high_entropy_mask(torch.ones(0, 3)).shape == (0, 3)
        odd = torch.tensor([[-torch.inf, 0.0, -0.0, torch.inf, -1.0]])
        assert rewardops.high_entropy_mask(odd, fraction=0.4).tolist() == [[False, True, False, True, False]]
        with pytest.raises(ValueError, match=r"fraction: got 1\.2, want a number from 0 to 1"):
            rewardops.high_entropy_mask(h, fraction=1.2)
        with pytest.raises(ValueError, match="group_size: got a value with scope='row'"):
            rewardops.high_entropy_mask(h, scope="row", group_size=1)


class Test_advantage_logprob_cov_kl_cov_mask_clip_cov_mask:
    def test_covariance_and_its_masks(self, generator):
        a, lp = torch.tensor([[1.0, 1, -1, -1]]), torch.tensor([[-0.1, -2, -0.5, -1]])
        torch.testing.assert_close(
            rewardops.advantage_logprob_cov(a, lp), torch.tensor([[0.8, -1.1, -0.4, 0.1]])
        )
        mask = random_mask(6, 40, generator)
        a, lp = torch.randn(2, 6, 40, generator=generator)
        cov = rewardops.advantage_logprob_cov(a.masked_fill(~mask, torch.nan), lp, mask)
        want = (a[mask] - a[mask].mean()) * (lp[mask] - lp[mask].mean())
        torch.testing.assert_close(cov[mask], want, rtol=1e-5, atol=1e-6)
        assert not cov[~mask].any()

        top = rewardops.kl_cov_mask(cov, mask, fraction=0.05)
        assert torch.equal(top, chosen_by_sort(cov, mask, max(int(0.05 * int(mask.sum())), 1)))
        band = dict(low=0.1, high=0.8, fraction=0.03)
        drawn = rewardops.clip_cov_mask(cov, mask, generator=torch.Generator().manual_seed(1), **band)
        inside = mask & (cov > 0.1) & (cov < 0.8)
        assert not (drawn & ~inside).any()
        assert int(drawn.sum()) == min(max(int(0.03 * int(mask.sum())), 1), int(inside.sum()))
        again = rewardops.clip_cov_mask(cov, mask, generator=torch.Generator().manual_seed(1), **band)
        other = rewardops.clip_cov_mask(cov, mask, generator=torch.Generator().manual_seed(2), **band)
        assert torch.equal(drawn, again)
        assert not torch.equal(drawn, other)
        assert not rewardops.clip_cov_mask(cov, mask, low=90.0, high=99.0).any()

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
    def test_defaults_of_torch_do_not_reach_the_kernels(self, target, generator, default):
        """Exact numbers, and the same draws, whatever dtype and device new tensors would have."""
        batch, width = (3, 70) if target.interpreted else (6, 500)
        cov = torch.rand(batch, width, generator=generator).to(target.device)
        groups = torch.arange(batch).div(2, rounding_mode="floor").to(target.device)

        def masks():
            draw = torch.Generator(target.device).manual_seed(3)
            return (
                rewardops.clip_cov_mask(cov, low=0.25, high=0.75, fraction=0.2, generator=draw),
                rewardops.kl_cov_mask(cov, fraction=0.1),
                rewardops.high_entropy_mask(cov, fraction=0.3),
                rewardops.high_entropy_mask(cov, fraction=0.3, scope="row"),
                rewardops.high_entropy_mask(cov, fraction=0.3, scope="group", groups=groups),
                rewardops.high_entropy_mask(cov, fraction=0.3, scope="group", group_size=1),
            )

        want = masks()
        count = batch * width
        numbers = [int(0.2 * count), int(0.1 * count), round(0.3 * count)]
        assert [int(x.sum()) for x in want[:3]] == numbers
        try:
            if default == "meta":
                torch.set_default_device("meta")
            else:
                torch.set_default_dtype(default)
            got = masks()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_every_token_is_as_likely(self, generator):
        """Draws of half of the tokens, under a default dtype of half the size: both halves of the row have half."""
        cov, half, chosen = torch.full((1, 2000), 2.0), 0, 0
        try:
            torch.set_default_dtype(torch.bfloat16)
            for _ in range(20):
                got = rewardops.clip_cov_mask(cov, fraction=0.5, generator=generator)[0]
                half, chosen = half + int(got[1000:].sum()), chosen + int(got.sum())
        finally:
            torch.set_default_dtype(torch.float32)
        assert chosen == 20 * 1000
        assert abs(half / chosen - 0.5) < 0.02
