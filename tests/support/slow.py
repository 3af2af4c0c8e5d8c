"""A reward that takes its time: an iteration as long as a test needs."""

from __future__ import annotations

import time

import numpy as np

from fastgrpo.rewards import Scores


class SlowReward:
    """The mean of each sample, after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(self, samples, prompts, fps):
        time.sleep(self.seconds)
        return Scores(samples.mean(dim=(1, 2, 3)).double().numpy(), np.ones(len(samples), dtype=bool))
