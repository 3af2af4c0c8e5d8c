"""A line when ranks wait long for one another: which rank, and in which phase it is.

Every rank says every few seconds in `run.dir/ranks/<rank>.json` what it is doing. Files, because a store in the memory
of a rank would stop with it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

from fastgrpo.observe.progress import warn

# In these phases a rank waits for others, or has nothing to do.
WAITING = ("sync", "")


class Watch:
    """Says of a phase that lasts longer than `seconds`, and of a rank that gives no sign of life for so long.

    doing: the iteration and the phase of this rank. say: is told a line, on the first rank that is alive.
    """

    def __init__(
        self, directory: Path, rank: int, ranks: int, doing: Callable[[], tuple[int, str]], say: Callable[[str], None],
        seconds: float, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.folder, self.rank, self.ranks = directory / "ranks", rank, ranks
        self.doing, self.say, self.seconds, self.clock = doing, say, seconds, clock
        # Of each rank: what it last said, when that changed, and when its phase did, by the clock of this rank.
        self._seen: dict[int, tuple[Any, float, float]] = {}
        self._count = 0
        self._said: dict[int, float] = {}
        self._over = Event()
        self._thread = Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Looks every few seconds, in a thread."""
        if self.seconds:
            if self.ranks > 1:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and what it left in the directory."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()

    def _run(self) -> None:
        while not self._over.wait(min(5.0, self.seconds / 6)):
            # A full disk, or one that is gone, is for others to say.
            with contextlib.suppress(OSError):
                self.look()

    def look(self) -> None:
        """Says what this rank does, and looks at the others."""
        self._count += 1
        mine = [self._count, *self.doing()]
        if self.ranks > 1:
            scratch = self._file(self.rank).with_suffix(".tmp")
            scratch.write_text(json.dumps(mine))
            scratch.replace(self._file(self.rank))
        now = self.clock()
        for rank in range(self.ranks):
            said = mine if rank == self.rank else self._of(rank)
            before, alive, since = self._seen.get(rank, (None, now, now))
            if said is not None and said != before:
                since = since if before is not None and said[1:] == before[1:] else now
                alive = now
            self._seen[rank] = (said or before, alive, since)
        living = [rank for rank, (_, alive, _) in self._seen.items() if now - alive < self.seconds]
        if living[:1] != [self.rank]:
            return
        for rank, text in self._troubles(now).items():
            # Then every five minutes.
            if now - self._said.get(rank, -1e9) >= max(300.0, self.seconds):
                self._said[rank] = now
                self.say(text)

    def _troubles(self, now: float) -> dict[int, str]:
        # Where ranks have been for long: a change that this rank has not read yet is no trouble.
        still = {r: said[1:] for r, (said, _, since) in self._seen.items() if said and now - since >= self.seconds}
        found = {}
        for rank, (said, alive, since) in self._seen.items():
            iteration, phase = said[1:] if said is not None else (0, "start")
            where = f"'{phase}' of iteration {iteration}" if phase else f"iteration {iteration}"
            if now - alive >= self.seconds:
                found[rank] = f"rank {rank} has given no sign of life for {now - alive:.0f} s; it was in {where}"
            elif now - since >= self.seconds and phase not in WAITING:
                others = [r for r, other in still.items() if r != rank and other != [iteration, phase]]
                if others or phase == "reward":
                    wait = f", and {len(others)} of {self.ranks} ranks wait" if others else ""
                    found[rank] = f"rank {rank} has been in {where} for {now - since:.0f} s{wait}"
        return found

    def _of(self, rank: int) -> Any:
        try:
            return json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


@contextmanager
def warned_after(seconds: float, text: str) -> Iterator[None]:
    """Says `text` where what is done within it lasts longer than `seconds`; 0: never."""
    timer = Timer(seconds, warn, [text])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
