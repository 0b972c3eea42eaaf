"""TRL's GRPOTrainer and ours, side by side: the same training where nothing else is asked for."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer import utils as stock_utils

import rewardops
from rewardops.integrations import trl as integration
from rewardops.integrations.trl import GRPOTrainer, Rollouts

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

VOCAB = 32
EOS = 1
PROMPTS = [f"w{i} w{i + 1} w{(3 * i) % 29}" for i in range(16)]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "vocab_size": VOCAB,
    "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.5, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.02},
}


def config_of(family: str, **shape):
    return transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **shape})


def save(folder: Path, family: str = "qwen2", **shape) -> Path:
    """A small random model on disk, as TRL loads the reference model from a path."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **shape))
    for weight in model.parameters():  # far enough from uniform for credit, entropies and softcaps to show
        weight.data.mul_(4 if weight.dim() == 2 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small_models():
    """A second thread only spins, and a training that ends collects the garbage of all that is imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def short(completion_ids, **_):
    """Not for everyone: TRL's way to say that a reward does not apply."""
    return [None if ids[0] % 3 == 0 else -0.1 * len(ids) for ids in completion_ids]


def make(cls, folder, tmp_path, ours=None, rewards=even, **options):
    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3,
        "max_completion_length": 8, "learning_rate": 0.1, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "seed": 3, "bf16": False,
        "optim": "sgd",  # Adam turns rounding errors of gradients near 0 into whole steps
    }  # fmt: skip
    rollout = options.pop("rollout_func", None)
    return cls(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        reward_funcs=list(rewards) if isinstance(rewards, (list, tuple)) else rewards,
        args=trl.GRPOConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        processing_class=tokenizer(),
        rollout_func=rollout,
        **(ours or {}),
    )


def train(*args, **options):
    trainer = make(*args, **options)
    trainer.train()
    return trainer


def figures(trainer) -> list[dict[str, float]]:
    timed = ("time", "per_second", "flos", "epoch")
    return [
        {key: value for key, value in logs.items() if value is not None and not any(t in key for t in timed)}
        for logs in trainer.state.log_history
    ]


def assert_same_training(stock, ours) -> None:
    for expected, found in zip(figures(stock), figures(ours), strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    # Nor is that the equality of two models that have not moved.
    assert any(logs.get("grad_norm", 0) > 1e-2 for logs in stock.state.log_history)


# ---- completions of one's own --------------------------------------------------------------------------------

# Two groups of four that share prefixes; of one a tool wrote a token, one is truncated.
COMPLETIONS = [
    [5, 6, 7, 8, EOS], [5, 6, 9, EOS], [5, 10, 11, 12, 13, 14], [5, 6, 7, 14, EOS],
    [20, 21, EOS], [20, 21, 22, 23, 24, EOS], [20, 25, EOS], [26, EOS],
]  # fmt: skip
MASKS = [[1] * len(ids) for ids in COMPLETIONS]
MASKS[5][2] = 0
OUTCOMES = [1.0, 0.0, 0.25, 1.0, 0.5, 1.0, 0.0, 0.75]
STEPS = [
    [(1, 0.9), (4, 0.2)],
    [(3, 0.5)],
    None,
    [(2, 0.1), (4, 0.7)],
    [(2, 0.3)],
    [(1, 0.8), (5, -0.4)],
    [],
    [(1, 0.6)],
]
GROUPS = [0] * 4 + [1] * 4


def rollout(completions, masks=None):
    """TRL's way to bring completions of one's own: those of this process."""

    def run(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        mine = completions[first : first + len(prompts)]
        out = {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": mine,
            "logprobs": [[0.0] * len(ids) for ids in mine],
        }
        return out if masks is None else {**out, "env_mask": masks[first : first + len(prompts)]}

    return run


def outcome(completion_ids, **_):
    return [OUTCOMES[COMPLETIONS.index(ids)] for ids in completion_ids]


def process(prompts, completions, completion_ids, trainer_state, **_):
    return [STEPS[COMPLETIONS.index(ids)] for ids in completion_ids]


# ---- the same training -------------------------------------------------------------------------------------

STOCK = {
    "defaults": {},
    "beta": {"beta": 0.1},
    "beta, off policy": {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "use_bias_correction_kl": False},
    "generation in slices": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.05},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "beta": 0.1},
    "batch std": {"scale_rewards": "batch", "temperature": 0.7},
    "no scale": {"scale_rewards": False, "loss_type": "dr_grpo"},
    "two rewards": {"rewards": (even, short), "reward_weights": [1.0, 0.5]},
    "unscorable": {"rewards": short},
    "normalised rewards": {
        "rewards": (even, short), "reward_weights": [1.0, 0.5], "multi_objective_aggregation": "normalize_then_sum",
    },
    "truncated": {"mask_truncated_completions": True, "beta": 0.1},
    "high entropy": {"top_entropy_quantile": 0.4},
    "entropy bonus": {"entropy_coef": 0.05},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    "off-policy mask": {"off_policy_mask_threshold": 1e-4, "num_iterations": 2, "max_steps": 4},
    "padded": {"pad_to_multiple_of": 8},
    "tools": {"rollout_func": rollout(COMPLETIONS, MASKS), "rewards": outcome, "beta": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "float32 head": {"cast_lm_head_to_fp32": True},
    **{loss: {"loss_type": loss, "beta": 0.02} for loss in ("grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")},
}  # fmt: skip


@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK.keys())
def test_trains_as_stock(options, folders, tmp_path):
    stock = train(trl.GRPOTrainer, folders["qwen2"], tmp_path, **options)
    for source in ("hidden", "logits"):
        ours = train(GRPOTrainer, folders["qwen2"], tmp_path, {"token_stats_from": source}, **options)
        assert_same_training(stock, ours)


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, source, folders, tmp_path):
    stock = train(trl.GRPOTrainer, folders[family], tmp_path, beta=0.1)
    ours = train(GRPOTrainer, folders[family], tmp_path, {"token_stats_from": source}, beta=0.1)
    assert_same_training(stock, ours)


