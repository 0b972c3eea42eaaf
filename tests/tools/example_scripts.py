"""The scripts in `examples/`: where each is run, and what it has to print."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_blocks import ROOT, run_script

PRINTED = {
    "system": {
        "check_my_kernel.py": [r"the sound kernel: \d+ cases", r"the faulty kernel: \d+ faults", "its budget"],
        "read_rollouts.py": [r"GRPO +-0\.9", r"TEMPO +-1\.2", "mean reward: 0.500", r"tree\.svg", r"credit\.html"],
    },
    "integrations": {
        "grpo_hf.py": [r"step 24: reward 0\.\d+, loss"],
        "grpo_hidden_states.py": ["linear_token_stats: loss", "linear_token_loss: loss"],
        "trl_grpo.py": [r"advantage_options\.td_scale: got 'grup', want one of 'group'", "step 15: reward"],
        "verl_estimators.py": ["estimators", r"algorithm\.rewardops\.eps: got -1\.0", r"reads \{'responses'\}"],
        "torchrl_returns.py": ["GAE, advantages: .* apart", "TD.lambda.*: .* apart", "gamma: got 99, want"],
    },
}  # fmt: skip


def run(name: str, place: str, folder: Path) -> str:
    """Run a script, check what it prints, and that each file whose path it prints was written."""
    out = run_script(ROOT / "examples" / name, folder)
    for pattern in PRINTED[place][name]:
        assert re.search(pattern, out), (pattern, out)
    for path in re.findall(rf"{re.escape(str(folder))}\S+", out):
        assert Path(path).stat().st_size > 1000
    # A policy that is trained gets better.
    rewards = [float(reward) for reward in re.findall(r"^step +\d+: reward (\S+),", out, flags=re.M)]
    assert not rewards or rewards[-1] > rewards[0] + 0.2
    return out
