"""verl: its own registries, its own results, and what of its trainers can run without a cluster."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("verl")

from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional as verl_F

import rewardops
from rewardops import advantages
from rewardops.integrations import verl as ours

GROUPS = (1, 2, 5, 3, 1, 4)
LENGTH = 19


def make_batch(seed, *, dtype=torch.float64, mask_dtype=torch.int64, dense=False, sizes=GROUPS):
    """Ragged rows with holes, groups of any size in any order, uids as verl has them.

    Rewards lie on valid tokens: where they do not, verl's estimators disagree with each other.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[torch.randperm(len(labels), generator=generator).numpy()]
    rows = len(labels)
    lengths = torch.randint(1, LENGTH + 1, (rows,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    holes = torch.rand(rows, LENGTH, generator=generator) < 0.25
    holes[torch.arange(rows), lengths - 1] = False
    mask &= ~holes
    outcome = torch.randn(rows, generator=generator, dtype=dtype)
    outcome[torch.from_numpy(labels == 2)] = 0.3  # a group of equal rewards
    rewards = torch.zeros(rows, LENGTH, dtype=dtype)
    if dense:
        rewards = torch.randn(rows, LENGTH, generator=generator, dtype=dtype) * mask
    rewards[torch.arange(rows), lengths - 1] += outcome
    return types.SimpleNamespace(
        token_level_rewards=rewards,
        response_mask=mask.to(mask_dtype),
        index=np.array([f"uid-{label}" for label in labels], dtype=object),
        labels=torch.from_numpy(labels),
        mask=mask,
        scores=rewards.sum(-1),
        responses=torch.randint(0, 3, (rows, LENGTH), generator=generator),
        entropy=torch.rand(rows, LENGTH, generator=generator, dtype=dtype) * 2,
        values=torch.randn(rows, LENGTH, generator=generator, dtype=dtype),
        steps=(torch.rand(rows, LENGTH, generator=generator) < 0.3) & mask,
        reward_baselines=torch.randn(rows, generator=generator, dtype=dtype),
    )


def call(name, given, config=None, **extras):
    """As verl calls it."""
    fn = core_algos.get_adv_estimator_fn(name)
    passed = {"token_level_rewards": given.token_level_rewards, "response_mask": given.response_mask}
    return fn(**passed, index=given.index, config=config, **extras)


def assert_same(found, expected, mask, *, rtol=1e-12, atol=1e-13):
    """At valid tokens; ours are exactly 0 elsewhere."""
    for ours_, verls in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_[mask], verls[mask], rtol=rtol, atol=atol)
        assert not ours_[~mask].any()


# ---- verl's own estimators ---------------------------------------------------------------------------------

# Every number in float64; verl divides a group of one by 1 + 1e-6, and whitening's sums by count + 1e-8.
SAME = {
    "grpo": ({}, 2e-6),
    "rloo": ({}, 1e-12),
    "opo": ({}, 1e-12),
    "gpg": ({}, 1e-12),
    "grpo_passk": ({}, 1e-12),
    "reinforce_plus_plus": ({}, 1e-7),
    "reinforce_plus_plus_baseline": ({}, 1e-7),
}


def grpo_of_verl(batch, config):
    return core_algos.compute_grpo_outcome_advantage(
        batch.token_level_rewards,
        batch.response_mask,
        batch.index,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
    )


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("norm", [True, False])
def test_same_as_verl(name, norm, mask_dtype):
    extras, rtol = SAME[name]
    for seed in range(3):
        sizes = tuple(n for n in GROUPS if n > 1) if name == "grpo_passk" else GROUPS
        batch = make_batch(seed, mask_dtype=mask_dtype, dense=seed == 2, sizes=sizes)
        config = OmegaConf.create({"norm_adv_by_std_in_grpo": norm, "gamma": 0.97, "lam": 0.9})
        found = call(f"rewardops_{name}", batch, config, **extras)
        if mask_dtype is torch.bool:  # verl subtracts masks from 1
            batch.response_mask = batch.response_mask.to(torch.int64)
        expected = grpo_of_verl(batch, config) if name == "grpo" else call(name, batch, config, **extras)
        assert_same(found, expected, batch.mask, rtol=rtol, atol=1e-9 if rtol > 1e-12 else 1e-13)


def test_grpo_in_groups_of_several_is_closer():
    batch = make_batch(5, sizes=(4, 3, 2))
    config = AlgoConfig(norm_adv_by_std_in_grpo=True)
    assert_same(call("rewardops_grpo", batch, config), grpo_of_verl(batch, config), batch.mask)


def test_dr_grpo_is_grpo_without_std():
    batch, config = make_batch(6), AlgoConfig(norm_adv_by_std_in_grpo=False)
    assert_same(call("rewardops_dr_grpo", batch, AlgoConfig()), grpo_of_verl(batch, config), batch.mask)


def test_float32_of_large_equal_rewards_is_exact():
    batch = make_batch(1, dtype=torch.float32, sizes=(3, 3))
    batch.token_level_rewards = torch.zeros_like(batch.token_level_rewards)
    batch.token_level_rewards[:, 0] = 0.1
    found, _ = call("rewardops_grpo", batch)
    assert found.dtype is torch.float32
    assert not found.any()


# ---- rewards on masked tokens ------------------------------------------------------------------------------

ESTIMATORS = sorted(name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("rewardops_"))
GDPO = {"gdpo_reward_keys": ["right", "format"], "gdpo_reward_weights": [1.0, 0.5]}


def entries(batch):
    """Whatever any estimator reads; the rewards of GDPO are those of the rows."""
    names = ("responses", "entropy", "values", "steps", "reward_baselines")
    scores = batch.token_level_rewards.sum(-1)
    return {**{name: getattr(batch, name) for name in names}, "right": scores, "format": 1 - 2 * scores}


def run_with_everything(name, batch, **settings):
    config = OmegaConf.create({"gamma": 0.9, "lam": 0.8, **GDPO, **settings})
    return call(name, batch, config, **entries(batch))


def narrowed(batch, rows):
    """Some rows of a batch."""
    kept = vars(batch).items()
    return types.SimpleNamespace(**{name: x[rows.numpy() if name == "index" else rows] for name, x in kept})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_reward_behind_the_last_action_counts_at_it(name):
    """Rows that end in a tool's output: verl's reward managers write the score to the last attended token."""
    batch = make_batch(31, dense=True)
    last = (batch.mask * torch.arange(1, LENGTH + 1)).argmax(1)
    rows = torch.arange(len(last))
    batch.steps[rows, last] = True
    expected = run_with_everything(name, batch)
    assert expected[0].any()
    behind = types.SimpleNamespace(**vars(batch))
    behind.token_level_rewards = batch.token_level_rewards.clone()
    late = torch.minimum(last + 1 + rows % 3, torch.tensor(LENGTH - 1))
    moved = behind.token_level_rewards[rows, last].clone()
    behind.token_level_rewards[rows, last] = 0
    behind.token_level_rewards[rows, late] += moved
    found = run_with_everything(name, behind)
    for ours_, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, wanted, rtol=1e-6, atol=1e-9)
    # The end of a step may be marked there as well.
    behind.steps = batch.steps.clone()
    behind.steps[rows, last] = False
    behind.steps[rows, late] = True
    if name == "rewardops_pure":
        assert torch.equal(run_with_everything(name, behind)[0], found[0])


