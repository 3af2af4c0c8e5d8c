"""Who keeps the others waiting is named: a rank in a phase, a rank without a sign of life, a reward."""

import json
import time

import numpy as np
import pytest
from support.runs import callback_of
from support.tiny import tiny_config

from fastgrpo.observe.watch import Watch
from fastgrpo.rewards import Scores
from fastgrpo.training.callbacks.stalls import StallCallback
from fastgrpo.training.trainer import Trainer


class Ranks:
    """Ranks that look when they are told to, by one clock."""

    def __init__(self, folder, count):
        self.now, self.doing, self.said = 0.0, [(0, "rollout")] * count, []
        (folder / "ranks").mkdir()
        self.watches = [
            Watch(folder, r, count, lambda r=r: self.doing[r], lambda t, r=r: self.said.append((r, t)), 60, self.clock)
            for r in range(count)
        ]

    def clock(self):
        return self.now

    def wait(self, seconds, stopped=()):
        for _ in range(round(seconds / 5)):
            self.now += 5
            for watch in self.watches:
                if watch.rank not in stopped:
                    watch.look()


def test_a_rank_that_others_wait_for_is_named_once(tmp_path):
    ranks = Ranks(tmp_path, 3)
    ranks.wait(100)
    # All are in one phase, as long as it takes.
    assert ranks.said == []
    ranks.doing = [(4, "sync"), (4, "sync"), (4, "reward")]
    ranks.wait(50)
    assert ranks.said == []
    ranks.wait(20)
    assert ranks.said == [(0, "rank 2 has been in 'reward' of iteration 4 for 60 s, and 2 of 3 ranks wait")]
    ranks.wait(100)
    assert len(ranks.said) == 1


@pytest.mark.parametrize("stopped, speaker", [(1, 0), (0, 1)])
def test_a_stopped_rank_is_named_by_one_that_lives(tmp_path, stopped, speaker):
    ranks = Ranks(tmp_path, 3)
    ranks.doing = [(7, "update")] * 3
    ranks.wait(30)
    ranks.wait(70, stopped=(stopped,))
    expected = f"rank {stopped} has given no sign of life for 60 s; it was in 'update' of iteration 7"
    assert ranks.said == [(speaker, expected)]


class Slow:
    def score(self, samples, prompts, fps):
        time.sleep(1.5)
        return Scores(samples.mean(dim=(1, 2, 3)).numpy(), np.ones(len(samples), dtype=bool))


def test_a_slow_reward_of_a_run_is_named(tiny_flux, tmp_path, capsys):
    config = tiny_config(
        tiny_flux, tmp_path / "run", rewards=[{"name": "test_watch:Slow"}], train={"iterations": 1},
        telemetry={"progress": False, "stall_seconds": 0.5},
    )  # fmt: skip
    trainer = Trainer.from_config(config)
    assert callback_of(trainer, StallCallback).seconds == 0.5
    trainer.run()
    assert "warning: rank 0 has been in 'reward' of iteration 0 for 1 s" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["text"][:33] for e in events if e["event"] == "stall"] == ["rank 0 has been in 'reward' of it"]
