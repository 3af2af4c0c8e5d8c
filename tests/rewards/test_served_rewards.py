"""Rewards over others, read by OCR, or judged by a served model; and the conversion of published weights."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from fastgrpo.commands.main import main
from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import Prompt, open_image
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.edit_reward import read_lower
from fastgrpo.rewards.unified_reward import SCALES, read_scores
from fastgrpo.shapes.editing_world import all_prompts, image_name

IMAGES = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 8, 8).contiguous()
PROMPTS = [Prompt(f"number {i}") for i in range(5)]
BRIGHTNESS = {"name": "test_rewards:Brightness"}


def test_binary_is_a_threshold_and_keeps_validity():
    reward = load_reward(RewardSpec(name="binary", options={"of": BRIGHTNESS, "threshold": 0.5}))
    scores = reward.score(IMAGES, PROMPTS, None)
    assert scores.values.tolist() == [0, 0, 1, 1, 1]
    assert scores.valid.tolist() == [False, True, True, True, True]
    half = {"of": BRIGHTNESS, "threshold": 0.5, "component": "half"}
    assert load_reward(RewardSpec(name="binary", options=half)).score(IMAGES, PROMPTS, None).values.sum() == 1


def test_binary_takes_a_percentile_of_another_runs_evaluation(tmp_path):
    path = tmp_path / "000000.json"
    path.write_text(json.dumps({"values": {"test_rewards:Brightness": [0.0, 0.2, None, 0.4, 0.6, 0.8]}}))
    options = {"of": BRIGHTNESS, "percentile": 75.0, "reference": str(path)}
    reward: Any = load_reward(RewardSpec(name="binary", options=options))
    assert reward.threshold == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"rewards\.binary: reference: .* has no 'test_rewards:Bright'"):
        load_reward(
            RewardSpec(name="binary", options={**options, "of": {**BRIGHTNESS, "label": "test_rewards:Bright"}})
        )
    with pytest.raises(ConfigError, match="give either threshold, or percentile and reference"):
        load_reward(RewardSpec(name="binary", options={**options, "threshold": 1.0}))
    with pytest.raises(ConfigError, match=r"rewards\.binary: of\.nam: unknown setting"):
        load_reward(RewardSpec(name="binary", options={"of": {"nam": "x"}, "threshold": 1.0}))


def test_an_evaluation_holds_what_a_percentile_needs(tmp_path):
    from fastgrpo.evaluation.heldout import Evaluation, record
    from fastgrpo.rewards.binary import percentile_of

    values = {"shapes": np.array([0.0, np.nan, 1.0, 0.5, 0.5])}
    record(Evaluation(PROMPTS, values, IMAGES), tmp_path, 0, 4)
    assert percentile_of(tmp_path / "eval" / "000000.json", "shapes", 50) == 0.5


def written(text):
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 24), text, fill="black", font=ImageFont.load_default(size=44))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_ocr_reads_real_pictures():
    images = torch.stack([written("Coffee Shop"), written("Coffee Shop"), written("CLOSED"), torch.zeros(3, 96, 320)])
    prompts = [
        Prompt('a sign that says "Coffee shop!"'),
        Prompt("a sign", metadata={"text": "toffee shops"}),
        Prompt("a sign without words"),
        Prompt('a sign that says "open"'),
    ]
    scores = load_reward(RewardSpec(name="ocr")).score(images, prompts, None)
    assert scores.valid.tolist() == [True, True, False, True]
    assert scores.values[0] == scores.components["strict"][0] == 1
    assert 0.6 < scores.values[1] < 1
    assert scores.values[3] == 0


class JudgeServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Judge)
        self.bodies: list[Any] = []


class Judge(BaseHTTPRequestHandler):
    """Answers with the picture's brightness from 1 to 10; nonsense for a prompt that names some."""

    server: JudgeServer  # pyright: ignore[reportIncompatibleVariableOverride]
    broken = ("{", '{"score": 11}', '{"score": "5"}', '{"score": 5, "reason": "x"}', '{"grade": 5}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.headers.get("Authorization"), body))
        *pictures, text = body["messages"][0]["content"]
        data = pictures[0]["image_url"]["url"].split("base64,")[1]
        level = np.array(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255
        answer = json.dumps({"score": 1 + round(9 * level)})
        if "nonsense" in text["text"]:
            answer = self.broken[int(text["text"].split("nonsense ")[1][0])]
        if "busy" in text["text"] and sum("busy" in str(b) for _, b in self.server.bodies) == 1:
            self.send_error(503)
            return
        reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def judge():
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_judge_is_asked_with_the_picture_and_its_answer_checked(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    options = {"url": url, "model": "judge", "token_env": "JUDGE_TOKEN", "attempts": 1}
    reward = load_reward(RewardSpec(name="vlm_judge", options=options))
    assert reward.score(IMAGES, PROMPTS, None).values.tolist() == pytest.approx([0, 2 / 9, 5 / 9, 7 / 9, 1])
    token, body = judge.bodies[0]
    assert token == "Bearer secret"
    assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["maximum"] == 10
    broken = reward.score(IMAGES, [Prompt(f"nonsense {i}") for i in range(5)], None)
    assert not broken.valid.any()
    videos = IMAGES[:1, :, None].expand(1, 3, 9, 8, 8)
    reward.score(videos, PROMPTS[:1], 8.0)
    assert len(judge.bodies[-1][1]["messages"][0]["content"]) == 4 + 1


def test_a_judge_of_edits_sees_the_source_and_then_the_result(judge):
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    reward = load_reward(RewardSpec(name="edit_judge", options={"url": url, "model": "judge", "parallel": 1}))
    edits = [Prompt(edit.text, image=image_name(edit, 1)) for edit in all_prompts()[:2]]
    samples = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert reward.score(samples, edits, None).valid.all()
    for (_, body), edit, sample in zip(judge.bodies, edits, samples, strict=True):
        *pictures, text = body["messages"][0]["content"]
        files = [io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1])) for p in pictures]
        shown = [np.array(Image.open(file)) for file in files]
        assert len(shown) == 2
        assert edit.image is not None
        np.testing.assert_array_equal(shown[0], np.asarray(open_image(edit.image)))
        np.testing.assert_array_equal(shown[1], (sample * 255).round().byte().permute(1, 2, 0).numpy())
        assert edit.text in text["text"]
        assert "kept that it does not speak of" in text["text"]
    with pytest.raises(ConfigError, match="'a circle' has no image"):
        reward.score(samples[:1], [Prompt("a circle")], None)
    with pytest.raises(ConfigError, match="judges edited images, not videos"):
        reward.score(samples[:1, :, None], edits[:1], None)


