"""Flow-Factory's step against the formulas in float64, as its trainer calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import oracles
from support.launches import aten, counting, triton
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels.compat import flow_factory
from fastgrpo_kernels.compat.flow_factory import StepOutput

# All of its results are there, where a test does not say otherwise.
step: Any = flow_factory.step

MEAN, LOG_PROB, GRADIENT = 1e-6, 2e-6, 1e-5
NAMES = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


def scheduler_of(kind, device="cpu", evaluating=False):
    sigmas = torch.linspace(1, 0, 9)
    sigmas = (3 * sigmas / (1 + 2 * sigmas)).to(device)
    return SimpleNamespace(
        sigmas=sigmas,
        timesteps=1000 * sigmas[:-1],
        dynamics_type=kind,
        is_eval=evaluating,
        get_noise_level_for_timestep=lambda timestep: 0.3,
    )


def latents(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 6, 32, generator=generator).to(dtype) for _ in range(3)]


def expected_of(kind, x, v, y, sigma, sigma_next, sigma_max, level):
    if kind == "Flow-SDE":
        mean, std, std_dev_t = oracles.flow_sde(v, x, level, sigma, sigma_next, sigma_max)
    elif kind == "Dance-SDE":
        mean, std, _ = oracles.dance(v, x, level, sigma, sigma_next, True)
        std_dev_t = torch.full_like(std, level)
    else:
        mean, std = oracles.flow_cps(v, x, level, sigma, sigma_next)
        return mean, std, -oracles.mean_over_elements((y - mean) ** 2)
    return mean, std_dev_t, oracles.gaussian_log_density(y, mean, std)


def assert_close(actual, expected, tolerance):
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    assert error <= tolerance * expected.detach().abs().max(), f"{float(error):.2e}"


@pytest.mark.parametrize("kind", ["Flow-SDE", "Dance-SDE", "CPS"])
@pytest.mark.parametrize("given_next", [True, False])
def test_a_training_step(kind, given_next):
    x, v, delta = latents()
    scheduler, index = scheduler_of(kind), torch.tensor([0, 4, 7])
    following = torch.cat([scheduler.timesteps, torch.zeros(1)])
    sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    w, reference = v.clone().requires_grad_(), v.double().requires_grad_()
    y = x + 0.1 * delta
    mean, std_dev_t, log_prob = expected_of(
        kind, x.double(), reference, y.double(), sigma.double(), sigma_next.double(), scheduler.sigmas[1].double(), 0.7
    )
    out = step(
        scheduler,
        noise_pred=w,
        timestep=scheduler.timesteps[index],
        latents=x,
        next_latents=y,
        timestep_next=following[index + 1] if given_next else None,
        noise_level=0.7,
    )
    assert_close(out.next_latents_mean, mean, MEAN)
    assert_close(out.log_prob, log_prob, LOG_PROB)
    assert_close(out.std_dev_t, std_dev_t, MEAN)
    assert_close(out.dt.flatten(), sigma_next - sigma, MEAN)
    assert torch.equal(out.next_latents, y)
    assert out.std_dev_t.shape == out.dt.shape == (3, 1, 1)
    (grad,) = torch.autograd.grad(out.log_prob.sum(), w)
    (expected_grad,) = torch.autograd.grad(log_prob.sum(), reference)
    assert_close(grad, expected_grad, GRADIENT)


def test_what_is_drawn_is_rounded_as_it_is_stored():
    x, v, _ = latents(torch.bfloat16)
    scheduler = scheduler_of("Flow-SDE")
    call = {"timestep": scheduler.timesteps[2], "noise_level": 0.7, "timestep_next": scheduler.timesteps[3]}
    drawn = step(scheduler, v, latents=x, generator=torch.Generator().manual_seed(1), **call)
    assert drawn.next_latents.dtype == torch.float32
    assert torch.equal(drawn.next_latents, drawn.next_latents.bfloat16().float())
    replayed = step(scheduler, v, latents=x, next_latents=drawn.next_latents.bfloat16(), **call)
    assert torch.equal(drawn.log_prob, replayed.log_prob)


def test_ode_and_evaluation_draw_no_noise():
    x, v, _ = latents()
    for scheduler in (scheduler_of("ODE"), scheduler_of("Flow-SDE", evaluating=True)):
        out = step(scheduler, v, scheduler.timesteps[2], x, timestep_next=scheduler.timesteps[3])
        euler = x + (scheduler.sigmas[3] - scheduler.sigmas[2]) * v
        assert_close(out.next_latents, euler, MEAN)
        assert torch.equal(out.next_latents, out.next_latents_mean)
        assert not out.std_dev_t.any()
    assert not step(scheduler_of("ODE"), v, scheduler.timesteps[2], x).log_prob.any()


def test_only_what_is_wanted_is_returned():
    x, v, y = latents()
    scheduler = scheduler_of("Flow-SDE")
    out = step(scheduler, v, scheduler.timesteps[2], x, y, noise_level=0.7, return_kwargs=["log_prob", "dt"])
    assert {name for name, value in out.to_dict().items() if value is not None} == {"log_prob", "dt"}
    full = step(scheduler, v, scheduler.timesteps[2], x, y, noise_level=0.7, return_dict=False)
    assert isinstance(full, tuple)
    assert torch.equal(full[NAMES.index("log_prob")], out.log_prob)
    off = step(scheduler, v, scheduler.timesteps[2], x, y, noise_level=0.7, compute_log_prob=False)
    assert isinstance(off, StepOutput)
    assert off.log_prob is None
    # The scheduler's own level, where none is given.
    own = step(scheduler, v, scheduler.timesteps[2], x, y)
    assert torch.equal(own.log_prob, step(scheduler, v, scheduler.timesteps[2], x, y, noise_level=0.3).log_prob)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"timestep_next": 1.0}, ValueError, "^timestep_next: expected the scheduler's next timestep, got 1.0"),
        ({"timestep": 1.0}, ValueError, "^timestep: .*set_timesteps"),
        ({"dynamics_type": "SDE"}, ValueError, "^dynamics_type: unknown 'SDE'; one of: Flow-SDE"),
        ({"return_kwargs": ["log_probs"]}, ValueError, r"^return_kwargs: unknown \['log_probs'\]"),
        ({"next_latents": torch.ones(1)}, ValueError, "^next_latents: expected shape"),
        ({"noise_pred": None}, TypeError, "^noise_pred: expected a tensor"),
        ({"noise_level": "high"}, TypeError, "^noise_level: expected a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    x, v, y = latents()
    scheduler = scheduler_of("Flow-SDE")
    call = {"noise_pred": v, "timestep": scheduler.timesteps[2], "latents": x, "next_latents": y, "noise_level": 0.7}
    with pytest.raises(error, match=message):
        step(scheduler, **call | change)


def test_a_training_step_waits_for_nothing_and_launches_little():
    with FakeTensorMode():
        scheduler = scheduler_of("Flow-SDE")
        x, y, v = torch.randn(3, 6, 32), torch.randn(3, 6, 32), torch.randn(3, 6, 32, requires_grad=True)
        out = step(scheduler, v, scheduler.timesteps[:3], x, y, scheduler.timesteps[1:4], noise_level=0.7)
        out.log_prob.sum().backward()

    def meta(*shape, **options):
        return torch.empty(shape, device="meta", **options)

    scheduler, v = scheduler_of("Flow-SDE", device="meta"), meta(3, 6, 32, requires_grad=True)
    arguments = {"noise_level": 0.7, "return_kwargs": ["log_prob", "dt"]}
    # Columns of what a batch stores of all its steps, as the trainer takes them.
    call = scheduler, v, meta(3, 9)[:, 2], meta(3, 6, 32), meta(3, 6, 32), meta(3, 9)[:, 3]
    with counting():
        step(*call, **arguments)  # Makes the table.
    with counting() as counted:
        log_prob = step(*call, **arguments).log_prob
        torch.autograd.grad(log_prob, v, torch.empty_like(log_prob))
    # Its two ends stand side by side, the step of both is found, and its coefficients are gathered.
    assert aten(counted) <= 3, counted
    assert triton(counted) == 2
