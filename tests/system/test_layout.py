"""Errors of invalid arguments name the argument, its value and the valid values, before any kernel runs."""

from __future__ import annotations

import re

import pytest
import torch

import rewardops as R
from rewardops.core import dispatch, settings
from rewardops.core.rows import Layout
from rewardops.core.settings import debugging

T = torch.tensor
F = torch.zeros


def meta(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="meta")


CASES = {
    # ---- token_stats
    "logits type": (lambda: R.token_stats([1.0], T([0])), TypeError, "logits: got list"),
    "logits dtype": (lambda: R.token_stats(F(2, 3).long(), F(2).long()), TypeError, "logits: got dtype torch.int64"),
    "logits rank": (lambda: R.token_stats(F(3), F(3).long()), ValueError, "logits: got shape [3], want [N, V]"),
    "no vocabulary": (lambda: R.token_stats(F(2, 0), F(2).long()), ValueError, "vocabulary of at least 1"),
    "tokens shape": (lambda: R.token_stats(F(2, 3), F(4).long()), ValueError, "tokens: got shape [4], want [2]"),
    "tokens dtype": (lambda: R.token_stats(F(2, 3), F(2)), TypeError, "tokens: got dtype torch.float32"),
    "tokens device": (lambda: R.token_stats(F(2, 3), meta(2, dtype=torch.int64)), ValueError, "tokens: got device meta, want cpu"),
    "stats mask shape": (lambda: R.token_stats(F(2, 3), F(2).long(), mask=F(2, 3)), ValueError, "mask: got shape [2, 3], want [2]"),
    "mask dtype": (lambda: R.token_stats(F(2, 3), F(2).long(), mask=F(2).cfloat()), TypeError, "mask: got dtype torch.complex64"),
    "temperature zero": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=0.0), ValueError, "temperature: got 0.0"),
    "temperature nan": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=float("nan")), ValueError, "temperature: got nan"),
    "temperature type": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature="1"), TypeError, "temperature: got str"),
    "unknown output": (lambda: R.token_stats(F(2, 3), F(2).long(), outputs=("kl2",)), ValueError, "outputs: got 'kl2', want one of 'logprob', 'entropy', 'logsumexp', 'sum_p2'"),
    "temperature tensor shape": (lambda: R.token_stats(F(2, 4, 3), F(2, 4).long(), temperature=F(4) + 1), ValueError, "temperature: got shape [4], want a scalar or [2] or [2, 4] (one per row or per token)"),
    "temperature tensor rank": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=F(2, 2) + 1), ValueError, "temperature: got shape [2, 2], want a scalar or [2]"),
    "temperature tensor zero": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=T([1.0, 0.0])), ValueError, "temperature: got a value that is not above 0"),
    "temperature tensor dtype": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=T([1, 1])), TypeError, "temperature: got dtype torch.int64"),
    "temperature tensor device": (lambda: R.token_stats(F(2, 3), F(2).long(), temperature=meta(2)), ValueError, "temperature: got device meta"),
    "softcap": (lambda: R.token_stats(F(2, 3), F(2).long(), softcap=0.0), ValueError, "softcap: got 0.0"),
    "vocab_size": (lambda: R.token_stats(F(2, 3), F(2).long(), vocab_size=4), ValueError, "vocab_size: got 4, want 1 to 3"),
    "vocab_size zero": (lambda: R.token_stats(F(2, 3), F(2).long(), vocab_size=0), ValueError, "vocab_size: got 0"),
    "vocab_size type": (lambda: R.token_stats(F(2, 3), F(2).long(), vocab_size=2.0), TypeError, "vocab_size: got float"),
    "ref shape": (lambda: R.token_stats(F(2, 3), F(2).long(), ref_logits=F(2, 4), outputs=["kl"]), ValueError, "ref_logits: got shape [2, 4], want [2, 3]"),
    "ref dtype": (lambda: R.token_stats(F(2, 3), F(2).long(), ref_logits=F(2, 3).long()), TypeError, "ref_logits: got dtype torch.int64"),
    "ref device": (lambda: R.token_stats(F(2, 3), F(2).long(), ref_logits=meta(2, 3)), ValueError, "ref_logits: got device meta"),
    "no ref": (lambda: R.token_stats(F(2, 3), F(2).long(), outputs=["kl"]), ValueError, "outputs: got 'kl' without ref_logits"),
    "beta": (lambda: R.token_stats(F(2, 3), F(2).long(), ref_logits=F(2, 3), outputs=["jsd"], beta=1.0), ValueError, "beta: got 1.0, want a number above 0 and below 1"),
    "partial jsd": (lambda: R.token_stats_partial(F(2, 3), F(2).long(), ref_logits=F(2, 3), outputs=["jsd"]), ValueError, "outputs: got 'jsd', want one of"),
    "partial start": (lambda: R.token_stats_partial(F(2, 3), F(2).long(), vocab_start=-1), ValueError, "vocab_start: got -1"),
    "partial start type": (lambda: R.token_stats_partial(F(2, 3), F(2).long(), vocab_start=1.0), TypeError, "vocab_start: got float"),
    "partial vocab type": (lambda: R.token_stats_partial(F(2, 3), F(2).long(), vocab_size="3"), TypeError, "vocab_size: got str"),
    "merge dtype": (lambda: R.merge_token_stats(F(1, 2, 13)), TypeError, "records: got dtype torch.float32, want float64"),
    "merge shape": (lambda: R.merge_token_stats(F(1, 2, 12).double()), ValueError, "records: got shape [1, 2, 12], want [parts, ..., 14]"),
    "merge nothing": (lambda: R.merge_token_stats(F(0, 2, 13).double()), ValueError, "records: got shape [0, 2, 13]"),
    "outputs a string": (lambda: R.token_stats(F(2, 3), F(2).long(), outputs="logprob"), ValueError, "outputs: got 'logprob'"),
    # ---- token_stats_and_grad
    "known logits": (lambda: R.token_stats_and_grad(F(3), F(3).long(), {"logprob": F(3)}), ValueError, "logits: got shape [3], want [N, V]"),
    "known tokens": (lambda: R.token_stats_and_grad(F(2, 3), F(3).long(), {"logprob": F(2)}), ValueError, "tokens: got shape [3], want [2]"),
    "no coefficients": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {}), ValueError, "coefficients: got none, want a mapping"),
    "coefficients type": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), F(2)), ValueError, "coefficients: got none, want a mapping"),
    "coefficients name": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"is_top1": F(2)}), ValueError, "coefficients: got 'is_top1', want one of 'logprob', 'entropy'"),
    "coefficients shape": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"logprob": F(3)}), ValueError, "coefficients['logprob']: got shape [3], want [2] (one per token)"),
    "coefficients dtype": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"entropy": F(2).long()}), TypeError, "coefficients['entropy']: got dtype torch.int64"),
    "coefficients device": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"entropy": meta(2)}), ValueError, "coefficients['entropy']: got device meta, want cpu (that of logits)"),
    "known output": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"logprob": F(2)}, outputs=["p"]), ValueError, "outputs: got 'p', want one of"),
    "known without a reference": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"kl": F(2)}), ValueError, "outputs: got 'kl' without ref_logits"),
    "known mask": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"logprob": F(2)}, mask=F(3)), ValueError, "mask: got shape [3], want [2]"),
    "known vocab_size": (lambda: R.token_stats_and_grad(F(2, 3), F(2).long(), {"logprob": F(2)}, vocab_size=4), ValueError, "vocab_size: got 4, want 1 to 3"),
    # ---- token_kl
    "kl shape": (lambda: R.token_kl(F(2, 3), F(3, 2)), ValueError, "ref_logprob: got shape [3, 2], want [2, 3]"),
    "kl dtype": (lambda: R.token_kl(F(2), F(2).long()), TypeError, "ref_logprob: got dtype torch.int64"),
    "kl estimator": (lambda: R.token_kl(F(2), F(2), estimator="k4"), ValueError, "estimator: got 'k4', want one of 'k1', 'abs', 'k2', 'k3'"),
    "kl mask": (lambda: R.token_kl(F(2), F(2), mask=F(3).bool()), ValueError, "mask: got shape [3], want [2]"),
    "kl device": (lambda: R.token_kl(F(2), meta(2)), ValueError, "ref_logprob: got device meta"),
    # ---- group_advantages
    "rewards rank": (lambda: R.group_advantages(F(2, 3, 1), group_size=1), ValueError, "rewards: got shape [2, 3, 1], want [B]"),
    "rewards dtype": (lambda: R.group_advantages(F(2).int(), group_size=1), TypeError, "rewards: got dtype torch.int32"),
    "no groups": (lambda: R.group_advantages(F(4)), ValueError, "groups: got None"),
    "both groups": (lambda: R.group_advantages(F(4), F(4).long(), group_size=2), ValueError, "group_size: got a value beside groups"),
    "groups length": (lambda: R.group_advantages(F(4), F(3).long()), ValueError, "groups: got shape [3], want [4]"),
    "groups dtype": (lambda: R.group_advantages(F(4), F(4)), TypeError, "groups: got dtype torch.float32"),
    "group size": (lambda: R.group_advantages(F(4), group_size=3), ValueError, "group_size: got 3, want a divisor of the 4 rows"),
    "group size zero": (lambda: R.group_advantages(F(4), group_size=0), ValueError, "group_size: got 0"),
    "group size type": (lambda: R.group_advantages(F(4), group_size=2.0), TypeError, "group_size: got float"),
    "baseline": (lambda: R.group_advantages(F(4), group_size=2, baseline="media"), ValueError, "baseline: got 'media'"),
    "scale": (lambda: R.group_advantages(F(4), group_size=2, scale="var"), ValueError, "scale: got 'var'"),
    "eps": (lambda: R.group_advantages(F(4), group_size=2, eps=-1.0), ValueError, "eps: got -1.0"),
    "ddof": (lambda: R.group_advantages(F(4), group_size=2, ddof=2), ValueError, "ddof: got 2, want 0 or 1"),
    "row mask": (lambda: R.group_advantages(F(4), group_size=2, mask=F(3, 5)), ValueError, "mask: got shape [3, 5], want [4, T]"),
    "row cu": (lambda: R.group_advantages(F(4), group_size=2, cu_seqlens=T([0, 3])), ValueError, "cu_seqlens: got shape [2], want [5]"),
    "packed mask rank": (lambda: R.group_advantages(F(1), group_size=1, cu_seqlens=T([0, 3]), mask=F(1, 3)), ValueError, "mask: got shape [1, 3], want [N]"),
    "num_tokens alone": (lambda: R.group_advantages(F(1), group_size=1, num_tokens=3), ValueError, "num_tokens: got 3 without cu_seqlens"),
    "num_tokens wrong": (lambda: R.group_advantages(F(1), group_size=1, cu_seqlens=T([0, 3]), num_tokens=4), ValueError, "cu_seqlens: got last entry 3, want 4"),
    # ---- per-token ops and layouts
    "decreasing cu": (lambda: R.min_returns(F(5), cu_seqlens=T([0, 4, 2, 5])), ValueError, "cu_seqlens: got 4 then 2 at row 1"),
    "cu start": (lambda: R.min_returns(F(5), cu_seqlens=T([1, 5])), ValueError, "cu_seqlens: got first entry 1, want 0"),
    "cu end": (lambda: R.min_returns(F(5), cu_seqlens=T([0, 4])), ValueError, "cu_seqlens: got last entry 4, want 5"),
    "cu dtype": (lambda: R.min_returns(F(5), cu_seqlens=T([0.0, 5.0])), TypeError, "cu_seqlens: got dtype torch.float32"),
    "cu rank": (lambda: R.min_returns(F(5), cu_seqlens=T([[0, 5]])), ValueError, "cu_seqlens: got shape [1, 2], want [B + 1]"),
    "cu type": (lambda: R.min_returns(F(5), cu_seqlens=[0, 5]), TypeError, "cu_seqlens: got list"),
    "padded rank": (lambda: R.min_returns(F(5)), ValueError, "rewards: got shape [5], want [B, T] (or [N] together with cu_seqlens)"),
    "packed rank": (lambda: R.min_returns(F(5, 1), cu_seqlens=T([0, 5])), ValueError, "rewards: got shape [5, 1], want [N]"),
    "mask of another shape": (lambda: R.min_returns(F(2, 5), mask=F(2, 4)), ValueError, "mask: got shape [2, 4], want [2, 5]"),
    "steps shape": (lambda: R.min_returns(F(2, 5), steps=F(2, 4).bool()), ValueError, "steps: got shape [2, 4], want [2, 5]"),
    "steps dtype": (lambda: R.min_returns(F(2, 5), steps=F(2, 5)), TypeError, "steps: got dtype torch.float32"),
    "softmin temperature": (lambda: R.softmin_rewards(F(2, 5), temperature=-1.0), ValueError, "temperature: got -1.0"),
    "gtpo rows": (lambda: R.gtpo_rewards(F(3), F(2, 5), F(2).long()), ValueError, "rewards: got shape [3], want [2]"),
    "gtpo entropy": (lambda: R.gtpo_rewards(F(2), F(2, 5).long(), F(2).long()), TypeError, "entropy: got dtype torch.int64"),
    "gtpo floor": (lambda: R.gtpo_rewards(F(2), F(2, 5), F(2).long(), entropy_floor=0.0), ValueError, "entropy_floor: got 0.0"),
    "prefix tokens": (lambda: R.prefix_values(F(2, 5), F(2), F(2).long()), TypeError, "tokens: got dtype torch.float32"),
    "prefix rows": (lambda: R.prefix_values(F(2, 5).long(), F(3), F(2).long()), ValueError, "rewards: got shape [3], want [2]"),
    "prefix device": (lambda: R.prefix_values(F(2, 5).long(), meta(2), F(2).long()), ValueError, "rewards: got device meta"),
    "prefix rank": (lambda: R.prefix_values(F(2, 5).long(), F(2, 1, 1), F(2).long()), ValueError, "rewards: got shape [2, 1, 1], want [B] or [B, R]"),
    "prefix weights": (lambda: R.prefix_values(F(2, 5).long(), F(2), F(2).long(), weights=F(3)), ValueError, "weights: got shape [3], want [2]"),
    "prefix weight": (lambda: R.prefix_std(F(2, 5).long(), F(2), F(2).long(), weights=F(2) - 1), ValueError, "weights: got -1.0, want no negative"),
    "prefix count": (lambda: R.tvm_targets(F(2, 5).long(), F(2), F(2).long(), min_count=0), ValueError, "min_count: got 0"),
    "prefix gamma": (lambda: R.prefix_values(F(2, 5).long(), F(2), F(2).long(), gamma=1.5), ValueError, "gamma: got 1.5"),
    "prefix hole": (lambda: R.shared_prefix_weights(F(2, 5).long(), F(2).long(), masked="no"), ValueError, "masked: got 'no'"),
    "prefix ddof": (lambda: R.prefix_std(F(2, 5).long(), F(2), F(2).long(), ddof=2), ValueError, "ddof: got 2"),
    "siblings rows": (lambda: R.sibling_advantages(F(2, 5).long(), F(3), F(2).long()), ValueError, "rewards: got shape [3], want [2]"),
    "tree form": (lambda: R.tree_rl_advantages(F(2, 5).long(), F(2), F(2).long(), form="code"), ValueError, "form: got 'code'"),
    "td scale": (lambda: R.tempo_advantages(F(2, 5).long(), F(2), F(2).long(), td_scale="std"), ValueError, "td_scale: got 'std'"),
    "lcp tokens": (lambda: R.prefix_lcp(F(2, 5), F(2).long()), TypeError, "tokens: got dtype torch.float32"),
    "lcp size": (lambda: R.prefix_lcp(meta(2, 5).long(), meta(2).long()), ValueError, "max_group_size: got None"),
    "tempo scale": (lambda: R.tempo_advantages(F(2, 5).long(), F(2), F(2).long(), scale="max"), ValueError, "scale: got 'max'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name, monkeypatch):
    def no_kernel(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(dispatch, "_implementation", lambda *_: no_kernel)
    call, error, message = CASES[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_num_tokens_must_be_told_where_it_cannot_be_read():
    fn = torch.compile(
        lambda r, cu: R.group_advantages(r, group_size=2, cu_seqlens=cu), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="num_tokens: got None"):
        fn(F(2), T([0, 3, 5]))
    compiled = torch.compile(
        lambda r, cu: R.group_advantages(r, group_size=2, cu_seqlens=cu, num_tokens=5),
        fullgraph=True,
        backend="eager",
    )
    assert compiled(T([0.0, 1.0]), T([0, 3, 5])).shape == (5,)


def test_bad_offsets_never_become_a_read_out_of_bounds(target):
    """Offsets whose values cannot be checked, as in a compiled graph, are clamped."""
    if target.backend == "reference":
        pytest.skip("the specification indexes, and torch checks the index")
    for offsets in ([0, 900, 5], [-7, 3, 5], [4, 1, 3], [2**31 - 1, -(2**31), 99]):
        cu = T(offsets, dtype=torch.int32, device=target.device)
        x = torch.rand(5, device=target.device)
        groups = F(2, dtype=torch.int64, device=target.device)
        torch.ops.rewardops.extreme_returns(x, None, cu, None, False)
        torch.ops.rewardops.softmin_rewards(x, None, cu, None, 0.1, True)
        torch.ops.rewardops.gtpo_rewards(x[:2], x, groups, None, cu, 1.0, 0.1, 0.0, 1e-2, False)
        tree = torch.ops.rewardops.prefix_tree((x * 3).long(), groups, None, cu, False)
        nodes = torch.ones(4, 1, dtype=torch.float64, device=target.device)
        on = (nodes, None, None, None, *tree, None, cu, False, 5, "before", 0.9)
        torch.ops.rewardops.nodes_to_tokens(*on, torch.float32)
        torch.ops.rewardops.nodes_to_tokens_backward(x[None], *on)
        options = ("mean", 0.0, "std", 1e-6, 1, False, False)
        torch.ops.rewardops.group_advantages(x[:2], groups, None, None, None, cu, 5, *options)
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def test_debug_opens_and_closes(monkeypatch):
    monkeypatch.setattr(settings, "_debug", settings.ContextSetting(False))
    with R.debug():
        assert debugging()
        with R.debug(False):
            assert not debugging()
        assert debugging()
    assert not debugging()


@pytest.mark.parametrize("debug", [False, True])
def test_step_ids_are_checked(debug):
    """On a CPU always; elsewhere the check costs a synchronisation."""
    ids, cu = T([0, 0, 1, 3, -1, 2, 2]), T([0, 3, 7])
    with R.debug(debug):
        with pytest.raises(ValueError, match="steps: got id 2 after a larger one, at token 2 of row 1"):
            R.min_returns(F(7), cu_seqlens=cu, steps=ids)
        R.min_returns(F(7), cu_seqlens=cu, steps=ids, mask=T([1, 1, 1, 0, 1, 1, 1]))
        R.min_returns(F(1, 7), steps=ids.clone().index_fill_(0, T([3]), 1)[None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rewards", lambda r, m: R.gae(r, F(2, 3), mask=m)),
        ("values", lambda v, m: R.gae(F(2, 3), v, mask=m)),
        ("rewards", lambda r, m: R.min_returns(r, mask=m)),
        ("rewards", lambda r, m: R.discounted_returns(r, mask=m)),
        ("values", lambda q, m: R.step_progress(q, mask=m)),
        ("rewards", lambda r, m: R.group_advantages(r[:, 1], group_size=2)),
        ("rewards", lambda r, m: R.prefix_values(T([[1], [2]]), r[:, 1], group_size=2)),
    ],
)
def test_debug_checks_that_numbers_are_finite(name, call, bad):
    mask = T([[1, 1, 0], [1, 1, 1]])
    behind, wrong = F(2, 3), F(2, 3)
    behind[0, 2] = bad
    wrong[1, 1] = wrong[1, 2] = bad
    with R.debug(False):
        call(wrong, mask)
    with R.debug():
        call(behind, mask)
        with pytest.raises(
            ValueError, match=rf"{name}: got {bad} at \[1.*\], want finite values wherever the mask"
        ):
            call(wrong, mask)


def test_expand_spreads_rows_over_both_layouts():
    rows = T([5.0, 6.0, 7.0])
    padded = Layout(3, (3, 2), None, None)
    assert padded.expand(rows).tolist() == [[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]
    packed = Layout(3, (4,), None, T([0, 2, 2, 4]))
    assert packed.expand(rows).tolist() == [5.0, 5.0, 7.0, 7.0]
    empty = Layout(0, (0,), None, T([0]))
    assert empty.expand(rows[:0]).shape == (0,)
