"""TRL's GRPOTrainer with rewardops: token-level credit by the name of an estimator.

Shows: rewardops.integrations.trl.GRPOTrainer, a subclass of TRL's: advantage_estimator="tempo" credits the tokens
    at which the completions of a group part, and a wrong option is an error before anything is generated.
Needs: trl (with transformers and datasets). The model and the tokenizer are made here: nothing is downloaded.
Takes: about 10 seconds on a CPU, half of which are imports.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig

from rewardops.integrations.trl import GRPOTrainer  # instead of: from trl import GRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_model() -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def even(completion_ids, **_) -> list[float]:
    """A reward function of TRL: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def trainer(folder: str, **options) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=32, num_generations=8, max_completion_length=10,
        max_steps=15, learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=1, seed=0, report_to="none",
        bf16=False, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    return GRPOTrainer(
        tiny_model(), reward_funcs=even, args=args, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(), **options,
    )  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of names that TRL still uses
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer(folder, advantage_estimator="tempo", advantage_options={"td_scale": "grup"})
        except ValueError as error:
            print(f"before any generation: {error}")
        tempo = trainer(
            folder, advantage_estimator="tempo"
        )  # or "grpo", "rloo", "gtpo", "pure", or a function
        tempo.callback_handler.pop_callback(transformers.PrinterCallback)
        tempo.train()
    logs = [entry for entry in tempo.state.log_history if "reward" in entry]
    for entry in logs[::7]:
        print(f"step {entry['step']:2}: reward {entry['reward']:.2f}, loss {entry['loss']:+.4f}")


if __name__ == "__main__":
    main()