def test_half_precision(folders, tmp_path):
    """Under autocast: to the rounding of the logits, in bfloat16 in both."""
    options = {"bf16": True, "beta": 0.1, "max_steps": 2}
    stock = train(trl.GRPOTrainer, folders["qwen2"], tmp_path, **options)
    for source in ("hidden", "logits"):
        ours = train(GRPOTrainer, folders["qwen2"], tmp_path, {"token_stats_from": source}, **options)
        for expected, found in zip(figures(stock)[:2], figures(ours)[:2], strict=True):
            for key in ("loss", "entropy", "grad_norm"):
                assert found[key] == pytest.approx(expected[key], rel=2**-7, abs=1e-4), key


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_peft(source, folders, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ours = {"peft_config": adapter, "token_stats_from": source}
    stock = train(trl.GRPOTrainer, folders["qwen2"], tmp_path, {"peft_config": adapter}, beta=0.1)
    assert_same_training(stock, train(GRPOTrainer, folders["qwen2"], tmp_path, ours, beta=0.1))
    with pytest.raises(ValueError, match="got 'exact' with a PEFT model"):
        make(GRPOTrainer, folders["qwen2"], tmp_path, {**ours, "kl_estimator": "exact"}, beta=0.1)


def test_the_ops_are_ours(folders, tmp_path, monkeypatch):
    """What was compared above is not stock with stock."""
    calls = []
    for name in ("linear_token_stats", "token_stats"):
        op = getattr(integration, name)
        monkeypatch.setattr(
            integration, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k)
        )
    train(GRPOTrainer, folders["qwen2"], tmp_path, max_steps=1, beta=0.1)
    assert calls == ["linear_token_stats"] * 2  # the reference's, the policy's
    train(GRPOTrainer, folders["qwen2"], tmp_path, {"token_stats_from": "logits"}, max_steps=1)
    assert calls[2:] == ["token_stats"]
    train(trl.GRPOTrainer, folders["qwen2"], tmp_path, max_steps=1)
    assert len(calls) == 3  # TRL's own trainer is as it was


def test_nothing_left_to_score(folders, tmp_path):
    """All completions truncated, and masked."""
    options = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 1}
    trainer = train(GRPOTrainer, folders["qwen2"], tmp_path, rollout_func=rollout([[5]] * 8), **options)
    assert trainer.state.log_history[0]["loss"] == 0


def test_trl_that_has_changed_is_told(monkeypatch, folders, tmp_path):
    monkeypatch.setattr(stock_utils, "add_fused_lm_head", lambda model, **_: None)
    with pytest.raises(ImportError, match=r"no longer uses _ChunkedLogProbFunction, _use_triton"):
        make(GRPOTrainer, folders["qwen2"], tmp_path)
    make(GRPOTrainer, folders["qwen2"], tmp_path, {"token_stats_from": "logits"})


def test_zero3_keeps_trls_head(monkeypatch, folders, tmp_path):
    stock = train(trl.GRPOTrainer, folders["qwen2"], tmp_path)
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(integration, "linear_token_stats", None)
    with pytest.warns(UserWarning, match="ZeRO-3"):
        ours = train(GRPOTrainer, folders["qwen2"], tmp_path)
    assert_same_training(stock, ours)


# ---- exact KL ----------------------------------------------------------------------------------------------


