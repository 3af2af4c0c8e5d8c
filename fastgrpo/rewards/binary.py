"""A threshold on any other reward: 1 at or above it, 0 below. Sparse by nature (DanceGRPO, arXiv 2505.07818)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.rewards.base import Reward, Scores, ask, describe, release
from fastgrpo.rewards.neural import options


class BinaryReward:
    """Hit or miss of another reward. of: that reward, as in the config; component: one of its components instead.

    threshold: absolute; or percentile: of the scores in `reference`, an evaluation of another run
    (`runs/base/eval/000000.json`), which must have scored the same reward. Component `<reward>`: the score itself.
    """

    @options
    def __init__(
        self,
        of: dict[str, Any],
        threshold: float | None = None,
        percentile: float | None = None,
        reference: str | None = None,
        component: str | None = None,
    ) -> None:
        from fastgrpo.rewards import load_reward

        spec = validate_settings(RewardSpec, of, "of")
        self.name = f"{spec.key}.{component}" if component else spec.key
        self.component = component
        self.reward: Reward = load_reward(spec)
        if (threshold is None) == (percentile is None) or (percentile is None) != (reference is None):
            raise ConfigError("threshold: give either threshold, or percentile and reference")
        if threshold is not None:
            self.threshold = float(threshold)
        else:
            assert percentile is not None
            assert reference is not None
            self.threshold = percentile_of(Path(reference), self.name, percentile)

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        inner = ask(self.reward, samples, prompts, fps)
        if self.component is None:
            values = inner.values
        elif self.component in inner.components:
            values = inner.components[self.component]
        else:
            raise ConfigError(f"component: {self.name} is not among {', '.join(inner.components) or 'none'}")
        hits = np.where(np.isfinite(values), values >= self.threshold, np.nan)
        return Scores(hits, inner.valid, {self.name.replace(".", "_"): values}, inner.asked)

    def describe(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[str]:
        """What the reward sees in the samples."""
        return describe(self.reward, samples, prompts)

    def release(self) -> None:
        release([self.reward])


def percentile_of(path: Path, name: str, percentile: float) -> float:
    """The percentile of a reward's scores in an evaluation's JSON. Raises ConfigError."""
    if not 0 <= percentile <= 100:
        raise ConfigError(f"percentile: {percentile:g} is not between 0 and 100")
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"reference: {path} is not an evaluation with the scores of its samples: {error}") from None
    if name not in scores:
        raise ConfigError(f"reference: {path} has no '{name}'; {nearest(name, scores)}(one of: {', '.join(scores)})")
    values = np.array([v for v in scores[name] if v is not None], dtype=np.float64)
    if len(values) == 0:
        raise ConfigError(f"reference: {path} has no valid score of '{name}'")
    return float(np.percentile(values, percentile))
