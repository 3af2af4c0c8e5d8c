"""Chunks, overlap, the best of N and staleness: what is trained on is what it would be one after the other."""

import json

import numpy as np
import pytest
from support.redness import REDNESS, Redness, assert_same, finished
from support.runs import callback_of, metrics
from support.tiny import tiny_config

from fastgrpo.algorithms.advantages import extremes
from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.observe.timers import PhaseTimer
from fastgrpo.rewards import Scores
from fastgrpo.rollout.generator import Generator
from fastgrpo.training.callbacks.guard import GuardCallback
from fastgrpo.training.trainer import Trainer

GAUGES = ("scoring/",)


def learned(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith(GAUGES)} for line in metrics(run_dir)]


@pytest.fixture(autouse=True)
def fresh():
    Redness.threads, Redness.sizes = [], []


@pytest.mark.parametrize("trained", [{"kind": "window", "size": 2, "start": 1}, {"kind": "subset"}])
def test_chunks_scored_beside_the_rollout_change_no_bit(tiny_flux, tmp_path, trained):
    sections = {"rewards": REDNESS, "rollout": {"group_size": 4, "trained": trained}}
    # With a time limit a reward has a thread of its own, whoever waits for it.
    unlimited = {"timeout": None}
    whole = finished(tiny_config(tiny_flux, tmp_path / "whole", scoring=unlimited, **sections))
    assert set(Redness.threads) == {"MainThread"}
    Redness.threads, Redness.sizes = [], []
    # Three chunks of eight samples: groups are cut.
    parts = finished(tiny_config(tiny_flux, tmp_path / "parts", scoring={"chunks": 3, **unlimited}, **sections))
    assert "MainThread" not in Redness.threads
    assert Redness.sizes == [3, 3, 2] * 2
    assert_same(whole, parts)
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")
    assert all(line["scoring/reward_seconds"] > 0 for line in metrics(tmp_path / "parts"))


@pytest.mark.parametrize("rollout", [{}, {"old_values": "log_prob"}, {"best_of": 12}], ids=str)
def test_trajectories_that_wait_on_the_host_change_no_bit(tiny_flux, tmp_path, rollout):
    rollout = {"group_size": 4, "trained": {"kind": "subset"}, **rollout}
    runs = [
        finished(tiny_config(tiny_flux, tmp_path / place, rewards=REDNESS, rollout={**rollout, "trajectory": place}))
        for place in ("device", "host")
    ]
    assert_same(*runs)


def test_ranks_that_roll_out_the_same_samples_score_a_share_each(tiny_flux, tmp_path):
    config = tiny_config(
        tiny_flux, tmp_path / "run", rewards=REDNESS, rollout={"group_size": 5}, scoring={"chunks": 2, "overlap": False}
    )
    trainer = Trainer.from_config(config)
    drawn = trainer.rollouts.sampler.at(0)
    whole, found = {}, {}
    for context in (1, 3):
        for rank in range(context):
            generator = Generator(
                trainer.family,
                config,
                trainer.rewards,
                trainer.rollouts.mine,
                trainer.rollouts.levels,
                trainer.failures,
                context,
                rank,
            )
            timer = PhaseTimer(trainer.world.device)
            batch = generator.start(0, drawn, [trainer.rollouts.prompts[i] for i in drawn], timer)
            generator.finish(batch, timer)
            values = batch.scores[REDNESS[0]["name"]].values
            into = whole if context == 1 else found
            into.update(zip(generator.scores_of(trainer.rollouts.mine, rank).tolist(), values.tolist(), strict=True))
    # Chunks of five samples, two for each of three ranks.
    assert Redness.sizes == [5, 5] + [2, 2] * 3
    assert whole == found
    assert len(whole) == 10


def test_the_extremes_of_a_stream_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 4, 24).astype(float)
        values[rng.random(24) < 0.2] = np.nan
        samples, groups = np.arange(24), np.arange(24) // 8
        whole = samples[extremes(values, groups, samples, 4)]
        kept = np.array([], int)
        for chunk in np.array_split(samples, 5):
            pool = np.concatenate([kept, chunk])
            kept = pool[extremes(values[pool], groups[pool], pool, 4)]
        assert np.array_equal(np.sort(kept), whole)
    chosen = extremes(np.array([3.0, 1.0, np.nan, 2.0, 5.0, 4.0]), np.zeros(6, int), np.arange(6), 2)
    assert chosen.tolist() == [False, True, False, False, True, False]