def eager_kl(trainer, inputs, temperature):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    found = []
    for model in (trainer.model, trainer.ref_model):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
        found.append((logits.double() / temperature).log_softmax(-1))
    return (found[0].exp() * (found[0] - found[1])).sum(-1)


def moved(trainer) -> None:
    """The policy, away from the reference."""
    generator = torch.Generator().manual_seed(1)
    for weight in trainer.model.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_share_in_loss_is_trls(loss_type, training, folders, tmp_path):
    """Ours beside TRL's own aggregation, with TRL's own k3."""
    trainer = make(
        trl.GRPOTrainer, folders["qwen2"], tmp_path, beta=0.5, loss_type=loss_type, use_bias_correction_kl=False,
        gradient_accumulation_steps=2, rollout_func=rollout(COMPLETIONS, MASKS),
    )  # fmt: skip
    moved(trainer)
    trainer.model.train(training)
    inputs = trainer._generate_and_score_completions(
        [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]
    )
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logprob, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, inputs["completion_ids"].shape[1]
        )
        k3 = rewardops.token_kl(logprob, inputs["ref_per_token_logps"], estimator="k3")
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        share = GRPOTrainer._share_in_loss(trainer, mask, inputs)
        trainer.beta = 0.0
        without = trainer._compute_loss(trainer.model, inputs)
    assert float((k3 * share).sum()) > 1e-3
    torch.testing.assert_close(loss - without, 0.5 * (k3 * share).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_exact_kl(family, source, folders, tmp_path):
    trainer = make(
        GRPOTrainer, folders[family], tmp_path, {"kl_estimator": "exact", "token_stats_from": source}, beta=0.5,
        loss_type="grpo", gradient_accumulation_steps=2, temperature=0.8, rollout_func=rollout(COMPLETIONS, MASKS),
    )  # fmt: skip
    moved(trainer)
    inputs = trainer._generate_and_score_completions(
        [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]
    )
    assert "ref_per_token_logps" not in inputs  # and no pass for it
    inputs["advantages"].zero_()  # the policy's loss, and its gradient, are 0
    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    kl = eager_kl(trainer, inputs, 0.8)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    expected = 0.5 * ((kl * mask).sum(1) / mask.sum(1)).mean() / 2
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected, list(trainer.model.parameters())), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(
        float((kl * mask).sum() / mask.sum()), rel=1e-5
    )
    assert trainer.beta == 0.5


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_exact_kl_trains(source, folders, tmp_path):
    ours = {"kl_estimator": "exact", "token_stats_from": source}
    options = {"beta": 0.5, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4}
    exact = train(GRPOTrainer, folders["qwen2"], tmp_path, ours, **options)
    stock = train(trl.GRPOTrainer, folders["qwen2"], tmp_path, **options)
    assert exact.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert exact.state.log_history[3]["kl"] > 1e-4
    assert exact.state.log_history[3]["kl"] != pytest.approx(stock.state.log_history[3]["kl"], rel=1e-3)


# ---- token-level credit ------------------------------------------------------------------------------------


