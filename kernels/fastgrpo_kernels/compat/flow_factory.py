"""The step of Flow-Factory's flow-matching scheduler.

In its class, after `def step`: `step = flow_factory.step`, with `from fastgrpo_kernels.compat import flow_factory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import is_host_readable
from . import gaussian
from ._flow_schedule import Sampler, coefficients

SAMPLERS: dict[str, Sampler] = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps", "ODE": "ode"}


@dataclass
class StepOutput:
    """One step's results; None where not asked for."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """The results by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: gaussian.Generator = None,
    noise_level: float | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = tuple(StepOutput.__dataclass_fields__),
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> StepOutput | tuple[Tensor | None, ...]:
    """One step of a flow-matching scheduler.

    Args:
        self: The scheduler, of which `sigmas` [T + 1], `timesteps` [T], `dynamics_type` and `is_eval` are used.
        noise_pred: The velocity [B, ...]; results are differentiable in it.
        timestep: Of `self.timesteps`: a float, a scalar tensor, [1] or [B].
        latents: Before the step [B, ...].
        next_latents: After the step, as stored; drawn and rounded to the dtype of `latents` where it is None.
        timestep_next: The timestep that follows in `self.timesteps`, 0 after the last; any other is refused.
        generator: One, or one for each sample.
        noise_level: A number; None asks `self.get_noise_level_for_timestep`, which waits for the device.
        compute_log_prob: Whether `log_prob` is wanted.
        return_dict: False returns (next_latents, next_latents_mean, noise_pred, log_prob, std_dev_t, dt).
        return_kwargs: The names that are wanted, of StepOutput; the others cost nothing.
        dynamics_type: Flow-SDE, Dance-SDE, CPS or ODE, for `self.dynamics_type`.
        sigma_max: Stands for σ = 1 in the denominator of Flow-SDE; by default the second level.

    Returns:
        The results in float32: latents [B, ...], `log_prob` [B] as the mean over elements (of CPS without 1/(2·std²)
        and constants; of ODE zero), `std_dev_t` and `dt` [B, 1, …]. Without noise the log-probability is NaN, and so
        it is of a step that the schedule does not have, where reading it would wait for the device.

    Raises:
        ValueError, TypeError: An argument does not fit, or a timestep that is read without waiting is not of the
            schedule.
    """
    gaussian.check(latents=latents, noise_pred=noise_pred, next_latents=next_latents)
    kind = dynamics_type or self.dynamics_type
    if kind not in SAMPLERS:
        raise ValueError(f"dynamics_type: unknown {kind!r}; one of: {', '.join(SAMPLERS)}")
    if self.is_eval or kind == "ODE":
        noise_level = 0.0
    elif noise_level is None:
        noise_level = self.get_noise_level_for_timestep(timestep)
    if isinstance(noise_level, Tensor) and noise_level.numel() == 1 and is_host_readable(noise_level):
        noise_level = float(noise_level)
    noise_level = gaussian.number("noise_level", noise_level)
    coefficient, extras = coefficients(self, timestep, noise_level, SAMPLERS[kind], latents, sigma_max, timestep_next)
    wanted = set(return_kwargs) if return_dict else set(StepOutput.__dataclass_fields__)
    unknown = wanted - set(StepOutput.__dataclass_fields__)
    if unknown:
        raise ValueError(f"return_kwargs: unknown {sorted(unknown)}; of: {', '.join(StepOutput.__dataclass_fields__)}")

    result = StepOutput(noise_pred=noise_pred.float() if "noise_pred" in wanted else None)
    if "next_latents_mean" in wanted or (next_latents is None and kind == "ODE"):
        result.next_latents_mean = gaussian.mean(latents, noise_pred, coefficient.a, coefficient.b, torch.float32)
    if next_latents is None and kind == "ODE":
        next_latents = result.next_latents_mean
    elif next_latents is None:
        noise = gaussian.randn_like(noise_pred.detach().float(), generator)
        next_latents = gaussian.sample(latents, noise_pred, coefficient, noise, latents.dtype)
    assert next_latents is not None
    if "next_latents" in wanted:
        result.next_latents = next_latents.float()
    if compute_log_prob and "log_prob" in wanted:
        if kind == "ODE":
            result.log_prob = latents.new_zeros(latents.shape[0], dtype=torch.float32)
        else:
            density = gaussian.negative_squared_error if kind == "CPS" else gaussian.log_prob
            result.log_prob = density(latents, noise_pred, next_latents.detach(), coefficient)
    for name in ("std_dev_t", "dt"):
        if name in wanted:
            column = gaussian.column(getattr(extras, name), latents)
            setattr(result, name, column.expand(latents.shape[0], *column.shape[1:]))
    if return_dict:
        if "next_latents_mean" not in wanted:
            result.next_latents_mean = None
        return result
    names = "next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt"
    return tuple(getattr(result, name) for name in names)
