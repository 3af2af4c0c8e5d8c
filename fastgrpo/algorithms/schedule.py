"""Noise levels, shift, and which steps are stochastic and trained: the schedule of one iteration's rollouts.

Everything here is Python floats and numpy on the host; nothing depends on a tensor's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastgrpo.config import ObjectiveConfig, Rollout, SubsetSteps, WindowSteps
from fastgrpo.errors import ConfigError
from fastgrpo_kernels import noise, transitions
from fastgrpo_kernels.transitions import Transition

# Samplers of each paradigm; the first is what an error message recommends.
FLOW_SAMPLERS = ("dance_sde", "flow_sde", "cps")
DIFFUSION_SAMPLERS = ("ddim",)


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a sampling run of T steps, as a family's pipeline uses them.

    start, end: [T], where a step begins and ends: σ falling to 0 (flow), or ᾱ rising to the scheduler's final one
    (diffusion). times: [T], what the model is told at each step: σ, or a diffusion timestep. modules: [T], the pipeline
    component that acts there.
    """

    start: tuple[float, ...]
    end: tuple[float, ...]
    times: tuple[float, ...]
    modules: tuple[str, ...]
    prediction: Literal["flow", "epsilon", "v_prediction", "sample"] = "flow"

    @property
    def steps(self) -> int:
        return len(self.times)

    def gap(self, t: int) -> float:
        """The standard deviation of step t's noise at η = 1: √−Δ for a flow, that of DDIM for a diffusion model."""
        now, following = self.start[t], self.end[t]
        if self.prediction == "flow":
            return (now - following) ** 0.5
        return ((1 - following) / (1 - now) * (1 - now / following)) ** 0.5


@dataclass(frozen=True)
class StepSchedule:
    """What each of the T steps does in one iteration.

    times: [T], what the model is told at each step. modules: [T], which component acts. gaps: [T], NoiseLevels.gap.
    transitions: (a, b, s) of every step, s = 0 where deterministic. trained: [T, N] bool, sample n trains step t.
    first_stochastic: steps before it depend on the initial noise and the prompt alone. second_order: [T], the weight of
    the clean sample's change since the step before (transitions.second_order_weight), 0 where a step is of first order.
    clean: [T], (a, b) of the predicted clean sample a·x + b·v.
    """

    times: tuple[float, ...]
    modules: tuple[str, ...]
    gaps: tuple[float, ...]
    transitions: tuple[Transition, ...]
    trained: np.ndarray
    first_stochastic: int
    second_order: tuple[float, ...]
    clean: tuple[tuple[float, float], ...]

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
    """The first trained step of a window at an iteration; it stays in [start, stop) and off the last transition."""
    stop = steps - 1 if trained.stop is None else trained.stop
    places = stop - trained.start - trained.size + 1
    move = iteration // trained.every
    if trained.move == "progressive":
        return trained.start + (move * trained.stride) % places
    if trained.move == "random":
        return trained.start + int(np.random.default_rng([seed, noise.STREAM_SUBSET, move]).integers(places))
    return trained.start


def trained_steps(rollout: Rollout, samples: int, iteration: int, seed: int) -> np.ndarray:
    """[T, samples] bool: the transitions that each sample of an iteration trains; the last one where a subset may.

    Samples are indexed globally, so the draw is the same on every rank.
    """
    chosen = np.zeros((rollout.steps, samples), dtype=bool)
    if isinstance(rollout.trained, WindowSteps):
        start = window_start(rollout.trained, rollout.steps, iteration, seed)
        chosen[start : start + rollout.trained.size] = True
        return chosen
    candidates = rollout.subset_candidates
    count = int(rollout.trained.fraction * candidates)
    draws = np.random.default_rng([seed, noise.STREAM_SUBSET, iteration]).random((samples, candidates))
    picked = np.argsort(draws, axis=1)[:, :count]
    chosen[picked.T, np.arange(samples)] = True
    return chosen