def scored(tmp_path, folder, ours, prompts=8, **options):
    """A trainer, and what it makes of the completions above."""
    settings = {
        "rewards": outcome,
        "loss_type": "bnpo",
        "rollout_func": rollout(COMPLETIONS, MASKS),
        **options,
    }
    trainer = make(GRPOTrainer, folder, tmp_path, ours, **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    group = settings.get("num_generations", 4)
    return trainer, trainer._generate_and_score_completions(
        [{"prompt": PROMPTS[i // group]} for i in range(prompts)]
    )


def padded(rows, value=0, dtype=torch.long):
    width = max(len(ids) for ids in COMPLETIONS)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)


def step_tensors():
    rewards, ends = torch.zeros(8, 6), torch.zeros(8, 6, dtype=torch.bool)
    for row, pairs in enumerate(STEPS):
        for end, reward in pairs or ():
            rewards[row, end], ends[row, end] = reward, True
    return rewards, ends


def by_hand(estimator, entropy=None, counted=None, labels=GROUPS):
    """The same advantages, from lists."""
    rewards = torch.tensor(OUTCOMES)
    mask = padded(MASKS).bool()
    if counted is not None:
        mask = mask & counted[:, None]
    groups = torch.tensor(labels)
    if estimator == "tempo":
        return rewardops.tempo_advantages(padded(COMPLETIONS), rewards, groups, mask=mask, eps=1e-4)
    if estimator == "pure":
        values, ends = step_tensors()
        return rewardops.advantages.pure(values, ends, groups, outcome=rewards, mask=mask)
    assert estimator == "gtpo"
    return rewardops.advantages.gtpo(
        rewards, entropy, groups, mask=mask, **OURS[estimator]["advantage_options"]
    )


OURS = {
    "tempo": {},
    "pure": {"process_reward_func": process},
    # Rows with equal prefixes have equal entropies but for rounding,
    # which an eps of 1e-8 would magnify 10,000 times.
    "gtpo": {"advantage_options": {"positive": 0.5, "eps": 1e-4}},
}


def plain_logits(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], (padded(COMPLETIONS) > 0).long()], 1)
    width = inputs["completion_ids"].shape[1]
    return trainer.model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("estimator", OURS)
def test_token_credit_reaches_the_loss(estimator, truncated, folders, tmp_path):
    """Advantages, loss and gradient beside the same made by hand, from lists and plain logits."""
    trainer, inputs = scored(
        tmp_path, folders["qwen2"], {"advantage_estimator": estimator, **OURS[estimator]},
        mask_truncated_completions=truncated,
    )  # fmt: skip
    logprobs = plain_logits(trainer, inputs).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    expected = by_hand(estimator, entropy)
    found = inputs["advantages"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert sum(len(set(row[m].tolist())) > 1 for row, m in zip(found, padded(MASKS).bool(), strict=True)) >= 4
    mean = [
        a / len(m) for a, m in zip(found.sum(1).tolist(), [[x for x in m if x] for m in MASKS], strict=True)
    ]
    assert list(trainer._logs["advantages"]) == pytest.approx(mean, abs=1e-5)

    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    mask = padded(MASKS).float()
    if truncated:
        mask[2] = 0
    chosen = logprobs.gather(-1, padded(COMPLETIONS)[..., None])[..., 0]
    own = -((chosen - chosen.detach()).exp() * expected * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(own, list(trainer.model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def last_step(completion_ids, **_):
    return [
        [(len(ids) // 2, 0.1 * (ids[0] % 5)), (len(ids) - 1, 0.3)] if len(ids) > 2 else None
        for ids in completion_ids
    ]


@pytest.mark.parametrize("estimator", ["tempo", "pure", "gtpo"])
def test_trains_with_token_credit(estimator, folders, tmp_path):
    """Through TRL's shuffle, slices and accumulation."""
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "temperature": 0.2}
    extra = {"process_reward_func": last_step} if estimator == "pure" else {}
    ours = train(
        GRPOTrainer, folders["qwen2"], tmp_path, {"advantage_estimator": estimator, **extra}, **options
    )
    grpo = train(trl.GRPOTrainer, folders["qwen2"], tmp_path, **options)
    for inputs in ours._buffered_inputs:
        assert inputs["advantages"].shape == inputs["completion_ids"].shape
        assert not bool(inputs["advantages"][inputs["completion_mask"] == 0].any())
    rows = [
        (a[m.bool()], m)
        for i in ours._buffered_inputs
        for a, m in zip(i["advantages"], i["completion_mask"], strict=True)
    ]
    assert any(bool((a != a[0]).any()) for a, _ in rows)
    apart = [
        float((a - b).abs().max())
        for a, b in zip(ours.model.parameters(), grpo.model.parameters(), strict=True)
    ]
    assert max(apart) > 1e-4


def test_rloo(folders, tmp_path):
    _, inputs = scored(tmp_path, folders["qwen2"], {"advantage_estimator": "rloo"})
    expected = rewardops.advantages.rloo(torch.tensor(OUTCOMES), torch.tensor(GROUPS))
    torch.testing.assert_close(inputs["advantages"], expected)


@pytest.mark.parametrize("estimator", ["rloo", *OURS])
def test_unscorable_rows_do_not_count(estimator, folders, tmp_path):
    def some(completion_ids, **_):
        return [None if i in (1, 6) else reward for i, reward in enumerate(outcome(completion_ids))]

    ours = {"advantage_estimator": estimator, **OURS.get(estimator, {})}
    trainer, inputs = scored(tmp_path, folders["qwen2"], ours, rewards=some)
    counted = torch.tensor([i not in (1, 6) for i in range(8)])
    assert not bool(inputs["advantages"][~counted].any())
    if estimator == "rloo":
        expected = rewardops.advantages.rloo(
            torch.tensor(OUTCOMES), torch.tensor(GROUPS), mask=counted[:, None]
        )[:, 0]
    else:
        logprobs = plain_logits(trainer, inputs).log_softmax(-1).detach()
        expected = by_hand(estimator, -(logprobs.exp() * logprobs).sum(-1), counted)
    torch.testing.assert_close(inputs["advantages"], expected, rtol=1e-5, atol=2e-5)


def test_scale_of_tempo(folders, tmp_path):
    for scale, ours in (("batch", "batch_std"), ("none", "none")):
        _, inputs = scored(tmp_path, folders["qwen2"], {"advantage_estimator": "tempo"}, scale_rewards=scale)
        expected = rewardops.tempo_advantages(
            padded(COMPLETIONS),
            torch.tensor(OUTCOMES),
            torch.tensor(GROUPS),
            mask=padded(MASKS),
            eps=1e-4,
            scale=ours,
        )
        torch.testing.assert_close(inputs["advantages"], expected)


# ---- estimators of one's own -------------------------------------------------------------------------------


def test_function(folders, tmp_path):
    seen = []

    def estimator(rollouts: Rollouts):
        seen.append(rollouts)
        lengths = rollouts.mask.sum(1)
        return rewardops.advantages.opo(rollouts.rewards, group_size=rollouts.group_size, lengths=lengths)

    def twice(completion_ids, **_):
        return [None, *(2 * r for r in outcome(completion_ids)[1:])]

    ours = {"advantage_estimator": estimator, "process_reward_func": process}
    trainer, inputs = scored(
        tmp_path, folders["qwen2"], ours, rewards=(outcome, twice), reward_weights=[1.0, 0.25]
    )
    (rollouts,) = seen
    total = torch.tensor([OUTCOMES[0], *(1.5 * r for r in OUTCOMES[1:])])
    torch.testing.assert_close(rollouts.rewards, total)
    assert bool(rollouts.rewards_per_func[0, 1].isnan())
    assert bool(rollouts.scorable.all())
    assert rollouts.reward_weights.tolist() == [1.0, 0.25]
    assert rollouts.group_size == 4
    assert torch.equal(rollouts.completion_ids, padded(COMPLETIONS))
    assert torch.equal(rollouts.mask, padded(MASKS).bool())
    values, ends = step_tensors()
    assert torch.equal(rollouts.process_rewards, values)
    assert torch.equal(rollouts.step_ends, ends)
    logprobs = plain_logits(trainer, inputs).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    inside = padded(COMPLETIONS) > 0
    torch.testing.assert_close(rollouts.entropies()[inside], entropy[inside], rtol=1e-5, atol=1e-5)
    lengths = torch.tensor([sum(m) for m in MASKS])
    expected = rewardops.advantages.opo(total, torch.tensor(GROUPS), lengths=lengths)
    torch.testing.assert_close(inputs["advantages"], expected)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_function_need_not_mask(per_token, folders, tmp_path):
    def some(completion_ids, **_):
        return [None if i == 6 else 1.0 for i in range(8)]

    def estimator(rollouts: Rollouts):
        counted = rollouts.mask if per_token else rollouts.scorable
        return torch.where(counted, 2.0, torch.nan)

    _, inputs = scored(tmp_path, folders["qwen2"], {"advantage_estimator": estimator}, rewards=some)
    counted = torch.arange(8) != 6
    if per_token:
        counted = counted[:, None] & padded(MASKS).bool()
    torch.testing.assert_close(inputs["advantages"], torch.where(counted, 2.0, 0.0))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            lambda rollouts: rollouts.rewards[:3],
            r"advantage_estimator: got shape \[3\], want \[8\] or \[8, 6\]",
        ),
        (lambda rollouts: 1.0, "advantage_estimator: got float"),
        (lambda rollouts: rollouts.rewards / 0, "advantage_estimator: got NaN or infinite"),
    ],
)
def test_what_a_function_returns(estimator, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, folders["qwen2"], {"advantage_estimator": estimator})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[(6, 1.0)]], "ends at token 6 after one at -1 in completion 0"),
        ([[(2, 1.0), (2, 1.0)]], "ends at token 2 after one at 2 in completion 0"),
        ([None] * 5 + [[(2, 1.0)]], "ends at token 2 after one at -1 in completion 5"),  # a tool's
        ([None, [(3, float("nan"))]], "process_reward_func: got nan"),
        ([[(1.0, 2)]], r"process_reward_func: got \(1.0, 2\) in completion 0, want \(end, reward\)"),
        ([None, [(1,)]], r"process_reward_func: got \(1,\) in completion 1, want \(end, reward\)"),
        ([[3, 4]], "process_reward_func: got 3 in completion 0"),
    ],
)
def test_steps_that_are_none(steps, message, folders, tmp_path):
    ours = {
        "advantage_estimator": "pure",
        "process_reward_func": lambda **_: [*steps, *[None] * (8 - len(steps))],
    }
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, folders["qwen2"], ours)


