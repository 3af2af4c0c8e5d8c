"""Rewards -> advantages, on the host in float64: per prompt's group, per reward.

A = (r − mean) / (std + 1e-8) in the group, unbiased std (DanceGRPO, arXiv 2505.07818); or over the std of all rewards
of the iteration plus 1e-4, biased (Flow-GRPO's and DiffusionNFT's global_std). A group whose rewards are all equal
carries no gradient; a sample without a valid reward is masked and counted, never given a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgrpo.config import Advantage

EPSILON, GLOBAL_EPSILON = 1e-8, 1e-4


@dataclass(frozen=True)
class Advantages:
    """values: float64 [N], 0 where a sample is not trained. terms: [N, T], what the objective takes: one column, or
    one for each reward with combine = losses; their sum is `values`. valid: bool [N]. zero_spread: bool [groups]."""

    values: np.ndarray
    terms: np.ndarray
    valid: np.ndarray
    zero_spread: np.ndarray

    def of(self, kept: np.ndarray) -> Advantages:
        """Those of the kept samples (bool [N]); the others are not trained."""
        terms = np.where(kept[:, None], self.terms, 0.0)
        return Advantages(terms.sum(axis=1), terms, self.valid & kept, self.zero_spread)


def compute_advantages(
    rewards: np.ndarray, valid: np.ndarray, group_size: int, weights: np.ndarray, config: Advantage
) -> Advantages:
    """Advantages of N samples laid out group after group.

    rewards: float64 [R, N], one row a reward; valid: bool [R, N]; weights: [R]. A sample counts only if every
    reward with a weight is valid for it. Groups with fewer than two valid samples get no advantage. A reward that was
    not asked for a group (fastgrpo.rewards.Scores) is 0 and valid for all of it, and so adds nothing.
    """
    if rewards.shape[1] % group_size:
        raise ValueError(f"rewards: {rewards.shape[1]} samples are not whole groups of {group_size}")
    used = weights != 0
    rewards, weights = np.asarray(rewards, dtype=np.float64)[used], np.asarray(weights, dtype=np.float64)[used]
    ok = (np.asarray(valid)[used] & np.isfinite(rewards)).all(axis=0).reshape(-1, group_size)
    groups = np.where(ok, rewards.reshape(len(rewards), -1, group_size), 0.0)
    if config.combine == "reward":
        groups, weights = np.tensordot(weights, groups, axes=1)[None], np.ones(1)

    count = ok.sum(axis=1)
    enough = count >= 2
    mean = groups.sum(axis=2, keepdims=True) / np.maximum(count, 1)[None, :, None]
    centred = np.where(ok, groups - mean, 0.0)
    variance = (centred**2).sum(axis=2) / np.maximum(count - 1, 1)
    low = np.where(ok, groups, np.inf).min(axis=2)
    high = np.where(ok, groups, -np.inf).max(axis=2)
    flat = (low == high) | ~enough
    scale = np.ones_like(variance)
    if config.normalize == "std":
        scale = np.sqrt(variance) + EPSILON
    elif config.normalize == "global":
        scale *= np.array([row[ok].std() if ok.any() else 0.0 for row in groups])[:, None] + GLOBAL_EPSILON
    normalised = np.where(flat[..., None], 0.0, centred / scale[..., None])
    if config.combine == "losses":
        terms = weights[:, None, None] * np.clip(normalised, -config.clip, config.clip)
    else:
        terms = np.clip(np.tensordot(weights, normalised, axes=1), -config.clip, config.clip)[None]
    trainable = ok & enough[:, None]
    terms = np.where(trainable, terms, 0.0)
    trainable &= chosen_samples(terms.sum(axis=0), trainable, config)
    terms = np.where(trainable, terms, 0.0).reshape(len(terms), -1).T
    return Advantages(terms.sum(axis=1), terms, trainable.reshape(-1), flat.all(axis=0) & enough)


def chosen_samples(values: np.ndarray, trainable: np.ndarray, config: Advantage) -> np.ndarray:
    """bool [groups, G]: the samples that advantage.positive_only and advantage.keep train, of advantages [groups, G].

    Of equal |A| the first are kept; of each sign, where positive_only leaves one.
    """
    chosen = values > 0 if config.positive_only else np.ones(values.shape, dtype=bool)
    if config.keep is not None:
        size = np.where(trainable & chosen, np.abs(values), -1.0)
        kept = np.argsort(-size, axis=1, kind="stable")[:, : config.keep]
        largest = np.zeros(values.shape, dtype=bool)
        np.put_along_axis(largest, kept, True, axis=1)
        chosen &= largest
    return chosen


def extremes(values: np.ndarray, groups: np.ndarray, samples: np.ndarray, keep: int) -> np.ndarray:
    """bool [n]: the keep/2 highest and keep/2 lowest values of each group (DanceGRPO's best of N); NaN is not kept.

    Equal values are in the order of their sample numbers, so that what is kept of a stream of chunks, and of what was
    kept before, is what is kept of them all at once.
    """
    chosen = np.zeros(len(values), dtype=bool)
    order = np.lexsort((samples, values, groups))
    order = order[~np.isnan(values[order])]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        kept = members if len(members) <= keep else np.concatenate([members[: keep // 2], members[-(keep // 2) :]])
        chosen[kept] = True
    return chosen


def group_spread(rewards: np.ndarray, valid: np.ndarray, group_size: int, weights: np.ndarray) -> np.ndarray:
    """Standard deviation [groups] of each group's weighted reward over its valid samples; NaN with fewer than two.

    rewards, valid: [R, N], one row a reward; weights: [R].
    """
    used = weights != 0
    ok = (valid[used] & np.isfinite(rewards[used])).all(axis=0).reshape(-1, group_size)
    total = np.where(ok, np.tensordot(weights[used], rewards[used], axes=1).reshape(ok.shape), 0.0)
    count = np.maximum(ok.sum(axis=1), 1)
    centred = np.where(ok, total - (total.sum(axis=1) / count)[:, None], 0.0)
    return np.where(count >= 2, np.sqrt((centred**2).sum(axis=1) / count), np.nan)
