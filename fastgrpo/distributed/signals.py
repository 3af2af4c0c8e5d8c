"""Signals ask a run to stop; only an agreement between its ranks stops it. Needs no torch, which is imported later.

SIGINT (Ctrl-C) interrupts a run; SIGTERM and SIGUSR1, which schedulers send, end it with exit code 75, to be requeued.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from fastgrpo.errors import REQUEUE, PreemptedError

if TYPE_CHECKING:
    import numpy as np

# Why a run stops; where ranks differ, the largest counts. Halted: by a callback, which may be one of a single rank.
GOING_ON, INTERRUPTED, PREEMPTED, HALTED = 0, 1, 2, 3

# How a run ended, for its log.
ENDS = {GOING_ON: "finished", INTERRUPTED: "interrupted", PREEMPTED: "preempted", HALTED: "halted"}
STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}

# A signal that comes again within so many seconds is the same one: a terminal and torchrun both pass Ctrl-C on.
GRACE = 5.0
# How long a rank that was asked to stop still waits for others to meet, which would agree with it.
PATIENCE = 20.0


class Ranks(Protocol):
    """What `StopRequest.agree` needs of a World."""

    def gather_all(self, vector: np.ndarray, /) -> np.ndarray: ...


class StopRequest:
    """`wish`: what the signals to this rank ask for. `agreed`: what all ranks know, and act upon.

    Ranks agree in their gather of scores, once an iteration, and by `agree` between the parts of a run. A wish that
    comes too late for one agreement is there at the next.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.wish, self.agreed = GOING_ON, GOING_ON
        self._clock = clock
        self._first: dict[int, float] = {}

    def ask(self, number: int, _frame: Any = None) -> None:
        """Takes in a signal. A second Ctrl-C, after GRACE seconds, is a KeyboardInterrupt; schedulers ask in vain."""
        now = self._clock()
        if number in self._first:
            if number == signal.SIGINT and now - self._first[number] > GRACE:
                raise KeyboardInterrupt
            return
        self._first[number] = now
        self.wish = max(self.wish, STOPS[signal.Signals(number)])
        again = "; Ctrl-C again in a while: at once" if number == signal.SIGINT else ""
        # Not print: a handler may come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: stopping as soon as all ranks know, with a checkpoint{again}\n".encode())

    def agree(self, ranks: Ranks, halted: str | None = None) -> int:
        """What any rank wishes; every rank calls. halted: why this one's callbacks end the run, or None."""
        import numpy as np

        return self.take(int(ranks.gather_all(np.array([float(self.wished(halted))])).max()))

    def wished(self, halted: str | None) -> int:
        """What this rank wishes: its signals, or where there is a reason its callbacks."""
        return HALTED if halted else self.wish

    def take(self, agreed: int) -> int:
        """Takes in what an agreement found."""
        self.agreed = max(self.agreed, agreed)
        return self.agreed

    def leave(self, text: str) -> None:
        """Raises what ends this process where the ranks agreed: PreemptedError with a text, or KeyboardInterrupt."""
        if self.agreed == PREEMPTED:
            raise PreemptedError(text)
        if self.agreed == INTERRUPTED:
            raise KeyboardInterrupt


_current: StopRequest | None = None
# What stood before `listen`.
_before: dict[int, Any] = {}


def stop_request() -> StopRequest:
    """The one that signals go to, or a new one where none is listened to yet."""
    return _current or StopRequest()


def listen() -> None:
    """Signals become wishes from here to the end of the process: what the command line calls first."""
    global _current
    _current = StopRequest()
    for number in STOPS:
        _before.setdefault(number, signal.signal(number, _current.ask))


def stop_listening() -> None:
    """Undoes `listen`, where the process goes on after a command."""
    global _current
    _current = None
    while _before:
        signal.signal(*_before.popitem())


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Signals become wishes of `request` in the block, unless they already do."""
    before = {}
    try:
        if _current is not request:
            for number in STOPS:
                before[number] = signal.signal(number, request.ask)
    except ValueError:
        # Not the main thread (a notebook, a server): signals stay as they are.
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def meeting(patience: float = PATIENCE) -> Iterator[None]:
    """Around the wait for other ranks, in C++, where no handler runs.

    A signal is taken as ever once they are there; where they do not come within `patience` seconds of it, the process
    ends, with its exit code. Nothing is under way yet.
    """
    if _current is None:
        yield
        return
    met, (reader, writer) = threading.Event(), os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in STOPS and not met.wait(patience):
                name = signal.Signals(number[0]).name
                os.write(2, f"{name}: ended while waiting for the other ranks\n".encode())
                os._exit(REQUEUE if STOPS[signal.Signals(number[0])] == PREEMPTED else 128 + signal.SIGINT)
        os.close(reader)

    before = signal.set_wakeup_fd(writer)
    # One that came before.
    os.write(writer, bytes(number for number, wish in STOPS.items() if wish == _current.wish)[:1])
    threading.Thread(target=watch, name="meeting", daemon=True).start()
    try:
        yield
    finally:
        met.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
