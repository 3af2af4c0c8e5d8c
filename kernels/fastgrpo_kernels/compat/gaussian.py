"""What the step functions share: coefficients in float64, noise as the trainers draw it, and densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_integer, check_latents, check_no_grad, check_number, is_host_readable
from ..gaussian_step import gaussian_step
from ..log_prob import log_prob as gaussian_log_prob
from ..transitions import Transition

Generator = torch.Generator | list[torch.Generator] | None

# The standard deviation at which a Gaussian's log-density is -π·(y - μ)², without a constant.
_UNIT = 1.0 / math.sqrt(2.0 * math.pi)


def number(name: str, value: object) -> float:
    """A finite Python or NumPy number as a float."""
    check_number(name, value)
    found = float(value)  # pyright: ignore[reportArgumentType]
    if not math.isfinite(found):
        raise ValueError(f"{name}: must be finite, got {value}")
    return found


def integers(name: str, value: object, steps: int) -> None:
    """Refuse anything but an integer, or a tensor of them, in [0, steps); a device's are not read."""
    if not isinstance(value, Tensor):
        check_integer(name, value, 0, steps)
        return
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    if is_host_readable(value) and not ((value >= 0) & (value < steps)).all():
        raise ValueError(f"{name}: must be in [0, {steps}), got {value}")


def check(model_output: object, prev_sample: object, *, density: bool = True, **latents: object) -> None:
    """Refuse tensors that do not fit, under the names they have in the step function; `latents` is the one before it.

    A log-density has a gradient in the model output alone.
    """
    ((name, sample),) = latents.items()
    check_latents(name, sample)
    assert isinstance(sample, Tensor)
    check_latents("model_output", model_output, like=sample)
    if prev_sample is not None:
        check_latents("prev_sample", prev_sample, like=sample)
    if density:
        check_no_grad(**{name: sample})


def mean(x: Tensor, v: Tensor, step: Transition, dtype: torch.dtype) -> Tensor:
    """a·x + b·v, differentiable in both."""
    return gaussian_step(x, v, step.a, step.b, 0.0, None, out_dtype=dtype)


def sample(x: Tensor, v: Tensor, step: Transition, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """a·x + b·v + s·noise, differentiable in x and v."""
    return gaussian_step(x, v, step.a, step.b, step.s, noise, out_dtype=dtype)


def log_prob(x: Tensor, v: Tensor, y: Tensor, step: Transition) -> Tensor:
    """log N(y; a·x + b·v, s²), mean over elements [B], differentiable in v; NaN for a sample whose s is 0."""
    s = step.s
    if not isinstance(s, Tensor):
        if s > 0.0:
            return gaussian_log_prob(x, v, y, step.a, step.b, s)
        return torch.full((x.shape[0],), math.nan, device=x.device)
    has_density = s > 0.0
    value = gaussian_log_prob(x, v, y, step.a, step.b, torch.where(has_density, s, 1.0))
    return torch.where(has_density.to(value.device), value, math.nan)


def negative_squared_error(x: Tensor, v: Tensor, y: Tensor, step: Transition) -> Tensor:
    """-(y - a·x - b·v)², mean over elements [B], differentiable in v."""
    return gaussian_log_prob(x, v, y, step.a, step.b, _UNIT) / math.pi


def randn_like(tensor: Tensor, generator: Generator) -> Tensor:
    """Noise in the shape, dtype and order in which diffusers draws it: one generator, or one for each sample."""
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, list):
        if len(generator) != tensor.shape[0]:
            raise ValueError(f"generator: expected {tensor.shape[0]} generators, one a sample, got {len(generator)}")
        return torch.cat([randn_like(row, g) for row, g in zip(tensor.split(1), generator, strict=True)])
    device = tensor.device if generator is None else generator.device
    return torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype).to(tensor.device)


def column(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, …] in float32, of the dimensions of `like`."""
    return per_sample.to(torch.float32).view(-1, *[1] * (like.ndim - 1))
