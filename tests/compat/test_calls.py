"""How trainers call the step functions: tensors for step indices, schedulers of few attributes, blocked packages."""

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels.compat.dance_grpo import flux_step
from fastgrpo_kernels.compat.ddpo import ddim_step_with_logprob
from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

SIGMAS = torch.linspace(1, 0, 9)


def latents(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(count)]


def ddim_scheduler():
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=False)
    return SimpleNamespace(alphas_cumprod=torch.linspace(0.999, 0.005, 1000), num_inference_steps=20, config=config)


class Scheduler:
    """Of a flow-matching scheduler only what Flow-GRPO's own function uses."""

    sigmas = SIGMAS

    def index_for_timestep(self, timestep):
        return int(timestep)


def test_a_step_index_may_be_a_tensor():
    x, v, y = latents()
    expected = flux_step(v, x, 0.3, SIGMAS, 3, y, True, True)
    for index in (torch.tensor(3), torch.tensor([3, 3])):
        for found, value in zip(flux_step(v, x, 0.3, SIGMAS, index, y, True, True), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)


def test_a_scheduler_without_timesteps_is_asked_for_the_index():
    x, v, y = latents()
    flow = SimpleNamespace(sigmas=SIGMAS, timesteps=1000 * SIGMAS[:-1])
    for steps in ([3], [3, 6]):
        asked = sde_step_with_logprob(Scheduler(), v, torch.tensor(steps), x, prev_sample=y)
        known = sde_step_with_logprob(flow, v, flow.timesteps[steps], x, prev_sample=y)
        assert all(torch.equal(a, b) for a, b in zip(asked, known, strict=True))


@pytest.mark.parametrize("timestep", [401, torch.tensor(401), torch.tensor([401])])
def test_one_ddim_timestep_in_any_form(timestep):
    x, v, y = latents()
    each = ddim_step_with_logprob(ddim_scheduler(), v, torch.tensor([401, 401]), x, 1.0, prev_sample=y)[1]
    one = ddim_step_with_logprob(ddim_scheduler(), v, timestep, x, 1.0, prev_sample=y)[1]
    torch.testing.assert_close(one, each, rtol=2e-7, atol=0)


def test_scalar_indices_are_not_read_from_the_device():
    """Indexing by a scalar tensor reads it: under the fake mode that raises, on a device it waits."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, v, y = (torch.randn(2, 4, 6, 6) for _ in range(3))
        permutation = torch.randperm(8)
        flux_step(v, x, 0.3, torch.linspace(1, 0, 9), permutation[0], y, True, True)
        scheduler = ddim_scheduler()
        for timestep in (torch.full((), 401), torch.full((1,), 401), 401):
            ddim_step_with_logprob(scheduler, v, timestep, x, 1.0, prev_sample=y)


def test_a_wrong_tensor_is_named_as_the_function_names_it():
    x, v, y = latents()
    flow, grad = SimpleNamespace(sigmas=SIGMAS, timesteps=1000 * SIGMAS[:-1]), x.clone().requires_grad_()
    t = flow.timesteps[:1]
    calls = [
        (lambda: flux_step(v[:1], x, 0.3, SIGMAS, 0, y, True, True), ValueError, "model_output: expected shape"),
        (lambda: flux_step(v, x, 0.3, SIGMAS, 0, y[:1], True, True), ValueError, "prev_sample: expected shape"),
        (lambda: flux_step(v, x.double(), 0.3, SIGMAS, 0, y, True, True), TypeError, "latents: expected float32"),
        (lambda: flux_step(v, grad, 0.3, SIGMAS, 0, y, True, True), ValueError, "latents: requires a gradient"),
        (lambda: sde_step_with_logprob(flow, v, t, grad, prev_sample=y), ValueError, "sample: requires a gradient"),
        (lambda: sde_step_with_logprob(flow, v, flow.timesteps[:3], x), ValueError, "timestep: expected 1 or 2"),
        (
            lambda: ddim_step_with_logprob(ddim_scheduler(), v, torch.tensor([1, 2, 3]), x, 1.0),
            ValueError,
            "timestep: expected 1 or 2",
        ),
    ]
    untyped_flux: Any = flux_step
    untyped_flow: Any = sde_step_with_logprob
    untyped_ddim: Any = ddim_step_with_logprob
    calls += [
        (lambda: untyped_flux(v, x, "0.3", SIGMAS, 0, y, True, True), TypeError, "eta: expected a number, got str"),
        (lambda: untyped_flux(v, x, 0.3, list(SIGMAS), 0, y, True, True), TypeError, "sigmas: expected a tensor"),
        (lambda: flux_step(v, x, 0.3, SIGMAS, 8, y, True, True), ValueError, r"index: must be in \[0, 8\), got 8"),
        (lambda: flux_step(v, x, 0.3, SIGMAS, torch.ones(2), y, True, True), TypeError, "index: expected integers"),
        (lambda: untyped_flow(flow, v, None, x), TypeError, "timestep: expected"),
        (lambda: sde_step_with_logprob(flow, v, t, x, noise_level=math.nan), ValueError, "noise_level: must be finite"),
        (lambda: ddim_step_with_logprob(ddim_scheduler(), v, 1000, x, 1.0), ValueError, "timestep: must be in"),
        (lambda: ddim_step_with_logprob(ddim_scheduler(), v, -1, x, 1.0), ValueError, "timestep: must be in"),
        (lambda: untyped_ddim(ddim_scheduler(), v, 1, x, None), TypeError, "eta: expected a number"),
    ]
    before = SimpleNamespace(sigmas=SIGMAS, timesteps=1000 * SIGMAS)
    calls.append((lambda: sde_step_with_logprob(before, v, t, x), ValueError, "timesteps: .* call set_timesteps first"))
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    # The mean alone has a gradient in the latents.
    assert flux_step(v, grad, 0.3, SIGMAS, 0, None, False, True)[0].requires_grad


BLOCKED = """
import sys
for name in ("triton", "diffusers", "transformers"):
    sys.modules[name] = None
import torch
from types import SimpleNamespace
from fastgrpo_kernels.compat import GRPOLoss, dance_grpo, ddpo, flow_grpo
x, v = torch.randn(2, 2, 4, 8, 8)
sigmas = torch.linspace(1, 0, 9)
assert dance_grpo.flux_step(v, x, 0.3, sigmas, 1, None, True, True)[2].isfinite().all()
flow = SimpleNamespace(sigmas=sigmas, timesteps=1000 * sigmas[:-1])
assert flow_grpo.sde_step_with_logprob(flow, v, flow.timesteps[:1], x)[1].isfinite().all()
config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=False)
ddim = SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 1000), num_inference_steps=20, config=config)
assert ddpo.ddim_step_with_logprob(ddim, v, 401, x, 1.0)[1].isfinite().all()
assert GRPOLoss()(v, v, -0.1, 0.2, x, torch.ones(2))[0].isfinite()
"""


def test_runs_with_optional_packages_blocked():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