def test_step_rewards_keep_their_digits_under_any_default_dtype():
    written = torch.tensor([[True, True, False]])
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            placed = integration._place([[(0, 0.1), (1, 1 / 3)]], written)
            assert placed.dtype is torch.float32
            assert placed[0, :2].tolist() == torch.tensor([0.1, 1 / 3], dtype=torch.float32).tolist()
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        placed = integration._place([[(1, 0.5)]], written)
    assert placed.device.type == "cpu"


@pytest.mark.parametrize("beside", [False, True])
def test_logits_of_a_model_whose_positions_share_memory(beside):
    """The model returns one row for all positions; the reference's logits are the policy's own memory."""
    row = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.arange(1.0, 7, dtype=torch.float64).view(2, 3)
    labels = torch.tensor([[0, 3, 5, 2], [1, 1, 6, 4]])
    used, exact = (row.clone().requires_grad_() for _ in range(2))
    logits = (used * 1).expand(2, 4, 7)

    def returning(x):
        return lambda **_: types.SimpleNamespace(logits=x)

    reference = returning(logits.detach()) if beside else None
    scored = integration._FromLogits(returning(logits), {}, 1.0, reference)
    out = scored(labels=labels, fused_lm_head=True)
    found = (weights * (out.log_probs + 0.3 * out.entropy)).sum()
    found = found + 2 * (weights * scored.kl[0]).sum() if beside else found
    logp = exact.expand(2, 4, 7).log_softmax(-1)[:, :-1]
    wanted = weights * (logp.gather(-1, labels[:, 1:, None])[..., 0] - 0.3 * (logp.exp() * logp).sum(-1))
    torch.testing.assert_close(found, wanted.sum())  # the KL of equal distributions is 0, with gradient 0
    found.backward()
    wanted.sum().backward()
    torch.testing.assert_close(used.grad, exact.grad)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.0)])
