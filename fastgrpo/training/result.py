"""What a run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.callbacks.evaluation import EvaluationCallback


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


def result_of(
    callbacks: Sequence[Callback], directory: Path | None, iterations: int, metrics: dict[str, float]
) -> TrainResult:
    """Returns the result of a trainer's callbacks, counts and last metrics."""
    history = [row for c in callbacks if isinstance(c, EvaluationCallback) for row in c.history]
    best = next((c.best_checkpoint for c in callbacks if isinstance(c, CheckpointCallback)), None)
    return TrainResult(directory, iterations, metrics, best, history)
