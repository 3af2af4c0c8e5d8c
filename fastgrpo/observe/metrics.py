"""Every name in metrics.jsonl: what an iteration's rewards, its update and its ranks come to.

What a rank reports (seconds and most memory by phase, its GPU's energy and clock) is one float64 vector, gathered with
the update's statistics: no collective and no wait of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgrpo.algorithms.advantages import Advantages, group_spread
from fastgrpo.observe.nvml import Reading, board_of
from fastgrpo_kernels.clipped_loss import FIELDS

PHASES = ("conditioning", "rollout", "decode", "reward", "sync", "update", "other", "total")

# What a rank does alone before it meets the others over their scores: who is slow here, all wait for.
OWN = ("conditioning", "rollout", "decode", "reward")

# The last places of the vector.
_DEVICE = ("joules", "clock_mhz", "limited", "peak")


@dataclass(frozen=True)
class RankReport:
    """A rank's iteration. seconds, memory: by phase; peak: bytes, the most so far; joules: of this iteration, NaN
    where nothing counts them; reading: at its end."""

    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    peak: int
    joules: float = math.nan
    reading: Reading | None = None

    def vector(self) -> np.ndarray:
        """float64 [2·phases + 4]; NaN is what there was not."""
        by_phase = [[float(of.get(name, math.nan)) for name in PHASES] for of in (self.seconds, self.memory)]
        clock, limited = math.nan, math.nan
        if self.reading is not None:
            clock, limited = self.reading.clock_mhz, float(bool(self.reading.limits))
        return np.array([*by_phase[0], *by_phase[1], self.joules, clock, limited, self.peak])


class RankMonitor:
    """What this rank tells of its iterations. Energy is what passed since the last `report` or `skip`."""

    def __init__(self, device: torch.device) -> None:
        self._board = board_of(device)
        self._before: Reading | None = None

    def report(self, seconds: Mapping[str, float], memory: Mapping[str, int], peak: int) -> RankReport:
        before, now = self._before, self._read()
        joules = now.joules - before.joules if now and before else math.nan
        return RankReport(seconds, memory, peak, joules, now)

    def skip(self) -> None:
        """What passed since is not the next iteration's."""
        self._read()

    def _read(self) -> Reading | None:
        self._before = self._board.read() if self._board else None
        return self._before


def rank_metrics(rows: np.ndarray, samples: int) -> dict[str, float]:
    """Metrics of every rank's vector [ranks, …], for an iteration of so many samples.

    time/…: of rank 0. memory/…: the most of any rank. gpu/power_w: of all together; gpu/clock_mhz: of the slowest;
    gpu/limited: the share of GPUs that a limit held back. ranks/…, of several: the one that came last to where ranks
    meet, and how far behind the median it was.
    """
    count = len(PHASES)
    seconds, memory = rows[:, :count], rows[:, count : 2 * count]
    device = dict(zip(_DEVICE, rows[:, 2 * count :].T, strict=True))
    found = {f"time/{name}": column[0] for name, column in zip(PHASES, seconds.T, strict=True)}
    found |= {f"memory/{name}_bytes": _largest(column) for name, column in zip(PHASES, memory.T, strict=True)}
    found["memory/peak_bytes"] = _largest(device["peak"])
    found["gpu/clock_mhz"] = -_largest(-device["clock_mhz"])
    found["gpu/limited"] = float(device["limited"].mean())
    joules = float(device["joules"].sum())
    found["gpu/joules_per_sample"], found["gpu/power_w"] = joules / samples, joules / seconds[0, -1]
    if len(rows) > 1:
        own = np.nansum(seconds[:, [PHASES.index(name) for name in OWN]], axis=1)
        found["ranks/last"] = float(own.argmax())
        found["ranks/behind_seconds"] = float(own.max() - np.median(own))
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}


def _largest(column: np.ndarray) -> float:
    """NaN where all are."""
    return float(np.nanmax(column)) if not np.isnan(column).all() else math.nan


def reward_metrics(
    values: np.ndarray, valid: np.ndarray, asked: np.ndarray, weights: np.ndarray, names: Sequence[str],
    components: Mapping[str, np.ndarray], group: int,
) -> dict[str, float]:  # fmt: skip
    """Returns the metrics of an iteration's scores.

    reward/mean, reward/std and samples/failed are of the rewards that are trained (weight not 0): the mean over samples
    that have all their scores, the standard deviation within groups of at least two such samples, and how many samples
    lack one. reward/<name> is the mean over that reward's own scores.

    Args:
        values: Scores, float64 [R, N], a row a reward, whole groups one after the other.
        valid: Which scores are there, bool [R, N].
        asked: Which samples a reward was asked about, bool [R, N].
        weights: Weights of the rewards, float64 [R].
        names: Names of the rewards.
        components: Further columns [N] by name, NaN where there is no value.
        group: Samples of a group.
    """
    trained = weights != 0
    ok = valid[trained].all(axis=0)
    total = (weights[trained, None] * values[trained])[:, ok].sum(axis=0)
    spread = group_spread(values, valid, group, weights)
    counted = np.where(valid & asked, values, np.nan)
    columns = {**dict(zip(names, counted, strict=True)), **components}
    known = {name: column[~np.isnan(column)] for name, column in columns.items()}
    return {
        "reward/mean": _mean(total),
        "reward/std": _mean(spread[~np.isnan(spread)]),
        **{f"reward/{name}": float(column.mean()) for name, column in known.items() if len(column)},
        "samples/failed": float((~ok).sum()),
    }


def _mean(numbers: np.ndarray) -> float:
    """NaN of none."""
    return float(numbers.mean()) if len(numbers) else math.nan


def advantage_metrics(advantages: Advantages) -> dict[str, float]:
    """Returns the metrics of an iteration's advantages."""
    return {
        "advantage/abs_mean": float(np.abs(advantages.values).mean()),
        "groups/zero_spread": float(advantages.zero_spread.mean()),
        "samples/trained": float((advantages.values != 0).sum()),
    }


def update_metrics(vectors: np.ndarray) -> dict[str, float]:
    """Returns the metrics of an update, from every rank's packed statistics [ranks, …] (training/update.py)."""
    summed = len(FIELDS) - 1
    sums = dict(zip(FIELDS[:summed], vectors[:, :summed].sum(axis=0), strict=True))
    pairs = max(sums["weight"], 1.0)
    deviation, first, norm, skipped = vectors[:, summed : summed + 4].max(axis=0)
    # Where it is measured: half of Q, and the weight that it is of.
    moved, of = vectors[:, summed + 4 :].sum(axis=0) if vectors.shape[1] > summed + 4 else (0.0, 0.0)
    return {
        "loss": sums["loss"] / pairs,
        "ratio/mean": sums["ratio"] / pairs,
        "ratio/max_deviation": deviation,
        "ratio/first_max_deviation": first,
        "clip_fraction": sums["clipped"] / pairs,
        "dppo_dropped": sums["dropped"] / pairs,
        "kl": sums["kl"] / pairs,
        "grad_norm": norm,
        "optimizer_steps/skipped": skipped,
    } | ({"movement": 2 * moved / of} if of > 0 else {})
