"""What a run writes of itself: metrics.jsonl and events.jsonl (always), TensorBoard and W&B (when asked)."""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config import Config
from fastgrpo.errors import UserError, require

# Metrics that are worth an event of their own where they are not 0: work that was thrown away.
LOST = ("optimizer_steps/skipped", "samples/failed")


class RunLog:
    """Metrics, events and images of a run, written by the main process; elsewhere every method does nothing.

    Args:
        directory: The run directory, which is made where it is not there; None: nothing is written.
        config: Of the run; its `telemetry` section says what is written beside the files.
        main: Whether this is the process that writes.

    Attributes:
        directory: Where this process writes; None where it does not.

    Raises:
        UserError: At once, where TensorBoard or W&B is asked for and not installed.
    """

    def __init__(self, directory: str | Path | None, config: Config, main: bool = True) -> None:
        self.directory = Path(directory) if directory is not None and main else None
        if self.directory is None:
            return
        self._dir = self.directory
        self._dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        if config.telemetry.tensorboard:
            require("tensorboard", "telemetry.tensorboard")
        if config.telemetry.wandb_project is not None:
            require("wandb", "telemetry.wandb_project")
        self._path = self._dir / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._events = (self._dir / "events.jsonl").open("ab", buffering=0)
        self._purge_step: int | None = None
        self._board_: Any = None
        self._wandb_: Any = None

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """One JSON line, `{"iteration": …, **metrics}`, flushed; a number that is not finite is written as null."""
        if self.directory is None:
            return
        line: dict[str, float | int | None] = {"iteration": iteration}
        line |= _finite({name: float(value) for name, value in metrics.items()})
        self._append(self._file, line)
        lost = {name: metrics[name] for name in LOST if metrics.get(name)}
        if lost:
            self.event("lost", iteration, **lost)
        if board := self._board():
            for name, value in metrics.items():
                board.add_scalar(name, value, iteration)
        if run := self._wandb():
            run.log(dict(metrics), step=iteration)

    def event(self, kind: str, iteration: int, **what: Any) -> None:
        """One JSON line, `{"time": …, "event": kind, "iteration": …, **what}`, of something that happened: time is UTC.

        A resumed run goes on below: unlike metrics, what happened stays.
        """
        if self.directory is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._append(self._events, {"time": now, "event": kind, "iteration": iteration, **_finite(what)})

    def images(self, iteration: int, tag: str, png_path: str | Path, captions: Sequence[str]) -> None:
        """The grid image at `png_path` with its captions, to TensorBoard and W&B; the file itself stays where it is."""
        if self.directory is None:
            return
        if board := self._board():
            import numpy as np
            from PIL import Image

            with Image.open(png_path) as image:
                board.add_image(tag, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")
            board.add_text(
                f"{tag}/prompts", "\n".join(f"{i + 1}. {text}" for i, text in enumerate(captions)), iteration
            )
        if run := self._wandb():
            image_type = importlib.import_module("wandb").Image
            run.log({tag: image_type(str(png_path), caption="\n".join(captions))}, step=iteration)

    def rewind(self, iteration: int) -> None:
        """Drops what was logged at or past `iteration`, from which a resumed run goes on. Called before `log`."""
        if self.directory is None:
            return
        self._file.close()
        kept = [line for line in read_metrics(self._dir) if line["iteration"] < iteration]
        scratch = self._path.with_suffix(".tmp")
        with scratch.open("wb", buffering=0) as self._file:
            for line in kept:
                self._append(self._file, line)
            os.fsync(self._file.fileno())
        scratch.replace(self._path)
        self._file = self._path.open("ab", buffering=0)
        self._purge_step = iteration

    def close(self) -> None:
        if self.directory is None:
            return
        self._file.close()
        self._events.close()
        if self._board_ is not None:
            self._board_.close()
        if self._wandb_ is not None:
            self._wandb_.finish()

    def _append(self, file: Any, line: dict[str, Any]) -> None:
        """One line in one write: nothing stays in a buffer to fail again at exit."""
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            written = file.write(data)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write the metrics: {error.strerror}") from None
        if written != len(data):
            raise UserError(f"{self._path}: cannot write the metrics: the disk is full")

    def _board(self) -> Any:
        """The TensorBoard writer, opened at the first use: only then is it known where a resumed run goes on."""
        if self._config.telemetry.tensorboard and self._board_ is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board_ = SummaryWriter(str(self._dir / "tensorboard"), purge_step=self._purge_step)
        return self._board_

    def _wandb(self) -> Any:
        """The W&B run. A resumed one goes on under its id; steps it had already logged past the checkpoint stay."""
        project = self._config.telemetry.wandb_project
        if project is not None and self._wandb_ is None:
            id_file = self._dir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4))
            self._wandb_ = importlib.import_module("wandb").init(
                project=project,
                name=self._dir.name,
                dir=str(self._dir),
                id=id_file.read_text().strip(),
                resume="allow",
                config=self._config.model_dump(mode="json"),
            )
        return self._wandb_


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With null for numbers that JSON does not have."""
    found = {name: _finite(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, `[]` without one; a last line that a kill cut short is left out.

    Raises UserError, naming the line, where any other is not what `RunLog.log` writes.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    last = lines.pop()
    records = []
    for number, text in enumerate([*lines, last] if last else lines, 1):
        try:
            record = json.loads(text)
            int(record["iteration"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines) + 1:
                break
            raise UserError(f"{path}:{number}: not a line of metrics; remove it to go on") from None
        records.append(record)
    return records
