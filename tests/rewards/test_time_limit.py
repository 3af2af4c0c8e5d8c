"""A reward that hangs has failed for its samples, and keeps nothing else waiting."""

import threading
import time

import numpy as np
import pytest
import torch

from fastgrpo.data.prompts import Prompt
from fastgrpo.rewards import Scores, load_rewards
from fastgrpo.rewards.time_limit import LimitedReward


class Hangs:
    def __init__(self):
        self.go, self.calls, self.gradients = threading.Event(), 0, None
        self.weights = "mine"

    def score(self, samples, prompts, fps):
        self.calls += 1
        self.gradients = torch.is_grad_enabled()
        if self.calls == 2:
            self.go.wait(20)
        if self.calls == 4:
            raise RuntimeError("on fire")
        return Scores(np.full(len(prompts), 0.5))


def test_a_hanging_call_fails_in_time_and_the_reward_serves_again_when_it_is_done():
    reward, prompts = Hangs(), [Prompt("a"), Prompt("b")]
    limited, samples = LimitedReward(reward, "hangs", 0.3), torch.zeros(2, 3, 4, 4)
    assert limited.weights == "mine"
    with torch.no_grad():
        assert limited.score(samples, prompts, None).values.tolist() == [0.5, 0.5]
    assert reward.gradients is False
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within scoring\.timeout, 0\.3 s"):
        limited.score(samples, prompts, None)
    with pytest.raises(TimeoutError, match="still busy"):
        limited.score(samples, prompts, None)
    assert time.monotonic() - begin < 5
    assert reward.calls == 2
    reward.go.set()
    assert limited._late is not None
    limited._late.join()
    assert limited.score(samples, prompts, None).values.tolist() == [0.5, 0.5]
    with pytest.raises(RuntimeError, match="on fire"):
        limited.score(samples, prompts, None)


def test_a_run_limits_its_rewards_unless_told_not_to(tiny_flux):
    from support.tiny import tiny_config

    limited = load_rewards(tiny_config(tiny_flux))["shapes"]
    assert isinstance(limited, LimitedReward)
    assert limited.seconds == 1800
    assert not isinstance(load_rewards(tiny_config(tiny_flux, scoring={"timeout": None}))["shapes"], LimitedReward)
