"""What happens around iterations: evaluation, checkpoints, the guard, profiling, progress, and a user's own.

A callback of your own is a class in a file or in a module that Python can import, named in the config:
`callbacks: ["my_callbacks:MyCallback"]`. docs/training.md has an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fastgrpo.rewards.scoring import AllScores

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class Callback:
    """Called by `Trainer.run` at the places below, in the order of the trainer's list. Override what you need.

    Every rank has the callbacks, and calls them alike. A method that all ranks must take part in (an evaluation, a
    checkpoint) may use collectives; what is written belongs to `trainer.world.main`. Reading a device tensor on the
    host in `after_iteration` makes every iteration wait for its update: use `on_metrics`, whose numbers are there.
    """

    # The key of a callback's state in a checkpoint; of a class that gives none, module:Class or file.py:Class.
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def of(cls, trainer: Trainer) -> Self | None:
        """Returns the trainer's callback of this class; None where it has none.

        Args:
            trainer: The trainer.
        """
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)

    def on_start(self, trainer: Trainer) -> None:
        """Called once, before the first iteration, after a resumed run's state was restored."""

    def before_iteration(self, trainer: Trainer) -> None:
        """Called before each iteration; `trainer.iteration` is its number."""

    def on_scored(
        self, trainer: Trainer, iteration: int, scored: AllScores, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Called once an iteration's update was started. Returns metrics to add to the iteration's own.

        Args:
            trainer: The trainer; its `iteration` is the next one already.
            iteration: The number of the iteration.
            scored: The scores of all samples, on the host.
            metrics: The metrics of rewards and advantages, which are known by then.
        """
        return {}

    def after_iteration(self, trainer: Trainer) -> None:
        """Called after each iteration; `trainer.iteration` is the number of iterations done."""

    def on_metrics(self, trainer: Trainer, iteration: int, metrics: Mapping[str, float]) -> None:
        """Called when all metrics of an iteration are known, which is while the next one runs.

        Args:
            trainer: The trainer; its `iteration` is the next one already.
            iteration: The number of the iteration.
            metrics: Its metrics, as metrics.jsonl has them.
        """

    def on_note(self, trainer: Trainer, text: str) -> None:
        """Called with a line that the run has to say.

        Args:
            trainer: The trainer.
            text: The line, without its end.
        """

    def on_end(self, trainer: Trainer) -> None:
        """Called once, after the last iteration, also where the run was paused or asked to stop."""

    def close(self) -> None:
        """Called once, last, whatever ended the run."""

    def state(self) -> dict[str, Any]:
        """Returns plain data (for JSON) that a checkpoint keeps."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes in what `state` returned when the checkpoint was written.

        Args:
            state: Plain data, as JSON gives it back.
        """
