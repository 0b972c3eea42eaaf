"""Records of parts of a vocabulary, and the merged statistics of the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_logits import draw, stats

import rewardops
from rewardops.testing import check_backend

PARTIAL = rewardops.logits.PARTIAL_OUTPUTS


def merged(tokens, cuts, outputs=PARTIAL, **options):
    """token_stats merged from the parts between cuts, as a function of whole logits."""

    def fn(logits, ref_logits=None):
        edges = [0, *cuts, logits.shape[-1]]
        records = [
            rewardops.token_stats_partial(
                logits[..., a:b],
                tokens.to(logits.device),
                vocab_start=a,
                ref_logits=None if ref_logits is None else ref_logits[..., a:b],
                outputs=outputs,
                **options,
            )
            for a, b in itertools.pairwise(edges)
        ]
        dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
        return rewardops.merge_token_stats(records[::-1], outputs=outputs, dtype=dtype)

    return fn


class Test_token_stats_partial_merge_token_stats:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("cuts", [(), (1,), (700, 701, 2048), (2600,)])
    def test_parts_merge_into_the_whole(self, target, generator, dtype, cuts):
        if target.interpreted and dtype is not torch.float32 and len(cuts) < 3:
            pytest.skip("covered by the other cuts")
        logits, tokens = draw((6,), 3000, generator, dtype=dtype)
        ref, _ = draw((6,), 3000, generator, dtype=dtype)
        logits += 2  # a mean that does not cancel
        logits[0, :701] = -torch.inf  # a part without mass
        ref[1, :701] = logits[1, :701] = -torch.inf
        ref[2, 50] = -torch.inf  # an infinite divergence
        logits[3] += 1e4
        tokens %= 2700
        tokens[4] = -100
        tokens[5] = 2699  # in the last part; the columns after it are padding
        options = {"outputs": PARTIAL, "temperature": 0.8, "vocab_size": 2700}
        check_backend(
            merged(tokens, cuts, **options),
            [logits, ref],
            reference=stats(tokens, **options),
            backend=target.backend,
            device=target.device,
        )
        tokens[5] = 2700  # in no part
        got = merged(tokens, cuts, **options)(logits.to(target.device), ref.to(target.device))
        assert got.logprob.isnan().tolist() == [False] * 5 + [True]

    def test_a_shard_among_gathered_records(self, target, generator):
        """Tensor parallelism: gathered records have no gradient, the record of this rank has one."""
        logits, tokens = draw((5,), 900, generator)
        logits, tokens = logits.to(target.device), tokens.to(target.device)
        whole = logits.clone().requires_grad_()
        out = rewardops.token_stats(whole, tokens)
        (want,) = torch.autograd.grad((out.logprob * 2 + out.entropy).sum(), whole)
        edges = (0, 300, 600, 900)
        records = [
            rewardops.token_stats_partial(logits[:, a:b], tokens, vocab_start=a)
            for a, b in itertools.pairwise(edges)
        ]
        for rank in range(3):
            a, b = edges[rank], edges[rank + 1]
            shard = logits[:, a:b].clone().requires_grad_()
            gathered = list(records)
            gathered[rank] = rewardops.token_stats_partial(shard, tokens, vocab_start=a)
            out = rewardops.merge_token_stats(torch.stack(gathered))
            (grad,) = torch.autograd.grad((out.logprob * 2 + out.entropy).sum(), shard)
            torch.testing.assert_close(grad, want[:, a:b], rtol=1e-5, atol=1e-7)

    @given(cuts=st.lists(st.integers(1, 59), max_size=5, unique=True), seed=st.integers(0, 10**6))
    def test_property_parts_in_any_number_and_place(self, cuts, seed):
        generator = torch.Generator().manual_seed(seed)
        logits, tokens = draw((3,), 60, generator, scale=20.0, dtype=torch.float64)
        ref, _ = draw((3,), 60, generator, dtype=torch.float64)
        whole = stats(tokens, outputs=PARTIAL)(logits, ref)
        parts = merged(tokens, sorted(cuts))(logits, ref)
        for name in PARTIAL:
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-11)

    def test_what_a_record_was_not_asked_for_is_nan(self, target, generator):
        logits, tokens = draw((3,), 90, generator)
        record = rewardops.token_stats_partial(
            logits.to(target.device), tokens.to(target.device), outputs=("logprob",)
        )
        got = rewardops.merge_token_stats([record], outputs=("logprob", "entropy", "sum_p2", "mean_logit"))
        assert got.logprob.isfinite().all()
        assert all(x.isnan().all() for x in (got.entropy, got.sum_p2, got.mean_logit))
