"""Rollouts from a JSON-lines file: several credit assignments, in numbers and drawn token by token.

Shows: group_advantages, tempo_advantages and the PURE and GTPO presets on ragged responses with rewards of steps
    and entropies; the prefix tree of their group, and each token's credit, as drawings.
Needs: nothing but rewardops; the file is written here. For a file of yours there is
    `python -m rewardops.demo --rollouts FILE`, which draws the same page.
Takes: about 3 seconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

import rewardops as ro
from rewardops.demo.rollouts import report

# The fields of a line of the file: group, reward, tokens (or response, a text), and where there are any,
# step_rewards, one for each line of the response, and entropy or logprobs, one for each token.
RESPONSES = [
    ("12 + 30\n= 42\n", 1.0, [1.0, 1.0]),
    ("12 + 30\n= 32\n", 0.0, [1.0, 0.0]),
    ("12 + 3\n= 15\n", 0.0, [0.0, 1.0]),
    ("42\n", 1.0, [1.0]),
]


def write(path: Path) -> None:
    torch.manual_seed(0)
    with path.open("w") as file:
        for text, reward, steps in RESPONSES:
            tokens = list(text)  # a token for each character
            entropy = (2 * torch.rand(len(tokens))).tolist()
            record = {
                "group": "12 + 30",
                "reward": reward,
                "tokens": tokens,
                "step_rewards": steps,
                "entropy": entropy,
            }
            file.write(json.dumps(record) + "\n")


def padded(rows: list[list], dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def credit(records: list[dict], folder: Path) -> None:
    """What a training loop does with a batch; here in numbers, and as a drawing of the prefix tree."""
    ids = padded([[ord(piece) for piece in record["tokens"]] for record in records], torch.int64)
    mask = ids > 0
    rewards = torch.tensor([record["reward"] for record in records])
    groups = [record["group"] for record in records]  # strings will do
    entropy = padded([record["entropy"] for record in records], torch.float32)
    ends = ids == ord("\n")  # a step is a line
    of_steps = torch.tensor([reward for record in records for reward in record["step_rewards"]])
    steps = torch.zeros(ids.shape).masked_scatter(ends, of_steps)
    assignments = {
        "GRPO": ro.group_advantages(rewards, groups, mask=mask),
        "TEMPO": ro.tempo_advantages(ids, rewards, groups, mask=mask),
        "PURE": ro.advantages.pure(steps, ends, groups, mask=mask, separators=True),
        "GTPO": ro.advantages.gtpo(rewards, entropy, groups, mask=mask, joint=True),
    }
    print(f"the second response, {''.join(records[1]['tokens'])!r}, a number for each token:")
    for name, advantages in assignments.items():
        print(f"  {name:5}", *(f"{a:+.1f}" for a in advantages[1][mask[1]].tolist()))
    tree = ro.PrefixTree.from_tokens(ids, groups, mask=mask, rewards=rewards)
    (folder / "tree.svg").write_text(tree.to_svg(lambda tokens: "".join(map(chr, tokens))))
    print(f"the prefix tree of its group: {folder / 'tree.svg'}")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="rewardops-"))
    path = folder / "rollouts.jsonl"
    write(path)
    credit([json.loads(line) for line in path.open()], folder)
    page, facts = report(path, (), 1)
    (folder / "credit.html").write_text(page)
    print(*facts, f"the credit of every token: {folder / 'credit.html'}", sep="\n")


if __name__ == "__main__":
    main()