def test_where_a_reward_on_a_masked_token_counts():
    """At the last valid token before it, or at the row's first; nowhere in a row without one."""
    nan = torch.nan
    rewards = torch.tensor([
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],  # m v m m v m
        [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],  # v v v v v v
        [1.0, 2.0, nan, 8.0, 16.0, 32.0],  # nothing
        [0.1, 0.2, 0.3, 0.0, 0.0, 0.7],  # v v v m m m
    ])  # fmt: skip
    mask = torch.tensor([[0, 1, 0, 0, 1, 0], [1] * 6, [0] * 6, [1, 1, 1, 0, 0, 0]])
    wanted = torch.tensor([
        [0, 15.0, 0, 0, 48.0, 0], [1, 2, 4, 8, 16, 32], [0] * 6, [0.1, 0.2, 0.3 + 0.7, 0, 0, 0],
    ])  # fmt: skip
    for kind in (torch.int64, torch.bool, torch.float32):
        assert torch.equal(ours._on_valid_tokens(rewards, mask.to(kind)), wanted)
    for shape in ((0, 3), (2, 0), (2, 1)):
        assert torch.equal(ours._on_valid_tokens(torch.ones(shape), torch.ones(shape)), torch.ones(shape))
    _, returns = call(
        "rewardops_reinforce_plus_plus",
        types.SimpleNamespace(token_level_rewards=rewards, response_mask=mask, index=None),
        {"gamma": 0.5},
    )
    assert returns[0].tolist() == [0, 15 + 0.5 * 48, 0, 0, 48, 0]
    assert not returns[2].any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_row_without_a_token_counts_in_no_group(name):
    """With a reward on its pads, alone in its group, or beside others: theirs are the same without it."""
    batch = make_batch(33, dense=True, sizes=(4, 3, 2, 3))
    empty = batch.labels == 3
    for label in (0, 1):
        empty[(batch.labels == label).nonzero()[0, 0]] = True
    batch.response_mask[empty] = 0
    batch.mask &= ~empty[:, None]
    batch.steps &= batch.mask
    batch.token_level_rewards[empty] = 0
    batch.token_level_rewards[empty, -1] = 10.0
    for settings in ({}, {"norm_adv_by_std_in_grpo": False}):
        found = run_with_everything(name, batch, **settings)
        wanted = run_with_everything(name, narrowed(batch, ~empty), **settings)
        for ours_, alone in zip(found, wanted, strict=True):
            assert not ours_[empty].any()
            torch.testing.assert_close(ours_[~empty], alone, rtol=1e-12, atol=1e-13)
        batch.token_level_rewards[empty, -1] = torch.nan
        again = run_with_everything(name, batch, **settings)
        for ours_, before in zip(again, found, strict=True):
            assert torch.equal(ours_, before)


def test_the_published_case_of_an_empty_response():
    batch = types.SimpleNamespace(
        token_level_rewards=torch.tensor([[0.0, 0, 10], [0, 1, 0], [0, 0, 0]]),
        response_mask=torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 1]]),
        index=np.array(["a"] * 3, dtype=object),
    )
    half = 0.5 / (0.5**0.5 + 1e-6)
    wanted = torch.tensor([[0.0, 0, 0], [half, half, 0], [-half, -half, -half]])
    torch.testing.assert_close(call("rewardops_grpo", batch, {})[0], wanted)


def test_gae_same_as_verl():
    for seed in range(3):
        batch = make_batch(seed, dense=True)
        expected = core_algos.compute_gae_advantage_return(
            batch.token_level_rewards, batch.values, batch.response_mask, 0.98, 0.9
        )
        config = AlgoConfig(gamma=0.98, lam=0.9)
        with ours.provide(values=batch.values):
            found = call("rewardops_gae", batch, config)
        assert_same(found, expected, batch.mask, rtol=1e-7, atol=1e-9)
        # The targets of the values are not whitened.
        torch.testing.assert_close(found[1][batch.mask], expected[1][batch.mask], rtol=1e-12, atol=1e-13)


