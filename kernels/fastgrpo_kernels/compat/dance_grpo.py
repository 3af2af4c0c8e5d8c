"""DanceGRPO's step function (arXiv 2505.07818): `from fastgrpo_kernels.compat.dance_grpo import flux_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from ..transitions import Transition
from . import gaussian
from ._tables import Step, cached, look_up, step_of, table_of


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """One step from noise level sigmas[index] to sigmas[index + 1].

    `model_output` (the velocity), `latents` and `prev_sample` are [B, ...]; `sigmas` [T + 1] falls from 1 to 0, on the
    CPU or with the latents; `index` is an int, a scalar tensor, or one for each sample. With `sde_solver` the mean is
    the Dance-SDE's, else the ODE's; either way the noise has standard deviation η·√(σ - σ'). Noise comes from torch's
    global generator, as torch.randn_like draws it.

    Returns (prev_sample, predicted clean latents, log-probability [B]) with `grpo`, else (mean, predicted clean
    latents). `prev_sample` is drawn where None was given. Differentiable in `model_output`: in all three. Results are
    in the common dtype of latents and model output, log-probabilities in float32, as means over elements.
    Raises ValueError or TypeError for tensors that do not fit, for latents that require a gradient where there is a
    log-probability, with `grpo` for eta <= 0, where there is no density, and for levels that do not fall.
    """
    gaussian.check(density=grpo, latents=latents, model_output=model_output, prev_sample=prev_sample)
    eta = gaussian.number("eta", eta)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not sigmas.dtype.is_floating_point:
        raise TypeError("sigmas: expected a tensor [T + 1] of noise levels")
    gaussian.integers("index", index, len(sigmas) - 1)
    if isinstance(index, Tensor) and index.numel() not in (1, latents.shape[0]):
        raise ValueError(f"index: expected 1 or {latents.shape[0]} values, one a sample, got {index.numel()}")
    if grpo and eta <= 0:
        raise ValueError(f"eta: must be positive for the step to have a density, got {eta}")
    step = _coefficients(sigmas, index, eta, sde_solver, latents)
    dtype = torch.promote_types(latents.dtype, model_output.dtype)
    clean = gaussian.mean(latents, model_output, 1.0, step.extras[0], dtype)
    if not grpo:
        return gaussian.mean(latents, model_output, step.a, step.b, dtype), clean
    if prev_sample is None:
        noise = torch.randn_like(latents, dtype=dtype)
        prev_sample = gaussian.sample(latents, model_output, step, noise, dtype)
    return prev_sample, clean, gaussian.log_prob(latents, model_output, prev_sample.detach(), step)


def _coefficients(sigmas: Tensor, index: int | Tensor, eta: float, sde: bool, latents: Tensor) -> Step:
    """The step's coefficients, and of x̂0 = x + extras[0]·v: floats where that costs no copy, else rows of a table."""
    if is_host_readable(sigmas) and (not isinstance(index, Tensor) or (is_host_readable(index) and index.numel() == 1)):
        index = int(index)
        sigma = float(sigmas[index])
        return step_of(_transition(sigma, float(sigmas[index + 1]), eta, sde), -sigma)

    def build() -> tuple[Tensor]:
        levels = sigmas.double()
        return (table_of(_transition(levels[:-1], levels[1:], eta, sde), -levels[:-1], device=device),)

    device = latents.device
    (table,) = cached((sigmas,), device, ("dance", eta, sde), build)
    if isinstance(index, Tensor):
        index = index.to(device, non_blocking=True)
    else:
        index = torch.full((1,), index, dtype=torch.int64, device=device)
    return look_up(table, index, latents.shape[0])


def _transition(sigma: float | Tensor, sigma_next: float | Tensor, eta: float, sde: bool) -> Transition:
    step = transitions.dance_sde(sigma, sigma_next, eta)
    if sde:
        return step
    a, b, _ = transitions.ode(sigma, sigma_next)
    return Transition(a, b, step.s)
