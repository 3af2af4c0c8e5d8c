"""Rewards on the clock and under attack: `fastgrpo bench rewards overlap|throughput|fuzz|faults`.

overlap      an iteration with a remote reward that takes half a rollout, beside the same iteration without a reward
throughput   samples a second of a reward server with eight clients, beside the same reward called in batches here
fuzz         malformed, oversized and unauthorised requests against a reward server
faults       a run with 30% of its remote calls failing, hanging or answered with garbage, beside one without faults
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import RewardSpec, load_config
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.observe.run_log import read_metrics
from fastgrpo.rewards import Scores, load_reward
from fastgrpo.rewards.served.service import ServiceConfig, create_app
from fastgrpo.rewards.served.wire import encode_request
from fastgrpo.training.trainer import Trainer

from .serving import TOKEN, Unreliable, malformed, serving

CONFIG = Path(__file__).parents[1] / "configs" / "shapes-flux.yaml"
QUIET = ["telemetry.progress=false", "eval.every=0", "checkpoint.every=0"]

# Every iteration costs the same, and a chunk's eight prompts fill a forward pass: the steps that a group has in common
# are not padded four times over.
STEADY = ["rollout.forward_batch=8", "rollout.trained={kind: window, size: 1, start: 1}"]


class Sleeps:
    """A reward that takes `seconds` a sample and no processor: what a GPU elsewhere looks like from here."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> Scores:
        time.sleep(self.seconds * len(prompts))
        values = samples.flatten(1).double().mean(dim=1).numpy()
        return Scores(values, np.ones(len(values), dtype=bool))


def service(**serve: Any) -> ServiceConfig:
    return validate_settings(ServiceConfig, {"serve": serve, "rewards": [{"name": "shapes"}]})


def remote(url: str, reward: str, **options: Any) -> str:
    os.environ["FASTGRPO_REWARD_TOKEN"] = TOKEN
    pairs = {"url": url, "reward": reward, **options}
    inner = ", ".join(f"{key}: {value if key != 'url' else repr(value)}" for key, value in pairs.items())
    return f"rewards=[{{name: remote, label: {reward}, options: {{{inner}}}}}]"


