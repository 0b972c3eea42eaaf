"""verl with rewardops: one setting selects the estimator, and verl's registry hands it to the trainer.

Shows: the settings of algorithm.adv_estimator=rewardops_..., their check before a training, and the call that
    verl's trainer makes, for an estimator that verl has too and for one that needs the token ids.
Needs: verl and omegaconf; no cluster, as only the advantages are computed.
Takes: less than 10 seconds on a CPU, nearly all of which are imports.
"""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos

from rewardops.integrations.verl import check_config, provide  # verl loads it by itself, as a plugin

# The part of verl's config that `algorithm.adv_estimator=rewardops_grpo +algorithm.rewardops.eps=1e-4 ...` sets.
CONFIG = """
algorithm:
  adv_estimator: rewardops_grpo
  norm_adv_by_std_in_grpo: true
  rewardops: {eps: 1.0e-4, singleton: zero}
actor_rollout_ref:
  rollout: {n: 4}
"""

# Two prompts with four responses each, rewards at the last token, as verl's reward managers write them.
RESPONSES = torch.tensor([
    [5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 3, 0], [5, 4, 2, 0], [7, 7, 7, 7], [7, 7, 2, 0], [7, 3, 3, 0], [8, 8, 0, 0],
])  # fmt: skip
MASK = (RESPONSES > 0).long()
SCORES = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
REWARDS = torch.zeros(8, 4).scatter(1, MASK.sum(1, keepdim=True) - 1, SCORES[:, None])
UIDS = np.array(["first"] * 4 + ["second"] * 4, dtype=object)


def estimate(config) -> torch.Tensor:
    """The call of verl's ``compute_advantage``."""
    estimator = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
    advantages, _ = estimator(
        token_level_rewards=REWARDS, response_mask=MASK, index=UIDS, config=config.algorithm
    )
    return advantages


def show(name: str, advantages: torch.Tensor) -> None:
    rows = ("  ".join(f"{a:+.2f}" for a in row) for row in advantages[:4].tolist())
    print(f"{name}, the first prompt:", *rows, sep="\n    ")


def main() -> None:
    registered = [name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("rewardops_")]
    print(f"{len(registered)} estimators of rewardops in verl's registry")
    config = OmegaConf.create(CONFIG)
    check_config(config)  # verl's validate_config does it, before it starts a worker
    show("rewardops_grpo", estimate(config))

    wrong = OmegaConf.merge(config, {"algorithm": {"rewardops": {"eps": -1.0}}})
    try:
        check_config(wrong)
    except ValueError as error:
        print(f"a wrong option: {error}")

    tempo = OmegaConf.create({"algorithm": {"adv_estimator": "rewardops_tempo"}})
    print(f"rewardops_tempo reads {check_config(tempo)}, which verl passes to no estimator")
    with provide(responses=RESPONSES):  # a v1 trainer with AdvantageInputs does it
        show("rewardops_tempo", estimate(tempo))


if __name__ == "__main__":
    main()
