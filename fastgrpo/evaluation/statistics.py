"""Paired differences with intervals, and diversity by the jackknife."""

from __future__ import annotations

from typing import Any

import numpy as np

Interval = tuple[float, float]


def by_unit(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Means [u] of values [n] over the images of each prompt, of those that are not NaN; NaN where all are."""
    known = ~np.isnan(values)
    count = np.bincount(unit, known, minlength=unit.max() + 1)
    total = np.bincount(unit, np.where(known, values, 0.0), minlength=unit.max() + 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_interval(units: np.ndarray, seed: int = 0, draws: int = 10_000) -> Interval:
    """The bootstrap 95% interval of the mean of [u] independent values; NaN are left out."""
    units = units[~np.isnan(units)]
    if len(units) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    # A block of draws at a time: thousands of images would fill the memory.
    means = np.concatenate([rng.choice(units, (500, len(units))).mean(axis=1) for _ in range(draws // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def overall_distance(features: np.ndarray) -> float:
    """1 − the mean cosine over all pairs of different rows of normalised features [n, D]."""
    n = len(features)
    return float(1 - ((features.sum(axis=0) ** 2).sum() - n) / max(n * (n - 1), 1))


def distance_by_unit(features: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """`overall_distance` within each unit, [u]; NaN where it has one row."""
    count, sums = _sums(features, unit)
    squares = (sums**2).sum(axis=1)
    return np.where(count > 1, 1 - (squares - count) / np.maximum(count * (count - 1), 1), np.nan)


def _sums(features: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [u] and summed features [u, D] of each unit."""
    sums = np.zeros((unit.max() + 1, features.shape[1]))
    np.add.at(sums, unit, features)
    return np.bincount(unit).astype(np.float64), sums


def jackknife(base: np.ndarray, tuned: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    """tuned − base of the overall distance, and its 95% interval from leaving out one unit at a time."""
    mean = overall_distance(tuned) - overall_distance(base)
    left_out = []
    for features in (base, tuned):
        count, sums = _sums(features, unit)
        n = len(features) - count
        squares = ((features.sum(axis=0) - sums) ** 2).sum(axis=1)
        left_out.append(1 - (squares - n) / np.maximum(n * (n - 1), 1))
    gains = left_out[1] - left_out[0]
    u = len(gains)
    error = float(np.sqrt((u - 1) / u * ((gains - gains.mean()) ** 2).sum()))
    return {"mean": mean, "interval95": (mean - 1.96 * error, mean + 1.96 * error)}
