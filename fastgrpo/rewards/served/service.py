"""A reward server: `fastgrpo serve-rewards config.yaml`. It batches samples across clients and speaks HTTP.

    POST /v1/score/<reward>   a request of fastgrpo/rewards/wire.py, with `Authorization: Bearer <token>`
    GET  /health              {"status": "ok"}; open to all
    GET  /metrics             Prometheus text; with the token

What it refuses is a 4xx with one line: 401 without the token, 404 for an unknown reward, 408 for a body that does not
come, 413 above the size limit, 400 for anything malformed, 429 while too much waits. A reward that raises is a 500.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import PathText, PositiveFloat, PositiveInt, Section
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.base import Reward, Scores, ask
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.served.connections import server_options
from fastgrpo.rewards.served.wire import ScoreRequest, WireError, decode_request, encode_scores

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Serve(Section):
    host: str = Field(default="127.0.0.1", description="The address to listen on; only this machine by default.")
    port: Annotated[int, Field(ge=0, lt=65536)] = Field(default=8917, description="0: any free one.")
    token_env: str = Field(
        default="FASTGRPO_REWARD_TOKEN", description="The environment variable that holds the clients' token."
    )
    max_bytes: PositiveInt = Field(default=2**28, description="Of a request's body, and of its samples as float32.")
    max_batch: PositiveInt = Field(default=64, description="Samples that a reward scores at once, over all clients.")
    max_wait: Annotated[float, Field(ge=0)] = Field(
        default=0.002, description="Seconds that a batch which is not full waits for more."
    )
    max_pending: PositiveInt = Field(default=4096, description="Samples that may wait; what comes then is a 429.")
    body_timeout: PositiveFloat = Field(default=60.0, description="Seconds in which a request's body has to come.")
    head_timeout: PositiveFloat = Field(default=10.0, description="Seconds in which a request's headers have to come.")
    max_connections: PositiveInt = Field(
        default=2048, description="Connections at a time; above it, the one that has been idle longest is closed."
    )
    tls_certificate: PathText | None = Field(
        default=None, description="A PEM file, the server's and those between it and its authority's; null: plain HTTP."
    )
    tls_key: PathText | None = Field(default=None, description="The PEM file of its key; null: it is in the same file.")


class ServiceConfig(Section):
    """What `fastgrpo serve-rewards` reads."""

    serve: Serve = Field(default_factory=Serve)
    rewards: Annotated[list[RewardSpec], Field(min_length=1)]

    def token(self) -> str:
        """Raises ConfigError where the environment has none, or too short a one."""
        token = os.environ.get(self.serve.token_env, "")
        if len(token) < 16:
            raise ConfigError(
                f"serve.token_env: the environment variable {self.serve.token_env} should hold a token of at least "
                "16 characters; such as: export " + self.serve.token_env + '="$(openssl rand -hex 16)"'
            )
        return token


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fastgrpo_reward_requests", "Requests by answer.", ["reward", "status"], registry=self.registry
        )
        self.samples = Counter("fastgrpo_reward_samples", "Samples scored.", ["reward"], registry=self.registry)
        self.invalid = Counter(
            "fastgrpo_reward_invalid_samples", "Samples that got no score.", ["reward"], registry=self.registry
        )
        self.batch = Histogram(
            "fastgrpo_reward_batch_samples", "Samples a call.", ["reward"], registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )  # fmt: skip
        self.seconds = Histogram("fastgrpo_reward_seconds", "Of a call.", ["reward"], registry=self.registry)
        self.pending = Gauge("fastgrpo_reward_pending_samples", "Samples that wait.", registry=self.registry)


@dataclass
class Batcher:
    """Calls one reward, in a thread of its own, on samples of as many clients as fit into a batch.

    Samples of different sizes or frame rates are never in one call.
    """

    name: str
    reward: Reward
    config: Serve
    metrics: Metrics
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    waiting: int = 0

    async def score(self, request: ScoreRequest) -> Scores:
        """The scores of a request. Raises what the reward raised, and WireError (429) where too much waits."""
        count = len(request.prompts)
        if self.waiting and self.waiting + count > self.config.max_pending:
            raise WireError(f"{self.waiting} samples wait already; try again later", 429)
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        self.waiting += count
        self.metrics.pending.inc(count)
        self.queue.put_nowait((request, future))
        try:
            return await future
        finally:
            self.waiting -= count
            self.metrics.pending.dec(count)

    async def run(self) -> None:
        """Scores what comes, until it is cancelled."""
        held = None
        with ThreadPoolExecutor(1, thread_name_prefix=f"reward {self.name}") as thread:
            while True:
                batch = [held or await self.queue.get()]
                held = await self._fill(batch)
                work = [item for item in batch if not item[1].done()]
                if work:
                    await asyncio.get_running_loop().run_in_executor(thread, self._answer, work)

    async def _fill(self, batch: list) -> Any:
        """Adds what waits and fits to the batch; gives the first that does not fit."""
        first: ScoreRequest = batch[0][0]
        count, until = len(first.prompts), perf_counter() + self.config.max_wait
        while count < self.config.max_batch:
            try:
                item = self.queue.get_nowait()
            except asyncio.QueueEmpty:
                left = until - perf_counter()
                if left <= 0:
                    return None
                try:
                    item = await asyncio.wait_for(self.queue.get(), left)
                except TimeoutError:
                    return None
            other: ScoreRequest = item[0]
            same = other.samples.shape[1:] == first.samples.shape[1:] and other.fps == first.fps
            if not same or count + len(other.prompts) > self.config.max_batch:
                return item
            batch.append(item)
            count += len(other.prompts)
        return None

    def _answer(self, work: list) -> None:
        """Scores the requests together; where that raises, one by one, so that one cannot spoil the others."""
        try:
            results: list[Any] = self._together([request for request, _ in work])
        except Exception as error:
            results = [error] if len(work) == 1 else [self._alone(request) for request, _ in work]
        for (_, future), result in zip(work, results, strict=True):
            future.get_loop().call_soon_threadsafe(_settle, future, result)

    def _alone(self, request: ScoreRequest) -> Scores | Exception:
        try:
            return self._together([request])[0]
        except Exception as error:
            return error

    def _together(self, requests: list[ScoreRequest]) -> list[Scores]:
        samples = torch.cat([r.samples for r in requests]) if len(requests) > 1 else requests[0].samples
        prompts = [p for r in requests for p in r.prompts]
        begin = perf_counter()
        parts = []
        for start in range(0, len(prompts), self.config.max_batch):
            part = slice(start, start + self.config.max_batch)
            parts.append(ask(self.reward, samples[part], prompts[part], requests[0].fps))
        scores = Scores.concatenate(parts)
        self.metrics.seconds.labels(self.name).observe(perf_counter() - begin)
        self.metrics.batch.labels(self.name).observe(len(prompts))
        self.metrics.samples.labels(self.name).inc(len(prompts))
        self.metrics.invalid.labels(self.name).inc(int((~scores.valid).sum()))
        ends = [0]
        for request in requests:
            ends.append(ends[-1] + len(request.prompts))
        return [_part(scores, slice(a, b)) for a, b in pairwise(ends)]


class TokenGate:
    """ASGI middleware: nothing but /health is reached without the token."""

    def __init__(self, app: ASGIApp, token: str, metrics: Metrics) -> None:
        self.app, self.expected, self.metrics = app, f"Bearer {token}".encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = _refusal(401, "the Authorization header should be: Bearer <token>", self.metrics)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


@dataclass
class Budget:
    """Bytes of bodies in memory at a time."""

    limit: int
    used: int = 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Raises WireError (429) where the limit is reached; one body is always let in."""
        if self.used and self.used + count > self.limit:
            raise WireError("too many requests are being read; try again later", 429)
        self.used += count
        try:
            yield
        finally:
            self.used -= count


