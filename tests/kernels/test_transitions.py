"""Transition coefficients against their papers' samplers written out, and their argument checks."""

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import Transition, transitions

LEVELS = [(1.0, 0.9), (0.75, 0.5), (0.31, 0.02), (0.0039, 0.0)]
x, v = 0.7, -1.3
# With types that they do not have.
ddim: Any = transitions.ddim
ode: Any = transitions.ode


def mean(step: Transition) -> Any:
    return step.a * x + step.b * v


@pytest.mark.parametrize("sigma, sigma_next", LEVELS)
def test_dance_sde_is_drift_with_score_correction(sigma, sigma_next):
    """Euler-Maruyama of dx = (v - η²/2·score)dt, score = -(x - (1-σ)x̂0)/σ², as DanceGRPO steps it."""
    eta, delta = 0.3, sigma_next - sigma
    step = transitions.dance_sde(sigma, sigma_next, eta)
    clean = x - sigma * v
    score = -(x - (1 - sigma) * clean) / sigma**2
    assert mean(step) == pytest.approx(x + delta * v - 0.5 * eta**2 * score * delta, rel=1e-12)
    assert step.s == pytest.approx(eta * math.sqrt(-delta), rel=1e-15)


@pytest.mark.parametrize("sigma, sigma_next", LEVELS)
def test_flow_sde_is_dance_with_a_level_dependent_eta(sigma, sigma_next):
    level, sigma_max = 0.7, 0.98
    step = transitions.flow_sde(sigma, sigma_next, level, sigma_max)
    std = level * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    delta = sigma_next - sigma
    expected = x * (1 + std**2 / (2 * sigma) * delta) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * delta
    assert mean(step) == pytest.approx(expected, rel=1e-12)
    assert step.s == pytest.approx(std * math.sqrt(-delta), rel=1e-15)


