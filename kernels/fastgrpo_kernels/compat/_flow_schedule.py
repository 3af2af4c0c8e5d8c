"""Coefficients of a flow-matching scheduler by timestep, for the step functions of Flow-GRPO and Flow-Factory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from ..transitions import Transition
from ._tables import Step, cached, look_up, table_of, tensor

Timestep = float | Tensor | Sequence[float]
Sampler = Literal["flow_sde", "dance_sde", "cps", "ode"]


class Extras(NamedTuple):
    """What step functions return besides latents, [1] or [B] as timesteps were asked.

    `std_dev_t` is what the projects call so: η_t of an SDE, the standard deviation itself of CPS. `dt` is σ' - σ.
    """

    std_dev_t: Tensor
    sqrt_dt: Tensor
    dt: Tensor


def coefficients(
    scheduler: Any,
    timestep: Timestep,
    noise_level: float,
    sampler: Sampler,
    sample: Tensor,
    sigma_max: float | None = None,
    timestep_next: float | Tensor | None = None,
) -> tuple[Step, Extras]:
    """The coefficients of the steps from these timesteps, for the samples of `sample` [B, ...].

    A scheduler has `sigmas` [T + 1], and `timesteps` [T] or `index_for_timestep`. `sigma_max` stands for σ = 1 in the
    denominator of Flow-SDE; the second level does by default. With `timestep_next`, 0 after the last, a step is one
    that ends there too; it needs `timesteps`.
    """
    sigmas, device, batch = scheduler.sigmas, sample.device, sample.shape[0]
    asked = _as_tensor(timestep, getattr(scheduler, "timesteps", sigmas).dtype, device)

    def build() -> tuple[Tensor]:
        return (_table(sigmas, noise_level, sampler, sigma_max, device),)

    def build_sorted() -> tuple[Tensor, Tensor]:
        (table,) = build()
        keys = timesteps.to(device=device, dtype=dtype, non_blocking=True)
        if timestep_next is not None:
            keys = _pairs(keys, torch.cat([keys[1:], keys.new_zeros(1)]))
        return _by_value(keys, table)

    settings = "flow", sampler, noise_level, sigma_max, timestep_next is None
    if hasattr(scheduler, "timesteps"):
        timesteps = scheduler.timesteps
        if len(timesteps) >= len(sigmas):
            found = f"{len(timesteps)} of {len(sigmas)} sigmas"
            raise ValueError(f"timesteps: expected one less than sigmas, got {found}; call set_timesteps first")
        # What is asked of a schedule of floats came from it; of integers a half may be asked, and is refused.
        dtype = timesteps.dtype if timesteps.is_floating_point() else torch.promote_types(timesteps.dtype, asked.dtype)
        bounds, table = cached((timesteps, sigmas), device, (*settings, dtype), build_sorted)
        keys = asked.to(device=device, dtype=dtype, non_blocking=True)
        if timestep_next is not None:
            following = _as_tensor(timestep_next, dtype, device)
            keys = _pairs(keys, following.to(device=device, dtype=dtype, non_blocking=True))
        # A column of a batch's timesteps is copied here, which searchsorted would do with a warning.
        index = torch.searchsorted(bounds, keys.contiguous(), right=True)
    else:
        (table,) = cached((sigmas,), device, settings, build)
        found = [int(scheduler.index_for_timestep(t)) for t in asked]
        index = torch.tensor(found, device="cpu").to(device, non_blocking=True)
    if index.numel() not in (1, batch):
        raise ValueError(f"timestep: expected 1 or {batch} values, one a sample, got {index.numel()}")
    step = look_up(table, index, batch)
    if is_host_readable(table) and bool(tensor(step.a).isnan().any()):
        if timestep_next is not None and bool(torch.isin(asked, scheduler.timesteps).all()):
            raise ValueError(f"timestep_next: expected the scheduler's next timestep, got {timestep_next}")
        raise ValueError(f"timestep: {timestep} is not in the scheduler's timesteps; call set_timesteps first")
    return step, Extras(*(tensor(extra)[: index.numel()] for extra in step.extras))


def _table(
    sigmas: Tensor, noise_level: float, sampler: Sampler, sigma_max: float | None, device: torch.device
) -> Tensor:
    """Coefficients of every step of a schedule, and the extras, [8, T]."""
    levels = sigmas.to(device, non_blocking=True).double()
    sigma, sigma_next = levels[:-1], levels[1:]
    dt = sigma_next - sigma
    sqrt_dt = (-dt).sqrt()
    if sampler == "cps":
        step = transitions.cps(sigma, sigma_next, noise_level)
        std_dev_t = tensor(step.s)
    elif sampler == "flow_sde":
        step = transitions.flow_sde(sigma, sigma_next, noise_level, levels[1] if sigma_max is None else sigma_max)
        std_dev_t = step.s / sqrt_dt
    elif sampler == "dance_sde":
        step = transitions.dance_sde(sigma, sigma_next, noise_level)
        std_dev_t = torch.full_like(sigma, noise_level)
    else:
        step = transitions.ode(sigma, sigma_next)
        std_dev_t = torch.zeros_like(sigma)
    return table_of(Transition(*step), std_dev_t, sqrt_dt, dt, device=device)


def _pairs(timesteps: Tensor, following: Tensor) -> Tensor:
    """A number for each step from a timestep to the following, int64 [T]: the two of them in float32, side by side."""
    both = torch.broadcast_tensors(timesteps.float(), following.float())
    return torch.stack(both, -1).view(torch.int64).flatten()


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
            return torch.tensor([float(t) for t in timestep], dtype=dtype, device="cpu")
        each = [t if isinstance(t, Tensor) else torch.tensor(t, device="cpu") for t in timestep]
        return torch.stack([t.reshape(()) for t in each])
    if isinstance(timestep, numbers.Real) and not isinstance(timestep, bool):
        # A fill, not a host-to-device copy.
        return torch.full((1,), float(timestep), dtype=dtype, device=device)
    raise TypeError(f"timestep: expected a number, or [B] or [1] timesteps, got {type(timestep).__name__}")
