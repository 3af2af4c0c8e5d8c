"""Other trainers' step functions against their formulas in float64: values, gradients, noise, refusals."""

import math
from types import SimpleNamespace

import pytest
import torch
from support import oracles
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels.compat.dance_grpo import flux_step
from fastgrpo_kernels.compat.ddpo import ddim_step_with_logprob
from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

SHAPES = ((2, 9, 64), (3, 4, 8, 7), (2, 16, 3, 5, 4))
# Relative to the largest value; DDIM's coefficients come from a float32 table, whose square roots cancel.
MEAN, LOG_PROB, GRADIENT = 1e-6, 2e-6, 1e-5


def latents(shape, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def assert_close(actual, expected, tolerance):
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    assert error <= tolerance * expected.detach().abs().max(), f"{float(error):.2e}"


def gradient(log_prob, v):
    weights = torch.linspace(1.0, -0.5, log_prob.shape[0], dtype=log_prob.dtype)
    return torch.autograd.grad((weights * log_prob).sum(), v)[0]


def flow_scheduler(steps=8, shift=3.0, device="cpu"):
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return SimpleNamespace(sigmas=sigmas.to(device), timesteps=(sigmas[:-1] * 1000).to(device))


def ddim_scheduler(prediction="epsilon", steps=20, **config):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    config = {"num_train_timesteps": 1000, "prediction_type": prediction, "clip_sample": False} | config
    return SimpleNamespace(
        alphas_cumprod=(1 - betas).cumprod(0), num_inference_steps=steps, config=SimpleNamespace(**config)
    )


# Values and gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", [0, 4, 7])
@pytest.mark.parametrize("sde", [True, False])
def test_flux_step(shape, index, sde):
    x, v, delta = latents(shape)
    sigmas = flow_scheduler().sigmas
    w, reference = v.clone().requires_grad_(), v.double().requires_grad_()
    mean, std, clean = oracles.dance(reference, x.double(), 0.3, sigmas[index], sigmas[index + 1], sde)
    y = (mean.detach() + std * delta).float()
    expected = oracles.gaussian_log_density(y.double(), mean, std)

    got_mean, got_clean = flux_step(w, x, 0.3, sigmas, index, None, False, sde)
    assert_close(got_mean, mean, MEAN)
    assert_close(got_clean, clean, MEAN)
    stored, got_clean, log_prob = flux_step(w, x, 0.3, sigmas, index, y, True, sde)
    assert stored is y
    assert_close(got_clean, clean, MEAN)
    assert_close(log_prob, expected, LOG_PROB)
    assert_close(gradient(log_prob, w), gradient(expected, reference), GRADIENT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("steps", [(0, 3, 6), (7, 7, 1)])
def test_sde_step_with_logprob(shape, sde_type, steps):
    x, v, delta = latents(shape, seed=1)
    scheduler, index = flow_scheduler(), torch.tensor(steps[: shape[0]])
    sigma, sigma_next = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    w, reference = v.clone().requires_grad_(), v.double().requires_grad_()
    if sde_type == "sde":
        mean, std, level = oracles.flow_sde(reference, x.double(), 0.7, sigma, sigma_next, scheduler.sigmas[1])
    else:
        mean, std = oracles.flow_cps(reference, x.double(), 0.7, sigma, sigma_next)
        level = std
    y = (mean.detach() + (std + 0.01) * delta).float()
    if sde_type == "sde":
        expected = oracles.gaussian_log_density(y.double(), mean, std)
    else:
        expected = -oracles.mean_over_elements((y.double() - mean) ** 2)

    returned = sde_step_with_logprob(
        scheduler, w, scheduler.timesteps[index], x, 0.7, y, None, sde_type, return_sqrt_dt=True
    )
    stored, log_prob, got_mean, std_dev_t, sqrt_dt = returned
    torch.testing.assert_close(stored, y, rtol=0, atol=0)
    assert_close(got_mean, mean, MEAN)
    assert_close(log_prob, expected, LOG_PROB)
    assert_close(gradient(log_prob, w), gradient(expected, reference), GRADIENT)
    assert_close(std_dev_t, level, MEAN)
    (step,) = oracles.columns(x, sigma - sigma_next)
    assert_close(sqrt_dt, step.sqrt(), MEAN)
    assert std_dev_t.shape == sqrt_dt.shape == (shape[0], *[1] * (len(shape) - 1))
    assert len(sde_step_with_logprob(scheduler, v, scheduler.timesteps[index], x, sde_type=sde_type)) == 4


def difference(found, expected, sde_type):
    """Largest of mean, log-probability and gradient, over the largest value; a log-density passes through 0: 1."""
    floors = 0.0, float(sde_type == "sde"), 0.0
    return [
        float((f.detach().double() - e.detach().double()).abs().max() / e.detach().abs().max().clamp_min(floor))
        for f, e, floor in zip(found, expected, floors, strict=True)
    ]


@pytest.mark.parametrize("steps", [8, 16])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_every_step_of_a_schedule_against_float32_and_float64(sde_type, steps):
    """Trainers take these steps in float32. Where a step has next to no noise, it is theirs that is off."""
    x, v, noise = latents((3, 16, 32, 32))
    scheduler = flow_scheduler(steps)
    # As diffusers spaces them: down to 0.009, and from there to 0.
    sigmas = torch.linspace(1, 0.003, steps)
    scheduler.sigmas = torch.cat([3 * sigmas / (1 + 2 * sigmas), torch.zeros(1)])
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

    def formula(index, y, dtype):
        w, sigma, following = v.to(dtype).requires_grad_(), scheduler.sigmas[index], scheduler.sigmas[index + 1]
        if sde_type == "sde":
            mean, std, _ = oracles.flow_sde(w, x.to(dtype), 0.7, sigma, following, scheduler.sigmas[1])
            log_prob = oracles.gaussian_log_density(y.to(dtype), mean, std)
        else:
            mean, std = oracles.flow_cps(w, x.to(dtype), 0.7, sigma, following)
            log_prob = -oracles.mean_over_elements((y.to(dtype) - mean) ** 2)
        return mean, log_prob, torch.autograd.grad(log_prob.sum(), w)[0], std

    coarse = 0
    # CPS has no noise at all in its last step.
    for index in range(steps - (sde_type == "cps")):
        mean, *_, std = formula(index, x, torch.float32)
        y = (mean + std * noise).detach()
        exact, theirs = formula(index, y, torch.float64)[:3], formula(index, y, torch.float32)[:3]
        w, timestep = v.clone().requires_grad_(), scheduler.timesteps[index : index + 1]
        _, log_prob, mean, _ = sde_step_with_logprob(scheduler, w, timestep, x, 0.7, y, sde_type=sde_type)
        ours = mean, log_prob, torch.autograd.grad(log_prob.sum(), w)[0]
        limits = MEAN, LOG_PROB, GRADIENT
        assert all(e <= limit for e, limit in zip(difference(ours, exact, sde_type), limits, strict=True))
        if std.max() < 0.01:
            coarse += 1
            assert difference(theirs, exact, sde_type)[2] > 3 * difference(ours, exact, sde_type)[2]
        else:
            assert all(e <= limit for e, limit in zip(difference(ours, theirs, sde_type), limits, strict=True))
    assert coarse == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_with_logprob(shape, prediction):
    x, v, delta = latents(shape, seed=2)
    scheduler = ddim_scheduler(prediction)
    timestep = torch.tensor([951, 401, 1])[: shape[0]]
    alpha = scheduler.alphas_cumprod[timestep].double()
    alpha_next = scheduler.alphas_cumprod[(timestep - 50).clamp_min(0)].double()
    w, reference = v.clone().requires_grad_(), v.double().requires_grad_()
    mean, std = oracles.ddim(reference, x.double(), 1.0, alpha, alpha_next, prediction)
    y = (mean.detach() + std * delta).float()
    expected = oracles.gaussian_log_density(y.double(), mean, std)

    stored, log_prob = ddim_step_with_logprob(scheduler, w, timestep, x, eta=1.0, prev_sample=y)
    torch.testing.assert_close(stored, y, rtol=0, atol=0)
    # y is stored in float32, and at timestep 1 the step's std is 0.02: the same for any float32 latents.
    assert_close(log_prob, expected, LOG_PROB)
    assert_close(gradient(log_prob, w), gradient(expected, reference), GRADIENT)
    torch.manual_seed(0)
    drawn, _ = ddim_step_with_logprob(scheduler, v, timestep, x, eta=1.0)
    torch.manual_seed(0)
    assert_close(drawn, mean + std * torch.randn(shape).double(), MEAN)


@pytest.mark.parametrize("timestep", [torch.tensor(401), 401])
def test_ddim_takes_one_timestep_for_all(timestep):
    x, v, y = latents((2, 4, 6, 6))
    scheduler = ddim_scheduler()
    _, one = ddim_step_with_logprob(scheduler, v, timestep, x, eta=0.5, prev_sample=y)
    _, each = ddim_step_with_logprob(scheduler, v, torch.tensor([401, 401]), x, eta=0.5, prev_sample=y)
    torch.testing.assert_close(one, each, rtol=0, atol=0)


# Noise and dtypes


def test_noise_is_drawn_as_the_trainers_draw_it():
    x, v, _ = latents((2, 4, 6, 6))
    scheduler = flow_scheduler()
    mean, std, _ = oracles.dance(v, x, 0.3, scheduler.sigmas[2], scheduler.sigmas[3], True)
    torch.manual_seed(7)
    drawn, _, log_prob = flux_step(v, x, 0.3, scheduler.sigmas, 2, None, True, True)
    torch.manual_seed(7)
    assert_close(drawn, mean + std * torch.randn_like(mean), MEAN)
    assert_close(log_prob, flux_step(v, x, 0.3, scheduler.sigmas, 2, drawn, True, True)[2], LOG_PROB)

    mean, std, _ = oracles.flow_sde(v, x, 0.7, scheduler.sigmas[2], scheduler.sigmas[3], scheduler.sigmas[1])
    timestep, seeds = scheduler.timesteps[2:3], (3, 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for generator in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)]):
        drawn = sde_step_with_logprob(scheduler, v, timestep, x, 0.7, generator=generator)[0]
        assert_close(drawn, mean + std * noise, MEAN)
    noise = torch.cat([torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    drawn = sde_step_with_logprob(scheduler, v, timestep, x, 0.7, generator=generators)[0]
    assert_close(drawn, mean + std * noise, MEAN)


def test_one_timestep_serves_a_batch_and_keeps_its_shape():
    x, v, y = latents((3, 4, 6, 6))
    scheduler = flow_scheduler()
    one = sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x, prev_sample=y)
    each = sde_step_with_logprob(scheduler, v, scheduler.timesteps[[2, 2, 2]], x, prev_sample=y)
    for a, b in zip(one[:3], each[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert one[3].shape == (1, 1, 1, 1)
    listed = sde_step_with_logprob(scheduler, v, [scheduler.timesteps[2]], x, prev_sample=y)
    torch.testing.assert_close(listed[1], one[1], rtol=0, atol=0)


def test_a_timestep_that_occurs_twice_means_its_second_step():
    scheduler = flow_scheduler()
    scheduler.timesteps[3] = scheduler.timesteps[2]
    x, v, y = latents((1, 4, 6, 6))
    *_, sqrt_dt = sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x, prev_sample=y, return_sqrt_dt=True)
    assert_close(sqrt_dt.flatten(), (scheduler.sigmas[3] - scheduler.sigmas[4]).sqrt().reshape(1), MEAN)


def test_dtypes_of_results():
    x, v, y = (t.bfloat16() for t in latents((2, 4, 6, 6)))
    scheduler = flow_scheduler()
    assert [t.dtype for t in flux_step(v, x.float(), 0.3, scheduler.sigmas, 1, None, True, True)] == [torch.float32] * 3
    dtypes = [t.dtype for t in flux_step(v, x, 0.3, scheduler.sigmas, 1, None, True, True)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    returned = sde_step_with_logprob(scheduler, v, scheduler.timesteps[1:2], x, prev_sample=y)
    assert {t.dtype for t in returned} == {torch.float32}
    stored, log_prob = ddim_step_with_logprob(ddim_scheduler(), v, 401, x, eta=1.0)
    assert (stored.dtype, log_prob.dtype) == (torch.bfloat16, torch.float32)
    # Of the latents as returned: a replay of them gives the same number.
    _, replayed = ddim_step_with_logprob(ddim_scheduler(), v, 401, x, eta=1.0, prev_sample=stored)
    torch.testing.assert_close(replayed, log_prob, rtol=0, atol=0)


# Edges and refusals


def test_steps_without_noise_have_no_density_and_still_step():
    x, v, _ = latents((2, 4, 6, 6))
    scheduler = flow_scheduler()
    drawn, log_prob, mean, _ = sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, noise_level=0.0)
    assert log_prob.isnan().all()
    torch.testing.assert_close(drawn, mean, rtol=0, atol=0)
    ode, _ = flux_step(v, x, 0.0, scheduler.sigmas, 0, None, False, True)
    assert_close(mean, ode, MEAN)

    scheduler = ddim_scheduler()
    drawn, log_prob = ddim_step_with_logprob(scheduler, v, torch.tensor([0, 401]), x, eta=1.0, prev_sample=x)
    assert log_prob.isnan().tolist() == [True, False]
    drawn, _ = ddim_step_with_logprob(scheduler, v, torch.tensor([0, 401]), x, eta=1.0)
    assert torch.equal(drawn[0], x[0])
    assert not torch.equal(drawn[1], x[1])
    assert ddim_step_with_logprob(scheduler, v, 401, x)[1].isnan().all()


def test_the_last_step_of_cps_has_no_noise():
    x, v, _ = latents((1, 4, 6, 6))
    scheduler = flow_scheduler()
    drawn, log_prob, mean, std = sde_step_with_logprob(scheduler, v, scheduler.timesteps[-1:], x, sde_type="cps")
    torch.testing.assert_close(drawn, mean, rtol=0, atol=0)
    assert float(std) == 0
    assert abs(float(log_prob)) < 1e-12


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, f, d: flux_step(x, x, 0.0, f.sigmas, 0, None, True, True), "eta: must be positive"),
        (lambda x, f, d: flux_step(x, x, 0.3, f.sigmas.flip(0), 0, None, True, True), "sigma"),
        (lambda x, f, d: sde_step_with_logprob(f, x, [123.0], x), "timestep: .*set_timesteps"),
        (lambda x, f, d: sde_step_with_logprob(f, x, f.timesteps[:1], x, sde_type="ode"), "sde_type: unknown 'ode'"),
        (lambda x, f, d: ddim_step_with_logprob(d(clip_sample=True), x, 401, x, 1.0), "clip_sample"),
        (lambda x, f, d: ddim_step_with_logprob(d(thresholding=True), x, 401, x, 1.0), "thresholding"),
        (lambda x, f, d: ddim_step_with_logprob(d("flow"), x, 401, x, 1.0), "prediction: unknown prediction 'flow'"),
        (lambda x, f, d: ddim_step_with_logprob(d(steps=None), x, 401, x, 1.0), "num_inference_steps: is None"),
        (
            lambda x, f, d: ddim_step_with_logprob(d(), x, 401, x, 1.0, generator=torch.Generator(), prev_sample=x),
            "generator: ",
        ),
        (
            lambda x, f, d: sde_step_with_logprob(f, x, f.timesteps[:1], x, generator=[torch.Generator()] * 3),
            "generator: expected 2 generators",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 6, 6), flow_scheduler(), ddim_scheduler)


