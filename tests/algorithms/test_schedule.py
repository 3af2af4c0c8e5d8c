"""Noise levels, windows, subsets and the steps of an iteration."""

import itertools

import numpy as np
import pytest
import torch
from support.levels import flow_levels

from fastgrpo.algorithms.schedule import (
    NoiseLevels,
    linear_levels,
    loss_scale,
    schedule_steps,
    shifted,
    thinned,
    trained_steps,
    window_start,
)
from fastgrpo.config import ObjectiveConfig, Rollout, SubsetSteps, WindowSteps
from fastgrpo.errors import ConfigError
from fastgrpo_kernels import transitions


def test_levels_of_flux_at_shift_three():
    levels = shifted(linear_levels(16), 3.0)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert levels[8] == pytest.approx(3 * 0.5 / 2)
    assert all(a > b for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("steps", [4, 10, 16])
def test_a_subset_has_its_size_differs_by_sample_and_never_trains_the_last(steps):
    roll = Rollout(steps=steps, trained=SubsetSteps(fraction=0.6))
    chosen = trained_steps(roll, 200, 3, seed=0)
    assert (chosen.sum(0) == int(0.6 * (steps - 1))).all()
    assert not chosen[-1].any()
    assert chosen[:-1].any(1).all()
    assert len(np.unique(chosen, axis=1).T) > 1
    assert not np.array_equal(chosen, trained_steps(roll, 200, 4, seed=0))
    assert np.array_equal(chosen, trained_steps(roll, 200, 3, seed=0))


def dance_grpo_timesteps(shift, steps):
    """What DanceGRPO's rollout loop tells its model: a float32 schedule on the CPU, and int() of each product."""
    schedule = torch.linspace(1, 0, steps + 1)
    schedule = (shift * schedule) / (1 + (shift - 1) * schedule)
    return [int(schedule[i] * 1000) for i in range(steps)]


def truncated_plan(shift, steps):
    levels = flow_levels(shifted(linear_levels(steps), shift), "transformer")
    roll = Rollout(steps=steps, shift=shift, truncate_timesteps=True, trained=WindowSteps(size=1))
    return schedule_steps(roll, levels, 1, 0, 0, deterministic=True)


@pytest.mark.parametrize("shift", [1.0, 1.5, 2.0, 3.0, 5.0, 6.5, 7.0])
def test_truncated_timesteps_are_dance_grpos(shift):
    in_float64 = 0
    for steps in range(4, 61):
        times = truncated_plan(shift, steps).times
        assert [round(1000 * t) for t in times] == dance_grpo_timesteps(shift, steps)
        assert all(t == round(1000 * t) / 1000 for t in times)
        in_float64 += times != tuple(int(1000 * t) / 1000 for t in shifted(linear_levels(steps), shift)[:-1])
    assert in_float64 > 0


def test_the_truncated_step_that_float64_gets_wrong():
    """Our Qwen-Image parity recipe: 20 steps at shift 3. σ = 0.25 at step 18, a hair less in float64."""
    assert truncated_plan(3.0, 20).times[18] == 0.25
    assert int(1000 * shifted(linear_levels(20), 3.0)[18]) == 249


def test_levels_of_another_schedule_are_truncated_as_they_are():
    levels = flow_levels([1.0, 0.7505, 0.1239, 0.0], "transformer")
    roll = Rollout(steps=3, shift=3.0, truncate_timesteps=True, trained=WindowSteps(size=1))
    assert schedule_steps(roll, levels, 1, 0, 0).times == (1.0, 0.75, 0.123)


@pytest.mark.parametrize(
    "last, stochastic, trained", [("stochastic", 8, 7), ("trained", 8, 8), ("deterministic", 7, 7)]
)
def test_the_last_step_is_stochastic_where_parity_asks_for_it(last, stochastic, trained):
    levels = flow_levels(shifted(linear_levels(8), 3.0), "transformer")
    roll = Rollout(steps=8, sampler="flow_sde", eta=0.7, last_step=last, trained=SubsetSteps(fraction=1.0))
    schedule = schedule_steps(roll, levels, 4, 0, 0)
    assert sum(t.s > 0 for t in schedule.transitions) == stochastic
    assert schedule.pairs_per_sample == trained
    still = schedule_steps(roll, levels, 4, 0, 0, deterministic=True)
    assert not any(t.s for t in still.transitions)
    # Flow-GRPO's last step: σ' = 0, noise of std·√σ.
    sigma = levels.start[-1]
    if stochastic == 8:
        assert schedule.transitions[-1].s == pytest.approx(0.7 * (sigma / (1 - sigma)) ** 0.5 * sigma**0.5)


@pytest.mark.parametrize("sampler, prediction", [("cps", "flow"), ("ddim", "epsilon")])
def test_a_last_step_without_noise_is_not_trained(sampler, prediction):
    levels = flow_levels(shifted(linear_levels(4), 3.0), "transformer")
    if prediction == "epsilon":
        levels = NoiseLevels(
            (0.1, 0.3, 0.5, 0.9), (0.3, 0.5, 0.9, 1.0), (900.0, 600.0, 300.0, 1.0), ("unet",) * 4, "epsilon"
        )
    roll = Rollout(steps=4, sampler=sampler, eta=0.5, last_step="trained", trained=SubsetSteps(fraction=1.0))
    with pytest.raises(ConfigError, match=rf"rollout\.last_step: trained needs noise, and the last step of {sampler}"):
        schedule_steps(roll, levels, 2, 0, 0)


def test_dance_grpo_trains_nine_of_sixteen():
    assert trained_steps(Rollout(steps=16, trained=SubsetSteps()), 1, 0, 0).sum() == 9


def test_windows_move_and_stay_inside():
    progressive = WindowSteps(size=4, move="progressive", every=10, stride=2)
    starts = [window_start(progressive, 10, i, 0) for i in range(0, 80, 10)]
    assert starts == [0, 2, 4, 0, 2, 4, 0, 2]
    drawn = [window_start(WindowSteps(size=4, move="random", every=1), 10, i, 0) for i in range(300)]
    assert set(drawn) == set(range(6))
    assert {window_start(WindowSteps(size=2, start=3), 10, i, 0) for i in range(300)} == {3}
    bounded = WindowSteps(size=2, start=1, stop=5, move="random", every=1)
    assert {window_start(bounded, 10, i, 0) for i in range(300)} == {1, 2, 3}
    walking = WindowSteps(size=2, start=1, stop=5, move="progressive", every=1)
    assert [window_start(walking, 10, i, 0) for i in range(4)] == [1, 2, 3, 1]


def test_outside_a_window_steps_are_deterministic_and_in_a_subset_only_the_last_is():
    levels = flow_levels(shifted(linear_levels(8), 3.0), "transformer")
    window = schedule_steps(Rollout(steps=8, trained=WindowSteps(size=2, start=3)), levels, 4, 0, 0)
    assert [t.s > 0 for t in window.transitions] == [False] * 3 + [True] * 2 + [False] * 3
    assert window.first_stochastic == 3
    assert window.pairs_per_sample == 2
    subset = schedule_steps(Rollout(steps=8, trained=SubsetSteps()), levels, 4, 0, 0)
    assert [t.s > 0 for t in subset.transitions] == [True] * 7 + [False]
    still = schedule_steps(Rollout(steps=8), levels, 4, 0, 0, deterministic=True)
    assert all(t.s == 0 for t in still.transitions)
    assert not still.trained.any()


@pytest.mark.parametrize("sampler", ["dance_sde", "flow_sde", "cps"])
def test_every_sampler_has_a_finite_plan(sampler):
    levels = flow_levels(shifted(linear_levels(10), 3.0), "transformer")
    schedule = schedule_steps(Rollout(steps=10, sampler=sampler, eta=0.7, trained=WindowSteps(size=9)), levels, 2, 0, 0)
    assert np.isfinite(np.array(schedule.transitions)).all()
    assert all(t.s > 0 for t in schedule.transitions[:-1])


def test_a_thinned_suffix_ends_at_zero_and_leaves_the_window_alone():
    sigmas = shifted(linear_levels(8), 3.0)
    levels = flow_levels(sigmas, "transformer")
    assert thinned(levels, 3, 2) == flow_levels([*sigmas[:4], sigmas[5], 0.0], "transformer")
    assert thinned(levels, 6, 5) == levels
    window = WindowSteps(size=2, start=2)
    full = schedule_steps(Rollout(steps=8, trained=window), levels, 4, 0, 0)
    fast = schedule_steps(Rollout(steps=8, trained=window, suffix_steps=1), levels, 4, 0, 0)
    assert fast.transitions[:4] == full.transitions[:4]
    assert fast.times == tuple(sigmas[:5])
    assert fast.transitions[4] == transitions.ode(sigmas[4], 0.0)
    assert fast.trained.shape == (5, 4)
    assert fast.pairs_per_sample == full.pairs_per_sample
    assert schedule_steps(Rollout(steps=8, suffix_steps=1), levels, 4, 0, 0, deterministic=True).steps == 8


def test_guard_divides_by_the_mean_step_and_the_others_do_not():
    levels = flow_levels(linear_levels(10), "transformer")
    schedule = schedule_steps(Rollout(steps=10, trained=WindowSteps(size=3)), levels, 2, 0, 0)
    assert loss_scale(ObjectiveConfig(), schedule) == 1
    assert loss_scale(ObjectiveConfig(ratio="ratio_norm"), schedule) == pytest.approx(1 / 0.1)
