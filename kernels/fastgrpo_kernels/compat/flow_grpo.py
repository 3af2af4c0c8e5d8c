"""Flow-GRPO's step function (arXiv 2505.05470; CPS: arXiv 2509.05952).

`from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from ..transitions import Transition
from . import gaussian


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor | Sequence[float],
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: gaussian.Generator = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One step of a flow-matching scheduler, of which `sigmas` [T + 1] and `timesteps` [T] are used.

    A scheduler without `timesteps` is asked its `index_for_timestep`.

    `model_output` (the velocity), `sample` and `prev_sample` are [B, ...]; `timestep` is [B] or [1], of values in
    `self.timesteps`. Returns, in float32, (prev_sample, log-probability [B], mean, std_dev_t [B or 1, 1, …]) and with
    `return_sqrt_dt` also √(σ - σ') of std_dev_t's shape. For `sde`, std_dev_t is η_t = n·√(σ/(1 - σ)) and the noise's
    standard deviation is η_t·√(σ - σ'); for `cps` it is σ'·sin(πn/2), and the log-probability lacks the factor
    1/(2·std²) and the constants, as Flow-CPS defines it. Differentiable in `model_output`.

    Without noise (`noise_level` = 0) `sde` has no density: its log-probability is NaN. Raises ValueError or TypeError
    for an unknown `sde_type`, for tensors that do not fit, for a sample that requires a gradient, and where reading it
    costs no device-to-host copy for a timestep that the schedule does not have.
    """
    gaussian.check(model_output, prev_sample, sample=sample)
    noise_level = gaussian.number("noise_level", noise_level)
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type: unknown {sde_type!r}; one of: sde, cps")
    sigmas = self.sigmas.to(sample.device, non_blocking=True).double()
    index = _step_index(self, timestep, sample.device)
    if index.numel() not in (1, sample.shape[0]):
        raise ValueError(f"timestep: expected 1 or {sample.shape[0]} values, one a sample, got {index.numel()}")
    sigma, sigma_next = sigmas[index], sigmas[index + 1]
    if sde_type == "sde":
        step = transitions.flow_sde(sigma, sigma_next, noise_level, sigmas[1])
    else:
        step = transitions.cps(sigma, sigma_next, noise_level)
    sqrt_dt = (sigma - sigma_next).sqrt()
    a, b, s = (torch.as_tensor(coefficient) for coefficient in step)
    std_dev_t = gaussian.column(s / sqrt_dt if sde_type == "sde" else s, sample)
    if index.numel() == 1:
        step = Transition(a.reshape(()), b.reshape(()), s.reshape(()))

    mean = gaussian.mean(sample, model_output, step, torch.float32)
    if prev_sample is None:
        noise = gaussian.randn_like(model_output.detach().float(), generator)
        prev_sample = gaussian.sample(sample, model_output, step, noise, torch.float32)
    stored = prev_sample.detach().float()
    density = gaussian.log_prob if sde_type == "sde" else gaussian.negative_squared_error
    log_prob = density(sample, model_output, stored, step)
    returned = (prev_sample.float(), log_prob, mean, std_dev_t)
    return (*returned, gaussian.column(sqrt_dt, sample)) if return_sqrt_dt else returned


def _step_index(scheduler: Any, timestep: Tensor | Sequence[float], device: torch.device) -> Tensor:
    """Index of each timestep in the schedule; of one that occurs twice the second, as diffusers takes it."""
    if not isinstance(timestep, (Tensor, Sequence)) or isinstance(timestep, str):
        raise TypeError(f"timestep: expected [B] or [1] timesteps, got {type(timestep).__name__}")
    if not hasattr(scheduler, "timesteps"):
        return torch.tensor([int(scheduler.index_for_timestep(t)) for t in timestep]).to(device, non_blocking=True)
    timesteps = scheduler.timesteps.to(device, non_blocking=True)
    if not isinstance(timestep, Tensor):
        timestep = torch.stack([torch.as_tensor(t) for t in timestep])
    asked = timestep.to(device=timesteps.device, non_blocking=True).reshape(-1, 1)
    found = timesteps == asked
    if is_host_readable(found) and not bool(found.any(1).all()):
        raise ValueError(f"timestep: {timestep} is not in the scheduler's timesteps; call set_timesteps first")
    occurrence = found.cumsum(1)
    wanted = found & (occurrence == occurrence[:, -1:].clamp(max=2))
    return wanted.to(torch.uint8).argmax(1)
