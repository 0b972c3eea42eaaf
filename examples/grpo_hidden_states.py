"""The step of grpo_hf.py from hidden states: the logits [B, T, V] are never stored, the gradient is the same.

Shows: linear_token_stats, which takes the place of the head and of token_stats, and linear_token_loss, which
    computes the gradient of a policy gradient in the forward pass (three products with the head, not four).
Needs: transformers, and grpo_hf.py beside this file.
Takes: less than 10 seconds on a CPU, most of which are imports.
"""

from __future__ import annotations

import copy

import torch
from grpo_hf import GROUP_SIZE, grpo_loss, reward, sample, tiny_model

import rewardops as ro


def hidden_states(model, ids: torch.Tensor) -> torch.Tensor:
    """The output ``[B, T - 1, D]`` of the backbone, before the head."""
    return model.model(ids).last_hidden_state[:, :-1]


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def report(name: str, loss: torch.Tensor, found, wanted_loss: torch.Tensor, wanted) -> None:
    largest = max(float(g.abs().max()) for g in wanted)
    apart = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    print(f"{name}: loss {loss:+.6f} (from logits {wanted_loss:+.6f}),", end=" ")
    print(f"gradients {apart / largest:.1e} of the largest apart")
    assert apart <= 1e-5 * largest


def main() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for weight in model.parameters():  # away from the reference, so that the KL is not 0
        weight.data += 0.02 * torch.randn(weight.shape)
    ids, mask, prompts = sample(model)
    rewards = reward(ids, mask)
    tokens, mask = ids[:, 1:], mask[:, 1:]
    print(f"{len(ids)} completions in groups of {GROUP_SIZE}, {int(mask.sum())} sampled tokens")

    # The step of grpo_hf.py, on logits [B, T, V].
    with torch.no_grad():
        ref_logprob = ro.token_stats(reference(ids).logits[:, :-1], tokens, mask=mask).logprob
    logprob = ro.token_stats(model(ids).logits[:, :-1], tokens, mask=mask).logprob
    wanted_loss = grpo_loss(logprob, ref_logprob, rewards, prompts, mask)
    wanted = gradients(model, wanted_loss)

    # The same from hidden states: blocks of logits come and go in a small workspace.
    head = model.lm_head.weight
    with torch.no_grad():
        ref_hidden = hidden_states(reference, ids)
        ref_stats = ro.linear_token_stats(ref_hidden, reference.lm_head.weight, tokens, mask=mask)
    stats = ro.linear_token_stats(hidden_states(model, ids), head, tokens, mask=mask)
    loss = grpo_loss(stats.logprob, ref_stats.logprob, rewards, prompts, mask)
    report("linear_token_stats", loss, gradients(model, loss), wanted_loss, wanted)

    # Without the KL of the sampled tokens the loss is linear in the statistics, with factors that are known now.
    logprob = ro.token_stats(model(ids).logits[:, :-1], tokens, mask=mask).logprob
    advantages = ro.group_advantages(rewards, prompts, mask=mask)
    policy_gradient = -(logprob * advantages).sum() / mask.sum()
    factors = {"logprob": -advantages / mask.sum()}
    loss, _ = ro.linear_token_loss(hidden_states(model, ids), head, tokens, factors, mask=mask)
    report(
        "linear_token_loss", loss, gradients(model, loss), policy_gradient, gradients(model, policy_gradient)
    )


if __name__ == "__main__":
    main()
