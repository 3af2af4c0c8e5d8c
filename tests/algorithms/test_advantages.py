"""Advantages: the formula, equal rewards, invalid samples, several rewards."""

import numpy as np
import pytest

from fastgrpo.algorithms.advantages import compute_advantages, group_spread
from fastgrpo.config import Advantage

ONE = np.ones(1)


def valid(rewards):
    return np.ones_like(rewards, dtype=bool)


def test_group_normalisation():
    rewards = np.random.default_rng(0).normal(size=(1, 24))
    result = compute_advantages(rewards, valid(rewards), 8, ONE, Advantage())
    groups = rewards.reshape(3, 8)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-8)
    assert np.allclose(result.values, expected.reshape(-1), rtol=1e-13)
    assert not result.zero_spread.any()


def test_equal_rewards_have_no_advantage_whatever_their_value():
    rewards = np.full((1, 12), np.float64(np.float32(0.2457)))
    result = compute_advantages(rewards, valid(rewards), 12, ONE, Advantage())
    assert (result.values == 0).all()
    assert result.zero_spread.tolist() == [True]


def test_global_normalisation_divides_by_the_spread_of_the_whole_iteration():
    rewards = np.array([[1.0, 3.0, 5.0, 5.0, 5.0, 8.0]])
    found = compute_advantages(rewards, valid(rewards), 3, np.ones(1), Advantage(normalize="global"))
    expected = (rewards[0] - np.array([3.0] * 3 + [6.0] * 3)) / (rewards[0].std() + 1e-4)
    assert found.values == pytest.approx(expected)
    # Samples that failed count in neither mean nor spread.
    lost = valid(rewards)
    lost[0, 5] = False
    found = compute_advantages(rewards, lost, 3, np.ones(1), Advantage(normalize="global"))
    assert found.values[:3] == pytest.approx((rewards[0, :3] - 3) / (rewards[0, :5].std() + 1e-4))
    assert found.values[3:] == pytest.approx(0)


def test_samples_are_chosen_by_the_size_of_their_advantage():
    rewards = np.array([[1.0, 2.0, 9.0, 4.0, 0.0, 0.0, 0.0, 1.0]])

    def trained(**settings):
        found = compute_advantages(rewards, valid(rewards), 4, np.ones(1), Advantage(**settings))
        assert (found.values[~found.valid] == 0).all()
        return np.flatnonzero(found.valid).tolist()

    assert trained() == list(range(8))
    assert trained(keep=2) == [0, 2, 4, 7]
    assert trained(positive_only=True) == [2, 7]
    assert trained(positive_only=True, keep=1) == [2, 7]
    rest = compute_advantages(rewards, valid(rewards), 4, np.ones(1), Advantage(keep=2))
    every = compute_advantages(rewards, valid(rewards), 4, np.ones(1), Advantage())
    assert np.array_equal(rest.values[rest.valid], every.values[rest.valid])


def test_clip():
    rewards = np.zeros((1, 100))
    rewards[0, 0] = 1e6
    result = compute_advantages(rewards, valid(rewards), 100, ONE, Advantage(clip=2.0))
    assert result.values.max() == 2.0


def test_an_invalid_sample_is_masked_and_the_others_normalised_among_themselves():
    rewards = np.array([[1.0, 2.0, 4.0, 1e9, 1.0, 1.0, 3.0, 3.0]])
    ok = valid(rewards)
    ok[0, 3] = False
    result = compute_advantages(rewards, ok, 4, ONE, Advantage())
    three = rewards[0, :3]
    assert result.values[3] == 0
    assert not result.valid[3]
    assert np.allclose(result.values[:3], (three - three.mean()) / (three.std(ddof=1) + 1e-8))


def test_a_nan_is_not_a_score():
    rewards = np.array([[1.0, np.nan, 3.0, 2.0]])
    result = compute_advantages(rewards, valid(rewards), 4, ONE, Advantage())
    assert np.isfinite(result.values).all()
    assert result.valid.tolist() == [True, False, True, True]


def test_a_group_with_one_valid_sample_is_not_trained():
    rewards = np.array([[1.0, 2.0, 3.0, 4.0]])
    result = compute_advantages(rewards, np.array([[True, False, True, True]]), 2, ONE, Advantage())
    assert result.valid.tolist() == [False, False, True, True]
    assert (result.values[:2] == 0).all()


def test_several_rewards_by_advantage_and_by_reward():
    rewards = np.random.default_rng(1).normal(size=(2, 8)) * np.array([[1.0], [100.0]])
    weights = np.array([1.0, 0.5])
    each = [compute_advantages(r[None], valid(r[None]), 8, ONE, Advantage()).values for r in rewards]
    by_advantage = compute_advantages(rewards, valid(rewards), 8, weights, Advantage())
    assert np.allclose(by_advantage.values, each[0] + 0.5 * each[1])
    by_reward = compute_advantages(rewards, valid(rewards), 8, weights, Advantage(combine="reward"))
    summed = (weights[:, None] * rewards).sum(0)
    assert np.allclose(by_reward.values, (summed - summed.mean()) / (summed.std(ddof=1) + 1e-8))


def test_a_reward_of_weight_zero_is_only_watched():
    rewards = np.array([[1.0, 2.0, 3.0, 4.0], [np.nan, 1.0, 1.0, 9.0]])
    result = compute_advantages(rewards, valid(rewards), 4, np.array([1.0, 0.0]), Advantage())
    assert result.valid.all()


def test_not_whole_groups():
    with pytest.raises(ValueError, match="whole groups of 3"):
        compute_advantages(np.zeros((1, 8)), np.ones((1, 8), bool), 3, ONE, Advantage())


def test_spread_of_groups_counts_valid_samples_and_weighted_rewards_only():
    rewards = np.array([[1.0, 3.0, 5.0, 2.0, 2.0, 9.0, 1.0, 7.0, 7.0], np.arange(9.0)])
    valid = np.ones((2, 9), dtype=bool)
    valid[0, [5, 7, 8]] = False
    spread = group_spread(rewards, valid, 3, np.array([2.0, 0.0]))
    assert spread[0] == pytest.approx(2 * np.std([1, 3, 5]))
    assert spread[1] == 0
    assert np.isnan(spread[2])


def test_losses_keeps_one_clamped_weighted_advantage_for_each_reward():
    rewards = np.random.default_rng(3).normal(size=(3, 8))
    weights = np.array([1.0, -0.5, 0.0])
    config = Advantage(combine="losses", clip=1.0)
    result = compute_advantages(rewards, valid(rewards), 8, weights, config)
    each = [compute_advantages(r[None], valid(r[None]), 8, ONE, Advantage(clip=1.0)).values for r in rewards]
    assert np.array_equal(result.terms, np.stack([each[0], -0.5 * each[1]], axis=1))
    assert np.allclose(result.values, each[0] - 0.5 * each[1])


def test_a_reward_not_asked_for_a_group_adds_nothing_to_it():
    rewards = np.random.default_rng(4).normal(size=(2, 8))
    rewards[1, 4:] = 0
    for combine in ("advantage", "reward", "losses"):
        both = compute_advantages(rewards, valid(rewards), 4, np.ones(2), Advantage(combine=combine))
        alone = compute_advantages(rewards[:1], valid(rewards[:1]), 4, ONE, Advantage(combine=combine))
        assert np.array_equal(both.values[4:], alone.values[4:])
        assert not np.array_equal(both.values[:4], alone.values[:4])
