"""The training step of the README, and that of today in docs/step.md, run and agree."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def test_the_step_with_the_ops_is_the_step_as_written_today():
    (block,) = blocks("README.md")
    today, same = blocks("docs/step.md")
    assert same == block
    steps = []
    for code in (block, today):
        scope: dict = {"torch": torch}
        exec(code, scope)
        steps.append(scope["grpo_step"])

    torch.manual_seed(0)
    table = torch.randn(23, 23, requires_grad=True)
    ids = torch.randint(0, 23, (8, 12))
    mask = torch.arange(12) < torch.randint(4, 13, (8, 1))
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 1.0, 0.0])
    groups = torch.tensor([3, 3, 9, 9, 3, 9, 3, 9])
    reference = -torch.rand(8, 11) * 4
    results = []
    for step in steps:
        loss, entropy = step(
            lambda x: SimpleNamespace(logits=table[x]), reference, ids, mask, rewards, groups, beta=0.1
        )
        results.append((loss.detach(), entropy.detach(), torch.autograd.grad(loss, table)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