def test_remax_same_as_verl():
    batch = make_batch(4, dense=True)
    extras = {"reward_baselines": batch.reward_baselines}
    found, expected = call("rewardops_remax", batch, **extras), call("remax", batch, **extras)
    assert_same(found, expected, batch.mask)


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_gdpo_same_as_verl(weights):
    batch = make_batch(7, dtype=torch.float32)
    rows = len(batch.index)
    ends = batch.mask.long().cumsum(1).argmax(1)
    generator = np.random.default_rng(0)
    rewards = {key: generator.standard_normal(rows).astype(object) for key in ("right", "format")}
    # verl looks for the last token by the attention mask, and sums what it puts there again.
    attention = torch.cat(
        [torch.ones(rows, 2, dtype=torch.bool), torch.arange(LENGTH) <= ends[:, None]], 1
    ).long()
    whole = {"prompts": torch.zeros(rows, 2), "attention_mask": attention}
    config = AlgoConfig(gdpo_reward_keys=list(rewards), gdpo_reward_weights=weights)
    extras = {"batch": whole, "non_tensor_batch": rewards}
    expected = call("gdpo", batch, config, **extras)
    found = call("rewardops_gdpo", batch, config, **extras)
    assert_same(found, expected, batch.mask, rtol=1e-5, atol=3e-6)
    with pytest.raises(ValueError, match="gdpo_reward_keys"):
        call("rewardops_gdpo", batch, AlgoConfig(), **extras)


