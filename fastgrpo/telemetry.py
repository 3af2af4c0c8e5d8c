"""What a run tells: metrics.jsonl and events.jsonl (always), TensorBoard and W&B (when asked), phase times, memory, a
live line."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import Config
from fastgrpo.errors import UserError, require

# Metrics that are worth an event of their own where they are not 0: work that was thrown away.
LOST = ("optimizer_steps/skipped", "samples/failed")


class Telemetry:
    """Metrics and images of a run, written by the main process; everywhere else every method does nothing.

    Raises UserError, at once, where TensorBoard or W&B is asked for and not installed.
    """

    def __init__(self, run_dir: str | Path, config: Config, main: bool = True) -> None:
        self._main = main
        if not main:
            return
        self._dir = Path(run_dir)
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
        if not self._main:
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
        if self._main:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._append(self._events, {"time": now, "event": kind, "iteration": iteration, **_finite(what)})

    def images(self, iteration: int, tag: str, png_path: str | Path, captions: Sequence[str]) -> None:
        """The grid image at `png_path` with its captions, to TensorBoard and W&B; the file itself stays where it is."""
        if not self._main:
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
        if not self._main:
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
        if not self._main:
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

    Raises UserError, naming the line, where any other is not what `Telemetry.log` writes.
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


class PhaseTimer:
    """Seconds and the most memory by phase. On a GPU, CUDA events mark the phases and nothing waits for them before
    `read`; memory is what its allocator has given out, which the host knows.

    peak: bytes, the most of all phases and between them. clock: of the host, in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._cuda = torch.device(device).type == "cuda"
        self.peak = 0
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, int] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`, its name in a profiler's trace too; phases do not nest."""
        self._mark()
        with torch.profiler.record_function(name):
            try:
                yield from self._timed(name)
            finally:
                self._memory[name] = max(self._memory.get(name, 0), self._mark())

    def _mark(self) -> int:
        """The most memory since the last mark."""
        most = peak_memory_bytes()
        self.peak = max(self.peak, most)
        forget_peak_memory()
        return most

    def _timed(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, start, end))
            return
        begin = self.clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self.clock() - begin

    def lap(self) -> Lap:
        """What passed since the last lap. Reading nothing, it waits for nothing; a new lap begins."""
        now = self.clock()
        lap = Lap(now - self._since, self._seconds, self._events, self._memory)
        self._seconds, self._events, self._since, self._memory = {}, [], now, {}
        return lap

    def read(self) -> dict[str, float]:
        """The seconds of a lap that ends now; see `Lap.read`."""
        return self.lap().read()


@dataclasses.dataclass
class Lap:
    """A stretch of a run: seconds of the clock, and by phase. memory: bytes, the most in each phase."""

    total: float
    seconds: dict[str, float]
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    memory: dict[str, int]

    def read(self) -> dict[str, float]:
        """Seconds by phase, with `total` (of the clock) and `other` (in no phase). On a GPU it waits for its end."""
        seconds = dict(self.seconds)
        if self.events:
            self.events[-1][2].synchronize()
        for name, start, end in self.events:
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        return {**seconds, "other": max(0.0, self.total - sum(seconds.values())), "total": self.total}


def forget_peak_memory() -> None:
    """`peak_memory_bytes` counts anew from here, but where the system does not allow that (not Linux, no GPU)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        # proc(5): resets the resident high-water mark, and nothing else.
        file.write("5")


def peak_memory_bytes() -> int:
    """The most memory allocated since `forget_peak_memory`: on the current GPU where there is one, else resident in
    this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # Not getrusage: its maximum begins with that of the process which started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """On a terminal a live line (iteration, reward, seconds an iteration, time left) over a table of the last
    iteration's phases; else a line every 10 s."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int, start: int = 0, enabled: bool = True) -> None:
        self._total, self._done, self._start, self._enabled = total, start, start, enabled
        self._begin = self._spoke = time.perf_counter()
        self._live: Any = None
        if not enabled:
            return
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        if self._console.is_terminal:
            columns = (TextColumn("iteration"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total, completed=start, state="starting")
            self._live = Live(self._bar, console=self._console)
            self._live.start()

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` iterations are behind us, the last with these metrics."""
        if not self._enabled:
            return
        now = time.perf_counter()
        self._done = done
        pace = (now - self._begin) / max(1, done - self._start)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - done)))
        state = f"reward {metrics['reward/mean']:.3f} · {pace:.2f} s/iteration · {left} left"
        if self._live is not None:
            from rich.console import Group

            self._bar.update(self._task, completed=done, state=state)
            self._live.update(Group(self._bar, phase_table(metrics)))
        elif now - self._spoke >= self.SECONDS_BETWEEN_LINES or done == self._total:
            self._spoke = now
            remarks = "".join(f" · {remark}" for remark in remarks_of(metrics))
            print(f"iteration {done}/{self._total} · {state}{remarks}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._live is not None:
            self._console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A rank is worth a remark when the others wait for it for this share of an iteration.
STRAGGLES = 0.05


def phase_table(metrics: Mapping[str, float]) -> Any:
    """A rich table of an iteration: seconds, share and most memory of each phase; remarks below."""
    from rich import box
    from rich.table import Table

    remarks = ", ".join(remarks_of(metrics)) or None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=remarks, caption_justify="left")
    for column in ("phase", "seconds", "share", "most memory"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    total = metrics["time/total"]
    phases = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/") and k != "time/total"}
    for name, seconds in phases.items():
        memory = metrics.get(f"memory/{name}_bytes")
        shown = "" if memory is None else f"{memory / 2**30:.2f} GiB"
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.0%}", shown)
    return table


def remarks_of(metrics: Mapping[str, float]) -> list[str]:
    """What else an iteration's metrics tell: the rank that the others waited for, the GPUs' power, clock and limits."""
    found = []
    if metrics.get("ranks/behind_seconds", 0.0) > STRAGGLES * metrics.get("time/total", math.inf):
        found.append(f"rank {metrics['ranks/last']:.0f} is {metrics['ranks/behind_seconds']:.2f} s behind")
    if "gpu/power_w" in metrics:
        found.append(f"{metrics['gpu/power_w']:.0f} W")
    if "gpu/clock_mhz" in metrics:
        found.append(f"{metrics['gpu/clock_mhz']:.0f} MHz")
    if metrics.get("gpu/limited"):
        found.append(f"{metrics['gpu/limited']:.0%} of GPUs held back by power or heat")
    return found
