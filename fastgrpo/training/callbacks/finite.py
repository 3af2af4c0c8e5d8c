"""Against runs that learn nothing because numbers are not finite: says which weights, and where to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastgrpo.distributed.shards import local
from fastgrpo.errors import RunPausedError, UserError
from fastgrpo.rewards.scoring import AllScores
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class FiniteCallback(Callback):
    """Ends the run after `limit` optimizer steps in a row that were skipped, all of whole iterations; None: never."""

    name = "finite"

    def __init__(self, limit: int | None) -> None:
        self.limit, self.skipped = limit, 0
        # Optimizer steps so far, by iteration: metrics come while the next one runs.
        self._steps: dict[int, int] = {}
        self._before = 0

    def on_start(self, trainer: Trainer) -> None:
        self._before = trainer.optimizer.steps

    def on_scored(
        self, trainer: Trainer, iteration: int, scored: AllScores, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        self._steps[iteration] = trainer.optimizer.steps - self._before
        self._before = trainer.optimizer.steps
        return {}

    def on_metrics(self, trainer: Trainer, iteration: int, metrics: Mapping[str, float]) -> None:
        taken, skipped = self._steps.pop(iteration, 0), int(metrics["optimizer_steps/skipped"])
        if taken:
            self.skipped = self.skipped + skipped if skipped == taken else 0
        if self.limit is not None and self.skipped >= self.limit:
            what = f"train.max_skipped_steps: {self.skipped} optimizer steps in a row had gradients that are not finite"
            raise_if_not_finite(trainer, what)
            raise RunPausedError(
                f"{what}, and weights are finite. The run is paused with a checkpoint: look at the losses, lower "
                "update.optimizer.lr or objective.clip_high in a new run, or go on with run.resume=true"
            )


def raise_if_not_finite(trainer: Trainer, what: str) -> None:
    """Raises UserError, after `what`, where trained weights are not finite; no checkpoint is written of them.

    Every rank calls, and waits for its device.
    """
    optimizer = trainer.optimizer
    found = np.array([float(not local(p).isfinite().all()) for p in optimizer.parameters])
    wrong = trainer.world.gather_all(found).max(axis=0) > 0
    names = [name for name, bad in zip(optimizer.names, wrong, strict=True) if bad]
    if not names:
        return
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
    checkpoints = CheckpointCallback.of(trainer)
    last = None if checkpoints is None else checkpoints.store.last_finite()
    after = (
        "there is no finite checkpoint yet" if last is None else f"the last finite checkpoint is of iteration {last}"
    )
    raise UserError(f"{what}, and these weights are not finite: {some}; {after}: go on from there at a lower rate")
