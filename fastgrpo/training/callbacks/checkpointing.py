"""Checkpoints every so many iterations, of the best held-out evaluation, and at the end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.checkpoints.resume import Claim
from fastgrpo.checkpoints.store import CheckpointStore, plain_states
from fastgrpo.errors import UserError
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback
from fastgrpo.training.state import save

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Writes checkpoints into a store, and holds its run directory. It stands after the evaluation in the trainer's
    list, whose best it keeps."""

    name = "checkpoint"

    def __init__(
        self, store: CheckpointStore, evaluation: EvaluationCallback | None = None, claim: Claim | None = None
    ) -> None:
        self.store, self.evaluation, self.claim = store, evaluation, claim
        self.saved = -1

    def on_start(self, trainer: Trainer) -> None:
        # Now, and not at the first checkpoint.
        plain_states({callback.name: callback.state() for callback in trainer.callbacks})
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
        # After an error: what ended the run is what to say; a checkpoint that fails too leaves the one before it.
        with suppress(UserError):
            self.store.wait()
        if self.claim is not None:
            self.claim.release()

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
        with trainer.iterations.outside("checkpoint", trainer.iteration):
            save(trainer, self.store, self.best, {} if self.claim is None else self.claim.identity)
        self.saved = trainer.iteration
