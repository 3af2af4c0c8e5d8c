"""A line on stderr when a rank keeps the others waiting (fastgrpo/observe/watch.py)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.observe.progress import warn
from fastgrpo.observe.watch import Watch
from fastgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    from fastgrpo.training.trainer import Trainer


class StallCallback(Callback):
    """Names ranks and phases that take longer than `seconds`; 0: never. It stands before what may take long."""

    name = "stalls"

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory, self.seconds = directory, seconds
        self.watch: Watch | None = None

    def on_start(self, trainer: Trainer) -> None:
        world = trainer.world
        doing, say = (lambda: (trainer.iteration, trainer.timer.current)), partial(self._say, trainer)
        self.watch = Watch(self.directory, world.process, world.ranks, doing, say, self.seconds)
        self.watch.start()

    def close(self) -> None:
        if self.watch is not None:
            self.watch.stop()

    def _say(self, trainer: Trainer, text: str) -> None:
        """From the watching thread. Not a note: any rank may have to say it, and whether or not progress is shown."""
        warn(text)
        trainer.log.event("stall", trainer.iteration, text=text)
