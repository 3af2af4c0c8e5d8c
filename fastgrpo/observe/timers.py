"""Seconds and memory of the phases of an iteration."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch


class PhaseTimer:
    """Seconds and the most memory by phase. On a GPU, CUDA events mark the phases and nothing waits for them before
    `read`; memory is what its allocator has given out, which the host knows.

    peak: bytes, the most of all phases and between them. clock: of the host, in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._cuda = torch.device(device).type == "cuda"
        self.peak = 0
        # The phase that is under way; "": none.
        self.current = ""
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, int] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`, its name in a profiler's trace too; phases do not nest."""
        self._mark()
        with torch.profiler.record_function(name), self.doing(name):
            try:
                yield from self._timed(name)
            finally:
                self._memory[name] = max(self._memory.get(name, 0), self._mark())

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """`current` is `name` in the block: for those who look in from another thread."""
        before, self.current = self.current, name
        try:
            yield
        except Exception as error:
            # The innermost phase that it came from, for whoever explains it.
            error.__dict__.setdefault("phase", name)
            raise
        finally:
            self.current = before

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
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
        # proc(5): resets the resident high-water mark, and nothing else.
        file.write(b"5")


def peak_memory_bytes() -> int:
    """The most memory allocated since `forget_peak_memory`: on the current GPU where there is one, else resident in
    this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # Not getrusage: its maximum begins with that of the process which started this one.
        with open("/proc/self/status", "rb", buffering=0) as file:
            return int(file.read().partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