@pytest.mark.parametrize("sigma, sigma_next", LEVELS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_cps_keeps_the_coefficients_of_signal_and_noise(sigma, sigma_next, level):
    step = transitions.cps(sigma, sigma_next, level)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    expected = (1 - sigma_next) * clean + sigma_next * math.cos(math.pi * level / 2) * noise
    assert mean(step) == pytest.approx(expected, abs=1e-15)
    assert step.s == pytest.approx(sigma_next * math.sin(math.pi * level / 2), abs=1e-16)


@pytest.mark.parametrize("alpha, alpha_next", [(0.0047, 0.0312), (0.4, 0.55), (0.98, 1.0), (0.0, 0.1)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_predicted_sample_plus_direction(alpha, alpha_next, prediction, eta):
    """Equations 12 and 16 of arXiv 2010.02502."""
    if prediction == "epsilon" and alpha == 0:
        with pytest.raises(ValueError, match="alpha_bar: must be greater than 0"):
            transitions.ddim(alpha, alpha_next, eta, prediction)
        return
    root, noise_root = math.sqrt(alpha), math.sqrt(1 - alpha)
    clean = {"epsilon": (x - noise_root * v) / root if root else None, "v_prediction": root * x - noise_root * v}
    clean = clean.get(prediction, v)
    epsilon = (x - root * clean) / noise_root
    s = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    expected = math.sqrt(alpha_next) * clean + math.sqrt(max(1 - alpha_next - s * s, 0)) * epsilon
    step = transitions.ddim(alpha, alpha_next, eta, prediction)
    assert mean(step) == pytest.approx(expected, rel=1e-12)
    assert step.s == pytest.approx(s, rel=1e-15)
    assert mean(transitions.clean_coefficients(alpha, prediction)) == pytest.approx(clean, rel=1e-12)


def test_ode_and_flow_preview():
    assert transitions.ode(0.8, 0.5) == (1.0, pytest.approx(-0.3), 0.0)
    assert mean(transitions.clean_coefficients(0.8)) == pytest.approx(x - 0.8 * v)


@pytest.mark.parametrize(
    "function, levels, rest",
    [
        (transitions.ode, LEVELS, ()),
        (transitions.dance_sde, LEVELS, (0.3,)),
        (transitions.flow_sde, LEVELS, (0.7, 0.98)),
        (transitions.cps, LEVELS, (0.5,)),
        (transitions.ddim, [(0.1, 0.2), (0.4, 0.9)], (0.5, "v_prediction")),
    ],
)
def test_tensors_give_the_floats_of_every_row(function, levels, rest):
    now, following = (torch.tensor(column, dtype=torch.float64) for column in zip(*levels, strict=True))
    step = function(now, following, *rest)
    for field, name in zip(step, step._fields, strict=True):
        expected = torch.tensor([getattr(function(*pair, *rest), name) for pair in levels], dtype=torch.float64)
        assert field.dtype == torch.float64
        torch.testing.assert_close(field, expected, rtol=1e-15, atol=1e-16)


def test_tensors_are_not_read_on_a_device():
    """A fake tensor raises at any read of a value, as a device tensor would copy it to the host."""
    with FakeTensorMode():
        sigma = torch.rand(4)
        for step in (
            transitions.flow_sde(sigma, sigma - 0.1, 0.7, 0.98),
            transitions.cps(sigma, sigma - 0.1, 0.5),
            transitions.ddim(sigma, sigma + 0.1, 0.5, "epsilon"),
        ):
            assert all(
                torch.is_tensor(field) and field.shape == (4,) and field.dtype == torch.float64 for field in step
            )


def test_broadcasts_levels_against_samples():
    step = transitions.cps(torch.full((3, 1), 0.8), torch.tensor([0.5, 0.4]), 0.5)
    assert all(torch.is_tensor(field) and field.shape == (3, 2) for field in step)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: transitions.ode(0.5, 0.5), "sigma_next: must be smaller than sigma"),
        (lambda: transitions.ode(torch.tensor([0.5, 0.4]), torch.tensor([0.4, 0.6])), "sigma_next: must be smaller"),
        (lambda: transitions.cps(1.2, 0.5, 0.5), "sigma: must be at most 1"),
        (lambda: transitions.cps(0.8, 0.5, 1.5), "noise_level: must be between 0 and 1"),
        (lambda: transitions.dance_sde(0.8, -0.1, 0.3), "sigma_next: must be at least 0"),
        (lambda: transitions.dance_sde(0.8, 0.5, -0.3), "eta: must be at least 0"),
        (lambda: transitions.dance_sde(0.8, 0.5, math.inf), "eta: must be at least 0 and finite"),
        (lambda: transitions.flow_sde(0.8, 0.5, math.inf, 0.9), "noise_level: must be at least 0 and finite"),
        (lambda: transitions.dance_sde(float("nan"), 0.5, 0.3), "sigma: must be at most 1, got nan"),
        (lambda: transitions.flow_sde(1.0, 0.9, 0.7, 1.0), "sigma_max: must be at least 0 and less than 1"),
        (lambda: transitions.ddim(0.5, 0.4, 0.5), "alpha_bar_next: must be greater than alpha_bar"),
        (lambda: transitions.ddim(0.1, 0.9, 4.0), "eta: must be small enough"),
        (lambda: ddim(0.1, 0.2, 0.5, "velocity"), "prediction: unknown prediction 'velocity'"),
        (lambda: transitions.ddim(0.1, 0.2, 0.5, clip_sample=True), "clip_sample: a clipped DDIM step"),
        (lambda: transitions.ddim(0.1, 0.2, 0.5, thresholding=True), "thresholding: a clipped DDIM step"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_wrong_types():
    with pytest.raises(TypeError, match="sigma: expected a float or a tensor, got str"):
        ode("0.5", 0.4)
    with pytest.raises(TypeError, match="sigma: expected a floating-point tensor"):
        transitions.ode(torch.tensor([1]), 0.4)
