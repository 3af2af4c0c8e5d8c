"""The guard against reward hacking: it sees a held-out reward fall, and nothing where there is none to see."""

import numpy as np
import pytest
from support.redness import REDNESS, Redness, assert_same, finished
from support.runs import callback_of, metrics
from support.tiny import tiny_config

from fastgrpo.algorithms.guard import RewardGuard, moved
from fastgrpo.config import Guard
from fastgrpo.errors import UserError
from fastgrpo.rewards import Scores
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.trainer import Trainer


def watched(trained, held, **settings):
    guard = RewardGuard(Guard(**settings))
    falling = [guard.observe(i, t, {"held": h}) for i, (t, h) in enumerate(zip(trained, held, strict=True))]
    return guard, falling


def test_it_tells_when_one_falls_while_the_other_rises_and_only_then():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (2, 60))
    up, down, flat = np.linspace(0.4, 0.8, 60), np.linspace(0.6, 0.4, 60), np.full(60, 0.5)
    _, falling = watched(up + noise[0], down + noise[1])
    first = next(i for i, names in enumerate(falling) if names)
    assert 19 <= first <= 35
    assert all(names == ["held"] for names in falling[first + 5 :])
    for trained, held in ((up, up), (flat, down), (down, down), (up, flat)):
        assert not any(watched(trained + noise[0], held + noise[1])[1])


def test_after_the_kl_was_raised_it_measures_anew_and_its_state_returns():
    up, down = np.linspace(0.0, 1.0, 20), np.linspace(1.0, 0.0, 20)
    guard, falling = watched(up, down, window=3, kl_factor=4.0)
    assert falling[-1] == ["held"]
    guard.raise_kl(["held"])
    assert guard.kl_scale == 4.0
    assert guard.observe(20, 2.0, {"held": -1.0}) == []
    other = RewardGuard(guard.config)
    other.restore(guard.state())
    assert (other.history, other.kl_scale) == (guard.history, guard.kl_scale)
    assert moved(np.ones(3), np.ones(3)) == 0
    assert moved(np.ones(3), np.zeros(3)) == -np.inf


class Rises:
    """Higher with every call, beside a spread that can be learned from."""

    calls = 0

    def score(self, samples, prompts, fps):
        Rises.calls += 1
        values = samples[:, 0].mean(dim=(1, 2)).double().numpy()
        return Scores(values + Rises.calls, np.ones(len(values), bool))


class Falls:
    calls = 0

    def score(self, samples, prompts, fps):
        Falls.calls += 1
        return Scores(np.full(len(samples), -float(Falls.calls)), np.ones(len(samples), bool))


QUICK = {"window": 2, "threshold": 2.0}
HACKED = [{"name": "test_guard:Rises"}, {"name": "test_guard:Falls", "label": "held", "weight": 0.0}]


@pytest.fixture(autouse=True)
def fresh():
    Rises.calls = Falls.calls = 0
    Redness.threads, Redness.sizes = [], []


def test_a_hacked_run_stops_with_a_checkpoint_and_goes_on_without_the_guard(tiny_flux, tmp_path):
    sections = {
        "rewards": HACKED,
        "train": {"iterations": 6},
        "guard": {"action": "stop", **QUICK},
    }
    config = tiny_config(tiny_flux, tmp_path / "run", **sections)
    trainer = Trainer.from_config(config)
    with pytest.raises(UserError, match="stopped at iteration 4 with a checkpoint: held-out held fell"):
        trainer.run()
    assert callback_of(trainer, CheckpointCallback).store.iterations() == [4]
    off = config.model_copy(
        update={
            "run": config.run.model_copy(update={"resume": True}),
            "guard": config.guard.model_copy(update={"action": "off"}),
        }
    )
    assert finished(off).iteration == 6
    assert [line["guard/falling"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]


def test_the_kl_is_raised_and_stays_raised_after_a_resume(tiny_flux, tmp_path):
    sections = {
        "rewards": HACKED,
        "objective": {"kl_weight": 0.1},
        "guard": {"action": "raise_kl", **QUICK},
    }
    straight = finished(tiny_config(tiny_flux, tmp_path / "a", train={"iterations": 6}, **sections))
    kl = [line["guard/kl_weight"] for line in metrics(tmp_path / "a")]
    assert kl == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2, 0.2])
    assert straight.kl_weight == pytest.approx(0.2)
    Rises.calls = Falls.calls = 0
    finished(tiny_config(tiny_flux, tmp_path / "b", train={"iterations": 5}, **sections))
    run = {"dir": str(tmp_path / "b"), "seed": 7, "resume": True}
    again = finished(tiny_config(tiny_flux, tmp_path / "b", train={"iterations": 6}, run=run, **sections))
    assert_same(straight, again)
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_without_held_out_rewards_there_is_nothing_to_tell(tiny_flux, tmp_path):
    finished(tiny_config(tiny_flux, tmp_path / "run", rewards=REDNESS, train={"iterations": 1}))
    assert "guard/falling" not in metrics(tmp_path / "run")[0]
