"""A pipeline written with latent channels that nothing reads.

diffusers' FluxKontextPipeline takes an image of as many channels as its latents have for latents: a pipeline of three
latent channels could not be given a picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgrpo.commands.pretrain.recipe import TINY, PretrainConfig


@torch.no_grad()
def with_empty_channels(pipeline: Any, config: PretrainConfig) -> Any:
    """A copy of a FLUX pipeline with `config.empty_channels` more latent channels: they are 0 in every picture, the
    denoiser neither sees nor changes them, and the decoder does not look at them."""
    few = pipeline.vae.config.latent_channels
    many = few + config.empty_channels
    wide = TINY[config.family].build(config.model_copy(update={"sizes": {**config.sizes, "latent_channels": many}}))
    # Of the encoder's last convolution: means, then log-variances.
    moments = [*range(few), *range(many, many + few)]
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        state = getattr(wide, name).state_dict()
        for key, value in part.state_dict().items():
            rows = moments if key.startswith("encoder.conv_out") else list(range(len(value)))
            mine = state[key].zero_()
            mine[(rows, slice(value.shape[1])) if value.ndim > 1 else rows] = value
    wide.vae.state_dict()["encoder.conv_out.bias"][many + few :] = -20.0
    wide.vae.register_to_config(**{key: pipeline.vae.config[key] for key in ("scaling_factor", "shift_factor")})
    wide.scheduler = pipeline.scheduler
    return wide
