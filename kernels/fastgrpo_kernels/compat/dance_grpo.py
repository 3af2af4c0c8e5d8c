"""DanceGRPO's step function (arXiv 2505.07818): `from fastgrpo_kernels.compat.dance_grpo import flux_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from ..transitions import Transition
from . import gaussian


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
    gaussian.check(model_output, prev_sample, density=grpo, latents=latents)
    eta = gaussian.number("eta", eta)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not sigmas.dtype.is_floating_point:
        raise TypeError("sigmas: expected a tensor [T + 1] of noise levels")
    gaussian.integers("index", index, len(sigmas) - 1)
    if grpo and eta <= 0:
        raise ValueError(f"eta: must be positive for the step to have a density, got {eta}")
    sigma, sigma_next = _level(sigmas, index), _level(sigmas, index + 1)
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


def _level(sigmas: Tensor, index: int | Tensor) -> float | Tensor:
    """sigmas[index] in float64: a number where that costs no copy, for numbers reach a kernel without one, too."""
    if isinstance(index, Tensor):
        # Indexing by a scalar on a device would wait for it: the trainer's permutation of steps is one.
        return sigmas.to(index.device, non_blocking=True).take(index).double()
    return float(sigmas[index]) if is_host_readable(sigmas) else sigmas[index].double()