def test_gdpo_of_rewards_that_some_rows_do_not_have():
    """None in an entry, which makes verl's whole batch NaN."""
    batch = make_batch(8, sizes=(3, 4))
    right, form = ([None if (i + k) % 4 == 0 else (i * 3 + k) % 5 / 4 for i in range(7)] for k in (0, 2))
    entries = {"right": np.array(right, dtype=object), "format": np.array(form, dtype=object)}
    config = {"gdpo_reward_keys": list(entries), "gdpo_reward_weights": [1.0, 0.5]}
    found, _ = call("rewardops_gdpo", batch, config, **entries)
    rows = torch.zeros(7, dtype=torch.float64)
    for weight, values in ((1.0, right), (0.5, form)):
        for label in (0, 1):
            have = [i for i in range(7) if batch.labels[i] == label and values[i] is not None]
            x = torch.tensor([values[i] for i in have], dtype=torch.float64)
            z = (x - x.mean()) / (x.std() + 1e-6) if len(x) > 1 else x
            for i, value in zip(have, z, strict=True):
                rows[i] += weight * value
    valid = (
        batch.mask
        & torch.tensor([r is not None or f is not None for r, f in zip(right, form, strict=True)])[:, None]
    )
    tokens = rows[:, None].expand(valid.shape)[valid]
    wanted = torch.where(valid, (rows[:, None] - tokens.mean()) / (tokens.var() + 1e-8).sqrt(), 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


# ---- what verl has not -------------------------------------------------------------------------------------


def direct(batch):
    where = {"mask": batch.mask}
    return {
        "tempo": rewardops.tempo_advantages(batch.responses, batch.scores, batch.labels, **where),
        "tree_rl": rewardops.tree_rl_advantages(batch.responses, batch.scores, batch.labels, **where),
        "tree_siblings": rewardops.sibling_advantages(batch.responses, batch.scores, batch.labels, **where),
        "gtpo": advantages.gtpo(batch.scores, batch.entropy, batch.labels, **where),
        "grpo_s": advantages.grpo_s(batch.scores, batch.entropy, batch.labels, **where),
        "pure": advantages.pure(batch.token_level_rewards, batch.steps, batch.labels, gamma=0.9, **where),
    }


@pytest.mark.parametrize(
    "name", ["tempo", "tree_rl", "tree_siblings", "gtpo", "grpo_s", "pure", "gae", "remax"]
)
def test_extras_reach_the_op_and_missing_ones_are_named(name):
    batch = make_batch(11, dense=True)
    wanted = {
        "tempo": "responses", "tree_rl": "responses", "tree_siblings": "responses", "gtpo": "entropy",
        "grpo_s": "entropy", "pure": "steps", "gae": "values", "remax": "reward_baselines",
    }[name]  # fmt: skip
    config = AlgoConfig(gamma=0.9)
    with pytest.raises(ValueError, match=f"{wanted}: got nothing for rewardops_{name}"):
        call(f"rewardops_{name}", batch, config)
    entries = {wanted: getattr(batch, wanted)}
    passed = call(f"rewardops_{name}", batch, config, **entries)
    with ours.provide(TensorDict(entries, batch_size=[len(batch.index)])):
        provided = call(f"rewardops_{name}", batch, config)
    in_batch = call(f"rewardops_{name}", batch, config, batch=entries)
    for found in (provided, in_batch):
        assert torch.equal(found[0], passed[0])
    expected = direct(batch).get(name)
    if expected is not None:
        assert expected.abs().max() > 0
        assert torch.equal(passed[0], expected)
        assert passed[1] is passed[0]


def test_provided_entries_end_with_the_context():
    batch = make_batch(2)
    with ours.provide(responses=batch.responses), ours.provide(entropy=batch.entropy):
        call("rewardops_tempo", batch)
        call("rewardops_gtpo", batch)
    with pytest.raises(ValueError, match="responses"):
        call("rewardops_tempo", batch)


def test_the_outcome_of_pure_may_be_an_array():
    batch = make_batch(12, dense=True)
    verdict = np.where(np.arange(len(batch.index)) % 2, -1, 0).astype(object)
    found, _ = call("rewardops_pure", batch, steps=batch.steps, outcome=verdict)
    expected = advantages.pure(
        batch.token_level_rewards,
        batch.steps,
        batch.labels,
        mask=batch.mask,
        outcome=torch.tensor(verdict.astype(np.float32)),
    )
    assert torch.equal(found, expected)


# ---- configuration -----------------------------------------------------------------------------------------


def as_dict_config(**settings):
    config = OmegaConf.create(settings)
    OmegaConf.set_struct(config, True)  # as Hydra hands it over
    return config


@dataclasses.dataclass
class Plain:
    """A config without ``get``, as verl's estimators that read attributes take it."""

    gamma: float = 0.7
    norm_adv_by_std_in_grpo: bool = False
    rewardops: object = None


@dataclasses.dataclass
class Options:
    td_scale: str
    ddof: int
    eps: float


@pytest.mark.parametrize("kind", ["struct", "dataclass", "dict", "plain dataclass", "namespace", "nested"])
def test_options_are_read_from_every_kind_of_config(kind):
    batch = make_batch(13)
    options = {"td_scale": "none", "ddof": 0, "eps": 0.5}
    if kind == "dataclass":
        config = AlgoConfig()
        config.rewardops = options
    elif kind == "plain dataclass":
        config = Plain(norm_adv_by_std_in_grpo=True, rewardops=Options(**options))
    elif kind == "namespace":
        config = types.SimpleNamespace(rewardops=options)
    elif kind == "nested":
        config = argparse.Namespace(rewardops=types.SimpleNamespace(**options))
    else:
        config = {"norm_adv_by_std_in_grpo": True, "rewardops": options}
        config = as_dict_config(**config) if kind == "struct" else config
    found, _ = call("rewardops_tempo", batch, config, responses=batch.responses)
    expected = rewardops.tempo_advantages(
        batch.responses, batch.scores, batch.labels, mask=batch.mask, **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("config", [Plain(), types.SimpleNamespace(**vars(Plain())), vars(Plain())])
def test_settings_are_attributes_or_entries(config):
    batch = make_batch(13)
    as_verl = OmegaConf.create({"gamma": 0.7, "norm_adv_by_std_in_grpo": False})
    for name in ("rewardops_grpo", "rewardops_grpo_passk", "rewardops_reinforce_plus_plus"):
        found, wanted = call(name, batch, config), call(name, batch, as_verl)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    theirs = call("reinforce_plus_plus", batch, Plain())
    assert_same(
        call("rewardops_reinforce_plus_plus", batch, config), theirs, batch.mask, rtol=1e-7, atol=1e-9
    )


def test_without_a_config_the_defaults_hold():
    batch = make_batch(13)
    for name in ESTIMATORS:
        if name == "rewardops_gdpo":
            continue
        found = call(name, batch, None, **entries(batch))
        for config in (types.SimpleNamespace(), {}):
            assert torch.equal(call(name, batch, config, **entries(batch))[0], found[0])
    for name in ("rewardops_clip_cov", "rewardops_kl_cov"):
        with pytest.raises(ValueError, match=f"config: got None for {name}"):
            core_algos.get_policy_loss_fn(name)(*[torch.zeros(1, 1)] * 4)


def test_another_number_of_anything_is_named():
    batch = make_batch(13)
    rows = len(batch.index)
    wrong = types.SimpleNamespace(**vars(batch))
    wrong.index = batch.index[:-1]
    with pytest.raises(ValueError, match=f"index: got {rows - 1} uids, want {rows}"):
        call("rewardops_grpo", wrong)
    wrong = types.SimpleNamespace(**vars(batch))
    wrong.response_mask = batch.response_mask[:, :-1]
    with pytest.raises(ValueError, match=r"response_mask: got shape .* want .*, as token_level_rewards"):
        call("rewardops_grpo", wrong)
    wrong.response_mask, wrong.token_level_rewards = batch.response_mask, batch.scores
    with pytest.raises(ValueError, match=r"token_level_rewards: got shape .* want \[B, T\]"):
        call("rewardops_grpo", wrong)
    with pytest.raises(ValueError, match=f"reward_baselines: got {rows - 1} values, want {rows}"):
        call("rewardops_remax", batch, reward_baselines=batch.reward_baselines[:-1])
    given = entries(batch)
    with pytest.raises(ValueError, match=f"format: got {rows - 2} values, want {rows}"):
        call("rewardops_gdpo", batch, GDPO, **{**given, "format": given["format"][2:]})
    with pytest.raises(ValueError, match="gdpo_reward_weights: got 1, want 2"):
        call("rewardops_gdpo", batch, {**GDPO, "gdpo_reward_weights": [1.0]}, **given)
    with pytest.raises(ValueError, match="gdpo_reward_keys: got 'right', want the names"):
        call("rewardops_gdpo", batch, {**GDPO, "gdpo_reward_keys": "right"}, **given)


def test_without_options_every_kind_of_config_is_the_default():
    batch = make_batch(14)
    found = [call("rewardops_grpo", batch, config)[0] for config in (None, AlgoConfig(), as_dict_config(a=1))]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_lite_ppo_and_quantiles_are_options_of_grpo():
    batch = make_batch(15)
    config = as_dict_config(rewardops={"scale": "batch_std", "singleton": "zero", "baseline": 0.3})
    found, _ = call("rewardops_grpo", batch, config)
    rows = rewardops.group_advantages(batch.scores, batch.labels, baseline=0.3, scale="batch_std")
    torch.testing.assert_close(found, rows[:, None] * batch.mask)


def test_an_option_of_another_estimator_is_refused():
    batch = make_batch(16)
    with pytest.raises(
        ValueError, match=r"algorithm\.rewardops\.td_scale: rewardops_grpo has no such option"
    ):
        call("rewardops_grpo", batch, as_dict_config(rewardops={"td_scale": "none"}))


def test_groups_are_asked_for_by_name():
    batch = make_batch(17)
    batch.index = None
    with pytest.raises(ValueError, match="index: got None for rewardops_rloo"):
        call("rewardops_rloo", batch)


def test_high_entropy_tokens_alone():
    batch = make_batch(18)
    config = as_dict_config(rewardops={"high_entropy_fraction": 0.2})
    found, returns = call("rewardops_grpo", batch, config, entropys=batch.entropy)
    whole, _ = call("rewardops_grpo", batch)
    kept = rewardops.high_entropy_mask(batch.entropy, batch.mask, fraction=0.2)
    assert int(kept.sum()) == round(0.2 * int(batch.mask.sum()))
    assert torch.equal(found, torch.where(kept, whole, 0))
    assert torch.equal(returns, whole)


# ---- checks before a training ------------------------------------------------------------------------------


def whole(estimator, n=4, **settings):
    """As much of verl's config as is read before a training."""
    policy_loss = settings.pop("policy_loss", {"loss_mode": "vanilla"})
    return as_dict_config(
        algorithm={"adv_estimator": estimator, "gamma": 0.9, "lam": 0.8, **settings},
        critic={"enable": True},
        actor_rollout_ref={"rollout": {"n": n}, "actor": {"policy_loss": policy_loss}},
        trainer={"use_v1": True, "v1": {"trainer_mode": "rewardops"}},
    )


READ = {
    "rewardops_tempo": {"responses"}, "rewardops_tree_rl": {"responses"}, "rewardops_tree_siblings": {"responses"},
    "rewardops_gtpo": {"entropy"}, "rewardops_grpo_s": {"entropy"}, "rewardops_pure": {"steps"},
    "rewardops_gae": {"values"}, "rewardops_remax": {"reward_baselines"}, "rewardops_gdpo": {"right", "format"},
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_config_that_will_do(name):
    assert ours.check_config(whole(name, **GDPO)) == READ.get(name, set())
    high_entropy = {"high_entropy_fraction": 0.2}
    assert ours.check_config(whole(name, **GDPO, rewardops=high_entropy)) == READ.get(name, set()) | {
        "entropy"
    }
    # As much of a config as there is, of any kind.
    algorithm = types.SimpleNamespace(adv_estimator=name, **GDPO)
    assert ours.check_config(types.SimpleNamespace(algorithm=algorithm)) == READ.get(name, set())


@pytest.mark.parametrize(
    "config", [None, {}, whole("gae"), whole("grpo"), whole(core_algos.AdvantageEstimator.GAE)]
)
def test_other_configs_are_verls(config):
    assert ours.check_config(config) == set()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (whole("rewardops_gppo"), ValueError, r"algorithm\.adv_estimator: got 'rewardops_gppo', want one of"),
        (
            whole("rewardops_grpo", rewardops={"td_scale": "none"}), ValueError,
            r"algorithm\.rewardops\.td_scale: rewardops_grpo has no such option, want one of",
        ),
        (whole("rewardops_grpo", rewardops={"eps": -1}), ValueError, r"algorithm.rewardops.eps: got -1,"),
        (whole("rewardops_grpo", rewardops={"scale": "x"}), ValueError, r"algorithm.rewardops.scale: got 'x',"),
        (whole("rewardops_grpo", rewardops=3), TypeError, r"algorithm\.rewardops: got int, want options by name"),
        (whole("rewardops_tempo", rewardops={"masked": 1}), ValueError, r"algorithm.rewardops.masked: got 1,"),
        (whole("rewardops_gtpo", rewardops={"alpha1": "x"}), TypeError, r"algorithm.rewardops.alpha1: got str,"),
        (
            whole("rewardops_rloo", rewardops={"high_entropy_fraction": 2}), ValueError,
            r"algorithm\.rewardops\.high_entropy_fraction: got 2, want",
        ),
        (whole("rewardops_gae", gamma=1.5), ValueError, r"algorithm\.gamma: got 1.5, want"),
        (whole("rewardops_gae", lam=-1), ValueError, r"algorithm\.lam: got -1, want"),
        (whole("rewardops_gdpo"), ValueError, r"algorithm\.gdpo_reward_keys: got none, want"),
        (whole("rewardops_gdpo", gdpo_reward_keys=3), ValueError, r"algorithm\.gdpo_reward_keys: got 3, want"),
        (
            whole("rewardops_gdpo", gdpo_reward_keys=["a"], gdpo_reward_weights=[1, 2]), ValueError,
            r"algorithm\.gdpo_reward_weights: got 2, want 1",
        ),
        (whole("rewardops_tempo", n=1), ValueError, r"actor_rollout_ref\.rollout\.n: got 1, .* want 2 or more"),
        (
            whole("rewardops_rloo", n=1, rewardops={"singleton": "zero"}), ValueError,
            r"actor_rollout_ref\.rollout\.n: got 1, with which every advantage of rewardops_rloo is 0",
        ),
        (
            OmegaConf.merge(whole("rewardops_gae"), {"critic": {"enable": None}}), ValueError,
            r"critic\.enable: got None, want True with rewardops_gae",
        ),
        (
            whole("grpo", policy_loss={"loss_mode": "rewardops_cov"}), ValueError,
            r"actor_rollout_ref\.actor\.policy_loss\.loss_mode: got 'rewardops_cov', want one of",
        ),
        (
            whole("grpo", policy_loss={"loss_mode": "rewardops_kl_cov", "kl_cov_ratio": 2}), ValueError,
            r"actor_rollout_ref\.actor\.policy_loss\.kl_cov_ratio: got 2, want a number from 0 to 1",
        ),
        (
            whole("grpo", policy_loss={"loss_mode": "rewardops_clip_cov", "clip_cov_lb": "low"}), TypeError,
            r"actor_rollout_ref\.actor\.policy_loss\.clip_cov_lb: got str, want a number",
        ),
    ],
)  # fmt: skip
def test_a_config_that_will_not_do(config, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ours.check_config(config)


def test_one_response_per_prompt_is_enough_where_a_reward_is_its_own_advantage():
    for name in ("rewardops_grpo", "rewardops_rloo", "rewardops_gae", "rewardops_reinforce_plus_plus"):
        ours.check_config(whole(name, n=1))


def test_the_check_leaves_no_trace():
    state = torch.get_rng_state()
    for name in ESTIMATORS:
        ours.check_config(whole(name, **GDPO))
    assert torch.equal(torch.get_rng_state(), state)


def test_verls_validate_config_checks_ours_first():
    from verl.utils import config as verl_config
    from verl.utils import validate_config

    assert validate_config is verl_config.validate_config is ours._validate_config
    with pytest.raises(ValueError, match="rewardops_gppo"):
        validate_config(config=whole("rewardops_gppo"), use_reference_policy=False, use_critic=False)
    stock = OmegaConf.merge(whole("rewardops_tempo"), {"trainer": {"v1": {"trainer_mode": "sync"}}})
    with pytest.raises(
        ValueError, match=r"trainer_mode: got 'sync', whose trainer does not fetch \['responses'\]"
    ):
        validate_config(config=stock, use_reference_policy=False, use_critic=False)
    # What will do goes on to verl's, which misses the rest of its config.
    for config in (
        whole("rewardops_tempo"),
        OmegaConf.merge(stock, {"algorithm": {"adv_estimator": "rewardops_gae"}}),
        OmegaConf.merge(stock, {"trainer": {"use_v1": False}}),
    ):
        with pytest.raises(Exception, match="n_gpus_per_node"):
            validate_config(config=config, use_reference_policy=False, use_critic=False)


def test_a_trainer_checks_its_fields():
    class Base:
        def __init__(self, config):
            self.config = config

    class Trainer(ours.AdvantageInputs, Base):
        pass

    assert Trainer(config=whole("rewardops_tempo")).config.algorithm.adv_estimator == "rewardops_tempo"
    Trainer(whole("rewardops_remax"))
    with pytest.raises(ValueError, match=r"advantage_fields: got .*, want \['steps'\] too, which"):
        Trainer(whole("rewardops_pure"))
    Trainer.advantage_fields = ("entropys",)
    Trainer(config=whole("rewardops_gtpo"))


# ---- verl's trainers ---------------------------------------------------------------------------------------


def verls_compute_advantage():
    """The function of ``verl.trainer.ppo.ray_trainer``, out of its source: the module itself imports a cluster."""
    source = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "ppo" / "ray_trainer.py"
    tree = ast.parse(source.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "").startswith("compute_advantage")]
    namespace = dict(vars(core_algos), core_algos=core_algos, DataProto=DataProto)
    exec(compile(tree, str(source), "exec"), namespace)
    return namespace["compute_advantage"]


def as_data(batch):
    names = ("token_level_rewards", "response_mask", "responses", "values", "entropy", "reward_baselines")
    tensors = {name: getattr(batch, name) for name in names}
    return DataProto(
        batch=TensorDict(tensors, batch_size=[len(batch.index)]), non_tensor_batch={"uid": batch.index}
    )


@pytest.fixture
def trainer(monkeypatch):
    """``verl.trainer.ppo.ray_trainer``, or as much of it as there is to be called."""
    module = types.ModuleType("verl.trainer.ppo.ray_trainer")
    module.compute_advantage = verls_compute_advantage()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["verl.trainer.ppo"], "ray_trainer", module, raising=False)
    monkeypatch.setattr(ours, "_originals", {})
    return module


