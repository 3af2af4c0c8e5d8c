"""A reward server in a thread of this process, on a free port of the loopback address; what a hostile client sends it,
and a network that fails."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.responses import Response

TOKEN = "a token of the tests"


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """The URL of an ASGI application while it is served, with uvicorn's options."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http{'s' if 'ssl_certfile' in options else ''}://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def malformed(rng: random.Random, good: bytes, limit: int) -> tuple[str, str, dict[str, str], bytes]:
    """A request that should be refused: (method, path, headers, body)."""
    auth = {"Authorization": f"Bearer {TOKEN}"}
    body = bytearray(good)
    kind = rng.randrange(10)
    if kind == 0:
        return "POST", "/v1/score/shapes", {}, good
    if kind == 1:
        return "POST", "/v1/score/shapes", {"Authorization": f"Bearer {TOKEN}x"}, good
    if kind == 2:
        return "POST", f"/v1/score/{rng.choice(['nothing', '../shapes', '%00', 'shapes%2f', 'é'])}", auth, good
    if kind == 3:
        return rng.choice(["PUT", "DELETE", "PATCH", "GET"]), "/v1/score/shapes", auth, good
    if kind == 4:
        return "POST", "/v1/score/shapes", auth, bytes(rng.randbytes(rng.randrange(0, 300)))
    if kind == 5:
        return "POST", "/v1/score/shapes", auth, good[: rng.randrange(len(good))]
    if kind == 6:
        return "POST", "/v1/score/shapes", auth, good + rng.randbytes(rng.randrange(1, 50))
    if kind == 7:
        # A pickle that would write a file if anybody loaded it.
        return "POST", "/v1/score/shapes", auth, b"cos\nsystem\n(S'touch /tmp/fastgrpo-was-executed'\ntR."
    if kind == 8:
        return "POST", "/v1/score/shapes", auth, bytes(limit + 1 + rng.randrange(1000))
    # The JSON of the header and of the request: any of its first bytes broken, to something that is not the same.
    place = rng.randrange(0, 150)
    body[place] ^= 1 << 7
    return "POST", "/v1/score/shapes", auth, bytes(body)


class Unreliable:
    """ASGI middleware: a share of the calls fails (500), hangs for `hang` seconds, or is answered with garbage."""

    GARBAGE = (
        b"",
        b"garbage",
        b'{"values": [1.0]}',
        b'{"values": [9e9], "valid": [true], "asked": [true]}',
        b"\xff\x00",
    )

    def __init__(self, app: Any, share: float, hang: float, seed: int = 0) -> None:
        self.app, self.share, self.hang = app, share, hang
        self.random = random.Random(seed)
        self.counts = {"good": 0, "failed": 0, "hung": 0, "garbage": 0}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/score"):
            await self.app(scope, receive, send)
            return
        fate = "good"
        if self.random.random() < self.share:
            fate = self.random.choice(["failed", "hung", "garbage"])
        self.counts[fate] += 1
        if fate == "hung":
            await asyncio.sleep(self.hang)
        if fate in ("good", "hung"):
            await self.app(scope, receive, send)
        elif fate == "failed":
            await Response("no", 500)(scope, receive, send)
        else:
            await Response(self.random.choice(self.GARBAGE))(scope, receive, send)
