"""Remote rewards: the same scores as in process, batches across clients, failures that stay failures, refusals."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request, Response
from PIL import Image
from safetensors.torch import load, save
from support.serving import TOKEN, Unreliable, malformed, serving

from fastgrpo.commands.main import main
from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import Scores, load_reward
from fastgrpo.rewards.images import source_images
from fastgrpo.rewards.served.service import ServiceConfig, create_app
from fastgrpo.rewards.served.wire import WireError, decode_request, decode_scores, encode_request, encode_scores
from fastgrpo.shapes.editing_world import all_prompts, image_name

LIMIT = 200_000
SAMPLES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VIDEOS = torch.rand(2, 3, 3, 8, 16, generator=torch.Generator().manual_seed(1))
PROMPTS = [Prompt(f"number {i}", metadata={"category": "x", "count": i}) for i in range(5)]


class Mean:
    """The mean of a sample, a component, an invalid sample where the text says so; fails on 'raise'."""

    def __init__(self):
        self.sizes, self.threads = [], set()

    def score(self, samples, prompts, fps):
        self.sizes.append(len(samples))
        self.threads.add(threading.get_ident())
        if any(p.text == "raise" for p in prompts):
            raise RuntimeError("no")
        time.sleep(0.02)
        values = samples.flatten(1).double().mean(1).numpy()
        count = np.array([float(p.metadata.get("count", 0)) for p in prompts])
        return Scores(values, np.array([p.text != "invalid" for p in prompts]), {"count": count})


def service(**serve) -> ServiceConfig:
    return validate_settings(ServiceConfig, {"serve": {"max_bytes": LIMIT, **serve}, "rewards": [{"name": "shapes"}]})


@pytest.fixture(scope="module")
def mean():
    return Mean()


@pytest.fixture(scope="module")
def url(mean):
    shapes = load_reward(RewardSpec(name="shapes"))
    with serving(create_app(service(max_batch=8), TOKEN, {"mean": mean, "shapes": shapes})) as address:
        yield address


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setenv("FASTGRPO_REWARD_TOKEN", TOKEN)

    def make(url, **options):
        return load_reward(
            RewardSpec(name="remote", options={"url": url, "reward": "mean", "backoff": 0.01, **options})
        )

    return make


@pytest.mark.parametrize("samples, fps", [(SAMPLES, None), (VIDEOS, 8.0)], ids=["images", "videos"])
@pytest.mark.parametrize("encoding", ["raw", "uint8", "png", "webp"])
def test_the_wire_keeps_what_it_says_it_keeps(samples, fps, encoding):
    prompts = PROMPTS[: len(samples)]
    request = decode_request(encode_request(samples, prompts, fps, encoding), LIMIT)
    expected = samples if encoding == "raw" else (samples * 255).round() / 255
    assert torch.equal(request.samples, expected)
    assert request.prompts == prompts
    assert [dict(p.metadata) for p in request.prompts] == [dict(p.metadata) for p in prompts]
    assert request.fps == fps


def test_scores_survive_the_wire_to_the_bit():
    import json

    scores = Scores(np.array([0.1, 1 / 3, 0.0]), np.array([True, True, False]), {"c": np.array([1e-300, 2.0, 3.0])})
    back = decode_scores(json.dumps(encode_scores(scores)).encode(), 3)
    assert np.array_equal(back.values, scores.values)
    assert np.array_equal(back.valid, scores.valid)
    assert np.array_equal(back.components["c"], scores.components["c"], equal_nan=True)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[1]", b'{"values": [1.0], "valid": [true]}', b'{"values": ["x"], "valid": [true], "asked": [true]}',
     b'{"values": [1.0, 2.0], "valid": [true, true], "asked": [true, true]}', b"\xff\xfe"],
)  # fmt: skip
def test_an_answer_that_is_none_of_ours_is_refused(body):
    with pytest.raises(WireError):
        decode_scores(body, 1)


def test_the_pictures_of_prompts_travel_once_and_no_path_does(tmp_path):
    files = []
    for number, color in enumerate(("red", "blue")):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (24, 8), color).save(files[-1])
    drawn = image_name(all_prompts()[0], 3)
    images = [files[0], files[1], files[0], drawn, None]
    prompts = [Prompt("make it blue", image=image) for image in images]
    samples = torch.rand(5, 3, 8, 12)
    body = encode_request(samples, prompts, None, "raw")
    assert str(tmp_path).encode() not in body
    assert load(body)["sources"].shape == (2, 8, 12, 3)
    got = decode_request(body, LIMIT).prompts
    assert got[0].image == got[2].image != got[1].image
    assert (got[3].image, got[4].image) == (drawn, None)
    torch.testing.assert_close(source_images(got[:4], samples), source_images(prompts[:4], samples))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": torch.zeros(1, 8, 8, 3)}, "not uint8 pictures"),
        ({"sources": torch.zeros(1, 4, 8, 3, dtype=torch.uint8)}, "not uint8 pictures"),
        ({"sources": torch.zeros(9, 8, 8, 3, dtype=torch.uint8)}, "9 sources of 1 prompts"),
        ({"sources": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "entry": {"source": 1}}, "has source 1, and 1 came"),
        ({"entry": {"drawn": "/etc/passwd"}}, "an embedded world"),
    ],
)
def test_sources_that_cannot_be_are_refused(change, message):
    tensors = load(encode_request(torch.zeros(1, 3, 8, 8), [Prompt("a circle")], None, "raw"))
    head = json.loads(tensors["request"].numpy().tobytes())
    head["prompts"][0].update(change.pop("entry", {}))
    tensors["request"] = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
    with pytest.raises(WireError, match=message):
        decode_request(save({**tensors, **change}), LIMIT)


def test_an_image_of_another_size_than_it_says_is_refused_before_it_is_decoded():
    small = encode_request(SAMPLES, PROMPTS, None, "png").replace(
        b'"shape": [5, 3, 16, 16]', b'"shape": [5, 3, 16, 61]'
    )
    with pytest.raises(WireError, match="image 0 is RGB"):
        decode_request(small, LIMIT)
    with pytest.raises(WireError, match="the limit is 1000") as info:
        decode_request(encode_request(SAMPLES, PROMPTS, None, "png"), 1000)
    assert info.value.status == 413


def test_remote_scores_are_those_of_the_reward(url, remote, mean):
    ours = mean.score(SAMPLES, PROMPTS, None)
    theirs = remote(url, batch=2).score(SAMPLES, PROMPTS, None)
    assert np.array_equal(theirs.values, ours.values)
    assert np.array_equal(theirs.components["count"], ours.components["count"])
    invalid = remote(url).score(SAMPLES[:2], [PROMPTS[0], Prompt("invalid")], None)
    assert invalid.valid.tolist() == [True, False]


def test_clients_share_batches_and_one_cannot_spoil_another(url, remote, mean):
    mean.sizes.clear()
    rewards = [remote(url) for _ in range(6)]
    prompts = [[PROMPTS[0]]] * 5 + [[Prompt("raise")]]

    def ask(reward, text):
        try:
            return reward.score(SAMPLES[:1], text, None).values[0]
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask, rewards[0], prompts[0])
        time.sleep(0.01)
        rest = list(pool.map(ask, rewards[1:], prompts[1:]))
    assert len({first.result(), *rest[:4]}) == 1
    assert "answered 500" in rest[4]
    assert max(mean.sizes) > 1
    assert len(mean.threads - {threading.get_ident()}) == 1


def test_health_is_open_and_metrics_are_not(url, remote):
    remote(url).score(SAMPLES[:1], PROMPTS[:1], None)
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).text
    assert 'fastgrpo_reward_samples_total{reward="mean"}' in text


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_malformed_requests_are_refused_and_the_server_lives(url, count):
    rng = random.Random(count)
    good = encode_request(SAMPLES[:1], [Prompt("a red circle")], None, "raw")
    bait = Path("/tmp/fastgrpo-was-executed")
    with httpx.Client(base_url=url, trust_env=False) as client:
        auth = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post("/v1/score/shapes", headers=auth, content=good).status_code == 200
        for _ in range(count):
            method, path, headers, body = malformed(rng, good, LIMIT)
            status = client.request(method, path, headers=headers, content=body).status_code
            assert 400 <= status < 500, (method, path, headers, body[:80], status)
        assert client.post("/v1/score/shapes", headers=auth, content=good).status_code == 200
    assert not bait.exists()


def test_a_body_without_a_length_is_cut_at_the_limit(url):
    chunks = (bytes(LIMIT // 4) for _ in range(5))
    auth = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.post("/v1/score/mean", headers=auth, content=chunks).status_code == 413


def faulty(answers):
    """A server that gives these in turn: a status, bytes, seconds to wait first, or None for a good answer."""
    app, calls = FastAPI(), []

    @app.post("/v1/score/mean")
    async def score(request: Request):
        answer = answers[min(len(calls), len(answers) - 1)]
        calls.append(answer)
        samples = decode_request(await request.body(), LIMIT).samples
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        if isinstance(answer, int):
            return Response("oh", answer)
        if isinstance(answer, bytes):
            return Response(answer)
        from fastapi.responses import JSONResponse

        values = samples.flatten(1).double().mean(1).numpy()
        return JSONResponse(encode_scores(Scores(values, np.ones(len(values), bool))))

    return app, calls


EXACT = SAMPLES.flatten(1).double().mean(1).numpy()


def test_failures_garbage_and_timeouts_are_tried_again(remote):
    app, calls = faulty([500, b"garbage", 429, 1.0, None])
    with serving(app) as address:
        scores = remote(address, timeout=0.4).score(SAMPLES, PROMPTS, None)
    assert np.array_equal(scores.values, EXACT)
    assert scores.valid.all()
    assert len(calls) == 5


def test_what_fails_for_good_has_no_score_and_the_rest_keeps_theirs(remote, caplog):
    app, _ = faulty([None, 500, 500, 500, None])
    with serving(app) as address:
        scores = remote(address, batch=2, connections=1, retries=2).score(SAMPLES, PROMPTS, None)
    assert scores.valid.tolist() == [True, True, False, False, True]
    assert scores.values[2:4].tolist() == [0, 0]
    assert "1 of 3 calls failed" in caplog.text


def test_a_refusal_is_not_tried_again_and_says_why(remote):
    app, calls = faulty([403])
    with serving(app) as address, pytest.raises(RuntimeError, match="answered 403: oh"):
        remote(address).score(SAMPLES, PROMPTS, None)
    assert len(calls) == 1


def test_late_scores_are_no_scores(remote):
    app, _ = faulty([3.0])
    with serving(app) as address:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="late"):
            remote(address, deadline=0.4).score(SAMPLES, PROMPTS, None)
        elapsed = time.monotonic() - begin
    assert elapsed < 2.5


def test_a_slow_call_is_hedged(remote):
    app, calls = faulty([3.0, None])
    with serving(app) as address:
        begin = time.monotonic()
        scores = remote(address, hedge_after=0.2).score(SAMPLES, PROMPTS, None)
        elapsed = time.monotonic() - begin
    assert np.array_equal(scores.values, EXACT)
    assert elapsed < 2.5
    assert len(calls) == 2


def test_another_server_answers_for_one_that_is_down(remote):
    app, _ = faulty([None])
    with serving(app) as address:
        scores = remote(["http://127.0.0.1:9", address]).score(SAMPLES, PROMPTS, None)
    assert np.array_equal(scores.values, EXACT)


def test_a_run_completes_while_a_third_of_its_calls_fail_hang_or_lie(tiny_flux, tmp_path, monkeypatch):
    from support.runs import metrics
    from support.tiny import tiny_config

    from fastgrpo.training.trainer import Trainer

    monkeypatch.setenv("FASTGRPO_REWARD_TOKEN", TOKEN)
    shapes = load_reward(RewardSpec(name="shapes"))
    app = Unreliable(create_app(service(), TOKEN, {"shapes": shapes}), share=0.3, hang=1.0, seed=3)
    scored = []
    with serving(app) as address:
        options = {"url": address, "reward": "shapes", "batch": 3, "timeout": 0.5, "retries": 0}
        config = tiny_config(
            tiny_flux, tmp_path / "run", rewards=[{"name": "remote", "label": "r", "options": options}],
            rollout={"prompts_per_iteration": 4, "group_size": 6}, train={"iterations": 4},
            scoring={"max_failure_rate": 0.9},
        )  # fmt: skip
        trainer = Trainer.from_config(config)
        reward: Any = trainer.rewards["r"]
        asked = reward.score
        reward.score = lambda *a: scored.append((a, asked(*a))) or scored[-1][1]
        trainer.run()
    lost = sum(count for fate, count in app.counts.items() if fate != "good")
    assert lost >= 4
    assert trainer.iteration == 4
    assert sum(line["samples/failed"] for line in metrics(tmp_path / "run")) == 3 * lost
    for arguments, scores in scored:
        exact = shapes.score(*arguments)
        assert np.array_equal(scores.values[scores.valid], exact.values[scores.valid])
        assert not scores.values[~scores.valid].any()


def test_no_token_no_server_and_no_client(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FASTGRPO_REWARD_TOKEN", raising=False)
    (tmp_path / "serve.yaml").write_text("rewards: [{name: shapes}]\n")
    assert main(["serve-rewards", str(tmp_path / "serve.yaml")]) == 2
    assert "should hold a token of at least 16 characters" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no token"):
        load_reward(RewardSpec(name="remote", options={"url": "http://127.0.0.1:1", "reward": "x"}))
