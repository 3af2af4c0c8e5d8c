"""What the step functions share: coefficients in float64, noise as the trainers draw it, and densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_integer, check_latents, check_no_grad, check_number, is_eager, is_host_readable, offender
from ..gaussian_step import gaussian_step
from ..log_prob.op import checked_log_prob
from ._tables import Step

Generator = torch.Generator | list[torch.Generator] | None


def number(name: str, value: object) -> float:
    """A finite Python or NumPy number as a float."""
    found = check_number(name, value)
    if not -math.inf < found < math.inf:
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
        found = offender(value, lambda t: (t < 0) | (t >= steps))
        raise ValueError(f"{name}: must be in [0, {steps}), got {found}")


def check(*, density: bool = True, **latents: object) -> None:
    """Refuse tensors that do not fit, under the names they have in the step function.

    `latents` are, in this order, those before the step, the model output, and those after it or None. A log-density has
    a gradient in the model output alone.
    """
    (name, before), (output, v), (after, y) = latents.items()
    check_latents(name, before)
    assert isinstance(before, Tensor)
    check_latents(output, v, like=before)
    if y is not None:
        check_latents(after, y, like=before)
    if density:
        check_no_grad(**{name: before})


def mean(x: Tensor, v: Tensor, a: float | Tensor, b: float | Tensor, dtype: torch.dtype) -> Tensor:
    """a·x + b·v, differentiable in both."""
    return gaussian_step(x, v, a, b, 0.0, None, out_dtype=dtype)


def sample(x: Tensor, v: Tensor, step: Step, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """a·x + b·v + s·noise, differentiable in x and v."""
    return gaussian_step(x, v, step.a, step.b, step.s, noise, out_dtype=dtype)


def log_prob(x: Tensor, v: Tensor, y: Tensor, step: Step) -> Tensor:
    """log N(y; a·x + b·v, s²), mean over elements [B], differentiable in v; NaN for a sample whose s is 0."""
    s = step.density
    if not isinstance(s, Tensor):
        if math.isnan(s):
            return torch.full((x.shape[0],), math.nan, dtype=torch.float32, device=x.device)
        return checked_log_prob(x, v, y, step.less_one, step.b, s)
    if is_eager(x, v, y):
        return checked_log_prob(x, v, y, step.less_one, step.b, s)
    # The custom operator refuses a standard deviation that is not a number.
    missing = s.isnan()
    value = checked_log_prob(x, v, y, step.less_one, step.b, torch.where(missing, 1.0, s))
    return value * torch.where(missing, math.nan, 1.0).to(value.dtype)


def negative_squared_error(x: Tensor, v: Tensor, y: Tensor, step: Step) -> Tensor:
    """-(y - a·x - b·v)², mean over elements [B], differentiable in v."""
    return checked_log_prob(x, v, y, step.less_one, step.b, None)


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
