"""Rewards that stand over others: one asked for some prompts only, and a weighted sum with routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.config import CompositeOptions
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.base import Reward, Scores, ask, describe, matches, release, take


class Routed:
    """A reward that is asked only for prompts whose metadata matches `when` (per-prompt-type routing)."""

    def __init__(self, reward: Reward, when: Mapping[str, Sequence[Any]]) -> None:
        self.reward, self.when = reward, when

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        chosen = np.array([matches(p, self.when) for p in prompts], dtype=bool)
        if not chosen.any():
            return Scores(np.zeros(len(chosen)), ~chosen, {}, chosen)
        return ask(self.reward, *take(samples, prompts, chosen), fps).scatter(chosen)

    def describe(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """What the reward sees in the samples that it is asked for; of the others nothing."""
        chosen = np.array([matches(p, self.when) for p in prompts], dtype=bool)
        said = iter(describe(self.reward, *take(samples, prompts, chosen)) if chosen.any() else ())
        return [next(said) if asked else "" for asked in chosen]

    def release(self) -> None:
        release([self.reward])


class CompositeReward:
    """Σ weight · score of its parts that were asked; not valid where any of them is not. Components: each part."""

    def __init__(self, of: Any, aggregate: str = "advantage") -> None:
        from fastgrpo.rewards import load_reward

        options = validate_settings(CompositeOptions, {"of": of, "aggregate": aggregate})
        if options.aggregate == "advantage":
            raise ConfigError("aggregate: advantage is for the run's own list of rewards; inside another, use reward")
        self.weights = {spec.key: spec.weight for spec in options.of}
        if len(self.weights) < len(options.of):
            raise ConfigError(f"of: two rewards of one name among {', '.join(self.weights)}; give each a label")
        self.parts = {spec.key: load_reward(spec) for spec in options.of}

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        total, count = np.zeros(len(prompts)), np.zeros(len(prompts), dtype=int)
        valid, components = np.ones(len(prompts), dtype=bool), {}
        for name, reward in self.parts.items():
            part = ask(reward, samples, prompts, fps)
            total += self.weights[name] * part.values
            count += part.asked
            valid &= part.valid
            components[name] = np.where(part.counted, part.values, np.nan)
        return Scores(total, valid, components, count > 0)

    def describe(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """What its parts see in the samples."""
        said = [describe(reward, samples, prompts) for reward in self.parts.values()]
        return ["; ".join(filter(None, texts)) for texts in zip(*said, strict=True)]

    def release(self) -> None:
        release(self.parts.values())
