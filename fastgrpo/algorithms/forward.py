"""The forward process x = α·x̂0 + σ·ε at the noise levels of training rows: which levels, and what a model says there.

Host numbers in float64. A level is a flow's t (α = 1 − t, σ = t) or a diffusion model's ᾱ (α = √ᾱ, σ = √(1−ᾱ)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import TrainingTimes
from fastgrpo.errors import ConfigError

# Continuous levels of a flow stay this far from the clean sample, as AWM's do.
LOWEST = 0.01


@dataclass(frozen=True)
class ForwardLevels:
    """The noise levels of training rows; float64 arrays of one shape.

    Attributes:
        times: What the model is told.
        signal, noise: α and σ of x = α·x̂0 + σ·ε.
        target_noise, target_x0: The output of a perfect model is target_noise·ε + target_x0·x̂0.
        clean: |∂x̂0/∂v| of the clean sample that an output v predicts.
        modules: The pipeline's component that acts, an index into the family's trained ones.
    """

    times: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    target_noise: np.ndarray
    target_x0: np.ndarray
    clean: np.ndarray
    modules: np.ndarray

    @property
    def t(self) -> np.ndarray:
        """The t of a flow with the same signal-to-noise ratio."""
        return self.noise / (self.signal + self.noise)


@dataclass(frozen=True)
class LevelSource:
    """Where the levels of a run's training rows are drawn from.

    Attributes:
        rollout: The levels of the rollout's steps.
        settings: objective.times.
        table: A diffusion model's ᾱ by timestep, float64; None for a flow.
        acting: Which component acts at each of some times, as indices.
    """

    rollout: NoiseLevels
    settings: TrainingTimes
    table: np.ndarray | None
    acting: Callable[[np.ndarray], np.ndarray]

    def draw(self, rows: int, seed: list[int]) -> ForwardLevels:
        """Draws `settings.count` levels for each of so many samples (or pairs), [rows, count].

        Args:
            rows: All of them, of every rank.
            seed: Of the draw; the same on every rank.

        Raises:
            ConfigError: Where the rollout has fewer levels than are to be drawn.
        """
        generator, settings = np.random.default_rng(seed), self.settings
        if settings.draw in ("levels", "strata"):
            chosen = self._of_steps(rows, generator)
            level, times = np.array(self.rollout.start)[chosen], np.array(self.rollout.times)[chosen]
        else:
            times = level = self._continuous(rows, generator)
            if self.table is not None:
                times = np.minimum((level * len(self.table)).astype(np.int64), len(self.table) - 1).astype(np.float64)
                level = self.table[times.astype(np.int64)]
        return forward_levels(level, times, self.rollout.prediction, self.acting(times))

    def _of_steps(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        """Indices of steps, [rows, count]."""
        settings = self.settings
        t = forward_levels(np.array(self.rollout.start), np.zeros(self.rollout.steps), self.rollout.prediction).t
        steps = np.flatnonzero((t >= settings.low) & (t <= settings.high))
        if len(steps) < settings.count:
            raise ConfigError(
                f"objective.times.count: {settings.count} levels cannot be drawn from the {len(steps)} of the rollout "
                "that lie between objective.times.low and high; lower it, or raise rollout.steps"
            )
        if settings.draw == "levels":
            return steps[np.argsort(generator.random((rows, len(steps))), axis=1)[:, : settings.count]]
        edges = np.floor(np.linspace(0, len(steps), settings.count + 1)).astype(np.int64)
        share = (generator.random((rows, settings.count)) * np.diff(edges)).astype(np.int64)
        return steps[edges[:-1] + share]

    def _continuous(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        """Levels in (0, 1], [rows, count], each in its own part of the distribution, in the order of the parts."""
        settings = self.settings
        even = (np.arange(settings.count) + generator.random((rows, settings.count))) / settings.count
        if settings.draw == "uniform":
            drawn = settings.low + even * (settings.high - settings.low)
        else:
            normal = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])(np.clip(even, 1e-7, 1 - 1e-7))
            drawn = 1 / (1 + np.exp(-normal))
        drawn = settings.shift * drawn / (1 + (settings.shift - 1) * drawn)
        if settings.draw == "logit_normal":
            drawn = np.clip(drawn, settings.low, settings.high)
        return np.clip(drawn, LOWEST, 1.0)


def forward_levels(
    level: np.ndarray, times: np.ndarray, prediction: str, modules: np.ndarray | None = None
) -> ForwardLevels:
    """What a forward process at some levels comes to.

    Args:
        level: t of a flow, ᾱ of a diffusion model.
        times: What the model is told.
        prediction: What the model says: flow, epsilon, v_prediction or sample.
        modules: Which component acts; None: the first.
    """
    one, none = np.ones_like(level), np.zeros_like(level)
    modules = np.zeros(level.shape, dtype=np.int64) if modules is None else modules
    if prediction == "flow":
        return ForwardLevels(times, 1 - level, level, one, -one, level, modules)
    signal, noise = np.sqrt(level), np.sqrt(1 - level)
    if prediction == "epsilon":
        return ForwardLevels(times, signal, noise, one, none, noise / signal, modules)
    if prediction == "v_prediction":
        return ForwardLevels(times, signal, noise, signal, -noise, noise, modules)
    return ForwardLevels(times, signal, noise, none, one, one, modules)
