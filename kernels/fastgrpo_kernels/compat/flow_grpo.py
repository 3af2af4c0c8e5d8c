"""Flow-GRPO's step function (arXiv 2505.05470; CPS: arXiv 2509.05952).

`from fastgrpo_kernels.compat.flow_grpo import sde_step_with_logprob`
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from . import gaussian
from ._tables import Step, cached, gather, table_of

Timestep = float | Tensor | Sequence[float]


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
    gaussian.check(model_output, prev_sample, sample=sample)
    noise_level = gaussian.number("noise_level", noise_level)
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type: unknown {sde_type!r}; one of: sde, cps")
    step = _coefficients(self, timestep, noise_level, sde_type, sample)
    mean = gaussian.mean(sample, model_output, step.a, step.b, torch.float32)
    if prev_sample is None:
        noise = gaussian.randn_like(model_output.detach().float(), generator)
        prev_sample = gaussian.sample(sample, model_output, step, noise, torch.float32)
    stored = prev_sample.detach().float()
    density = gaussian.log_prob if sde_type == "sde" else gaussian.negative_squared_error
    log_prob = density(sample, model_output, stored, step)
    std_dev_t, sqrt_dt = (gaussian.column(torch.as_tensor(extra), sample) for extra in step.extras)
    returned = (prev_sample.float(), log_prob, mean, std_dev_t)
    return (*returned, sqrt_dt) if return_sqrt_dt else returned


def _coefficients(scheduler: Any, timestep: Timestep, noise_level: float, sde_type: str, sample: Tensor) -> Step:
    """The coefficients of the steps from these timesteps, with extras std_dev_t and √(σ - σ') [1 or B]."""
    sigmas, device, batch = scheduler.sigmas, sample.device, sample.shape[0]
    asked = _as_tensor(timestep, getattr(scheduler, "timesteps", sigmas).dtype, device)

    def build() -> tuple[Tensor]:
        return (_table(sigmas, noise_level, sde_type, device),)

    def build_sorted() -> tuple[Tensor, Tensor]:
        (table,) = build()
        return _by_value(timesteps.to(device=device, dtype=dtype, non_blocking=True), table)

    settings = "flow", sde_type, noise_level, device
    if hasattr(scheduler, "timesteps"):
        timesteps = scheduler.timesteps
        # What is asked of a schedule of floats came from it; of integers a half may be asked, and is refused.
        dtype = timesteps.dtype if timesteps.is_floating_point() else torch.promote_types(timesteps.dtype, asked.dtype)
        bounds, table = cached((timesteps, sigmas), (*settings, dtype), build_sorted)
        index = torch.searchsorted(bounds, asked.to(device=device, dtype=dtype, non_blocking=True), right=True)
    else:
        (table,) = cached((sigmas,), settings, build)
        index = torch.tensor([int(scheduler.index_for_timestep(t)) for t in asked]).to(device, non_blocking=True)
    if index.numel() not in (1, batch):
        raise ValueError(f"timestep: expected 1 or {batch} values, one a sample, got {index.numel()}")
    step = gather(table, index, batch)
    if is_host_readable(table) and bool(step.a.isnan().any()):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"timestep: {timestep} is not in the scheduler's timesteps; call set_timesteps first")
    return step._replace(extras=tuple(extra[: index.numel()] for extra in step.extras))  # pyright: ignore


def _table(sigmas: Tensor, noise_level: float, sde_type: str, device: torch.device) -> Tensor:
    """Coefficients of every step of a schedule, and the extras std_dev_t and √(σ - σ'), [7, T]."""
    levels = sigmas.to(device, non_blocking=True).double()
    sigma, sigma_next = levels[:-1], levels[1:]
    sqrt_dt = (sigma - sigma_next).sqrt()
    if sde_type == "cps":
        step = transitions.cps(sigma, sigma_next, noise_level)
        return table_of(step, torch.as_tensor(step.s), sqrt_dt, device=device)
    step = transitions.flow_sde(sigma, sigma_next, noise_level, levels[1])
    return table_of(step, step.s / sqrt_dt, sqrt_dt, device=device)


def _by_value(timesteps: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(bounds [2T], table [rows, 2T + 1]): column searchsorted(bounds, t, right=True) is that of timestep t.

    Bounds are the timesteps and the numbers next above them, in rising order, so that a number which is no timestep has
    a column of NaN. Of a timestep that occurs twice the second counts, as in diffusers.
    """
    above = timesteps.nextafter(timesteps.new_tensor(math.inf)) if timesteps.is_floating_point() else timesteps + 1
    bounds = torch.cat([timesteps, above]).sort().values
    found = timesteps == bounds[:, None]
    occurrence = found.cumsum(1)
    index = (found & (occurrence == occurrence[:, -1:].clamp(max=2))).to(torch.uint8).argmax(1)
    columns = torch.where(found.any(1), table[:, index], math.nan)
    return bounds, torch.cat([torch.full_like(table[:, :1], math.nan), columns], 1)


def _as_tensor(timestep: Timestep, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Timesteps in one dimension; numbers in the schedule's dtype, where that is one of floats."""
    if isinstance(timestep, Tensor):
        return timestep.reshape(-1)
    dtype = dtype if dtype.is_floating_point else torch.float64
    if isinstance(timestep, Sequence) and not isinstance(timestep, str):
        if all(isinstance(t, numbers.Real) for t in timestep):
            return torch.tensor([float(t) for t in timestep], dtype=dtype)
        return torch.stack([torch.as_tensor(t).reshape(()) for t in timestep])
    if isinstance(timestep, numbers.Real) and not isinstance(timestep, bool):
        # A fill, not a host-to-device copy.
        return torch.full((1,), float(timestep), dtype=dtype, device=device)
    raise TypeError(f"timestep: expected a number, or [B] or [1] timesteps, got {type(timestep).__name__}")