def test_a_busy_judge_is_asked_again_and_one_that_is_not_there_gives_no_score(judge):
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    again = load_reward(RewardSpec(name="vlm_judge", options={"url": url, "model": "judge"}))
    assert again.score(IMAGES[:1], [Prompt("busy")], None).valid.all()
    nobody = {"url": "http://127.0.0.1:9/v1", "model": "judge", "attempts": 1}
    assert not load_reward(RewardSpec(name="vlm_judge", options=nobody)).score(IMAGES, PROMPTS, None).valid.any()
    with pytest.raises(ConfigError, match="token_env: the environment has no NOT_SET"):
        load_reward(RewardSpec(name="vlm_judge", options={**nobody, "token_env": "NOT_SET"}))


# As served models have answered; what is read of each.
UNIFIED = {
    "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3.0\nStyle Score (1-5): 2": (0.875, 0.5, 0.25),
    "**Alignment Score (1-5):** 5\n**Coherence Score (1-5):** 4.2\n**Style Score (1-5):** 1": (1.0, 0.8, 0.0),
    "The dog is missing.\nAlignment Score: 1.0, Coherence Score: 2.0, Style Score: 3.0": (0.0, 0.25, 0.5),
}
REFUSED = [
    "", "I cannot judge this picture.", "Alignment Score (1-5): 4.5\nStyle Score (1-5): 2", "Final Score: 7",
    "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 0",
    "Alignment Score: 4\nCoherence Score: 3\nStyle Score: 2\nStyle Score: 3",
]  # fmt: skip


@pytest.mark.parametrize("answer", UNIFIED)
def test_a_recorded_answer_of_unified_reward_is_read(answer):
    assert read_scores(answer) == pytest.approx(dict(zip(SCALES, UNIFIED[answer], strict=True)))


def test_an_answer_that_reasons_ends_in_one_score_and_others_are_refused():
    assert read_scores("<think>It is blurred.</think>\nFinal Score: 3") == {"final": 0.5}
    for answer in REFUSED:
        with pytest.raises(ValueError, match="core"):
            read_scores(answer)


def test_the_lower_of_two_scores_of_an_edit_is_read_from_recorded_answers():
    assert read_lower('{"reasoning": "The circle is blue now.", "score": [8, 6.5]}', 10) == 0.65
    assert read_lower('```json\n{"reasoning": "Both {sic} are kept.",\n "score": [25, 20]}\n```', 25) == 0.8
    refused = ['{"score": 8}', '{"score": [8]}', '{"score": [8, 11]}', '{"score": [true, 8]}', "8 and 6", '{"score": [']
    for answer in [*refused, '{"score": ["8", "6"]}', '{"score": [-1, 3]}']:
        with pytest.raises(ValueError):
            read_lower(answer, 10)


