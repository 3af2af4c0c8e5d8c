"""An iteration's metrics: kept while its update is under way on the device, read and logged while the next one runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastgrpo.distributed.world import World
from fastgrpo.observe.metrics import RankMonitor, rank_metrics, update_metrics
from fastgrpo.observe.run_log import RunLog
from fastgrpo.observe.timers import Lap, PhaseTimer


class _Pending(NamedTuple):
    iteration: int
    metrics: dict[str, float]
    statistics: Tensor
    lap: Lap


class IterationLog:
    """Reads an update's statistics when the host waits anyway, and logs the iteration.

    Args:
        log: Where the lines go.
        world: The ranks whose statistics are put together.
        timer: Times the phases.
        samples: Samples of an iteration.
        on_metrics: Is called with the iteration and its metrics once they are known.

    Attributes:
        metrics: Those of the last iteration that was read.
    """

    def __init__(
        self, log: RunLog, world: World, timer: PhaseTimer, samples: int,
        on_metrics: Callable[[int, dict[str, float]], None],
    ) -> None:  # fmt: skip
        self.log, self.world, self.timer, self.samples = log, world, timer, samples
        self.on_metrics = on_metrics
        self.monitor = RankMonitor(world.device)
        self.metrics: dict[str, float] = {}
        self._pending: _Pending | None = None
        self._outside: dict[str, float] = {}

    def keep(self, iteration: int, metrics: dict[str, float], statistics: Tensor) -> None:
        """Takes what is known of an iteration whose update may still be under way; its time ends here."""
        self._pending = _Pending(iteration, metrics, statistics, self.timer.lap())

    def flush(self) -> dict[str, float]:
        """Reads the statistics of the last update, if they are not read yet, logs them, and returns the metrics."""
        if self._pending is None:
            return self.metrics
        (iteration, metrics, statistics, lap), self._pending = self._pending, None
        sums, seconds = statistics.cpu().numpy(), lap.read()
        report = self.monitor.report(seconds, lap.memory, self.timer.peak)
        vectors = self.world.gather(np.concatenate([sums, report.vector()]))
        metrics |= update_metrics(vectors[:, : len(sums)])
        metrics |= rank_metrics(vectors[:, len(sums) :], self.samples)
        metrics |= {f"time/{name}": value for name, value in self._outside.items()}
        metrics["samples_per_second"] = self.samples / seconds["total"]
        self._outside, self.metrics = {}, metrics
        self.log.log(iteration, metrics)
        self.on_metrics(iteration, metrics)
        return metrics

    @contextmanager
    def outside(self, name: str, iteration: int) -> Iterator[None]:
        """Times what is not part of an iteration; logged with the next one, outside its total."""
        begin = time.perf_counter()
        with self.timer.doing(name):
            yield
        seconds = time.perf_counter() - begin
        self._outside[name] = self._outside.get(name, 0.0) + seconds
        self.log.event(name, iteration, seconds=seconds)
        self.monitor.skip()
