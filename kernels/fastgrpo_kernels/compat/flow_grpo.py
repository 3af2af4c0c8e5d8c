"""Flow-GRPO's step function (arXiv 2505.05470; CPS: arXiv 2509.05952).

`from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gaussian
from ._flow_schedule import Timestep, coefficients


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: gaussian.Generator = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One step of a flow-matching scheduler, of which `sigmas` [T + 1] and `timesteps` [T] are used.

    A scheduler without `timesteps` is asked its `index_for_timestep`.

    `model_output` (the velocity), `sample` and `prev_sample` are [B, ...]; `timestep` is a number, [1] or [B], of
    values in `self.timesteps`. Returns, in float32, (prev_sample, log-probability [B], mean, std_dev_t [B or 1, 1, …])
    and with `return_sqrt_dt` also √(σ - σ') of std_dev_t's shape. For `sde`, std_dev_t is η_t = n·√(σ/(1 - σ)) and the
    noise's standard deviation is η_t·√(σ - σ'); for `cps` it is σ'·sin(πn/2), and the log-probability lacks the factor
    1/(2·std²) and the constants, as Flow-CPS defines it. Differentiable in `model_output`.

    Without noise (`noise_level` = 0) `sde` has no density: its log-probability is NaN. Raises ValueError or TypeError
    for an unknown `sde_type`, for tensors that do not fit, for a sample that requires a gradient, and where reading it
    costs no device-to-host copy for a timestep that the schedule does not have.
    """
    gaussian.check(sample=sample, model_output=model_output, prev_sample=prev_sample)
    noise_level = gaussian.number("noise_level", noise_level)
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type: unknown {sde_type!r}; one of: sde, cps")
    step, extras = coefficients(self, timestep, noise_level, "flow_sde" if sde_type == "sde" else "cps", sample)
    mean = gaussian.mean(sample, model_output, step.a, step.b, torch.float32)
    if prev_sample is None:
        noise = gaussian.randn_like(model_output.detach().float(), generator)
        prev_sample = gaussian.sample(sample, model_output, step, noise, torch.float32)
    stored = prev_sample.detach().float()
    density = gaussian.log_prob if sde_type == "sde" else gaussian.negative_squared_error
    log_prob = density(sample, model_output, stored, step)
    std_dev_t, sqrt_dt = gaussian.column(extras.std_dev_t, sample), gaussian.column(extras.sqrt_dt, sample)
    returned = (prev_sample.float(), log_prob, mean, std_dev_t)
    return (*returned, sqrt_dt) if return_sqrt_dt else returned
