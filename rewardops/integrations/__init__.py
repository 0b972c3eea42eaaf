"""Integrations: rewardops inside the training frameworks. Nothing here is imported by rewardops itself."""
