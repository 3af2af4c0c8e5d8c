"""What is left of a reward that fails: one line for people, told once, whatever rank it was on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastgrpo.observe.tracebacks import described, message


class FailureLog:
    """Tells of the rewards that fail, on any rank: each failure once, however often it comes back.

    note: prints a line and logs it; on the main process alone. folder: where tracebacks go. process: of all processes;
    what happens on another than the first is told by the first (`tell_others`), once the ranks have met.
    """

    def __init__(self, note: Callable[[str], None], folder: Path | None = None, process: int = 0) -> None:
        self.note, self.folder, self.process = note, folder, process
        self._seen: set[str] = set()
        self._untold: list[str] = []

    def failed(self, what: str, reward: str = "", error: BaseException | None = None) -> None:
        """`what` failed, of a reward with this error; a traceback is written for errors that are new."""
        key = what if error is None else f"{reward}: {type(error).__name__}: {message(error)}"
        if key in self._seen:
            return
        self._seen.add(key)
        line = what if error is None else f"{what}: {described(error, reward, self.folder)}"
        if self.process == 0:
            self.note(line)
        else:
            self._untold.append(line)

    def untold(self) -> list[str]:
        """The lines that the first process has to tell; they are this one's no longer."""
        lines, self._untold = self._untold, []
        return lines

    def tell_others(self, lines: Sequence[Sequence[str]]) -> None:
        """On the first process: tells every process's lines, each with the rank that it comes from."""
        for process, said in enumerate(lines):
            for line in said if self.process == 0 else ():
                self.note(f"rank {process}: {line}")
