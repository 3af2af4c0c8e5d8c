"""objective.kl: the KL to a reference as each project writes it, from its own step's mean and standard deviation."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.levels import flow_levels
from support.tiny import tiny_config
from support.updates import prepare, run_update

from fastgrpo.algorithms.schedule import kl_factors, linear_levels, schedule_steps, shifted
from fastgrpo.config import Rollout, SubsetSteps

STEPS = 10
KINDS = ("gaussian", "flow_grpo", "x", "v")


def step_of_project(sampler, eta, levels, t, x, v):
    """(mean of the next latents, std without √Δσ, √−Δσ) as Flow-GRPO's and DanceGRPO's scripts compute them."""
    sigma, following = levels[t], levels[t + 1]
    dt = following - sigma
    if sampler == "cps":
        std = following * math.sin(eta * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        return clean * (1 - following) + noise * math.sqrt(following**2 - std**2), std, 1.0
    std = eta if sampler == "dance_sde" else math.sqrt(sigma / (1 - (levels[1] if sigma == 1 else sigma))) * eta
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std, math.sqrt(-dt)


def kl_of_project(kind, sampler, eta, levels, t, x, v, v_ref):
    mean, std, root = step_of_project(sampler, eta, levels, t, x, v)
    mean_ref, _, _ = step_of_project(sampler, eta, levels, t, x, v_ref)
    return {
        "gaussian": ((mean - mean_ref) ** 2).mean() / (2 * (std * root) ** 2),
        "flow_grpo": ((mean - mean_ref) ** 2).mean() / (2 * std**2),
        "x": ((mean - mean_ref) ** 2).mean(),
        "v": ((v - v_ref) ** 2).mean(),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler, eta", [("dance_sde", 0.3), ("flow_sde", 0.7), ("cps", 0.8)])
def test_it_is_each_projects_own_value(kind, sampler, eta):
    levels = shifted(linear_levels(STEPS), 3.0)
    roll = Rollout(steps=STEPS, sampler=sampler, eta=eta, trained=SubsetSteps(fraction=1.0))
    schedule = schedule_steps(roll, flow_levels(levels, "transformer"), 2, 0, 0)
    factors = kl_factors(kind, sampler, schedule)
    generator = torch.Generator().manual_seed(0)
    x, v, v_ref = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    for t in range(STEPS - 1):
        _, b, s = schedule.transitions[t]
        Q = (b * (v - v_ref) / s).square().mean()
        theirs = kl_of_project(kind, sampler, eta, levels, t, x, v, v_ref)
        assert (factors[t] * Q / 2).item() == pytest.approx(theirs.item(), rel=1e-6)
    assert factors[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_reports_it_and_adds_it_to_the_loss(tiny_flux, kind):
    weight = 0.5
    config = tiny_config(tiny_flux, objective={"kl_weight": weight, "kl": kind})
    family, schedule, trajectory, conditioning, updater = prepare(config)
    frozen = copy.deepcopy(family.denoiser)
    with torch.no_grad():
        for p in frozen.parameters():
            p.mul_(1.05)
    updater.reference = lambda: nullcontext({"transformer": frozen})
    result = run_update(updater, schedule, trajectory, conditioning, np.zeros(6))
    layout, expected = trajectory.layout, []
    levels = [*schedule.times, 0.0]
    for row in layout.pair_row:
        step = int(layout.row_step[row])
        x, time = trajectory.x[row][None], torch.tensor([schedule.times[step]])
        condition = conditioning.rows(layout.row_prompt[row : row + 1])
        with torch.no_grad():
            v, v_ref = (family.predict(x, time, condition, m)[0].double() for m in (family.denoiser, frozen))
        roll = config.rollout
        expected.append(kl_of_project(kind, roll.sampler, roll.eta, levels, step, x[0].double(), v, v_ref).item())
    assert result.statistics.kl.item() == pytest.approx(sum(expected), rel=1e-5)
    assert result.statistics.loss.item() == pytest.approx(weight * sum(expected), rel=1e-5)