def create_app(config: ServiceConfig, token: str, rewards: Mapping[str, Reward] | None = None) -> FastAPI:
    """The ASGI application; `rewards` by name where they are loaded already."""
    loaded = rewards if rewards is not None else {spec.key: load_reward(spec) for spec in config.rewards}
    metrics = Metrics()
    failures = FailureLog(log.warning)
    limits = config.serve

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batchers = {name: Batcher(name, reward, limits, metrics) for name, reward in loaded.items()}
        tasks = [asyncio.create_task(b.run()) for b in app.state.batchers.values()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    app = FastAPI(title="fastgrpo reward server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    app.add_middleware(TokenGate, token=token, metrics=metrics)
    budget = Budget(4 * limits.max_bytes)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.post("/v1/score/{name}")
    async def score(name: str, request: Request) -> Response:
        batcher: Batcher | None = app.state.batchers.get(name)
        if batcher is None:
            return _refusal(404, f"no reward of this name (one of: {', '.join(sorted(loaded))})", metrics)
        try:
            length = _length(request, limits.max_bytes)
            with budget.taken(length):
                body = await asyncio.wait_for(_body(request, length), limits.body_timeout)
                asked = await asyncio.to_thread(decode_request, body, limits.max_bytes)
                scores = await batcher.score(asked)
        except WireError as error:
            return _refusal(error.status, str(error), metrics, name)
        except TimeoutError:
            return _refusal(408, f"the body did not come in {limits.body_timeout:g} s", metrics, name)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            failures.failed(f"reward '{name}' failed", name, error)
            return _refusal(500, f"the reward failed: {type(error).__name__}", metrics, name)
        metrics.requests.labels(name, "200").inc()
        return JSONResponse(encode_scores(scores))

    return app


def serve(config: ServiceConfig) -> None:
    """Serves until SIGINT or SIGTERM. Raises UserError for what the user can mend."""
    import uvicorn

    token, limits = config.token(), config.serve
    if limits.host not in LOOPBACK and limits.tls_certificate is None:
        log.warning("serve.host %s: other machines reach it, and the token travels in the clear", limits.host)
    check_certificate(limits)
    uvicorn.run(
        create_app(config, token), host=limits.host, port=limits.port, log_level="warning",
        ssl_certfile=limits.tls_certificate, ssl_keyfile=limits.tls_key, server_header=False,
        **server_options(limits.max_connections, limits.head_timeout),
    )  # fmt: skip


def check_certificate(limits: Serve) -> None:
    """Raises ConfigError where TLS cannot be served with these files."""
    if limits.tls_certificate is None:
        if limits.tls_key is not None:
            raise ConfigError("serve.tls_key: is given without tls_certificate, so nothing would be encrypted")
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(limits.tls_certificate, limits.tls_key)
    except OSError as error:
        files = " and ".join(filter(None, (limits.tls_certificate, limits.tls_key)))
        raise ConfigError(f"serve.tls_certificate: {files} cannot be used: {error.strerror or error}") from None


def _length(request: Request, limit: int) -> int:
    """What the body may come to: what its header says, or the limit. Raises WireError (413) above it."""
    said = request.headers.get("content-length")
    if said is None:
        return limit
    if not said.isdecimal() or len(said) > 18 or int(said) > limit:
        raise WireError(f"a body of {said[:18]} bytes is above the limit of {limit}", 413)
    return int(said)


async def _body(request: Request, limit: int) -> bytes:
    """The body. Raises WireError (413) as soon as it is above the limit."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise WireError(f"a body above the limit of {limit} bytes", 413)
    return bytes(body)


def _refusal(status: int, message: str, metrics: Metrics, name: str = "") -> JSONResponse:
    metrics.requests.labels(name, str(status)).inc()
    # The rest of a body that nobody wants would be read to its end.
    headers = {"Connection": "close"} if status in (401, 408, 413) else None
    return JSONResponse({"error": message}, status, headers)


def _settle(future: asyncio.Future, result: Scores | Exception) -> None:
    """Gives a request its answer, unless its client has left."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _part(scores: Scores, part: slice) -> Scores:
    assert scores.asked is not None
    components = {name: column[part] for name, column in scores.components.items()}
    return Scores(scores.values[part], scores.valid[part], components, scores.asked[part])