def overlap(iterations: int = 8) -> dict[str, Any]:
    """Median seconds of an iteration, in turns of several, the first of each turn left out."""
    free = "rewards=[{name: 'fastgrpo_bench.rewards:Sleeps'}]"
    with tempfile.TemporaryDirectory() as folder:
        plain = _prepared(Path(folder) / "probe", free)
        seconds = [_timed(plain) for _ in range(4)][1:]
        plain.flush()
        laps = read_metrics(plain.log.directory or Path(folder))
        rollout = median(line["time/rollout"] for line in laps[1:])
        sleeper = Sleeps(rollout / 2 / plain.rollouts.samples)
        with serving(create_app(service(), TOKEN, {"slow": sleeper})) as url:
            slow = remote(url, "slow", batch=plain.rollouts.samples, connections=4)
            variants = {
                "without reward": (free, "scoring.chunks=1"),
                "without reward, 4 chunks": (free, "scoring.chunks=4"),
                "staleness 0, 1 chunk": (slow, "scoring.chunks=1"),
                "staleness 0, 4 chunks": (slow, "scoring.chunks=4"),
                "staleness 1": (slow, "scoring.staleness=1"),
            }
            trainers = {
                name: _prepared(Path(folder) / str(i), *settings) for i, (name, settings) in enumerate(variants.items())
            }
            times: dict[str, list[float]] = {name: [] for name in trainers}
            for _ in range(max(1, iterations // 4)):
                for name, trainer in trainers.items():
                    times[name] += [_timed(trainer) for _ in range(5)][1:]
    medians = {name: median(values) for name, values in times.items()}
    base = medians["without reward"]
    return {
        "rollout_seconds": rollout, "reward_seconds": rollout / 2, "probe_seconds": median(seconds),
        "iteration_seconds": medians, "ratio": {name: value / base for name, value in medians.items()},
    }  # fmt: skip


def _prepared(folder: Path, *settings: str) -> Trainer:
    return Trainer.from_config(load_config(CONFIG, [*QUIET, *STEADY, f"run.dir={folder}", *settings]))


def _timed(trainer: Trainer) -> float:
    begin = time.perf_counter()
    trainer.step()
    return time.perf_counter() - begin


SERVE = """
import os, sys
from fastgrpo.rewards.served.service import ServiceConfig, serve
from fastgrpo.config.sections import load_settings
import torch
torch.set_num_threads(1)
serve(load_settings(ServiceConfig, sys.argv[1]))
"""


def throughput(seconds: int = 6, clients: int = 8, batch: int = 32) -> dict[str, Any]:
    """Samples a second of shapes:clip: in this process in batches, and from a server process."""
    torch.set_num_threads(1)
    os.environ["FASTGRPO_REWARD_TOKEN"] = TOKEN
    texts = list(load_prompts("shapes:train"))[:batch]
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    local = load_reward(RewardSpec(name="clip", path="shapes:clip", options={"batch": 64}))
    both, twice = torch.cat([images, images]), [*texts, *texts]

    def here() -> int:
        local.score(both, twice, None)
        return len(twice)

    with tempfile.TemporaryDirectory() as folder, _served(Path(folder)) as url:
        options = {"url": url, "reward": "clip", "batch": batch, "connections": 1}
        remotes = [load_reward(RewardSpec(name="remote", options=options)) for _ in range(clients)]
        # In turns, so that whatever else this machine does meets both.
        alone, served = [], []
        here()
        remotes[0].score(images, texts, None)
        for _ in range(3):
            alone.append(_rate([here], seconds / 3))
            served.append(_rate([lambda r=r: (r.score(images, texts, None), batch)[1] for r in remotes], seconds / 3))
    return {
        "in_process": median(alone), "served": median(served), "ratio": median(served) / median(alone),
        "clients": clients, "samples_a_call": batch, "turns": {"in_process": alone, "served": served},
    }  # fmt: skip


def _rate(calls: list[Any], seconds: float) -> float:
    """Samples a second of calls that run beside one another, each in a thread, for so long."""
    until = time.perf_counter() + seconds

    def keep_on(call: Any) -> int:
        done = 0
        while time.perf_counter() < until:
            done += call()
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as pool:
        total = sum(pool.map(keep_on, calls))
    return total / (time.perf_counter() - begin)


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a reward server in a process of its own."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "serve.yaml").write_text(
        f"serve: {{port: {port}}}\nrewards: [{{name: clip, path: 'shapes:clip', options: {{batch: 64}}}}]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(folder / "serve.yaml")])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def fuzz(requests: int = 10_000, limit: int = 200_000) -> dict[str, Any]:
    """Answers by status; raises AssertionError where one is not a 4xx, or the server does not live on."""
    bait = Path("/tmp/fastgrpo-was-executed")
    bait.unlink(missing_ok=True)
    shapes = load_reward(RewardSpec(name="shapes"))
    samples = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    good = encode_request(samples, [Prompt("a red circle")], None, "raw")
    rng, counts = random.Random(1), {}
    auth = {"Authorization": f"Bearer {TOKEN}"}
    app = create_app(service(max_bytes=limit), TOKEN, {"shapes": shapes})
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(requests):
            method, path, headers, body = malformed(rng, good, limit)
            status = client.request(method, path, headers=headers, content=body).status_code
            assert 400 <= status < 500, (status, method, path, headers, body[:80])
            counts[status] = counts.get(status, 0) + 1
        assert client.post("/v1/score/shapes", headers=auth, content=good).status_code == 200
    assert not bait.exists()
    return {"requests": requests, "by_status": dict(sorted(counts.items())), "alive": True, "executed": False}


def faults(iterations: int = 60, share: float = 0.3) -> dict[str, Any]:
    """The same run three times: no faults; faults with retries; faults without any, so that samples are lost."""
    results = {}
    shapes = load_reward(RewardSpec(name="shapes"))
    with tempfile.TemporaryDirectory() as folder:
        for name, faulty, retries in (("none", 0.0, 4), ("retried", share, 4), ("not retried", share, 0)):
            app = Unreliable(create_app(service(), TOKEN, {"shapes": shapes}), faulty, hang=3.0)
            run = Path(folder) / name.replace(" ", "-")
            with serving(app) as url:
                reward = remote(url, "shapes", batch=32, timeout=1.0, backoff=0.05, retries=retries, connections=8)
                settings = [f"run.dir={run}", f"train.iterations={iterations}", "scoring.max_failure_rate=0.8", reward]
                trainer = Trainer.from_config(load_config(CONFIG, [*QUIET, *settings]))
                trainer.run()
            lines = read_metrics(run)
            last = [line["reward/mean"] for line in lines[-iterations // 5 :]]
            results[name] = {
                "calls": dict(app.counts), "samples_failed": sum(line["samples/failed"] for line in lines),
                "samples": len(lines) * trainer.rollouts.samples,
                "reward_last_fifth": float(np.mean(last)), "deviation_last_fifth": float(np.std(last)),
            }  # fmt: skip
    return results


MEASURES = {"overlap": overlap, "throughput": throughput, "fuzz": fuzz, "faults": faults}
