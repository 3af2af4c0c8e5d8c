"""DDPO's step function (arXiv 2305.13301), which DanceGRPO's Stable Diffusion trainer uses too.

`from fastgrpo_kernels.compat.ddpo import ddim_step_with_logprob`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transitions
from .._checks import is_host_readable
from ..transitions import Transition
from . import gaussian
from ._tables import Step, cached, look_up, table_of


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: gaussian.Generator = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM-η step (arXiv 2010.02502, eq. 12 and 16) of a scheduler, used through its attributes.

    Of the scheduler: `alphas_cumprod` [N], `num_inference_steps` and of `config` num_train_timesteps, prediction_type
    (epsilon, v_prediction, sample), clip_sample and thresholding. `model_output`, `sample` and `prev_sample` are
    [B, ...]; `timestep` is a whole number (an int or a float), a scalar tensor of one, [1] or [B]. The level after the
    last step is ᾱ of timestep 0.
    `use_clipped_model_output` changes nothing, for nothing is clipped.

    Returns (prev_sample in sample's dtype, log-probability [B] in float32 of prev_sample as returned, mean over
    elements). Differentiable in `model_output`. Where there is no noise (eta = 0, timestep 0) there is no density: the
    log-probability is NaN. Raises ValueError or TypeError for tensors that do not fit, a sample that requires a
    gradient, both a generator and a prev_sample, before set_timesteps, for clip_sample or thresholding, which are not
    affine in the model output, and for an unknown prediction_type.
    """
    gaussian.check(sample=sample, model_output=model_output, prev_sample=prev_sample)
    eta = gaussian.number("eta", eta)
    if isinstance(timestep, float):
        if not timestep.is_integer():
            raise ValueError(f"timestep: must be a whole number, got {timestep}")
        timestep = int(timestep)
    gaussian.integers("timestep", timestep, self.config.num_train_timesteps)
    if self.num_inference_steps is None:
        raise ValueError("num_inference_steps: is None; call the scheduler's set_timesteps first")
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: a given prev_sample needs none; pass one of the two")
    if isinstance(timestep, Tensor) and timestep.numel() not in (1, sample.shape[0]):
        raise ValueError(f"timestep: expected 1 or {sample.shape[0]} values, one a sample, got {timestep.numel()}")
    step = _coefficients(self, timestep, eta, sample)
    if prev_sample is None:
        noise = gaussian.randn_like(model_output.detach(), generator)
        prev_sample = gaussian.sample(sample, model_output, step, noise, sample.dtype)
    log_prob = gaussian.log_prob(sample, model_output, prev_sample.detach(), step)
    return prev_sample.to(sample.dtype), log_prob


def _coefficients(scheduler: Any, timestep: int | Tensor, eta: float, sample: Tensor) -> Step:
    """The step's coefficients: floats where timestep and schedule are read without a copy, else rows of a table."""
    config, alphas = scheduler.config, scheduler.alphas_cumprod
    unaffine = {name: getattr(config, name, False) for name in ("clip_sample", "thresholding")}
    leap = config.num_train_timesteps // scheduler.num_inference_steps
    is_one = not isinstance(timestep, Tensor) or (is_host_readable(timestep) and timestep.numel() == 1)
    device = alphas.device if is_one and is_host_readable(alphas) else sample.device

    def build() -> tuple[Tensor]:
        now = alphas.double()
        # The level after the last step is that of timestep 0, which goes nowhere: its sample stays as it is.
        after = now[(torch.arange(len(now), device=now.device) - leap).clamp_min(0)]
        moves = after > now
        a, b, s = transitions.ddim(now, torch.where(moves, after, 1.0), eta, config.prediction_type, **unaffine)
        moved = Transition(torch.where(moves, a, 1.0), torch.where(moves, b, 0.0), torch.where(moves, s, 0.0))
        return (table_of(moved, device=device),)

    settings = "ddim", leap, eta, config.prediction_type, *unaffine.values()
    (table,) = cached((alphas,), device, settings, build)
    if is_one and is_host_readable(alphas):
        return Step(*table[:, int(timestep)].tolist())
    if isinstance(timestep, Tensor):
        index = timestep.to(device, non_blocking=True)
    else:
        index = torch.full((1,), timestep, dtype=torch.int64, device=device)
    return look_up(table, index, sample.shape[0])
