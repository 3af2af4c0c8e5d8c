"""Rewards as people write them: found, made, asked; what they return is taken or refused in one line."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import command_line, run_ranks
from support.tiny import tiny_config

import fastgrpo
from fastgrpo.config import RewardSpec, dump
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import Scores, load_reward
from fastgrpo.rewards.base import ask
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import describe_samples, release_rewards, score_samples
from fastgrpo.rewards.time_limit import LimitedReward

IMAGES = torch.linspace(0.125, 1, 4)[:, None, None, None].expand(4, 3, 8, 8)
PROMPTS = [Prompt(f"number {i}", metadata={"words": ["a"]}) for i in range(4)]
MEANS = IMAGES.flatten(1).mean(1).double().numpy()


class Answers:
    """Gives what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def score(self, samples, prompts, fps):
        return self.answer(samples.flatten(1).mean(1))


def doubled(samples, prompts, fps, by=2.0):
    return samples.flatten(1).mean(1) * by


@torch.enable_grad()
def with_gradient(means):
    found = means * torch.ones((), requires_grad=True)
    assert found.requires_grad
    return found


# Any column will do.
scores_of: Any = Scores
TAKEN = {
    "tensor": lambda means: means,
    "bfloat16": lambda means: means.to(torch.bfloat16),
    "gradient": with_gradient,
    "column": lambda means: means[:, None],
    "list": lambda means: means.tolist(),
    "tuple of tensors": lambda means: tuple(with_gradient(means)),
    "array": lambda means: means.numpy().astype(np.float16),
    "Scores of a tensor": lambda means: Scores(means),
    "Scores of columns": lambda means: Scores(means[:, None], valid=np.ones((4, 1), bool)),
    "Scores with flags as a tensor": lambda means: scores_of(means, valid=torch.ones(4)),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_numbers_are_taken_however_they_come(kind):
    scores = ask(Answers(TAKEN[kind]), IMAGES, PROMPTS, None)
    assert scores.values.dtype == np.float64
    assert scores.values.tolist() == pytest.approx(MEANS.tolist(), rel=4e-3 if "16" in kind else 1e-3)
    assert scores.valid.tolist() == [True] * 4


def test_what_is_not_finite_or_missing_is_not_valid():
    assert ask(Answers(lambda m: [1.0, None, float("nan"), 2]), IMAGES, PROMPTS, None).valid.tolist() == [
        True, False, False, True
    ]  # fmt: skip
    hidden = ask(Answers(lambda m: np.ma.masked_array(m.numpy(), [True, False, False, False])), IMAGES, PROMPTS, None)
    assert hidden.valid.tolist() == [False, True, True, True]
    flags = scores_of([1.0, 2.0], valid=[True, None], components={"half": torch.tensor([0.5, 1.0])})
    assert flags.valid.tolist() == [True, False]
    assert np.isnan(flags.components["half"]).tolist() == [False, True]


REFUSED = {
    "nothing": (lambda means: None, "it returned None"),
    "one number": (lambda means: 0.5, "it returned float: 0.5"),
    "a scalar": (lambda means: means.mean(), r"it returned Tensor \[\] of torch.float32"),
    "words": (lambda means: ["good"] * 4, "it returned a list of 4: str"),
    "DDPO's pair": (lambda means: (means, {}), "it returned a tuple of 2: Tensor, dict"),
    "a table": (lambda means: torch.ones(4, 2), r"it returned Tensor \[4, 2\]"),
    "complex numbers": (lambda means: means + 1j, r"it returned Tensor \[4\] of torch.complex64"),
    "dates": (lambda means: np.array(["2026-11-29"] * 4, "M8[D]"), r"it returned ndarray \[4\] of datetime64"),
    "too few": (lambda means: means[:3], "there are 3 scores, and 4 samples"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_score_is_refused_in_one_line(kind, tmp_path):
    answer, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words) as caught:
        ask(Answers(answer), IMAGES, PROMPTS, None)
    assert "\n" not in str(caught.value)
    notes = []
    log = FailureLog(notes.append, tmp_path / "errors")
    for _ in range(2):
        assert not score_samples({"mine": Answers(answer)}, IMAGES, PROMPTS, None, log)["mine"].valid.any()
    # Told once; the file that the line names has the traceback.
    (line,) = notes
    assert line.startswith("reward 'mine' failed for 4 samples: ValueError: ")
    path = Path(line.partition("; traceback: ")[2])
    assert path.parent == tmp_path / "errors"
    assert "in ask" in path.read_text()


@pytest.mark.parametrize("limit", [None, 60.0], ids=["", "with a time limit"])
def test_what_one_reward_writes_no_other_sees(limit):
    class Vandal:
        def score(self, samples, prompts, fps):
            samples.numpy()[:] = 0
            samples.zero_()
            prompts[0].metadata["words"].clear()
            prompts.reverse()
            return samples.flatten(1).sum(1)

    class Reads:
        def score(self, samples, prompts, fps):
            assert [p.text for p in prompts] == [p.text for p in PROMPTS]
            assert prompts[0].metadata["words"] == ["a"]
            return samples.flatten(1).mean(1)

    images = IMAGES.clone()
    rewards = {"vandal": Vandal(), "next": Reads()}
    if limit is not None:
        rewards = {name: LimitedReward(reward, name, limit) for name, reward in rewards.items()}
    scores = score_samples(rewards, images, PROMPTS, None, FailureLog(pytest.fail))
    assert scores["next"].values.tolist() == pytest.approx(MEANS.tolist())
    assert torch.equal(images, IMAGES)


class Panic(BaseException):
    """No Exception, as the panics of Rust extensions and asyncio's cancellations are."""


@pytest.mark.parametrize("error", [SystemExit(3), Panic(3)], ids=repr)
def test_a_reward_that_asks_to_exit_or_panics_has_failed(error):
    def raises(*arguments):
        raise error

    reward: Any = Answers(raises)
    reward.release = reward.describe = raises
    notes = []
    failures = FailureLog(notes.append)
    assert not score_samples({"quits": reward}, IMAGES, PROMPTS, None, failures)["quits"].valid.any()
    assert "quits' failed for 4 samples: " + type(error).__name__ + ": 3" in notes[0]
    failures = FailureLog(notes.append)
    assert describe_samples({"quits": reward}, failures, IMAGES, PROMPTS) == {}
    assert "could not describe 4 samples" in notes[1]


def test_a_reward_that_cannot_release_is_said_and_its_scores_stay():
    class Keeps(Answers):
        def release(self):
            raise ValueError("held elsewhere")

    released = []
    other: Any = Answers(lambda means: means)
    other.release = lambda: released.append("other")
    notes = []
    release_rewards({"keeps": Keeps(None), "other": other}, FailureLog(notes.append))
    assert notes[0].startswith("reward 'keeps' failed in release(): ValueError: held elsewhere; traceback: ")
    assert released == ["other"]


ELSEWHERE = """
import os

os.chdir("elsewhere")

class Leaves:
    def __init__(self):
        os.chdir("/")

    def score(self, samples, prompts, fps):
        os.chdir("/")
        return samples.flatten(1).mean(1)

    release = __init__
"""


def test_a_reward_that_leaves_the_working_directory_takes_no_run_with_it(tiny_flux, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "leaves.py").write_text(ELSEWHERE)
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tiny_flux, "run", rewards=[{"name": "leaves.py:Leaves"}], train={"iterations": 1})
    assert fastgrpo.train(config).directory == tmp_path / "run"
    assert Path.cwd() == tmp_path
    assert (tmp_path / "run" / "checkpoints" / "000001").is_dir()


def test_a_function_is_a_reward_and_takes_options():
    reward = load_reward(RewardSpec(name="test_custom:doubled", options={"by": 3.0}))
    assert ask(reward, IMAGES, PROMPTS, None).values.tolist() == pytest.approx((3 * MEANS).tolist())
    routed = load_reward(RewardSpec(name="test_custom:doubled", when={"words": ["none"]}))
    assert not ask(routed, IMAGES, PROMPTS, None).counted.any()


OWN = """
from pathlib import Path

import neighbour

class Bright:
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def score(self, samples, prompts, fps):
        return samples.flatten(1).mean(1) * self.scale * neighbour.ONE

def bright(samples, prompts, fps):
    return Bright().score(samples, prompts, fps)

ready = Bright(2.0)
number = 7

class Plain: ...

class Narrow:
    def score(self, images): ...

class Missing:
    def __init__(self):
        Path("no-such-file").read_text()

    score = Narrow.score
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with rewards, which is the working directory; the file has the name of a standard module."""
    (tmp_path / "random.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("ONE = 1.0")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package")
    (tmp_path / "quits.py").write_text("import argparse; argparse.ArgumentParser().parse_args(['--what'])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("neighbour", None)


def test_a_file_is_named_by_its_path(own):
    path = own / "random.py"
    for name in ("random.py:Bright", f"{path}:Bright", "./random.py:bright"):
        assert ask(load_reward(RewardSpec(name=name)), IMAGES, PROMPTS, None).values.tolist() == pytest.approx(MEANS)
    # One module, however often it is named, and the standard one is still there.
    a, b = (load_reward(RewardSpec(name=n)) for n in ("random.py:Bright", f"{path}:Bright"))
    assert type(a) is type(b)
    assert not hasattr(sys.modules["random"], "Bright")
    assert ask(load_reward(RewardSpec(name="random.py:ready")), IMAGES, PROMPTS, None).values[0] == 2 * MEANS[0]


WRONG = {
    "no_module:Class": "there is no module 'no_module' in ",
    "random.py:Brite": r"'Brite' is not in \S*random.py; did you mean 'Bright'\? \(it defines: Bright, bright",
    "rando.py:Bright": "there is no file rando.py; did you mean 'random.py'",
    "random.py:": "'' is not in ",
    "broken.py:score": r"'broken.py' cannot be imported: SyntaxError: .*; traceback: ",
    "needs.py:score": "'needs.py' cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
    "quits.py:score": "'quits.py' cannot be imported: SystemExit: 2",
    "random.py:Plain": r"'random.py:Plain' has no method score\(samples, prompts, fps\)",
    "random.py:Narrow": r"'random.py:Narrow'.score should take \(samples, prompts, fps\): .*it takes \(images\)",
    "random.py:number": "'random.py:number' is int; name a class",
    "random.py:Missing": "cannot be made: FileNotFoundError: .*no-such-file.*; traceback: ",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_a_reward_is_one_line(name, own):
    with pytest.raises(ConfigError, match=WRONG[name]) as caught:
        load_reward(RewardSpec(name=name))
    said = str(caught.value)
    assert said.startswith(f"rewards.{name}: ")
    assert "\n" not in said
    if "; traceback: " in said:
        path = Path(said.partition("; traceback: ")[2])
        assert "Traceback" in path.read_text()
        path.unlink()


def test_an_option_that_a_class_does_not_take_is_named_with_the_nearest(own):
    with pytest.raises(ConfigError, match=r"does not take its options.*did you mean 'scale'\? it takes \(scale\)"):
        load_reward(RewardSpec(name="random.py:Bright", options={"scaled": 2}))


@pytest.mark.parametrize(
    "start, name",
    [
        pytest.param(["{bin}/fastgrpo"], "mine:Bright", id="fastgrpo module"),
        pytest.param(["{bin}/fastgrpo"], "mine.py:bright", id="fastgrpo file", marks=pytest.mark.full),
        pytest.param(["-m", "fastgrpo"], "mine:Bright", id="python -m", marks=pytest.mark.full),
    ],
)
def test_a_reward_in_the_working_directory_is_found_as_a_user_would_type_it(start, name, tmp_path):
    """The console script's own folder is first on sys.path, not the working directory."""
    (tmp_path / "mine.py").write_text(
        inspect.cleandoc(OWN).replace("import neighbour", "neighbour = __import__('os'); neighbour.ONE = 1")
    )
    root = Path(__file__).parents[2]
    script = tmp_path / "bin" / "fastgrpo"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fastgrpo.commands.main import main\nsys.exit(main())\n")
    command = [sys.executable, *(part.format(bin=script.parent) for part in start), "train"]
    config = [str(root / "configs" / "shapes-flux.yaml"), "--check", f"rewards=[{{name: '{name}'}}]"]
    done = subprocess.run([*command, *config], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


BROKEN_ON_ONE_RANK = """
import os

def bright(samples, prompts, fps):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("CUDA out of memory on this rank")
    return samples.flatten(1).mean(1)
"""


def test_a_failure_on_another_rank_is_told_once_with_its_rank(tiny_flux, tmp_path, monkeypatch):
    (tmp_path / "one_rank.py").write_text(BROKEN_ON_ONE_RANK)
    config = tiny_config(
        tiny_flux, tmp_path / "run", rewards=[{"name": "one_rank.py:bright"}],
        telemetry={"progress": True}, rollout={"group_size": 4},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump(config))
    monkeypatch.chdir(tmp_path)
    said = run_ranks(tmp_path, command_line, "train", "config.yaml")
    lines = [line for text in said for line in text.splitlines() if "CUDA out of memory on this rank" in line]
    (line,) = lines
    assert line.startswith("rank 1: reward 'one_rank.py:bright' failed for 4 samples: RuntimeError: ")
    assert "in bright" in Path(line.partition("; traceback: ")[2]).read_text()
    events = [json.loads(text) for text in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["text"] for e in events if e["event"] == "note" and "rank 1" in e["text"]] == lines
    assert [e["samples/failed"] for e in events if e["event"] == "lost"] == [4, 4]
