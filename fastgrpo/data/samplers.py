"""Which prompts an iteration draws: seeded permutations, or by the spread of their recent rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt


class PromptSampler:
    """Which prompts each iteration rolls out: a pure function of (seed, iteration), so a resumed run continues it.

    An epoch is a fresh permutation of the prompts, cut into whole iterations; what is left over at its end is not
    used that epoch. The prompts of one iteration are distinct, unless there are fewer prompts than it takes: then
    each occurs equally often, to within one.
    """

    def __init__(self, count: int, per_iteration: int, seed: int) -> None:
        if count < 1 or per_iteration < 1:
            raise ValueError(f"count and per_iteration must be at least 1, not {count} and {per_iteration}")
        self.count, self.per_iteration, self.seed = count, per_iteration, seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, iteration: int) -> np.ndarray:
        """Indices [per_iteration] (int64) of the prompts of `iteration`, which counts from 0."""
        iterations = self.count // self.per_iteration
        if iterations:
            epoch, slot = divmod(iteration, iterations)
            return self._permutation(epoch)[slot * self.per_iteration : (slot + 1) * self.per_iteration].copy()
        rounds = -(-self.per_iteration // self.count)
        drawn = [self._permutation(iteration * rounds + i) for i in range(rounds)]
        return np.concatenate(drawn)[: self.per_iteration]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._cached = epoch, order.astype(np.int64)
        return self._cached[1]


class SpreadSampler(PromptSampler):
    """Prompts drawn by the recent spread of their groups' rewards: where all samples score alike, nothing is learned.

    What an iteration draws follows from (seed, iteration) and the spreads observed before it, which a checkpoint keeps.
    A prompt not seen yet counts as much as the widest one; every prompt keeps a share of `FLOOR` of the mean.
    """

    FLOOR = 0.2
    # Weight of the newest observation of a prompt.
    RECENT = 0.5

    def __init__(self, count: int, per_iteration: int, seed: int) -> None:
        super().__init__(count, per_iteration, seed)
        self.spread = np.full(count, np.nan)

    def at(self, iteration: int) -> np.ndarray:
        if self.count <= self.per_iteration:
            return super().at(iteration)
        seen = self.spread[~np.isnan(self.spread)]
        spread = np.where(np.isnan(self.spread), seen.max(initial=1e-8), self.spread)
        weight = spread + self.FLOOR * max(spread.mean(), 1e-8)
        # The largest of log-weights with Gumbel noise: draws without replacement in proportion to the weights.
        gumbel = np.random.default_rng([self.seed, iteration]).gumbel(size=self.count)
        return np.argsort(-(np.log(weight) + gumbel), kind="stable")[: self.per_iteration].astype(np.int64)

    def observe(self, indices: np.ndarray, spread: np.ndarray) -> None:
        """Takes in the spread (standard deviation of rewards, NaN where none was scored) of prompts' groups."""
        for index, value in zip(indices, spread, strict=True):
            if not np.isnan(value):
                before = self.spread[index]
                self.spread[index] = value if np.isnan(before) else before + self.RECENT * (value - before)


def prompts_to_come(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts that a run will draw: all of them, where their rewards decide."""
    sampler = prompt_sampler(config, len(prompts))
    if isinstance(sampler, SpreadSampler):
        return list(prompts)
    drawn = {i for n in range(config.train.iterations) for i in sampler.at(n).tolist()}
    return [prompts[i] for i in sorted(drawn)]


def prompt_sampler(config: Config, count: int) -> PromptSampler:
    """Returns the sampler that prompts.select names, over `count` prompts."""
    kind = SpreadSampler if config.prompts.select == "spread" else PromptSampler
    return kind(count, config.rollout.prompts_per_iteration, config.run.seed)
