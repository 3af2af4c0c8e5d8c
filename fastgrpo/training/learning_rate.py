"""The learning rate of an optimizer step: warm-up, a schedule, and a peak that is given or finds itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastgrpo.config.schema import Optimizer

# The first rate of `auto`, and how far it goes in one iteration. At a small rate a model in bfloat16 moves
# by its rounding, or not at all: what is measured there is not trusted at once.
FIRST = 1e-6
UP, DOWN = 2.0, 3.0
# Movement is measured in each of the first iterations, then in every fourth.
EACH, EVERY = 16, 4
# Measurements that are averaged: how far a step moves differs twentyfold by its noise level. AdamW's first iterations
# move every weight by the whole rate: they count until there are others.
MEMORY, UNLIKE = 32, 3


class LearningRate:
    """The rate at each optimizer step; with `lr: auto` it follows what the updates before moved.

    An update moves the model's output by as much as its rate, so the movement Q (`Updater`) grows as its square: the
    rate of any movement is known from what another moved. Wanted is √Q = `optimizer.travel` / `updates`: a longer run
    goes as far in smaller steps. All ranks know the same numbers.

    Args:
        config: Of the optimizer.
        total_steps: Optimizer steps of the run, at the end of which a cosine is zero.
        updates: Iterations of the run; for `auto`.

    Attributes:
        peak: The rate that warm-up ends in and a cosine begins at.
    """

    def __init__(self, config: Optimizer, total_steps: int, updates: float = 1) -> None:
        self.config, self.total_steps, self.updates = config, total_steps, updates
        self.peak = FIRST if config.lr == "auto" else config.lr
        self._mobility: list[float] = []

    def at(self, step: int) -> float:
        """Returns the rate at a 0-based optimizer step: linear warm-up, then constant or a half cosine to zero."""
        if self.config.schedule == "constant" and step >= self.config.warmup:
            return self.peak
        return cosine_rate(step, self.total_steps, self.peak, self.config.warmup)

    def asks(self, iteration: int) -> bool:
        """Returns whether the movement of a 0-based iteration's update is to be measured."""
        return self.config.lr == "auto" and (iteration < EACH or iteration % EVERY == 0)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Takes what an iteration's update moved (`movement`) at its rate (`lr`), where its metrics say so."""
        movement, rate = metrics.get("movement", math.nan), metrics["lr"]
        if self.config.lr != "auto" or not math.isfinite(movement) or rate == 0:
            return
        self._mobility.append(movement / rate**2)
        if len(self._mobility) > UNLIKE + MEMORY:
            del self._mobility[UNLIKE]
        latest = self._mobility[UNLIKE:] or self._mobility
        mobility = sum(latest) / len(latest)
        wanted = self.config.travel / self.updates / math.sqrt(mobility) if mobility > 0 else math.inf
        self.peak = min(max(wanted, self.peak / DOWN), self.peak * UP)

    def state(self) -> dict[str, Any]:
        """Returns plain data (for JSON) that a checkpoint keeps."""
        return {"peak": self.peak, "mobility": list(self._mobility)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` returned; a rate that the config gives stays."""
        if self.config.lr == "auto":
            self.peak, self._mobility = state["peak"], list(state["mobility"])


def cosine_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Returns the learning rate at a 0-based step: linear warm-up to `peak`, then a half cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))
