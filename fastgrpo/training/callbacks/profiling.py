"""Profiler traces of the iterations that telemetry.profile names."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.observe.profiling import profiled
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class ProfilingCallback(Callback):
    """Traces chosen iterations into a folder. It stands first, so that it traces nothing but iterations."""

    name = "profiling"

    def __init__(self, folder: Path, iterations: list[int]) -> None:
        self.folder, self.iterations, self._trace = folder, iterations, ExitStack()

    def before_iteration(self, trainer: Trainer) -> None:
        if trainer.iteration in self.iterations:
            self._trace.enter_context(profiled(self.folder, trainer.iteration, trainer.world.rank))

    def after_iteration(self, trainer: Trainer) -> None:
        self._trace.close()

    def close(self) -> None:
        self._trace.close()
