"""Noise levels, shift, and which steps are stochastic and trained: the plan of one iteration's rollouts.

Everything here is Python floats and numpy on the host; nothing depends on a tensor's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.config import ObjectiveConfig, Rollout, SubsetSteps, WindowSteps
from fastgrpo_kernels import noise, transitions
from fastgrpo_kernels.transitions import Transition


@dataclass(frozen=True)
class RolloutPlan:
    """What each of the T steps does in one iteration.

    sigmas: T + 1 noise levels, descending to 0. transitions: (a, b, s) of every step, s = 0 where deterministic.
    trained: [T, N] bool, sample n trains step t. first_stochastic: steps before it depend on the initial noise
    and the prompt alone.
    """

    sigmas: tuple[float, ...]
    transitions: tuple[Transition, ...]
    trained: np.ndarray
    first_stochastic: int

    @property
    def steps(self) -> int:
        return len(self.transitions)

    @property
    def pairs_per_sample(self) -> int:
        """Trained (sample, step) pairs of each sample; every sample trains equally many steps."""
        return int(self.trained[:, 0].sum())


def shifted(levels: Sequence[float], shift: float) -> list[float]:
    """Noise levels moved towards 1: k·σ/(1 + (k−1)·σ) (SD3, arXiv 2403.03206, eq. 23)."""
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in levels]


def linear_levels(steps: int) -> list[float]:
    """1, 1 − 1/T, …, 1/T, 0: the T + 1 unshifted levels of FLUX, HunyuanVideo and DanceGRPO."""
    return [1.0 - t / steps for t in range(steps)] + [0.0]


def window_start(trained: WindowSteps, steps: int, iteration: int, seed: int) -> int:
    """The first trained step of a window at an iteration; it never reaches the last transition."""
    places = steps - 1 - trained.size + 1
    move = iteration // trained.every
    if trained.move == "progressive":
        return (trained.start + move * trained.stride) % places
    if trained.move == "random":
        return int(np.random.default_rng([seed, noise.STREAM_SUBSET, move]).integers(places))
    return trained.start


def trained_steps(rollout: Rollout, samples: int, iteration: int, seed: int) -> np.ndarray:
    """[T, samples] bool: the transitions that each sample of an iteration trains; never the last one.

    Samples are indexed globally, so the draw is the same on every rank.
    """
    chosen = np.zeros((rollout.steps, samples), dtype=bool)
    if isinstance(rollout.trained, WindowSteps):
        start = window_start(rollout.trained, rollout.steps, iteration, seed)
        chosen[start : start + rollout.trained.size] = True
        return chosen
    candidates = rollout.steps - 1
    count = int(rollout.trained.fraction * candidates)
    draws = np.random.default_rng([seed, noise.STREAM_SUBSET, iteration]).random((samples, candidates))
    picked = np.argsort(draws, axis=1)[:, :count]
    chosen[picked.T, np.arange(samples)] = True
    return chosen


def plan_rollout(
    rollout: Rollout, sigmas: Sequence[float], samples: int, iteration: int, seed: int, deterministic: bool = False
) -> RolloutPlan:
    """The plan of one iteration for `samples` global samples, at the family's noise levels.

    With `deterministic` every step is an ODE step and nothing is trained (evaluation).
    """
    steps = len(sigmas) - 1
    if deterministic:
        trained = np.zeros((steps, samples), dtype=bool)
    else:
        trained = trained_steps(rollout, samples, iteration, seed)
    stochastic = [bool(row.any()) for row in trained]
    if not deterministic and isinstance(rollout.trained, SubsetSteps):
        # Untrained transitions are stochastic too; the last one, to σ = 0, never is.
        stochastic = [True] * (steps - 1) + [False]
    moves = tuple(
        stochastic_transition(rollout.sampler, sigmas[t], sigmas[t + 1], rollout.eta, sigmas[1])
        if stochastic[t]
        else transitions.ode(sigmas[t], sigmas[t + 1])
        for t in range(steps)
    )
    first = stochastic.index(True) if any(stochastic) else steps
    return RolloutPlan(tuple(sigmas), moves, trained, first)


def stochastic_transition(sampler: str, sigma: float, sigma_next: float, eta: float, sigma_max: float) -> Transition:
    """The (a, b, s) of a named sampler's transition; see fastgrpo_kernels.transitions for the formulas."""
    if sampler == "dance_sde":
        return transitions.dance_sde(sigma, sigma_next, eta)
    if sampler == "flow_sde":
        return transitions.flow_sde(sigma, sigma_next, eta, sigma_max)
    return transitions.cps(sigma, sigma_next, eta)


def loss_scale(objective: ObjectiveConfig, plan: RolloutPlan) -> float:
    """The constant a loss is multiplied by: GRPO-Guard divides it by mean(√−Δ)² over the trained steps."""
    if objective.ratio != "ratio_norm":
        return 1.0
    used = np.flatnonzero(plan.trained.any(axis=1))
    gaps = [(plan.sigmas[t] - plan.sigmas[t + 1]) ** 0.5 for t in used]
    return float(1.0 / np.mean(gaps) ** 2)
