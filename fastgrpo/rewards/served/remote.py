"""The reward `remote`: samples are scored by reward servers (`fastgrpo serve-rewards`), in calls that run beside one
another, are tried again with back-off, go to the next server when one fails, and are hedged when one is slow.

A call that fails for good leaves its samples without a score; the others keep theirs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from torch import Tensor

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError, require
from fastgrpo.rewards.base import Scores
from fastgrpo.rewards.served.wire import MEDIA_TYPE, Encoding, WireError, decode_scores, encode_request

log = logging.getLogger(__name__)

# What another attempt may mend: a timeout, too many requests, or the server's own trouble.
RETRIED = {408, 425, 429}
# Of an answer: bytes, and bytes for each sample.
ANSWER, ANSWER_EACH = 2**16, 2**12


class RemoteReward:
    """The reward called `reward` of the servers at `url` (one, or a list to share the calls).

    token_env: the environment variable with the servers' token. batch: samples a call. connections: calls at a time.
    encoding: raw (float32, exact), uint8, png or webp. timeout: seconds of a call; deadline: of all a sample's
    attempts, after which it is late and has no score. retries: attempts after the first, each waiting `backoff` times
    2ⁿ seconds. hedge_after: seconds after which a second call is sent beside a slow one; null: never. ca_file: the PEM
    file of the authority that signed the certificate of an https server; null: those that this machine trusts.
    """

    def __init__(
        self,
        url: str | list[str],
        reward: str,
        token_env: str = "FASTGRPO_REWARD_TOKEN",
        batch: int = 16,
        connections: int = 8,
        encoding: Encoding = "raw",
        timeout: float = 60.0,
        deadline: float = 300.0,
        retries: int = 4,
        backoff: float = 0.25,
        hedge_after: float | None = None,
        ca_file: str | None = None,
    ) -> None:
        require("httpx", "the reward 'remote'")
        self.urls = [u.rstrip("/") for u in ([url] if isinstance(url, str) else url)]
        for one in self.urls:
            if not one.startswith(("http://", "https://")):
                raise ConfigError(f"rewards: remote: url '{one}' should start with http:// or https://")
        if not self.urls or batch < 1 or connections < 1 or retries < 0 or min(timeout, deadline) <= 0 or backoff < 0:
            raise ConfigError("rewards: remote: url is empty, or batch, connections, timeout … are not positive")
        if encoding not in ("raw", "uint8", "png", "webp"):
            raise ConfigError(f"rewards: remote: encoding '{encoding}' is not one of raw, uint8, png, webp")
        self.reward, self.batch, self.connections = reward, batch, connections
        self.encoding: Encoding = encoding
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self.backoff, self.hedge_after = backoff, hedge_after
        self._trusted = _trusted(ca_file)
        self._token = os.environ.get(token_env, "")
        if not self._token:
            raise ConfigError(f"rewards: remote: the environment variable {token_env} (token_env) holds no token")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = 0

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None = None) -> Scores:
        """Raises RuntimeError where no call at all succeeded, with the reason of the first."""
        chunks = [slice(i, i + self.batch) for i in range(0, len(prompts), self.batch)]
        until = time.monotonic() + self.deadline
        results = self._run(self._all([(samples[c], prompts[c], fps) for c in chunks], until))
        reasons = [r for r in results if isinstance(r, str)]
        if len(reasons) == len(results):
            raise RuntimeError(reasons[0])
        for reason, times in {r: reasons.count(r) for r in reasons}.items():
            log.warning("reward '%s': %d of %d calls failed: %s", self.reward, times, len(results), reason)
        lengths = [len(prompts[c]) for c in chunks]
        return Scores.concatenate(
            [Scores.failed(n) if isinstance(r, str) else r for r, n in zip(results, lengths, strict=True)]
        )

    def _run(self, work: Coroutine[Any, Any, list[Scores | str]]) -> list[Scores | str]:
        """Runs in this reward's own event loop, whose connections stay open; from any thread."""
        if self._loop is None:
            import httpx

            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="remote reward").start()
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * self.connections)
            # Proxies of the environment are for the outside world; a reward server is named by its own address.
            self._client = httpx.AsyncClient(timeout=self.timeout, limits=limits, trust_env=False, verify=self._trusted)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _all(self, chunks: list[tuple[Tensor, Sequence[Prompt], float | None]], until: float) -> list[Any]:
        places = asyncio.Semaphore(self.connections)

        async def one(chunk: tuple[Tensor, Sequence[Prompt], float | None]) -> Scores | str:
            async with places:
                body = await asyncio.to_thread(encode_request, *chunk, self.encoding)
                return await self._persist(body, len(chunk[1]), until)

        return await asyncio.gather(*map(one, chunks))

    async def _persist(self, body: bytes, count: int, until: float) -> Scores | str:
        """The scores of one call, tried again where that may help; else the reason why there are none."""
        reason = "late: the deadline passed before it was sent"
        for attempt in range(self.retries + 1):
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                return await asyncio.wait_for(self._hedged(body, count), left)
            except _FinalError as error:
                return str(error)
            except TimeoutError:
                reason = f"late: no answer in {min(self.timeout, self.deadline):g} s"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
            if attempt < self.retries:
                await asyncio.sleep(min(wait, max(0.0, until - time.monotonic())))
        return reason

    async def _hedged(self, body: bytes, count: int) -> Scores:
        """The first good answer of a call and, where it is slow, of a second one. Raises what the last one raised."""
        calls = {asyncio.create_task(self._call(body, count))}
        try:
            done, calls = await asyncio.wait(calls, timeout=self.hedge_after)
            if not done:
                calls.add(asyncio.create_task(self._call(body, count)))
            error: BaseException | None = None
            while True:
                for task in done:
                    error = task.exception()
                    if error is None:
                        return task.result()
                if not calls:
                    assert error is not None
                    raise error
                done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in calls:
                task.cancel()

    async def _call(self, body: bytes, count: int) -> Scores:
        url = f"{self.urls[self._turn % len(self.urls)]}/v1/score/{self.reward}"
        self._turn += 1
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": MEDIA_TYPE}
        answer = bytearray()
        # httpx's own limit is for each read: an answer that trickles would never reach it.
        async with (
            asyncio.timeout(self.timeout),
            self._client.stream("POST", url, content=body, headers=headers) as response,
        ):
            async for part in response.aiter_bytes():
                answer += part
                if len(answer) > ANSWER + count * ANSWER_EACH:
                    raise WireError(f"an answer of more than {ANSWER + count * ANSWER_EACH} bytes")
        if response.status_code == 200:
            return decode_scores(bytes(answer), count)
        said = bytes(answer[:200]).decode(errors="replace")
        message = f"{url} answered {response.status_code}: {said}"
        if response.status_code in RETRIED or response.status_code >= 500:
            raise RuntimeError(message)
        raise _FinalError(message)


def _trusted(ca_file: str | None) -> ssl.SSLContext | bool:
    """What httpx verifies a server's certificate by. Raises ConfigError for a file that holds no authority's."""
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=os.path.expanduser(ca_file))
    except OSError as error:
        raise ConfigError(f"rewards: remote: ca_file '{ca_file}' cannot be used: {error.strerror or error}") from None


class _FinalError(Exception):
    """What another attempt would not mend."""
