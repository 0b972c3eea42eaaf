"""GRPO on a Hugging Face causal LM: sample, reward, and a loss made of the ops.

Shows: token_stats, group_advantages and token_kl around a model of transformers, with a frozen reference model.
Needs: transformers. The model is a small Llama with random weights, made from its config: nothing is downloaded.
Takes: less than 10 seconds on a CPU, half of which are imports.
"""

from __future__ import annotations

import copy

import torch
import transformers

import rewardops as ro

PROMPTS, GROUP_SIZE, PROMPT_TOKENS, NEW_TOKENS, VOCAB = 4, 8, 4, 12, 32
PAD, EOS = 0, 1
BETA = 0.02  # weight of the KL to the reference
STEPS = 25


def tiny_model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sample(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids ``[B, T]`` of prompts and completions, the mask of the completions, and the prompt of each row."""
    prompts = torch.randint(2, VOCAB, (PROMPTS, PROMPT_TOKENS)).repeat_interleave(GROUP_SIZE, 0)
    with torch.no_grad():
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0
        )  # fmt: skip
    ended = (ids == EOS).cumsum(1) - (ids == EOS).long()  # 0 up to the end token, that one included
    mask = (ended == 0) & (torch.arange(ids.shape[1]) >= PROMPT_TOKENS)
    return ids, mask, torch.arange(PROMPTS).repeat_interleave(GROUP_SIZE)


def reward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The share of even tokens in each completion: something that a model learns in a few steps."""
    return ro.row_mean((ids % 2 == 0).float(), mask=mask)


def grpo_loss(logprob, ref_logprob, rewards, prompts, mask) -> torch.Tensor:
    """The loss from log-probabilities ``[B, T]`` on. A masked token is 0 in each op, whatever its logits."""
    advantages = ro.group_advantages(rewards, prompts, mask=mask)
    kl = ro.token_kl(logprob, ref_logprob, estimator="k3", mask=mask)
    ratio = (
        logprob - logprob.detach()
    ).exp()  # 1, as the samples are the policy's own; its gradient is not 0
    return (BETA * kl - ratio * advantages).sum() / mask.sum()


def main() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        ids, mask, prompts = sample(model)
        rewards = reward(ids, mask)
        tokens, mask = ids[:, 1:], mask[:, 1:]  # the logits at a position are of the next token
        with torch.no_grad():
            ref_logprob = ro.token_stats(reference(ids).logits[:, :-1], tokens, mask=mask).logprob
        stats = ro.token_stats(
            model(ids).logits[:, :-1], tokens, mask=mask
        )  # a view of the logits, read once
        loss = grpo_loss(stats.logprob, ref_logprob, rewards, prompts, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 6 == 0:
            entropy = (stats.entropy.sum() / mask.sum()).item()
            print(f"step {step:2}: reward {rewards.mean():.2f}, loss {loss:+.4f}, entropy {entropy:.2f} nats")


if __name__ == "__main__":
    main()
