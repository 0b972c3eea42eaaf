"""A small policy trained with the ops in the loop, and pictures of rollouts: ``python -m rewardops.demo``."""
