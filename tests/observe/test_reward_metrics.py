"""Metrics of an iteration's scores: of the trained rewards, over the samples that have them."""

import math

import numpy as np
import pytest

from fastgrpo.observe.metrics import reward_metrics

VALUES = np.array([[1.0, 3.0, 2.0, 6.0, 5.0, 5.0], [0.5, 0.5, 1.5, 1.5, 2.5, 2.5], [9.0] * 6])
NAMES, WEIGHTS = ["a", "b", "watched"], np.array([1.0, 2.0, 0.0])
ALL = np.ones((3, 6), dtype=bool)


def metrics(valid, values=VALUES):
    return reward_metrics(np.where(valid, values, 0.0), valid, ALL, WEIGHTS, NAMES, {}, group=2)


def test_means_and_spreads_are_of_the_trained_rewards():
    found = metrics(ALL)
    total = VALUES[0] + 2 * VALUES[1]
    assert found["reward/mean"] == pytest.approx(total.mean())
    assert found["reward/std"] == pytest.approx(np.mean([1.0, 2.0, 0.0]))
    assert found["samples/failed"] == 0
    assert (found["reward/a"], found["reward/watched"]) == (pytest.approx(VALUES[0].mean()), 9.0)


def test_a_watched_reward_that_fails_changes_nothing_but_its_own():
    valid = ALL.copy()
    valid[2] = False
    broken, whole = metrics(valid), metrics(ALL)
    assert broken == {name: value for name, value in whole.items() if name != "reward/watched"}


def test_one_sample_without_a_score_leaves_its_group_out_not_the_meaning():
    valid = ALL.copy()
    valid[0, 2] = False
    found = metrics(valid)
    total = VALUES[0] + 2 * VALUES[1]
    assert found["reward/mean"] == pytest.approx(np.delete(total, 2).mean())
    # Of groups with two scores: still within groups.
    assert found["reward/std"] == pytest.approx(np.mean([1.0, 0.0]))
    assert found["samples/failed"] == 1


def test_where_nothing_is_scored_there_is_no_mean():
    valid = ALL.copy()
    valid[0] = False
    found = metrics(valid)
    assert math.isnan(found["reward/mean"])
    assert math.isnan(found["reward/std"])
    assert found["samples/failed"] == 6