@pytest.fixture
def answering():
    """A server that gives recorded answers by the words of the question, and keeps what it was asked."""

    def start(answers):
        class Recorded(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                *pictures, text = body["messages"][0]["content"]
                asked.append((len(pictures), text["text"]))
                answer = next(given for words, given in answers.items() if words in text["text"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

            def log_message(self, format, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "attempts": 1, "parallel": 1}, asked

    servers, asked = [], []
    yield start
    for server in servers:
        server.shutdown()


def test_unified_reward_asks_and_a_refusal_is_a_failed_sample(answering):
    options, asked = answering({"number 0": next(iter(UNIFIED)), "number 1": REFUSED[1]})
    scores = load_reward(RewardSpec(name="unified_reward", options=options)).score(IMAGES[:2], PROMPTS[:2], None)
    assert scores.valid.tolist() == [True, False]
    assert scores.values[0] == pytest.approx((0.875 + 0.5 + 0.25) / 3)
    assert scores.components["coherence"][0] == 0.5
    assert np.isnan(scores.components["coherence"][1])
    assert [count for count, _ in asked] == [1, 1]
    videos = IMAGES[:1, :, None].expand(1, 3, 9, 8, 8)
    load_reward(RewardSpec(name="unified_reward", options=options)).score(videos, PROMPTS[:1], 8.0)
    assert asked[-1][0] == 4


def test_edit_reward_shows_the_source_and_the_edit_then_the_edit_alone(answering, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "source.png")
    prompts = [Prompt(text, image=str(tmp_path / "source.png")) for text in ("make it blue", "make it green")]
    options, asked = answering({
        "make it blue": '{"reasoning": "", "score": [9, 4]}', "make it green": "no", "was edited": '{"score": [10, 9]}',
    })  # fmt: skip
    reward = load_reward(RewardSpec(name="edit_reward", options=options))
    scores = reward.score(IMAGES[:2], prompts, None)
    assert scores.valid.tolist() == [True, False]
    assert scores.values[0] == pytest.approx((0.4 * 0.9) ** 0.5)
    assert (scores.components["consistency"][0], scores.components["quality"][0]) == pytest.approx((0.4, 0.9))
    assert sorted(count for count, _ in asked) == [1, 1, 2, 2]
    with pytest.raises(ConfigError, match="edit_reward: judges edited images, not videos"):
        reward.score(IMAGES[:1, :, None].expand(1, 3, 9, 8, 8), prompts[:1], 8.0)
    with pytest.raises(ConfigError, match=r"rewards\.edit_reward: high: 0 is not above 0"):
        load_reward(RewardSpec(name="edit_reward", options={**options, "high": 0}))


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_weights_are_converted_and_nothing_else_is_unpickled(tmp_path, capsys):
    state = {"visual.proj": torch.randn(3, 2), "logit_scale": torch.tensor(4.6)}
    state["tied"] = state["visual.proj"]
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS.pt")
    assert main(["convert-reward", str(tmp_path / "HPS.pt"), str(tmp_path / "out.safetensors")]) == 0
    read = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(read[k], v) for k, v in state.items())
    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pt")
    torch.save({"losses": [1.0]}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "hello.pt").write_text("hello")
    (tmp_path / "nothing.pt").write_text("")
    capsys.readouterr()
    for name, message in (
        ("evil", "holds more than tensors"), ("empty", "no table of tensors"), ("text", "text.pt: "),
        ("hello", "hello.pt: cannot be read: KeyError: 101"), ("nothing", "nothing.pt: cannot be read: EOFError"),
    ):  # fmt: skip
        assert main(["convert-reward", str(tmp_path / f"{name}.pt"), str(tmp_path / "no.safetensors")]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert "executed" not in output.out
    assert main(["convert-reward", str(tmp_path / "HPS.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_shipped_clip_prefers_the_right_prompt():
    from fastgrpo.shapes import render, world

    prompts = [p for p in world.split()[1] if p.category in ("colors", "counting", "color_attribution")][:24]
    pixels = render.render_batch(prompts, np.random.default_rng(0))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    reward = load_reward(RewardSpec(name="clip", path="shapes:clip"))
    own = reward.score(images, [Prompt(p.text) for p in prompts], None).values
    other = reward.score(images, [Prompt(p.text) for p in prompts[1:] + prompts[:1]], None).values
    assert (own > other).mean() > 0.9
