"""Warm-up, sampling and updates, with the time of the ops and of the model measured separately."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rewardops

from ..recipes import RECIPES, Rollouts
from . import task
from .policy import Policy

Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the default sizes suit two CPU cores."""

    seed: int = 0
    updates: int = 300
    prompts: int = 32
    group_size: int = 8
    digits: int = 3
    width: int = 64
    layers: int = 2
    heads: int = 4
    learning_rate: float = 4e-4
    temperature: float = 1.0
    kl: float = 1e-3
    warmup_batch: int = 128
    warmup_rate: float = 3e-3
    warmup_most: int = 1500
    warmup_until: float = 0.35
    """The held-out accuracy at which the warm-up ends: high enough for a reward signal, low enough to leave room."""
    held_out: int = 256
    evaluate_every: int = 15

    @property
    def prompt_length(self) -> int:
        return 2 * self.digits + 2

    @property
    def response_length(self) -> int:
        return 9 * self.digits + self.digits + 3


QUICK = Settings(
    updates=3, prompts=4, group_size=4, digits=2, width=32, layers=1, warmup_batch=32, warmup_most=40,
    held_out=16, evaluate_every=1,
)  # fmt: skip


@dataclass
class Clock:
    """Seconds by activity."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


@dataclass
class Result:
    """The results of a run of one recipe."""

    recipe: str
    before: float
    after: float
    clock: Clock
    curves: dict[str, list[tuple[int, float]]]
    """Points (update, value) of each quantity."""
    sample: Rollouts
    """One group of the trained policy; its log-probabilities and advantages follow."""
    logprob: Tensor
    advantages: Tensor
    problem: task.Problem


def prompts_of(problems: list[task.Problem]) -> Tensor:
    return torch.tensor([task.encode(p.prompt) for p in problems], dtype=torch.int64, device="cpu")


def responses_of(ids: Tensor, prompt_length: int) -> list[str]:
    """The text of each response, up to its end mark."""
    texts = []
    for row in ids[:, prompt_length:].tolist():
        length = row.index(task.END) + 1 if task.END in row else len(row)
        texts.append(task.decode([i for i in row[:length] if i != task.PAD]))
    return texts


def accuracy(policy: Policy, problems: list[task.Problem], s: Settings) -> float:
    """Share of problems answered correctly by greedy decoding."""
    ids = policy.sample(prompts_of(problems), s.response_length, 0.0)
    texts = responses_of(ids, s.prompt_length)
    return sum(task.check(p, t).right for p, t in zip(problems, texts, strict=True)) / len(problems)


def warm_up(s: Settings, held_out: list[task.Problem], progress: Progress) -> tuple[Policy, float]:
    """Supervised learning on worked solutions, stopped early; returns the policy and its accuracy."""
    torch.manual_seed(s.seed)
    policy = Policy(s.width, s.layers, s.heads, s.prompt_length + s.response_length)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.warmup_rate, weight_decay=0.01)
    reached = 0.0
    for step in progress(range(s.warmup_most), "warm-up"):
        batch = task.problems(s.warmup_batch, s.digits, s.seed * 100_003 + step)
        rows = [task.encode(p.prompt + p.solution) for p in batch]
        longest = max(map(len, rows))
        padded = [row + [task.PAD] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64, device="cpu")
        target = ids[:, s.prompt_length :]
        logits = policy(ids[:, :-1])[:, s.prompt_length - 1 :]
        stats = rewardops.token_stats(logits, target, mask=target != task.PAD, outputs=("logprob",))
        assert stats.logprob is not None
        loss = -stats.logprob.sum() / (target != task.PAD).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            reached = accuracy(policy, held_out, s)
            if reached >= s.warmup_until:
                break
    return policy, reached


def roll_out(policy: Policy, problems: list[task.Problem], s: Settings, generator: torch.Generator) -> Tensor:
    """Sampled responses: ids ``[B, P + T]``, in contiguous groups."""
    prompts = prompts_of(problems).repeat_interleave(s.group_size, 0)
    return policy.sample(prompts, s.response_length, s.temperature, generator)


def judge(ids: Tensor, problems: list[task.Problem], s: Settings) -> Rollouts:
    """Check every response and its steps."""
    tokens = ids[:, s.prompt_length :]
    rewards = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    step_rewards = torch.zeros(tokens.shape, dtype=torch.float32, device=ids.device)
    step_ends = torch.zeros(tokens.shape, dtype=torch.bool, device=ids.device)
    for b, text in enumerate(responses_of(ids, s.prompt_length)):
        verdict = task.check(problems[b // s.group_size], text)
        rewards[b] = float(verdict.right)
        step_rewards[b, verdict.ends] = torch.tensor(
            verdict.step_rewards, dtype=torch.float32, device=ids.device
        )
        step_ends[b, verdict.ends] = True
    mask = tokens != task.PAD
    groups = torch.arange(len(ids), dtype=torch.int64, device=ids.device) // s.group_size
    return Rollouts(tokens, mask, groups, rewards, step_rewards, step_ends)


def with_entropy(r: Rollouts, entropy: Tensor) -> Rollouts:
    return Rollouts(r.tokens, r.mask, r.groups, r.rewards, r.step_rewards, r.step_ends, entropy)


def reinforce(
    start: Policy, recipe: str, s: Settings, held_out: list[task.Problem], before: float, progress: Progress
) -> Result:
    """Train a copy of the warmed-up policy by one recipe."""
    policy, reference = copy.deepcopy(start), copy.deepcopy(start).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=s.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    generator = torch.Generator("cpu").manual_seed(s.seed)
    clock = Clock()
    curves: dict[str, list[tuple[int, float]]] = {
        "held-out accuracy, greedy": [(0, before)],
        "reward of samples": [],
        "entropy, nats": [],
    }
    credit = RECIPES[recipe]
    for update in progress(range(1, s.updates + 1), recipe):
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * min(update / 20, 1 - (update - 1) / s.updates)
        problems = task.problems(s.prompts, s.digits, s.seed * 100_003 + 50_021 + update)
        with clock.on("sampling"):
            ids = roll_out(policy, problems, s, generator)
            batch = judge(ids, problems, s)
        tokens, mask = batch.tokens, batch.mask
        with clock.on("model"):
            logits = policy(ids[:, :-1])[:, s.prompt_length - 1 :]
            with torch.no_grad():
                reference_logits = reference(ids[:, :-1])[:, s.prompt_length - 1 :]
        # The graph is cut at the logits to time the backward passes of the ops and of the model separately.
        leaf = logits.detach().requires_grad_()
        with clock.on("ops"):
            stats = rewardops.token_stats(leaf, tokens, temperature=s.temperature, mask=mask)
            assert stats.logprob is not None
            assert stats.entropy is not None
            reference_logprob = rewardops.token_stats(
                reference_logits, tokens, temperature=s.temperature, mask=mask, outputs=("logprob",)
            ).logprob
            assert reference_logprob is not None
            advantages = credit(with_entropy(batch, stats.entropy.detach()))
            kl = rewardops.token_kl(stats.logprob, reference_logprob, mask=mask)
            ratio = (stats.logprob - stats.logprob.detach()).exp()
            loss = (s.kl * kl - ratio * advantages).sum() / mask.sum()
            loss.backward()
        with clock.on("model"):
            optimizer.zero_grad(set_to_none=True)
            logits.backward(leaf.grad)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        curves["reward of samples"].append((update, float(batch.rewards.mean())))
        curves["entropy, nats"].append((update, float(stats.entropy.detach().sum() / mask.sum())))
        if update % s.evaluate_every == 0 or update == s.updates:
            with clock.on("evaluation"):
                curves["held-out accuracy, greedy"].append((update, accuracy(policy, held_out, s)))

    problem, sample, logprob = _telling_group(policy, s, held_out)
    after = curves["held-out accuracy, greedy"][-1][1]
    return Result(recipe, before, after, clock, curves, sample, logprob, credit(sample), problem)


def _telling_group(
    policy: Policy, s: Settings, held_out: list[task.Problem]
) -> tuple[task.Problem, Rollouts, Tensor]:
    """The group with the most mixed outcomes among samples of some held-out problems."""
    problems = held_out[:16]
    ids = roll_out(policy, problems, s, torch.Generator("cpu").manual_seed(s.seed + 1))
    batch = judge(ids, problems, s)
    per_group = batch.rewards.view(len(problems), s.group_size).mean(1)
    best = int((per_group * (1 - per_group)).argmax())
    rows = slice(best * s.group_size, (best + 1) * s.group_size)
    with torch.no_grad():
        logits = policy(ids[rows, :-1])[:, s.prompt_length - 1 :]
        stats = rewardops.token_stats(
            logits, batch.tokens[rows], temperature=s.temperature, mask=batch.mask[rows]
        )
    assert stats.logprob is not None
    assert stats.entropy is not None
    assert batch.step_rewards is not None
    assert batch.step_ends is not None
    sample = Rollouts(
        batch.tokens[rows], batch.mask[rows], batch.groups[rows], batch.rewards[rows],
        batch.step_rewards[rows], batch.step_ends[rows], stats.entropy,
    )  # fmt: skip
    return problems[best], sample, stats.logprob