def test_gdpo_leaves_out_missing_rewards_as_trl_does(weights):
    nan = torch.nan
    rewards = torch.tensor([
        [1.0, 0.5, nan], [0.0, nan, nan], [2.0, 1.5, 3.0], [0.5, 0.1, nan],  # the third function: one row only
        [nan, nan, nan], [1.0, 0.2, 1.0], [nan, 0.4, 2.0], [3.0, 0.9, nan],  # a row without any reward
        [0.7, 0.7, 0.7], [0.7, nan, 0.7], [0.7, 0.1, nan], [0.7, 0.3, 0.2],  # equal rewards
    ])  # fmt: skip
    scorable, weight = ~rewards.isnan().all(1), torch.tensor(weights)
    rollouts = types.SimpleNamespace(
        rewards=(rewards * weight).nansum(1), rewards_per_func=rewards, reward_weights=weight, scorable=scorable,
        group_size=4,
    )  # fmt: skip
    found = integration._gdpo(rollouts, eps=1e-4)
    grouped = rewards.double().view(-1, 4, 3)
    centred = grouped - torch.nanmean(grouped, 1, keepdim=True)
    centred = torch.where(centred.abs() < 1e-7, centred * 0, centred)  # rounding errors of equal rewards
    scaled = (centred / (stock_utils.nanstd(grouped, dim=1, keepdim=True) + 1e-4)).view(-1, 3)
    total = (scaled * weight).nansum(1)[scorable]
    wanted = torch.zeros(12, dtype=torch.float64)
    wanted[scorable] = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_as_many_step_lists_as_completions(folders, tmp_path):
    ours = {"advantage_estimator": "pure", "process_reward_func": lambda **_: [None]}
    with pytest.raises(ValueError, match=r"process_reward_func: got 1 results, want 8"):
        scored(tmp_path, folders["qwen2"], ours)


async def later(*_, **__):
    return []


def wants_steps(completions, steps_of):
    """No reward function of TRL: it takes neither the ids nor further columns."""


class NeverBuilt:
    """A model that fails the test where it is looked at: what the arguments say comes first."""