def thinned(levels: NoiseLevels, end: int, steps: int) -> NoiseLevels:
    """The levels with the steps from `end` on thinned to `steps`, evenly by index; fewer stay as they are.

    The fast rollouts of MixGRPO-Flash (arXiv 2507.21802): what comes after the trained window needs no fine steps.
    """
    rest = levels.steps - end
    if steps >= rest:
        return levels
    kept = [*range(end), *(end + round(i * rest / steps) for i in range(steps))]
    stops = [levels.start[t] for t in kept[end + 1 :]] + [levels.end[-1]]
    return NoiseLevels(
        tuple(levels.start[t] for t in kept),
        (*levels.end[:end], *stops),
        tuple(levels.times[t] for t in kept),
        tuple(levels.modules[t] for t in kept),
        levels.prediction,
    )


def schedule_steps(
    rollout: Rollout, levels: NoiseLevels, samples: int, iteration: int, seed: int, deterministic: bool = False,
    forward: bool = False,
) -> StepSchedule:  # fmt: skip
    """The schedule of one iteration for `samples` global samples, at the family's noise levels.

    With `deterministic` no step is stochastic and nothing is trained (evaluation). With `forward` no step is trained
    either, and steps are stochastic only where a group shares its initial noise and would else be one sample.
    """
    if rollout.truncate_timesteps and levels.prediction == "flow":
        levels = replace(levels, times=truncated_times(levels, rollout.shift))
    steps = levels.steps
    solver = rollout.suffix_solver if not deterministic else "first_order"
    deterministic |= forward and not rollout.shared_noise
    if deterministic:
        trained = np.zeros((steps, samples), dtype=bool)
    else:
        trained = trained_steps(rollout, samples, iteration, seed)
        if rollout.suffix_steps is not None:
            levels = thinned(levels, int(np.flatnonzero(trained.any(axis=1))[-1]) + 1, rollout.suffix_steps)
            steps = levels.steps
            trained = trained[:steps]
    stochastic = [bool(row.any()) for row in trained]
    if not deterministic and isinstance(rollout.trained, SubsetSteps):
        # Untrained transitions are stochastic too.
        stochastic = [True] * (steps - 1) + [rollout.last_step != "deterministic"]
    moves = tuple(
        stochastic_transition(rollout.sampler, levels, t, rollout.eta)
        if stochastic[t]
        else deterministic_transition(levels, t)
        for t in range(steps)
    )
    first = stochastic.index(True) if any(stochastic) else steps
    if any(moves[t].s == 0 for t in np.flatnonzero(trained.any(axis=1))):
        raise ConfigError(
            f"rollout.last_step: trained needs noise, and the last step of {rollout.sampler} has none here; set it to "
            "stochastic or deterministic"
        )
    gaps = tuple(levels.gap(t) for t in range(steps))
    weights = (0.0,) * steps
    if solver == "dpmpp_2m":
        weights = second_order_weights(levels, max((t for t in range(steps) if stochastic[t]), default=-1) + 1)
    clean = tuple(clean_sample(levels, t) for t in range(steps)) if any(weights) else ((0.0, 0.0),) * steps
    if forward:
        trained = np.zeros_like(trained)
    return StepSchedule(levels.times, levels.modules, gaps, moves, trained, first, weights, clean)


