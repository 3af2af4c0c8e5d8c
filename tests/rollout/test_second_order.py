"""DPM-Solver++ 2M after the window: diffusers' own steps in float64, its order of convergence, rollouts that use it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.levels import flow_levels
from support.tiny import tiny_config, tiny_rollout_inputs

from fastgrpo.algorithms.schedule import (
    NoiseLevels,
    clean_sample,
    deterministic_transition,
    linear_levels,
    schedule_steps,
    second_order_weights,
    shifted,
)
from fastgrpo.config import Rollout, WindowSteps
from fastgrpo.rollout.sampler import deterministic_step, rollout
from fastgrpo_kernels import transitions

PREDICTIONS = ("flow", "epsilon", "v_prediction", "sample")
MEAN, SPREAD = 0.4, 0.7


def levels_of(prediction: Any, steps: int, last: float) -> NoiseLevels:
    """From σ = 0.9 (or the ᾱ of that σ) to `last`."""
    sigmas = np.linspace(0.9, last, steps + 1)
    path = tuple(sigmas if prediction == "flow" else 1 - sigmas**2)
    return NoiseLevels(path[:-1], path[1:], path[:-1], ("m",) * steps, prediction)


def signal_and_noise(level: float, prediction: str) -> tuple[float, float]:
    return (1 - level, level) if prediction == "flow" else (math.sqrt(level), math.sqrt(1 - level))


def model(x: torch.Tensor, level: float, prediction: str) -> torch.Tensor:
    """The exact prediction for data that are Gaussian."""
    alpha, sigma = signal_and_noise(level, prediction)
    clean = MEAN + alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2) * (x - alpha * MEAN)
    noise = (x - alpha * clean) / sigma
    return {"flow": noise - clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[
        prediction
    ]


def solved(x: torch.Tensor, levels: NoiseLevels, weights: tuple[float, ...]) -> torch.Tensor:
    """In float64, as `deterministic_step` does it in float32."""
    previous = torch.zeros_like(x)
    for t in range(levels.steps):
        v = model(x, levels.start[t], levels.prediction)
        a, b, _ = deterministic_transition(levels, t)
        p, q = clean_sample(levels, t)
        clean = p * x + q * v
        x = a * x + b * v + weights[t] * (clean - previous)
        previous = clean
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_is_diffusers_own(prediction):
    from diffusers import DPMSolverMultistepScheduler

    levels = levels_of(prediction, 6, 0.0)
    kind = "flow_prediction" if prediction == "flow" else prediction
    scheduler: Any = DPMSolverMultistepScheduler(prediction_type=kind, use_flow_sigmas=prediction == "flow")
    pairs = [signal_and_noise(level, prediction) for level in (*levels.start, levels.end[-1])]
    sigmas = [s if prediction == "flow" else s / a for a, s in pairs]
    scheduler.set_timesteps(6)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs, outputs = x, []
    for t in range(6):
        scheduler._step_index = t
        v = model(theirs, levels.start[t], prediction)
        outputs.append(scheduler.convert_model_output(v, sample=theirs))
        if t in (0, 5):
            theirs = scheduler.dpm_solver_first_order_update(outputs[-1], sample=theirs)
        else:
            theirs = scheduler.multistep_dpm_solver_second_order_update(outputs, sample=theirs)
    ours = solved(x, levels, second_order_weights(levels, 0))
    assert theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-12
    assert (ours - solved(x, levels, (0.0,) * 6)).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_error_falls_with_the_square_of_the_step(prediction):
    x = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    errors: dict[bool, list[float]] = {False: [], True: []}
    for steps in (40, 80):
        levels = levels_of(prediction, steps, 0.2)
        first, last = (signal_and_noise(level, prediction) for level in (levels.start[0], levels.end[-1]))
        # Along the flow's path, (x - α·mean) / √(α²·spread² + σ²) stays.
        scale = [math.hypot(alpha * SPREAD, sigma) for alpha, sigma in (first, last)]
        exact = last[0] * MEAN + (x - first[0] * MEAN) / scale[0] * scale[1]
        for second in (False, True):
            weights = second_order_weights(levels, 0) if second else (0.0,) * steps
            errors[second].append(float((solved(x, levels, weights) - exact).abs().max()))
    assert math.log2(errors[False][0] / errors[False][1]) == pytest.approx(1, abs=0.1)
    assert math.log2(errors[True][0] / errors[True][1]) == pytest.approx(2, abs=0.2)
    assert errors[True][0] < errors[False][0] / 10


def test_only_steps_after_the_window_and_between_its_ends_are_of_second_order():
    levels = flow_levels(shifted(linear_levels(10), 3.0), "transformer")
    window = WindowSteps(size=2, start=2)
    schedule = schedule_steps(Rollout(steps=10, trained=window, suffix_solver="dpmpp_2m"), levels, 4, 0, 0)
    assert [weight > 0 for weight in schedule.second_order] == [False] * 5 + [True] * 4 + [False]
    thin = schedule_steps(Rollout(steps=10, trained=window, suffix_solver="dpmpp_2m", suffix_steps=3), levels, 4, 0, 0)
    assert [weight > 0 for weight in thin.second_order] == [False] * 5 + [True, False]
    plain = Rollout(steps=10, trained=window)
    assert not any(schedule_steps(plain, levels, 4, 0, 0).second_order)
    still = Rollout(steps=10, suffix_solver="dpmpp_2m")
    assert not any(schedule_steps(still, levels, 4, 0, 0, deterministic=True).second_order)


@pytest.mark.parametrize("levels", [(1.0, 0.5, 0.2), (0.5, 0.2, 0.0), (0.2, 0.5, 0.1)], ids=str)
def test_levels_without_a_second_order_step_are_refused(levels):
    previous, level, following = levels
    with pytest.raises(ValueError, match="strictly between pure noise and it"):
        transitions.second_order_weight(previous, level, following, "flow")


def test_a_rollout_takes_these_steps(tiny_flux):
    config = tiny_config(
        tiny_flux, rollout={"steps": 7, "suffix_solver": "dpmpp_2m", "trained": {"kind": "window", "size": 1}}
    )
    family, schedule, layout, conditioning, _ = tiny_rollout_inputs(config)
    seen = []
    predict = family.predict

    def watched(x, *rest):
        output = predict(x, *rest)
        seen.append((x.double(), output.double()))
        return output

    family.predict = watched  # pyright: ignore[reportAttributeAccessIssue]
    latents = rollout(family, schedule, layout, conditioning, config.rollout, 7, 0).latents
    # One forward of the group's common row, then two of its six samples at each step.
    x, previous = seen[1][0], torch.zeros(())
    for step in range(1, 7):
        v = seen[2 * step - 1][1]
        assert torch.allclose(seen[2 * step - 1][0], x, atol=1e-5)
        a, b, _ = schedule.transitions[step]
        p, q = schedule.clean[step]
        clean = p * x + q * v
        x = a * x + b * v + schedule.second_order[step] * (clean - previous)
        previous = clean
    assert torch.allclose(latents[:4].double(), x, atol=1e-5)
    assert sum(weight > 0 for weight in schedule.second_order) == 4


def test_a_step_keeps_the_clean_sample_only_where_the_next_one_needs_it():
    levels = flow_levels(shifted(linear_levels(6), 3.0), "transformer")
    settings = Rollout(steps=6, trained=WindowSteps(size=1), suffix_solver="dpmpp_2m")
    schedule = schedule_steps(settings, levels, 4, 0, 0)
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    _, first = deterministic_step(x, v, schedule, 1, None)
    assert first is not None
    assert torch.allclose(first, x - levels.start[1] * v, atol=1e-6)
    y, last = deterministic_step(x, v, schedule, 5, first)
    assert last is None
    assert torch.allclose(y, x - levels.start[5] * v, atol=1e-6)
