"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        directory: The run directory, or None where this process wrote nothing.
        iterations: How many iterations were done, those before a resume included.
        metrics: The metrics of the last iteration, as in metrics.jsonl; empty where none was done.
        best_checkpoint: The checkpoint of the best held-out evaluation; None where there is none, and where the base
            model was best.
        evaluations: A row for each held-out evaluation: iteration, score, rewards.
    """

    directory: Path | None
    iterations: int
    metrics: dict[str, float]
    best_checkpoint: Path | None
    evaluations: list[dict[str, Any]]


def result_of(trainer: Trainer) -> TrainResult:
    """Returns what a trainer's run has come to so far, its statistics read."""
    evaluation, checkpoints = EvaluationCallback.of(trainer), CheckpointCallback.of(trainer)
    history = [] if evaluation is None else evaluation.history
    best = None if checkpoints is None else checkpoints.best_checkpoint
    return TrainResult(trainer.log.directory, trainer.iteration, trainer.flush(), best, history)
