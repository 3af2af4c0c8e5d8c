"""What a terminal shows while a run trains."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Mapping
from typing import Any


def warn(text: str) -> None:
    """Prints a warning, at whichever rank and whether or not progress is shown."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Progress:
    """Shows how far a run is: iteration, reward, seconds an iteration, time left.

    On a terminal a live line, over a table of the last iteration's phases where its metrics have them; else a line
    every 10 s.

    Args:
        total: Iterations of the whole run.
        start: Those that are done.
        enabled: Whether anything is shown.
        unit: What is counted.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int, start: int = 0, enabled: bool = True, unit: str = "iteration") -> None:
        self.unit = unit
        self._total, self._start, self._enabled = total, start, enabled
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
            columns = (TextColumn(unit), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total, completed=start, state="starting")
            self._live = Live(self._bar, console=self._console)
            self._live.start()
            # An error that ends the program leaves the terminal its cursor too.
            atexit.register(self._live.stop)

    def update(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `done` iterations are done, the last with these metrics (numbers, or tensors of one)."""
        if not self._enabled:
            return
        now = time.perf_counter()
        pace = (now - self._begin) / max(1, done - self._start)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - done)))
        speaks = now - self._spoke >= self.SECONDS_BETWEEN_LINES or done == self._total
        if self._live is None and not speaks:
            return
        reward = metrics.get("reward/mean")
        shown = {n: f"{float(v):.4g}" for n, v in metrics.items()} if reward is None else {"reward": f"{reward:.3f}"}
        values = "".join(f"{name} {value} · " for name, value in shown.items())
        state = f"{values}{pace:.2f} s/{self.unit} · {left} left"
        if self._live is not None:
            from rich.console import Group

            self._bar.update(self._task, completed=done, state=state)
            self._live.update(Group(self._bar, *([phase_table(metrics)] if "time/total" in metrics else [])))
        else:
            self._spoke = now
            remarks = "".join(f" · {remark}" for remark in remarks_of(metrics))
            print(f"{self.unit} {done}/{self._total} · {state}{remarks}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._live is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            atexit.unregister(self._live.stop)
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
