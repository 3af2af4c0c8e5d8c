"""FLUX.1-Kontext (rectified flow, image editing): FLUX with the source image's tokens beside the noisy ones.

The source's tokens are not denoised, and have 1 for 0 in the first axis of their positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.models.families.flux import Flux
from fastgrpo.models.families.image import scaled_latents, source_images
from fastgrpo.models.protocol import Conditioning


class FluxKontext(Flux):
    name = "flux_kontext"
    pipeline_classes = ("FluxKontextPipeline",)
    image_pipelines = pipeline_classes
    image_encoding = "source"

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        image, text = super().token_lengths(config, parts)
        return [2 * image, text]

    @cached_property
    def source_ids(self) -> Tensor:
        """Positions [rows · columns, 3] of the source's tokens."""
        ids = self.position_ids[1].clone()
        ids[:, 0] = 1
        return ids

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        # Its pipeline gives its levels to a scheduler that has its own too, where FLUX's does not.
        return super().timestep_arguments(scheduler, steps) | {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        # The pipeline itself would choose sizes near a megapixel for the source and for the result.
        size = {"max_area": self.config.height * self.config.width, "_auto_resize": False}
        return super().pipeline_arguments(steps) | size

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().encoded_shapes() | {"source": self.latent_shape}

    def encode_texts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return super().encode_prompts(prompts)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        vae = self.pipeline.vae
        pixels = source_images(self.pipeline.image_processor, prompts, self.config, self.device).to(self.vae_dtype)
        # One by one: at real sizes a batch's activations are gigabytes.
        latents = torch.cat([vae.encode(image[None]).latent_dist.mode() for image in pixels]).float()
        scaled = scaled_latents(vae, latents)
        return self.encode_texts(prompts) | {"source": self.pipeline._pack_latents(scaled, *scaled.shape)}

    def image_tokens(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        noisy, ids = super().image_tokens(x, conditioning)
        return torch.cat([noisy, conditioning["source"].to(self.dtype)], dim=1), torch.cat([ids, self.source_ids])