def test_verls_compute_advantage_calls_ours(trainer):
    batch, config = make_batch(21), as_dict_config(norm_adv_by_std_in_grpo=True, gamma=1.0, lam=1.0)
    expected = trainer.compute_advantage(as_data(batch), "grpo", config=config)
    found = trainer.compute_advantage(as_data(batch), "rewardops_grpo", config=config)
    for key in ("advantages", "returns"):
        torch.testing.assert_close(found.batch[key], expected.batch[key], rtol=2e-6, atol=1e-12)


def test_our_compute_advantage_hands_over_the_whole_batch(trainer):
    batch, config = make_batch(22), as_dict_config(gamma=0.99, lam=0.9)
    with pytest.raises(ValueError, match="responses: got nothing for rewardops_tempo"):
        trainer.compute_advantage(as_data(batch), "rewardops_tempo", config=config)
    found = ours.compute_advantage(as_data(batch), "rewardops_tempo", config=config)
    assert torch.equal(found.batch["advantages"], direct(batch)["tempo"])
    expected = trainer.compute_advantage(as_data(batch), "gae", gamma=0.99, lam=0.9, config=config)
    found = ours.compute_advantage(as_data(batch), "rewardops_gae", config=config)
    mask = batch.mask
    torch.testing.assert_close(
        found.batch["advantages"][mask], expected.batch["advantages"][mask], rtol=1e-7, atol=1e-9
    )