@pytest.mark.parametrize(
    ("ours", "options", "error", "message"),
    [
        ({"advantage_estimator": "ppo"}, {}, ValueError, "advantage_estimator: got 'ppo'"),
        ({"token_stats_from": "x"}, {}, ValueError, "token_stats_from: got 'x'"),
        ({"kl_estimator": "k1"}, {}, ValueError, "kl_estimator: got 'k1'"),
        ({"advantage_estimator": "pure"}, {}, ValueError, "process_reward_func: got None"),
        ({"process_reward_func": later}, {}, TypeError, "process_reward_func: got an async"),
        ({"process_reward_func": 3}, {}, TypeError, "process_reward_func: got int, want a function"),
        (
            {"process_reward_func": wants_steps}, {}, TypeError,
            r"process_reward_func: got a function of \(completions, steps_of\) .*, want a function that takes",
        ),
        ({"advantage_estimator": None}, {}, ValueError, "advantage_estimator: got None, want one of 'grpo'"),
        ({"advantage_estimator": later}, {}, TypeError, "advantage_estimator: got an async function, want"),
        (
            {"advantage_estimator": lambda: 0}, {}, TypeError,
            r"advantage_estimator: got a function of \(\) .*, want a function of one argument, Rollouts",
        ),
        ({"advantage_estimator": len, "advantage_options": {"eps": 0.1}}, {}, ValueError, "advantage_options"),
        ({"advantage_options": ["eps"]}, {}, TypeError, "advantage_options: got list, want a mapping"),
        ({"advantage_options": {"epsilon": 1}}, {}, ValueError, "advantage_options: got 'epsilon' for 'grpo'"),
        ({"advantage_options": {"mask": None}}, {}, ValueError, "advantage_options: got 'mask' for 'grpo', want"),
        (
            {"advantage_estimator": "gtpo", "advantage_options": {"td_scale": "none"}}, {}, ValueError,
            "advantage_options: got 'td_scale' for 'gtpo', want some of 'alpha1'",
        ),
        ({"kl_estimator": "exact"}, {}, ValueError, "got 'exact' with beta=0"),
        (
            {"advantage_estimator": "tempo"}, {"multi_objective_aggregation": "normalize_then_sum"}, ValueError,
            "multi_objective_aggregation: got 'normalize_then_sum' with advantage_estimator='tempo'",
        ),
        (
            {"advantage_options": {"scale": "none"}}, {"multi_objective_aggregation": "normalize_then_sum"},
            ValueError, "advantage_options: got 'scale' for 'grpo', want some of 'eps'",
        ),
        ({}, {"num_generations": 1}, ValueError, "at least 2 generations"),
    ],
)  # fmt: skip
def test_errors(ours, options, error, message, folders, tmp_path):
    with pytest.raises(error, match=message):
        make(GRPOTrainer, folders["qwen2"], tmp_path, ours, **options)


@pytest.mark.parametrize(
    ("estimator", "option", "error", "message"),
    [
        ("grpo", {"eps": -1}, ValueError, "eps: got -1, want"),
        ("grpo", {"ddof": 2}, ValueError, "ddof: got 2, want 0 or 1"),
        ("grpo", {"scale": "max"}, ValueError, "scale: got 'max', want one of"),
        ("grpo", {"baseline": 1.5}, ValueError, "baseline: got 1.5, want"),
        ("grpo", {"singleton": "raw", "scale": "batch_std"}, ValueError, "singleton: got 'raw' with"),
        ("rloo", {"singleton": "x"}, ValueError, "singleton: got 'x', want one of"),
        ("tempo", {"td_scale": "x"}, ValueError, "td_scale: got 'x', want one of"),
        ("tempo", {"masked": "step"}, ValueError, "masked: got 'step', want one of"),
        ("gtpo", {"alpha1": "1"}, TypeError, "alpha1: got str, want"),
        ("gtpo", {"entropy_floor": -1.0}, ValueError, "entropy_floor: got -1.0, want"),
        ("pure", {"gamma": 2}, ValueError, "gamma: got 2, want"),
        ("pure", {"baseline": "mean"}, ValueError, "baseline: got 'mean', want one of"),
    ],
)
def test_values_of_options_are_checked_at_construction(estimator, option, error, message, folders, tmp_path):
    ours = {"advantage_estimator": estimator, "advantage_options": option}
    ours |= {"process_reward_func": process} if estimator == "pure" else {}
    with pytest.raises(error, match=f"^advantage_options.{message}"):
        make(GRPOTrainer, folders["qwen2"], tmp_path, ours)


@pytest.mark.parametrize("ours", [{"advantage_estimator": "x"}, {"advantage_options": {"x": 1}}])
def test_names_are_checked_before_the_model_is_looked_at(ours):
    with pytest.raises(ValueError, match="got 'x'"):
        GRPOTrainer(NeverBuilt(), **ours)


def test_every_option_of_an_estimator_is_one_of_its_op(folders, tmp_path):
    """With the values of the op's own signature."""
    values = {
        "baseline": {"grpo": "median", "pure": "step"}, "scale": "none", "eps": 0.1, "ddof": 0, "singleton": "zero",
        "alpha1": 0.9, "alpha2": 0.1, "positive": 0.5, "entropy_floor": 0.1, "joint": True, "temperature": 0.5,
        "gamma": 0.9, "outcome_weight": 0.5, "separators": True, "td_scale": "none", "masked": "skip",
    }  # fmt: skip
    for estimator, names in integration._OPTIONS.items():
        options = {name: values[name] for name in names}
        options |= {"baseline": values["baseline"][estimator]} if "baseline" in options else {}
        ours = {"advantage_estimator": estimator, "advantage_options": options}
        make(GRPOTrainer, folders["qwen2"], tmp_path, {**ours, "process_reward_func": process})


