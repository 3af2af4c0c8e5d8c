"""What every rank tells of an iteration: seconds and most memory by phase, its GPU's energy and clock.

One float64 vector a rank, gathered with the update's statistics: no collective and no wait of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastgrpo.observe.nvml import Reading, board_of

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
