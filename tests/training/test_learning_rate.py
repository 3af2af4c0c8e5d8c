"""`lr: auto`: the rate whose updates move the policy as far in a run as the config says, known alike by every rank."""

import itertools
import math
from typing import Any

import pytest
from support.tiny import tiny_config

from fastgrpo.commands.bench import load
from fastgrpo.config.schema import Optimizer
from fastgrpo.errors import ConfigError
from fastgrpo.training.learning_rate import EACH, EVERY, FIRST, LearningRate
from fastgrpo.training.trainer import Trainer

TRAVEL = Optimizer().travel


def followed(mobility, iterations, **settings):
    """The rates of a run whose updates move by mobility(iteration) · rate²."""
    rate, rates = LearningRate(Optimizer(lr="auto", **settings), iterations, iterations), []
    for iteration in range(iterations):
        lr = rate.at(iteration)
        rates.append(lr)
        measured = {"movement": mobility(iteration) * lr**2} if rate.asks(iteration) else {}
        rate.observe({"lr": lr, **measured})
    return rate, rates


@pytest.mark.parametrize("wanted, updates", [(2e-7, 60), (1e-5, 90), (3e-3, 60)])
def test_the_rate_is_the_one_whose_updates_travel_as_far_as_is_wanted(wanted, updates):
    # AdamW's first steps move ten times as far; a step's movement is noisy.
    def mobility(iteration):
        return (TRAVEL / updates / wanted) ** 2 * (10 if iteration < 3 else 1) * (0.5 if iteration % 2 else 1.5)

    rate, rates = followed(mobility, updates)
    assert rates[0] == FIRST
    assert all(b <= 2 * a for a, b in itertools.pairwise(rates))
    assert rate.peak == pytest.approx(wanted, rel=0.3)


def test_a_schedule_is_of_the_rate_that_is_found():
    _, rates = followed(lambda _: (TRAVEL / 200 / 1e-4) ** 2, 200, schedule="cosine", warmup=5)
    assert rates[100] == pytest.approx(0.5e-4, rel=0.05)
    assert rates[-1] < 1e-6


def test_what_is_not_measured_or_did_not_move_is_no_evidence():
    rate = LearningRate(Optimizer(lr="auto"), 100)
    for metrics in ({"lr": 1e-6}, {"lr": 1e-6, "movement": math.nan}, {"lr": 0.0, "movement": 1.0}):
        rate.observe(metrics)
        assert rate.peak == FIRST
    # A model in bfloat16 that a small rate leaves as it was.
    rate.observe({"lr": FIRST, "movement": 0.0})
    assert rate.peak == 2 * FIRST
    given = LearningRate(Optimizer(lr=3e-4), 100)
    given.observe({"lr": 3e-4, "movement": 1.0})
    assert given.at(50) == 3e-4
    assert not given.asks(0)


def test_it_is_asked_in_the_first_iterations_and_then_in_every_fourth():
    rate = LearningRate(Optimizer(lr="auto"), 100)
    assert [rate.asks(i) for i in range(EACH + 2 * EVERY)] == [True] * EACH + 2 * ([True] + [False] * (EVERY - 1))


@pytest.mark.parametrize("settings", [{}, {"objective": {"kl_weight": 0.1}}, {"update": {"optimizer_steps": 2}}])
def test_movement_is_that_of_the_policy_whatever_the_loss(tiny_flux, tmp_path, settings):
    optimizer = {"lr": "auto"}
    settings = {**settings, "update": {**settings.get("update", {}), "optimizer": optimizer}}
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path / "run", **settings))
    run, measured = trainer.updater.run, []

    def moved(batch: Any, *rest: Any, **named: Any) -> Any:
        result = run(batch, *rest, **named)
        measured.append(load("movement").movement(trainer.updater, batch))
        return result

    trainer.updater.run = moved
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["ratio/first_max_deviation"] == 0
        # Of the rows that the first optimizer step trains; the other is of all rows.
        assert metrics["movement"] == pytest.approx(measured[-1], rel=0.5)
    assert trainer.optimizer.rate.peak == 4 * FIRST


@pytest.mark.parametrize(
    "settings, words",
    [({"objective": {"kind": "awm"}}, "objective.kind: awm trains none"),
     ({"rollout": {"old_values": "log_prob"}}, "rollout.old_values: log_prob keeps none")],
)  # fmt: skip
def test_where_nothing_can_be_measured_a_number_is_asked_for(tiny_flux, settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(tiny_flux, update={"optimizer": {"lr": "auto"}}, **settings)
