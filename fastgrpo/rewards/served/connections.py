"""What a server grants a connection before it knows who is there: a place, and seconds to send a request's head.

uvicorn waits for a head for ever and counts no connections: a few hundred half-sent ones would close it for all.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

# Files of this process that are not connections: libraries, weights, logs.
OTHER_FILES = 256


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 whose connections have `head_timeout` seconds for each request's head.

    Above `most` of them one without a request gives way to a new one: the oldest that never had any, then the oldest.
    Where all are at work, the new one is closed.
    """

    most: ClassVar[int]
    head_timeout: ClassVar[float]
    _head: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """No request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > self.most:
            waiting = [c for c in self.connections if isinstance(c, GuardedProtocol) and c is not self and c.idle]
            spared = min(waiting, key=lambda c: (c.cycle is not None, c.since), default=self)
            spared.connections.discard(spared)
            spared.transport.abort()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._head is None:
            # The next request of a connection that stays open has begun.
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(self.head_timeout, self._head_is_late)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


def guarded(most: int, head_timeout: float) -> type[GuardedProtocol]:
    """The protocol with these limits, for uvicorn's `http`."""
    return type("LimitedProtocol", (GuardedProtocol,), {"most": most, "head_timeout": head_timeout})


def allow_connections(most: int) -> int:
    """Raises this process's limit of open files as far as it may; gives how many of `most` connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fit = most if soft == resource.RLIM_INFINITY else min(most, max(1, soft - OTHER_FILES))
    if fit < most:
        log.warning("serve.max_connections: %d, but the limit of open files (ulimit -n %d) allows %d", most, soft, fit)
    return fit


def server_options(most: int, head_timeout: float) -> dict[str, Any]:
    """What uvicorn is given so that a stranger cannot close it for all."""
    return {"http": guarded(allow_connections(most), head_timeout), "ws": "none"}
