"""torchrl with rewardops: its value estimators by one scan over time, without a change to their code.

Shows: rewardops.integrations.torchrl.patch(): GAE and TD(lambda) of torchrl before and after, with the same
    numbers; a discount that is out of range is an error as the estimator is built.
Needs: torchrl (with tensordict).
Takes: less than 10 seconds on a CPU, nearly all of which are imports.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE, TDLambdaEstimator

import rewardops.integrations.torchrl as integration

ROWS, STEPS = 16, 128


def rollouts() -> TensorDict:
    """Trajectories that end within a row, some by termination, the others cut off."""
    torch.manual_seed(0)
    done = torch.rand(ROWS, STEPS, 1) < 0.05
    terminated = done & (torch.rand(ROWS, STEPS, 1) < 0.5)
    after = {"obs": torch.randn(ROWS, STEPS, 3), "reward": torch.randn(ROWS, STEPS, 1)}
    after |= {"done": done, "terminated": terminated}
    return TensorDict(
        {"obs": torch.randn(ROWS, STEPS, 3), "done": done, "terminated": terminated, "next": after},
        batch_size=(ROWS, STEPS), names=[None, "time"],
    )  # fmt: skip


def critic() -> TensorDictModule:
    torch.manual_seed(1)
    return TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])


def estimates() -> dict[str, torch.Tensor]:
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=critic())
    td = TDLambdaEstimator(gamma=0.99, lmbda=0.95, value_network=critic())
    by_gae, by_td = gae(rollouts()), td(rollouts())
    return {
        "GAE, advantages": by_gae["advantage"],
        "GAE, targets of the values": by_gae["value_target"],
        "TD(lambda), targets of the values": by_td["value_target"],
    }


def main() -> None:
    theirs = estimates()
    undo = integration.patch()  # once, anywhere before the training; undo() restores torchrl's functions
    ours = estimates()
    for name, wanted in theirs.items():
        apart = (ours[name] - wanted).abs().max().item()
        print(f"{name}: {apart:.1e} apart, of numbers up to {wanted.abs().max():.2f}")
        torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-4)
    try:
        GAE(gamma=99, lmbda=0.95, value_network=critic())
    except ValueError as error:
        print(f"a wrong discount: {error}")
    undo()


if __name__ == "__main__":
    main()