BEST = {"group_size": 4, "best_of": 12, "trained": {"kind": "window", "size": 2, "start": 1}}


def test_the_best_of_n_keeps_the_extremes_of_each_prompt_in_any_chunks(tiny_flux, tmp_path):
    sections = {"rewards": REDNESS, "rollout": BEST}
    whole = finished(tiny_config(tiny_flux, tmp_path / "1", **sections))
    for chunks, overlap in ((6, True), (6, False)):
        name = f"{chunks}-{overlap}"
        settings = {"chunks": chunks, "overlap": overlap}
        parts = finished(tiny_config(tiny_flux, tmp_path / name, scoring=settings, **sections))
        assert_same(whole, parts)
        assert learned(tmp_path / name) == learned(tmp_path / "1")
        # Rows of a sample: one at the second trained step; of a prompt one more, at the first.
        kept, chunk = 2 * (4 + 1), 4 + 1
        assert parts.rollouts.generator.held_rows <= kept + chunk * (2 if overlap else 1)
    assert whole.rollouts.generator.held_rows == 2 * (12 + 1)
    assert [line["samples/trained"] for line in metrics(tmp_path / "1")] == [8, 8]


def test_the_best_of_n_trains_on_the_best_and_the_worst(tiny_flux, tmp_path, monkeypatch):
    trainer = Trainer.from_config(
        tiny_config(tiny_flux, tmp_path / "run", rewards=REDNESS, rollout=BEST, scoring={"chunks": 4})
    )
    seen = []
    inner = trainer.updater.run
    monkeypatch.setattr(trainer.updater, "run", lambda *arguments: seen.append(arguments) or inner(*arguments))
    trainer.run()
    for batch, advantages, *_ in seen:
        score, trajectory, trainable = batch.scored, batch.trajectory, advantages.valid
        values = score.values[0].reshape(2, 12)
        order = np.argsort(values, axis=1)
        ends = np.concatenate([order[:, :2], order[:, -2:]], axis=1)
        expected = np.sort(ends + np.array([[0], [12]]), axis=1).reshape(-1)
        assert np.array_equal(trajectory.layout.samples, expected)
        assert np.array_equal(np.flatnonzero(trainable), expected)
        # Advantages are those among all twelve.
        normal = (values - values.mean(1, keepdims=True)) / (values.std(1, ddof=1, keepdims=True) + 1e-8)
        terms = advantages.terms
        assert terms.reshape(-1)[expected] == pytest.approx(normal.reshape(-1)[expected])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rollout": {"best_of": 2, "group_size": 4}}, "half the best and half the worst of 2 cannot be 4"),
        ({"rollout": {"best_of": 9, "group_size": 3}}, "must be even"),
        ({"rewards": [{"name": "shapes", "every": 2}]}, "'shapes' is trained, so it is scored every iteration"),
        ({"rollout": {"antithetic": True, "group_size": 3}}, "a group has 3 samples; make them even"),
        ({"rollout": {"antithetic": True, "shared_noise": False, "group_size": 4}}, "set rollout.shared_noise to true"),
        ({"guard": {"action": "stop"}}, "needs a held-out reward"),
        ({"guard": {"action": "raise_kl"}, "rewards": [{"name": "shapes"}, {"name": "ocr", "weight": 0.0}]}, "KL term"),
    ],
)
def test_what_cannot_be_is_named(tiny_flux, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_flux, **settings)