def test_patched_the_trainer_calls_ours(trainer):
    batch, verls = make_batch(23), trainer.compute_advantage
    undo = ours.patch("compute_advantage")
    try:
        assert trainer.compute_advantage is ours.compute_advantage
        found = trainer.compute_advantage(as_data(batch), "rewardops_tempo")
        assert torch.equal(found.batch["advantages"], direct(batch)["tempo"])
    finally:
        undo()
    assert trainer.compute_advantage is verls


def test_fields_of_the_queue_reach_the_estimators(monkeypatch):
    """As in verl's v1 trainer: rows of their own lengths, padded by itself, and nothing but its own fields."""
    batch = make_batch(24)
    lengths = [int(row.nonzero()[-1]) + 1 for row in batch.mask]
    stored = {
        name: torch.nested.as_nested_tensor(
            [row[:n] for row, n in zip(getattr(batch, name), lengths, strict=True)], layout=torch.jagged
        )
        for name in ("responses", "entropy", "response_mask")
    }
    asked = []

    def kv_batch_get(keys, partition_id, select_fields):
        asked.append((keys, partition_id))
        fields = {name: stored[name] for name in select_fields if name in stored}
        return TensorDict(fields, batch_size=[len(lengths)])

    queue = types.ModuleType("transfer_queue")
    queue.kv_batch_get = kv_batch_get
    monkeypatch.setitem(sys.modules, "transfer_queue", queue)

    class Base:
        def _compute_advantage(self, meta, metrics):
            short = types.SimpleNamespace(**{**vars(batch)})
            width = max(lengths)
            short.token_level_rewards = batch.token_level_rewards[:, :width]
            short.response_mask = batch.response_mask[:, :width]
            return call(metrics["estimator"], short)[0]

    class Trainer(ours.AdvantageInputs, Base):
        pass

    meta = types.SimpleNamespace(keys=["a", "b"], partition_id="train")
    for name in ("tempo", "gtpo"):
        found = Trainer()._compute_advantage(meta, {"estimator": f"rewardops_{name}"})
        torch.testing.assert_close(found, direct(batch)[name][:, : max(lengths)])
    assert asked == [(["a", "b"], "train")] * 2


