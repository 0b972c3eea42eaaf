"""The strategies of `rewardops.testing`: draws match their descriptions and are awkward enough."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from rewardops.core import checks
from rewardops.testing import strategies as some


def test_hypothesis_is_needed_by_name_alone():
    code = "import sys, rewardops.testing; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(some.rows(), st.data())
def test_rows_are_a_layout(rows, data):
    values = rows.take(torch.rand(rows.batch, rows.width))
    assert tuple(values.shape) == rows.shape
    mask = None if rows.mask is None else data.draw(some.mask_forms(rows.mask))
    got = checks.token_layout("values", values, mask, rows.cu_seqlens)
    assert got.batch == rows.batch
    assert torch.equal(got.valid(values.device), rows.valid)
    counted = got.expand(torch.arange(rows.batch))[rows.valid]
    assert rows.live.tolist() == [b in counted.tolist() for b in range(rows.batch)]


@pytest.mark.parametrize(
    "odd",
    [
        lambda rows: rows.batch == 0 and rows.cu_seqlens is not None,
        lambda rows: rows.batch > 1 and rows.shape == (0,),
        lambda rows: 0 in rows.lengths and rows.lengths.sum() > 0,
        lambda rows: rows.mask is not None and rows.mask.any() and not rows.live.all(),
        lambda rows: rows.cu_seqlens is None and rows.width == 0 and rows.batch > 0,
    ],
    ids=["no rows", "no tokens", "an empty row", "a row that is masked", "no width"],
)
def test_rows_are_odd_at_times(odd):
    find(some.rows(), odd, settings=settings(max_examples=2000, derandomize=True, database=None))


@given(some.rows(), st.data())
def test_steps_never_fall(rows, data):
    steps = data.draw(some.steps(rows))
    assert tuple(steps.shape) == rows.shape
    if steps.dtype is not torch.bool:
        got = checks.token_layout("steps", steps.float(), rows.mask, rows.cu_seqlens)
        checks.check_step_ids(steps.long(), got, "steps")


@given(some.rows(), st.data())
def test_what_rows_hold(rows, data):
    labels = data.draw(some.groups(rows.batch))
    assert labels.shape == (rows.batch,)
    tokens = data.draw(some.tokens(rows, labels))
    assert tuple(tokens.shape) == rows.shape
    assert not tokens.is_floating_point()
    dtype, channels = data.draw(some.dtypes()), data.draw(st.none() | st.integers(0, 2))
    rewards = data.draw(some.rewards(rows.batch, channels=channels, dtype=dtype))
    assert rewards.dtype is dtype
    assert rewards.shape == ((rows.batch,) if channels is None else (rows.batch, channels))
    assert rewards.isfinite().all()


@given(st.integers(0, 3), st.integers(1, 40), some.dtypes(), st.data())
def test_logits_have_mass_and_no_nan(count, vocab, dtype, data):
    logits = data.draw(some.logits((count, 2), vocab, dtype=dtype))
    assert logits.shape == (count, 2, vocab)
    assert logits.dtype is dtype
    assert not logits.isnan().any()
    assert logits.amax(-1).isfinite().all()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kinds: got 'large', want one of"):
        find(some.numbers((3,), ("large",)), lambda x: True)
