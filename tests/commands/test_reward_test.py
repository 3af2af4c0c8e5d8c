"""`fastgrpo reward-test`: a few samples scored and printed; a failure is one line, and a file with its traceback."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgrpo.commands.main import main

REWARDS = """
import itertools
import torch

counter = itertools.count()

class Bright:
    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, samples, prompts, fps):
        assert samples.dtype is torch.float32 and 0 <= samples.min() and samples.max() <= 1
        return samples.flatten(1).mean(1) * self.scale

def noisy(samples, prompts, fps):
    return [float(next(counter)) for _ in prompts]

def rank(samples, prompts, fps):
    return torch.arange(len(prompts)).float()

def same(samples, prompts, fps):
    return torch.ones(len(prompts))

def broken(samples, prompts, fps):
    raise RuntimeError("no weights\\nat all")

def table(samples, prompts, fps):
    return {"score": 1.0}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_what_a_reward_says(capsys):
    assert main(["reward-test", "mine.py:Bright", "options.scale=2", "--count", "3"]) == 0
    said = capsys.readouterr()
    head, *rows, tail = said.out.splitlines()
    assert head == "mine.py:Bright, weight 1"
    assert len(rows) == 3
    values = [float(row.split()[0]) for row in rows]
    assert 0 < min(values) < max(values) < 2
    assert f"mean {np.mean(values):.3f}"[:9] in tail
    assert said.err == ""


@pytest.mark.parametrize(
    "name, words",
    [
        ("noisy", "score differently when they are scored again"),
        ("rank", "a sample's score depends on the others of its batch"),
        ("same", "all samples score alike"),
    ],
)
def test_it_says_what_a_run_would_stumble_over(name, words, capsys):
    assert main(["reward-test", f"mine.py:{name}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mine.py:{name}: ")
    assert words in line


@pytest.mark.parametrize(
    "name, words", [("broken", "RuntimeError: no weights at all"), ("table", "it returned dict: {'score': 1.0}")]
)
def test_a_failure_is_one_line_and_a_file(name, words, capsys):
    assert main(["reward-test", f"mine.py:{name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: reward 'mine.py:{name}' failed for 4 samples: ")
    assert words in line
    path = Path(line.partition("; traceback: ")[2])
    assert "Traceback (most recent call last)" in path.read_text()
    path.unlink()


def test_pictures_and_prompts_of_ones_own(folder, capsys):
    for i in range(2):
        Image.new("RGB", (20, 10), (100 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "mine.txt").write_text("a dog\na cat\n")
    assert main(["reward-test", "mine.py:Bright", "--images", ".", "--prompts", "mine.txt", "--count", "2"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["0", "a", "dog"], [f"{100 / 255 / 3:.5g}", "a", "cat"]
    ]  # fmt: skip
    Image.new("RGB", (10, 10)).save(folder / "2.png")
    assert main(["reward-test", "mine.py:Bright", "--images", "."]) == 2
    assert "differ in size" in capsys.readouterr().err
    assert main(["reward-test", "mine.py:Bright", "--images", "none"]) == 2
    assert "holds no pictures" in capsys.readouterr().err


def test_videos_and_the_rewards_of_a_config(folder, capsys):
    (folder / "list.yaml").write_text(
        "rewards: [{name: moving_shapes, label: a}, {name: 'mine.py:Bright', weight: 0, when: {category: [none]}}]"
    )
    assert main(["reward-test", "list.yaml", "--video"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("a, weight 1\n")
    assert said.out.count("not asked") == 4
    assert "mine.py:Bright: it is asked for none of these prompts" in said.err
    assert main(["reward-test", str(folder / "mine.txt.yaml")]) == 2
    assert main(["reward-test", "shape"]) == 2
    assert "did you mean 'shapes'" in capsys.readouterr().err