@pytest.mark.parametrize("variant", [pytest.param("plain", marks=pytest.mark.full), "best_of", "spread", "antithetic"])
def test_one_update_of_staleness_resumes_to_the_bit(tiny_flux, tmp_path, variant):
    sections = {
        "plain": {"scoring": {"staleness": 1, "chunks": 2}},
        "best_of": {"scoring": {"staleness": 1, "chunks": 4}, "rollout": BEST, "update": {"optimizer_steps": 2}},
        "spread": {"scoring": {"staleness": 1}, "prompts": {"select": "spread"}, "rollout": {"old_values": "log_prob"}},
        "antithetic": {"scoring": {"staleness": 1}, "rollout": {"antithetic": True, "group_size": 4}},
    }[variant] | {"rewards": REDNESS}
    straight = finished(tiny_config(tiny_flux, tmp_path / "a", train={"iterations": 3}, **sections))
    part, scored = tmp_path / "b", sum(Redness.sizes)
    finished(tiny_config(tiny_flux, part, train={"iterations": 1}, **sections))
    run = {"dir": str(part), "seed": 7, "resume": True}
    again = finished(tiny_config(tiny_flux, part, train={"iterations": 3}, run=run, **sections))
    # What was in flight is not scored again.
    assert sum(Redness.sizes) == 2 * scored
    assert_same(straight, again)
    assert learned(part) == learned(tmp_path / "a")


def test_staleness_is_one_update_and_the_ratio_shows_it(tiny_flux, tmp_path):
    update = {"optimizer": {"lr": 1e-3}}
    fresh = finished(tiny_config(tiny_flux, tmp_path / "fresh", rewards=REDNESS, update=update))
    late = {"scoring": {"staleness": 1}, "rewards": REDNESS, "update": update}
    stale = finished(tiny_config(tiny_flux, tmp_path / "stale", **late))
    ours, theirs = metrics(tmp_path / "stale"), metrics(tmp_path / "fresh")
    assert ours[0]["reward/mean"] == theirs[0]["reward/mean"]
    assert ours[0]["ratio/first_max_deviation"] == 0
    # The second iteration was rolled out before the first update.
    assert ours[1]["ratio/first_max_deviation"] > 0
    assert theirs[1]["ratio/first_max_deviation"] == 0
    assert stale.rollouts.state()[0]["in_flight"] is not None
    assert fresh.rollouts.state()[0]["in_flight"] is None


class FailsFor:
    """Scores nothing from the third call on, while `broken`; before, all."""

    broken, calls, share = True, 0, 1.0

    def score(self, samples, prompts, fps):
        FailsFor.calls += 1
        values = samples[:, 0].mean(dim=(1, 2)).double().numpy()
        valid = np.ones(len(values), bool)
        if FailsFor.broken and FailsFor.calls >= 3:
            valid[: round(FailsFor.share * len(valid))] = False
        return Scores(values, valid)


@pytest.mark.parametrize("staleness", [0, 1])
def test_too_many_failures_pause_the_run_with_a_checkpoint(tiny_flux, tmp_path, monkeypatch, staleness):
    monkeypatch.setattr(FailsFor, "calls", 0)
    monkeypatch.setattr(FailsFor, "broken", True)
    monkeypatch.setattr(FailsFor, "share", 0.7)
    rewards = [{"name": "test_generation:FailsFor"}]
    sections = {"rewards": rewards, "train": {"iterations": 4}, "scoring": {"staleness": staleness}}
    config = tiny_config(tiny_flux, tmp_path / "run", **sections)
    with pytest.raises(UserError, match=r"max_failure_rate: 67% of iteration 2's samples got no score.*paused with a"):
        Trainer.from_config(config).run()
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [2]
    FailsFor.broken = False
    again = Trainer.from_config(config.model_copy(update={"run": config.run.model_copy(update={"resume": True})}))
    assert again.iteration == 2
    again.run()
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    if staleness == 0:
        straight = finished(tiny_config(tiny_flux, tmp_path / "straight", **sections))
        assert_same(straight, again)


class Alternates:
    """Watched only: every second iteration, by the config."""

    calls = 0

    def score(self, samples, prompts, fps):
        Alternates.calls += 1
        return Scores(np.full(len(samples), 0.5), np.ones(len(samples), bool))


def test_a_held_out_reward_is_scored_every_so_many_iterations(tiny_flux, tmp_path):
    held = {"name": "test_generation:Alternates", "label": "held", "weight": 0.0, "every": 2}
    Alternates.calls = 0
    config = tiny_config(tiny_flux, tmp_path / "run", rewards=[*REDNESS, held], train={"iterations": 3})
    trainer = finished(config)
    assert Alternates.calls == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["reward/held" in line for line in lines] == [True, False, True]
    assert [row[0] for row in callback_of(trainer, GuardCallback).guard.history["held"]] == [0, 2]