def test_nothing_reads_from_the_device():
    """Under the fake mode any read of a tensor's value raises."""
    with FakeTensorMode():
        x, y = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
        v = torch.randn(2, 4, 6, 6, requires_grad=True)
        f, d = flow_scheduler(), ddim_scheduler()
        for prev_sample in (y, None):
            flux_step(v, x, 0.3, f.sigmas, 2, prev_sample, True, True)[2].sum().backward()
            for sde_type in ("sde", "cps"):
                returned = sde_step_with_logprob(f, v, f.timesteps[:2], x, 0.7, prev_sample, sde_type=sde_type)
                returned[1].sum().backward()
            ddim_step_with_logprob(d, v, torch.tensor([401, 1]), x, 1.0, prev_sample=prev_sample)[1].sum().backward()
        assert v.grad is not None


def test_schedulers_of_diffusers_have_what_is_used():
    diffusers = pytest.importorskip("diffusers")
    x, v = latents((2, 4, 6, 6), count=2)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(8)
    mean = sde_step_with_logprob(flow, v, flow.timesteps[2:3], x, noise_level=0.0)[2]
    assert_close(mean, flow.step(v, flow.timesteps[2], x).prev_sample, MEAN)
    ddim = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    ddim.set_timesteps(20)
    moved, log_prob = ddim_step_with_logprob(ddim, v, ddim.timesteps[5], x)
    assert_close(moved, ddim.step(v, ddim.timesteps[5], x).prev_sample, 1e-5)
    assert math.isnan(log_prob[0])
