"""What a terminal shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastgrpo.algorithms.arithmetic import arithmetic
from fastgrpo.observe.progress import Progress
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class ProgressCallback(Callback):
    """Shows a live line on a terminal, or a line every ten seconds elsewhere, and the run's notes."""

    name = "progress"

    def __init__(self, enabled: bool, said: Sequence[str] = ()) -> None:
        self.enabled, self.said = enabled, said
        self.progress: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.progress = Progress(trainer.config.train.iterations, trainer.iteration, self.enabled)
        trainer.note(arithmetic(trainer.config, trainer.world.size))
        for text in self.said:
            trainer.note(f"warning: {text}")

    def on_metrics(self, trainer: Trainer, iteration: int, metrics: Mapping[str, float]) -> None:
        if self.progress is not None:
            self.progress.update(iteration + 1, metrics)

    def on_note(self, trainer: Trainer, text: str) -> None:
        if self.progress is not None:
            self.progress.note(text)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