def truncated_times(levels: NoiseLevels, shift: float | str) -> tuple[float, ...]:
    """⌊1000σ⌋/1000 of a flow's steps, [T], by float32 arithmetic in the order of DanceGRPO's scripts.

    float64 arithmetic differs at many levels, such as step 18 of 20 at shift 3. Levels that are not those of a numeric
    shift, which that project does not have, are taken as they are.
    """
    steps, sigmas = levels.steps, np.array(levels.start, dtype=np.float32)
    if not isinstance(shift, str):
        # torch.linspace(1, 0, T + 1), which counts from the nearer end and rounds once for each level.
        number, stride = np.arange(steps), float(np.float32(-1.0) / np.float32(steps))
        even = np.where(number < (steps + 1) // 2, 1 + stride * number, -stride * (steps - number)).astype(np.float32)
        theirs = np.float32(shift) * even / (np.float32(1) + np.float32(shift - 1) * even)
        sigmas = theirs if np.allclose(theirs, sigmas, rtol=0, atol=1e-5) else sigmas
    return tuple(int(np.float32(1000) * sigma) / 1000 for sigma in sigmas)


def second_order_weights(levels: NoiseLevels, begin: int) -> tuple[float, ...]:
    """[T]: of DPM-Solver++ 2M from step `begin` on; 0 before it, and for the first and the last of its steps.

    The first has no deterministic step before it, and the last goes where its logarithm of the signal-to-noise ratio
    has no end (diffusers' lower_order_final); one that starts from pure noise is no step to look back on.
    """
    begin += levels.prediction == "flow" and begin < levels.steps and levels.start[begin] == 1
    return tuple(
        transitions.second_order_weight(levels.start[t - 1], levels.start[t], levels.end[t], levels.prediction)
        if begin < t < levels.steps - 1
        else 0.0
        for t in range(levels.steps)
    )


def clean_sample(levels: NoiseLevels, t: int) -> tuple[float, float]:
    """(a, b) of the clean sample a·x + b·v that the model predicts at step t."""
    a, b, _ = transitions.clean_coefficients(levels.start[t], levels.prediction)
    return float(a), float(b)


def deterministic_transition(levels: NoiseLevels, t: int) -> Transition:
    """Step t without noise: the Euler step of a flow, DDIM with η = 0."""
    now, following = levels.start[t], levels.end[t]
    if levels.prediction == "flow":
        return transitions.ode(now, following)
    if now == following:
        # A scheduler whose last timestep is 0 and whose final ᾱ is that of timestep 0 stays where it is.
        return Transition(1.0, 0.0, 0.0)
    return transitions.ddim(now, following, 0.0, levels.prediction)


def stochastic_transition(sampler: str, levels: NoiseLevels, t: int, eta: float) -> Transition:
    """The (a, b, s) of step t by a named sampler; see fastgrpo_kernels.transitions for the formulas.

    Raises ConfigError for a sampler of the other paradigm, and for an η that leaves a DDIM step no signal.
    """
    now, following = levels.start[t], levels.end[t]
    if levels.prediction != "flow":
        try:
            return transitions.ddim(now, following, eta, levels.prediction)
        except ValueError as error:
            raise ConfigError(f"rollout.eta: {eta:g} is not possible at step {t} of {levels.steps}: {error}") from None
    if sampler == "dance_sde":
        return transitions.dance_sde(now, following, eta)
    if sampler == "flow_sde":
        return transitions.flow_sde(now, following, eta, levels.end[0])
    return transitions.cps(now, following, eta)


def check_sampler(sampler: str, paradigm: str, family: str) -> None:
    """Raises ConfigError for a sampler that is not of a family's paradigm ("flow" or "diffusion")."""
    allowed = FLOW_SAMPLERS if paradigm == "flow" else DIFFUSION_SAMPLERS
    if sampler not in allowed:
        kind = "a rectified flow" if paradigm == "flow" else "a diffusion model"
        raise ConfigError(
            f"rollout.sampler: '{sampler}' does not sample {kind}, which {family} is (one of: {', '.join(allowed)})"
        )


def kl_factors(kind: str, sampler: str, schedule: StepSchedule) -> np.ndarray:
    """[T] float64: what turns the Gaussian KL of each stochastic step, Q/2, into objective.kl's; 0 elsewhere.

    With Δμ = b·(v − v_ref) the means' difference: gaussian M[Δμ²]/(2s²) = Q/2; flow_grpo M[Δμ²]/(2·std²), where
    s = std·√|Δσ| for the samplers that integrate an SDE; x M[Δμ²] = s²Q; v M[(v − v_ref)²] = Q·s²/b².
    """
    factors = np.zeros(schedule.steps)
    for t, (_, b, s) in enumerate(schedule.transitions):
        if s == 0:
            continue
        if kind == "flow_grpo":
            factors[t] = schedule.gaps[t] ** 2 if sampler in ("dance_sde", "flow_sde") else 1.0
        else:
            factors[t] = {"gaussian": 1.0, "x": 2 * s**2, "v": 2 * (s / b) ** 2}[kind]
    return factors


def loss_scale(objective: ObjectiveConfig, schedule: StepSchedule) -> float:
    """The constant a loss is multiplied by: GRPO-Guard divides it by mean(gap)² over the trained steps."""
    if objective.ratio != "ratio_norm":
        return 1.0
    used = np.flatnonzero(schedule.trained.any(axis=1))
    return float(1.0 / np.mean([schedule.gaps[t] for t in used]) ** 2)
