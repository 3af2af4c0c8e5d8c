"""Samples that are trained more than once: exact ratios, resumed to the bit, masked where they are too far away."""

from __future__ import annotations

import pytest
import torch
from support.runs import finished, metrics, weights
from support.tiny import tiny_config

from fastgrpo.planning.dry_run import dry_run
from fastgrpo.training.optimizer import optimizer_steps
from fastgrpo.training.trainer import Trainer

UPDATE = {"epochs": 2, "replay": 2, "optimizer_steps": 2, "optimizer": {"lr": 1e-4}}
KINDS = {
    "grpo": {"objective": {"clip_low": 0.1, "clip_high": 0.1}},
    "awm": {
        "objective": {"kind": "awm", "clip_low": 1.0, "clip_high": 1.0, "times": {"count": 2}},
        "rollout": {"shared_noise": False, "group_size": 4},
    },
}


def test_an_earlier_rollout_is_trained_by_its_own_old_values(tiny_flux, tmp_path):
    """The steps of the second iteration: two epochs of its own samples, and one of those before."""
    config = tiny_config(tiny_flux, tmp_path, rollout={"group_size": 4}, update=UPDATE, **KINDS["grpo"])
    trainer = Trainer.from_config(config)
    trainer.step()
    [kept] = trainer.replay.earlier
    before = kept.batch.trajectory.v_old.clone()
    taken = []
    steps = trainer.updater._transition_steps

    def watched(batch, advantages, kl_weight, epochs):
        for step in steps(batch, advantages, kl_weight, epochs):
            taken.append((batch.iteration, batch.trajectory.v_old is kept.batch.trajectory.v_old))
            yield step

    trainer.updater._transition_steps = watched
    found = trainer.step()
    assert taken == [(1, False)] * 4 + [(0, True)] * 2
    assert torch.equal(kept.batch.trajectory.v_old, before)
    assert found["ratio/first_max_deviation"] == 0 < found["ratio/max_deviation"]
    assert [k.batch.iteration for k in trainer.replay.earlier] == [1]
    assert optimizer_steps(config) == trainer.optimizer.steps == 4 + 6


def test_the_old_policy_of_a_kept_rollout_is_put_back(tiny_flux, tmp_path):
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path, update=UPDATE, **KINDS["awm"]))
    assert trainer.optimizer.old is not None
    first = [p.clone() for p in trainer.optimizer.old.parameters]
    trainer.step()
    [kept] = trainer.replay.earlier
    assert kept.old is not None
    now = [p.clone() for p in trainer.optimizer.old.parameters]
    assert not all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
    with trainer.replay.old_of(kept):
        assert all(torch.equal(a, b) for a, b in zip(trainer.optimizer.old.parameters, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trainer.optimizer.old.parameters, now, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_an_uninterrupted_one(tiny_flux, tmp_path, kind):
    settings = {**KINDS[kind], "update": UPDATE, "checkpoint": {"every": 1}}
    straight = finished(tiny_config(tiny_flux, tmp_path / "straight", train={"iterations": 3}, **settings))
    finished(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 2}, **settings))
    run = {"dir": str(tmp_path / "run"), "seed": 7, "resume": True}
    resumed = finished(tiny_config(tiny_flux, tmp_path, train={"iterations": 3}, run=run, **settings))
    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "run")


def test_what_is_too_far_away_is_dropped_and_counted(tiny_flux, tmp_path):
    counts = []
    for threshold in (None, 1e-12):
        settings = {"clip_low": 10.0, "clip_high": 10.0, "dppo_threshold": threshold}
        update = {**UPDATE, "optimizer": {"lr": 1e-3}}
        run = tmp_path / str(threshold)
        trainer = Trainer.from_config(tiny_config(tiny_flux, run, update=update, objective=settings))
        trainer.step()
        counts.append(trainer.step()["dppo_dropped"])
    assert counts[0] == 0 < counts[1] < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_the_bytes_of_what_is_kept(tiny_flux, kind):
    def planned(replay):
        return dry_run(tiny_config(tiny_flux, update={**UPDATE, "replay": replay}, **KINDS[kind]))

    one, three = planned(1), planned(3)
    update = one.phases[-1].at_peak, three.phases[-1].at_peak
    assert update[1]["trajectories"] == pytest.approx(3 * update[0]["trajectories"], rel=0.05)
    # A second and a third old policy, and the place of the one that is put back.
    old = 4 * one.trainable if kind == "awm" else 0
    assert update[1]["parameters"] - update[0]["parameters"] == pytest.approx(2 * old, rel=0.02, abs=1)
    assert three.trained == 2 * one.trained
