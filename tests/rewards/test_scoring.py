"""Scoring: what fails is masked and counted, never given a number; ranks and chunks put together as they were."""

import numpy as np
import pytest
import torch

from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.world import World
from fastgrpo.rewards import Scores
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import gather_scores, joined, score_samples

IMAGES, PROMPTS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), [Prompt("a red circle")] * 4
ALONE = World(0, 1, torch.device("cpu"))
QUIET = FailureLog(print)


class Answers:
    def __init__(self, values, valid=True, **components):
        self.arguments = np.array(values), np.full(len(values), valid), components

    def score(self, samples, prompts, fps):
        return Scores(*self.arguments)


def test_what_is_not_a_score_is_invalid_and_told():
    notes = []
    rewards = {
        "good": Answers([1.0, 2.0, 3.0, 4.0], strict=np.ones(4)),
        "infinite": Answers([1.0, np.nan, np.inf, 4.0]),
        "short": Answers([1.0, 2.0]),
        "ragged": Answers([1.0, 2.0, 3.0, 4.0], strict=np.ones(3)),
        "none": Answers(["x", "y", "z", "w"]),
    }
    scores = score_samples(rewards, IMAGES, PROMPTS, None, FailureLog(notes.append))
    assert {name: s.valid.tolist() for name, s in scores.items()} == {
        "good": [True] * 4, "infinite": [True, False, False, True],
        "short": [False] * 4, "ragged": [False] * 4, "none": [False] * 4,
    }  # fmt: skip
    assert np.isfinite(scores["infinite"].values).all()
    assert [note.split(" failed")[0] for note in notes] == ["reward 'short'", "reward 'ragged'", "reward 'none'"]
    assert "there are 2 scores, and 4 samples" in notes[0]


def test_a_sample_that_is_not_finite_has_failed_every_reward():
    images, notes = IMAGES.clone(), []
    images[2, 0, 3, 3] = torch.nan
    scores = score_samples({"sure": Answers([1.0, 2.0, 3.0, 4.0])}, images, PROMPTS, None, FailureLog(notes.append))
    assert scores["sure"].valid.tolist() == [True, True, False, True]
    assert notes == ["1 of 4 samples are not finite and count as failed"]


def test_gather_puts_samples_in_their_global_places_and_counts_failures():
    scores = score_samples(
        {"good": Answers([1.0, 2.0, 3.0, 4.0]), "bad": Answers([0.0] * 4, False)}, IMAGES, PROMPTS, None, QUIET
    )
    scored = gather_scores(scores, lambda rank: np.array([2, 0, 3, 1]), ALONE, QUIET, 1)
    assert scored.values[0].tolist() == [2, 4, 1, 3]
    assert scored.stop == 1
    assert scored.failure_rate(np.array([1.0, 0.0])) == 0
    assert scored.failure_rate(np.array([1.0, 1.0])) == 1


def test_ranks_agree_on_components_that_a_failed_one_does_not_know():
    mine, theirs = b'[[["good", "strict"]], []]', b'[[], ["cut off"]]'

    class Two(World):
        """Two ranks: the other one's reward failed, so it has no component."""

        def gather_all(self, vector):
            if len(vector) == 1:
                return np.stack([vector, [2.0]])
            if len(vector) == len(mine):
                other = np.frombuffer(theirs.ljust(len(mine)), np.uint8).astype(float)
                return np.stack([vector, other])
            other = np.concatenate([np.zeros(8), np.ones(4), np.full(4, np.nan), [0.0]])
            return np.stack([vector, other])

    scores = score_samples({"good": Answers([1.0, 2.0, 3.0, 4.0], strict=np.ones(4))}, IMAGES, PROMPTS, None, QUIET)
    notes = []
    two = Two(0, 2, torch.device("cpu"))
    scored = gather_scores(scores, lambda rank: np.arange(4) + 4 * rank, two, FailureLog(notes.append))
    assert notes == ["rank 1: cut off"]
    assert scored.valid[0].tolist() == [True] * 4 + [False] * 4
    assert scored.components["good.strict"][:4].tolist() == [1.0] * 4
    assert np.isnan(scored.components["good.strict"][4:]).all()
    assert scored.failure_rate(np.ones(1)) == pytest.approx(0.5)


def test_chunks_joined_are_the_whole():
    whole = score_samples({"mean": Answers([1.0, 2.0, 3.0, 4.0], c=np.arange(4.0))}, IMAGES, PROMPTS, None, QUIET)
    first = {"mean": Scores(np.array([1.0, 2.0]), np.array([True, True]), {"c": np.array([0.0, 1.0])})}
    second = {"mean": Scores(np.array([3.0, 4.0]), np.array([True, True]), {"c": np.array([2.0, 3.0])})}
    both = joined([first, second])
    assert np.array_equal(both["mean"].values, whole["mean"].values)
    assert np.array_equal(both["mean"].components["c"], whole["mean"].components["c"])