# ---- policy losses -----------------------------------------------------------------------------------------


def actor_config(**policy_loss):
    return OmegaConf.create(
        {
            "clip_ratio": 0.2,
            "clip_ratio_low": None,
            "clip_ratio_high": 0.28,
            "global_batch_info": {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 16},
            "policy_loss": {
                "clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 0.0002,
                "ppo_kl_coef": 0.3, **policy_loss,
            },
        }
    )  # fmt: skip


def policy_loss(name, seed, config, weights=None, mode="token-mean"):
    batch = make_batch(seed)
    generator = torch.Generator().manual_seed(seed + 100)

    def draw(scale):
        shape = batch.mask.shape
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    old = draw(2.0) - 3
    new = (old + draw(0.2)).requires_grad_()
    torch.manual_seed(0)
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=new,
        advantages=draw(1.0) * batch.mask,
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=draw(1.0).abs() if weights else None,
    )
    (grad,) = torch.autograd.grad(loss, new)
    return loss.detach(), grad, metrics, batch.mask


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("ratio", [0.0002, 0.1, 1.0])
def test_kl_cov_same_as_verl(ratio, weights, mode):
    config = actor_config(kl_cov_ratio=ratio)
    for seed in range(3):
        found = policy_loss("rewardops_kl_cov", seed, config, weights, mode)
        expected = policy_loss("kl_cov", seed, config, weights, mode)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-14)
        assert found[2] == pytest.approx(expected[2])


@pytest.mark.parametrize("weights", [False, True])
def test_clip_cov_of_the_whole_band_is_verls(weights):
    config = actor_config(clip_cov_ratio=1.0)
    for seed in range(3):
        found = policy_loss("rewardops_clip_cov", seed, config, weights)
        expected = policy_loss("clip_cov", seed, config, weights)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-14)
        assert found[2] == pytest.approx(expected[2])
        assert found[2]["actor/pg_clipfrac"] > 0


def test_clip_cov_draws_as_many_as_verl_out_of_the_band():
    config = actor_config(clip_cov_ratio=0.05)
    for seed in range(3):
        found, expected = (policy_loss(name, seed, config) for name in ("rewardops_clip_cov", "clip_cov"))
        assert found[2] == pytest.approx(expected[2])
        band = policy_loss("clip_cov", seed, actor_config(clip_cov_ratio=1.0))
        everything = policy_loss("clip_cov", seed, actor_config(clip_cov_lb=1e9, clip_cov_ub=1e9))
        dropped = (found[1] == 0) & (everything[1] != 0)
        assert int(dropped.sum()) == int(0.05 * int(found[3].sum()))
        assert not band[1][dropped].any()


# ---- drop-ins ----------------------------------------------------------------------------------------------


