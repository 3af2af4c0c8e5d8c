"""What an EMA's decay counts, and what is left of the base weights: DanceGRPO's 22% after 300 iterations."""

import pytest
import torch
from support.tiny import tiny_config
from support.updates import advantages, prepare, run_update
from torch import nn

from fastgrpo.config import Update
from fastgrpo.training.optimizer import OptimizerState


def base_left(iterations, per_iteration, **settings):
    """The share of the base weights in the EMA, of a weight that moved away at once and for good."""
    layer = nn.Linear(1, 1, bias=False)
    state = OptimizerState(layer, Update(ema_decay=0.995, **settings), 1)
    average = state.ema
    assert average is not None
    with torch.no_grad():
        average[0].zero_()
        layer.weight.fill_(1.0)
    for iteration in range(iterations):
        for _ in range(per_iteration):
            # Without a gradient a step moves nothing.
            layer.weight.grad = torch.zeros_like(layer.weight)
            state.adamw.param_groups[0]["weight_decay"] = 0.0
            state.step()
        state.end_iteration(iteration)
    return 1 - average[0].item()


@pytest.mark.parametrize(
    "settings, left",
    [
        ({"ema_per": "iteration", "ema_warmup": False}, 0.995**300),
        ({"ema_warmup": False}, 0.995**600),
        ({}, 0.0),
    ],
)
def test_what_is_left_of_the_base_after_300_iterations_of_two_steps(settings, left):
    assert base_left(300, 2, **settings) == pytest.approx(left, abs=1e-4)


def test_dance_grpo_keeps_a_fifth_of_the_base():
    assert base_left(300, 2, ema_per="iteration", ema_warmup=False) == pytest.approx(0.222, abs=5e-4)


@pytest.mark.parametrize("count", [1, 5])
def test_warm_up_counts_what_is_averaged(count):
    expected = 1.0
    for n in range(1, count + 1):
        expected *= (1 + n) / (10 + n)
    assert base_left(count, 1) == pytest.approx(expected, rel=1e-5)
    assert base_left(count, 2, ema_per="iteration") == pytest.approx(expected, rel=1e-5)


def test_an_update_averages_once_an_iteration(tiny_flux):
    """After both of its optimizer steps, and of an iteration without a step too."""
    update = {"optimizer_steps": 2, "ema_decay": 0.9, "ema_per": "iteration", "ema_warmup": False}
    config = tiny_config(tiny_flux, update=update)
    prepared = prepare(config, optimizer=lambda policy, update: OptimizerState(policy, update, 10))
    family, schedule, trajectory, conditioning, updater = prepared
    start = [p.detach().clone() for p in family.denoiser.parameters()]
    for A in (advantages(config), advantages(config, zeros=6)):
        run_update(updater, schedule, trajectory, conditioning, A)
    assert updater.optimizer.steps == 2
    assert updater.optimizer.ema is not None
    for p, before, average in zip(updater.optimizer.parameters, start, updater.optimizer.ema, strict=True):
        assert torch.allclose(average, 0.81 * before + 0.19 * p, atol=1e-6)
