"""The protocol of rewards: names, options, scores and their validity, routing and composites."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.config import RewardSpec, flatten_rewards
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import Scores, available, load_reward
from fastgrpo.rewards.base import release

IMAGES = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 8, 8)
PROMPTS = [Prompt(f"number {i}", metadata={"category": "even" if i % 2 == 0 else "odd"}) for i in range(5)]


class Brightness:
    """Mean brightness times a scale; black is not scored. Counts calls."""

    def __init__(self, scale: float = 1.0):
        self.scale, self.calls, self.released = scale, 0, 0

    def score(self, samples, prompts, fps):
        assert len(samples) == len(prompts)
        self.calls += 1
        values = samples.flatten(1).mean(1).double().numpy() * self.scale
        return Scores(values, values > 0, {"half": values / 2})

    def release(self):
        self.released += 1


BRIGHTNESS: dict[str, Any] = {"name": "test_rewards:Brightness"}


def test_scores_are_made_consistent():
    scores = Scores(np.array([1.0, np.nan, 3.0]), np.array([True, True, False]), {"part": np.ones(3)})
    assert scores.valid.tolist() == [True, False, False]
    assert scores.values.tolist() == [1.0, 0.0, 0.0]
    assert np.isnan(scores.components["part"]).tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"one \[B\] each"):
        Scores(np.zeros(3), np.zeros(2, dtype=bool))
    both = Scores.concatenate([scores, replace(Scores.failed(2))])
    assert both.counted.tolist() == [True, False, False, False, False]
    assert len(both.components["part"]) == 5


def test_names_are_listed_and_the_nearest_is_named():
    assert {"shapes", "composite"} <= set(available())
    with pytest.raises(ConfigError, match="unknown reward 'shape'; did you mean 'shapes'"):
        load_reward(RewardSpec(name="shape"))
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        load_reward(RewardSpec(name="no_such_module:Class"))
    with pytest.raises(ConfigError, match="does not take its options"):
        load_reward(RewardSpec(**BRIGHTNESS, options={"colour": 1}))


def test_a_package_adds_a_reward_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "someones-1.0.dist-info").mkdir()
    (tmp_path / "someones-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: someones\nVersion: 1.0\n"
    )
    points = "[fastgrpo.rewards]\nbrightness = test_rewards:Brightness\nshapes = test_rewards:Brightness\n"
    (tmp_path / "someones-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "brightness" in available()
    reward = load_reward(RewardSpec(name="brightness", options={"scale": 2.0}))
    assert reward.score(IMAGES, PROMPTS, None).values[-1] == 2.0
    assert type(load_reward(RewardSpec(name="shapes"))).__name__ == "ShapesReward"


def test_a_routed_reward_is_asked_for_its_prompts_only():
    reward = load_reward(RewardSpec(**BRIGHTNESS, when={"category": ["odd"]}))
    scores = reward.score(IMAGES, PROMPTS, None)
    assert scores.asked is not None
    assert scores.asked.tolist() == [False, True, False, True, False]
    assert scores.valid.all()
    assert scores.values.tolist() == pytest.approx([0, 0.25, 0, 0.75, 0])
    assert np.isnan(scores.components["half"]).tolist() == [True, False, True, False, True]
    nobody: Any = load_reward(RewardSpec(**BRIGHTNESS, when={"category": ["prime"]}))
    assert not nobody.score(IMAGES, PROMPTS, None).counted.any()
    assert nobody.reward.calls == 0


def test_a_composite_sums_its_parts_and_routes():
    of = [
        {**BRIGHTNESS, "label": "a", "weight": 2.0},
        {**BRIGHTNESS, "label": "b", "weight": -1.0, "options": {"scale": 10.0}, "when": {"category": ["even"]}},
    ]
    reward: Any = load_reward(RewardSpec(name="composite", options={"of": of, "aggregate": "reward"}))
    scores = reward.score(IMAGES, PROMPTS, None)
    assert scores.valid.tolist() == [False, True, True, True, True]
    assert scores.values[1:].tolist() == pytest.approx([0.5, 1.0 - 5.0, 1.5, 2.0 - 10.0])
    assert np.isnan(scores.components["b"][1])
    release([reward])
    assert reward.parts["a"].released == reward.parts["b"].reward.released == 1


def test_a_composite_by_advantage_is_its_parts():
    inner = {"name": "composite", "weight": 0.5, "label": "style", "options": {"of": [BRIGHTNESS, {"name": "shapes"}]}}
    outer = RewardSpec(
        name="composite",
        weight=2.0,
        when={"category": ["odd"]},
        options={"of": [inner, {"name": "clip", "weight": 3.0}]},
    )
    flat = flatten_rewards([RewardSpec(name="hps"), outer])
    assert [(s.key, s.weight) for s in flat] == [
        ("hps", 1.0), ("style.test_rewards:Brightness", 1.0), ("style.shapes", 1.0), ("clip", 6.0)
    ]  # fmt: skip
    assert all(s.when == {"category": ["odd"]} for s in flat[1:])
    with pytest.raises(ConfigError, match=r"rewards\.composite: .*inside another, use reward"):
        load_reward(RewardSpec(name="composite", options={"of": [{"name": "shapes"}]}))
    with pytest.raises(ConfigError, match=r"rewards\.composite\.off: unknown setting; did you mean 'of'"):
        flatten_rewards([RewardSpec(name="composite", options={"off": []})])
