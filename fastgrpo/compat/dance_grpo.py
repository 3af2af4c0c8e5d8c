"""DanceGRPO's step function (arXiv 2505.07818): `from fastgrpo.compat.dance_grpo import flux_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.compat import gaussian
from fastgrpo_kernels import transitions
from fastgrpo_kernels._checks import is_host_readable
from fastgrpo_kernels.transitions import Transition


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """One step from noise level sigmas[index] to sigmas[index + 1].

    `model_output` (the velocity), `latents` and `prev_sample` are [B, ...]; `sigmas` [T + 1] falls from 1 to 0, on the
    CPU or with the latents. With `sde_solver` the mean is the Dance-SDE's, else the ODE's; either way the noise has
    standard deviation η·√(σ - σ'). Noise comes from torch's global generator, as torch.randn_like draws it.

    Returns (prev_sample, predicted clean latents, log-probability [B]) with `grpo`, else (mean, predicted clean
    latents). `prev_sample` is drawn where None was given. Differentiable in `model_output`: in all three. Results are
    in the common dtype of latents and model output, log-probabilities in float32, as means over elements.
    Raises ValueError with `grpo` for eta <= 0, where there is no density, and for levels that do not fall.
    """
    if grpo and eta <= 0:
        raise ValueError(f"eta: must be positive for the step to have a density, got {eta}")
    sigma, sigma_next = sigmas[index].double(), sigmas[index + 1].double()
    if is_host_readable(sigmas):
        # Numbers reach a kernel without a copy to the device.
        sigma, sigma_next = float(sigma), float(sigma_next)
    step = transitions.dance_sde(sigma, sigma_next, eta)
    if not sde_solver:
        a, b, _ = transitions.ode(sigma, sigma_next)
        step = Transition(a, b, step.s)
    dtype = torch.promote_types(latents.dtype, model_output.dtype)
    clean = gaussian.mean(latents, model_output, transitions.clean_coefficients(sigma), dtype)
    if not grpo:
        return gaussian.mean(latents, model_output, step, dtype), clean
    if prev_sample is None:
        noise = torch.randn_like(latents, dtype=dtype)
        prev_sample = gaussian.sample(latents, model_output, step, noise, dtype)
    return prev_sample, clean, gaussian.log_prob(latents, model_output, prev_sample.detach(), step)