def test_a_ratio_per_sequence_is_told(folders, tmp_path):
    with pytest.warns(UserWarning, match="importance_sampling_level='sequence'"):
        make(
            GRPOTrainer, folders["qwen2"], tmp_path, {"advantage_estimator": "tempo"},
            importance_sampling_level="sequence", loss_type="grpo",
        )  # fmt: skip


def test_importing_the_package_imports_no_framework():
    code = "import rewardops, sys; assert not {'trl', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- memory ------------------------------------------------------------------------------------------------


def peak_bytes(fn) -> int:
    """The most that torch had allocated on the CPU at once while ``fn`` ran, beyond what there was before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        top = max(top, held)
    return top


def test_peak_memory_of_a_step(tmp_path):
    """Loss and gradient of 8 completions of 64 tokens, vocabulary 32768: [tokens, vocabulary] is 64 MiB."""
    folder = save(tmp_path / "large", vocab_size=32768)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(2, 32768, (8, 64), generator=generator).tolist()
    peaks = {}
    for name, cls, ours in (
        ("TRL", trl.GRPOTrainer, {}),
        ("rewardops, hidden", GRPOTrainer, {}),
        ("rewardops, logits", GRPOTrainer, {"token_stats_from": "logits"}),
    ):
        trainer = make(
            cls, folder, tmp_path, ours, rollout_func=rollout(completions), max_completion_length=64
        )  # fmt: skip
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._generate_and_score_completions(
            [{"prompt": p} for p in PROMPTS[:2] for _ in range(4)]
        )
        trainer._compute_loss(trainer.model, inputs).backward()  # gradients are there from here on
        peaks[name] = peak_bytes(lambda t=trainer, i=inputs: t._compute_loss(t.model, i).backward())
    print(json.dumps({name: round(peak / 2**20, 1) for name, peak in peaks.items()}), "MiB")
    logits = 4 * 8 * 64 * 32768
    # The workspace of 32 MiB, a gradient of the head beside the one that it is added to, and the model's own.
    assert peaks["rewardops, hidden"] < logits
    assert logits < peaks["rewardops, logits"] < 3 * logits
    assert peaks["rewardops, hidden"] < peaks["TRL"]


# ---- two processes -----------------------------------------------------------------------------------------

# One group of eight, half of it here and half there, of unlike widths.
HALVES = [0, 1, 3, 4, 2, 5, 6, 7]


def one_of_two(folder: Path, out: Path) -> None:
    """What each of the processes runs."""
    rows = [COMPLETIONS[i] for i in HALVES], [MASKS[i] for i in HALVES]
    small = {"per_device_train_batch_size": 4, "num_generations": 8, "rollout_func": rollout(*rows)}
    for name, ours in OURS.items():
        trainer, inputs = scored(out, folder, {"advantage_estimator": name, **ours}, prompts=4, **small)
        torch.save(inputs["advantages"], out / f"{name}.{trainer.accelerator.process_index}.pt")
    for source in ("hidden", "logits"):
        options = {"beta": 0.1, "per_device_train_batch_size": 2, "max_steps": 2}
        stock = train(trl.GRPOTrainer, folder, out, **options)
        assert_same_training(stock, train(GRPOTrainer, folder, out, {"token_stats_from": source}, **options))
    exact = {"kl_estimator": "exact"}
    assert train(GRPOTrainer, folder, out, exact, **options).state.log_history[1]["kl"] > 0
    torch.distributed.barrier()
    sys.stdout.flush()
    # Without destructors: gloo's joins its thread with the interpreter held, which the thread may be waiting for.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes(folders, tmp_path):
    """Groups that are on several processes, and DDP."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    subprocess.run([*launch, str(folders["qwen2"]), str(tmp_path)], check=True, timeout=150)
    model = make(GRPOTrainer, folders["qwen2"], tmp_path)
    for name in OURS:
        halves = [torch.load(tmp_path / f"{name}.{process}.pt") for process in (0, 1)]
        assert [half.shape for half in halves] == [(4, 5), (4, 6)]
        found = torch.cat([torch.nn.functional.pad(halves[0], (0, 1)), halves[1]])[
            torch.tensor(HALVES).argsort()
        ]
        entropy = None
        if name == "gtpo":
            prompt = torch.tensor([model.processing_class(PROMPTS[0])["input_ids"]]).expand(8, -1)
            inputs = {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": padded(COMPLETIONS),
            }
            logprobs = plain_logits(model, inputs).log_softmax(-1).detach()
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        expected = by_hand(name, entropy, labels=[0] * 8)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]), Path(sys.argv[2]))