def kl_pair(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(5, 40, generator=generator, dtype=dtype) - 2
    b = a + torch.randn(5, 40, generator=generator, dtype=dtype) * 0.5
    b[0, :4] = a[0, :4] + torch.tensor([25.0, -25.0, 3.0, 0.0], dtype=dtype)  # beyond verl's clamps
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_penalty_same_as_verl(name, plus):
    results = []
    for fn in (ours.kl_penalty, core_algos.kl_penalty):
        a, b = kl_pair()
        value = fn(a, b, name + plus)
        results.append((value.detach(), *torch.autograd.grad((value * torch.arange(40)).sum(), (a, b))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_kl_penalty_of_another_name():
    a, b = kl_pair()
    with pytest.raises(ValueError, match="kl_penalty: got 'full'"):
        ours.kl_penalty(a, b, "full")


@pytest.mark.parametrize("shape", [(7, 301), (3, 5, 301)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_and_entropy_from_logits(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)

    def run(module, logits):
        logits = logits.clone().requires_grad_()
        logprob = module.logprobs_from_logits(logits, labels, inplace_backward=False)
        entropy = module.entropy_from_logits(logits)
        (grad,) = torch.autograd.grad((logprob - 0.5 * entropy).double().sum(), logits)
        return logprob.detach().double(), entropy.detach().double(), grad.double()

    exact = run(verl_F, drawn.double())
    found = run(ours, drawn)
    # The gradient comes in the dtype of the logits, values in float32 at least.
    limits = {torch.float64: (1e-13, 1e-13), torch.float32: (4e-6, 4e-6), torch.bfloat16: (4e-6, 1e-2)}[dtype]
    for value, wanted, limit in zip(found, exact, (limits[0], limits[0], limits[1]), strict=True):
        torch.testing.assert_close(value, wanted, rtol=limit, atol=limit)
    chunked = ours.entropy_from_logits_with_chunking(drawn.reshape(-1, shape[-1]), chunk_size=2)
    assert torch.equal(chunked.double(), found[1].reshape(-1))


def test_the_backward_in_place_is_the_callers_choice():
    base = torch.randn(6, 33, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.arange(6)
    grads = []
    for inplace in (True, False):
        logits = base * 1.0
        ours.logprobs_from_logits(logits, labels, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits, base) is not inplace
        grads.append(base.grad.clone())
        base.grad = None
    assert torch.equal(*grads)


LABELS = torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "spread",
    [
        lambda x: x[:1].expand(4, 11),  # one distribution, several candidates
        lambda x: x.reshape(-1)[:14].unfold(0, 11, 1),  # windows that overlap
        lambda x: x[:1, None].expand(2, 2, 11),
        lambda x: x.reshape(-1).as_strided((4, 11), (0, 1)),
    ],
    ids=["expanded", "windows", "expanded, batched", "strided"],
)
def test_the_gradient_of_logits_whose_rows_share_memory(spread, inplace):
    base = torch.randn(2, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact, used = base.clone().requires_grad_(), (base * 1).requires_grad_()
    logits = spread(exact)
    labels = LABELS.reshape(logits.shape[:-1])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).reshape(labels.shape)
    wanted = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    found = ours.logprobs_from_logits(spread(used * 1), labels, inplace_backward=inplace)
    torch.testing.assert_close(found, wanted)
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(used.grad, exact.grad)


def test_another_number_of_labels():
    logits = torch.zeros(2, 2, 5)
    for labels in (torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 2, 1), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"labels: got shape .*, want \[2, 2\]"):
            ours.logprobs_from_logits(logits, labels.long())
    with pytest.raises(TypeError, match="labels: got list"):
        ours.logprobs_from_logits(logits, [1])


def test_patch_and_undo(monkeypatch):
    losses = types.ModuleType("verl.workers.utils.losses")  # as one that has imported the function by name
    losses.kl_penalty = core_algos.kl_penalty
    monkeypatch.setitem(sys.modules, losses.__name__, losses)
    other = types.ModuleType("verl.other")  # as one with another function of that name
    other.kl_penalty = len
    monkeypatch.setitem(sys.modules, other.__name__, other)
    before = (verl_F.logprobs_from_logits, verl_F.entropy_from_logits, core_algos.kl_penalty)
    undo = ours.patch()
    try:
        assert verl_F.logprobs_from_logits is ours.logprobs_from_logits
        assert losses.kl_penalty is core_algos.kl_penalty is ours.kl_penalty
        assert other.kl_penalty is len
        ours.patch()  # twice is once
        logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(2))
        mask = torch.ones(2, 3)
        found = core_algos.compute_entropy_loss(logits, mask)
    finally:
        undo()
    assert before == (verl_F.logprobs_from_logits, verl_F.entropy_from_logits, core_algos.kl_penalty)
    assert losses.kl_penalty is core_algos.kl_penalty
    torch.testing.assert_close(found, core_algos.compute_entropy_loss(logits, mask), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="names: got 'agg_loss'"):
        ours.patch("agg_loss")


# ---- in processes of their own -----------------------------------------------------------------------------


def run(code, folder, **environment):
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,  # away from the metadata that builds leave beside the sources
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.split()[-1]


def test_verl_loads_the_plugin(tmp_path):
    code = """
import sys, verl
assert "rewardops.integrations.verl" in sys.modules
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
print(get_adv_estimator_fn("rewardops_tempo").__module__, get_policy_loss_fn("rewardops_kl_cov").__module__)
"""
    assert run(code, tmp_path, VERL_USE_EXTERNAL_PLUGINS="rewardops") == "rewardops.integrations.verl"


def test_the_plugin_is_off_where_verl_is_told_so_and_loading_twice_is_harmless(tmp_path):
    code = """
import sys, rewardops
assert not [m for m in sys.modules if m.split(".")[0] in ("verl", "trl", "torchrl")]
import verl
from verl.trainer.ppo import core_algos
assert not [name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("rewardops")]
import importlib, rewardops.integrations.verl as ours
first = core_algos.get_adv_estimator_fn("rewardops_grpo")
importlib.reload(ours)
assert core_algos.get_adv_estimator_fn("rewardops_grpo") is not first
assert verl.utils.validate_config is ours._validate_config
assert ours._verls_validate_config.__module__ == "verl.utils.config"
print(len([name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("rewardops")]))
"""
    assert int(run(code, tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")) == 17
