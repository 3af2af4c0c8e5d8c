"""Checkpoints every so many iterations, of the best held-out evaluation, and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.checkpoint import CheckpointStore
from fastgrpo.training.state import save

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Writes checkpoints into a store. It stands after the evaluation in the trainer's list, whose best it keeps."""

    name = "checkpoint"

    def __init__(self, store: CheckpointStore, evaluation: EvaluationCallback | None = None) -> None:
        self.store, self.evaluation = store, evaluation
        self.saved = -1

    def on_start(self, trainer: Trainer) -> None:
        self.saved = trainer.iteration if trainer.iteration in self.store.iterations() else -1

    def after_iteration(self, trainer: Trainer) -> None:
        every = trainer.config.checkpoint.every
        if (every and trainer.iteration % every == 0) or self.best == trainer.iteration:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved != trainer.iteration:
            self.save(trainer)
        self.store.wait()

    def close(self) -> None:
        self.store.wait()

    @property
    def best(self) -> int | None:
        """The iteration of the best evaluation so far."""
        best = None if self.evaluation is None else self.evaluation.best
        return None if best is None else best["iteration"]

    @property
    def best_checkpoint(self) -> Path | None:
        """The directory of the best evaluation's checkpoint; None where there is none."""
        return None if self.best is None or not self.store.path(self.best).exists() else self.store.path(self.best)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint of the iterations done so far."""
        trainer.flush()
        with trainer.outside_iteration("checkpoint"):
            save(trainer, self.store, self.best)
        self.saved = trainer.iteration
