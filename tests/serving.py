"""A reward server in a thread of this process, on a free port of the loopback address; a fuzzer for it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

TOKEN = "a token of the tests"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of an ASGI application while it is served."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
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
