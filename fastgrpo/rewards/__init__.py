"""The rewards by name; others are added as module:Class."""

from __future__ import annotations

import importlib

from fastgrpo.config import RewardSpec
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.rewards.base import Reward, Scores

REGISTERED = {"shapes": "fastgrpo.rewards.shapes:ShapesReward"}

__all__ = ["REGISTERED", "Reward", "Scores", "available", "load_reward"]


def available() -> list[str]:
    """The registered names."""
    return sorted(REGISTERED)


def load_reward(spec: RewardSpec) -> Reward:
    """The reward of a config entry. Raises ConfigError for an unknown name, a failing import or bad options."""
    target = REGISTERED.get(spec.name, spec.name)
    module, colon, attribute = target.partition(":")
    if not colon:
        names = ", ".join(available())
        raise ConfigError(
            f"rewards: unknown reward '{spec.name}'; {nearest(spec.name, REGISTERED)}(one of: {names}, or module:Class)"
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards: '{spec.name}' cannot be imported: {error}") from None
    try:
        return factory(**spec.options)
    except TypeError as error:
        raise ConfigError(f"rewards: '{spec.name}' does not take its options: {error}") from None
