"""Adapters: rows and groups in the conventions of frameworks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rewardops
from rewardops.integrations import adapters


def test_lists_of_rows_there_and_back():
    rows = [torch.tensor([1.0, 2.0], requires_grad=True), torch.zeros(0), torch.tensor([3.0])]
    packed = adapters.pack(rows)
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 3]
    got = rewardops.discounted_returns(packed.values, cu_seqlens=packed.cu_seqlens)
    back = adapters.unpack(got, [2, 0, 1])
    assert [x.tolist() for x in back] == [[3.0, 2.0], [], [3.0]]
    back[0].sum().backward()
    assert rows[0].grad.tolist() == [1.0, 2.0]


def test_a_step_on_a_list_of_samples():
    """Rewards per sample and masks with holes, as in slime; advantages return as a list of rows."""
    masks = [torch.tensor([1, 0, 1]), torch.tensor([1]), torch.tensor([0, 1])]
    lengths = [len(m) for m in masks]
    packed = adapters.pack(masks)
    got = rewardops.group_advantages(
        torch.tensor([1.0, 0.0, 1.0]), group_size=[2, 1], scale="none", mask=packed.values,
        cu_seqlens=packed.cu_seqlens,
    )  # fmt: skip
    assert [x.tolist() for x in adapters.unpack(got, lengths)] == [[0.5, 0.0, 0.5], [-0.5], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: got none"),
        (torch.ones(2), "rows: got Tensor"),
        ([torch.ones(2), [1.0]], "rows: got list"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], r"rows: got torch.int64\[2\]"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"rows: got torch.float32\[2, 4\]"),
        ([torch.ones(())], "rows: got"),
    ],
)
def test_rows_that_do_not_pack(rows, message):
    with pytest.raises((TypeError, ValueError), match=message):
        adapters.pack(rows)
    with pytest.raises(ValueError, match="lengths: got a sum of 3"):
        adapters.unpack(torch.ones(2), [1, 2])
    with pytest.raises(ValueError, match="lengths: got -1, want a whole number of at least 0"):
        adapters.unpack(torch.ones(2), [3, -1])


def test_nested_tensors_of_jagged_layout():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    packed = adapters.from_nested(nested)
    assert packed.mask is None
    got = rewardops.discounted_returns(packed.values, cu_seqlens=packed.cu_seqlens, gamma=0.5)
    out = adapters.to_nested(got, nested)
    assert [x.tolist() for x in out.unbind()] == [[2.0, 2.0], [3.0], [8.0, 8.0, 6.0]]
    got.sum().backward()
    assert nested.grad.values().tolist() == [1.0, 1.5, 1.0, 1.0, 1.5, 1.75]


def test_nested_tensors_with_values_between_their_rows():
    padded = torch.arange(12.0).view(3, 4)
    nested = torch.nested.narrow(
        padded, 1, torch.tensor([1, 0, 2]), torch.tensor([2, 3, 0]), layout=torch.jagged
    )
    packed = adapters.from_nested(nested)
    assert packed.mask is not None
    inside = packed.values[packed.mask]
    assert inside.tolist() == torch.cat(list(nested.unbind())).tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]
    got = rewardops.discounted_returns(packed.values, mask=packed.mask, cu_seqlens=packed.cu_seqlens)
    assert [x.tolist() for x in adapters.to_nested(got, nested).unbind()] == [
        [3.0, 2.0],
        [15.0, 11.0, 6.0],
        [],
    ]


def test_what_is_no_jagged_tensor():
    strided = torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.strided)
    for wrong in (torch.ones(2, 3), strided):
        with pytest.raises(ValueError, match="rows: got layout"):
            adapters.from_nested(wrong)
    nested = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"values: got shape \[3\], want \[2"):
        adapters.to_nested(torch.ones(3), nested)


# ---- groups ------------------------------------------------------------------------------------------------


def test_group_sizes_as_a_tensor():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0])
    want = rewardops.group_advantages(rewards, group_size=[3, 0, 2])
    assert torch.equal(rewardops.group_advantages(rewards, group_size=torch.tensor([3, 0, 2])), want)
    with pytest.raises(
        ValueError, match=r"group_size: got sizes \[3, 1\], want sizes that sum to the 5 rows"
    ):
        rewardops.group_advantages(rewards, group_size=torch.tensor([3, 1]))
    with pytest.raises(TypeError, match="group_size: got dtype"):
        rewardops.group_advantages(rewards, group_size=torch.tensor([3.0, 2.0]))


prompts = st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=9)


@given(prompts, st.booleans())
def test_rows_with_the_same_prompt_are_a_group(rows, left):
    """Padded on either side, in any order, some of them prefixes of others, some empty; and packed."""
    want = torch.tensor([rows.index(row) for row in rows], dtype=torch.int64)
    width = 5
    tokens = torch.full((len(rows), width), 7)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for k, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(len(row))
        tokens[k, at], mask[k, at] = torch.tensor(row, dtype=torch.int64), True
    assert torch.equal(adapters.prompt_groups(tokens, mask=mask), want)
    cu = adapters.offsets([len(row) for row in rows])
    assert torch.equal(adapters.prompt_groups(tokens[mask], cu_seqlens=cu), want)
    tokens[~mask] = 1  # compared if there is no mask
    whole = tokens.tolist()
    assert adapters.prompt_groups(tokens).tolist() == [whole.index(row) for row in whole]


# ---- numbers per row ---------------------------------------------------------------------------------------


def test_a_temperature_for_each_row_of_packed_logits():
    cu = torch.tensor([0, 2, 2, 5])
    logits, tokens = torch.randn(5, 7), torch.randint(0, 7, (5,))
    got = adapters.to_tokens([0.5, 9.0, 2.0], cu, 5)
    assert got.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    stats = rewardops.token_stats(logits, tokens, temperature=got)
    want = (logits / got[:, None]).log_softmax(-1)[torch.arange(5), tokens]
    torch.testing.assert_close(stats.logprob, want)
    assert torch.equal(adapters.to_tokens(torch.tensor([1, 2, 3]), cu, 5), torch.tensor([1, 1, 3, 3, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], torch.tensor([0, 2, 5]), 5), "values: got 1, want 2"),
        (([1.0, 2.0], torch.tensor([0, 2, 5]), 6), "cu_seqlens: got last entry 5, want 6"),
        (([1.0, 2.0], torch.tensor([0, 2, 5]), -1), "num_tokens: got -1"),
        (([1.0, 2.0], [0, 2, 5], 5), "cu_seqlens: got list"),
    ],
)
def test_numbers_that_do_not_fit(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        adapters.to_tokens(*arguments)


# ---- devices -----------------------------------------------------------------------------------------------


def test_nothing_is_read_back():
    """A fake tensor has no values: reading one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = [torch.ones(3), torch.ones(0), torch.ones(2)]
        packed = adapters.pack(rows)
        got = adapters.to_tokens(torch.ones(3), packed.cu_seqlens, 5)
        assert [x.shape for x in adapters.unpack(got, [3, 0, 2])] == [(3,), (0,), (2,)]
        assert adapters.to_tokens([1.0, 2.0, 3.0], packed.cu_seqlens, 5).shape == (5,)
        prompts = torch.zeros(4, 6, dtype=torch.int64)
        assert adapters.prompt_groups(prompts, mask=prompts == 0).shape == (4,)
        sizes = torch.tensor([3, 1])
        assert rewardops.group_advantages(torch.ones(4), group_size=sizes).shape == (4,)
        with pytest.raises(DataDependentOutputException):
            sizes.tolist()
