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


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: gaussian.Generator = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM-η step (arXiv 2010.02502, eq. 12 and 16) of a scheduler, used through its attributes.

    Of the scheduler: `alphas_cumprod` [N], `num_inference_steps` and of `config` num_train_timesteps, prediction_type
    (epsilon, v_prediction, sample), clip_sample and thresholding. `model_output`, `sample` and `prev_sample` are
    [B, ...]; `timestep` is an int, a scalar, [1] or [B]. The level after the last step is ᾱ of timestep 0.
    `use_clipped_model_output` changes nothing, for nothing is clipped.

    Returns (prev_sample in sample's dtype, log-probability [B] in float32 of prev_sample as returned, mean over
    elements). Differentiable in `model_output`. Where there is no noise (eta = 0, timestep 0) there is no density: the
    log-probability is NaN. Raises ValueError or TypeError for tensors that do not fit, a sample that requires a
    gradient, both a generator and a prev_sample, before set_timesteps, for clip_sample or thresholding, which are not
    affine in the model output, and for an unknown prediction_type.
    """
    gaussian.check(model_output, prev_sample, sample=sample)
    eta = gaussian.number("eta", eta)
    gaussian.integers("timestep", timestep, self.config.num_train_timesteps)
    if self.num_inference_steps is None:
        raise ValueError("num_inference_steps: is None; call the scheduler's set_timesteps first")
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: a given prev_sample needs none; pass one of the two")
    step = _transition(self, timestep, eta)
    if isinstance(step.a, Tensor) and step.a.ndim and step.a.shape[0] != sample.shape[0]:
        raise ValueError(f"timestep: expected 1 or {sample.shape[0]} values, one a sample, got {step.a.shape[0]}")
    if prev_sample is None:
        noise = gaussian.randn_like(model_output.detach(), generator)
        prev_sample = gaussian.sample(sample, model_output, step, noise, sample.dtype)
    log_prob = gaussian.log_prob(sample, model_output, prev_sample.detach(), step)
    return prev_sample.to(sample.dtype), log_prob


def _transition(scheduler: Any, timestep: int | Tensor, eta: float) -> Transition:
    config = scheduler.config
    steps = config.num_train_timesteps
    alphas = scheduler.alphas_cumprod
    if not isinstance(timestep, Tensor):
        timestep = torch.full((), timestep, dtype=torch.int64, device=alphas.device)
    timestep = timestep.reshape(()) if timestep.numel() == 1 else timestep
    alphas = alphas.to(timestep.device, non_blocking=True).double()
    following = (timestep - steps // scheduler.num_inference_steps).clamp(0, steps - 1)
    # Indexing by a scalar on a device would wait for it.
    now, after = alphas.take(timestep.long()), alphas.take(following.long())
    # Timestep 0 goes nowhere: its sample stays as it is.
    moves = after > now
    a, b, s = transitions.ddim(
        now,
        torch.where(moves, after, 1.0),
        eta,
        config.prediction_type,
        clip_sample=getattr(config, "clip_sample", False),
        thresholding=getattr(config, "thresholding", False),
    )
    step = Transition(torch.where(moves, a, 1.0), torch.where(moves, b, 0.0), torch.where(moves, s, 0.0))
    if now.ndim == 0 and is_host_readable(now):
        # Numbers reach a kernel without a copy to the device.
        return Transition(*(float(c) for c in step))
    return step
