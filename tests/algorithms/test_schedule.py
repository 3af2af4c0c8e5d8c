"""Noise levels, windows, subsets and the plan of an iteration."""

import itertools

import numpy as np
import pytest

from fastgrpo.algorithms.schedule import (
    flow_levels,
    linear_levels,
    loss_scale,
    schedule_steps,
    shifted,
    thinned,
    trained_steps,
    window_start,
)
from fastgrpo.config import ObjectiveConfig, Rollout, SubsetSteps, WindowSteps
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
    plan = schedule_steps(Rollout(steps=10, sampler=sampler, eta=0.7, trained=WindowSteps(size=9)), levels, 2, 0, 0)
    assert np.isfinite(np.array(plan.transitions)).all()
    assert all(t.s > 0 for t in plan.transitions[:-1])


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
    plan = schedule_steps(Rollout(steps=10, trained=WindowSteps(size=3)), levels, 2, 0, 0)
    assert loss_scale(ObjectiveConfig(), plan) == 1
    assert loss_scale(ObjectiveConfig(ratio="ratio_norm"), plan) == pytest.approx(1 / 0.1)
