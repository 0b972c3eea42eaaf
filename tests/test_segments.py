"""Reductions over rows, on every backend."""

from __future__ import annotations

import pytest
import torch

from rewardops import dispatch, layout, segments
from rewardops.testing import check_op, random_mask


def sums(mask=None, cu=None):
    def fn(x):
        to = [None if t is None else t.to(x.device) for t in (mask, cu)]
        batch = x.shape[0] if cu is None else cu.shape[0] - 1
        return segments.row_sums(x, layout.Layout(batch, tuple(x.shape), *to))

    return fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_row_sums(target, generator, dtype):
    x = torch.randn(5, 700, generator=generator, dtype=dtype)
    mask = random_mask(5, 700, generator)
    mask[2] = False
    where = {"backend": target.backend, "device": target.device}
    for m in (None, mask):
        ours = check_op(sums(m), [x], **where)
        kept = torch.ones_like(x, dtype=torch.bool) if m is None else m
        torch.testing.assert_close(ours.outputs[0].cpu(), torch.where(kept, x.double(), 0).sum(1).to(dtype))
    poisoned = check_op(sums(mask), [x.masked_fill(~mask, 0)], **where)
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    packed = check_op(sums(None, cu), [x[mask]], **where).outputs[0]
    torch.testing.assert_close(packed, poisoned.outputs[0], rtol=1e-6, atol=1e-6)


def test_masked_tokens_never_influence(target, generator):
    x = torch.randn(3, 40, generator=generator)
    mask = random_mask(3, 40, generator)
    clean = sums(mask)(x.masked_fill(~mask, 0).to(target.device))
    assert torch.equal(sums(mask)(x.masked_fill(~mask, torch.nan).to(target.device)), clean)


def test_row_counts(target, generator):
    mask = random_mask(5, 333, generator)
    mask[1] = False
    rows = layout.Layout(5, (5, 333), mask.to(target.device), None)
    with dispatch.use_backend(target.backend):
        assert torch.equal(segments.row_counts(rows, target.device).cpu(), mask.sum(1).double())
        cu = torch.tensor([0, 100, 100, 333], device=target.device)
        rows = layout.Layout(3, (333,), mask[0].to(target.device), cu)
        want = [float(mask[0, a:b].sum()) for a, b in ((0, 100), (100, 100), (100, 333))]
        assert segments.row_counts(rows, target.device).tolist() == want


def test_empty(target):
    for shape, cu in (((0, 4), None), ((3, 0), None), ((0,), torch.tensor([0, 0, 0]))):
        found = sums(None, cu)(torch.zeros(shape, device=target.device))
        assert found.tolist() == [0.0] * (shape[0] if cu is None else 2)
